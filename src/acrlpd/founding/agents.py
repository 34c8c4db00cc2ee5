"""The founding design's names for the parts of the agent. Each calls the function of this package that does the work.

Where the design changes an object in place, these return a new one. Where it passes model, critics and encoder
separately, these take the agent that holds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, PRNGKeyArray

from acrlpd.agents import losses
from acrlpd.agents.agent import ACRLPDAgent, loss_and_metrics
from acrlpd.agents.losses import LossWeights
from acrlpd.models import flow
from acrlpd.models.critic import CriticConfig, CriticNetworks
from acrlpd.models.flow import FlowPolicy
from acrlpd.types import ChunkBatch, Metrics, Observation

DEFAULT_LOSS_WEIGHTS = LossWeights(critic_weight=1.0, actor_weight=1.0, bc_weight=0.01, alpha_weight=1.0)


@struct.dataclass
class TrainState:
    """The part of an agent that training changes, without frozen parameters. Without EMA, ``ema_params`` is empty."""

    step: Array
    params: Any
    opt_state: Any
    target_params: Any
    ema_params: Any
    health: Any
    q_scale: Array


@struct.dataclass
class ACRLPDPi0Agent(ACRLPDAgent):
    """``ACRLPDAgent`` with the founding design's methods."""

    def train_step(self, batch: ChunkBatch, rng: PRNGKeyArray) -> tuple[ACRLPDPi0Agent, Metrics]:
        return self.update(batch, rng)  # type: ignore[return-value]  # an update keeps the class

    def create_train_state(self) -> TrainState:
        return TrainState(
            self.step, self.params, self.opt_state, self.target_critic, self.ema, self.health, self.q_scale
        )

    def update_from_train_state(self, state: TrainState) -> ACRLPDPi0Agent:
        """Return this agent with ``state``; its frozen parameters and its configuration stay."""
        return dataclasses.replace(
            self,
            step=state.step,
            params=state.params,
            opt_state=state.opt_state,
            target_critic=state.target_params,
            ema=state.ema_params,
            health=state.health,
            q_scale=state.q_scale,
        )


@dataclasses.dataclass(frozen=True)
class JointLossComputer:
    """The weighted sum of all loss terms of one update. Calling it does not change the agent."""

    loss_weights: LossWeights = DEFAULT_LOSS_WEIGHTS

    def __call__(self, agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        return loss_and_metrics(agent, batch, rng, self.loss_weights)


class CriticLossComputer:
    """The critic's loss term alone, with all metrics of the update."""

    TERM = "critic_loss"

    def __call__(self, agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        _, metrics = loss_and_metrics(agent, batch, rng, agent.config.loss_weights)
        return metrics[self.TERM], metrics


class BCLossComputer(CriticLossComputer):
    """The imitation loss term alone, with all metrics of the update."""

    TERM = "bc_loss"


class TemperatureModule(nnx.Module):
    """The temperature alpha, stored as its logarithm so that it is always positive."""

    def __init__(self, initial_temp: float = 1.0, rngs: nnx.Rngs | None = None):
        self.log_alpha = nnx.Param(jnp.log(jnp.float32(initial_temp)))

    def __call__(self) -> Float[Array, ""]:
        return jnp.exp(self.log_alpha[...])

    def alpha_loss(self, entropy: Float[Array, " b"], target_entropy: float) -> Float[Array, ""]:
        return losses.temperature_loss(self.log_alpha[...], entropy, target_entropy=target_entropy)


@dataclasses.dataclass(frozen=True)
class EntropyEstimator:
    """An estimator of a policy's entropy at each observation, from the spread of ``num_samples`` chunks.
    (An update draws no extra samples for this: it uses the candidates that it has drawn anyway.)"""

    num_samples: int = 8
    num_steps: int = 5

    def estimate_entropy(self, policy: FlowPolicy, observations: Observation, rng: PRNGKeyArray) -> Float[Array, " b"]:
        prefix = policy.encode(observations)
        shape = (self.num_samples, prefix.state.shape[0], policy.action_horizon, policy.action_dim)
        chunks = flow.sample(policy, prefix, jax.random.normal(rng, shape), num_steps=self.num_steps)
        return losses.gaussian_entropy(chunks)


class SingleCriticNetwork(CriticNetworks):
    """One critic on flat vectors: Q of an encoded observation and a flattened chunk."""

    def __init__(self, config: CriticConfig, observation_dim: int, action_dim: int, rngs: nnx.Rngs):
        alone = dataclasses.replace(config, num_critics=1, q_aggregation="mean", use_pi0_features=False)
        sizes = {"feature_dim": 0, "state_dim": observation_dim, "horizon": 1, "action_dim": action_dim}
        super().__init__(alone, **sizes, rngs=rngs)

    def __call__(  # type: ignore[override]  # flat vectors in, one value a row out
        self, observation: Float[Array, "b o"], action: Float[Array, "b d"], *, dropout_rng: PRNGKeyArray | None = None
    ) -> Float[Array, " b"]:
        nothing = jnp.zeros((observation.shape[0], 0))
        return super().__call__(nothing, observation, action[None, :, None, :], dropout_rng=dropout_rng)[0, 0]


def create_observation_encoder(
    pi0_model: FlowPolicy, config: CriticConfig
) -> Callable[[Observation], Float[Array, "b o"]]:
    """Return a function from an observation to the critic's input: pooled prefix tokens and state, or the state alone.

    ``add`` and ``mlp`` combine the two by learned layers, which belong to the critic (``CriticNetworks``).
    """

    def encode_observation(observation: Observation) -> Float[Array, "b o"]:
        if not config.use_pi0_features:
            return observation.state
        prefix = pi0_model.encode(observation)
        return jnp.concatenate([prefix.features, prefix.state], axis=-1)

    return encode_observation


def soft_update_target_networks(agent: ACRLPDAgent, tau: float | None = None) -> ACRLPDAgent:
    """Return the agent after one more Polyak averaging step; an update already contains one."""
    rate = agent.config.target_update_tau if tau is None else tau
    moved = optax.incremental_update(agent.params["critic"], agent.target_critic, rate)
    return dataclasses.replace(agent, target_critic=moved)
