"""Named configurations. The comment above each one has its command and the result to expect."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from acrlpd.agents.config import AgentConfig, TemperatureConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.config import (
    CollectConfig,
    CosineDecaySchedule,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    OptimizersConfig,
    PolicyConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from acrlpd.envs.env import EnvConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.models.paligemma import VOCAB_SIZE

DRAWER = EnvConfig("metaworld/drawer-open-v3", max_episode_steps=150)

NANO = PolicyConfig(
    kind="pi0",
    action_horizon=5,
    paligemma_variant="nano",
    action_expert_variant="nano_expert",
    vision_variant="nano",
    max_token_len=8,
    image_size=64,
    dtype="float32",
    remat=False,
)


def _constant(learning_rate: float, *, warmup_steps: int = 0) -> OptimizerConfig:
    """Return Adam with a constant learning rate, as in QC and RLPD; clipping and warm-up are ours."""
    schedule = CosineDecaySchedule(warmup_steps=warmup_steps, peak_lr=learning_rate, decay_lr=learning_rate)
    return OptimizerConfig(schedule=schedule, b2=0.999, clip_gradient_norm=10.0)


# acrlpd train demo            (make demo)
# A small pi0 opens MetaWorld's drawer: 14 to 34 % by imitation, 94 to 100 % after online training; 5 min, two cores.
def get_demo_config() -> TrainConfig:
    return TrainConfig(
        name="demo",
        env=DRAWER,
        policy=NANO,
        agent=AgentConfig(
            critic=CriticConfig(num_critics=10, hidden_dims=(128, 128), q_aggregation="mean"),
            # The target entropy is below that of imitation, so exploration becomes greedier from update to update.
            temperature=TemperatureConfig(initial_temp=0.5, target_entropy_multiplier=2.0),
            best_of_n_samples=16,
            target_samples=4,
            flow_steps=5,
            target_flow_steps=3,
            discount=0.99,
            target_update_tau=0.05,  # an episode has 30 chunks: values must propagate that far in few updates
            policy_ema_decay=0.998,  # an average over 500 updates acts; at first it spans the last sixth of all updates
            typical_share=0.5,  # the critics choose among the usual half of the candidates
            action_clip=1.0,
        ),
        data=DataConfig(collect=CollectConfig(episodes=100, noise_range=(0.4, 1.0)), batch_size=64),
        optimizers=OptimizersConfig(
            policy=_constant(1e-3, warmup_steps=100), critic=_constant(1e-3), temperature=_constant(3e-4)
        ),
        eval=EvalConfig(episodes=50, frequency=750, num_envs=10),
        offline_steps=2000,
        online_steps=3500,
        utd_ratio=0.5,
        online_envs=2,  # choosing chunks for both in one call costs less than two calls
        log_frequency=100,
        save_frequency=1000,
        early_stopping_patience=4,
    )


# acrlpd train demo-vision     (make demo-vision)
# The same with a 64 px camera and the state: 8 % by imitation, 100 % after online training (one seed); 20 CPU-min.
def get_demo_vision_config() -> TrainConfig:
    env = dataclasses.replace(DRAWER, cameras=("corner2",), image_size=64)
    return dataclasses.replace(get_demo_config(), name="demo-vision", env=env)


# acrlpd train demo-cube
# OGBench's cube-single, in the second simulator. It is harder, and its offline phase already helps.
def get_demo_cube_config() -> TrainConfig:
    config = get_demo_config()
    return dataclasses.replace(
        config,
        name="demo-cube",
        env=EnvConfig("ogbench/cube-single-play-singletask-task1-v0"),
        policy=dataclasses.replace(NANO, max_token_len=20),  # its instruction is 17 tokens long
        online_steps=12_000,
    )


# acrlpd train demo-aloha
# gym-aloha hands over a cube: two arms, a 64 px camera from above, language. 4 % by imitation, 11 % offline, no gain
# online (two seeds): a budget to see that everything works. 23 CPU-min.
def get_demo_aloha_config() -> TrainConfig:
    config = get_demo_config()
    return dataclasses.replace(
        config,
        name="demo-aloha",
        env=EnvConfig("aloha/transfer_cube", cameras=("top",), image_size=64),
        policy=dataclasses.replace(NANO, action_horizon=20, max_token_len=12),  # 0.4 s: an episode is 15 chunks
        agent=dataclasses.replace(config.agent, action_clip=None),  # z-scores go beyond 1
        data=DataConfig(
            collect=CollectConfig(episodes=60, noise_range=(0.0, 0.05)),  # rad; the expert solves 3 of 4 episodes
            batch_size=64,
            action_normalization="z_score",  # the arms stay far from their joint limits
        ),
        offline_steps=3000,
        online_steps=6000,
        utd_ratio=0.25,
    )


# acrlpd train demo-libero     (needs acrlpd[libero])
# A bowl onto a plate in LIBERO: one arm, two 64 px cameras, language. 20 % by imitation, 15 % after online training
# (one seed, 20 episodes): a budget to see that everything works. 23 CPU-min.
def get_demo_libero_config() -> TrainConfig:
    config = get_demo_config()
    return dataclasses.replace(
        config,
        name="demo-libero",
        env=EnvConfig("libero_spatial/0", cameras=("image", "wrist_image"), image_size=64),
        policy=dataclasses.replace(NANO, action_horizon=10, max_token_len=32),
        data=DataConfig(collect=CollectConfig(episodes=40, noise_range=(0.0, 0.4)), batch_size=64),
        eval=EvalConfig(episodes=20, frequency=1000, progress_episodes=10, num_envs=5),
        offline_steps=1000,
        online_steps=1000,
        online_envs=1,
    )


# acrlpd train debug
# Every part of a run once, in a minute: for tests, and to see which files a run writes.
def get_debug_config() -> TrainConfig:
    config = get_demo_config()
    return dataclasses.replace(
        config,
        name="debug",
        env=dataclasses.replace(DRAWER, max_episode_steps=30),
        agent=dataclasses.replace(
            config.agent,
            critic=dataclasses.replace(config.agent.critic, num_critics=2, hidden_dims=(32,)),
            best_of_n_samples=4,
            target_samples=2,
            flow_steps=2,
        ),
        data=DataConfig(collect=CollectConfig(episodes=4, num_workers=1), batch_size=16),
        eval=EvalConfig(episodes=4, frequency=20, progress_episodes=2, num_envs=2),
        offline_steps=20,
        online_steps=60,
        utd_ratio=1.0,
        early_stopping_patience=100,
        log_frequency=5,
        save_frequency=10,
    )


def _full_size(horizon: int, max_token_len: int) -> PolicyConfig:
    return PolicyConfig(
        kind="pi0", action_horizon=horizon, action_dim=32, max_token_len=max_token_len, vocab_size=VOCAB_SIZE
    )


def _cosine(warmup_steps: int, peak_lr: float, decay_steps: int, decay_lr: float) -> OptimizerConfig:
    schedule = CosineDecaySchedule(warmup_steps, peak_lr, decay_steps, decay_lr)
    return OptimizerConfig(schedule=schedule, weight_decay=1e-4)


# acrlpd train droid --data.path /path/to/droid --policy.weights /path/to/pi0_droid/params \
#     --policy.tokenizer /path/to/paligemma_tokenizer.model --data.norm_stats /path/to/pi0_droid
# Offline training on the large DROID set, with conservative learning rates and long phases. Needs accelerators.
def get_droid_config() -> TrainConfig:
    return TrainConfig(
        name="droid",
        policy=_full_size(10, 180),
        agent=AgentConfig(
            critic=CriticConfig(num_critics=10, hidden_dims=(512, 512, 256), dropout_rate=0.1, q_aggregation="min"),
            temperature=TemperatureConfig(initial_temp=1.0, target_entropy_multiplier=0.5),
            loss_weights=LossWeights(bc_weight=0.01),
            best_of_n_samples=16,
            typical_share=0.5,
            flow_steps=50,
            discount=0.995,
            target_update_tau=0.005,
        ),
        data=DataConfig(
            path="data/droid",
            action_dim=8,
            robot="droid",
            batch_size=64,
            sequence_ratio=0.7,
            action_normalization="z_score",
        ),
        optimizers=OptimizersConfig(
            policy=_cosine(5000, 3e-5, 100_000, 3e-6),
            critic=_cosine(2000, 5e-4, 80_000, 5e-5),
            temperature=_cosine(2000, 5e-4, 80_000, 5e-5),
        ),
        offline_steps=2_000_000,
        online_steps=200_000,  # in a simulator or on a robot, once env.name is set
    )


# acrlpd train aloha --data.path /path/to/aloha --policy.weights /path/to/pi0_base/params \
#     --policy.tokenizer /path/to/paligemma_tokenizer.model
# Fine-tunes the action expert for two arms; the backbone is frozen.
def get_aloha_config() -> TrainConfig:
    return TrainConfig(
        name="aloha",
        policy=dataclasses.replace(_full_size(20, 250), freeze_pi0_backbone=True),
        agent=AgentConfig(
            critic=CriticConfig(
                num_critics=8,
                hidden_dims=(256, 256, 128),
                dropout_rate=0.05,
                q_aggregation="mean",
                feature_fusion_method="mlp",
            ),
            temperature=TemperatureConfig(initial_temp=0.5, target_entropy_multiplier=0.3),
            loss_weights=LossWeights(bc_weight=0.001, alpha_weight=0.8),
            gradient_accumulation_steps=2,
            best_of_n_samples=32,
            best_of_n_strategy="parallel",
            typical_share=0.5,
            flow_steps=30,
            discount=0.99,
            target_update_tau=0.01,
        ),
        data=DataConfig(
            path="data/aloha",
            action_dim=14,
            robot="aloha",
            batch_size=128,
            sequence_ratio=0.8,
            action_normalization="z_score",
        ),
        optimizers=OptimizersConfig(
            policy=_cosine(2000, 5e-6, 30_000, 1e-6),
            critic=_cosine(1000, 1e-4, 25_000, 1e-5),
            temperature=_cosine(1000, 1e-4, 25_000, 1e-5),
        ),
        offline_steps=500_000,
        online_steps=100_000,
    )


# acrlpd train libero --data.path /path/to/libero --policy.weights /path/to/pi0_base/params \
#     --policy.tokenizer /path/to/paligemma_tokenizer.model
# Trains all parameters at high learning rates, for simulation.
def get_libero_config() -> TrainConfig:
    return TrainConfig(
        name="libero",
        policy=_full_size(5, 180),
        agent=AgentConfig(
            critic=CriticConfig(
                num_critics=12, hidden_dims=(512, 512, 256, 128), dropout_rate=0.15, q_aggregation="min"
            ),
            temperature=TemperatureConfig(initial_temp=1.5, target_entropy_multiplier=0.7),
            loss_weights=LossWeights(bc_weight=0.1, alpha_weight=1.2),
            best_of_n_samples=64,
            best_of_n_strategy="parallel",
            typical_share=0.5,
            flow_steps=20,
            discount=0.98,
            target_update_tau=0.01,
        ),
        data=DataConfig(
            path="data/libero",
            action_dim=7,
            robot="libero",
            batch_size=256,
            sequence_ratio=0.6,
            action_normalization="z_score",
        ),
        optimizers=OptimizersConfig(
            policy=_cosine(3000, 3e-4, 50_000, 3e-5),
            critic=_cosine(1500, 1e-3, 40_000, 1e-4),
            temperature=_cosine(1500, 1e-3, 40_000, 1e-4),
        ),
        offline_steps=1_000_000,
        online_steps=500_000,
    )


get_droid_acrlpd_config = get_droid_config  # the names in the founding design
get_aloha_acrlpd_config = get_aloha_config
get_libero_acrlpd_config = get_libero_config

PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": get_demo_config,
    "demo-vision": get_demo_vision_config,
    "demo-cube": get_demo_cube_config,
    "demo-aloha": get_demo_aloha_config,
    "demo-libero": get_demo_libero_config,
    "debug": get_debug_config,
    "droid": get_droid_config,
    "aloha": get_aloha_config,
    "libero": get_libero_config,
}


def get_preset(name: str) -> TrainConfig:
    """Return the preset ``name``; the error for an unknown one suggests the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}: {hint}There are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name](), preset=name)


