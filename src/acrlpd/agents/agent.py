"""The agent of every algorithm: its creation, its updates, and the choice of its actions.

An update is one jitted function that consumes the old agent. The losses are in ``acrlpd.py`` and in the baselines.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Key, PRNGKeyArray

from acrlpd.agents import acrlpd, candidates, flow_bc, losses, rlpd_ac, sampling
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.draws import Draws, deal
from acrlpd.agents.extraction import Modules
from acrlpd.agents.health import Health, judge, keep_if
from acrlpd.agents.losses import LossWeights
from acrlpd.agents.state import CRITIC_GROUPS, AgentState, Networks
from acrlpd.models import flow, parameters
from acrlpd.models.critic import CriticNetworks, ValueNetwork
from acrlpd.models.flow import FlowPolicy, Guidance
from acrlpd.models.parameters import Params
from acrlpd.types import ChunkBatch, Metrics, Observation

ActingMode = Literal["greedy", "explore", "bc"]
_HELD = optax.set_to_zero()  # one object, so that networks with it can be equal


@struct.dataclass
class ACRLPDAgent(AgentState):
    """An agent as one immutable pytree: policy, critics, temperature and the states of their optimisers."""

    @classmethod
    def create(
        cls,
        config: AgentConfig,
        policy: FlowPolicy,
        optimizers: Mapping[str, optax.GradientTransformation],
        *,
        state_dim: int,
        rng: PRNGKeyArray,
        action_dim: int | None = None,
        trainable: Callable[[str], bool] = lambda path: True,
    ) -> ACRLPDAgent:
        """Create a fresh agent that takes over the arrays of ``policy``; the first update donates their memory.

        ``optimizers`` has one entry per group: policy, critic, temperature. A student uses the policy's, V and the long
        critics the critic's, each with a state of its own.
        ``action_dim`` is the robot's, if the policy's is wider (openpi pads to 32). Without ``config.critic.horizon``,
        critics judge whole chunks.
        ``trainable`` gets the path of a policy parameter, joined by '/', and returns whether it may change.
        """

        policy_def, policy_params = parameters.split(cast(nnx.Module, policy))
        policy_params, frozen = parameters.divide(policy_params, trainable)
        action_dim = policy.action_dim if action_dim is None else action_dim
        critic_horizon, backup_horizon = config.horizons(policy.action_horizon)
        sizes = {"feature_dim": policy.feature_dim, "state_dim": state_dim}
        rngs = nnx.Rngs(params=rng)
        critics = functools.partial(CriticNetworks, config.critic, **sizes, action_dim=action_dim, rngs=rngs)
        critic_def, critic_params = parameters.split(critics(horizon=critic_horizon))
        params: dict[str, Params] = {
            "policy": policy_params,
            "critic": critic_params,
            "temperature": {"log_temperature": jnp.log(jnp.float32(config.temperature.initial_temp))},
        }
        optimizers = dict(optimizers)
        if not config.temperature.adaptive:
            optimizers["temperature"] = _HELD  # neither gradients nor weight decay change it
        if config.extraction == "distill":
            suffix, _ = parameters.divide(policy_params, policy.is_suffix_param)  # frozen parts are shared
            params["student"] = jax.tree.map(jnp.copy, suffix)  # starts as one Euler step of the flow
            optimizers["student"] = optimizers["policy"]
        value_def = None
        if config.target == "implicit":
            value_def, params["value"] = parameters.split(ValueNetwork(config.critic, **sizes, rngs=rngs))
            optimizers["value"] = optimizers["critic"]
        long_critic_def = None
        if config.critic.backup_horizon is not None:
            long_critic_def, params["long_critic"] = parameters.split(critics(horizon=backup_horizon))
            optimizers["long_critic"] = optimizers["critic"]
        action_shape = (policy.action_horizon, policy.action_dim)
        nets = Networks(
            *(config, policy_def, critic_def, optimizers, action_shape, action_dim, critic_horizon, backup_horizon),
            value_def=value_def,
            long_critic_def=long_critic_def,
        )
        return cls(
            params=params,
            frozen=frozen,
            target_critic=jax.tree.map(jnp.copy, critic_params),
            opt_state={group: optimizers[group].init(params[group]) for group in params},
            ema={} if config.policy_ema_decay is None else jax.tree.map(jnp.copy, _acting(params)),
            health=Health.create(("loss", *optimizers)),
            step=jnp.zeros((), jnp.int32),
            q_scale=jnp.zeros(()),
            nets=nets,
        )

    @property
    def temperature(self) -> Float[Array, ""]:
        return jnp.exp(self.params["temperature"]["log_temperature"])

    @property
    def chooses(self) -> bool:
        """Return whether the agent acts by choosing among candidates; bc and rlpd_ac use the policy's own sample."""
        return self.config.algorithm == "acrlpd"

    @property
    def acting_policy(self) -> Params:
        """All parameters of the policy that acts, trainable and frozen, under openpi's names."""
        return parameters.join((self.params | self.ema)["policy"], self.frozen)

    @property
    def acting_critic(self) -> Params:
        """The critics that choose while acting."""
        if "critic" in self.ema:
            return self.ema["critic"]
        averaged = self.config.act_by_target_critic and self.config.policy_ema_decay is None and self.target_critic
        return self.target_critic if averaged else self.params["critic"]

    def acting_modules(self) -> Modules:
        """Return the networks that act: the moving averages of policy and critics, if there are any."""
        return self.guided(self.nets.modules(self.params | self.ema | {"critic": self.acting_critic}, self.frozen))

    def acting_only(self) -> ACRLPDAgent:
        """Return an equivalent agent for acting: no training state; separate layers if the policy unrolls them.

        It keeps the critics that rank candidates and, under ``guided``, the target critics.
        """
        modules = self.acting_modules()
        policy_def, policy = parameters.split(cast(nnx.Module, modules.policy))
        params = self.params | {"policy": policy, "critic": self.acting_critic}
        for group in ("value", "long_critic"):  # asked in training alone
            params.pop(group, None)
        if modules.student is not None:
            params["student"] = parameters.split(cast(nnx.Module, modules.student))[1]
        nets = dataclasses.replace(self.nets, policy_def=policy_def)
        guiding = {} if modules.guide is None else self.target_critic
        idle: dict[str, Any] = {"frozen": {}, "ema": {}, "opt_state": {}}
        return dataclasses.replace(self, params=params, target_critic=guiding, nets=nets, **idle)

    def with_extraction(
        self, name: str | None = None, guidance_weights: tuple[float, ...] | None = None
    ) -> ACRLPDAgent:
        """Return the agent with another extraction, or with other guidance weights; None: as they are.

        Naming a stored agent's own permits running that code.

        Raises:
            ValueError: guidance is asked for, and the size of Q, which scales it, was never measured.
        """
        config = self.config.with_extraction(name, guidance_weights)
        asked = name is not None or guidance_weights is not None
        guides = config.extraction == "guided" and any(config.guidance_weights) and self.chooses
        if asked and guides and not self.q_scale > 0:
            raise ValueError(
                "extraction 'guided' divides by the running mean of |Q|, which this checkpoint does not have: it was "
                "saved before the first update, or by an earlier version. Resume its run for some updates"
            )
        return dataclasses.replace(self, nets=dataclasses.replace(self.nets, config=config))

    def update(
        self, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights | None = None
    ) -> tuple[ACRLPDAgent, Metrics]:
        """Make a gradient step of every group and the target update, in one compiled call that consumes this agent."""
        return _update(self, batch, rng, self.config.loss_weights if weights is None else weights)

    def update_critic(self, batch: ChunkBatch, rng: PRNGKeyArray) -> tuple[ACRLPDAgent, Metrics]:
        """Update only the critics, with V and the long critics if there are any, without sampling the policy.

        Without V, their target is at the data's own ``next_actions``.
        """
        return _update_critic(self, batch, rng)

    def updates(self, batches: ChunkBatch, rngs: PRNGKeyArray, weights: LossWeights) -> tuple[ACRLPDAgent, Metrics]:
        """Make one ``update`` per entry of the arguments' leading axis in one call; metrics get the same axis."""
        return _updates(self, batches, rngs, weights)

    def sample_actions(
        self,
        observations: Observation,
        rng: PRNGKeyArray,
        *,
        mode: ActingMode = "greedy",
        num_samples: int | None = None,
        num_steps: int | None = None,
    ) -> Float[Array, "b h a"]:
        """Return normalized chunks for a batch of observations.

        ``greedy``: the best of N by the critic. ``explore``: one of N, drawn at the learned temperature. ``bc``: one
        sample of the flow, without the critic.
        """
        return choose_chunks(self, observations, rng, mode=mode, num_samples=num_samples, num_steps=num_steps)[0]


