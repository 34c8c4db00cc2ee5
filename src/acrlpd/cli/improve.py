"""``acrlpd improve CHECKPOINT --data.path EPISODES [--robot aloha|droid|libero]``."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import tyro

from acrlpd.cli.configured import changed, parse, take
from acrlpd.config import TrainConfig, to_dict
from acrlpd.data import held_out
from acrlpd.data.store import windows
from acrlpd.data.view.robots.mapping import ROBOTS, Robot
from acrlpd.deploy import choosing, improving
from acrlpd.deploy.choosing import Setting, Verdict
from acrlpd.deploy.improving import Original
from acrlpd.envs.env import EnvConfig
from acrlpd.fields import PositiveInt
from acrlpd.training import prior_data, setup
from acrlpd.training.faults import EXIT_INTERRUPTED, Interrupted
from acrlpd.training.loop import ACRLPDTrainer
from acrlpd.training.metrics import write_json
from acrlpd.training.run import run_files

USAGE = """usage: acrlpd improve CHECKPOINT [--data.path EPISODES] [--robot aloha|droid|libero] [--output_dir FOLDER]
                      [--steps 5000] [--resume | --overwrite] [--field value ...]

Make a policy better without changing its weights: train critics on recorded successes and failures, choose on held-out
episodes how strongly to follow them, and write a run that acrlpd serve, eval and export read.

  CHECKPOINT      a checkpoint of openpi's, or a run or checkpoint of this project
  --data.path     episodes, successes and failures; default: those that a run of this project was trained on
  --robot         whose observations and actions a checkpoint of openpi's has, which it does not say
  --output_dir    default: runs/<name of the checkpoint>-improved
  --steps         updates of critics and V
  --resume        go on after Ctrl-C, a crash or a reboot;  --overwrite replaces what is there
  --asset_id      which statistics, if a checkpoint of openpi's has several
  --env.name      a simulator of the same robot, for acrlpd eval later; nothing here acts in it

acrlpd improve CHECKPOINT ... --help lists every field of the configuration with the value that follows from the
checkpoint. One with PaliGemma's vocabulary needs its tokenizer: --policy.tokenizer paligemma_tokenizer.model."""

VERDICT = "improve.json"  # in the folder of the run
CHOSEN = ("env", "env.*", "agent.best_of_n_samples", "agent.guidance_weights")  # fields that the choice changes


