"""Export of a trained agent to files that need none of this code: the whole inference function and its weights.

inference.stablehlo     the function, for ``jax.export.deserialize``
weights.safetensors     its first argument, a dictionary of arrays
inputs.json             its second argument: name, shape and dtype of each input; and the outputs
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.agents import candidates, td
from acrlpd.agents.agent import ACRLPDAgent, choose_chunks
from acrlpd.data.view.normalize import EPSILON, NormStats
from acrlpd.data.view.robots.mapping import Platform
from acrlpd.models.parameters import Params
from acrlpd.serving.budget import Plan
from acrlpd.serving.policy import keys_of
from acrlpd.types import ChunkBatch, Observation

FUNCTION, WEIGHTS, INPUTS = "inference.stablehlo", "weights.safetensors", "inputs.json"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Interface:
    """The interface between the exported function and the robot."""

    stats: Mapping[str, NormStats]
    quantiles: bool  # normalize with quantiles instead of mean and standard deviation
    spec: Observation  # the model's observation, without a batch axis
    plan: Plan
    greedy: bool = True  # False: the policy alone, without the critic's choice
    robot: Platform | None = None  # the robot whose units inputs and outputs have; None: the data's units
    delta_mask: tuple[bool, ...] = ()  # the action dimensions that the policy predicts relative to the state
    unseen: tuple[str, ...] = ()  # the model's cameras that the robot does not have


def write_stablehlo(folder: Path, agent: ACRLPDAgent, interface: Interface, *, batch_size: int = 1) -> None:
    """Write the three files. The function takes raw states, pictures of the model's size and prompt tokens, and returns
    actions in the robot's units; seeds determine the random numbers as in ``Policy.infer``."""
    from safetensors.numpy import save_file

    params = agent.params | {"critic": agent.acting_critic}
    guiding = agent.target_critic if agent.config.extraction == "guided" else {}
    acting = dataclasses.replace(agent, params=params, opt_state={}, target_critic=guiding)
    weights, rebuild = _flat(acting)
    inputs = _inputs(interface, batch_size)

    def infer(weights: dict[str, Array], inputs: dict[str, Array]) -> dict[str, Array]:
        return _infer(rebuild(weights), interface, inputs)

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    exported = jax.export.export(jax.jit(infer), platforms=PLATFORMS)(shapes, inputs)
    folder.mkdir(parents=True)
    (folder / FUNCTION).write_bytes(exported.serialize())
    save_file({name: np.asarray(value) for name, value in weights.items()}, folder / WEIGHTS)
    described = {name: {"shape": list(each.shape), "dtype": str(each.dtype)} for name, each in inputs.items()}
    value = f"[b], value of the chunk's first {agent.nets.critic_horizon} steps; absent without a critic's choice"
    outputs = {"actions": "[b h a], robot units", "q": value}
    (folder / INPUTS).write_text(json.dumps({"inputs": described, "outputs": outputs}, indent=2), encoding="utf-8")


