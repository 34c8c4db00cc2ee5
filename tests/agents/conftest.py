"""Toy agents and batches, small enough to compute everything again by brute force."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from acrlpd.agents import agent as agent_module
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.config import AgentConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.models.mlp_flow import MLPFlow, MLPFlowConfig
from acrlpd.types import ChunkBatch, Observation

sys.path.insert(0, str(Path(__file__).parent))  # where test_acrlpd finds numpy_reference

HORIZON, STATE_DIM, ACTION_DIM = 3, 4, 2

# terminals, valid, bootstrap_mask, sequence_mask, number of steps inside the episode
ROWS = {
    "whole": ([0, 0, 0], [1, 1, 1], 1, 1, 3),
    "time_limit": ([0, 0, 0], [1, 1, 0], 1, 0, 2),
    "terminal_inside": ([0, 1, 0], [1, 1, 0], 0, 1, 3),  # relabelled play data: the episode goes on
    "terminal_last": ([0, 0, 1], [1, 1, 1], 0, 1, 3),
    "padded": ([1, 0, 0], [1, 0, 0], 0, 1, 1),
}


@dataclasses.dataclass(frozen=True)
class Toys:
    """Makes what the tests of this folder need. Every parameter is random, also where a fresh one is zero."""

    jit: Callable[..., Any]

    def key(self, seed: int) -> jax.Array:
        """A key of the generator that compiles fastest."""
        return jax.random.key(seed, impl="rbg")

    def config(self, **changes: Any) -> AgentConfig:
        critic = {"num_critics": 3, "hidden_dims": (8,), **changes.pop("critic", {})}
        fields = {"best_of_n_samples": 4, "flow_steps": 3, "target_update_tau": 0.1, "discount": 0.9}
        fields |= {"act_by_target_critic": False, **changes}  # the critics of the update choose, unless asked otherwise
        return AgentConfig(critic=CriticConfig(**critic), **fields)

    def policy(self, action_dim: int = ACTION_DIM, kind: type[MLPFlow] = MLPFlow) -> MLPFlow:
        return kind(MLPFlowConfig(STATE_DIM, action_dim, HORIZON, (8,)), nnx.Rngs(params=self.key(0)))

    def agent(
        self,
        config: AgentConfig | None = None,
        *,
        policy: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        state_dim: int = STATE_DIM,
        **options: Any,
    ) -> ACRLPDAgent:
        optimizer = optax.adam(1e-2) if optimizer is None else optimizer
        agent = ACRLPDAgent.create(
            self.config() if config is None else config,
            self.policy() if policy is None else policy,
            dict.fromkeys(("policy", "critic", "temperature"), optimizer),
            state_dim=state_dim,
            rng=self.key(0),
            **options,
        )
        rng = np.random.default_rng(0)

        def disturb(x):
            return x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)

        return dataclasses.replace(
            agent,
            params=jax.tree.map(disturb, agent.params),
            target_critic=jax.tree.map(disturb, agent.target_critic),
        )

    def batch(self, *rows: str, action_dim: int = ACTION_DIM, seed: int = 0) -> ChunkBatch:
        """Six chunks of the named kinds in turn; all kinds unless one is named."""
        names = [(rows or tuple(ROWS))[i % len(rows or ROWS)] for i in range(6)]
        terminals, valid, bootstrap, sequence, length = (
            np.array(column, np.float32) for column in zip(*(ROWS[name] for name in names), strict=True)
        )
        rng = np.random.default_rng(seed)
        step = np.arange(HORIZON)[None, :]
        actions = rng.uniform(-1, 1, (6, HORIZON, action_dim)).astype(np.float32)
        read = np.minimum(step, length[:, None].astype(int) - 1)
        actions = np.take_along_axis(actions, read[:, :, None], axis=1)
        actions[..., ACTION_DIM:] = 0
        rewards = rng.normal(size=(6, HORIZON)).astype(np.float32) * (step < length[:, None])
        state, next_state = rng.normal(size=(2, 6, STATE_DIM)).astype(np.float32)
        batch = ChunkBatch(
            observations=Observation(state=state),
            next_observations=Observation(state=next_state),
            actions=actions,
            rewards=rewards,
            terminals=terminals,
            valid=valid,
            bootstrap_mask=bootstrap,
            sequence_mask=sequence,
            episode_id=np.arange(6),
            step_id=np.zeros(6, int),
        )
        return jax.tree.map(jnp.asarray, batch)

    @functools.cached_property
    def update(self) -> Callable[..., Any]:
        """The agent's update, compiled quickly and without donation, so that an agent may be used again."""
        return self.jit(agent_module._update.__wrapped__)


@pytest.fixture(scope="session")
def toys() -> Toys:
    return Toys(functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Leaves in float64 by their path, as "out/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return "/".join(key for key in keys if key != "value")


@pytest.fixture(scope="session", name="flat")
def flat_fixture() -> Callable[[Any], dict[str, np.ndarray]]:
    return flat
