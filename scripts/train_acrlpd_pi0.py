"""Training with the flags of the founding design; ``acrlpd train`` has every field as a flag.

python scripts/train_acrlpd_pi0.py --config droid --data_dir /path/to/droid --batch_size 64
python scripts/train_acrlpd_pi0.py --config aloha --lerobot_repo_id lerobot/aloha_sim_insertion_human
python scripts/train_acrlpd_pi0.py --resume runs/droid --override_lr_schedule --pi0_peak_lr 1e-5
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from acrlpd import presets
from acrlpd.cli import train
from acrlpd.cli.configured import is_yaml
from acrlpd.config import TrainConfig
from acrlpd.overrides import apply_config_overrides, fields_of, load_yaml
from acrlpd.platforms import ENVIRONMENTS, environment_overrides
from acrlpd.training.faults import EXIT_FAULT, RunFault

SOURCES = ("data_dir", "lerobot_repo_id", "checkpoint_dir", "experiment_name")
NUMBERS = ("bc_weight", "pi0_peak_lr", "critic_peak_lr", "discount", "max_grad_norm")
COUNTS = (
    *("offline_steps", "online_steps", "batch_size", "best_of_n_samples", "gradient_accumulation_steps"),
    *("fsdp_devices", "seed", "log_frequency", "eval_frequency", "save_frequency", "num_eval_episodes"),
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help=f"a preset ({', '.join(presets.PRESETS)}) or a YAML file")
    parser.add_argument("--environment", choices=ENVIRONMENTS, default="production")
    parser.add_argument("--data_dir", help="episodes in any format that is read")
    parser.add_argument("--lerobot_repo_id", help="a LeRobot data set on the hub, or a folder of that name")
    parser.add_argument("--checkpoint_dir", help="where runs lie; this one is its experiment_name below it")
    parser.add_argument("--experiment_name", help="the run's name")
    parser.add_argument("--pretrained_weights", help="an openpi checkpoint to start from")
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=float, help=f"sets {' and '.join(fields_of(name))}")
    for name in COUNTS:
        parser.add_argument(f"--{name}", type=int, help=f"sets {' and '.join(fields_of(name))}")
    parser.add_argument("--freeze_pi0_backbone", action="store_true", default=None, help="train the rest alone")
    parser.add_argument(
        "--resume", nargs="?", const=True, help="go on: with this run, or with the one whose folder is named"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run of this name first")
    parser.add_argument("--override_lr_schedule", action="store_true", help="resume with the flags' other values")
    parser.add_argument(
        "--debug_mode", action="store_true", help="log at every update, end at the first NaN, show stacks"
    )
    return parser


def configuration(arguments: argparse.Namespace, base: TrainConfig) -> TrainConfig:
    """``base`` with every flag that was given."""
    config = apply_config_overrides(base, environment_overrides(base, arguments.environment))
    return apply_config_overrides(config, changes(arguments))


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields by their own dotted names."""
    named = {name: getattr(arguments, name) for name in (*NUMBERS, *COUNTS, *SOURCES, "freeze_pi0_backbone")}
    named["data_dir"] = arguments.data_dir or arguments.lerobot_repo_id
    del named["lerobot_repo_id"]
    named["policy.weights"] = arguments.pretrained_weights
    if arguments.debug_mode:
        named["log_frequency"] = arguments.log_frequency or 1
        named["max_rollbacks"] = 0
        named["max_skipped_updates"] = 1
    return {path: value for name, value in named.items() if value is not None for path in fields_of(name)}


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
    step = None
    if isinstance(arguments.resume, str):
        path, step = train.locate_run(Path(arguments.resume))
        config = apply_config_overrides(train.stored_config(path), changes(arguments))
        again = f"--resume {path}"
    else:
        if arguments.config is None:
            raise ValueError("name a preset or YAML file with --config, or a run with --resume")
        word = arguments.config
        base = load_yaml(word, presets.get_preset) if is_yaml(word) else presets.get_preset(word)
        config, again = configuration(arguments, base), word
    override = (*train.LR_FIELDS, *changes(arguments)) if arguments.override_lr_schedule else ()
    return train.run(
        config,
        resume=arguments.resume is not None,
        overwrite=arguments.overwrite,
        override=override,
        from_step=step,
        again=again,
    )


if __name__ == "__main__":
    sys.exit(main())