def _flat(agent: ACRLPDAgent) -> tuple[dict[str, Array], Any]:
    """Return the agent's arrays by name, and a function that rebuilds the agent from them."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(agent)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]

    def rebuild(weights: Mapping[str, Array]) -> ACRLPDAgent:
        return jax.tree.unflatten(structure, [weights[name] for name in names])

    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), rebuild


def _inputs(interface: Interface, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    spec, state_dim = interface.spec, len(interface.stats["state"].mean)
    assert spec.tokenized_prompt is not None and spec.tokenized_prompt_mask is not None  # noqa: PT018
    shapes = {
        "state": ((state_dim,), jnp.float32),
        "tokenized_prompt": (spec.tokenized_prompt.shape, jnp.int32),
        "tokenized_prompt_mask": (spec.tokenized_prompt_mask.shape, jnp.bool_),
        "seed": ((), jnp.uint32),
    }
    shapes |= {
        f"image/{camera}": (image.shape, jnp.uint8)
        for camera, image in spec.images.items()
        if camera not in interface.unseen
    }
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def _infer(agent: ACRLPDAgent, interface: Interface, inputs: Mapping[str, Array]) -> dict[str, Array]:
    stats, quantiles = interface.stats, interface.quantiles
    raw = inputs["state"] if interface.robot is None else interface.robot.state_map(inputs["state"])
    offset, scale = _affine(stats["state"], quantiles)
    state = (raw - offset[None]) / scale[None]
    missing = interface.spec.state.shape[-1] - state.shape[-1]
    seed = inputs["seed"]
    images, masks = {}, {}
    for camera, image in interface.spec.images.items():
        seen = camera not in interface.unseen
        images[camera] = inputs[f"image/{camera}"] if seen else jnp.zeros((len(seed), *image.shape), jnp.uint8)
        masks[camera] = jnp.full(len(seed), seen)
    observation = Observation(
        state=jnp.pad(state, ((0, 0), (0, missing))),
        images=images,
        image_masks=masks,
        tokenized_prompt=inputs["tokenized_prompt"],
        tokenized_prompt_mask=inputs["tokenized_prompt_mask"],
    )
    chunk, values = choose_chunks(
        agent,
        observation,
        keys_of(jnp.stack([jnp.zeros_like(seed), seed], axis=-1)),
        mode="greedy" if interface.greedy else "bc",
        num_samples=interface.plan.num_samples,
        num_steps=interface.plan.num_steps,
    )
    offset, scale = _affine(stats["actions"], quantiles)
    actions = chunk[..., : len(offset)] * scale[None, None] + offset[None, None]
    if any(interface.delta_mask):
        relative = np.flatnonzero(interface.delta_mask)
        actions = actions.at[..., relative].add(raw[:, None, relative])
    if interface.robot is not None:
        actions = interface.robot.action_map(actions)
    return {"actions": actions} | ({"q": values["q"]} if "q" in values else {})


def _affine(stats: NormStats, quantiles: bool) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Return offset and scale such that (x - offset) / scale normalizes as one of ``data.normalize``'s two formulas."""
    if not quantiles:
        return jnp.float32(stats.mean), jnp.float32(stats.std + EPSILON)
    assert stats.q01 is not None and stats.q99 is not None  # noqa: PT018  # Normalize refuses stats without them
    half = (stats.q99 - stats.q01 + EPSILON) / 2
    return jnp.float32(stats.q01 + half), jnp.float32(half)


# -- a smaller ensemble ------------------------------------------------------------------------------------------------


@jax.jit
def member_td_errors(agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray) -> Float[Array, " e"]:
    """Return each critic's mean absolute error on a batch, against what the whole ensemble learns from."""
    config = agent.config
    noise_rng, subset_rng = jax.random.split(rng)
    newest = {"critic": agent.params["critic"]}  # the errors are those of the critics that are trained
    modules = agent.guided(agent.nets.modules(agent.params | agent.ema | newest, agent.frozen))
    prefix, next_prefix = modules.policy.encode(batch.observations), modules.policy.encode(batch.next_observations)
    if modules.value is not None:
        next_value = modules.value(next_prefix.features, next_prefix.state)
    else:
        shape = (config.candidates_in_target, len(batch.rewards), *agent.nets.action_shape)
        noise = jax.random.normal(noise_rng, shape)
        chosen = candidates.choose(modules, config.in_target, next_prefix, noise, config.steps_in_target)
        next_value = td.slow_value(agent, next_prefix, chosen.chunk, subset_rng)
    target = td.target_values(agent, batch, next_value)
    if modules.long_critic is not None:
        long_q = modules.long_critic(prefix.features, prefix.state, batch.actions[None])[:, 0]
        target = modules.long_critic.aggregate(long_q)
    q = modules.critic(prefix.features, prefix.state, batch.actions[None])[:, 0]
    errors = jnp.abs(q - target[None]) * batch.sequence_mask[None]
    return errors.sum(axis=1) / jnp.maximum(batch.sequence_mask.sum(), 1.0)


def keep_critics(critic: Params, members: np.ndarray) -> Params:
    """Return the parameters of these members of an ensemble; members are stacked along the first axis."""
    return jax.tree.map(functools.partial(jnp.take, indices=jnp.asarray(members), axis=0), critic)
