"""Building of an agent from a configuration, and of the transform between the robot and its policy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import cast

import jax
from flax import nnx

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import PolicyConfig, TrainConfig
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.robots import mapping
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.data.view.transforms import TokenizePrompt, Transform, to_model
from acrlpd.models import weights as policy_weights
from acrlpd.models.flow import FlowPolicy
from acrlpd.models.gaussian import ChunkGaussianConfig
from acrlpd.models.mlp_flow import MLPFlowConfig
from acrlpd.models.pi0 import CAMERAS, Pi0, Pi0Config
from acrlpd.models.recognize import recognize
from acrlpd.training.optimizer import make_optimizers
from acrlpd.training.sharding import make_mesh, parameter_sharding

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of the robot's own state and action, before any padding."""

    state: int
    action: int

    @classmethod
    def of(cls, stats: Mapping[str, NormStats]) -> Dims:
        """Return the sizes of the data that these statistics are of."""
        return cls(len(stats["state"].mean), len(stats["actions"].mean))


def make_agent(config: TrainConfig, dims: Dims, cameras: tuple[str, ...], *, weights: str | None = None) -> ACRLPDAgent:
    """Make a fresh agent, placed on the mesh; its policy starts from ``weights`` if given."""
    agent = create_agent(config, dims, cameras, weights=weights)
    return jax.device_put(agent, parameter_sharding(make_mesh(config.fsdp_devices), agent))


def create_agent(
    config: TrainConfig, dims: Dims, cameras: tuple[str, ...], *, weights: str | None = None
) -> ACRLPDAgent:
    """Make a fresh agent on JAX's default device. Without weights it can be traced, for shapes without memory."""
    if weights is not None and config.policy.traits.has_backbone and config.policy.vocab_size is not None:
        make_tokenizer(config.policy).check_trained(config.policy.vocab_size)
    policy_rng, agent_rng = jax.random.split(jax.random.key(config.seed))
    policy = make_policy(config.policy, dims, model_cameras(config, cameras), nnx.Rngs(params=policy_rng))
    if weights is not None:
        load_weights(policy, weights)
    trainable = trainable_part(config.policy, policy)
    _keep_frozen_in(config.policy.frozen_dtype, policy, trainable)
    return ACRLPDAgent.create(
        config.with_critic_horizon(config.critic_horizon).agent,
        policy,
        make_optimizers(config.optimizers),
        state_dim=config.policy.action_dim or dims.state,
        action_dim=dims.action,
        rng=agent_rng,
        trainable=trainable,
    )


def abstract_agent(config: TrainConfig, dims: Dims, cameras: tuple[str, ...]) -> ACRLPDAgent:
    """Return the shapes, types and places of the arrays of ``make_agent``, without any memory."""
    agent = jax.eval_shape(lambda: create_agent(config, dims, cameras))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        agent,
        parameter_sharding(make_mesh(config.fsdp_devices), agent),
    )


def make_policy(config: PolicyConfig, dims: Dims, cameras: tuple[str, ...], rngs: nnx.Rngs) -> FlowPolicy:
    """Make a policy of the configured kind with fresh parameters."""
    sizes = (dims.state, dims.action, config.action_horizon, config.hidden_dims)
    if config.kind == "mlp_flow":
        return MLPFlowConfig(*sizes).create(rngs)
    if config.kind == "gaussian":  # it is no flow, but rlpd_ac, its only user, never uses it as one
        return cast(FlowPolicy, ChunkGaussianConfig(*sizes).create(rngs))
    return pi0_config(config, dims, cameras).create(rngs)


