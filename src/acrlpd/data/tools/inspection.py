"""Reports on what a data set holds and what is wrong with it: ``acrlpd data inspect`` and ``validate``."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from acrlpd.data import mixture, sources
from acrlpd.data.mixture import Facts
from acrlpd.data.sources import Dataset
from acrlpd.data.statistics import Moments
from acrlpd.data.store.episodes import IMAGE_PREFIX, OptionError, task_runs
from acrlpd.data.tools import instructions

CLIPPED_SHARE = 0.05  # suspect clipping if at least this share of steps lies at one end of a dimension's range
CLIPPED_ARRIVALS = 2  # and if the value arrives there this often per episode; an arm at rest arrives only once
SWITCH_SHARE = 0.95  # a dimension with at least this share of steps at either end is a switch, such as a gripper's


@dataclasses.dataclass(frozen=True)
class Problem:
    """A finding. An error makes an episode (or the whole set) unusable; a warning needs a person's judgement."""

    level: Literal["error", "warning"]
    episode: str  # file or name of the episode; empty for the set as a whole
    text: str


@dataclasses.dataclass(frozen=True)
class Range:
    """The range and the moments of each dimension, over all steps."""

    low: list[float]
    high: list[float]
    mean: list[float]
    std: list[float]


@dataclasses.dataclass(frozen=True)
class Contents:
    """A summary of the usable episodes."""

    format: str
    fps: float | None
    episodes: int
    steps: int
    lengths: tuple[int, float, int]  # min, mean, max
    tasks: dict[str, int]  # number of episodes; an episode in which the task changes counts for each of its tasks
    cameras: dict[str, tuple[int, int]]  # height, width
    left_out: list[str]  # keys that are not read, with the reason or the size
    state: Range
    actions: Range
    successes: int
    failures: int  # the success of all other episodes is unknown
    rewards: tuple[float, float]  # min, max
    robot: str | None = None  # None if the format does not say

    def facts(self, name: str) -> Facts:
        """Return the facts on which other data sets must agree."""
        dims = len(self.state.low), len(self.actions.low)
        return Facts(name, *dims, tuple(self.cameras), self.fps, self.robot)

    @property
    def success_rate(self) -> float | None:
        known = self.successes + self.failures
        return self.successes / known if known else None


@dataclasses.dataclass(frozen=True)
class Inspection:
    contents: Contents | None  # None if nothing can be used
    problems: list[Problem]

    @property
    def usable(self) -> bool:
        """Return whether the data set can be used as it is, without leaving anything out."""
        return self.contents is not None and all(problem.level != "error" for problem in self.problems)


def inspect(data: Any, *, thorough: bool = False, decode: bool = False, **options: Any) -> Inspection:
    """Read all numbers once and report the contents and the problems of a data set.

    Args:
        thorough: also look for constant dimensions, clipped actions and episodes that occur twice.
        decode: also read every picture.
        options: the reader's options, see ``sources.open_episodes``.
    """
    problems: list[Problem] = []
    dataset = _opened(data, options, problems, decode=decode)
    if dataset is None:
        return Inspection(None, problems)
    numbers = {key: _Dimensions() for key in ("state", "actions")}
    copies: dict[bytes, str] = {}
    for index in range(dataset.num_episodes):
        info = dataset.info(index)
        digest = hashlib.sha256()
        for key, dimensions in numbers.items():
            values = dataset.window(index, key, 0, info.length)
            dimensions.add(values)
            digest.update(values.tobytes())
        first = copies.setdefault(digest.digest(), info.source)
        if thorough and first != info.source:
            problems.append(Problem("warning", info.source, f"state and actions are those of {first}: recorded twice?"))
    if thorough:
        problems += [problem for key, dimensions in numbers.items() for problem in _suspicious(key, dimensions)]
    if (silent := instructions.untold(dataset)) is not None:
        problems.append(Problem("warning", "", silent.told))
    return Inspection(_contents(dataset, numbers), problems)


def disagreements(found: Mapping[str, Inspection]) -> list[Problem]:
    """Return why data sets, given by name, cannot be trained on together, and warnings about their differences."""
    facts = [each.contents.facts(name) for name, each in found.items() if each.contents is not None]
    problems: list[Problem] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mixture.check_alike(facts)
        except ValueError as error:
            problems.append(Problem("error", "", str(error)))
    return [*problems, *(Problem("warning", "", str(warning.message)) for warning in caught)]