def _acting(params: dict[str, Params]) -> dict[str, Params]:
    """Return the groups of parameters that act: those that generate chunks, and the critics that choose among them."""
    return {group: params[group] for group in ("policy", "student", "critic") if group in params}


@functools.partial(jax.jit, donate_argnums=0)
def _update(
    agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights
) -> tuple[ACRLPDAgent, Metrics]:
    return _apply(agent, batch, *_gradients(agent, batch, rng, weights))


@functools.partial(jax.jit, donate_argnums=0)
def _update_critic(agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray) -> tuple[ACRLPDAgent, Metrics]:
    gradient = jax.grad(acrlpd.critic_alone_loss, has_aux=True)
    trained = {group: agent.params[group] for group in CRITIC_GROUPS if group in agent.params}
    return _apply(agent, batch, *gradient(trained, agent, batch, _draw(agent, batch, rng)))


def _apply(
    agent: ACRLPDAgent, batch: ChunkBatch, grads: dict[str, Params], metrics: dict[str, Array]
) -> tuple[ACRLPDAgent, Metrics]:
    """Step every group that has gradients, then the target critics; skip the update if loss or gradients are bad."""
    config, nets = agent.config, agent.nets
    params, opt_state = dict(agent.params), dict(agent.opt_state)
    for group in grads:
        updates, opt_state[group] = nets.optimizers[group].update(grads[group], opt_state[group], params[group])
        params[group] = optax.apply_updates(params[group], updates)
        metrics[f"grad_norm/{group}"] = optax.tree.norm(grads[group])
    target_critic = optax.incremental_update(params["critic"], agent.target_critic, config.target_update_tau)
    ema = agent.ema
    if config.policy_ema_decay is not None:
        share = losses.averaging_share(agent.step, decay=config.policy_ema_decay)
        ema = optax.incremental_update(_acting(params), ema, share)
    norms = {group: metrics[f"grad_norm/{group}"] for group in grads}
    q_scale = agent.q_scale
    if "q_abs_mean" in metrics:  # imitation alone has no Q
        q_scale = losses.q_scale(q_scale, metrics["q_abs_mean"], agent.step)
    ok, health = judge(agent.health, {"loss": jnp.abs(metrics["total_loss"]), **norms}, config.health)
    metrics |= {"skipped": 1.0 - ok, "skipped_in_a_row": health.skipped_in_a_row}
    metrics |= {"valid_samples": batch.sequence_mask.sum(), "mask_ratio": batch.valid.mean()}
    before = (agent.params, agent.opt_state, agent.target_critic, agent.ema, agent.q_scale)
    after = (params, opt_state, target_critic, ema, q_scale)
    params, opt_state, target_critic, ema, q_scale = keep_if(ok, after, before)
    agent = dataclasses.replace(
        agent,
        params=params,
        opt_state=opt_state,
        target_critic=target_critic,
        ema=ema,
        health=health,
        step=agent.step + 1,
        q_scale=q_scale,
    )
    return agent, metrics


