"""The rule for episodes that share files: their stretches cover each file completely, and every frame once.

The rule is the same for frames of a video and for rows of a data set. If two stretches overlap, the table does not say
which one is right. The sizes of all files do: writers store the episodes one after another, in the order of their
numbers, so lengths and sizes determine where each episode lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The part of a file in which an episode lies, as a table states it. Positions are frames from the file's start."""

    episode: int
    start: float
    stop: float
    length: int  # frames of the episode


Files = Mapping[Path, Sequence[Stretch]]


@dataclasses.dataclass(frozen=True)
class Partition:
    """The rule, with the tolerance of positions (in frames) and the function that puts a position into words."""

    tolerance: float
    told: Callable[[float], str]

    def faults(self, files: Files, sizes: Mapping[Path, int], *, holes: bool = True) -> dict[int, str]:
        """Return what is wrong, by episode; ``sizes`` holds the number of frames of each file where it is known.

        Empty episodes have no stretch. Without ``holes``, frames that belong to no episode are not reported.
        """
        found: dict[int, str] = {}
        for path, stretches in files.items():
            ordered = sorted((each for each in stretches if each.length), key=lambda each: (each.start, each.episode))
            own = {each.episode: text for each in ordered if (text := self._own_fault(each))}
            rest = [each for each in ordered if each.episode not in own]
            found |= own | self._overlaps(rest)
            if holes and not found.keys() & {each.episode for each in ordered}:
                found |= self._holes(rest, sizes.get(path))
        return found

    def misplaced(self, files: Files, sizes: Mapping[Path, int]) -> dict[int, str]:
        """Return faults like ``faults``, but only of the misplaced episodes if the file sizes show which these are.

        They show it if the episodes, in their order, exactly fill the files of ``sizes``, in their order. Otherwise the
        result has all episodes of every file in which one is at fault.
        """
        found = self.faults(files, sizes)
        if not found:
            return {}
        every = {each.episode: (path, each) for path, some in files.items() for each in some}
        places = self._places([each for _, each in every.values()], sizes)
        if places is not None:
            return {
                number: found.get(number) or f"its stretch of the file, {self._span(each)}, is another episode's"
                for number, (path, each) in every.items()
                if each.length and not self._lies_at(path, each, places[number])
            }
        doubtful = {every[number][0]: number for number in reversed(found)}
        return {
            number: found.get(number)
            or f"its frames cannot be told apart from those of episode {doubtful[path]}, which is not "
            f"where the table says: {found[doubtful[path]]}"
            for number, (path, each) in every.items()
            if path in doubtful and each.length
        }

    def _own_fault(self, each: Stretch) -> str | None:
        place = f"its stretch of the file, {self._span(each)},"
        if each.start < -self.tolerance:
            return f"{place} begins before the file"
        if abs(each.stop - each.start - each.length) > self.tolerance:
            expected = f"{self.told(each.length)}, its {each.length} frames"
            return f"{place} is {self.told(each.stop - each.start)} long: expected {expected}"
        return None

    def _overlaps(self, ordered: Sequence[Stretch]) -> dict[int, str]:
        found: dict[int, str] = {}
        last: Stretch | None = None  # the stretch that ends last so far
        for each in ordered:
            if last is not None and each.start < last.stop - self.tolerance:
                for one, other in ((each, last), (last, each)):
                    text = f"overlaps that of episode {other.episode}, {self._span(other)}"
                    found.setdefault(one.episode, f"its stretch of the file, {self._span(one)}, {text}")
            last = each if last is None or each.stop > last.stop else last
        return found

    def _holes(self, ordered: Sequence[Stretch], size: int | None) -> dict[int, str]:
        """Return the episodes behind a hole; if the file has another size, those past its end, or else all."""
        end = 0.0
        for at, each in enumerate(ordered):
            if each.start > end + self.tolerance:
                text = f"no episode has the frames before it, from {self.told(end)} on"
                return {
                    late.episode: f"its stretch of the file is {self._span(late)}, but {text}" for late in ordered[at:]
                }
            end = each.stop
        if size is None or abs(end - size) <= self.tolerance:
            return {}
        late = [each for each in ordered if each.stop > size + self.tolerance] or ordered
        text = f"the file has {size} frames, but the episodes that the table puts into it have {round(end)}"
        return {each.episode: f"its stretch of the file is {self._span(each)}: {text}" for each in late}

    def _places(
        self, stretches: Sequence[Stretch], sizes: Mapping[Path, int]
    ) -> dict[int, tuple[Path, int, int]] | None:
        """Return file, start and stop of each episode; None if their lengths do not fill files of these sizes."""
        ordered = sorted(stretches, key=lambda each: each.episode)
        wrong = {each.episode for each in ordered if self._own_fault(each)}
        stated = [round(each.stop - each.start) if each.episode in wrong else each.length for each in ordered]
        for lengths in ([each.length for each in ordered], stated):
            places = dict(zip((each.episode for each in ordered), _filled(lengths, sizes), strict=False))
            if len(places) == len(ordered) and sum(lengths) == sum(sizes.values()):
                return places
        return None

    def _lies_at(self, path: Path, each: Stretch, place: tuple[Path, int, int]) -> bool:
        file, start, stop = place
        off = max(abs(each.start - start), abs(each.stop - stop))
        return path == file and off <= self.tolerance and not self._own_fault(each)

    def _span(self, each: Stretch) -> str:
        return f"{self.told(each.start)} to {self.told(each.stop)}"


def _filled(lengths: Sequence[int], sizes: Mapping[Path, int]) -> Iterator[tuple[Path, int, int]]:
    """Yield file, start and stop of the episodes in turn, and stop before one that would cross the end of a file."""
    files = iter(sizes.items())
    path, size, end = Path(), 0, 0
    for length in lengths:
        while end == size and length:
            path, size = next(files, (path, -1))
            end = 0
        if not 0 <= length <= size - end:
            return
        yield path, end, end + length
        end += length
