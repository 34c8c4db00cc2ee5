"""Train with the flags of the founding design; ``acrlpd train`` has a flag for every field.

python scripts/train_acrlpd_pi0.py --config droid --data_dir /path/to/droid --batch_size 64
python scripts/train_acrlpd_pi0.py --config aloha --lerobot_repo_id lerobot/aloha_sim_insertion_human
python scripts/train_acrlpd_pi0.py --resume runs/droid --override_lr_schedule --pi0_peak_lr 1e-5
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from acrlpd import presets
from acrlpd.cli import train
from acrlpd.cli.configured import named
from acrlpd.config import TrainConfig
from acrlpd.data.formats.lerobot import reader as lerobot
from acrlpd.overrides import apply_config_overrides, fields_of
from acrlpd.platforms import ENVIRONMENTS, environment_overrides
from acrlpd.training import resuming
from acrlpd.training.faults import EXIT_FAULT, RunFault
from acrlpd.training.run import run_files

SOURCES = ("data_dir", "checkpoint_dir", "experiment_name")
NUMBERS = ("bc_weight", "pi0_peak_lr", "critic_peak_lr", "discount", "max_grad_norm")
COUNTS = (
    *("offline_steps", "online_steps", "batch_size", "best_of_n_samples", "gradient_accumulation_steps"),
    *("fsdp_devices", "seed", "log_frequency", "eval_frequency", "save_frequency", "num_eval_episodes"),
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help=f"a preset ({', '.join(presets.PRESETS)}) or a YAML file")
    parser.add_argument("--environment", choices=ENVIRONMENTS, help="shorter phases for trials; default: production")
    parser.add_argument("--data_dir", help="episodes in any supported format")
    parser.add_argument(
        "--lerobot_repo_id", help="a folder of that name, or else a LeRobot data set on the hub, which is copied"
    )
    parser.add_argument("--checkpoint_dir", help="folder of runs; this run is in its subfolder experiment_name")
    parser.add_argument("--experiment_name", help="the run's name")
    parser.add_argument("--pretrained_weights", help="an openpi checkpoint to start from")
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=float, help=f"sets {' and '.join(fields_of(name))}")
    for name in COUNTS:
        parser.add_argument(f"--{name}", type=int, help=f"sets {' and '.join(fields_of(name))}")
    parser.add_argument("--freeze_pi0_backbone", action="store_true", default=None, help="train only the rest")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        help="continue the run in the given folder (then without --config and --environment), or the run with this "
        "configuration's name; its stored values are used, so flags need not be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run of this name")
    parser.add_argument("--override_lr_schedule", action="store_true", help="resume with the new values of flags")
    parser.add_argument(
        "--debug_mode", action="store_true", help="log at every update, end at the first NaN, show stacks"
    )
    return parser


def configuration(arguments: argparse.Namespace, base: TrainConfig) -> TrainConfig:
    """Return ``base`` with the values of all flags that were given."""
    return apply_config_overrides(base, {**environment(arguments, base), **changes(arguments)})


def environment(arguments: argparse.Namespace, base: TrainConfig) -> dict[str, Any]:
    return environment_overrides(base, arguments.environment) if arguments.environment else {}


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of given flags by the dotted names of their fields."""
    given = {name: getattr(arguments, name) for name in (*NUMBERS, *COUNTS, *SOURCES, "freeze_pi0_backbone")}
    if arguments.lerobot_repo_id is not None:
        given["data_dir"] = str(lerobot_folder(arguments.lerobot_repo_id))
    given["policy.weights"] = arguments.pretrained_weights
    if arguments.debug_mode:
        given["log_frequency"] = arguments.log_frequency or 1
        given["max_rollbacks"] = 0
        given["max_skipped_updates"] = 1
    return {path: value for name, value in given.items() if value is not None for path in fields_of(name)}


def lerobot_folder(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else lerobot.hub_folder(name)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("acrlpd").setLevel(logging.DEBUG if arguments.debug_mode else logging.INFO)
    if arguments.debug_mode:
        jax.config.update("jax_traceback_filtering", "off")
    try:
        return run(arguments)
    except (ValueError, ImportError, OSError, RunFault) as error:
        if arguments.debug_mode:
            traceback.print_exc()
        print(f"train_acrlpd_pi0: {error}", file=sys.stderr)
        return EXIT_FAULT if isinstance(error, RunFault) else 2


def run(arguments: argparse.Namespace) -> int:
    repo, step = arguments.lerobot_repo_id, None
    if arguments.data_dir is not None and repo is not None:
        raise ValueError("--data_dir and --lerobot_repo_id both name the data: leave one of them out")
    if isinstance(arguments.resume, str):
        if arguments.config is not None or arguments.environment is not None:
            raise ValueError(
                f"--resume {arguments.resume} goes on with what that run has stored: leave --config and --environment "
                "out, and set single values with their flags"
            )
        path, step = train.locate_run(Path(arguments.resume))
        config = apply_config_overrides(train.stored_config(path), changes(arguments))
    else:
        if arguments.config is None:
            raise ValueError("name a preset or YAML file with --config, or a run with --resume")
        base = named(arguments.config)
        config = configuration(arguments, base)
        directory = run_files(config).directory
        if arguments.resume and resuming.started_with(directory) is not None:
            said = {**environment(arguments, base), **changes(arguments)}
            config = apply_config_overrides(train.as_named(train.stored_config(directory), config), said)
    if repo is not None and not Path(repo).is_dir():
        lerobot.download(repo, lerobot.hub_folder(repo))
    override = (*train.LR_FIELDS, *changes(arguments)) if arguments.override_lr_schedule else ()
    return train.run(
        config,
        resume=arguments.resume is not None,
        overwrite=arguments.overwrite,
        override=override,
        from_step=step,
        again=f"--resume {shlex.quote(str(run_files(config).directory))}",  # the folder with the configuration
    )


if __name__ == "__main__":
    sys.exit(main())
