"""OGBench's manipulation data, one ``.npz`` per data set: play data without rewards, relabelled for one goal.

    observations (R, s)   actions (R, a)   terminals (R,)   qpos (R, q)   button_states (R, buttons), in some

The visual sets have pictures as observations, uint8 (R, h, w, 3), and no numbers: they become the camera
``front_pixels``, and the state is one number that is always 0. Stacked frames (R, h, w, 3 k) become k cameras in the
order of their channels, ``front_pixels_0`` and so on.

``terminals`` flags the last row of each trajectory, for any reason. That row is dropped, as in OGBench, because nothing
in the file follows its action. Its observation is the final one of the trajectory. ``qpos`` is the simulator's state
before the action of its row.

Rewards come from a goal: the number of objects in place minus the number of objects, judged before the action. Play
data passes through the goal and continues, so a terminal may lie in mid-episode.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from acrlpd import files
from acrlpd.data.formats.pictures import PictureError, rgb_rows
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import BadEpisodes, EpisodeStore, HeldEpisodes, check_fps, told_numbers
from acrlpd.types import Episode, FinalObservation

CAMERA = "front_pixels"  # the name in OGBench's simulators
CLIP = 1e-5  # min distance of actions from -1 and 1 in OGBench's loader
CUBE_TOLERANCE = 0.04  # m
FIRST_CUBE, CUBE_WIDTH = 14, 7  # in qpos: position and quaternion of each cube, after the arm and the gripper

Arrays = Mapping[str, np.ndarray]


class Goal(Protocol):
    def in_place(self, arrays: Arrays) -> Bool[np.ndarray, "r k"]:
        """Return for every row which of the k objects are where they should be.

        Raises:
            ValueError: the file lacks the arrays to decide this.
        """
        ...


@dataclasses.dataclass(frozen=True)
class CubeGoal:
    """A goal with cubes at given places (x, y, z in m); their rotation does not matter."""

    positions: tuple[tuple[float, float, float], ...]

    def in_place(self, arrays: Arrays) -> Bool[np.ndarray, "r k"]:
        qpos, count = _required(arrays, "qpos"), len(self.positions)
        if qpos.shape[1] < FIRST_CUBE + CUBE_WIDTH * count:
            raise ValueError(f"qpos: {qpos.shape[1]} numbers a row are too few for {count} cubes")
        first = FIRST_CUBE + CUBE_WIDTH * np.arange(count)
        places = qpos[:, first[:, None] + np.arange(3)[None, :]]  # [r k 3]
        return np.linalg.norm(places - np.array(self.positions)[None], axis=-1) <= CUBE_TOLERANCE


@dataclasses.dataclass(frozen=True)
class ButtonGoal:
    """A goal with buttons in given states."""

    states: tuple[int, ...]

    def in_place(self, arrays: Arrays) -> Bool[np.ndarray, "r k"]:
        buttons = _required(arrays, "button_states")
        if buttons.shape[1] != len(self.states):
            raise ValueError(f"button_states: {buttons.shape[1]} buttons, but the goal names {len(self.states)}")
        return buttons == np.array(self.states)[None]


class NpzReader(HeldEpisodes):
    """An ``EpisodeSource`` in memory of the trajectories of one file.

    Args:
        goal: the goal to reward. None: rewards 0 and no terminals (good for imitation only).
        rewards: how the goal is rewarded. ``source="sparse"`` gives -1 until everything is in place, then 0, instead of
            counting objects; with ``convention="0/1"`` these are 0 and 1.
        default_task: the instruction; the file has none.
        fps: the rate of the recording; the file has none.
        clip_actions: clip to -1 + 1e-5 and 1 - 1e-5, as QC does for the published data sets.
        on_bad_episode: ``"skip"`` leaves out trajectories that cannot be used, with a warning; see ``skipped``.

    Raises:
        ValueError: the file is damaged, or a trajectory cannot be used; the error names file, episode and key.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        goal: Goal | None = None,
        rewards: RewardConfig | None = None,
        default_task: str = "",
        fps: float | None = None,
        clip_actions: bool = False,
        on_bad_episode: Literal["error", "skip"] = "error",
    ):
        self.path = Path(path)
        self.fps = check_fps(fps)
        arrays = _load(self.path)
        labels, done = _relabelled(self.path, arrays, goal, rewards)
        state, images = _observed(self.path, arrays["observations"])
        actions = arrays["actions"]
        actions = _clipped(actions) if clip_actions else actions
        bad = BadEpisodes(on_bad_episode)
        self._store = EpisodeStore()
        last_rows = np.flatnonzero(arrays["terminals"])
        start = 0
        for index, last in enumerate(last_rows.tolist()):
            rows, start = slice(start, last), last + 1
            source = f"{self.path}: episode {index}"
            with bad.guard(source):
                self._store.append(
                    Episode(
                        state[rows],
                        actions[rows],
                        labels[rows],
                        done[rows],
                        default_task,
                        images={name: frames[rows] for name, frames in images.items()},
                        success=bool(done[rows].any()) if goal is not None else None,
                        source=source,
                        final=FinalObservation(state[last], {name: frames[last] for name, frames in images.items()}),
                    )
                )
        bad.report(str(self.path), len(last_rows))
        self.skipped = bad.skipped
        used = ("observations", "actions", "terminals", _needed(goal))
        self.left_out = [
            f"{key} ({told_numbers(array.shape[1:])})"
            for key, array in arrays.items()
            if key not in used and array.ndim and array.dtype.kind in "fiub"
        ]

    format = "ogbench"


