"""One policy call: an observation in the robot's words to a chunk of actions in its units, as openpi answers it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.agents.acrlpd import ACRLPDAgent, ActingMode
from acrlpd.data.transforms import Data, Transform, to_observation
from acrlpd.models import flow
from acrlpd.models.flow import FlowPolicy
from acrlpd.types import Observation


class Sampler(Protocol):
    """What draws chunks: a flow policy alone, or an agent that chooses among them."""

    def __call__(
        self, observation: Observation, rng: PRNGKeyArray, noise: Float[np.ndarray, "b h a"] | None
    ) -> Float[Array, "b h a"]:
        """Normalized chunks; ``noise`` is where a flow starts, None draws it from the key."""
        ...


class FlowSampler:
    """One chunk of a flow policy, in openpi's draws for a key. Compiled once for each shape of observation."""

    def __init__(self, policy: FlowPolicy, *, num_steps: int = 10):
        self._shape = (policy.action_horizon, policy.action_dim)
        graphdef, self._state = nnx.split(policy)

        def sample(state: nnx.State, observation: Observation, noise: Float[Array, "b h a"]) -> Float[Array, "b h a"]:
            policy = nnx.merge(graphdef, state)
            return flow.sample(policy, policy.encode(observation), noise[None], num_steps=num_steps)[0]

        self._sample = jax.jit(sample)

    def __call__(
        self, observation: Observation, rng: PRNGKeyArray, noise: Float[np.ndarray, "b h a"] | None
    ) -> Float[Array, "b h a"]:
        shape = (len(observation.state), *self._shape)
        start = jax.random.normal(rng, shape) if noise is None else jnp.asarray(noise, jnp.float32)
        if start.shape != shape:
            raise ValueError(f"noise must have the shape {shape} of the model's chunks, got {start.shape}")
        return self._sample(self._state, observation, start)


class AgentSampler:
    """The chunk that an agent chooses; ``mode`` as in ``ACRLPDAgent.sample_actions``."""

    def __init__(self, agent: ACRLPDAgent, *, mode: ActingMode = "greedy"):
        self._agent = agent
        self._mode = mode

    def __call__(
        self, observation: Observation, rng: PRNGKeyArray, noise: Float[np.ndarray, "b h a"] | None
    ) -> Float[Array, "b h a"]:
        if noise is not None:
            raise ValueError("an agent draws many chunks and takes no noise of one; serve its flow alone for that")
        return self._agent.sample_actions(observation, rng, mode=self._mode)


class Policy:
    """A sampler behind one list of transforms.

    Args:
        sampler: a ``FlowPolicy`` stands for a ``FlowSampler`` of ten steps.
        transform: from the robot's observation to the model's, and its inverse for the answer.
        rng: openpi's default is key 0; it is split once a call, and the second half draws.
        metadata: what a server tells each client that connects.
    """

    def __init__(
        self,
        sampler: Sampler | FlowPolicy,
        transform: Transform,
        *,
        rng: PRNGKeyArray | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self._sampler: Sampler = FlowSampler(sampler) if isinstance(sampler, FlowPolicy) else sampler
        self._transform = transform
        self._rng = jax.random.key(0) if rng is None else rng
        self.metadata = dict(metadata or {})

    def infer(self, obs: Data, *, noise: Float[np.ndarray, "*b h a"] | None = None) -> Data:
        """The answer to one observation, which has no batch axis; ``noise`` may have one of 1.

        ``actions`` [h a] in the robot's units; ``state`` unless the robot's transform drops it, as openpi's three do;
        ``policy_timing`` with ``infer_ms``, the time of the model alone.
        """
        self._rng, sample_rng = jax.random.split(self._rng)
        observation = jax.tree.map(lambda x: x[None], to_observation(self._transform(dict(obs))))
        if noise is not None and noise.ndim == 2:
            noise = noise[None]
        start = time.monotonic()
        actions = np.asarray(self._sampler(observation, sample_rng, noise))[0]
        infer_ms = (time.monotonic() - start) * 1000
        answer = self._transform.inverse({"state": observation.state[0], "actions": actions})
        return answer | {"policy_timing": {"infer_ms": infer_ms}}
