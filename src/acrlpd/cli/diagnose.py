"""``acrlpd diagnose CHECKPOINT --data PATH``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from acrlpd import fields
from acrlpd.data.formats.options import ReaderOptions
from acrlpd.deploy import OpenPIOptions, RecordedOptions, put_beside
from acrlpd.deploy.diagnosis import diagnose, lines, page, replay
from acrlpd.fields import Interval, NonNegativeInt, PositiveInt
from acrlpd.files import printable, written_whole

EXIT_WRONG = 1


@dataclasses.dataclass(frozen=True)
class DiagnoseArguments:
    """Ask why the loss falls and the robot fails: what a checkpoint expects beside what recorded episodes have.

    Statistics, relative or absolute actions, grippers, cameras, prompts, rate, and the policy's error by step of the
    chunk, each with a verdict. Exit code 1 if anything is wrong.
    """

    checkpoint: tyro.conf.Positional[str]  # a run, its checkpoints folder, one step; or a checkpoint of openpi's
    data: str  # recorded episodes in any supported format: those of training, or of the robot where it fails
    # share of the episodes of --data to hold out and use; None: as the run, and all of other data
    validation_fraction: Annotated[float, Interval("(0, 1)")] | None = None
    chunks: PositiveInt = 256  # recorded chunks to look at, evenly spread
    execute_horizon: PositiveInt | None = None  # steps of a chunk that are executed; None: as trained
    read: ReaderOptions = dataclasses.field(default_factory=ReaderOptions)  # as acrlpd data takes them
    openpi: Annotated[OpenPIOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=OpenPIOptions)
    env_name: Annotated[str | None, tyro.conf.arg(name="env.name")] = None  # replay recorded actions in this simulator
    replay_episodes: PositiveInt = 10  # with --env.name
    replay_seed: NonNegativeInt | None = None  # with --env.name: seed of the collection; None: the run's
    extraction: str | None = None  # how to choose instead; code of your own (FILE.py:NAME) must be named here
    seed: NonNegativeInt = 0  # seeds the policy's noise
    html: str | None = None  # also write a page with pictures of the cameras to this file
    json: bool = False  # print the JSON instead of sentences


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(DiagnoseArguments, args=argv, prog="acrlpd diagnose")
    fields.check(arguments)
    if arguments.env_name is None and (arguments.replay_seed is not None or arguments.replay_episodes != 10):
        raise ValueError("--replay_seed and --replay_episodes would have no effect without --env.name")
    options = RecordedOptions(arguments.validation_fraction, arguments.read, arguments.execute_horizon)
    checkpoint, data = arguments.checkpoint, arguments.data
    beside = put_beside(checkpoint, data, options, arguments.openpi, extraction=arguments.extraction)
    found = diagnose(beside, num_chunks=arguments.chunks, seed=arguments.seed)
    if arguments.env_name is not None:
        again = replay(beside, data, arguments.env_name, seed=arguments.replay_seed, episodes=arguments.replay_episodes)
        found = dataclasses.replace(found, findings=(*found.findings, again))
    if arguments.html is not None:
        with written_whole(Path(arguments.html)) as temporary:
            temporary.write_text(page(f"{checkpoint} beside {data}", found), encoding="utf-8")
    if arguments.json:
        told = [dataclasses.asdict(each) for each in found.findings]
        print(json.dumps({"checkpoint": checkpoint, "data": data, "remarks": beside.told, "findings": told}))
    else:
        print(printable("\n".join([*beside.told, *lines(found.findings)])))
    return EXIT_WRONG if found.is_wrong else 0
