"""From a checkpoint to the run that trains critics for it, and changes none of its weights: ``acrlpd improve``.

What the weights or the run say is taken from there. Everything else is a field of the configuration, with a default.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from acrlpd.agents.config import AgentConfig, TemperatureConfig
from acrlpd.agents.state import CRITIC_GROUPS
from acrlpd.config import (
    CosineDecaySchedule,
    DataConfig,
    OptimizerConfig,
    OptimizersConfig,
    PolicyConfig,
    TrainConfig,
    from_stored,
)
from acrlpd.data import held_out
from acrlpd.data.sources import Dataset
from acrlpd.data.view.robots import mapping
from acrlpd.data.view.robots.mapping import ROBOTS, Robot
from acrlpd.deploy.trained import is_ours
from acrlpd.envs.env import EnvConfig
from acrlpd.models import gemma, siglip, weights
from acrlpd.models.critic import CriticConfig
from acrlpd.models.flow import FlowPolicy
from acrlpd.models.recognize import recognize, unsized
from acrlpd.training import loading, prior_data
from acrlpd.training.build import Dims, abstract_agent, delta_mask, make_policy, make_tokenizer, model_cameras
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, read_norm_stats

logger = logging.getLogger(__name__)

STEPS = 5000  # updates of critics and V
FRACTION = 0.2  # share of the episodes that are held out
MIN_CRITICS = 4  # half of them choose when the other half judges

ACTION_HORIZONS: dict[tuple[Robot, str], int] = {
    ("droid", "pi0"): 10,
    ("droid", "pi05"): 15,
    ("libero", "pi05"): 10,
}
"""Steps that openpi's models of a robot predict, where they are not 50: no array tells them."""

EXECUTED: dict[Robot, int] = {"aloha": 25, "droid": 8, "libero": 5}
"""Steps that openpi's clients of a robot execute before they ask again."""


@dataclasses.dataclass(frozen=True)
class Original:
    """The checkpoint that is improved: where it is, and what it says."""

    path: str
    params: Path  # the folder or file of its parameters
    config: TrainConfig  # of the run that improves it, before anybody chose values
    found: Mapping[str, str]  # ``recognize``'s
    env: EnvConfig | None = None  # of the run that made it
    cameras: tuple[str, ...] | None = None  # of the data that it was trained on; None: it is openpi's

    @property
    def is_ours(self) -> bool:
        return self.cameras is not None


def open_original(path: str, *, data: str | None, robot: Robot | None, asset_id: str | None) -> Original:
    """Return what a checkpoint says of itself; no array is read.

    ``data``: the episodes; None: those that a run of this project was trained on. ``robot`` and ``asset_id``: of a
    checkpoint of openpi's, which does not say the first, and the second only if it has statistics of one.

    Raises:
        ValueError: it holds no policy that critics can be trained for, or something that is needed was not said.
    """
    if is_ours(path):
        return _of_run(path, data, robot)
    if robot is None:
        raise ValueError(
            f"{path} is no run or checkpoint of this project; if it is one of openpi's, say whose: --robot "
            + " | ".join(ROBOTS)
        )
    if data is None:
        raise ValueError(f"{path}: say on which episodes critics are trained, successes and failures: --data.path")
    return _of_openpi(path, data, robot, asset_id)


def _of_run(path: str, data: str | None, robot: Robot | None) -> Original:
    directory, step = loading.locate_checkpoint(Path(path))
    manager = ACRLPDCheckpointManager(directory)
    if step is None:
        step = loading.kept_step(Path(path))
    step = max(manager.steps(), default=0) if step is None else step
    run = manager.read_run(step)
    config = from_stored(run["config"])
    env = config.env
    if not config.policy.traits.is_flow:
        raise ValueError(f"{path} holds a policy of kind {config.policy.kind}, which has no samples to choose among")
    if robot not in (None, config.data.robot):
        raise ValueError(f"{path} was trained with data.robot={config.data.robot!r}: leave out --robot {robot}")
    folder = (directory / str(step)).absolute()
    given: dict[str, Any] = {"path": data, "weights": (), "sources": ()} if data is not None else {}
    if data is None and not config.data.sets:
        given = {"path": str(directory.parent / "prior")}
        if not Path(given["path"]).exists():
            raise ValueError(f"{path} has no episodes of its own in {given['path']}: name some with --data.path")
    normalization = config.data.action_normalization
    if normalization == "bounds":  # the statistics of the checkpoint are those bounds
        normalization = "quantile" if config.policy.traits.state_in_prompt else "z_score"
    whose = {"norm_stats": str(folder / "assets"), "action_normalization": normalization}
    config = dataclasses.replace(
        config,
        preset=None,
        env=None,
        policy=_frozen(config.policy, folder / "params"),
        agent=_agent(config.agent),
        data=dataclasses.replace(config.data, **(given | whose), **HELD_OUT),
        optimizers=dataclasses.replace(config.optimizers, critic=_critic_optimizer()),
        online_loss_weights=None,
        actor_warmup_steps=0,
        **length(STEPS),
    )
    found = recognize(weights.inspect(folder / "params"))
    return Original(path, folder / "params", config, found, env, tuple(run["cameras"]))


