import dataclasses
import json
import re

import numpy as np
import pytest

from acrlpd import fields, presets
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.losses import LossWeights
from acrlpd.config import ConfigError, TrainConfig, from_dict, from_stored, to_dict
from acrlpd.envs.env import EnvConfig
from acrlpd.models.critic import CriticConfig
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
    draws_alike = algorithm in ("acrlpd", "lean", "lean-cheap", "bc")  # the others draw as their authors do
    assert (config.data == demo.data) == draws_alike
    assert config.agent.flow_steps == demo.agent.flow_steps


RECIPE = {  # of the measurements in docs/results.md
    "agent.critic.num_critics": 2,
    "agent.temperature.adaptive": False,
    "agent.top_k": 1,
    "agent.target_samples": None,
    "agent.target_flow_steps": None,
    "agent.policy_ema_decay": 0.998,
    "updates_per_call": 5,
}
CHEAP_TARGET = {"agent.target_samples": 2, "agent.target_flow_steps": 3}


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_the_measured_recipe_has_a_name(preset):
    config = presets.get_preset(preset)
    assert presets.with_algorithm(config, "lean") == apply_config_overrides(config, RECIPE)
    assert presets.with_algorithm(config, "lean-cheap") == apply_config_overrides(config, RECIPE | CHEAP_TARGET)


