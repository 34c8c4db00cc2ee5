"""``acrlpd collect --output FOLDER``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from acrlpd import fields
from acrlpd.agents.agent import ActingMode
from acrlpd.config import CollectConfig
from acrlpd.envs.env import EnvConfig
from acrlpd.fields import NonNegativeFloat, NonNegativeInt, PositiveInt
from acrlpd.training import loading
from acrlpd.training.collection import collect_by_agent, collect_prior


@dataclasses.dataclass(frozen=True)
class CollectArguments:
    """Collect episodes, successes and failures, into one HDF5 file each. Those already in the folder are kept."""

    output: str  # the folder
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)  # with a checkpoint: that of its run
    episodes: PositiveInt = 100
    policy: Literal["expert", "random", "checkpoint"] = "expert"
    # range of the expert's smooth noise, in the units of the actions; None: 0 to 0.8
    noise_range: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    checkpoint: str | None = None  # a run or the folder of one step
    mode: ActingMode = "explore"  # for a checkpoint; explore: as online; greedy: the best by its critic; bc: imitation
    num_envs: PositiveInt = 8  # with a checkpoint: environments that share one policy call
    extraction: str | None = None  # with a checkpoint: how to choose instead; code of your own must be named here
    # with a checkpoint: of the extraction guided; None: as trained
    guidance_weights: tuple[NonNegativeFloat, ...] | None = None
    num_workers: PositiveInt = 1  # processes
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if (self.policy == "checkpoint") != (self.checkpoint is not None):
            raise ValueError("--policy checkpoint and --checkpoint PATH belong together")
        for name in ("extraction", "guidance_weights"):
            if getattr(self, name) is not None and self.checkpoint is None:
                raise ValueError(f"--{name} is a checkpoint's; --policy {self.policy} has no use for it")
        if self.noise_range is not None and self.policy != "expert":
            raise ValueError(f"--noise_range is the expert's; --policy {self.policy} has no use for it")


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    fields.check(arguments)
    if arguments.checkpoint is None:
        return _by_script(arguments)
    loaded = loading.load_stored(arguments.checkpoint, arguments.extraction, arguments.guidance_weights)
    config = loaded.config
    if config.env is not None:  # the run's environment, changed by the flags
        arguments = _parse(argv, default=CollectArguments(arguments.output, env=config.env))
    collect_by_agent(
        loaded.agent,
        loaded.transform,
        arguments.env,
        Path(arguments.output),
        checkpoint=f"{arguments.checkpoint}, step {loaded.step}",
        mode=arguments.mode,
        execute_horizon=config.executed_steps,
        episodes=arguments.episodes,
        num_envs=arguments.num_envs,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
    )
    return 0


def _parse(argv: Sequence[str], default: CollectArguments | None = None) -> CollectArguments:
    form = (tyro.conf.OmitArgPrefixes,)
    if default is None:
        return tyro.cli(CollectArguments, args=argv, prog="acrlpd collect", config=form)
    return tyro.cli(CollectArguments, args=argv, prog="acrlpd collect", default=default, config=form)


def _by_script(arguments: CollectArguments) -> int:
    assert arguments.policy != "checkpoint", "a checkpoint was not given"
    wanted = CollectConfig(
        episodes=arguments.episodes,
        policy=arguments.policy,
        noise_range=arguments.noise_range or CollectConfig().noise_range,
        num_workers=arguments.num_workers,
    )
    collect_prior(arguments.env, wanted, Path(arguments.output), seed=arguments.seed)
    return 0