def with_algorithm(config: TrainConfig, name: str, *, judge: bool = True) -> TrainConfig:
    """Return ``config`` with another algorithm, but its sizes, rates, N and K. docs/algorithm.md lists the differences.

    ``name``: one of ``ALGORITHMS``. ``judge``: see ``from_dict``.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: there are {', '.join(ALGORITHMS)}")
    return from_dict(TrainConfig, ALGORITHMS[name](config), base=config, judge=judge)


def _acrlpd(config: TrainConfig) -> Changes:
    """The preset as it is."""
    return {}


# acrlpd train PRESET --algorithm lean
# One cube of OGBench's in 37 % [29, 45] of the episodes, two in 36 % [29, 44], where qc has 23 % [17, 30] and 26 %
# [20, 34] at equal data and updates (docs/results.md, "What each method learns").
def _lean(config: TrainConfig, **target: int) -> Changes:
    """Ours with two critics and no learned temperature."""
    agent = {"critic": {"num_critics": 2}, "temperature": {"adaptive": False}, "top_k": 1, "policy_ema_decay": 0.998}
    return {"agent": agent | {"target_samples": None, "target_flow_steps": None} | target, "updates_per_call": 5}


# acrlpd train PRESET --algorithm lean-cheap
# 80 % on cube-single's play data in 0.32 of the CPU time of qc (docs/results.md, "Time to success on play data"); it is
# behind qc on few scripted episodes.
def _lean_cheap(config: TrainConfig) -> Changes:
    """The same with a cheaper target: the best of 2 chunks by three Euler steps."""
    return _lean(config, target_samples=2, target_flow_steps=3)


def _bc(config: TrainConfig) -> Changes:
    """Imitation with the flow alone, without critics or an online phase."""
    return {"agent": {"algorithm": "bc", "target": "best_of_n"}, "online_steps": 0}


def _qc(config: TrainConfig, **changes: Any) -> Changes:
    """Q-chunking with best of N (Li et al. 2025, arXiv:2507.07969)."""
    agent = _plain(
        config,
        critic=_plain_critic(config, num_critics=2),
        temperature=to_dict(TemperatureConfig(adaptive=False)),
        **{"top_k": 1, **changes},  # QC explores with the best candidate, as it acts
    )
    return {"agent": agent, "data": {"sequence_ratio": 0.0, "online_ratio": None, "ends_in_chunks": False}}


def _qc_fql(config: TrainConfig) -> Changes:
    """Q-chunking with a distilled one-step policy (Li et al. 2025, arXiv:2507.07969)."""
    return _qc(config, extraction="distill", best_of_n_samples=1, distill_weight=100.0)


def _rlpd_ac(config: TrainConfig) -> Changes:
    """Soft actor-critic on chunks with prior data, online from the first step (Ball et al. 2023, arXiv:2302.02948)."""
    agent = _plain(
        config,
        algorithm="rlpd_ac",
        critic=_plain_critic(config, num_critics=10),
        temperature=to_dict(TemperatureConfig(initial_temp=1.0, target_entropy_multiplier=0.5)),
        loss_weights=to_dict(LossWeights(bc_weight=0.0)),
        target_samples=1,
    )
    return {
        "agent": agent,
        "data": {"online_ratio_episodes": 1},  # RLPD: half of each batch is online data from the first episode on
        "policy": {"kind": "gaussian", "freeze_pi0_backbone": False, "weights": None},
        "offline_steps": 0 if config.online_steps else config.offline_steps,
        "online_loss_weights": None,
    }


def _plain(config: TrainConfig, **changes: Any) -> Changes:
    """Return an agent's fields at the preset's sizes, without the features that only our algorithm has."""
    sizes = ("discount", "target_update_tau", "best_of_n_samples", "best_of_n_strategy", "flow_steps", "action_clip")
    plain = to_dict(AgentConfig(act_by_target_critic=False))
    return plain | {name: getattr(config.agent, name) for name in sizes} | changes


def _plain_critic(config: TrainConfig, *, num_critics: int) -> Changes:
    plain = {"num_critics": num_critics, "q_aggregation": "mean", "dropout_rate": 0.0}
    return to_dict(config.agent.critic) | plain


Changes = dict[str, Any]  # changed fields of a configuration, nested
ALGORITHMS: dict[str, Callable[[TrainConfig], Changes]] = {
    "acrlpd": _acrlpd,
    "lean": _lean,
    "lean-cheap": _lean_cheap,
    "bc": _bc,
    "qc": _qc,
    "qc-fql": _qc_fql,
    "rlpd-ac": _rlpd_ac,
}
