"""A configuration changed by name, by YAML and by environment; every mistake is told at once."""

import dataclasses
import json

import pytest

from acrlpd import platforms, presets
from acrlpd.cli.main import main
from acrlpd.config import ConfigError, TrainConfig, from_dict, to_dict
from acrlpd.overrides import ALIASES, apply_config_overrides, differences, fields_of, load_yaml, to_yaml
from acrlpd.training import memory, setup

FOUNDING_EXAMPLE = """
platform: droid
base_config: droid

# Training overrides
training:
  offline_steps: 1800000
  online_steps: 150000
  batch_size: 96
  eval_frequency: 5000

# Model overrides
model:
  pi0_config:
    action_horizon: 12
    diffusion_steps: 40

critic:
  num_critics: 12
  hidden_dims: [512, 512, 256, 128]

loss_weights:
  bc_weight: 0.015
  critic_weight: 1.0
  alpha_weight: 0.8

optimization:
  pi0_lr_schedule:
    peak_lr: 2e-5
    decay_steps: 80000
  gradient_accumulation_steps: 2
"""


def test_the_founding_example_loads_as_it_is(tmp_path):
    file = tmp_path / "droid.yaml"
    file.write_text(FOUNDING_EXAMPLE)
    config = load_yaml(file, presets.get_preset)
    expected = {
        "agent.critic.hidden_dims: was [512, 512, 256], now [512, 512, 256, 128]",
        "agent.critic.num_critics: was 10, now 12",
        "agent.flow_steps: was 50, now 40",
        "agent.gradient_accumulation_steps: was 1, now 2",
        "agent.loss_weights.alpha_weight: was 1.0, now 0.8",
        "agent.loss_weights.bc_weight: was 0.01, now 0.015",
        "data.batch_size: was 64, now 96",
        "eval.frequency: was 10000, now 5000",
        "offline_steps: was 2000000, now 1800000",
        "online_steps: was 200000, now 150000",
        "optimizers.policy.schedule.decay_steps: was 100000, now 80000",
        "optimizers.policy.schedule.peak_lr: was 3e-05, now 2e-05",
        "policy.action_horizon: was 10, now 12",
    }
    assert set(differences(to_dict(presets.get_preset("droid")), to_dict(config))) == expected


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_survives_yaml(name, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(presets.get_preset(name)))
    assert load_yaml(file, presets.get_preset) == presets.get_preset(name)


@pytest.mark.parametrize("alias", [name for name in ALIASES if not name.startswith("pi0_config.")])
def test_every_alias_names_fields_that_exist(alias):
    values = to_dict(presets.get_preset("demo"))
    for path in fields_of(alias):
        place = values
        for name in path.split("."):
            place = place[name]


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        apply_config_overrides(
            presets.get_preset("demo"),
            {
                "agent.discont": 0.9,
                "discount": 2,
                "agent": {"extraction": "best_of_m"},
                "log_frequency": 0,
                "offline_steps": -1,
                "seed": "x",
                "data.collect.episodes": 0,
                "policy.remat": "yes",
                "execute_horizon": 9,
            },
        )
    problems = str(caught.value).splitlines()
    assert len(problems) == 9
    for words in (
        "did you mean agent.discount?",
        "agent.discount must be a number in (0, 1], got 2",
        "did you mean 'best_of_n'?",
        "log_frequency must be a whole number of at least 1, got 0",
        "offline_steps must be a whole number of at least 0, got -1",
        "seed must be a whole number of at least 0, got 'x'",
        "data.collect.episodes must be a whole number of at least 1",
        "policy.remat must be true or false, got 'yes'",
        "execute_horizon (9) exceeds policy.action_horizon (5)",
    ):
        assert any(words in problem for problem in problems), words


def test_a_value_that_is_right_only_beside_another_is_accepted():
    config = apply_config_overrides(presets.get_preset("demo"), {"execute_horizon": 9, "policy.action_horizon": 9})
    assert (config.execute_horizon, config.policy.action_horizon) == (9, 9)
    with pytest.raises(ConfigError, match=r"agent is given a value of its own"):
        apply_config_overrides(presets.get_preset("demo"), {"agent": 3, "agent.discount": 0.5})