@functools.partial(jax.jit, donate_argnums=0)
def _updates(
    agent: ACRLPDAgent, batches: ChunkBatch, rngs: PRNGKeyArray, weights: LossWeights
) -> tuple[ACRLPDAgent, Metrics]:
    return jax.lax.scan(lambda agent, each: _update(agent, *each), agent, (batches, rngs, weights))


def _gradients(
    agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights
) -> tuple[dict[str, Params], dict[str, Array]]:
    """Return the gradients of the joint loss by group, and its metrics: means over micro-batches, made in sequence.

    Every loss is a mean over the batch, so this is the gradient over the whole batch, with three exceptions: bounded
    imitation weights and the mean abs Q under q_gradient are normalised within a micro-batch, and dropout draws other
    masks.
    """
    gradient = jax.grad(_algorithm(agent.config), has_aux=True)
    draws = _draw(agent, batch, rng)
    parts = agent.config.gradient_accumulation_steps
    if parts == 1:
        return gradient(agent.params, agent, batch, draws, weights)

    def of_part(part: tuple[ChunkBatch, Draws]) -> tuple[dict[str, Params], dict[str, Array]]:
        return gradient(agent.params, agent, *part, weights)

    def add(total: Any, part: tuple[ChunkBatch, Draws]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    dealt = (deal(batch, parts), draws.deal(parts))
    like = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], dealt))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), dealt)
    return jax.tree.map(lambda x: x / parts, total)


