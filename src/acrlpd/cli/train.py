"""``acrlpd train PRESET [--field value ...]``."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from acrlpd import presets
from acrlpd.cli.configured import changed, named, parse, starting_point, warn_of_the_unusual
from acrlpd.config import TrainConfig
from acrlpd.training import loading, resuming, setup
from acrlpd.training.charts import POLICIES
from acrlpd.training.faults import EXIT_INTERRUPTED, Interrupted
from acrlpd.training.finished import nothing_left
from acrlpd.training.overwriting import tell_of_set_aside
from acrlpd.training.report import write_report
from acrlpd.training.run import run_files

USAGE = """usage: acrlpd train PRESET|FILE.yaml [--config FILE.yaml] [--environment development] [--field value ...]
       acrlpd train PRESET|FILE.yaml --algorithm NAME ...
       acrlpd train --resume RUN [--field value ...]

presets: {presets}
algorithms: {algorithms}
acrlpd train PRESET --help lists every field with the preset's value. A field given as a flag wins over the YAML file,
which wins over the preset."""


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(presets=", ".join(presets.PRESETS), algorithms=", ".join(presets.ALGORITHMS)))
        return 0 if argv else 2
    path, words = _resumed_path(argv)
    if path is not None:
        found, step = locate_run(path)
        flags = words if words[:1] and words[0].startswith("-") else words[1:]  # the preset need not be named again
        begun = stored_config(found)
        config, rest = changed(begun, flags)
        arguments = _parse(config, str(path), ["--resume", *rest], begun)
        return _train(arguments, f"--resume {found}", flags, step)
    name, *flags = argv
    config, rest = starting_point(name, flags)
    arguments = _parse(config, name, rest)
    directory = run_files(arguments.config).directory
    stored = resuming.started_with(directory) if arguments.resume else None
    if stored is not None:  # the values that the run was started with need not be given again
        said = arguments.config  # perhaps by the YAML file
        begun = _placed(stored, directory)
        config, rest = changed(begun, flags, preset=named(name))
        arguments = _parse(config, name, rest, begun)
        arguments = dataclasses.replace(arguments, config=as_named(arguments.config, said))
    return _train(arguments, name, flags)


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train offline on prior data, then online in the simulator."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: bool = False  # go on where the run of this name stopped; --resume RUN names the run's folder, or a step's
    overwrite: bool = False  # replace the run of this name: it is deleted when the new one has its first checkpoint
    override: bool = False  # resume even if values differ from those the run was started with
    override_lr_schedule: bool = False  # the same, but only for learning rates

    def may_differ(self) -> tuple[str, ...]:
        return ("*",) if self.override else LR_FIELDS if self.override_lr_schedule else ()


GO_ON = {
    None: "; more --online_steps or --offline_steps train on",
    "early_stopping_patience": ", unless --early_stopping_patience is raised",
    "early_stopping_success": ", unless --early_stopping_success is raised, or None",
}
"""The ways to let a finished run continue, by the rule that ended it."""

LR_FIELDS = ("optimizers.*.schedule.*",)


def _resumed_path(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the path of ``--resume PATH``, if there is one, and the other words."""
    for place, word in enumerate(argv[:-1]):
        if word == "--resume" and not argv[place + 1].startswith("-"):
            return Path(argv[place + 1]), [*argv[:place], *argv[place + 2 :]]
    return None, list(argv)


def locate_run(path: Path) -> tuple[Path, int | None]:
    """Return a run's folder, and the step if ``path`` is one of its checkpoints."""
    is_step = path.name.isdigit() and path.parent.name == "checkpoints"
    run = path.parent.parent if is_step else path
    if not (run / "config.json").is_file() and not (run / "checkpoints").is_dir():
        tell_of_set_aside(run)
        raise ValueError(f"--resume {path}: no run there. Name a run's folder, or a step in its checkpoints.")
    return run, int(path.name) if is_step else None


def stored_config(run: Path) -> TrainConfig:
    """Return the configuration that the run was started with, for the place where its folder is now."""
    config = resuming.started_with(run)
    if config is None:
        raise ValueError(
            f"{run} has neither config.json nor a checkpoint that can be read: there is nothing to resume."
        )
    return _placed(config, run)


def _placed(config: TrainConfig, run: Path) -> TrainConfig:
    if run.name in ("", ".."):  # "." names a run as well
        run = Path(os.path.abspath(run))
    return dataclasses.replace(config, run_dir=str(run.parent), name=run.name)


def as_named(stored: TrainConfig, said: TrainConfig) -> TrainConfig:
    """A stored configuration that may run the code it names, as far as the command's own configuration names it."""
    if said.agent.extraction == stored.agent.extraction:
        stored = loading.with_extraction(stored, said.agent.extraction)
    if stored.env is None or said.env is None or said.env.name != stored.env.name:
        return stored
    return loading.with_task(stored, said.env.name)


def _parse(default: TrainConfig, name: str, flags: Sequence[str], begun: TrainConfig | None = None) -> TrainArguments:
    return parse(TrainArguments, TrainArguments(default), flags, f"acrlpd train {name}", stored=begun)


def _train(arguments: TrainArguments, name: str, flags: Sequence[str], step: int | None = None) -> int:
    kept = [flag for flag in flags if flag not in ("--resume", "--overwrite")]
    return run(
        arguments.config,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        override=arguments.may_differ(),
        from_step=step,
        again=" ".join([name, *kept]),
    )


def run(config: TrainConfig, *, again: str, **how: Any) -> int:
    """Train to the end and write the report. ``again``: the words that resume it; ``how``: see ``make_trainer``."""
    warn_of_the_unusual(config)
    if how["resume"] and how["from_step"] is None:
        ended = nothing_left(config, override=how["override"])
        if ended is not None:
            print(f"{ended.text}. Nothing is left to do{GO_ON[ended.rule]}.")
            return 0
    trainer = setup.make_trainer(config, **how)
    try:
        summary = trainer.train()
    except Interrupted as stop:
        resume = "" if "--resume" in again else " --resume"
        print(f"\n{stop}\nResume with: acrlpd train {again}{resume}", file=sys.stderr)
        return EXIT_INTERRUPTED
    for phase, result in summary["phases"].items():
        print(f"{POLICIES[phase][0]:9} success {result['success']:.0%} [{result['low']:.0%}, {result['high']:.0%}]")
    print(summary["ended"]["text"])
    named_env = config.env.name if config.env is not None else None
    print(f"report: {write_report(run_files(config).directory, named_env)}")
    return 0
