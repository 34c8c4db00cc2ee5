"""Refuse values that somebody chose and that would have no effect with the others, instead of ignoring them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from acrlpd import presets
from acrlpd.config import ConfigError, TrainConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fields that have an effect only if ``holds`` is true of the configuration; ``needs`` says the same in words."""

    needs: str
    holds: Callable[[TrainConfig], bool]
    fields: tuple[str, ...]


def _in(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


PI0_ALONE = ("paligemma_variant", "action_expert_variant", "vision_variant", "vocab_size", "max_token_len", "tokenizer")
SCHEDULES = tuple(f"optimizers.{group}.schedule" for group in ("policy", "critic", "temperature"))

RULES = (
    Rule(
        "policy.kind mlp_flow or gaussian",
        lambda c: not c.policy.traits.has_backbone,
        ("policy.hidden_dims",),
    ),
    Rule(
        "policy.kind pi0 or pi05",
        lambda c: c.policy.traits.has_backbone,
        _in("policy", *PI0_ALONE, "dtype", "remat", "unroll"),
    ),
    Rule("policy.freeze_pi0_backbone", lambda c: c.policy.freeze_pi0_backbone, ("data.prefix_bytes",)),
    Rule(
        "agent.best_of_n_strategy chunked",
        lambda c: c.agent.best_of_n_strategy == "chunked",
        ("agent.best_of_n_block",),
    ),
    Rule("agent.best_of_n_strategy auto", lambda c: c.agent.best_of_n_strategy == "auto", ("agent.best_of_n_bytes",)),
    Rule(
        "agent.extraction q_gradient or one of your own",
        lambda c: c.agent.extraction not in ("best_of_n", "distill", "guided"),
        ("agent.actor_samples",),
    ),
    Rule(
        "agent.critic.q_aggregation mean_minus_std",
        lambda c: c.agent.critic.q_aggregation == "mean_minus_std",
        ("agent.critic.pessimism",),
    ),
    Rule(
        "agent.critic.backup_horizon",
        lambda c: c.agent.critic.backup_horizon is not None,
        ("agent.critic.distill_level",),
    ),
    Rule(
        "agent.target best_of_n",
        lambda c: c.agent.target == "best_of_n",
        _in("agent", "target_samples", "target_flow_steps"),
    ),
    Rule(
        "agent.target implicit",
        lambda c: c.agent.target == "implicit",
        _in("agent.implicit", "statistic", "level"),
    ),
    Rule(
        "agent.extraction guided",
        lambda c: c.agent.extraction == "guided",
        ("agent.guidance_weights",),
    ),
    Rule(
        "agent.extraction guided with agent.target best_of_n",
        lambda c: c.agent.extraction == "guided" and c.agent.target == "best_of_n",
        ("agent.target_guidance",),
    ),
    Rule("agent.extraction distill", lambda c: c.agent.extraction == "distill", ("agent.distill_weight",)),
    Rule(
        "an agent.bc_weighting",
        lambda c: c.agent.bc_weighting != "none",
        _in("agent", "bc_weighting_temperature", "bc_weighting_bound"),
    ),
    Rule(
        "agent.critic.use_pi0_features",
        lambda c: c.agent.critic.use_pi0_features,
        ("agent.critic.feature_fusion_method",),
    ),
    Rule(
        "data that the run collects (no data.path)",
        lambda c: not c.data.sets,
        _in("data.collect", "episodes", "policy", "noise_range", "num_workers"),
    ),
    Rule("statistics that the run makes (no data.norm_stats)", lambda c: not c.data.norm_stats, ("data.min_std",)),
    Rule("rollout.num_workers above 0", lambda c: c.rollout.num_workers > 0, ("rollout.timeout_s",)),
    Rule(
        "an online phase (env.name and online_steps)",
        lambda c: bool(c.env and c.online_steps),
        (
            *("utd_ratio", "warmup_env_steps", "online_envs", "overlap_rollouts", "early_stopping_success"),
            *("early_stopping_patience", "data.max_replay_bytes"),
        ),
    ),
    Rule(
        "an environment (env.name)",
        lambda c: c.env is not None,
        _in("eval", "episodes", "progress_episodes", "num_envs", "first_seed"),
    ),
    Rule("a data.validation_fraction", lambda c: c.data.validation_fraction > 0, ("data.validation_seed",)),
    Rule(
        "a data.validation_fraction and no environment (--env None)",
        lambda c: c.data.validation_fraction > 0 and c.env is None,
        ("eval.held_out_chunks",),
    ),
    Rule("a data.online_ratio", lambda c: c.data.online_ratio is not None, ("data.online_ratio_episodes",)),
    Rule("no agent.policy_ema_decay", lambda c: c.agent.policy_ema_decay is None, ("agent.act_by_target_critic",)),
    Rule("online_loss_weights", lambda c: c.online_loss_weights is not None, ("online_transition_steps",)),
    Rule(
        "loggers.kinds wandb or trackio",
        lambda c: bool({"wandb", "trackio"} & set(c.loggers.kinds)),
        ("loggers.project",),
    ),
    Rule("loggers.kinds wandb", lambda c: "wandb" in c.loggers.kinds, ("loggers.wandb_mode",)),
    *(
        Rule(
            f"no {schedule}.rsqrt_timescale",
            lambda c, name=f"{schedule}.rsqrt_timescale": _value(c, name) is None,  # type: ignore[misc]
            _in(schedule, "decay_steps", "decay_lr"),
        )
        for schedule in SCHEDULES
    ),
)


def refuse_idle(config: TrainConfig, start: TrainConfig | None = None) -> None:
    """Refuse a value that is neither that of ``start`` nor the default, and has no effect with the others.

    ``start``: the configuration before anybody chose values; None: the preset.

    Raises:
        ConfigError: lists for each such field what it would need.
    """
    if start is None and config.preset not in presets.PRESETS:
        return
    preset = start or presets.get_preset(str(config.preset))
    problems = [
        f"{field} {_value(config, field)!r} has no effect here: it needs {rule.needs}"
        for rule in RULES
        if not rule.holds(config)
        for field in rule.fields
        if _value(config, field) not in (_value(preset, field), _default(config, field))
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _value(config: Any, field: str) -> Any:
    return functools.reduce(getattr, field.split("."), config)


def _default(config: Any, field: str) -> Any:
    *heads, last = field.split(".")
    part = functools.reduce(getattr, heads, config)
    return next(each.default for each in dataclasses.fields(part) if each.name == last)
