"""``acrlpd data inspect | validate | convert | cache PATH``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from acrlpd.data import sources
from acrlpd.data.formats.frame_cache import FrameCache, FrameSource
from acrlpd.data.formats.options import ReaderOptions
from acrlpd.data.sources import Dataset
from acrlpd.data.store.windows import check_videos
from acrlpd.data.tools import convert, inspection
from acrlpd.data.tools.convert import Pictures
from acrlpd.data.tools.inspection import Contents, Inspection, Problem, Range
from acrlpd.fields import NonNegativeInt, PositiveInt
from acrlpd.files import printable

SHOWN = 20  # tasks in a table
EXIT_UNUSABLE = 1


@dataclasses.dataclass(frozen=True)
class ReadArguments(ReaderOptions):
    """Options for reading the format; those left out are found in the files."""

    num_workers: NonNegativeInt = os.cpu_count() or 1  # processes that read many HDF5 episodes; 0: only this one

    def options(self) -> dict[str, Any]:
        return self.for_reader() | {"num_workers": self.num_workers}


@dataclasses.dataclass(frozen=True)
class InspectArguments:
    """Show episodes, steps, tasks, cameras, ranges, success rate and unusable episodes. Exit code 1 if any."""

    path: tyro.conf.Positional[tuple[str, ...]]  # folders or files of episodes; several must fit together
    read: ReadArguments = dataclasses.field(default_factory=ReadArguments)
    json: bool = False


@dataclasses.dataclass(frozen=True)
class ValidateArguments:
    """Inspect, and check every picture; find constant dimensions, clipped actions and duplicate episodes."""

    path: tyro.conf.Positional[tuple[str, ...]]  # folders or files of episodes; several must fit together
    read: ReadArguments = dataclasses.field(default_factory=ReadArguments)
    decode: bool = True  # read every picture, which takes long if there are many
    json: bool = False


@dataclasses.dataclass(frozen=True)
class ConvertArguments:
    """Convert to our own HDF5 layout, or to LeRobot v3.0 with its videos."""

    path: tyro.conf.Positional[str]  # a folder or file of episodes, in any format
    output: tyro.conf.Positional[str]  # the new folder
    to: Literal["hdf5", "lerobot"] = "lerobot"
    pictures: Pictures | None = None  # LeRobot: how they are stored, av1 if left out; only png is lossless
    compression: Literal["gzip", "lzf"] | None = None  # HDF5: for pictures
    robot_type: str | None = None  # LeRobot: a label
    success: bool | None = None  # outcome of the episodes whose data does not say it
    on_bad_episode: Literal["error", "skip"] = "error"
    read: ReadArguments = dataclasses.field(default_factory=ReadArguments)


@dataclasses.dataclass(frozen=True)
class CacheArguments:
    """Decode all pictures once, to the model's resolution; the size is printed before anything is written."""

    path: tyro.conf.Positional[str]  # a folder or file of episodes with videos or pictures
    output: tyro.conf.Positional[str]  # the cache's folder, one for each data set
    height: PositiveInt = 224
    width: PositiveInt = 224
    on_bad_episode: Literal["error", "skip"] = "error"
    read: ReadArguments = dataclasses.field(default_factory=ReadArguments)


def main(argv: Sequence[str]) -> int:
    name, *flags = argv or [""]
    if name in ("", "-h", "--help"):
        print("usage: acrlpd data COMMAND ...\n")
        for command, (kind, _) in COMMANDS.items():
            print(f"  {command:<10}{kind.__doc__}")
        return 0 if name else 2
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1) or [", ".join(COMMANDS)]
        raise ValueError(f"unknown command 'data {name}': did you mean {near[0]!r}?")
    kind, run = COMMANDS[name]
    return run(tyro.cli(kind, args=flags, prog=f"acrlpd data {name}", config=(tyro.conf.OmitArgPrefixes,)))


def _inspect(arguments: InspectArguments) -> int:
    return _look(arguments.path, as_json=arguments.json, **arguments.read.options())


def _validate(arguments: ValidateArguments) -> int:
    options = {"thorough": True, "decode": arguments.decode, **arguments.read.options()}
    return _look(arguments.path, as_json=arguments.json, **options)


def _look(paths: Sequence[str], *, as_json: bool, **options: Any) -> int:
    """Show what each of the data sets holds, and whether several fit together in one run."""
    if not paths:
        raise ValueError("name a folder or file of episodes, or several")
    found = {path: inspection.inspect(path, **options) for path in dict.fromkeys(paths)}
    apart = inspection.disagreements(found)
    usable = all(each.usable for each in found.values()) and not any(each.level == "error" for each in apart)
    if as_json:
        sets = [_as_json(path, each) for path, each in found.items()]
        several = {"sets": sets, "problems": [dataclasses.asdict(each) for each in apart], "usable": usable}
        print(json.dumps(_finite(sets[0] if len(sets) == 1 else several), indent=2, allow_nan=False))
    else:
        for path, each in found.items():
            lines = _table(path, each.contents) if each.contents is not None else [f"{path}: no usable episode"]
            print(printable("\n".join([*lines, *_problems(each.problems)])))
        if len(found) > 1:
            print(printable("\n".join(["all of them together", *_problems(apart)])))
    return 0 if usable else EXIT_UNUSABLE