HELD_OUT: dict[str, Any] = {"validation_fraction": FRACTION, "prefix_bytes": 0}  # critics read pooled features alone


def _of_openpi(path: str, data: str, robot: Robot, asset_id: str | None) -> Original:
    parameters = weights.locate(path)
    found = _sizes(parameters)
    kind = cast(Any, found["model"])
    assets = parameters.parent / "assets"
    if not assets.is_dir():
        raise ValueError(f"{assets}: expected a folder of normalization statistics beside the parameters")
    read_norm_stats(assets, asset_id)  # refuses a choice that has to be made
    known = [file.parent.relative_to(assets).as_posix() for file in assets.rglob("norm_stats.json")]
    asset_id = known[0] if asset_id is None else asset_id
    tower = siglip.get_config(found["vision_variant"])
    policy = PolicyConfig(
        kind=kind,
        action_horizon=ACTION_HORIZONS.get((robot, kind), 50),
        action_dim=int(found["action_dim"]),
        paligemma_variant=found["paligemma_variant"],
        action_expert_variant=found["action_expert_variant"],
        vision_variant=found["vision_variant"],
        vocab_size=int(found["vocab_size"]),
        max_token_len=200 if kind == "pi05" else 48,
        image_size=int(found.get("image_size", tower.image_size)),
        remat=False,
    )
    policy = dataclasses.replace(_frozen(policy, parameters), frozen_dtype="bfloat16")  # as openpi serves it
    config = TrainConfig(
        policy=policy,
        agent=_agent(
            AgentConfig(
                critic=CriticConfig(q_aggregation="mean"),
                temperature=TemperatureConfig(adaptive=False),
                target_update_tau=0.02,
                best_of_n_samples=16,
                typical_share=0.5,
            )
        ),
        data=DataConfig(
            path=data,
            robot=robot,
            norm_stats=str(assets / asset_id),
            action_normalization="quantile" if kind == "pi05" else "z_score",
            **HELD_OUT,
        ),
        optimizers=OptimizersConfig(critic=_critic_optimizer()),
        execute_horizon=min(EXECUTED[robot], policy.action_horizon),
        asset_id=asset_id,
        **length(STEPS),
    )
    return Original(path, parameters, config, found)


def _sizes(parameters: Path) -> dict[str, str]:
    arrays = weights.inspect(parameters)
    found = recognize(arrays)
    kind = found.get("model")
    if kind not in ("pi0", "pi05"):
        held = f"a model of kind {kind}" if kind else "no model that is known here"
        raise ValueError(f"{parameters} holds {held}: critics are trained for pi0 and pi0.5, which sample by a flow")
    if problems := unsized(arrays, kind):
        raise ValueError(
            f"{parameters} looks like {kind}, but it is incomplete: arrays that tell the model's sizes are not as "
            "expected. Copy it anew.\n  " + "\n  ".join(problems)
        )
    return found


def _frozen(policy: PolicyConfig, parameters: Path) -> PolicyConfig:
    return dataclasses.replace(policy, weights=str(parameters), frozen=True, freeze_pi0_backbone=False)


def _agent(agent: AgentConfig) -> AgentConfig:
    """Return the choices of an agent that learns critics by the implicit target, and whose samples they guide."""
    number = max(agent.critic.num_critics, MIN_CRITICS)
    critic = dataclasses.replace(agent.critic, num_critics=number, horizon=None)  # of what is executed from now on
    return dataclasses.replace(
        agent,
        algorithm="acrlpd",
        critic=critic,
        temperature=dataclasses.replace(agent.temperature, adaptive=False),
        extraction="guided",
        target="implicit",
        target_samples=None,
        target_flow_steps=None,
        target_guidance=False,
        policy_ema_decay=None,  # the weights are what they are; target critics are averages themselves
        act_by_target_critic=True,
        gradient_accumulation_steps=1,
        bc_weighting="none",
    )