class _Dimensions:
    """Moments of vectors, and how often each dimension is at, and arrives at, an end of its range."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.episodes = 0
        self.at_low = self.at_high = np.zeros((2, 1), int)  # steps, arrivals

    def add(self, values: Float[np.ndarray, "t d"]) -> None:
        """Add the vectors of an episode."""
        before_low, before_high = self.moments.low, self.moments.high
        self.moments.add(values)
        low, high = self.moments.low, self.moments.high
        # if the end of the range has moved, no earlier value lies at it
        self.at_low = np.where(low == before_low, self.at_low, 0) + _steps_and_arrivals(values == low[None])
        self.at_high = np.where(high == before_high, self.at_high, 0) + _steps_and_arrivals(values == high[None])
        self.episodes += 1

    @property
    def range(self) -> Range:
        found = self.moments
        return Range(found.low.tolist(), found.high.tolist(), found.mean.tolist(), found.std.tolist())


def _steps_and_arrivals(at_end: Bool[np.ndarray, "t d"]) -> Int[np.ndarray, "2 d"]:
    return np.stack([at_end.sum(axis=0), (at_end[1:] & ~at_end[:-1]).sum(axis=0)])


def _opened(data: Any, options: dict[str, Any], problems: list[Problem], *, decode: bool) -> Dataset | None:
    """Open the data set without its bad episodes, which become problems.

    Raises:
        OptionError: an option does not fit the data; the data may be good.
        FileNotFoundError: there is no such file or folder.
    """
    try:
        kind = sources.identify(data)
    except ValueError as error:
        problems.append(Problem("error", "", str(error)))
        return None
    if kind in ("hdf5", "lerobot"):  # other readers load all pictures anyway
        options = {"check_images": decode, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # ignore remembered results of checking pictures: the files may have been damaged since
            remember = not options.get("check_images", False)
            dataset = sources.open_episodes(data, on_bad_episode="skip", remember=remember, **options)
        except OptionError:
            raise
        except (ValueError, OSError) as error:
            problems.append(Problem("error", "", str(error)))
            dataset = None
    skipped = [] if dataset is None else dataset.skipped
    problems += [Problem("error", name, reason) for name, reason in skipped]
    told = {reason for _, reason in skipped}
    for warning in caught:
        text = str(warning.message)
        if text.removeprefix("episode left out: ") not in told and "episodes were left out" not in text:
            problems.append(Problem("warning", "", text))
    return dataset


def _contents(dataset: Dataset, numbers: dict[str, _Dimensions]) -> Contents:
    infos = [dataset.info(index) for index in range(dataset.num_episodes)]
    lengths = [info.length for info in infos]
    success = collections.Counter(info.success for info in infos)
    shapes = {camera: dataset.window(0, IMAGE_PREFIX + camera, 0, 1).shape for camera in dataset.cameras}
    rewards = [dataset.window(index, "rewards", 0, length) for index, length in enumerate(lengths)]
    return Contents(
        format=dataset.format,
        fps=dataset.fps,
        episodes=len(infos),
        steps=sum(lengths),
        lengths=(min(lengths), sum(lengths) / len(lengths), max(lengths)),
        tasks=dict(
            collections.Counter(text for info in infos for text in {text for _, text in task_runs(info)}).most_common()
        ),
        cameras={camera: (shape[1], shape[2]) for camera, shape in shapes.items()},
        left_out=dataset.left_out,
        state=numbers["state"].range,
        actions=numbers["actions"].range,
        successes=success[True],
        failures=success[False],
        rewards=(float(min(each.min() for each in rewards)), float(max(each.max() for each in rewards))),
        robot=Facts.of(dataset, "").robot,
    )


def _suspicious(key: str, found: _Dimensions) -> Iterator[Problem]:
    low, high, count = found.moments.low, found.moments.high, found.moments.count
    constant = low == high
    for dim in np.flatnonzero(constant).tolist():
        yield Problem("warning", "", f"{key}: dimension {dim} is constant: it is {low[dim]:g} in every step")
    if key != "actions":
        return
    switch = found.at_low[0] + found.at_high[0] >= SWITCH_SHARE * count
    for end, value, (steps, arrivals) in (("lowest", low, found.at_low), ("highest", high, found.at_high)):
        often = (steps >= CLIPPED_SHARE * count) & (arrivals >= CLIPPED_ARRIVALS * found.episodes)
        for dim in np.flatnonzero(often & ~constant & ~switch).tolist():
            share = f"{steps[dim] / count:.0%} of the steps"
            text = f"actions: dimension {dim} lies at its {end} value, {value[dim]:g}, in {share}: was it clipped?"
            yield Problem("warning", "", text)
