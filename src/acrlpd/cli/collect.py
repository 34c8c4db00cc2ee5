"""``acrlpd collect --output FOLDER``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from acrlpd.config import CollectConfig
from acrlpd.envs.env import EnvConfig
from acrlpd.training import setup


@dataclasses.dataclass(frozen=True)
class CollectArguments:
    """Episodes of a scripted expert with noise, successes and failures, into one HDF5 file each."""

    output: str  # the folder; episodes already in it are kept
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    collect: CollectConfig = dataclasses.field(default_factory=CollectConfig)
    seed: int = 0


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(CollectArguments, args=argv, prog="acrlpd collect", config=(tyro.conf.OmitArgPrefixes,))
    setup.collect_prior(arguments.env, arguments.collect, Path(arguments.output), seed=arguments.seed)
    return 0