def _critic_optimizer() -> OptimizerConfig:
    schedule = CosineDecaySchedule(warmup_steps=100, peak_lr=3e-4, decay_lr=3e-4)
    return OptimizerConfig(schedule=schedule, b2=0.999, clip_gradient_norm=10.0)


def length(steps: int) -> dict[str, Any]:
    return {
        "offline_steps": steps,
        "critic_alone_steps": steps,
        "online_steps": 0,
        "log_frequency": 100,
        "save_frequency": max(1, steps // 2),
        "max_to_keep": 1,
        "keep_period": None,
    }


@dataclasses.dataclass(frozen=True)
class Prospect:
    """The facts that are known before anything is allocated: episodes by outcome, and the sizes of what will be."""

    trained: tuple[int, int]  # successes and failures to train on
    held_out: tuple[int, int]
    rows: int  # steps to train on
    policy_parameters: int
    policy_bytes: int
    critic_parameters: int
    critic_bytes: int  # with targets and optimiser
    feature_bytes: int  # of the stored features, on disk

    def __str__(self) -> str:
        return (
            f"policy {self.policy_parameters:,} parameters, frozen ({self.policy_bytes / 1e9:.2f} GB); critics and V "
            f"{self.critic_parameters:,} ({self.critic_bytes / 1e9:.3f} GB with targets and optimiser); features of "
            f"{self.rows:,} steps ({self.feature_bytes / 1e9:.3f} GB on disk); training on {self.trained[0]} successes "
            f"and {self.trained[1]} failures, {self.held_out[0]} and {self.held_out[1]} held out"
        )


def check(original: Original, config: TrainConfig) -> Prospect:
    """Return the prospect of the run; refuse what contradicts the checkpoint, and data that teach nothing.

    Raises:
        ValueError: a field differs from what the weights say; the data are of another robot, or have no success or no
            failure.
    """
    _check_fields(original, config)
    sources = prior_data.open_sets(config)
    first = sources[0]
    dims = Dims(*(first.window(0, key, 0, 1).shape[1] for key in ("state", "actions")))
    _check_data(original, config, dims, first)
    model = _check_arrays(original, config, dims, first.cameras)
    trained = _outcomes(sources)
    held = _outcomes(prior_data.held_out_of(sources))
    _check_outcomes(config, trained, held)
    agent = abstract_agent(config, dims, first.cameras)
    critics = [agent.params[group] for group in CRITIC_GROUPS if group in agent.params]
    reads = config.policy.traits.has_backbone and config.agent.critic.use_pi0_features
    feature_dim = model.feature_dim if reads else 0
    rows = sum(int(np.sum(each.lengths)) + each.num_episodes for each in sources)
    return Prospect(
        trained,
        held,
        rows,
        _count(agent.acting_policy),
        _bytes(agent.acting_policy),
        _count(critics),
        _bytes([critics, agent.target_critic, agent.opt_state]),
        rows * feature_dim * 4,
    )


def _check_fields(original: Original, config: TrainConfig) -> None:
    policy, before = config.policy, original.config.policy
    told = {"kind": "model", "action_dim": "action_dim", "vocab_size": "vocab_size", "image_size": "image_size"}
    known = [name for name, found in told.items() if found in original.found or original.is_ours]
    known += ["action_horizon", "max_token_len"] if original.is_ours else []
    different = [
        f"policy.{name} is {getattr(policy, name)}, but {original.params} holds {getattr(before, name)}"
        for name in known
        if getattr(before, name) not in (None, getattr(policy, name))
    ]
    if policy.weights != before.weights or not policy.frozen:
        different.append(f"policy.weights and policy.frozen are what is improved: {original.params}, as it is")
    if config.data.robot != original.config.data.robot:
        different.append(f"data.robot is {config.data.robot}, after --robot {original.config.data.robot}")
    if config.agent.critic.num_critics < MIN_CRITICS:
        different.append(
            f"agent.critic.num_critics is {config.agent.critic.num_critics}: at least {MIN_CRITICS} are needed, since "
            "half of them judge what the others choose"
        )
    if not config.data.validation_fraction:
        different.append("data.validation_fraction is 0: N and guidance are chosen on episodes that are held out")
    if config.online_steps:
        different.append(f"online_steps is {config.online_steps}, but nothing acts here")
    for name, value in (("algorithm", "acrlpd"), ("extraction", "guided")):
        if getattr(config.agent, name) != value:
            different.append(f"agent.{name} is {getattr(config.agent, name)}: it is {value} here")
    different += [
        f"agent.{name} is chosen on held-out episodes (acrlpd serve takes others)"
        for name in ("best_of_n_samples", "guidance_weights")
        if getattr(config.agent, name) != getattr(original.config.agent, name)
    ]
    if different:
        raise ValueError("\n".join(f"{line}. Leave it out" for line in different))
    if not original.is_ours and (policy.kind, config.data.robot) == ("pi05", "libero"):
        logger.warning(
            "the state is written into the prompt of pi05, as openpi does by default. Its own pi0.5 for LIBERO was "
            "trained without (discrete_state_input=False), and would read a prompt that it has never seen"
        )
    if policy.traits.has_backbone:
        for part in ("paligemma_variant", "action_expert_variant"):
            try:
                gemma.get_config(getattr(policy, part))
            except ValueError as error:
                raise ValueError(f"--policy.{part}: {error}") from error
        make_tokenizer(policy).check_trained(policy.vocab_size or make_tokenizer(policy).vocab_size)


def _check_data(original: Original, config: TrainConfig, dims: Dims, first: Dataset) -> None:
    name = str(config.data.name)
    mapping.check(
        config.data.robot,
        delta_mask(config),
        where=name,
        dims=(dims.state, dims.action),
        cameras=first.cameras if config.policy.traits.has_backbone else None,
    )
    width = config.policy.action_dim
    if width is not None and max(dims.state, dims.action) > width:
        raise ValueError(
            f"{name} has {dims.state} state and {dims.action} action dimensions, but {original.params} has a width of "
            f"{width}: these are episodes of another robot, or other keys (--data.state_keys, --data.action_keys)"
        )
    if original.cameras is None or not config.policy.traits.has_backbone:
        return
    if set(original.cameras) != set(first.cameras) and config.data.robot is None:
        raise ValueError(
            f"{original.path} was trained with the cameras {', '.join(original.cameras) or 'none'}, but {name} has "
            f"{', '.join(first.cameras) or 'none'}: choose the same ones with --data.cameras"
        )


def _check_arrays(original: Original, config: TrainConfig, dims: Dims, cameras: tuple[str, ...]) -> FlowPolicy:
    """Return the model without its arrays; refuse a configuration whose model has others than the checkpoint."""
    names = model_cameras(config, cameras)
    make = functools.partial(make_policy, config.policy, dims, names)
    model = nnx.eval_shape(lambda: make(nnx.Rngs(params=jax.random.key(0))))
    problems = weights.mismatches(weights.flatten(cast(nnx.Module, model)), weights.inspect(original.params))
    if problems:
        raise ValueError(
            f"{original.params} does not hold the model that the fields of --policy describe:\n  "
            + "\n  ".join(problems[:10])
        )
    return model


def _outcomes(sources: list[Dataset]) -> tuple[int, int]:
    """Return the numbers of successes and of failures; an episode of unknown outcome counts as a failure."""
    known = [held_out.outcome(source, index) for source in sources for index in range(source.num_episodes)]
    return sum(bool(each) for each in known), sum(not each for each in known)


def _check_outcomes(config: TrainConfig, trained: tuple[int, int], held: tuple[int, int]) -> None:
    """Refuse episodes of one outcome alone; warn where one kind is too rare to be held out."""
    total = sum(trained) + sum(held)
    one = "record some by running the policy (acrlpd serve, acrlpd collect --policy checkpoint)"
    if not trained[1] + held[1]:
        raise ValueError(
            f"{config.data.name}: all {total} episodes succeeded. Critics learn what to prefer from successes and "
            f"failures; from these they would learn to imitate. Add episodes that failed: {one}, and keep the failures"
        )
    if not trained[0] + held[0]:
        raise ValueError(
            f"{config.data.name}: none of the {total} episodes succeeded, so every chunk has the same value. Add some "
            f"that did: demonstrations, or {one}; or state what the format does not say (--data.rewards.success)"
        )
    if not sum(held) or not all(trained):
        raise ValueError(
            f"{config.data.name}: of {total} episodes none can be held out while successes and failures are left to "
            f"train on, so nothing would tell whether critics are right. Add some: {one}"
        )
    for kind, number in zip(("success", "failure"), held, strict=True):
        if not number:
            logger.warning(
                "%s has a single %s, which is trained on: whether Q tells successes from failures cannot be judged, so "
                "plain samples will be chosen. Add some of that kind",
                *(config.data.name, kind),
            )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
