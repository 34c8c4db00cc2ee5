"""Where episodes lie in files that they share: their stretches are the whole file, each frame of it once.

The rule is the same for frames of a video and for rows of a data set. What breaks it is told by episode. Of two that
overlap nobody knows which one is right, so both are at fault. A hole is put down to the episodes at fault that belong
there; otherwise the stretches behind it were moved, and are at fault as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

HALF_A_FRAME = 0.5


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Where a table says that an episode lies in a file. Places are counted in frames from the file's beginning."""

    episode: int
    start: float
    stop: float
    length: int  # frames of the episode


@dataclasses.dataclass(frozen=True)
class Partition:
    """The rule, with how exact places are (in frames) and how one is told."""

    tolerance: float
    told: Callable[[float], str]

    def faults(
        self, files: Mapping[Path, Sequence[Stretch]], sizes: Mapping[Path, int], lost: Iterable[int] = ()
    ) -> dict[int, str]:
        """Return what is wrong with the stretches of each file, by episode.

        ``sizes`` has the frames of files where they are known; ``lost`` are episodes known to be in another place.
        """
        known = set(lost)
        found: dict[int, str] = {}
        for stretches in files.values():
            trusted = [each for each in stretches if each.length and each.episode not in known]
            own = {each.episode: text for each in trusted if (text := self._own_fault(each))}
            found |= own | self._overlaps([each for each in trusted if each.episode not in own])
        at_fault = found.keys() | known
        strays = {each.episode: each for some in files.values() for each in some if each.episode in at_fault}
        for path, stretches in files.items():
            trusted = [each for each in stretches if each.length and each.episode not in at_fault]
            found |= self._uncovered(trusted, strays, sizes.get(path))
        return found

    def _own_fault(self, each: Stretch) -> str | None:
        place = f"its stretch of the file, {self._span(each)},"
        if each.start < -self.tolerance:
            return f"{place} begins before the file"
        if abs(each.stop - each.start - each.length) > self.tolerance:
            expected = f"{self.told(each.length)}, its {each.length} frames"
            return f"{place} is {self.told(each.stop - each.start)} long: expected {expected}"
        return None

    def _overlaps(self, stretches: Sequence[Stretch]) -> dict[int, str]:
        found: dict[int, str] = {}
        last: Stretch | None = None  # the one that reaches farthest
        for each in sorted(stretches, key=lambda each: (each.start, each.episode)):
            if last is not None and each.start < last.stop - self.tolerance:
                for one, other in ((each, last), (last, each)):
                    text = f"overlaps that of episode {other.episode}, {self._span(other)}"
                    found.setdefault(one.episode, f"its stretch of the file, {self._span(one)}, {text}")
            last = each if last is None or each.stop > last.stop else last
        return found

    def _uncovered(
        self, stretches: Sequence[Stretch], strays: Mapping[int, Stretch], size: int | None
    ) -> dict[int, str]:
        """What holes tell; at the file's end, too, where its size is known."""
        ordered = sorted(stretches, key=lambda each: each.start)
        kept: list[Stretch] = []
        for each in ordered:
            end, numbers = 0.0, range(each.episode - 1, -1, -1)
            if kept:
                end, numbers = kept[-1].stop, range(kept[-1].episode + 1, each.episode)
            if not self._is_of(each.start - end, numbers, strays):
                break
            kept.append(each)
        moved = ordered[len(kept) :]
        found = {each.episode: self._behind_a_hole(each, kept) for each in moved}
        if size is None or not kept:
            return found
        strays = {**strays, **{each.episode: each for each in moved}}
        return found | self._beside_the_end(kept, strays, size)

    def _behind_a_hole(self, each: Stretch, before: Sequence[Stretch]) -> str:
        end = before[-1].stop if before else 0.0
        return (
            f"its stretch of the file, {self._span(each)}, lies behind a hole: no episode has the frames from "
            f"{self.told(end)} on, so it was moved, or an episode before it is missing"
        )

    def _beside_the_end(self, kept: Sequence[Stretch], strays: Mapping[int, Stretch], size: int) -> dict[int, str]:
        """What the size of the file tells of stretches that follow one another from its beginning."""
        rest = size - kept[-1].stop
        if rest >= -self.tolerance and self._is_of(rest, itertools.count(kept[-1].episode + 1), strays):
            return {}
        beyond = [each for each in kept if each.stop > size + self.tolerance]
        inside = kept[: len(kept) - len(beyond)]
        fits_without = bool(beyond and inside) and abs(inside[-1].stop - size) <= self.tolerance
        stated = sum(each.length for each in kept)
        return {
            each.episode: f"the file has {size} frames, but the table puts episodes of {stated} frames into it, "
            f"this one at {self._span(each)}"
            for each in (beyond if fits_without else kept)
        }

    def _is_of(self, hole: float, numbers: Iterable[int], strays: Mapping[int, Stretch]) -> bool:
        """Whether a hole is none, or as long as the episodes at fault among ``numbers``, which would lie there."""
        if hole <= self.tolerance:
            return True
        missing = [strays[number] for number in itertools.takewhile(strays.__contains__, numbers)]
        lengths = itertools.accumulate(each.length for each in missing)
        stated = itertools.accumulate(each.stop - each.start for each in missing)
        return any(abs(hole - total) < HALF_A_FRAME for total in itertools.chain(lengths, stated))

    def _span(self, each: Stretch) -> str:
        return f"{self.told(each.start)} to {self.told(each.stop)}"
