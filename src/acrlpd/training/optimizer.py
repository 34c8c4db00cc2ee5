"""Optimisers and learning-rate schedules from their configuration."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import optax

from acrlpd.config import CosineDecaySchedule, OptimizerConfig, OptimizersConfig


def make_schedule(config: CosineDecaySchedule) -> optax.Schedule:
    """Return openpi's schedule: the warm-up begins at peak / (warmup + 1) instead of 0, so that no step is wasted."""
    start, peak = config.peak_lr / (config.warmup_steps + 1), config.peak_lr
    if config.rsqrt_timescale is None:
        return optax.warmup_cosine_decay_schedule(
            start, peak, config.warmup_steps, config.decay_steps, end_value=config.decay_lr
        )
    timescale = config.rsqrt_timescale
    return optax.join_schedules(
        [
            optax.linear_schedule(start, peak, config.warmup_steps),
            lambda step: peak / jnp.sqrt(1 + step / timescale),
        ],
        [config.warmup_steps],
    )


@functools.cache  # equal configurations give the same functions, so that agents share compiled programs
def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return global-norm clipping followed by AdamW, with decoupled decay on everything."""
    adamw = optax.adamw(
        make_schedule(config.schedule), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_gradient_norm), adamw)


def make_optimizers(config: OptimizersConfig) -> dict[str, optax.GradientTransformation]:
    """Return one optimiser for each group of parameters, by the group's name."""
    return {
        "policy": make_optimizer(config.policy),
        "critic": make_optimizer(config.critic),
        "temperature": make_optimizer(config.temperature),
    }
