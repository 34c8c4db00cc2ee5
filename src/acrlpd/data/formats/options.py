"""The options for reading recorded episodes, in one table that runs, commands and readers share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from acrlpd import fields
from acrlpd.data.formats.npz import ButtonGoal, CubeGoal
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import OptionError
from acrlpd.fields import Interval, NonNegativeInt, PositiveFloat

HDF5 = ("acrlpd", "aloha", "robomimic", "libero", "droid")


def _of(default: Any, *formats: str) -> Any:
    """Return a field that applies only to these formats."""
    return dataclasses.field(default=default, metadata={"formats": formats})


@dataclasses.dataclass(frozen=True)
class ReaderOptions:
    """The options for reading a data set. A reader refuses options that do not apply to its format."""

    # the format's names of the cameras to use; empty: all
    cameras: tuple[str, ...] = _of((), *HDF5, "lerobot")
    # the format's names of the keys that are put side by side as the state; empty: the usual ones
    state_keys: tuple[str, ...] = _of((), "aloha", "robomimic", "libero", "droid", "lerobot", "minari")
    # likewise for the actions
    action_keys: tuple[str, ...] = _of((), "aloha", "robomimic", "libero", "droid", "lerobot")
    # the instruction of episodes that have none
    default_task: str = _of("", *HDF5, "lerobot", "npz", "minari")
    # steps per second, if the format does not state them or states them wrong
    fps: Annotated[float, Interval("(0, inf)")] | None = _of(None, *HDF5, "npz", "minari")
    # robomimic and LIBERO: the name of a subset of the demos
    filter_key: str | None = _of(None, "robomimic", "libero")
    # LeRobot: numbers of the episodes to read, in this order; empty: all
    episodes: tuple[NonNegativeInt, ...] = _of((), "lerobot")
    # LeRobot: seconds by which a timestamp or a video frame may be off; None: 1e-4
    tolerance_s: Annotated[float, Interval("[0, inf)")] | None = _of(None, "lerobot")
    # HDF5 and LeRobot: decode every picture when opening; None: only where bad episodes are skipped
    check_images: bool | None = _of(None, *HDF5, "lerobot")
    # LIBERO: pair every action with the observation before it, not after it
    align_observations: bool = _of(False, "libero")
    # ALOHA: red and blue are swapped in the JPEGs; the files do not say so
    jpeg_bgr: bool = _of(False, "aloha")
    # DROID: leave out the steps at which the operator was not driving
    drop_idle: bool = _of(False, "droid")
    # OGBench: clip actions to 1e-5 or more from -1 and 1, as QC does
    clip_actions: bool = _of(False, "npz")
    # OGBench play data: where each cube should be, in m
    cube_goal: tuple[tuple[float, float, float], ...] = _of((), "npz")
    # OGBench play data: the state that each button should have
    button_goal: tuple[int, ...] = _of((), "npz")

    def check(self) -> None:
        """Refuse values that no reader can use, and options that exclude each other."""
        fields.check(self)
        if self.cube_goal and self.button_goal:
            raise OptionError("cube_goal and button_goal exclude each other")

    def said(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, by name."""
        options = dataclasses.fields(ReaderOptions)
        return {each.name: value for each in options if (value := getattr(self, each.name)) != each.default}

    def for_reader(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as arguments of a reader."""
        self.check()
        found = self.said()
        for name, goal in (("cube_goal", CubeGoal), ("button_goal", ButtonGoal)):
            if name in found:
                found["goal"] = goal(found.pop(name))
        return found


@dataclasses.dataclass(frozen=True)
class DataSource(ReaderOptions):
    """One of the data sets of a run. Options that are not set here are taken from the run's ``data``."""

    path: str = ""  # episodes in any supported format
    # relative share of the drawn chunks; None: every step of all sets is equally likely
    weight: PositiveFloat | None = None
    frame_cache: str | None = None  # folder that `acrlpd data cache` filled at policy.image_size
    rewards: RewardConfig | None = None  # how rewards are assigned to its episodes

    def __post_init__(self):
        fields.check(self)

    def over(self, data: Any) -> DataSource:
        """Return this source; options that are not set are taken from ``data``, which is part of a configuration."""
        options = (field for field in dataclasses.fields(self) if field.name not in ("path", "weight"))
        unsaid = {each.name for each in options if getattr(self, each.name) == each.default}
        return dataclasses.replace(self, **{name: getattr(data, name) for name in unsaid})


FORMATS: dict[str, tuple[str, ...]] = {
    field.name: field.metadata["formats"] for field in dataclasses.fields(ReaderOptions)
}
"""The formats to which each option applies; ``npz`` is OGBench's."""


def check_format(name: str, layout: str) -> None:
    """Refuse an option that does not apply to ``layout``: ignoring it would be worse."""
    if layout not in FORMATS[name]:
        raise OptionError(
            f"{name} does not apply to the layout found here ({layout}), but to {', '.join(FORMATS[name])}. Leave it "
            "out."
        )
