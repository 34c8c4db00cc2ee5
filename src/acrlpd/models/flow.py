"""Flow matching over action chunks: the interface of a policy, its loss and its sampler.

Time runs from 1 (noise) to 0 (data), as in openpi; the pi0 paper, QC and FQL run the other way. This file is the only
place that knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from acrlpd.types import AnyArray, Observation, typed

MIN_TIME = 0.001  # openpi's floor: the loss is never taken at pure data


@struct.dataclass
class Prefix:
    """A policy's encoding of an observation, computed once and read by the loss, every candidate and the critic."""

    state: Float[Array, "b s"]
    features: Float[Array, "b f"]  # pooled prefix tokens, for the critic
    mask: Bool[Array, "b p"]  # which prefix tokens may be attended to
    cache: Any  # input of the denoising steps; pi0: keys (rotated) and values, each [layers b p heads d]


@runtime_checkable
class FlowPolicy(Protocol):
    """A velocity field over action chunks, given an observation. pi0, pi0.5 and the flow MLP implement it."""

    action_dim: int
    action_horizon: int
    feature_dim: int  # width of Prefix.features
    cache_batch_axis: int  # position of the batch axis in the arrays of Prefix.cache

    def encode(self, observation: Observation) -> Prefix:
        """Run one pass over images, prompt and everything else that does not change while an action is denoised."""
        ...

    def velocity(
        self, prefix: Prefix, x_t: Float[Array, "n b h a"], time: Float[Array, "n b"]
    ) -> Float[Array, "n b h a"]:
        """Return the velocity at ``x_t``; all n candidates read the same prefix."""
        ...

    @staticmethod
    def is_suffix_param(path: str) -> bool:
        """Return whether only ``velocity`` reads the parameter at ``path`` (joined by '/'), and not ``encode``."""
        ...


def encode(policy: FlowPolicy, observation: Observation) -> Prefix:
    """Encode the observation, or reuse the prefix that is stored in it."""
    if observation.prefix is None:
        return policy.encode(observation)
    features, mask, cache = observation.prefix
    cache = jax.tree.map(lambda x: jnp.moveaxis(x, 0, policy.cache_batch_axis), cache)
    return Prefix(state=observation.state, features=features, mask=mask, cache=cache)


def portable(policy: FlowPolicy, prefix: Prefix) -> tuple[Any, Any, Any]:
    """Return a prefix in the form that an observation stores: without the state, the batch as first axis of all."""
    cache = jax.tree.map(lambda x: jnp.moveaxis(x, policy.cache_batch_axis, 0), prefix.cache)
    return prefix.features, prefix.mask, cache


