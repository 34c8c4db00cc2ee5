"""``acrlpd train PRESET [--field value ...]``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from acrlpd import presets
from acrlpd.config import TrainConfig, from_dict
from acrlpd.training import setup
from acrlpd.training.faults import EXIT_INTERRUPTED, Interrupted
from acrlpd.training.report import write_report


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(f"usage: acrlpd train PRESET [--field value ...]\n\npresets: {', '.join(presets.PRESETS)}")
        print("acrlpd train PRESET --help lists every field with the preset's value.")
        return 0 if argv else 2
    name, *flags = argv
    arguments = _parse(presets.get_preset(name), name, flags)
    stored = setup.run_files(arguments.config).config
    if arguments.resume and stored.exists():  # what the run was started with need not be said again
        before = from_dict(TrainConfig, json.loads(stored.read_text(encoding="utf-8")))
        arguments = _parse(before, name, flags)
    return _train(arguments, name, flags)


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train offline on prior data, then online in the simulator."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: bool = False  # go on where the run of this name stopped
    overwrite: bool = False  # delete the run of this name first


def _parse(default: TrainConfig, name: str, flags: Sequence[str]) -> TrainArguments:
    return tyro.cli(
        TrainArguments,
        args=flags,
        default=TrainArguments(default),
        prog=f"acrlpd train {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _train(arguments: TrainArguments, name: str, flags: Sequence[str]) -> int:
    config = arguments.config
    trainer = setup.make_trainer(config, resume=arguments.resume, overwrite=arguments.overwrite)
    try:
        summary = trainer.train()
    except Interrupted as stop:
        again = " ".join(["acrlpd train", name, *(flag for flag in flags if flag not in ("--resume", "--overwrite"))])
        print(f"\n{stop}\nResume with: {again} --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    for phase, result in summary["phases"].items():
        print(f"{phase:8} success {result['success']:.0%} [{result['low']:.0%}, {result['high']:.0%}]")
    print(f"report: {write_report(setup.run_files(config).directory)}")
    return 0
