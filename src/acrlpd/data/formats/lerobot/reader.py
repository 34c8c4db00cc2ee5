"""An ``EpisodeSource`` that reads LeRobot datasets, v2.0, v2.1 and v3.0, from their files.

Numbers come from parquet columns, pictures from embedded images or from videos by presentation time. Opening a dataset
reads the low-dimensional columns of all episodes once, to check them, and looks at one picture of each camera (for a
video: at its header) to check that it is 8-bit colour; no other picture is read until it is asked for.
Row t of ``next.reward`` and ``next.success`` holds the result of the action in row t. ``next.done`` is not used: an
episode ends where its rows end.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt8

from acrlpd.data.formats.frame_cache import FrameCache, FrameOrigin
from acrlpd.data.formats.lerobot import meta as lerobot_meta
from acrlpd.data.formats.lerobot import opening as lerobot_opening
from acrlpd.data.formats.lerobot.files import EpisodeFacts, LeRobotFiles
from acrlpd.data.formats.lerobot.meta import REQUIRED, REWARD, SUCCESS, TASK_INDEX, TERMINAL, EpisodeRow
from acrlpd.data.formats.lerobot.opening import Opening
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store import flat
from acrlpd.data.store.episodes import (
    IMAGE_PREFIX,
    NUMBERS,
    BadEpisodes,
    EpisodeInfo,
    check_is_read,
    first_text,
    whole_episode,
)
from acrlpd.data.store.metadata_cache import Arrays, MetadataCache, unpack
from acrlpd.files import cache_folder, inside
from acrlpd.types import Episode

TOLERANCE_S = 1e-4  # the default of the lerobot library


class LeRobotSource:
    """Episodes of a LeRobot dataset, in the order of their numbers. See ``EpisodeSource``.

    Besides that protocol's keys, ``window`` accepts every column and camera by its stored name, and ``task``, which
    gives one text per frame.

    Args:
        root: the dataset's folder, or a LeRobotDataset of the ``lerobot`` library. Its selection of ``episodes`` is
            used; its ``delta_timestamps`` and transforms are not.
        episodes: numbers of the episodes to read, in this order; None reads all. Methods take positions in this
            selection as index; ``numbers`` has the stored numbers.
        state_keys, action_keys: columns that are concatenated into the state and the actions; None looks for the usual
            ones.
        cameras: names without ``observation.images.``; None takes all that hold 8-bit colour (no depth), and an empty
            list reads no pictures.
        default_task: the instruction of frames whose task has an empty text.
        rewards: None keeps rewards as stored, and 0 if there are none: good for imitation only.
        on_bad_episode: ``"skip"`` leaves out broken episodes, with a warning that says which and why; see ``skipped``.
        check_images: decode every picture when opening. None decodes if bad episodes are skipped, because an episode
            cannot be left out later. This is slow, but ``metadata_cache`` remembers the result. Skipping without it
            only checks that the frames are there.
        tolerance_s: how far a timestamp may be from its place, and a video frame from its timestamp. None: the
            tolerance of the LeRobotDataset, else 1e-4.
        frame_cache: the cache to read frames from first. All frames then have the cache's resolution.
        metadata_cache: the cache of the results of opening. None reads every episode each time.
    """

    def __init__(
        self,
        root: Any,
        *,
        episodes: Sequence[int] | None = None,
        state_keys: Sequence[str] | None = None,
        action_keys: Sequence[str] | None = None,
        cameras: Sequence[str] | None = None,
        default_task: str = "",
        rewards: RewardConfig | None = None,
        on_bad_episode: Literal["error", "skip"] = "error",
        check_images: bool | None = None,
        tolerance_s: float | None = None,
        frame_cache: FrameCache | None = None,
        metadata_cache: MetadataCache | None = None,
    ):
        folder, episodes = _opened(root, episodes)
        tolerance_s = getattr(root, "tolerance_s", TOLERANCE_S) if tolerance_s is None else tolerance_s
        check_images = on_bad_episode == "skip" if check_images is None else check_images
        self.meta = lerobot_meta.read(folder)
        self.robot_type = self.meta.robot_type
        self.state_keys = lerobot_meta.state_keys(self.meta, state_keys)
        self.action_keys = lerobot_meta.action_keys(self.meta, action_keys)
        camera_keys, unread = lerobot_meta.camera_keys(self.meta, cameras)
        optional = [key for key in (REWARD, SUCCESS, TERMINAL) if key in self.meta.features]
        columns = (*dict.fromkeys((*self.state_keys, *self.action_keys, *REQUIRED, *optional)),)
        self._files = LeRobotFiles(self.meta, columns, tolerance_s)
        self._default_task = default_task
        self._frame_cache, self._metadata_cache = frame_cache, metadata_cache
        selected = _selected(self.meta, episodes)
        bad, are_chosen = BadEpisodes(on_bad_episode), cameras is not None
        opening = Opening(
            self._files,
            {"state": self.state_keys, "actions": self.action_keys},
            camera_keys,
            rewards,
            bad,
            check_images=check_images,
            are_chosen=are_chosen,
            folder=metadata_cache.folder if metadata_cache else None,
        )
        self._opened_videos = opening.opens_videos
        numbers = [row.number for row in selected] if episodes is not None else None
        asked = (columns, camera_keys, not are_chosen, numbers, rewards, on_bad_episode, check_images, tolerance_s)
        find_out = functools.partial(opening.find_out, selected)
        opened = metadata_cache.get(folder, asked, find_out) if metadata_cache else find_out()
        facts = unpack(opened["facts"])
        self.skipped = [tuple(entry) for entry in facts["skipped"]]  # name and fault of each episode left out
        self._camera_keys = {name: key for name, key in camera_keys.items() if name not in facts["unread"]}
        used = (*self.state_keys, *self.action_keys, *self.meta.cameras)
        self.left_out = [f"{IMAGE_PREFIX}{name} ({why})" for name, why in (unread | facts["unread"]).items()]
        self.left_out += lerobot_meta.unused(self.meta, used)  # columns that are there but not read
        self._files.sizes = {key: (height, width) for key, (height, width) in facts["sizes"].items()}
        self._facts = lerobot_opening.episodes_of(opened, self.meta)
        self.lengths = np.array([facts.row.length for facts in self._facts])
        self._ends = np.cumsum(self.lengths)
        self.flat = flat.Flat({key: opened[key] for key in NUMBERS})

    @property
    def num_episodes(self) -> int:
        return len(self._facts)

    @property
    def numbers(self) -> list[int]:
        """The stored number (``episode_index``) of each episode."""
        return [facts.row.number for facts in self._facts]

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._camera_keys)

    @property
    def format(self) -> str:
        return f"lerobot {self.meta.version}"

    @property
    def fps(self) -> float:
        return self.meta.fps

    def info(self, index: int) -> EpisodeInfo:
        facts = self._facts[index]
        (_, task), *changes = ((frame, self._text(task)) for frame, task in facts.tasks)
        return EpisodeInfo(facts.row.length, task, facts.success, facts.where, tuple(changes))

    @property
    def untold_tasks(self) -> list[str]:
        """Descriptions that distinguish the tasks without a text."""
        indices = sorted({task for facts in self._facts for _, task in facts.tasks})
        return [f"task_index {task}" for task in indices if not self._text(task).strip()]

    def _text(self, task_index: int) -> str:
        return first_text(self.meta.tasks[task_index], self._default_task)

    def episode(self, index: int) -> Episode:
        return whole_episode(self, index)

    def window(self, index: int, key: str, start: int, stop: int) -> Shaped[np.ndarray, "t *shape"]:
        facts = self._facts[index]
        if not 0 <= start <= stop <= facts.row.length:
            raise IndexError(f"{facts.where}: window {start}..{stop} leaves the episode (0..{facts.row.length})")
        if key in self.flat:
            first = int(self._ends[index]) - facts.row.length
            return self.flat.window(key, first + start, first + stop)
        if key == "task":
            indices = self._files.rows(facts, TASK_INDEX)[start:stop].ravel().tolist()
            return np.array([self._text(index) for index in indices], np.str_)
        if key.startswith(IMAGE_PREFIX) and key.removeprefix(IMAGE_PREFIX) in self._camera_keys:
            return self._frames(facts, key.removeprefix(IMAGE_PREFIX), start, stop)
        names = {stored: name for name, stored in self._camera_keys.items()}
        if key in names:
            return self._frames(facts, names[key], start, stop)
        if key.startswith(IMAGE_PREFIX):
            check_is_read(facts.where, key, self.left_out)
        return np.array(self._files.rows(facts, key)[start:stop])

    def frame_origin(self, index: int, camera: str) -> FrameOrigin:
        """Return the file from which the frames of a camera come, for the frame cache."""
        return self._origin(self._facts[index], camera)

    def _origin(self, facts: EpisodeFacts, camera: str) -> FrameOrigin:
        row, key = facts.row, self._camera_keys[camera]
        if key in row.videos:
            span = row.videos[key]
            return FrameOrigin(lerobot_opening.name_of(row), span.path, f"{span.start_s!r}:{row.length}")
        return FrameOrigin(lerobot_opening.name_of(row), row.file, f"{facts.first}:{row.length}")

    def check_videos(self) -> None:
        """Raise at the first episode whose videos do not hold the frames in the tables, or have another size.

        Only headers are read. Opening reads no videos unless episodes may be skipped, because numbers and statistics
        need none. With a frame cache sizes may differ, because it resizes all frames.
        """
        keys, any_size = self._camera_keys, self._frame_cache is not None
        if self._opened_videos or not lerobot_opening.video_keys(self.meta, keys.values()):
            return

        def find_out() -> Arrays:
            lerobot_opening.check_videos(self._files, self._facts, keys.values(), any_size=any_size)
            return {"are_alike": np.array(True)}

        asked = ("videos", keys, self.numbers, self._files.tolerance_s, not any_size)
        if self._metadata_cache is None:
            find_out()
        else:
            self._metadata_cache.get(self.meta.root, asked, find_out)

    def _frames(self, facts: EpisodeFacts, camera: str, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        key = self._camera_keys[camera]
        if self._frame_cache is None:
            return self._files.frames(facts, key, start, stop)
        cached = self._frame_cache.read(camera, self._origin(facts, camera), facts.row.length, start, stop)
        return self._frame_cache.resize(self._files.frames(facts, key, start, stop)) if cached is None else cached


def download(repo_id: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Copy a dataset from the Hugging Face hub into ``folder``; files that are there already are not copied again.

    Raises:
        ConnectionError: there is no network, no such dataset, or no access to it.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("downloading datasets needs huggingface-hub: pip install 'acrlpd[remote]'") from error
    name = repo_id.removeprefix("hf://").removeprefix("datasets/")
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_dir=Path(folder)))
    except OSError as error:  # the library's own errors are among them
        raise ConnectionError(
            f"could not copy the dataset {name} to {folder}: {error}. Check its name, the network and your access, or "
            "copy it there by hand."
        ) from error


def hub_folder(repo_id: str) -> Path:
    """Return the folder for a dataset of the hub, which may not exist yet."""
    name = repo_id.removeprefix("hf://").removeprefix("datasets/")
    return inside(cache_folder("lerobot"), name, "the name of a dataset")


def _opened(root: Any, episodes: Sequence[int] | None) -> tuple[Path, Sequence[int] | None]:
    """Return folder and selection from a path or a LeRobotDataset, which is recognized by its attributes."""
    if isinstance(root, (str, os.PathLike)):
        return dataset_folder(root), episodes
    if hasattr(root, "repo_ids"):
        raise TypeError(f"{type(root).__name__} holds several datasets: open them one by one, each by its folder")
    folder = getattr(getattr(root, "meta", None), "root", None)
    if folder is None:
        raise TypeError(f"expected a folder or a LeRobotDataset, got {type(root).__name__} without meta.root")
    return dataset_folder(folder), getattr(root, "episodes", None) if episodes is None else episodes


def dataset_folder(root: str | os.PathLike[str]) -> Path:
    """Return the folder if it exists; otherwise the error says how to copy a dataset from the hub."""
    folder = Path(root)
    if folder.is_dir():
        return folder
    name = str(root).removeprefix("hf://").removeprefix("datasets/")
    if str(root).startswith("hf://") or re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)):
        raise FileNotFoundError(
            f"{root}: no such folder. If it is a dataset on the Hugging Face hub, copy it first with "
            f"acrlpd.data.formats.lerobot.reader.download({name!r}, 'some/folder') and open that folder "
            "(needs pip install 'acrlpd[remote]')."
        )
    raise FileNotFoundError(f"{root}: no such folder. Point root at the folder that holds meta/info.json.")


def _selected(meta: lerobot_meta.Meta, episodes: Sequence[int] | None) -> list[EpisodeRow]:
    if episodes is None:
        return meta.episodes
    numbers = np.asarray(episodes).ravel().tolist()
    known = all(isinstance(number, int) and 0 <= number < len(meta.episodes) for number in numbers)
    if not known or len(set(numbers)) < len(numbers) or not numbers:
        last = len(meta.episodes) - 1
        raise ValueError(f"{meta.root}: episodes must be different numbers in 0..{last}, got {numbers}")
    return [meta.episodes[number] for number in numbers]
