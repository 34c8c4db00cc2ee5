"""``acrlpd report RUN``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from acrlpd.training.report import write_report


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Write one self-contained HTML page: results, curves, a filmstrip before and after, the configuration."""

    run: Annotated[str, tyro.conf.Positional]  # the run's folder, such as runs/demo
    env_name: Annotated[str | None, tyro.conf.arg(name="env.name")] = None  # custom/...: film with the run's own code


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(ReportArguments, args=argv, prog="acrlpd report")
    print(write_report(arguments.run, arguments.env_name))
    return 0
