"""Open recorded episodes of any supported format by path: the entry point of commands and training."""

from __future__ import annotations

import collections
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from acrlpd.data.formats.hdf5 import SUFFIXES, H5DatasetReader
from acrlpd.data.formats.layouts import droid
from acrlpd.data.formats.lerobot import reader as lerobot
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.formats.minari import PREFIX as MINARI_PREFIX
from acrlpd.data.formats.minari import MinariSource
from acrlpd.data.formats.npz import NpzReader
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import EpisodeSource, OptionError
from acrlpd.data.store.metadata_cache import MetadataCache

logger = logging.getLogger(__name__)

UNDERSTOOD = (
    "a LeRobot dataset v2.0, v2.1 or v3.0 (a folder with meta/info.json, or the lerobot library's object); a folder of "
    "episode_*.hdf5 (acrlpd, ALOHA/ACT); a robomimic or LIBERO .hdf5 file; DROID's folders with trajectory.h5; an "
    "OGBench .npz file; a Minari dataset (its folder, or minari:<dataset id>)"
)

Format = Literal["lerobot", "hdf5", "npz", "minari"]


class Dataset(EpisodeSource, Protocol):
    """An ``EpisodeSource`` with the facts that every reader knows about its data set."""

    @property
    def format(self) -> str:
        """The format: ``acrlpd``, ``aloha``, ``lerobot v3.0``, ..."""
        ...

    @property
    def fps(self) -> float | None:
        """The steps per second; None if the format does not say."""
        ...

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The name and the fault of each episode that was left out."""
        ...

    @property
    def untold_tasks(self) -> Sequence[str]:
        """Descriptions that distinguish the tasks without an instruction, such as file names; may be empty."""
        ...

    @property
    def left_out(self) -> list[str]:
        """The keys of cameras and numbers that are not read, each with the reason or its size in brackets."""
        ...


def open_episodes(
    data: Any,
    *,
    on_bad_episode: Literal["error", "skip"] = "error",
    rewards: RewardConfig | None = None,
    num_workers: int = 0,
    remember: bool = True,
    **options: Any,
) -> Dataset:
    """Open the episodes at a path, or of an object of the ``lerobot`` library, in any supported format.

    Args:
        on_bad_episode: ``"skip"`` leaves out episodes that cannot be used, with a warning that says which and why.
        rewards: how rewards are assigned. None keeps stored rewards, and 0 if there are none (good for imitation only).
        num_workers: processes that read the episodes of HDF5 data when it is opened for the first time.
        remember: keep the results of opening in the user's cache directory, for the next time.
        options: the reader's own, such as ``cameras`` or ``state_keys``: see ``options.ReaderOptions``, and
            ``H5DatasetReader``, ``LeRobotSource``, ``NpzReader`` and ``MinariSource``.

    Raises:
        ValueError: there is no data in a supported format; an episode cannot be used; an option does not apply.
    """
    kind = identify(data)
    reader: Callable[..., Dataset] = READERS[kind]
    known = inspect.signature(reader).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        own = ", ".join(name for name in list(known)[1:] if name not in GENERAL)
        raise OptionError(f"{data}: {', '.join(unknown)} means nothing to {kind} data. It has the options {own}.")
    options["rewards"] = rewards
    if "num_workers" in known:
        options["num_workers"] = num_workers
    if "metadata_cache" in known and remember:
        options["metadata_cache"] = MetadataCache()
    if kind == "minari" and isinstance(data, os.PathLike):
        data = str(data)
    dataset = reader(data, on_bad_episode=on_bad_episode, **options)
    if dataset.left_out:
        logger.warning("%s: not read: %s", data, ", ".join(dataset.left_out))
    return dataset


# arguments that are not options of one format
GENERAL = ("episode_metadata", "metadata_cache", "num_workers", "on_bad_episode", "rewards")
READERS: dict[Format, Callable[..., Dataset]] = {
    "lerobot": LeRobotSource,
    "hdf5": H5DatasetReader,
    "npz": NpzReader,
    "minari": MinariSource,
}


def identify(data: Any) -> Format:
    """Return which reader a path or object needs; only names are checked.

    Raises:
        ValueError: no reader fits; the error says what was found and which formats are supported.
        FileNotFoundError: there is no such file or folder.
    """
    if not isinstance(data, (str, os.PathLike)):
        return "lerobot"  # whose reader reports what is missing
    if str(data).startswith(MINARI_PREFIX):
        return "minari"
    path = Path(data)
    if path.is_file():
        return _identify_file(path)
    if not path.is_dir():
        if str(data).startswith("hf://") or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(data)):
            lerobot.dataset_folder(data)  # raises an error that says how to copy the dataset from the hub
        raise FileNotFoundError(f"{data}: no such file or folder. Point it at recorded episodes: {UNDERSTOOD}.")
    if (path / "meta/info.json").is_file():
        return "lerobot"
    if any((path / name).is_file() for name in ("data/metadata.json", "metadata.json")):
        return "minari"
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if any(name.endswith(SUFFIXES) and not (path / name).is_dir() for name in names):
        return "hdf5"
    below = [name for name in names if (path / name / "meta/info.json").is_file()]
    if below:
        raise ValueError(f"{path}: this folder holds LeRobot datasets. Name one of them, such as {path / below[0]}.")
    if any(droid.trajectories(path)):
        return "hdf5"
    arrays = [name for name in names if name.endswith(".npz")]
    if arrays:
        raise ValueError(f"{path}: an OGBench data set is one file. Name one of {', '.join(arrays[:5])}.")
    raise ValueError(f"{path}: found {_described(path, names)}, and no episodes. Understood are {UNDERSTOOD}.")


def _identify_file(path: Path) -> Format:
    if path.suffix in SUFFIXES:
        return "minari" if path.name == "main_data.hdf5" else "hdf5"
    if path.suffix == ".npz":
        return "npz"
    if path.name == "info.json" and path.parent.name == "meta":
        raise ValueError(f"{path}: name the dataset's folder instead, {path.parent.parent}.")
    raise ValueError(f"{path}: found a file of type {path.suffix or 'unknown'}. Understood are {UNDERSTOOD}.")


def _described(path: Path, names: list[str]) -> str:
    """Describe the content of a folder by kinds of files."""

    def kinds() -> Iterator[str]:
        for name in names:
            yield "folders" if (path / name).is_dir() else f"{Path(name).suffix or 'other'} files"

    counts = collections.Counter(kinds()).most_common(5)
    return ", ".join(f"{count} {kind}" for kind, count in counts) or "an empty folder"