def test_numbers_that_yaml_takes_for_text(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("base_config: demo\noffline_steps: 2e6\npi0_peak_lr: 1e-5\n")
    config = load_yaml(file, presets.get_preset)
    assert (config.offline_steps, config.optimizers.policy.schedule.peak_lr) == (2_000_000, 1e-5)


def test_a_yaml_file_needs_a_base(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("offline_steps: 3\n")
    with pytest.raises(ConfigError, match="names no preset to start from"):
        load_yaml(file, presets.get_preset)
    assert load_yaml(file, presets.get_preset, presets.get_preset("demo")).offline_steps == 3
    file.write_text("- 3\n")
    with pytest.raises(ConfigError, match="expected names with values, found list"):
        load_yaml(file, presets.get_preset)


@pytest.mark.parametrize("platform", ["droid", "aloha", "libero"])
def test_environments(platform):
    base = presets.get_preset(platform)
    assert platforms.load_training_config(platform) == base
    development = platforms.load_training_config(platform, "development", {"best_of_n_samples": 24})
    assert development.offline_steps == base.offline_steps // 4
    assert development.online_steps == base.online_steps // 2
    assert (development.eval.frequency, development.save_frequency) == (1000, 2000)
    assert development.agent.best_of_n_samples == 24
    debug = platforms.load_training_config(platform, "debug")
    assert (debug.offline_steps, debug.online_steps, debug.data.batch_size) == (1000, 500, 8)
    assert (debug.agent.best_of_n_samples, debug.log_frequency) == (4, 10)


def test_an_unknown_environment_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'production'"):
        platforms.load_training_config("droid", "prodction")


@pytest.mark.parametrize("platform", ["droid", "aloha", "libero"])
def test_presets_agree_with_the_tables(platform):
    config, rates = presets.get_preset(platform), platforms.PLATFORM_LR_SCHEDULES[platform]
    assert config.optimizers.policy.schedule.peak_lr == rates["pi0_peak_lr"]
    assert config.optimizers.critic.schedule.peak_lr == rates["critic_peak_lr"]
    strategy = {"adaptive": "auto", "parallel": "parallel"}[platforms.PLATFORM_MEMORY_REQUIREMENTS[platform]["large_N"]]
    assert config.agent.best_of_n_strategy == strategy
    assert rates["decay_profile"] == "cosine"
    assert config.optimizers.policy.schedule.rsqrt_timescale is None
    assert config.data.sequence_ratio == platforms.PLATFORM_DATA_CONFIGS[platform]["sequence_ratio"]
    assert platforms.ConfigValidator.validate_config(config, platform, check_memory=False) == []


def test_the_validator_warns_of_what_is_unusual():
    config = apply_config_overrides(
        presets.get_preset("droid"), {"pi0_peak_lr": 1e-3, "batch_size": 2, "best_of_n_samples": 500}
    )
    warnings = platforms.ConfigValidator.validate_config(config, "droid", check_memory=False)
    assert len(warnings) == 3
    assert "the pi0 learning rate (0.001) may be too high: up to 9e-05" in warnings[0]


def test_the_validator_compares_memory(tiny_config):
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, action_dim=2))
    needed = platforms.ConfigValidator.estimate_memory_usage(config)
    assert 0 < needed < 0.1
    config = apply_config_overrides(config, {"batch_size": 32, "pi0_peak_lr": 5e-6, "critic_peak_lr": 1e-4})
    assert platforms.ConfigValidator.validate_config(config, "aloha") == []
    large = {"policy.hidden_dims": [40_000] * 2}
    (warning,) = platforms.ConfigValidator.validate_config(apply_config_overrides(config, large), "aloha")
    assert "on each device, where 24 GB is usual on aloha: acrlpd plan says what to change" in warning


@pytest.mark.parametrize("command", ["train", "plan"])
def test_commands_warn_of_what_is_unusual(command, monkeypatch, capsys):
    """Before they do anything else, and they go on."""

    def reached(*_, **__):
        raise ValueError("reached")

    monkeypatch.setattr(setup, "make_trainer", reached)
    monkeypatch.setattr(memory, "plan", reached)
    assert main([command, "droid", "--data.batch_size", "2"]) == 2
    told = capsys.readouterr().err
    assert "warning: data.batch_size 2 is below the 32 that is usual on droid\n" in told
    assert told.endswith("reached\n")
    main([command, "droid"])
    main([command, "demo", "--data.batch_size", "2"])
    assert "warning" not in capsys.readouterr().err


def test_stored_configurations_of_another_shape_are_refused():
    values = json.loads(json.dumps(to_dict(presets.get_preset("demo"))))
    values["data"]["batch_sizes"] = values["data"].pop("batch_size")
    with pytest.raises(ConfigError, match=r"did you mean data\.batch_size"):
        from_dict(TrainConfig, values)
