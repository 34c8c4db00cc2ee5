"""The three robot platforms of the founding design: their tables, and configurations for a platform and an environment.

A table is a rule of thumb. What a configuration really needs is computed (``training/memory.py``); the tables say what
is usual, and ``ConfigValidator`` compares the two. These columns have a field of another name in the presets, or none:

    large_N            agent.best_of_n_strategy: "parallel", or for "adaptive" our "auto" (as many at a time as fit)
    warmup_ratio       schedule.warmup_steps, which the founding presets give as well, and which is used: 5 % of droid's
                       decay_steps as here, but 7 % of aloha's and 6 % of libero's
    decay_profile      the schedule's kind: cosine, unless schedule.rsqrt_timescale is set
    cache_size         data.memory_bytes: bytes of pictures, not episodes; numbers are in memory or, if large, mapped
    shuffle_buffer     no effect: each batch is drawn evenly from all rows, which shuffles more than any buffer
    data_augmentation  no effect: the critics read the policy's features, so Q would have to hold for every crop, and
                       stored prefixes of a frozen backbone would not fit; no update augments (``training/prefixes.py``)
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from typing import Any

from acrlpd import presets
from acrlpd.config import TrainConfig
from acrlpd.overrides import apply_config_overrides
from acrlpd.training import memory
from acrlpd.training.guides import HYPERPARAMETER_TUNING_PROTOCOL

PLATFORM_MEMORY_REQUIREMENTS: dict[str, dict[str, str]] = {
    "droid": {"inference": "~12GB", "training": "~28GB", "large_N": "adaptive"},
    "aloha": {"inference": "~10GB", "training": "~24GB", "large_N": "parallel"},
    "libero": {"inference": "~8GB", "training": "~32GB", "large_N": "parallel"},
}
"""Usual memory of one device. Training all of pi0 in float32 with Adam needs more than one device has."""

PLATFORM_LR_SCHEDULES: dict[str, dict[str, Any]] = {
    "droid": {"pi0_peak_lr": 3e-5, "critic_peak_lr": 5e-4, "warmup_ratio": 0.05, "decay_profile": "cosine"},
    "aloha": {"pi0_peak_lr": 5e-6, "critic_peak_lr": 1e-4, "warmup_ratio": 0.1, "decay_profile": "cosine"},
    "libero": {"pi0_peak_lr": 3e-4, "critic_peak_lr": 1e-3, "warmup_ratio": 0.03, "decay_profile": "cosine"},
}

PLATFORM_DATA_CONFIGS: dict[str, dict[str, Any]] = {
    "droid": {"sequence_ratio": 0.7, "cache_size": 50, "shuffle_buffer": 10_000, "data_augmentation": "moderate"},
    "aloha": {"sequence_ratio": 0.8, "cache_size": 30, "shuffle_buffer": 5000, "data_augmentation": "light"},
    "libero": {"sequence_ratio": 0.6, "cache_size": 100, "shuffle_buffer": 20_000, "data_augmentation": "aggressive"},
}

PLATFORM_MEMORY_LIMITS = {
    name: memory.parse_bytes(row["training"].strip("~")) for name, row in PLATFORM_MEMORY_REQUIREMENTS.items()
}
PLATFORM_MAX_LR = {
    name: {"pi0": 3 * row["pi0_peak_lr"], "critic": 3 * row["critic_peak_lr"]}
    for name, row in PLATFORM_LR_SCHEDULES.items()
}
PLATFORM_MIN_BATCH_SIZE = {"droid": 32, "aloha": 32, "libero": 64}
PLATFORM_MAX_BEST_OF_N = {"droid": 32, "aloha": 64, "libero": 128}

ENVIRONMENTS = ("production", "development", "debug")


def environment_overrides(config: TrainConfig, environment: str) -> dict[str, Any]:
    """Return the changes of a deployment environment: shorter phases, and more frequent evaluation or logging."""
    if environment not in ENVIRONMENTS:
        near = difflib.get_close_matches(environment, ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown environment {environment!r}: {hint}There are {', '.join(ENVIRONMENTS)}")
    if environment == "development":
        return {
            "offline_steps": config.offline_steps // 4,
            "online_steps": config.online_steps // 2,
            "eval.frequency": 1000,
            "save_frequency": 2000,
        }
    if environment == "debug":
        return {
            "offline_steps": 1000,
            "online_steps": 500,
            "data.batch_size": 8,
            "agent.best_of_n_samples": 4,
            "log_frequency": 10,
        }
    return {}


def load_training_config(
    platform: str, environment: str = "production", custom_overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Return the configuration of a platform ("droid", "aloha", "libero", any preset) for an environment, with changes.

    Raises:
        ValueError: the platform or environment is unknown, or the changes are wrong (all mistakes are listed).
    """
    config = presets.get_preset(platform)
    config = apply_config_overrides(config, environment_overrides(config, environment))
    return apply_config_overrides(config, custom_overrides or {})