def sample_time(rng: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draw times from Beta(1.5, 1), rescaled to [0.001, 1]: more weight on noisy times (pi0, appendix B)."""
    return jax.random.beta(rng, 1.5, 1.0, shape) * (1 - MIN_TIME) + MIN_TIME


@typed
def flow_loss(
    policy: FlowPolicy,
    prefix: Prefix,
    actions: Float[Array, "b h a"],
    noise: Float[Array, "b h a"],
    time: Float[Array, " b"],
) -> Float[Array, "b h"]:
    """Return the squared error of the velocity, mean over action dimensions (pi0, equation 1), without any mask."""
    t = time[:, None, None]
    x_t = t * noise + (1 - t) * actions
    v_t = policy.velocity(prefix, x_t[None], time[None])[0]
    return jnp.mean(jnp.square(v_t - (noise - actions)), axis=-1)


@typed
def sample(
    policy: FlowPolicy,
    prefix: Prefix,
    noise: Float[Array, "n b h a"],
    *,
    num_steps: int | Int[Array, ""],
    remat: bool = False,
) -> Float[Array, "n b h a"]:
    """Integrate with explicit Euler from noise (time 1) to actions (time 0) in ``num_steps`` equal steps.

    If ``num_steps`` is an array, one compilation serves all numbers of steps, but there is no backward pass.
    ``remat`` recomputes each step in the backward pass instead of keeping its activations.
    """
    dt = -1.0 / num_steps

    def step(_, carry):
        x_t, time = carry
        v_t = policy.velocity(prefix, x_t, jnp.full(x_t.shape[:2], time, jnp.float32))
        return x_t + dt * v_t, time + dt

    if remat:
        step = jax.checkpoint(step)
    return jax.lax.fori_loop(0, num_steps, step, (noise, jnp.float32(1.0)))[0]


@dataclasses.dataclass(frozen=True)
class Climb:
    """A value that samples climb while they are denoised (QGF, arXiv:2606.11087)."""

    gradient: Callable[[Float[Array, "n b h a"]], Float[Array, "n b h a"]]  # of the value, by the clean chunk
    weights: Float[AnyArray, "#n #b"]  # how strongly each candidate follows it; 0: not at all
    clip: float | None = None  # clean chunks are clipped to +- this before the gradient is taken


def guided_velocity(
    v_t: Float[Array, "n b h a"], x_t: Float[Array, "n b h a"], time: Float[Array, "n b"], climb: Climb
) -> Float[Array, "n b h a"]:
    """Return ``v_t - weights * g``: a step with this velocity moves the chunk towards higher values, too.

    g is the gradient of the value at the clean chunk that a single jump reaches, ``x_t - time * v_t``. It is not the
    gradient with respect to ``x_t``: the Jacobian of the jump is left out on purpose, which QGF's authors found better.
    Nothing is differentiated through g.
    """
    clean = jax.lax.stop_gradient(x_t - time[:, :, None, None] * v_t)
    if climb.clip is not None:
        clean = jnp.clip(clean, -climb.clip, climb.clip)
    return v_t - climb.weights[:, :, None, None] * jax.lax.stop_gradient(climb.gradient(clean))


MAX_GUIDANCE_WEIGHT = 5.0  # beta of real-time chunking (its paper, section IV): with few steps, more is unstable


@struct.dataclass
class Guidance:
    """The chunk in execution, which the next chunk must continue (real-time chunking, arXiv:2506.07339)."""

    actions: Float[AnyArray, "b h a"]  # its steps from the new observation on; arbitrary where weights are 0
    weights: Float[AnyArray, "b h"]  # how much the new chunk must agree: ``prefix_weights``, or 0 for no guidance


@typed
def prefix_weights(frozen: int, overlap: int, horizon: int) -> Float[np.ndarray, " h"]:
    """Return weights: 1 for steps executed before the new chunk is ready, then decaying, and 0 after the old chunk.

    ``prefix_weights(2, 6, 8)`` is 1 1 w(4/5) w(3/5) w(2/5) w(1/5) 0 0 with w(c) = c (e^c - 1) / (e - 1): equation 5
    of the paper.
    """
    frozen = min(frozen, overlap)
    steps = np.arange(horizon)
    linear = np.clip((frozen - 1 - steps) / (overlap - frozen + 1) + 1, 0, 1)
    return np.where(steps < overlap, linear * np.expm1(linear) / np.expm1(1.0), 0).astype(np.float32)


class Guided:
    """A policy whose every step is guided: up the gradient of a value, towards a chunk that continues another, or both.

    Climbing changes the policy's velocity (``guided_velocity``), and continuing the velocity that results. Continuing
    follows equations 2 to 4 of real-time chunking's paper: its guidance is the error of the denoised estimate,
    backpropagated through the network as a vector-Jacobian product, so a step costs one additional backward pass.
    """

    def __init__(self, policy: FlowPolicy, guidance: Guidance | None = None, climb: Climb | None = None):
        self.policy = policy
        self.guidance = guidance
        self.climb = climb
        self.action_dim = policy.action_dim
        self.action_horizon = policy.action_horizon
        self.feature_dim = policy.feature_dim
        self.cache_batch_axis = policy.cache_batch_axis
        self.is_suffix_param = policy.is_suffix_param

    def encode(self, observation: Observation) -> Prefix:
        return self.policy.encode(observation)

    def velocity(
        self, prefix: Prefix, x_t: Float[Array, "n b h a"], time: Float[Array, "n b"]
    ) -> Float[Array, "n b h a"]:
        def climbing_velocity(x_t):
            v_t = self.policy.velocity(prefix, x_t, time)
            if self.climb is None:
                return v_t
            climbing = guided_velocity(v_t, x_t, time, self.climb)
            if self.guidance is None:
                return climbing
            free = 1 - self.guidance.weights[None, :, :, None]  # what must be as in the old chunk does not climb
            return v_t + free * (climbing - v_t)

        if self.guidance is None:
            return climbing_velocity(x_t)
        return continuing(climbing_velocity, x_t, time, self.guidance)


def continuing(
    velocity: Callable[[Float[Array, "n b h a"]], Float[Array, "n b h a"]],
    x_t: Float[Array, "n b h a"],
    time: Float[Array, "n b"],
    guidance: Guidance,
) -> Float[Array, "n b h a"]:
    """Return the velocity at ``x_t``, guided so that the chunk continues the one in ``guidance``."""
    t = time[:, :, None, None]

    def denoise(x_t):
        v_t = velocity(x_t)
        return x_t - t * v_t, v_t

    denoised, pull_back, v_t = jax.vjp(denoise, x_t, has_aux=True)
    error = (guidance.actions[None] - denoised) * guidance.weights[None, :, :, None]
    (pull,) = pull_back(error)
    # The paper's (1 - tau) / (tau r^2) with tau = 1 - t. It is infinite at pure noise, hence the maximum.
    weight = jnp.minimum((jnp.square(1 - t) + jnp.square(t)) / (t * (1 - t)), MAX_GUIDANCE_WEIGHT)
    return v_t - weight * pull


def climbing(policy: FlowPolicy, climb: Climb) -> FlowPolicy:
    """Return the policy with samples that climb a value; one that continues a chunk goes on doing so."""
    if isinstance(policy, Guided):
        return cast(FlowPolicy, Guided(policy.policy, policy.guidance, climb))
    return cast(FlowPolicy, Guided(policy, climb=climb))