def _convert(arguments: ConvertArguments) -> int:
    others = ("pictures", "robot_type") if arguments.to == "hdf5" else ("compression",)
    given = [name for name in others if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} means nothing with --to {arguments.to}. Leave it out.")
    dataset = _opened(arguments.path, arguments.read, on_bad_episode=arguments.on_bad_episode)
    if arguments.to == "hdf5":
        folder = convert.to_hdf5(
            dataset, arguments.output, compression=arguments.compression, success=arguments.success
        )
    else:
        folder = convert.to_lerobot(
            dataset,
            arguments.output,
            fps=arguments.read.fps,
            pictures=arguments.pictures or "av1",
            robot_type=arguments.robot_type,
            success=arguments.success,
        )
    print(f"{folder}: {dataset.num_episodes} episodes, {int(dataset.lengths.sum())} steps")
    return 0


def _cache(arguments: CacheArguments) -> int:
    dataset = _opened(arguments.path, arguments.read, on_bad_episode=arguments.on_bad_episode)
    if not dataset.cameras or not isinstance(dataset, FrameSource):
        raise ValueError(f"{arguments.path}: {dataset.format} data without pictures in files has nothing to cache")
    check_videos(dataset)
    cache = FrameCache(Path(arguments.output), arguments.height, arguments.width)
    missing = len(cache.missing(dataset))
    print(
        f"{cache.total_bytes(dataset) / 1e6:.1f} MB for {int(dataset.lengths.sum())} frames of "
        f"{', '.join(dataset.cameras)}; {missing} of {dataset.num_episodes * len(dataset.cameras)} records are missing",
        flush=True,
    )
    cache.build(dataset)
    return 0


COMMANDS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "inspect": (InspectArguments, _inspect),
    "validate": (ValidateArguments, _validate),
    "convert": (ConvertArguments, _convert),
    "cache": (CacheArguments, _cache),
}


def _opened(path: str, read: ReadArguments, **options: Any) -> Dataset:
    return sources.open_episodes(path, **read.options(), **options)


def _as_json(path: str, found: Inspection) -> dict[str, Any]:
    content = dataclasses.asdict(found) | {"path": path, "usable": found.usable}
    if found.contents is not None:
        content["contents"]["success_rate"] = found.contents.success_rate
    return content


def _finite(content: Any) -> Any:
    """Return the content with null instead of NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _table(path: str, contents: Contents) -> list[str]:
    shortest, mean, longest = contents.lengths
    rate = "rate unknown" if contents.fps is None else f"{contents.fps:g} fps"
    known = contents.successes + contents.failures
    success = f"{contents.successes} of {known} ({contents.success_rate:.0%})" if known else "unknown"
    unknown = contents.episodes - known if known else 0
    low, high = contents.rewards
    tasks = [f"  {count:>6}  {task or '(no text)'}" for task, count in list(contents.tasks.items())[:SHOWN]]
    more = [f"          and {len(contents.tasks) - SHOWN} more"] if len(contents.tasks) > SHOWN else []
    cameras = ", ".join(f"{name} {height}x{width}" for name, (height, width) in contents.cameras.items())
    return [
        f"{path}: {contents.format}, {contents.episodes} episodes, {contents.steps} steps, {rate}",
        f"lengths   {shortest} to {longest}, mean {mean:.1f}",
        f"success   {success}{f', unknown in {unknown}' if unknown else ''}",
        f"rewards   {low:g} to {high:g}",
        f"cameras   {cameras or 'none'}",
        f"not read  {', '.join(contents.left_out) or 'nothing'}",
        f"tasks     {len(contents.tasks)}",
        *tasks,
        *more,
        *_ranges("state", contents.state),
        *_ranges("actions", contents.actions),
    ]


def _ranges(name: str, found: Range) -> list[str]:
    head = f"{name:<10}{'min':>12}{'max':>12}{'mean':>12}{'std':>12}"
    rows = zip(found.low, found.high, found.mean, found.std, strict=True)
    return [head, *(f"  {dim:<8}" + "".join(f"{number:>12.4g}" for number in row) for dim, row in enumerate(rows))]


def _problems(found: Sequence[Problem]) -> list[str]:
    if not found:
        return ["problems  none"]
    lines = [f"problems  {len(found)}"]
    return lines + [f"  {problem.level}: {_told(problem.episode, problem.text)}" for problem in found]


def _told(episode: str, text: str) -> str:
    """Return the text with its episode; most texts name the episode themselves."""
    return text if not episode or episode in text else f"{episode}: {text}"