def tuning_runs(config: TrainConfig, phase: str) -> list[TrainConfig]:
    """Return one run for each combination of a phase's values, named after the phase, of the protocol's length."""
    if phase not in HYPERPARAMETER_TUNING_PROTOCOL:
        raise ValueError(f"unknown phase {phase!r}: there are {', '.join(HYPERPARAMETER_TUNING_PROTOCOL)}")
    protocol = HYPERPARAMETER_TUNING_PROTOCOL[phase]
    space = protocol["search_space"]
    combinations = list(itertools.product(*space.values()))
    return [
        apply_config_overrides(
            config,
            dict(zip(space, values, strict=True))
            | {"name": f"{config.name}-{phase}-{number}", "offline_steps": protocol["tuning_steps"]},
        )
        for number, values in enumerate(combinations)
    ]


class ConfigValidator:
    """Comparison of a configuration with what is usual on a platform."""

    @staticmethod
    def estimate_memory_usage(config: TrainConfig, devices: int = 1) -> float:
        """Return GB per device while training. It compiles the update: seconds to minutes for a full-size policy."""
        return memory.plan(config, memory.Machine(devices)).total_bytes / 1e9

    @staticmethod
    def validate_config(
        config: TrainConfig, platform: str, *, devices: int = 1, check_memory: bool = True
    ) -> list[str]:
        """Return warnings, each with the usual value; an empty list if there is nothing to say.

        It takes as long as ``estimate_memory_usage``, unless ``check_memory`` is False.
        """
        if platform not in PLATFORM_MAX_LR:
            raise ValueError(f"unknown platform {platform!r}: there are {', '.join(PLATFORM_MAX_LR)}")
        warnings = []
        if check_memory:
            needed = ConfigValidator.estimate_memory_usage(config, devices)
            usual = PLATFORM_MEMORY_LIMITS[platform] / 1e9
            if needed > usual:
                warnings.append(
                    f"about {needed:.3g} GB on each device, where {usual:.0f} GB is usual on {platform}: "
                    "acrlpd plan says what to change"
                )
        rates = {"pi0": config.optimizers.policy, "critic": config.optimizers.critic}
        for name, optimizer in rates.items():
            peak, max_lr = optimizer.schedule.peak_lr, PLATFORM_MAX_LR[platform][name]
            if peak > max_lr:
                warnings.append(f"the {name} learning rate ({peak:g}) may be too high: up to {max_lr:g} on {platform}")
        if config.data.batch_size < PLATFORM_MIN_BATCH_SIZE[platform]:
            warnings.append(
                f"data.batch_size {config.data.batch_size} is below the {PLATFORM_MIN_BATCH_SIZE[platform]} that is "
                f"usual on {platform}"
            )
        if config.agent.best_of_n_samples > PLATFORM_MAX_BEST_OF_N[platform]:
            warnings.append(
                f"agent.best_of_n_samples {config.agent.best_of_n_samples} exceeds the "
                f"{PLATFORM_MAX_BEST_OF_N[platform]} that is usual on {platform}: choose --agent.best_of_n_strategy "
                "chunked, or fewer"
            )
        return warnings


def validate_config_compatibility(config: TrainConfig) -> TrainConfig:
    """Return the configuration if it can be built again from its own values; refuse contradictions."""
    return apply_config_overrides(config, {})
