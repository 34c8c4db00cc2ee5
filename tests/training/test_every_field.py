"""Every field of a run's configuration has an effect, and so has every value that a preset sets.

``SEEN`` has for each field a way to look (``looks.py``), a value for it, and what else must be set for it to matter:
the look must tell the tiny run with the value from the one without. ``ELSEWHERE`` names the test that observes a field
where a look would be no cheaper. A new field fails here until it is in one of the two.
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.envs.test_custom import CAR
from tests.training import looks
from tests.training.looks import differ, leaves

from acrlpd import presets
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.cli import train
from acrlpd.cli.configured import starting_point
from acrlpd.config import CollectConfig, DataConfig, EvalConfig, TrainConfig
from acrlpd.envs.env import EnvConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.overrides import apply_config_overrides

NANO = dataclasses.replace(presets.NANO, action_horizon=3, image_size=16)

TINY = TrainConfig(
    env=EnvConfig("counting"),
    policy=NANO,
    agent=AgentConfig(
        critic=CriticConfig(num_critics=2, hidden_dims=(4,)), best_of_n_samples=4, target_samples=2, flow_steps=3
    ),
    data=DataConfig(path="none", collect=CollectConfig(policy="expert"), batch_size=8, action_normalization="z_score"),
    eval=EvalConfig(frequency=10),
    offline_steps=20,
    online_steps=40,
    online_loss_weights=LossWeights(),
    online_transition_steps=10,
    log_frequency=5,
    save_frequency=7,
    early_stopping_patience=3,
)

COUNTING = f"custom/{inspect.getfile(looks.CountingSimulator)}:CountingSimulator"
COLLECTED = {"data.path": None, "data.action_normalization": "bounds"}
MANY = {"agent.best_of_n_samples": 9, "agent.target_samples": 9}
IMPLICIT = {"agent.target": "implicit", "agent.temperature.adaptive": False}
SHORT = {"agent.critic.horizon": 2, "execute_horizon": 2}
FULL = {"policy.paligemma_variant": "gemma_2b", "policy.action_expert_variant": "gemma_300m"}
WANDB, DATA = {"loggers.kinds": ["wandb"]}, "tests/training/test_data_options.py::"

SEEN: dict[str, tuple[Any, Any] | tuple[Any, Any, dict[str, Any]]] = {
    "preset": (looks.described, "demo"),
    "name": (looks.reading_room, "other"),
    "run_dir": (looks.reading_room, "elsewhere"),
    "seed": (looks.fresh, 1),
    "env.name": (looks.named, COUNTING, {"env.name": CAR}),
    "env.max_episode_steps": (looks.world, 5),
    "env.cameras": (looks.world, ["front"]),
    "env.image_size": (looks.world, 8, {"env.cameras": ["front"]}),
    "env.reward": (looks.world, "0/1"),
    "env.instruction": (looks.world, "count on"),
    "policy.kind": (looks.shapes, "pi05", {"data.action_normalization": "quantile"}),
    "policy.action_horizon": (looks.shapes, 4),
    "policy.action_dim": (looks.shapes, 6),
    "policy.paligemma_variant": (looks.shapes, "gemma_2b_lora", FULL),
    "policy.action_expert_variant": (looks.shapes, "gemma_300m_lora", FULL),
    "policy.vision_variant": (looks.shapes, "mid", {"policy.image_size": 112}),
    "policy.vocab_size": (looks.shapes, 2048),
    "policy.max_token_len": (looks.shapes, 12),
    "policy.image_size": (looks.shapes, 32),
    "policy.dtype": (looks.update_program, "bfloat16"),
    "policy.remat": (looks.update_program, True),
    "policy.unroll": (looks.update_program, True),
    "policy.hidden_dims": (looks.shapes, [8], {"policy.kind": "mlp_flow"}),
    "policy.freeze_pi0_backbone": (looks.shapes, True),
    "policy.frozen_dtype": (looks.shapes, "bfloat16", {"policy.freeze_pi0_backbone": True}),
    "policy.tokenizer": (looks.tokens, "absent.model"),
    "agent.algorithm": (looks.learning, "bc"),
    "agent.critic.horizon": (looks.learning, 3, {"execute_horizon": 2}),
    "agent.critic.backup_horizon": (looks.learning, 3, IMPLICIT | SHORT),
    "agent.critic.distill_level": (looks.learning, 0.6, IMPLICIT | SHORT | {"agent.critic.backup_horizon": 3}),
    "agent.critic.num_critics": (looks.learning, 3),
    "agent.critic.hidden_dims": (looks.learning, [8]),
    "agent.critic.activation": (looks.learning, "relu"),
    "agent.critic.use_layer_norm": (looks.learning, False),
    "agent.critic.dropout_rate": (looks.learning, 0.1),
    "agent.critic.kernel_init_scale": (looks.fresh, 2.0),
    "agent.critic.q_aggregation": (looks.learning, "mean"),
    "agent.critic.pessimism": (looks.learning, 1.0, {"agent.critic.q_aggregation": "mean_minus_std"}),
    "agent.critic.use_pi0_features": (looks.valuing, False),
    "agent.critic.feature_fusion_method": (looks.valuing, "mlp"),
    "agent.temperature.initial_temp": (looks.fresh, 0.5),
    "agent.temperature.target_entropy_multiplier": (looks.learning, 2.0),
    "agent.temperature.adaptive": (looks.learning, False),
    **{f"agent.loss_weights.{name}_weight": (looks.story, 0.3) for name in ("critic", "actor", "bc", "alpha")},
    "agent.extraction": (looks.learning, "q_gradient"),
    "agent.target": (looks.learning, "implicit", {"agent.temperature.adaptive": False}),
    "agent.implicit.statistic": (looks.learning, "quantile", IMPLICIT),
    "agent.implicit.level": (looks.learning, 0.7, IMPLICIT),
    "agent.discount": (looks.learning, 0.9),
    "agent.target_update_tau": (looks.learning, 0.1),
    "agent.act_by_target_critic": (looks.acting, False),
    "agent.policy_ema_decay": (looks.learning, 0.9),
    "agent.gradient_accumulation_steps": (looks.learning, 2),
    "agent.best_of_n_samples": (looks.acting, 5),
    "agent.target_samples": (looks.learning, 3),
    "agent.best_of_n_strategy": (looks.learning, "sequential"),
    "agent.best_of_n_block": (looks.learning, 3, {**MANY, "agent.best_of_n_strategy": "chunked"}),
    "agent.best_of_n_bytes": (looks.learning, 1, {"agent.best_of_n_strategy": "auto"}),
    "agent.top_k": (looks.acting, 2),
    "agent.typical_share": (looks.acting, 0.5),
    "agent.diversity_bonus": (looks.acting, 0.5),
    "agent.flow_steps": (looks.acting, 4),
    "agent.candidate_flow_steps": (looks.acting, 1),
    "agent.target_flow_steps": (looks.learning, 2),
    "agent.action_clip": (looks.acting, 1.0),
    "agent.huber_delta": (looks.learning, 1.0),
    "agent.actor_samples": (looks.learning, 3, {"agent.extraction": "q_gradient"}),
    "agent.distill_weight": (looks.learning, 5.0, {"agent.extraction": "distill"}),
    "agent.target_guidance": (looks.learning, True, {"agent.extraction": "guided"}),
    "agent.bc_weighting": (looks.learning, "importance"),
    "agent.bc_weighting_temperature": (looks.learning, 2.0, {"agent.bc_weighting": "difficulty"}),
    "agent.bc_weighting_bound": (looks.learning, 3.0, {"agent.bc_weighting": "difficulty"}),
    "agent.health.spike_factor": (looks.learning, 50.0),
    "agent.health.spike_floor": (looks.learning, 10.0),
    "data.path": (looks.mapped, "other"),
    "data.weights": (looks.mapped, [1, 2], {"data.path": ["one", "other"]}),
    "data.sources": (looks.mapped, [{"path": "one", "drop_idle": True}], {"data.path": None}),
    "data.robot": (looks.mapped, "aloha"),
    "data.delta_mask": (looks.mapped, [1, -1]),
    "data.rewards.source": (looks.rewarded, "sparse"),
    "data.rewards.convention": (looks.rewarded, "as_stored"),
    "data.rewards.success": (looks.rewarded, True),
    "data.rewards.terminal_on_failure": (looks.rewarded, True),
    "data.rewards.success_reward": (looks.rewarded, 2.0),
    "data.collect.episodes": (looks.collecting, 3, COLLECTED),
    "data.collect.policy": (looks.collecting, "random", COLLECTED),
    "data.collect.noise_range": (looks.collecting, [0.1, 0.2], COLLECTED),
    "data.collect.num_workers": (looks.collecting, 2, COLLECTED),
    "data.batch_size": (looks.batches, 16),
    "data.sequence_ratio": (looks.batches, 1.0),
    "data.online_ratio": (looks.batches, 0.25, {"data.online_ratio_episodes": 1}),
    "data.online_ratio_episodes": (looks.batches, 5),
    "data.ends_in_chunks": (looks.batches, False, {"data.online_ratio_episodes": 1}),
    "data.max_replay_bytes": (looks.experience, 20_000),
    "data.min_std": (looks.statistics, 50.0),
    "data.action_normalization": (looks.statistics, "bounds"),
    **{
        f"optimizers.{group}.{name}": (looks.descent, value, also)
        for group in ("policy", "critic", "temperature")
        for name, value, also in (
            ("schedule.warmup_steps", 10, {}),
            ("schedule.peak_lr", 1e-3, {}),
            ("schedule.decay_steps", 40_000, {}),
            ("schedule.decay_lr", 1e-7, {}),
            ("schedule.rsqrt_timescale", 1000.0, {}),
            ("b1", 0.5, {}),
            ("b2", 0.5, {}),
            ("eps", 1e-3, {}),
            ("weight_decay", 0.1, {}),
            ("clip_gradient_norm", 3.0, {}),
        )
    },
    "eval.episodes": (looks.story, 3),
    "eval.frequency": (looks.story, 6),
    "eval.progress_episodes": (looks.story, 3),
    "eval.num_envs": (looks.reading_room, 3),
    "eval.first_seed": (looks.story, 5),
    "offline_steps": (looks.story, 10),
    "online_steps": (looks.story, 10),
    "utd_ratio": (looks.story, 0.5),
    "updates_per_call": (looks.story, 3),
    "warmup_env_steps": (looks.story, 8),
    "online_envs": (looks.experience, 3),
    "rollout.backend": (looks.staging, "ray", {"rollout.num_workers": 2}),
    "rollout.num_workers": (looks.staging, 2),
    "rollout.timeout_s": (looks.staging, 3.0, {"rollout.num_workers": 2}),
    "overlap_rollouts": (looks.story, True),
    "execute_horizon": (looks.experience, 2),
    "actor_warmup_steps": (looks.story, 3),
    "critic_alone_steps": (looks.story, 3),
    **{f"online_loss_weights.{name}_weight": (looks.story, 0.3) for name in ("critic", "actor", "bc", "alpha")},
    "online_transition_steps": (looks.story, 20, {"online_loss_weights.bc_weight": 0.0}),
    "log_frequency": (looks.story, 3),
    "loggers.kinds": (looks.logged, ["trackio"]),
    "loggers.project": (looks.logged, "mine", WANDB),
    "loggers.wandb_mode": (looks.logged, "offline", WANDB),
    "save_frequency": (looks.story, 4),
    "early_stopping_patience": (looks.story, 1),
    "early_stopping_success": (looks.story, 0.5),
    "asset_id": (looks.story, "mine"),
    "fsdp_devices": (looks.placed, 2),
}

ELSEWHERE = {
    "agent.guidance_weights": "tests/agents/test_guided.py::test_following_the_gradient_raises_the_value",
    "policy.weights": "tests/training/test_setup.py::test_training_starts_from_the_weights_asked_for",
    "data.norm_stats": DATA + "test_a_run_takes_over_statistics",
    "data.action_dim": DATA + "test_batches_are_drawn_as_asked",
    "data.cameras": DATA + "test_what_is_read",
    "data.state_keys": DATA + "test_what_is_read",
    "data.action_keys": DATA + "test_what_is_read",
    "data.default_task": DATA + "test_what_is_read",
    "data.filter_key": DATA + "test_what_is_read",
    **{
        f"data.{name}": DATA + "test_an_option_is_the_readers_or_refused"
        for name in (
            *("fps", "episodes", "tolerance_s", "check_images", "align_observations", "jpeg_bgr", "drop_idle"),
            "clip_actions",
        )
    },
    "data.frame_cache": DATA + "test_what_is_read",
    "data.cube_goal": DATA + "test_play_data_needs_a_goal",
    "data.button_goal": DATA + "test_play_data_needs_a_goal",
    "data.on_bad_episode": DATA + "test_skipped_episodes_are_counted_and_told",
    "data.validation_fraction": "tests/data/test_held_out.py::test_a_run_trains_on_the_others_alone",
    "data.validation_seed": "tests/data/test_held_out.py::test_a_run_trains_on_the_others_alone",
    "data.memory_bytes": DATA + "test_where_rows_are_held",
    "data.num_workers": DATA + "test_where_rows_are_held",
    "data.prefix_bytes": "tests/training/test_prefixes.py::test_more_than_the_budget_is_not_stored",
    "policy.frozen": "tests/training/test_improve.py::test_a_frozen_policy_has_no_optimiser_and_is_linked",
    "eval.held_out_chunks": "tests/training/test_held_out_runs.py::test_the_best_policy_is_that_of_the_smallest_error",
    "max_to_keep": "tests/training/test_resume.py::test_which_checkpoints_stay",
    "keep_period": "tests/training/test_resume.py::test_which_checkpoints_stay",
    "max_skipped_updates": "tests/training/test_faults.py::test_many_skipped_updates_roll_the_run_back",
    "max_rollbacks": "tests/training/test_faults.py::test_a_run_that_no_rollback_helps_ends",
}


def test_no_field_is_forgotten():
    fields = set(leaves(TINY))
    assert fields == SEEN.keys() | ELSEWHERE.keys()
    assert not SEEN.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("field", ELSEWHERE)
def test_the_test_that_observes_a_field_is_there_and_sets_it(field):
    """As an argument, a key of a dictionary, or a flag; to speak of it is not enough."""
    file, name = ELSEWHERE[field].split("::")
    source = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(found) == 1
    arguments = {node.arg for node in ast.walk(found[0]) if isinstance(node, ast.keyword)}
    keys = {
        ast.unparse(key).strip("'") for node in ast.walk(found[0]) if isinstance(node, ast.Dict) for key in node.keys
    }
    words = {node.value for node in ast.walk(found[0]) if isinstance(node, ast.Constant)}
    assert field.split(".")[-1] in arguments | keys or f"--{field}" in words


@pytest.mark.parametrize("field", SEEN)
def test_a_field_has_an_effect(field):
    look, value, *rest = SEEN[field]
    base = apply_config_overrides(TINY, rest[0] if rest else {})
    changed = apply_config_overrides(base, {field: value})
    assert changed != base, "the value is the one it had"
    assert differ(look, base, changed), f"{field} changes nothing that {look.__name__} sees"


@pytest.mark.parametrize("look", dict.fromkeys(look for look, *_ in SEEN.values()))
def test_a_look_sees_no_difference_where_there_is_none(look):
    """Equal configurations, the second not from the cache: a look that always sees something would pass any field."""
    also = next(rest[0] if rest else {} for each, _, *rest in SEEN.values() if each is look)
    one, other = (apply_config_overrides(TINY, also) for _ in range(2))
    if look is looks.story:
        assert all(look(one, place) == look(other, place) for place in looks.places(one)[:2])
    else:
        assert bool(looks._outcome(look, one) == look(other))


# ---- presets

DEFAULT = TrainConfig(env=EnvConfig(), online_loss_weights=LossWeights())


def set_by_presets() -> list[tuple[str, str]]:
    found = []
    for name in presets.PRESETS:
        values = leaves(presets.get_preset(name))
        for field, value in values.items():
            if field in SEEN and value != leaves(DEFAULT).get(field, value):
                found.append((name, field))
    return found


NARROW = {"agent.best_of_n_strategy": {"agent.best_of_n_bytes": 1}}  # a look's few candidates would fit any other


REFUSED = {  # what is said of the field's default in a preset that cannot have it, if not the field's name
    "policy.paligemma_variant": "experts that share attention must agree",
    "policy.action_expert_variant": "experts that share attention must agree",
    "policy.vision_variant": "patches of 14 pixels do not tile an image of 64 pixels",
    "env.name": f"{EnvConfig().name} has no camera",
}


@pytest.mark.parametrize(("name", "field"), set_by_presets())
def test_a_presets_value_has_an_effect(name, field):
    """Against the same preset with the field's default."""
    preset = apply_config_overrides(presets.get_preset(name), NARROW.get(field, {}))
    look = SEEN[field][0]
    try:
        without = apply_config_overrides(preset, {field: leaves(DEFAULT)[field]})
        if look is not looks.story:
            look(without)
    except ValueError as error:
        if REFUSED.get(field, field.rpartition(".")[2]) in str(error):
            return  # the preset cannot be without it
        raise
    except ImportError as error:
        pytest.skip(str(error))  # of a simulator
    assert differ(look, preset, without)


