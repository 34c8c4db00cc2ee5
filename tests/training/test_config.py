import dataclasses
import json
import typing

import pytest

from acrlpd import presets
from acrlpd.config import TrainConfig, from_dict, to_dict
from acrlpd.overrides import apply_config_overrides


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_survives_json(name):
    config = presets.get_preset(name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("algorithm", presets.ALGORITHMS)
def test_an_algorithm_keeps_the_presets_sizes_and_is_the_same_twice(algorithm):
    demo = presets.get_preset("demo")
    config = presets.with_algorithm(demo, algorithm)
    assert presets.with_algorithm(config, algorithm) == config
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    for name in ("env", "optimizers"):
        assert getattr(config, name) == getattr(demo, name)
    drawing = ("sequence_ratio", "online_ratio", "online_ratio_episodes", "ends_in_chunks")
    assert dataclasses.replace(config.data, **{name: getattr(demo.data, name) for name in drawing}) == demo.data
    assert (config.data == demo.data) == (algorithm in ("acrlpd", "bc"))  # the others draw as their authors do
    assert config.agent.flow_steps == demo.agent.flow_steps


def test_unknown_algorithm_names_those_there_are():
    with pytest.raises(ValueError, match="unknown algorithm 'sac': there are acrlpd, bc, qc, qc-fql, rlpd-ac"):
        presets.with_algorithm(presets.get_preset("demo"), "sac")


def test_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=r"agent\.discont: did you mean agent\.discount\?"):
        from_dict(TrainConfig, {"agent": {"discont": 0.9}})


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'demo-vision'"):
        presets.get_preset("demo_visoin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execute_horizon": 6}, "cannot execute more steps than it predicts"),
        ({"utd_ratio": 0.0}, "utd_ratio must be positive"),
        ({"env": None}, r"needs data\.path"),
        ({"offline_steps": -1}, "offline_steps must not be negative"),
        ({"log_frequency": 0}, "log_frequency must be at least 1"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(presets.get_preset("demo"), **changes)


OUT_OF_RANGE = {
    **{f"policy.{name}": 0 for name in ("action_horizon", "action_dim", "vocab_size", "max_token_len", "image_size")},
    "policy.hidden_dims": [8, 0],
    "agent.critic.num_critics": 0,
    "agent.critic.hidden_dims": [8, 0],
    "agent.critic.dropout_rate": 1,
    "agent.critic.kernel_init_scale": 0,
    "agent.temperature.initial_temp": 0,
    "agent.temperature.target_entropy_multiplier": "inf",
    **{
        f"{group}.{name}_weight": -5
        for group in ("agent.loss_weights", "online_loss_weights")
        for name in ("critic", "actor", "bc", "alpha")
    },
    "agent.discount": 0,
    "agent.target_update_tau": 2,
    "agent.policy_ema_decay": 1,
    **{f"agent.{name}_samples": 0 for name in ("best_of_n", "target", "actor")},
    **{f"agent.{name}": 0 for name in ("best_of_n_block", "best_of_n_bytes", "top_k", "gradient_accumulation_steps")},
    **{f"agent.{name}flow_steps": 0 for name in ("", "candidate_", "target_")},
    **{f"agent.{name}": -1 for name in ("huber_delta", "action_clip", "diversity_bonus", "distill_weight")},
    "agent.guidance_weights": [1, -1],
    "agent.bc_weighting_temperature": 0,
    "agent.bc_weighting_bound": 0.5,
    "agent.health.spike_factor": 1,
    "agent.health.spike_floor": -1,
    **{f"data.{name}": 0 for name in ("action_dim", "batch_size", "max_replay_bytes", "online_ratio_episodes")},
    **{f"data.{name}": -1 for name in ("memory_bytes", "prefix_bytes", "num_workers", "min_std")},
    **{f"data.{name}_ratio": 1.5 for name in ("sequence", "online")},
    "data.fps": 0,
    "data.tolerance_s": -1,
    "data.episodes": [3, -1],
    "data.weights": [1, 0],
    "data.collect.episodes": 0,
    "data.collect.num_workers": 0,
    "data.collect.noise_range": [0.5, 0.4],
    **{
        f"optimizers.{group}.{name}": value
        for group in ("policy", "critic", "temperature")
        for name, value in {
            "schedule.warmup_steps": -1,
            "schedule.peak_lr": -1,
            "schedule.decay_steps": 0,
            "schedule.decay_lr": -1,
            "schedule.rsqrt_timescale": 0,
            "b1": 2,
            "b2": 1,
            "eps": 0,
            "weight_decay": -1,
            "clip_gradient_norm": -3,
        }.items()
    },
    **{f"eval.{name}": 0 for name in ("episodes", "frequency", "progress_episodes", "num_envs")},
    "eval.first_seed": -1,
    "env.max_episode_steps": 0,
    "env.image_size": 0,
    "rollout.num_workers": -1,
    "rollout.timeout_s": 0,
    **{f"{name}_steps": -1 for name in ("offline", "online", "warmup_env", "actor_warmup", "critic_alone")},
    **dict.fromkeys(("utd_ratio", "updates_per_call", "online_envs", "execute_horizon", "fsdp_devices"), 0),
    **dict.fromkeys(("online_transition_steps", "log_frequency", "save_frequency", "max_to_keep"), 0),
    **dict.fromkeys(("keep_period", "max_skipped_updates", "early_stopping_patience"), 0),
    "seed": -1,
    "max_rollbacks": 4,
    "early_stopping_success": 1.5,
}


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match=field.split(".")[-1]):
        apply_config_overrides(presets.get_preset("demo"), {field: OUT_OF_RANGE[field]})


ANY_NUMBER = {"data.rewards.success_reward", "data.cube_goal", "data.button_goal", "data.delta_mask"}


def test_every_number_has_a_range():
    """Those of ``data.sources`` are those of ``data`` once more, see ``test_sets.py``."""
    hints = ((field, hint) for field, hint in _hints(TrainConfig) if not field.startswith("data.sources."))
    kinds = {field: repr(hint) for field, hint in hints}
    numbers = {field for field, hint in kinds.items() if "int" in hint or "float" in hint}
    assert numbers - {field for field, hint in kinds.items() if "Literal" in hint} == OUT_OF_RANGE.keys() | ANY_NUMBER


def _hints(cls, path=""):
    for name, hint in typing.get_type_hints(cls).items():
        options = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
        if options:
            yield from _hints(options[0], f"{path}{name}.")
        else:
            yield f"{path}{name}", hint