def loss_and_metrics(
    agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the loss and metrics of an update without making it."""
    return _algorithm(agent.config)(agent.params, agent, batch, _draw(agent, batch, rng), weights)


def _algorithm(config: AgentConfig) -> Callable[..., tuple[Float[Array, ""], dict[str, Array]]]:
    return {"acrlpd": acrlpd.joint_loss, "bc": flow_bc.joint_loss, "rlpd_ac": rlpd_ac.joint_loss}[config.algorithm]


def _draw(agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray) -> Draws:
    return Draws.of_update(rng, agent.config, (batch.actions.shape[0], *agent.nets.action_shape))


@functools.partial(jax.jit, static_argnames=("mode", "num_samples", "num_steps"))
def choose_chunks(
    agent: ACRLPDAgent,
    observations: Observation,
    rng: Key[Array, "..."],
    *,
    mode: ActingMode = "greedy",
    num_samples: int | None = None,
    num_steps: int | None = None,
    guidance: Guidance | None = None,
) -> tuple[Float[Array, "b h a"], Metrics]:
    """Return a chunk per observation and the values by which it was chosen; "bc" and the baselines have no values.

    With [b] keys, the chunk of an observation depends only on it and its key, not on what else is in the batch. With
    ``guidance``, every candidate continues the chunk in execution.
    """
    config, num_steps = agent.config, num_steps or agent.config.flow_steps
    modules = agent.acting_modules()
    if guidance is not None:
        modules = dataclasses.replace(modules, policy=cast(FlowPolicy, flow.Guided(modules.policy, guidance)))
        if config.extraction == "distill":  # a student's single step cannot be guided; its teacher's can
            config = dataclasses.replace(config, extraction="best_of_n")
    prefix = flow.encode(modules.policy, observations)
    noise_rng, choice_rng = jax.random.split(rng) if rng.ndim == 0 else jax.vmap(jax.random.split, out_axes=1)(rng)
    alone = mode == "bc" or not agent.chooses
    n = 1 if alone else num_samples or config.best_of_n_samples
    noise = sampling.draw(jax.random.normal, noise_rng, n, prefix.state.shape[0], agent.nets.action_shape)
    if alone:
        return candidates.unchosen(modules, config, prefix, noise, num_steps), {}
    explore = candidates.Exploration(choice_rng, agent.temperature) if mode == "explore" else None
    chosen = candidates.choose(modules, config, prefix, noise, num_steps, explore)
    return chosen.chunk, chosen.values
