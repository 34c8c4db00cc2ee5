"""Random tables of stretches, good and spoilt, against a slow definition: each frame of each file painted once."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data.formats.lerobot.partition import Partition, Stretch

RULE = Partition(1e-3, lambda frames: f"frame {frames:g}")


@dataclasses.dataclass(frozen=True)
class Placed:
    file: int
    stretch: Stretch


def placed(lengths, files):
    """Episodes one after the other; ``files`` says after which ones a new file begins."""
    table, file, end = [], 0, 0
    for number, length in enumerate(lengths):
        table.append(Placed(file, Stretch(number, end, end + length, length)))
        end += length
        if number in files:
            file, end = file + 1, 0
    return table


def by_file(table):
    found = {}
    for each in table:
        found.setdefault(Path(str(each.file)), []).append(each.stretch)
    return found


def sizes_of(table):
    return {path: max(each.stop for each in stretches) for path, stretches in by_file(table).items()}


def is_partition(table, sizes):
    """Whether every frame of every file is painted exactly once, and every episode by as many as it has."""
    painted = {path: [0] * size for path, size in sizes.items()}
    for each in table:
        start, stop, frames = each.stretch.start, each.stretch.stop, painted[Path(str(each.file))]
        if stop - start != each.stretch.length or start < 0 or stop > len(frames):
            return False
        for frame in range(start, stop):
            frames[frame] += 1
    return all(count == 1 for frames in painted.values() for count in frames)


def moved(table, at, frames):
    each = table[at].stretch
    return replaced(table, at, start=each.start + frames, stop=each.stop + frames)


def replaced(table, at, file=None, **changes):
    each = table[at]
    new = Placed(each.file if file is None else file, dataclasses.replace(each.stretch, **changes))
    return [*table[:at], new, *table[at + 1 :]]


def moved_with_all_behind(table, at, frames):
    for other, each in enumerate(table):
        if each.file == table[at].file and each.stretch.start >= table[at].stretch.start:
            table = moved(table, other, frames)
    return table


def exchanged(table, at, other):
    """Two episodes sent to one another's file, their places kept."""
    files = table[at].file, table[other].file
    return replaced(replaced(table, at, file=files[1]), other, file=files[0])


def files_exchanged(table, at, other):
    names = {table[at].file: table[other].file, table[other].file: table[at].file}
    return [Placed(names.get(each.file, each.file), each.stretch) for each in table]


def same_place(table, at, other):
    length, target = table[at].stretch.length, table[other]
    return replaced(table, at, file=target.file, start=target.stretch.start, stop=target.stretch.start + length)


tables = st.builds(placed, st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sets(st.integers(0, 6)))


@st.composite
def spoilt(draw):
    """A good table and what became of it."""
    table = good = draw(tables)
    numbers, some = st.integers(0, len(table) - 1), st.integers(-9, 9)
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["move", "behind", "late", "swap", "files", "merge", "same"]))
        at, other, frames = draw(numbers), draw(numbers), draw(some)
        if kind == "move":
            table = moved(table, at, frames)
        elif kind == "behind":
            table = moved_with_all_behind(table, at, frames)
        elif kind == "late":
            table = replaced(table, at, stop=table[at].stretch.stop + frames)
        elif kind == "swap":
            table = exchanged(table, at, other)
        elif kind == "files":
            table = files_exchanged(table, at, other)
        elif kind == "merge":
            table = replaced(table, at, file=table[other].file)
        else:
            table = same_place(table, at, other)
    return good, table


@given(tables)
@settings(deadline=None)
def test_a_partition_has_no_faults(table):
    assert RULE.faults(by_file(table), {}) == {}
    assert RULE.faults(by_file(table), sizes_of(table)) == {}


@given(spoilt())
@settings(deadline=None, max_examples=500)
def test_exactly_the_misplaced_episodes_are_at_fault(tables):
    """Unless the spoilt table is a partition as well: then nothing in it tells."""
    good, table = tables
    sizes = sizes_of(good)
    found = RULE.misplaced(by_file(table), sizes)
    if is_partition(table, sizes):
        assert found == {}
    else:
        assert found.keys() == {each.stretch.episode for each in set(table) - set(good)}


@given(spoilt(), st.sets(st.integers(0, 7)))
@settings(deadline=None, max_examples=500)
def test_without_all_sizes_a_file_with_a_fault_is_not_trusted(tables, unknown):
    good, table = tables
    sizes = {path: size for path, size in sizes_of(good).items() if int(str(path)) not in unknown}
    files = by_file(table)
    shown, found = RULE.faults(files, sizes), RULE.misplaced(files, sizes)
    assert bool(shown) == bool(found)
    if sizes.keys() != sizes_of(good).keys():
        spoilt_files = [some for some in files.values() if any(each.episode in shown for each in some)]
        assert found.keys() == {each.episode for some in spoilt_files for each in some}


MESSAGES = {
    "overlap": (
        [(0, 3), (2, 4)],
        {},
        {0: "overlaps that of episode 1, frame 2 to frame 4", 1: "overlaps .* episode 0"},
    ),
    "hole": ([(0, 3), (4, 6)], {}, {1: "no episode has the frames before it, from frame 3 on"}),
    "late begin": ([(1, 4)], {}, {0: "from frame 0 on"}),
    "before the file": ([(-1, 2)], {}, {0: "frame -1 to frame 2, begins before the file"}),
    "too long": ([(0, 4)], {}, {0: "is frame 4 long: expected frame 3, its 3 frames"}),
    "beyond the file": ([(0, 3), (3, 5)], {Path("0"): 4}, {1: "the file has 4 frames, .* puts into it have 5"}),
    "short of the file": ([(0, 3)], {Path("0"): 4}, {0: "the file has 4 frames, .* puts into it have 3"}),
}


@pytest.mark.parametrize(("places", "sizes", "messages"), MESSAGES.values(), ids=MESSAGES)
def test_words(places, sizes, messages):
    lengths = [3, 2]
    stretches = [Stretch(at, *place, lengths[at]) for at, place in enumerate(places)]
    found = RULE.faults({Path("0"): stretches}, sizes)
    assert found.keys() == messages.keys()
    for number, message in messages.items():
        assert re.search(message, found[number]), found
