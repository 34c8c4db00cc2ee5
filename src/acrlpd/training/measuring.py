"""A policy at recorded chunks, in one compiled pass: its own chunks there, its flow loss, and Q."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Key

from acrlpd.agents import candidates, sampling
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig
from acrlpd.data.view.transforms import Compose
from acrlpd.models import flow, stacked
from acrlpd.models.flow import FlowPolicy, Prefix
from acrlpd.types import AnyArray, Observation

FLOW_DRAWS = 4  # of noise and time for each chunk; the same ones in every evaluation


@struct.dataclass
class Measured:
    """The policy's own chunks, flow loss and Q at b recorded chunks."""

    sample: AnyArray  # [b h a] one plain sample, normalized; pi0-FAST: its tokens
    best: Float[AnyArray, "b h a"] | None = None  # the best of N by the critics; None: there are none
    flow_loss: Float[AnyArray, " b"] | None = None  # mean over draws and real steps; None: the policy is no flow
    q: Float[AnyArray, " b"] | None = None  # aggregated Q of the recorded chunk; None: there are no critics


# observations, normalized recorded actions [b h a], valid [b h], a key for each chunk
Measure = Callable[[Observation, AnyArray, AnyArray, Key[Array, " b"]], Measured]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A policy whose actions are compared with recorded ones."""

    measure: Measure
    transform: Compose  # from recorded rows to the model, and back
    horizon: int  # steps of a chunk
    executed: int  # steps of it that are executed
    num_samples: int = 1  # candidates of the best of N; 1: nothing chooses
    has_critics: bool = False
    reads_images: bool = True
    reads_actions: bool = True  # whether ``measure`` needs normalized actions, for the flow loss and Q


def subject_of_agent(
    agent: ACRLPDAgent, transform: Compose, config: TrainConfig, *, executed: int | None = None
) -> Subject:
    """Return an agent of ours, with its critics, as something to evaluate."""
    acting = dataclasses.replace(agent, opt_state={})  # measuring does not need it, and it may be large
    return Subject(
        functools.partial(_measure_agent, acting),
        transform,
        config.policy.action_horizon,
        executed or config.executed_steps,
        num_samples=config.agent.best_of_n_samples if agent.chooses else 1,
        has_critics=config.agent.algorithm != "bc",
        reads_images=config.policy.traits.has_backbone,
    )


def subject_of_flow(policy: FlowPolicy, transform: Compose, *, num_steps: int, executed: int) -> Subject:
    """Return a flow policy alone as something to evaluate, such as openpi's."""
    graphdef, state = nnx.split(stacked.unrolled(policy))

    @jax.jit
    def measure(state: nnx.State, seen: Observation, actions: Array, valid: Array, keys: Array) -> Measured:
        policy = nnx.merge(graphdef, state)
        prefix = flow.encode(policy, seen)
        sample_rng, loss_rng = jax.vmap(jax.random.split, out_axes=1)(keys)
        shape = (policy.action_horizon, policy.action_dim)
        noise = sampling.draw(jax.random.normal, sample_rng, 1, len(valid), shape)
        sample = flow.sample(policy, prefix, noise, num_steps=num_steps)[0]
        return Measured(sample, flow_loss=_flow_loss(policy, prefix, actions, valid, loss_rng))

    return Subject(functools.partial(measure, state), transform, policy.action_horizon, executed)


@jax.jit
def _measure_agent(
    agent: ACRLPDAgent, seen: Observation, actions: Array, valid: Array, keys: Key[Array, " b"]
) -> Measured:
    config, modules = agent.config, agent.acting_modules()
    prefix = flow.encode(modules.policy, seen)
    sample_rng, loss_rng = jax.vmap(jax.random.split, out_axes=1)(keys)
    n = config.best_of_n_samples if agent.chooses else 1
    noise = sampling.draw(jax.random.normal, sample_rng, n, len(valid), agent.nets.action_shape)
    found: dict[str, Any] = {"sample": candidates.unchosen(modules, config, prefix, noise[:1], config.flow_steps)}
    if agent.chooses:
        found["best"] = candidates.choose(modules, config, prefix, noise, config.flow_steps).chunk
    if config.algorithm != "bc":
        members = modules.critic(prefix.features, prefix.state, actions[None])
        found["q"] = modules.critic.aggregate(members)[0]
    if config.algorithm != "rlpd_ac":
        found["flow_loss"] = _flow_loss(modules.policy, prefix, actions, valid, loss_rng)
    return Measured(**found)


def _flow_loss(
    policy: FlowPolicy, prefix: Prefix, actions: Float[Array, "b h a"], valid: Float[Array, "b h"], rng: Any
) -> Float[Array, " b"]:
    """Return the flow loss of each chunk: the mean over ``FLOW_DRAWS`` and over the real steps."""
    noise_rng, time_rng = jax.vmap(jax.random.split, out_axes=1)(rng)
    noise = sampling.draw(jax.random.normal, noise_rng, FLOW_DRAWS, len(valid), actions.shape[1:])
    time = sampling.draw(flow.sample_time, time_rng, FLOW_DRAWS, len(valid))
    losses = jax.lax.map(lambda drawn: flow.flow_loss(policy, prefix, actions, *drawn), (noise, time))  # [n b h]
    return jnp.average(losses.mean(axis=0), axis=1, weights=jnp.maximum(valid, 1e-9))