def pi0_config(config: PolicyConfig, dims: Dims, cameras: tuple[str, ...]) -> Pi0Config:
    """Return the model configuration. openpi uses one width for state and action; a small model the data's two."""
    return Pi0Config(
        pi05=config.traits.state_in_prompt,
        action_dim=config.action_dim or dims.action,
        state_dim=config.action_dim or dims.state,
        action_horizon=config.action_horizon,
        max_token_len=config.max_token_len,
        paligemma_variant=config.paligemma_variant,
        action_expert_variant=config.action_expert_variant,
        vision_variant=config.vision_variant,
        vocab_size=config.vocab_size or make_tokenizer(config).vocab_size,
        image_size=config.image_size,
        cameras=cameras,
        dtype=config.dtype,
        remat=config.remat,
        unroll=config.unroll,
    )


def load_weights(policy: FlowPolicy, path: str) -> None:
    """Load a checkpoint's parameters into ``policy``. A bare PaliGemma leaves the other ones fresh, as in openpi."""
    arrays = policy_weights.read_params(path)
    bare = recognize(arrays).get("model") == "paligemma"
    may_miss = policy_weights.NOT_IN_PALIGEMMA if bare else policy_weights.LORA
    policy_weights.load_into(cast(nnx.Module, policy), arrays, may_miss=may_miss, source=path)
    logger.info("policy: %d arrays from %s", len(arrays), path)


def trainable_part(config: PolicyConfig, policy: FlowPolicy) -> Callable[[str], bool]:
    """Return which paths train: all except weights that adapters replace (openpi's rule) and a frozen part."""
    if config.frozen:
        return lambda path: False
    if not isinstance(policy, Pi0):
        return lambda path: True
    freezes, frozen_backbone = policy.config.freezes, config.freeze_pi0_backbone
    return lambda path: not freezes(path) and (policy.is_suffix_param(path) or not frozen_backbone)


def _keep_frozen_in(dtype: str, policy: FlowPolicy, trainable: Callable[[str], bool]) -> None:
    frozen = nnx.filter_state(nnx.state(policy), lambda path, _: not trainable("/".join(map(str, path))))
    nnx.update(policy, jax.tree.map(lambda array: array.astype(dtype), frozen))


def make_transform(
    config: TrainConfig, stats: Mapping[str, NormStats], dims: Dims, cameras: tuple[str, ...] | None = None
) -> Transform:
    """Return the transform from raw to model observations, in openpi's order; serving uses the same list.

    ``cameras`` are the data's cameras to read; all others are ignored. None reads all.
    """
    policy = config.policy
    return to_model(
        before_normalization(config),
        stats,
        TokenizePrompt(make_tokenizer(policy), policy.traits.state_in_prompt),
        quantiles=has_quantiles(config),
        image_size=policy.image_size,
        action_dim=policy.action_dim,
        robot_action_dim=dims.action,
        cameras=None if cameras is None else model_cameras(config, cameras),
    )


def make_tokenizer(policy: PolicyConfig) -> PromptTokenizer:
    """Make the prompt tokenizer; only policies with a backbone read its tokens."""
    vocab_size = policy.vocab_size if policy.traits.has_backbone else None
    return PromptTokenizer(policy.tokenizer, max_length=policy.max_token_len, vocab_size=vocab_size)


def has_quantiles(config: TrainConfig) -> bool:
    """Return whether states and actions are normalized by quantiles instead of mean and standard deviation."""
    return config.policy.traits.state_in_prompt or config.data.action_normalization == "quantile"


def before_normalization(config: TrainConfig) -> list[Transform]:
    """Return the transforms before normalization; none if the data is used unchanged."""
    return mapping.before_normalization(
        config.data.robot, config.data.delta_mask, pi05=config.policy.traits.state_in_prompt
    )


def delta_mask(config: TrainConfig) -> tuple[bool, ...]:
    """Return which action dimensions are relative to the state for the policy."""
    return mapping.delta_mask(config.data.robot, config.data.delta_mask, pi05=config.policy.traits.state_in_prompt)


def model_cameras(config: TrainConfig, cameras: tuple[str, ...]) -> tuple[str, ...]:
    """Return the model's camera names for the data's ``cameras``."""
    return cameras if config.data.robot is None else CAMERAS
