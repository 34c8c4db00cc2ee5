"""acrlpd: action-chunked reinforcement learning with prior data, for π₀ and π₀.5.

The names below are importable from here; each is loaded when first used, so that ``import acrlpd`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "acrlpd.agents.agent": ("ACRLPDAgent",),
    "acrlpd.agents.config": ("AgentConfig", "TemperatureConfig"),
    "acrlpd.founding.agents": (
        *("DEFAULT_LOSS_WEIGHTS", "ACRLPDPi0Agent", "BCLossComputer", "CriticLossComputer", "EntropyEstimator"),
        *("JointLossComputer", "SingleCriticNetwork", "TemperatureModule", "create_observation_encoder"),
        "soft_update_target_networks",
    ),
    "acrlpd.agents.losses": ("LossWeights",),
    "acrlpd.config": ("ACRLPDPi0Config", "ACRLPDTrainingConfig", "EvalConfig", "TrainConfig"),
    "acrlpd.founding.loaders": (*("ACRLPDDataLoader", "LeRobotACRLPDDataLoader", "create_lerobot_acrlpd_dataloader"),),
    "acrlpd.data.store.episodes": ("EpisodeStore",),
    "acrlpd.data.grain_batches": ("grain_batches",),
    "acrlpd.data.formats.hdf5": ("H5DatasetReader",),
    "acrlpd.data.loader": ("ChunkLoader",),
    "acrlpd.data.sources": ("open_episodes",),
    "acrlpd.deploy": ("export_acrlpd_model",),
    "acrlpd.models.critic": ("CriticConfig", "CriticNetworks"),
    "acrlpd.models.mlp_flow": ("MLPFlow", "MLPFlowConfig"),
    "acrlpd.models.pi0": ("Pi0", "Pi0Config"),
    "acrlpd.doctor": ("validate_installation",),
    "acrlpd.overrides": ("apply_config_overrides", "load_yaml", "merge_configurations"),
    "acrlpd.platforms": (
        *("PLATFORM_DATA_CONFIGS", "PLATFORM_LR_SCHEDULES", "PLATFORM_MEMORY_REQUIREMENTS"),
        *("ConfigValidator", "load_training_config", "validate_config_compatibility"),
    ),
    "acrlpd.presets": (
        *("get_aloha_acrlpd_config", "get_aloha_config", "get_droid_acrlpd_config", "get_droid_config"),
        *("get_libero_acrlpd_config", "get_libero_config", "get_preset"),
    ),
    "acrlpd.serving.policy": ("Policy",),
    "acrlpd.serving.production": ("PRODUCTION_SERVING_CONFIG",),
    "acrlpd.serving.server": ("PolicyServer", "ServerConfig"),
    "acrlpd.founding.regression": ("ACRLPDRegressionTester",),
    "acrlpd.training.checkpoint": ("ACRLPDCheckpointManager",),
    "acrlpd.training.guides": (
        *("HYPERPARAMETER_TUNING_PROTOCOL", "PERFORMANCE_OPTIMIZATION_STRATEGIES", "TROUBLESHOOTING_GUIDE"),
    ),
    "acrlpd.training.loading": ("load_checkpoint",),
    "acrlpd.training.loop": ("ACRLPDTrainer",),
    "acrlpd.training.monitor": ("ACRLPDDebugger", "ACRLPDTrainingMonitor", "TrainingMetrics"),
    "acrlpd.training.protocol": ("ACRLPDEvaluationProtocol",),
    "acrlpd.training.setup": ("make_trainer",),
    "acrlpd.training.writers": ("WANDB_METRIC_GROUPS",),
    "acrlpd.types": ("ChunkBatch", "Episode", "FinalObservation", "Observation"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("acrlpd")
    if name not in _HOME:
        raise AttributeError(f"module 'acrlpd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