@dataclasses.dataclass(frozen=True)
class ImproveArguments:
    """Train critics for a checkpoint, whose weights stay as they are, and choose how strongly to follow them."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    robot: Robot | None = None  # whose observations and actions a checkpoint of openpi's has
    output_dir: str | None = None  # None: runs/<name of the checkpoint>-improved
    steps: PositiveInt = improving.STEPS  # updates of critics and V
    resume: bool = False  # go on where it stopped
    overwrite: bool = False  # replace the folder of this name


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    path, *flags = argv
    original = _opened(path, flags)
    default, rest = changed(original.config, flags)
    arguments = parse(
        ImproveArguments, ImproveArguments(default), rest, f"acrlpd improve {path}", stored=original.config
    )
    env = arguments.config.env or original.env  # of later evaluations: training and choice need none
    config = dataclasses.replace(arguments.config, env=None)
    verdict = run_files(config).directory / VERDICT
    if arguments.resume and verdict.exists():
        print(f"{verdict.parent} is finished: its verdict is in {verdict}. --overwrite starts anew.")
        return 0
    print(improving.check(original, config), flush=True)
    trainer = setup.make_trainer(
        config, resume=arguments.resume, overwrite=arguments.overwrite, override=CHOSEN if arguments.resume else ()
    )
    try:
        trainer.train()
    except Interrupted as stop:
        again = shlex.join(["acrlpd", "improve", *(word for word in argv if word not in ("--resume", "--overwrite"))])
        print(f"\n{stop}\nResume with: {again} --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    found = _judged(config, trainer)
    _keep(original, env, trainer, found, verdict)
    print("\n".join(told(found, verdict.parent)))
    return 0


def _opened(path: str, flags: Sequence[str]) -> Original:
    """Return the checkpoint, with the configuration that follows from it and from flags of this command alone."""
    robot, output, steps, asset_id = (_last(flags, name) for name in ("robot", "output_dir", "steps", "asset_id"))
    if robot is not None and robot not in ROBOTS:
        raise ValueError(f"--robot {robot}: expected one of {', '.join(ROBOTS)}")
    if steps is not None and not (steps.isdecimal() and int(steps)):
        raise ValueError(f"--steps {steps}: expected a whole number of at least 1")
    says_data = any(word.split("=")[0] in ("--data.path", "--help", "-h") for word in flags)
    original = improving.open_original(
        path, data="EPISODES" if says_data else None, robot=cast(Robot | None, robot), asset_id=asset_id
    )
    place = Path(output or f"runs/{_name(path)}-improved")
    length = improving.length(int(steps)) if steps is not None else {}
    config = dataclasses.replace(original.config, run_dir=str(place.parent), name=place.name, **length)
    return dataclasses.replace(original, config=config)


def _last(flags: Sequence[str], name: str) -> str | None:
    """Return the value of ``--name``; of several the last one, which is the one that the parser reads."""
    value, rest = take(flags, name)
    return value if value is None or (later := _last(rest, name)) is None else later


def _name(path: str) -> str:
    """Return the last part of a path that is no step and no folder of checkpoints."""
    parts = [part for part in Path(path).parts if part not in ("checkpoints", "params", "/") and not part.isdigit()]
    return parts[-1] if parts else "checkpoint"


def _judged(config: TrainConfig, trainer: ACRLPDTrainer) -> Verdict:
    sources = [held for held in prior_data.held_out_of(prior_data.open_sets(config)) if held.num_episodes]
    data = config.data
    stores = windows.open_stores(sources, memory_bytes=data.memory_bytes, num_workers=data.num_workers)
    outcomes = [[bool(held_out.outcome(each, index)) for index in range(each.num_episodes)] for each in sources]
    pairs = list(zip(stores, outcomes, strict=True))
    return choosing.judge(trainer.config, trainer.agent, trainer.parts.transform, pairs)


def _keep(original: Original, env: EnvConfig | None, trainer: ACRLPDTrainer, found: Verdict, verdict: Path) -> None:
    """Write what was chosen into the checkpoint and the run, which act by it from now on."""
    setting = found.chosen
    agent = dataclasses.replace(
        trainer.config.agent, best_of_n_samples=setting.samples, guidance_weights=(setting.guidance,)
    )
    config = dataclasses.replace(trainer.config, agent=agent, env=env)
    checkpoints = trainer.parts.checkpoints
    step = trainer.state.step
    run = checkpoints.read_run(step) | {"config": to_dict(config)}
    checkpoints.replace_run(step, run)
    write_json(trainer.parts.files.config, to_dict(config))
    about = {"checkpoint": original.path, "params": str(original.params), "cpu_s": time.process_time()}
    write_json(verdict, about | found.to_dict())


def told(found: Verdict, folder: Path) -> list[str]:
    """Return what the held-out episodes say, in sentences."""

    def area(value: float | None, interval: tuple[float, float] | None) -> str:
        return "unknown" if value is None or interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

    best = next(each for each in found.tried if each.setting == found.chosen)
    plain = found.chosen == Setting(1, 0.0)
    lines = [
        f"held out: {found.successes} successes, {found.failures} failures",
        f"Q ranks successes above failures: AUC {area(found.auc, found.auc_interval)} (0.5 is chance); by the recorded "
        f"chunks above samples at the same states: {area(found.auc_chunks, found.auc_chunks_interval)}",
        f"calibration: Q is {found.calibration_error:.3g} off on average ({found.overestimation:+.3g} in the mean), "
        f"where returns have a standard deviation of {found.return_std:.3g}",
    ]
    if plain:
        lines.append(f"chosen: {found.reason}")
    else:
        lines.append(
            f"chosen: {found.chosen}, {found.reason}: Q {best.gain:+.3g} above plain samples by critics that did not "
            f"choose ({best.gain / max(found.plain_std, 1e-9):.1f} standard deviations of a plain sample), better at "
            f"{best.better:.0%} of the states"
        )
    if not found.can_tell:
        lines.append(
            "Q CANNOT TELL held-out successes from failures: this folder acts by plain samples, as the original does. "
            "More episodes of both kinds, or more --steps, may change that."
        )
    return [*lines, f"written: {folder}; acrlpd serve --checkpoint {folder}"]
