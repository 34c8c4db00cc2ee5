"""A trained run as files for production, which need none of this code."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx

from acrlpd.agents.config import AgentConfig
from acrlpd.config import to_dict
from acrlpd.data.view import normalize
from acrlpd.data.view.robots.mapping import ROBOTS, unseen
from acrlpd.deploy.trained import load_trained, policy_spec
from acrlpd.files import written_whole
from acrlpd.models import lora, torch_names, weights
from acrlpd.models.pi0 import Pi0
from acrlpd.serving import export
from acrlpd.serving.budget import Plan
from acrlpd.serving.export import Interface
from acrlpd.serving.production import PRODUCTION_SERVING_CONFIG, Platform
from acrlpd.training.build import abstract_agent, delta_mask, has_quantiles, make_transform
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.loading import Trained
from acrlpd.training.prior_data import make_chunk_loader, open_mixture, open_sets

T = TypeVar("T")

logger = logging.getLogger(__name__)

OptimizationLevel = Literal["fast", "standard", "accurate"]
LEVELS: dict[str, tuple[int | None, int | None]] = {"fast": (3, 10), "standard": (None, None), "accurate": (None, 50)}
"""Numbers of critics to keep and of Euler steps; None: as trained."""

TD_BATCHES = 8  # number of batches over which the critics' errors are averaged


def export_acrlpd_model(
    checkpoint_path: str | Path,
    output_dir: str | Path,
    optimization_level: OptimizationLevel = "standard",
    *,
    platform: Platform | None = None,
    data: str | Path | None = None,
    extraction: str | None = None,
    guidance_weights: tuple[float, ...] | None = None,
) -> str:
    """Write a trained agent for production and return the folder.

    ``OUT/<step>/`` is a checkpoint that ``acrlpd serve`` and openpi's own server read, without optimiser state;
    ``OUT/stablehlo/`` is the whole inference function (``serving.export``); ``OUT/pytorch/`` is the policy for openpi's
    PyTorch port, if it is a pi0.

    Args:
        optimization_level: fast keeps the 3 critics of smallest TD error and takes 10 flow steps; accurate takes 50;
            standard leaves the agent as it was trained.
        platform: use the numbers of the production table instead of the level's.
        data: episodes for the TD error, preferably not trained on. None: the run's own.
        extraction: how the agent chooses instead; code of your own must be named here (``loading.load_checkpoint``).
        guidance_weights: those of the extraction guided. None: as trained.
    """
    output = Path(output_dir).absolute()
    if output.exists():
        raise ValueError(f"{output} exists already: name another folder to export to")
    if optimization_level not in LEVELS:
        raise ValueError(f"optimization_level must be one of {', '.join(LEVELS)}, got {optimization_level!r}")
    trained = load_trained(checkpoint_path, extraction, guidance_weights)
    if trained.agent.chooses:
        trained.config.agent.make_extraction(trained.config.agent.flow_steps)  # what cannot be used is refused here
    num_critics, num_steps = LEVELS[optimization_level]
    agent_config = trained.config.agent
    if platform is not None:
        table = PRODUCTION_SERVING_CONFIG[platform]
        num_critics, num_steps = table["critic_ensemble_size"], table["num_diffusion_steps"]
        agent_config = dataclasses.replace(agent_config, best_of_n_samples=table["best_of_n_samples"])
    agent_config = dataclasses.replace(agent_config, flow_steps=num_steps or agent_config.flow_steps)
    members = best_critics(trained, num_critics, data) if num_critics is not None else None
    small = _with_critics(trained, agent_config, members)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output, replaces=False) as partial:
        _write_checkpoint(partial, small)
        export.write_stablehlo(partial / "stablehlo", small.agent, interface(small))
        _write_pytorch(partial / "pytorch", small)
    logger.info("%s: %d critics, %d flow steps", output, agent_config.critic.num_critics, agent_config.flow_steps)
    return str(output)


def best_critics(trained: Trained, count: int, data: str | Path | None) -> np.ndarray | None:
    """Return the ``count`` critics of smallest TD error on episodes of ``data``; None if there are no others."""
    config = trained.config
    if count >= config.agent.critic.num_critics:
        return None
    if data is None:
        logger.warning("the critics are compared on the data they were trained on; --data names better data")
    else:
        other = dataclasses.replace(config.data, path=str(data), weights=(), sources=(), validation_fraction=0.0)
        config = dataclasses.replace(config, data=other)
    prior = open_mixture(config, open_sets(config))
    loader = make_chunk_loader(config, prior, make_transform(config, trained.stats, trained.dims))
    rngs = jax.random.split(jax.random.key(config.seed), TD_BATCHES)
    errors = [export.member_td_errors(trained.agent, loader.batch(k), rng) for k, rng in enumerate(rngs)]
    mean = np.mean(jax.device_get(errors), axis=0)
    logger.info("TD error of each critic: %s", np.round(mean, 4))
    return np.sort(np.argsort(mean)[:count])


def _with_critics(trained: Trained, agent_config: AgentConfig, members: np.ndarray | None) -> Trained:
    """Return the agent under another configuration, with the critics ``members`` only; None: with all."""
    agent = trained.agent
    if members is not None:
        critic = dataclasses.replace(agent_config.critic, num_critics=len(members))
        agent_config = dataclasses.replace(agent_config, critic=critic)
        params, ema = (
            groups | {name: export.keep_critics(groups[name], members) for name in groups if name == "critic"}
            for groups in (agent.params, agent.ema)
        )
        target_critic = export.keep_critics(agent.target_critic, members)
        agent = dataclasses.replace(agent, params=params, ema=ema, target_critic=target_critic)
    config = dataclasses.replace(trained.config, agent=agent_config)
    like = abstract_agent(config, trained.dims, trained.cameras)  # another extraction may have no student
    health = dataclasses.replace(agent.health, means=_only(like.health.means, agent.health.means))
    parts: dict[str, Any] = {
        "params": _only(like.params, agent.params),
        "ema": _only(like.ema, agent.ema),
        "health": health,
    }
    return dataclasses.replace(trained, agent=dataclasses.replace(agent, nets=like.nets, **parts), config=config)


def _only(names: Iterable[str], groups: Mapping[str, T]) -> dict[str, T]:
    return {name: groups[name] for name in names}


def _write_checkpoint(folder: Path, trained: Trained) -> None:
    manager = ACRLPDCheckpointManager(folder)
    run = {"config": to_dict(trained.config), "cameras": list(trained.cameras), "exported_from": trained.step}
    manager.save(trained.agent, asset_id=trained.config.asset_id, norm_stats=trained.stats, run=run)
    manager.wait()
    manager.close()


def _write_pytorch(folder: Path, trained: Trained) -> None:
    """Write the model, its statistics and its sizes as openpi's converter does; nothing if it is no pi0."""
    model = nnx.merge(trained.agent.nets.policy_def, trained.agent.acting_policy)
    if not isinstance(model, Pi0):
        logger.info("nothing written for PyTorch: openpi's port knows only pi0 and pi0.5")
        return
    stacks = (model.config.paligemma, model.config.action_expert)
    flat = lora.merge(weights.flatten(model), (stacks[0].adapter_scaling, stacks[1].adapter_scaling))
    folder.mkdir()
    metadata = {"format": "pt", **torch_names.head_sizes(flat)}
    weights.write_safetensors(folder / weights.TORCH_FILE, torch_names.to_torch(flat), metadata=metadata)
    normalize.save(folder / "assets" / trained.config.asset_id / normalize.FILE_NAME, trained.stats)
    policy = trained.config.policy
    sizes = {
        "action_dim": policy.action_dim or trained.dims.action,
        "action_horizon": policy.action_horizon,
        "paligemma_variant": policy.paligemma_variant.removesuffix("_lora"),  # adapters are merged
        "action_expert_variant": policy.action_expert_variant.removesuffix("_lora"),
        "precision": "float32",
    }
    (folder / "config.json").write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def interface(trained: Trained) -> Interface:
    """Return what the exported inference function does beside running the networks."""
    config = trained.config
    num_samples = config.agent.best_of_n_samples if trained.agent.chooses else 1
    robot = config.data.robot
    return Interface(
        trained.stats,
        has_quantiles(config),
        policy_spec(trained),
        Plan(num_samples, config.agent.flow_steps),
        greedy=trained.agent.chooses,
        robot=ROBOTS[robot] if robot else None,
        delta_mask=delta_mask(config),
        unseen=unseen(robot, trained.cameras) if robot else (),
    )