def _load(path: Path) -> dict[str, np.ndarray]:
    """Load and check the arrays of a file."""
    files.check_file(path)
    try:
        files.npz_outline(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except files.NPZ_DAMAGE as error:
        raise ValueError(
            f"{path}: expected a complete .npz file; it is truncated or not one ({files.one_line(error)})"
        ) from error
    for key, rank in {"observations": 2, "actions": 2, "terminals": 1}.items():
        if key not in arrays:
            raise ValueError(f"{path}: {key}: expected an array of that name, found {files.listed(arrays) or 'none'}")
        pictures = key == "observations" and arrays[key].ndim == 4
        if (arrays[key].ndim != rank and not pictures) or arrays[key].dtype.kind not in "fiub":
            found = f"{arrays[key].dtype} {arrays[key].shape}"
            raise ValueError(f"{path}: {key}: expected numbers with {rank} axes, found {found}")
    rows = len(arrays["observations"])
    for key in ("actions", "terminals", "qpos", "button_states"):
        if key in arrays and (arrays[key].ndim == 0 or len(arrays[key]) != rows):
            raise ValueError(f"{path}: {key}: expected {rows} rows (as in observations), found {arrays[key].shape}")
    if not rows or not arrays["terminals"][-1]:
        raise ValueError(
            f"{path}: terminals: expected the last of {rows} rows to be flagged as the end of a trajectory, but it is "
            "not. The file was cut, or is not in OGBench's format."
        )
    return arrays


def _observed(path: Path, observations: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the state and the pictures of every row."""
    if observations.ndim == 2:
        return observations, {}
    num_frames = _num_frames(observations.shape[1:])
    stacked = np.split(observations, num_frames, axis=-1)
    names = [CAMERA] if num_frames == 1 else [f"{CAMERA}_{number}" for number in range(num_frames)]
    try:
        images = {name: rgb_rows(frames) for name, frames in zip(names, stacked, strict=True)}
    except PictureError as error:
        raise ValueError(f"{path}: observations: {error}") from error
    return np.zeros((len(observations), 1), np.float32), images


def _num_frames(shape: tuple[int, ...]) -> int:
    """Return how many pictures with three channels are stacked in a picture of this shape."""
    height, width, channels = shape
    stacked = channels % 3 == 0 and channels < min(height, width)
    return channels // 3 if stacked else 1


def _needed(goal: Goal | None) -> str | None:
    """Return the array that one of our goals needs."""
    return "qpos" if isinstance(goal, CubeGoal) else "button_states" if isinstance(goal, ButtonGoal) else None


def _clipped(actions: np.ndarray) -> Float[np.ndarray, "r a"]:
    """Clip actions; numbers beyond float32 become infinite, and are refused later rather than clipped."""
    with np.errstate(over="ignore"):
        actions = actions.astype(np.float32)
    return np.where(np.isfinite(actions), np.clip(actions, -1 + CLIP, 1 - CLIP), actions)


def _relabelled(
    path: Path, arrays: Arrays, goal: Goal | None, config: RewardConfig | None
) -> tuple[Float[np.ndarray, " r"], Bool[np.ndarray, " r"]]:
    _check_asked(path, goal, config)
    if goal is None:
        return np.zeros(len(arrays["actions"]), np.float32), np.zeros(len(arrays["actions"]), bool)
    try:
        in_place = goal.in_place(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    missing: Int[np.ndarray, " r"] = np.sum(~in_place, axis=1)
    done = missing == 0
    if config is not None and config.convention == "0/1":
        return done.astype(np.float32), done
    sparse = config is not None and config.source == "sparse"
    return -(missing > 0 if sparse else missing).astype(np.float32), done


def _check_asked(path: Path, goal: Goal | None, config: RewardConfig | None) -> None:
    if config is None:
        return
    if goal is None:
        raise ValueError(
            f"{path}: OGBench's play data has no rewards of its own: name the goal they are for. From Python "
            "goal=CubeGoal(((0.425, 0.1, 0.02),)) or goal=ButtonGoal((0, 1)) of acrlpd.data.formats.npz; in a run "
            "--data.cube_goal 0.425 0.1 0.02 (x, y, z of each cube in m) or --data.button_goal 0 1."
        )
    if config.convention == "as_stored":
        raise ValueError(f"{path}: rewards.convention 'as_stored' does not apply to play data: it stores no rewards.")
    if config.convention == "0/1" and config.source != "sparse":
        raise ValueError(f"{path}: rewards of 0 and 1 do not count objects: ask for rewards.source='sparse' with them.")
    for name in ("success", "success_reward"):
        if getattr(config, name) is not None:
            raise ValueError(f"{path}: rewards.{name} does not apply to play data: its goal says what succeeded.")
    if config.terminal_on_failure:
        raise ValueError(f"{path}: rewards.terminal_on_failure does not apply to play data, which cannot fail.")


def _required(arrays: Arrays, key: str) -> np.ndarray:
    if key not in arrays or arrays[key].ndim != 2 or arrays[key].dtype.kind not in "fiub":
        raise ValueError(
            f"{key}: the goal needs this array of numbers with 2 axes; the file has {files.listed(arrays)}"
        )
    return arrays[key]
