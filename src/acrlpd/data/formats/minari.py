"""An ``EpisodeSource`` in memory of Minari datasets, read with the ``minari`` library.

The library stores one more observation than actions: row t pairs observation t with action t, and the last observation
is the final one. The numbers of a dictionary observation are put side by side, sorted by name; uint8 pictures become
cameras if they are colour or grey (``pictures.rgb_rows``). ``terminations`` are the terminals; ``truncations`` end an
episode without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from acrlpd import files
from acrlpd.data.formats import pictures
from acrlpd.data.formats.layouts.columns import Reading, check_inside
from acrlpd.data.formats.pictures import PictureError
from acrlpd.data.formats.rewards import Labeller, RewardConfig
from acrlpd.data.store.episodes import IMAGE_PREFIX, BadEpisodes, EpisodeStore, HeldEpisodes, check_fps, told_numbers
from acrlpd.types import Episode, FinalObservation

PREFIX = "minari:"


class MinariSource(HeldEpisodes):
    """All episodes of a dataset.

    Args:
        dataset: ``minari:<dataset id>`` for a dataset in the library's own folder, or the folder of a dataset.
        state_keys: parts of a dictionary observation (``a/b`` if nested); None takes all numbers.
        rewards: how rewards are assigned. None keeps stored rewards.
        default_task: the instruction; the format has none.
        fps: the rate of the recording; the format has none.

    Raises:
        ImportError: ``minari`` is not installed.
        ValueError: an episode cannot be used; the error names the dataset, the episode and the key.
    """

    def __init__(
        self,
        dataset: str | os.PathLike[str],
        *,
        state_keys: Sequence[str] | None = None,
        rewards: RewardConfig | None = None,
        default_task: str = "",
        fps: float | None = None,
        on_bad_episode: Literal["error", "skip"] = "error",
    ):
        self.fps = check_fps(fps)
        found = _opened(str(dataset))
        bad = BadEpisodes(on_bad_episode)
        self._store = EpisodeStore()
        left_out: dict[str, str] = {}
        labeller = Labeller.of(rewards, [np.asarray(episode.rewards) for episode in found])
        for episode in found.iterate_episodes():
            source = f"{dataset}: episode {episode.id}"
            with bad.guard(source):
                self._store.append(_episode(episode, source, state_keys, labeller, default_task))
                left_out |= _readable(episode, state_keys)[1]
        bad.report(str(dataset), int(found.total_episodes))
        self.skipped = bad.skipped
        self.left_out = [f"{key} ({why})" for key, why in left_out.items()]

    format = "minari"


def _opened(dataset: str) -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"{dataset}: reading Minari datasets needs minari: pip install 'acrlpd[minari]'") from error
    if dataset.startswith(PREFIX):
        found = minari.load_dataset(dataset.removeprefix(PREFIX))
        if (folder := Path(found.storage.data_path)).is_dir():
            _check_files(folder)
        return found
    path = Path(dataset)
    folder = path.parent if path.is_file() else path
    folder = folder / "data" if (folder / "data").is_dir() else folder
    _check_files(folder)
    return minari.MinariDataset(folder)


def _check_files(folder: Path) -> None:
    """Refuse links to other files, and files that the library would wait for or misread."""
    files.read_json(folder / "metadata.json")
    stored = folder / "main_data.hdf5"
    if not stored.exists():  # the library can also store Arrow files
        return files.check_folder(folder)
    with Reading(stored) as file:
        check_inside(str(stored), file)
    return None


def _episode(found: Any, source: str, state_keys: Sequence[str] | None, labeller: Labeller, task: str) -> Episode:
    length = len(found.actions)
    parts, _ = _readable(found, state_keys)
    images = {name: part[:length] for name, part in parts.items() if name not in (state_keys or ()) and part.ndim == 4}
    names = sorted(name for name in parts if name not in images) if state_keys is None else list(state_keys)
    unknown = [name for name in names if name not in parts]
    if unknown or not names:
        there = dict(_parts(found.observations))
        raise ValueError(f"{source}: state: {unknown or 'no numbers'} among the observations {files.listed(there)}")
    if isinstance(found.actions, Mapping | tuple):
        raise ValueError(f"{source}: actions: expected one array, found {type(found.actions).__name__}")
    stored = np.asarray(found.rewards, np.float32)
    recorded = found.infos.get("success") if found.infos else None
    config = labeller.config
    success = labeller.success(None if recorded is None else bool(np.any(recorded)), None if config is None else stored)
    own = np.asarray(found.terminations, bool) if config is None or config.convention == "as_stored" else None
    rewards, terminals = labeller.label(length, success=success, stored=stored, terminals=own, where=source)
    read = [parts[name] for name in (*names, *images)]
    last = None
    if all(len(part) == length + 1 for part in read):
        numbers = np.concatenate([parts[name][length].ravel() for name in names], dtype=np.float32)
        last = FinalObservation(numbers, {name: parts[name][length] for name in images})
    return Episode(
        state=np.concatenate([parts[name][:length].reshape(length, -1) for name in names], axis=1, dtype=np.float32),
        actions=np.asarray(found.actions, np.float32).reshape(length, -1),
        rewards=rewards,
        terminals=terminals,
        task=task,
        images=images,
        success=success,
        source=source,
        final=last,
    )


def _parts(observations: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of an observation by name; a plain array is named ``observation``."""
    if not isinstance(observations, Mapping):
        yield prefix or "observation", np.asarray(observations)
        return
    for name, part in observations.items():
        yield from _parts(part, f"{prefix}/{name}" if prefix else name)


def _readable(found: Any, state_keys: Sequence[str] | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the parts of an episode's observations to read, pictures as RGB, and the others with the reason."""
    readable, left_out = {}, {}
    for name, part in _parts(found.observations):
        if _is_picture(name, part) and name not in (state_keys or ()):
            try:
                readable[name] = _as_camera(name, part)
            except PictureError as error:
                left_out[IMAGE_PREFIX + name] = str(error)
        elif state_keys is None or name in state_keys:
            readable[name] = part
        else:
            left_out[name] = told_numbers(part.shape[1:])
    for name, part in _parts(found.infos or {}, "infos"):
        if part.dtype.kind in "fiub" and name != "infos/success":
            left_out[name] = told_numbers(part.shape[1:])
    return readable, left_out


def _is_picture(name: str, part: np.ndarray) -> bool:
    return part.ndim >= 3 and (part.dtype == np.uint8 or pictures.is_depth(name))


def _as_camera(name: str, part: np.ndarray) -> np.ndarray:
    if pictures.is_depth(name):
        raise PictureError(pictures.DEPTH_BY_NAME)
    return pictures.rgb_rows(part)
