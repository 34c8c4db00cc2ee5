"""ACRLPD: action-chunked reinforcement learning with prior data, for a flow policy. The whole algorithm on this page.

Read it beside ``docs/algorithm.md``: ``joint_loss`` has the sections in order, ``losses.py`` each equation once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from acrlpd.agents import extraction as extractions
from acrlpd.agents import losses, sampling
from acrlpd.agents.extraction import ExtractionName, Modules
from acrlpd.agents.health import Health, HealthConfig, judge, keep_if
from acrlpd.agents.losses import LossWeights
from acrlpd.models import flow
from acrlpd.models.critic import CriticConfig, CriticNetworks
from acrlpd.models.flow import FlowPolicy, Prefix
from acrlpd.types import ChunkBatch, Metrics, Observation

ActingMode = Literal["greedy", "explore", "bc"]
BCWeighting = Literal["none", "importance", "difficulty"]
BestOfNStrategy = Literal["parallel", "chunked", "sequential"]
Params = dict[str, Any]  # by group: "policy", "critic", "temperature", and "student" under distill
_HELD = optax.set_to_zero()  # one object, so that networks with it can be equal


@dataclasses.dataclass(frozen=True)
class TemperatureConfig:
    """alpha: the softmax temperature of exploration and the weight of the entropy bonus under q_gradient."""

    initial_temp: float = 1.0
    target_entropy_multiplier: float = 0.5  # target entropy = -multiplier * horizon * action_dim
    adaptive: bool = True

    def __post_init__(self):
        if self.initial_temp <= 0:
            raise ValueError(f"temperature.initial_temp must be positive, got {self.initial_temp}")


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Every choice of the algorithm; sizes of the policy are the policy's own."""

    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    temperature: TemperatureConfig = dataclasses.field(default_factory=TemperatureConfig)
    loss_weights: LossWeights = dataclasses.field(default_factory=LossWeights)
    extraction: ExtractionName = "best_of_n"
    discount: float = 0.99
    target_update_tau: float = 0.005
    best_of_n_samples: int = 32  # candidates while acting
    target_samples: int | None = None  # candidates in the TD target; None: as while acting
    best_of_n_strategy: BestOfNStrategy = "parallel"
    best_of_n_block: int = 8  # candidates at a time under "chunked"
    top_k: int | None = None  # explore among this many best candidates; None: among all
    diversity_bonus: float = 0.0  # added to Q while exploring, times the mean distance to the other candidates
    flow_steps: int = 10  # Euler steps while acting
    target_flow_steps: int | None = None  # Euler steps in the TD target; None: as while acting
    action_clip: float | None = None  # candidates are clipped to +- this, in normalized units
    huber_delta: float | None = None  # None: squared TD error
    actor_samples: int = 2  # q_gradient: chunks per observation; 1 switches the entropy bonus off
    distill_weight: float = 100.0  # distill: weight of the distance to the flow against Q
    bc_weighting: BCWeighting = "none"
    bc_weighting_temperature: float = 1.0
    bc_weighting_bound: float = 4.0  # largest over smallest weight
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self):
        for name, choices in (
            ("extraction", ExtractionName),
            ("best_of_n_strategy", BestOfNStrategy),
            ("bc_weighting", BCWeighting),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"agent.{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if not 0 < self.discount <= 1:
            raise ValueError(f"agent.discount must lie in (0, 1], got {self.discount}")
        if not 0 < self.target_update_tau <= 1:
            raise ValueError(f"agent.target_update_tau must lie in (0, 1], got {self.target_update_tau}")
        counts = ("best_of_n_samples", "target_samples", "flow_steps", "target_flow_steps", "best_of_n_block")
        for name in (*counts, "top_k", "actor_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"agent.{name} must be at least 1, got {value}")
        if self.temperature.adaptive and self.candidates_in_target < 2:
            raise ValueError(
                "agent.temperature.adaptive needs the spread of at least 2 candidates, but the TD target draws "
                f"{self.candidates_in_target}: raise agent.target_samples or set agent.temperature.adaptive to False"
            )

    @property
    def candidates_in_target(self) -> int:
        return self.best_of_n_samples if self.target_samples is None else self.target_samples

    @property
    def block_size(self) -> int | None:
        return {"parallel": None, "chunked": self.best_of_n_block, "sequential": 1}[self.best_of_n_strategy]

    def make_extraction(self, num_steps: int) -> extractions.Extraction:
        if self.extraction == "q_gradient":
            return extractions.QGradient(num_steps, self.action_clip, self.actor_samples)
        if self.extraction == "distill":
            return extractions.Distill(num_steps, self.action_clip, self.distill_weight)
        return extractions.BestOfN(num_steps, self.action_clip)


@dataclasses.dataclass(frozen=True)
class Networks:
    """What of an agent never changes: structure, choices, optimisers.

    Agents whose networks are equal share compiled programs. Optimisers are functions, so they are equal only where they
    are the same objects, as ``training.optimizer`` makes them for equal configurations.
    """

    config: AgentConfig
    policy_def: nnx.GraphDef
    critic_def: nnx.GraphDef
    optimizers: Mapping[str, optax.GradientTransformation]
    action_shape: tuple[int, int]  # horizon and width of the policy's chunks
    action_dim: int  # of the robot; dimensions beyond it are the policy's padding

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Once for all calls: walking the definition of a large policy takes as long as a small update."""
        optimizers = frozenset(self.optimizers.items())
        return hash((self.config, self.policy_def, self.critic_def, self.action_shape, self.action_dim, optimizers))

    def modules(self, params: Params, frozen: nnx.State) -> Modules:
        student = None
        if "student" in params:
            student = nnx.merge(self.policy_def, nnx.merge_state(params["policy"], frozen, params["student"]))
        return Modules(
            policy=nnx.merge(self.policy_def, params["policy"], frozen),
            critic=nnx.merge(self.critic_def, params["critic"]),
            student=student,
        )

    @property
    def target_entropy(self) -> float:
        return -self.config.temperature.target_entropy_multiplier * self.action_shape[0] * self.action_dim


@struct.dataclass
class ACRLPDAgent:
    """Policy, critics, temperature and their optimisers as one immutable pytree."""

    params: Params
    frozen: nnx.State  # the policy's frozen part; no optimiser state exists for it
    target_critic: nnx.State
    opt_state: dict[str, optax.OptState]
    health: Health
    step: Int[Array, ""]  # counts skipped updates too, as batches do
    nets: Networks = struct.field(pytree_node=False)

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
        """A fresh agent around ``policy``, whose arrays it takes over: the first update gives their memory away.

        ``optimizers`` has one entry per group: policy, critic, temperature; a student uses the policy's.
        ``action_dim`` is the robot's, where the policy's is wider (openpi pads to 32).
        ``trainable`` takes a policy parameter's path, joined by '/', and says whether it may change.
        """

        policy_def, policy_state = nnx.split(policy)
        policy_params, frozen = nnx.split_state(policy_state, _by_path(trainable), ...)
        action_dim = policy.action_dim if action_dim is None else action_dim
        critic = CriticNetworks(
            config.critic,
            feature_dim=policy.feature_dim,
            state_dim=state_dim,
            action_horizon=policy.action_horizon,
            action_dim=action_dim,
            rngs=nnx.Rngs(params=rng),
        )
        critic_def, critic_params = nnx.split(critic)
        params: Params = {
            "policy": policy_params,
            "critic": critic_params,
            "temperature": {"log_temperature": jnp.log(jnp.float32(config.temperature.initial_temp))},
        }
        optimizers = dict(optimizers)
        if not config.temperature.adaptive:
            optimizers["temperature"] = _HELD  # no gradient, and no weight decay either
        if config.extraction == "distill":
            suffix = nnx.filter_state(policy_params, _by_path(policy.is_suffix_param))  # frozen parts are shared
            params["student"] = jax.tree.map(jnp.copy, suffix)  # at first, the flow's own single Euler step
            optimizers["student"] = optimizers["policy"]
        action_shape = (policy.action_horizon, policy.action_dim)
        nets = Networks(config, policy_def, critic_def, optimizers, action_shape, action_dim)
        return cls(
            params=params,
            frozen=frozen,
            target_critic=jax.tree.map(jnp.copy, critic_params),
            opt_state={group: optimizers[group].init(params[group]) for group in params},
            health=Health.create(("loss", *optimizers)),
            step=jnp.zeros((), jnp.int32),
            nets=nets,
        )

    @property
    def config(self) -> AgentConfig:
        return self.nets.config

    @property
    def temperature(self) -> Float[Array, ""]:
        return jnp.exp(self.params["temperature"]["log_temperature"])

    def update(
        self, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights | None = None
    ) -> tuple[ACRLPDAgent, Metrics]:
        """One gradient step of every group and the target update: one compiled call that consumes this agent."""
        return _update(self, batch, rng, self.config.loss_weights if weights is None else weights)

    def sample_actions(
        self,
        observations: Observation,
        rng: PRNGKeyArray,
        *,
        mode: ActingMode = "greedy",
        num_samples: int | None = None,
        num_steps: int | None = None,
    ) -> Float[Array, "b h a"]:
        """Normalized chunks for a batch of observations.

        ``greedy``: the best of N by the critic. ``explore``: drawn from N at the learned temperature. ``bc``: one
        sample of the flow, without the critic.
        """
        return act(self, observations, rng, mode=mode, num_samples=num_samples, num_steps=num_steps)[0]


ACRLPDPi0Agent = ACRLPDAgent  # the name in the founding design; the agent takes every flow policy


def _by_path(chosen: Callable[[str], bool]) -> Callable[[tuple[Any, ...], Any], bool]:
    """A filter of parameters from a condition on their path, joined by '/'."""
    return lambda path, _: chosen("/".join(map(str, path)))


@functools.partial(jax.jit, donate_argnums=0)
def _update(
    agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights
) -> tuple[ACRLPDAgent, Metrics]:
    nets = agent.nets
    grads, metrics = jax.grad(joint_loss, has_aux=True)(agent.params, agent, batch, rng, weights)
    params, opt_state = {}, {}
    for group, optimizer in nets.optimizers.items():
        updates, opt_state[group] = optimizer.update(grads[group], agent.opt_state[group], agent.params[group])
        params[group] = optax.apply_updates(agent.params[group], updates)
        metrics[f"grad_norm/{group}"] = optax.tree.norm(grads[group])
    tau = nets.config.target_update_tau
    target_critic = optax.incremental_update(params["critic"], agent.target_critic, tau)
    norms = {group: metrics[f"grad_norm/{group}"] for group in nets.optimizers}
    ok, health = judge(agent.health, {"loss": jnp.abs(metrics["total_loss"]), **norms}, nets.config.health)
    metrics |= {"skipped": 1.0 - ok, "skipped_in_a_row": health.skipped_in_a_row}
    before = (agent.params, agent.opt_state, agent.target_critic)
    params, opt_state, target_critic = keep_if(ok, (params, opt_state, target_critic), before)
    step = agent.step + 1
    agent = dataclasses.replace(
        agent, params=params, opt_state=opt_state, target_critic=target_critic, health=health, step=step
    )
    return agent, metrics


def joint_loss(
    params: Params, agent: ACRLPDAgent, batch: ChunkBatch, rng: PRNGKeyArray, weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Critic + behaviour cloning + actor + temperature, with one prefix pass each at s and s'."""
    config, nets = agent.config, agent.nets
    target_rng, subset_rng, noise_rng, time_rng, actor_rng, dropout_rng = jax.random.split(rng, 6)
    modules = nets.modules(params, agent.frozen)
    constant = nets.modules(jax.lax.stop_gradient(params), agent.frozen)
    temperature = jax.lax.stop_gradient(jnp.exp(params["temperature"]["log_temperature"]))

    prefix = modules.policy.encode(batch.observations)
    next_prefix = constant.policy.encode(batch.next_observations)

    # Section 2: the critic, at the dataset's chunk.
    candidates, scores = propose(constant, config, next_prefix, target_rng, config.candidates_in_target, target=True)
    next_chunk, _ = sampling.select(candidates, scores)
    target_critic = nnx.merge(nets.critic_def, agent.target_critic)
    next_q_members = target_critic(next_prefix.features, next_prefix.state, next_chunk[None])[:, 0]  # [e b]
    next_q = target_critic.aggregate(next_q_members, subset_rng)
    target = losses.td_target(batch.rewards, batch.valid, batch.bootstrap_mask, next_q, discount=config.discount)
    features = jax.lax.stop_gradient(prefix.features)
    q = modules.critic(features, prefix.state, batch.actions[None], dropout_rng=dropout_rng)[:, 0]  # [e b]
    critic_loss = losses.critic_loss(q, target, batch.sequence_mask, huber_delta=config.huber_delta)
    if config.critic.q_aggregation == "weighted":  # the aggregate's own TD error trains the weights, members held
        aggregate = modules.critic.aggregate(jax.lax.stop_gradient(q))[None]
        critic_loss += losses.critic_loss(aggregate, target, batch.sequence_mask, huber_delta=config.huber_delta)

    # Section 3: the policy, by imitation and by the extraction.
    noise = jax.random.normal(noise_rng, batch.actions.shape)
    time = flow.sample_time(time_rng, batch.actions.shape[:1])
    flow_loss = flow.flow_loss(modules.policy, prefix, batch.actions, noise, time)
    sample_weights = _bc_sample_weights(config, flow_loss, batch.valid, q, target)
    bc_loss = losses.bc_loss(flow_loss, batch.valid, sample_weights)
    climbing = dataclasses.replace(modules, critic=constant.critic)
    actor_loss, actor_metrics = config.make_extraction(config.flow_steps).actor_loss(
        climbing, prefix, actor_rng, temperature
    )

    # Section 4: the temperature, from the spread of the candidates already drawn.
    robot_candidates = candidates[..., : nets.action_dim]
    entropy = losses.gaussian_entropy(robot_candidates)
    alpha_loss = jnp.zeros(())
    if config.temperature.adaptive:
        alpha_loss = losses.temperature_loss(
            params["temperature"]["log_temperature"], entropy, target_entropy=nets.target_entropy
        )

    total = (
        weights.critic_weight * critic_loss
        + weights.bc_weight * bc_loss
        + weights.actor_weight * actor_loss
        + weights.alpha_weight * alpha_loss
    )
    spread = jnp.sqrt(jnp.var(robot_candidates, axis=0, ddof=min(1, len(candidates) - 1)).sum(axis=(1, 2)))
    metrics = {
        "total_loss": total,
        "critic_loss": critic_loss,
        "bc_loss": bc_loss,
        "actor_loss": actor_loss,
        "alpha_loss": alpha_loss,
        "q_mean": q.mean(),
        "q_std": q.std(),
        "q_ensemble_variance": q.var(axis=0).mean(),
        "target_q_mean": target.mean(),
        "td_error_mean": jnp.abs(q - target[None]).mean(),
        "alpha_value": temperature,
        "entropy_estimate": entropy.mean(),
        "best_of_n_variance": scores.var(axis=0).mean(),
        "action_diversity": jnp.sqrt(2.0) * spread.mean(),  # root mean squared distance between two candidates
        "valid_samples": batch.sequence_mask.sum(),
        "mask_ratio": batch.valid.mean(),
    }
    return total, metrics | dict(actor_metrics)


def propose(
    modules: Modules,
    config: AgentConfig,
    prefix: Prefix,
    rng: PRNGKeyArray,
    num_samples: int,
    *,
    target: bool = False,
    num_steps: int | None = None,
) -> tuple[Float[Array, "n b h a"], Float[Array, "n b"]]:
    """N candidate chunks on one prefix and their aggregated value, as the extraction makes them."""
    steps = num_steps or (config.target_flow_steps if target else None) or config.flow_steps
    policy = modules.policy
    shape = (num_samples, prefix.state.shape[0], policy.action_horizon, policy.action_dim)
    return propose_from(modules, config, prefix, jax.random.normal(rng, shape), num_steps=steps)


def propose_from(
    modules: Modules, config: AgentConfig, prefix: Prefix, noise: Float[Array, "n b h a"], *, num_steps: int
) -> tuple[Float[Array, "n b h a"], Float[Array, "n b"]]:
    """The candidates that start from ``noise``, and their aggregated value."""
    extraction = config.make_extraction(num_steps)

    def draw(noise):
        chunks = extraction.propose(modules, prefix, noise)
        return chunks, modules.critic.aggregate(modules.critic(prefix.features, prefix.state, chunks))

    return sampling.in_blocks(draw, noise, block_size=config.block_size)


def _bc_sample_weights(
    config: AgentConfig,
    flow_loss: Float[Array, "b h"],
    valid: Float[Array, "b h"],
    q: Float[Array, "e b"],
    target: Float[Array, " b"],
) -> Float[Array, " b"]:
    """Importance: chunks better than the critic thought. Difficulty: chunks the policy imitates badly."""
    if config.bc_weighting == "none":
        return jnp.ones(flow_loss.shape[:1])
    if config.bc_weighting == "importance":
        score = target - q.mean(axis=0)
    else:
        score = jnp.average(flow_loss, axis=1, weights=valid)  # padding is never imitated, so it is always difficult
    return losses.bounded_weights(score, temperature=config.bc_weighting_temperature, bound=config.bc_weighting_bound)


@functools.partial(jax.jit, static_argnames=("mode", "num_samples", "num_steps"))
def act(
    agent: ACRLPDAgent,
    observations: Observation,
    rng: PRNGKeyArray,
    *,
    mode: ActingMode = "greedy",
    num_samples: int | None = None,
    num_steps: int | None = None,
) -> tuple[Float[Array, "b h a"], Metrics]:
    """Chosen chunks and, per observation, the values they were chosen by."""
    config = agent.config
    modules = agent.nets.modules(agent.params, agent.frozen)
    prefix = modules.policy.encode(observations)
    noise_rng, choice_rng = jax.random.split(rng)
    if mode == "bc":
        shape = (1, prefix.state.shape[0], *agent.nets.action_shape)
        noise = jax.random.normal(noise_rng, shape)
        chunks = flow.sample(modules.policy, prefix, noise, num_steps=num_steps or config.flow_steps)
        return extractions.clip(chunks, config.action_clip)[0], {}
    candidates, scores = propose(
        modules, config, prefix, noise_rng, num_samples or config.best_of_n_samples, num_steps=num_steps
    )
    if mode == "explore":
        _, best = sampling.select(
            candidates[..., : agent.nets.action_dim],  # the diversity of the padding would be no diversity
            scores,
            choice_rng,
            temperature=agent.temperature,
            top_k=config.top_k,
            diversity_bonus=config.diversity_bonus,
        )
    else:
        _, best = sampling.select(candidates, scores)
    values = {"q": sampling.take(scores, best), "q_mean": scores.mean(axis=0), "q_std": scores.std(axis=0)}
    return sampling.take(candidates, best), values