def test_unknown_algorithm_names_those_there_are():
    known = "acrlpd, lean, lean-cheap, bc, qc, qc-fql, rlpd-ac"
    with pytest.raises(ValueError, match=f"unknown algorithm 'sac': there are {known}"):
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
        ({"utd_ratio": 0.0}, "utd_ratio must be a number above 0, got 0"),
        ({"env": None}, r"needs data\.path"),
        ({"offline_steps": -1}, "offline_steps must be a whole number of at least 0, got -1"),
        ({"log_frequency": 0}, "log_frequency must be a whole number of at least 1, got 0"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(presets.get_preset("demo"), **changes)


@pytest.mark.parametrize(
    ("horizon", "executed", "expected"),
    [(None, None, 5), (None, 2, 2), (3, 2, 3), (5, 2, 5), (5, None, 5)],  # the demo predicts 5
)
def test_critics_judge_what_is_executed_unless_a_horizon_is_named(horizon, executed, expected):
    changes = {"agent.critic.horizon": horizon, "execute_horizon": executed}
    config = apply_config_overrides(presets.get_preset("demo"), changes)
    assert config.critic_horizon == expected
    stored = from_stored(json.loads(json.dumps(to_dict(config))))
    assert stored == config.with_critic_horizon(expected)
    assert dataclasses.replace(stored, execute_horizon=1).critic_horizon == expected  # its critics fit no other


@pytest.mark.parametrize(("horizon", "executed"), [(6, None), (6, 2), (2, 3), (4, None)])
def test_critics_judge_neither_less_than_is_executed_nor_more_than_is_predicted(horizon, executed):
    with pytest.raises(ValueError, match=rf"agent\.critic\.horizon \({horizon}\) must lie between the steps that are"):
        apply_config_overrides(
            presets.get_preset("demo"), {"agent.critic.horizon": horizon, "execute_horizon": executed}
        )


@pytest.mark.parametrize("executed", [None, 2])
def test_a_run_from_before_the_field_has_critics_of_whole_chunks(executed):
    config = dataclasses.replace(presets.get_preset("demo"), execute_horizon=executed)
    values = to_dict(config)
    for name in ("horizon", "pessimism"):
        del values["agent"]["critic"][name]
    assert from_stored(values) == config.with_critic_horizon(5)


OUT_OF_RANGE = {
    **{f"policy.{name}": 0 for name in ("action_horizon", "action_dim", "vocab_size", "max_token_len", "image_size")},
    "policy.hidden_dims": [8, 0],
    "agent.critic.horizon": 0,
    "agent.critic.num_critics": 0,
    "agent.critic.hidden_dims": [8, 0],
    "agent.critic.dropout_rate": 1,
    "agent.critic.kernel_init_scale": 0,
    "agent.critic.pessimism": -1,
    "agent.critic.backup_horizon": 0,
    "agent.critic.distill_level": 1,
    "agent.temperature.initial_temp": 0,
    "agent.temperature.target_entropy_multiplier": "inf",
    **{
        f"{group}.{name}_weight": -5
        for group in ("agent.loss_weights", "online_loss_weights")
        for name in ("critic", "actor", "bc", "alpha")
    },
    "agent.implicit.level": 1,
    "agent.discount": 0,
    "agent.target_update_tau": 2,
    "agent.policy_ema_decay": 1,
    **{f"agent.{name}_samples": 0 for name in ("best_of_n", "target", "actor")},
    **{f"agent.{name}": 0 for name in ("best_of_n_block", "best_of_n_bytes", "top_k", "gradient_accumulation_steps")},
    **{f"agent.{name}flow_steps": 0 for name in ("", "candidate_", "target_")},
    **{f"agent.{name}": -1 for name in ("huber_delta", "action_clip", "diversity_bonus", "distill_weight")},
    "agent.guidance_weights": [1, -1],
    "agent.typical_share": 0,
    "agent.bc_weighting_temperature": 0,
    "agent.bc_weighting_bound": 0.5,
    "agent.health.spike_factor": 1,
    "agent.health.spike_floor": -1,
    **{f"data.{name}": 0 for name in ("action_dim", "batch_size", "max_replay_bytes", "online_ratio_episodes")},
    **{f"data.{name}": -1 for name in ("memory_bytes", "prefix_bytes", "num_workers", "min_std", "validation_seed")},
    "data.validation_fraction": 1,
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
    **{f"eval.{name}": 0 for name in ("episodes", "frequency", "progress_episodes", "num_envs", "held_out_chunks")},
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
def test_what_is_out_of_range_is_refused_by_its_full_name(field):
    name = re.escape(field)
    with pytest.raises(ConfigError, match=rf"^{name}(\[\d\])? must be .*, got "):
        apply_config_overrides(presets.get_preset("demo"), {field: OUT_OF_RANGE[field]})


ANY_NUMBER = {"data.rewards.success_reward", "data.cube_goal", "data.button_goal", "data.delta_mask"}


def test_every_number_has_a_range():
    """Those of ``data.sources`` are those of ``data`` once more, see ``test_sets.py``."""
    hints = dict(_hints(TrainConfig))
    numbers = {field for field, hint in hints.items() if "number" in fields.allowed(hint)}
    assert numbers == OUT_OF_RANGE.keys() | ANY_NUMBER
    ranges = {field for field, hint in hints.items() if "Interval" in repr(hint)}
    assert ranges == OUT_OF_RANGE.keys()


WRONG = {  # of each kind of type: values that are none, and what is said
    "agent.discount": (["much", True, [0.5], "nan", None], "must be a number in (0, 1], got"),
    "seed": ([1.5, True, "x", "inf", float("nan")], "must be a whole number of at least 0, got"),
    "policy.remat": (["yes", 1, None], "must be true or false, got"),
    "name": ([3, None, True], "must be text, got"),
    "policy.kind": (["pi", 0, None], "must be 'pi0', 'pi05', 'mlp_flow' or 'gaussian', got"),
    "env.cameras": (["top", 3], "must be a list (each item text), got"),
    "data.collect.noise_range": ([[0.1], [0.1, 0.2, 0.3], 0.5], "must be a list of 2 (each item a number of at least"),
    "agent.critic.hidden_dims": ([[]], "must be a non-empty list (each item a whole number of at least 1), got"),
    "env": ([3, "drawer"], "must be a group of fields (EnvConfig) or None, got"),
}


@pytest.mark.parametrize("field", WRONG)
def test_another_type_is_refused(field):
    values, message = WRONG[field]
    for value in values:
        with pytest.raises(ConfigError, match=re.escape(f"{field} {message}")):
            apply_config_overrides(presets.get_preset("demo"), {field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(seed=True), "seed must be a whole number of at least 0, got True"),
        (
            lambda: AgentConfig(discount=float("nan"), top_k=0),
            "discount must be a number in (0, 1], got nan\ntop_k must",
        ),
        (lambda: CriticConfig(hidden_dims=(8, 8.0)), "hidden_dims[1] must be a whole number of at least 1, got 8.0"),
        (lambda: CriticConfig(hidden_dims=[8]), "got [8]: in Python it is a tuple"),
        (lambda: LossWeights(bc_weight=-1), "bc_weight must be a number of at least 0, got -1"),
        (lambda: LossWeights(bc_weight="1"), "bc_weight must be a number of at least 0, got '1'"),
        (lambda: EnvConfig(cameras=("a", 1)), "cameras[1] must be text, got 1"),
    ],
)
def test_python_is_checked_as_the_command_line_is(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_numbers_of_numpy_become_numbers_of_python():
    critic = CriticConfig(hidden_dims=(np.int64(8), 4), num_critics=np.int32(3))
    found = AgentConfig(critic=critic, discount=np.float32(0.5))
    assert found == AgentConfig(critic=CriticConfig(hidden_dims=(8, 4), num_critics=3), discount=0.5)
    assert json.loads(json.dumps(to_dict(found)))["critic"]["hidden_dims"] == [8, 4]
    assert type(found.discount) is float
    for wrong in (np.bool_(True), np.float32(3.0), np.array(3)):
        with pytest.raises(ValueError, match="num_critics must be a whole number"):
            CriticConfig(num_critics=wrong)


def test_an_interval_says_which_bounds_it_has():
    interval = fields.Interval("(0, 1]")
    assert [number in interval for number in (0, 1e-9, 1, 1.1, float("nan"))] == [False, True, True, False, False]
    assert float("inf") in fields.Interval("[1, inf]")
    assert float("inf") not in fields.Interval("[1, inf)")
    texts = {"(0, 1]": "in (0, 1]", "[1, inf)": "of at least 1", "(0, inf]": "above 0 (inf too)"}
    assert {text: str(fields.Interval(text)) for text in texts} == texts


def _hints(cls, path=""):
    for name, hint in fields.hints(cls).items():
        part = fields.dataclass_in(hint)
        if part is not None:
            yield from _hints(part, f"{path}{name}.")
        else:
            yield f"{path}{name}", hint
