"""``acrlpd train PRESET [--field value ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from acrlpd import presets
from acrlpd.config import TrainConfig
from acrlpd.training import setup
from acrlpd.training.guards import EXIT_INTERRUPTED, Interrupted
from acrlpd.training.report import write_report


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(f"usage: acrlpd train PRESET [--field value ...]\n\npresets: {', '.join(presets.PRESETS)}")
        print("acrlpd train PRESET --help lists every field with the preset's value.")
        return 0 if argv else 2
    name, *flags = argv
    preset = presets.get_preset(name)

    def train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = preset, resume: bool = False, overwrite: bool = False
    ) -> int:
        """Train offline on prior data, then online in the simulator.

        Args:
            config: The run.
            resume: Go on where the run of this name stopped.
            overwrite: Delete the run of this name first.
        """
        return _train(config, name, flags, resume=resume, overwrite=overwrite)

    return tyro.cli(train, args=flags, prog=f"acrlpd train {name}", config=(tyro.conf.AvoidSubcommands,))


def _train(config: TrainConfig, name: str, flags: Sequence[str], *, resume: bool, overwrite: bool) -> int:
    trainer = setup.make_trainer(config, resume=resume, overwrite=overwrite)
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