TABLES = {
    "droid": """
        pi0_config: {action_dim: 8, action_horizon: 10, max_token_len: 180, diffusion_steps: 50}
        offline_steps: 2000000
        online_steps: 200000
        batch_size: 64
        sequence_ratio: 0.7
        best_of_n_samples: 16
        critic_config: {num_critics: 10, hidden_dims: [512, 512, 256], dropout_rate: 0.1, q_aggregation: min,
                        use_pi0_features: true, feature_fusion_method: concat}
        loss_weights: {bc_weight: 0.01, critic_weight: 1.0, actor_weight: 1.0, alpha_weight: 1.0}
        pi0_lr_schedule: {warmup_steps: 5000, peak_lr: 3e-5, decay_steps: 100000, decay_lr: 3e-6}
        critic_lr_schedule: {warmup_steps: 2000, peak_lr: 5e-4, decay_steps: 80000, decay_lr: 5e-5}
        freeze_pi0_backbone: false
        target_update_tau: 0.005
        discount: 0.995
        temperature_config: {initial_temp: 1.0, target_entropy_multiplier: 0.5, adaptive: true}
    """,
    "aloha": """
        pi0_config: {action_dim: 14, action_horizon: 20, max_token_len: 250, diffusion_steps: 30}
        offline_steps: 500000
        online_steps: 100000
        batch_size: 128
        sequence_ratio: 0.8
        best_of_n_samples: 32
        critic_config: {num_critics: 8, hidden_dims: [256, 256, 128], dropout_rate: 0.05, q_aggregation: mean,
                        use_pi0_features: true, feature_fusion_method: mlp}
        loss_weights: {bc_weight: 0.001, critic_weight: 1.0, actor_weight: 1.0, alpha_weight: 0.8}
        pi0_lr_schedule: {warmup_steps: 2000, peak_lr: 5e-6, decay_steps: 30000, decay_lr: 1e-6}
        critic_lr_schedule: {warmup_steps: 1000, peak_lr: 1e-4, decay_steps: 25000, decay_lr: 1e-5}
        freeze_pi0_backbone: true
        target_update_tau: 0.01
        discount: 0.99
        gradient_accumulation_steps: 2
        temperature_config: {initial_temp: 0.5, target_entropy_multiplier: 0.3, adaptive: true}
    """,
    "libero": """
        pi0_config: {action_dim: 7, action_horizon: 5, max_token_len: 180, diffusion_steps: 20}
        offline_steps: 1000000
        online_steps: 500000
        batch_size: 256
        sequence_ratio: 0.6
        best_of_n_samples: 64
        critic_config: {num_critics: 12, hidden_dims: [512, 512, 256, 128], dropout_rate: 0.15, q_aggregation: min,
                        use_pi0_features: true, feature_fusion_method: concat}
        loss_weights: {bc_weight: 0.1, critic_weight: 1.0, actor_weight: 1.0, alpha_weight: 1.2}
        pi0_lr_schedule: {warmup_steps: 3000, peak_lr: 3e-4, decay_steps: 50000, decay_lr: 3e-5}
        critic_lr_schedule: {warmup_steps: 1500, peak_lr: 1e-3, decay_steps: 40000, decay_lr: 1e-4}
        freeze_pi0_backbone: false
        target_update_tau: 0.01
        discount: 0.98
        gradient_accumulation_steps: 1
        temperature_config: {initial_temp: 1.5, target_entropy_multiplier: 0.7, adaptive: true}
    """,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_preset_has_every_value_of_the_founding_table(name):
    """The table, laid over the preset, changes nothing; over another preset it does."""
    table = yaml.safe_load(TABLES[name])
    assert apply_config_overrides(presets.get_preset(name), table) == presets.get_preset(name)
    assert apply_config_overrides(presets.get_preset("demo"), table) != presets.get_preset("demo")


@pytest.mark.parametrize("name", ["droid", "aloha", "libero", "debug"])
def test_every_field_is_a_flag(name):
    """One preset becomes another when all of its fields are said on the command line."""
    target = dataclasses.replace(presets.get_preset(name), env=EnvConfig(CAR), online_loss_weights=LossWeights(0.5))
    flags = [word for field, value in leaves(target).items() for word in words(field, value)]
    config, rest = starting_point("demo", flags)
    assert train._parse(config, "demo", rest).config == target
    assert starting_point("droid", ["--env.name", CAR])[0].env == EnvConfig()  # parts that are not there by default


def words(field: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        path, _, last = field.rpartition(".")
        return (
            [f"--{path}.{last}" if value else f"--{path}.no-{last}"] if path else [f"--{'' if value else 'no-'}{last}"]
        )
    if isinstance(value, tuple):
        return [f"--{field}", *(str(item) for item in value)]
    return [f"--{field}", str(value)]
