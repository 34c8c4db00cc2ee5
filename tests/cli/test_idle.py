"""A value that somebody chose has its effect or is refused, for every field that needs another one."""

import itertools
import json
import re

import pytest
from tests.training.test_every_field import IMPLICIT, SEEN

from acrlpd import platforms, presets
from acrlpd.cli import train
from acrlpd.cli.configured import starting_point
from acrlpd.cli.idle import RULES, refuse_idle
from acrlpd.cli.main import main
from acrlpd.config import ConfigError, to_dict
from acrlpd.overrides import apply_config_overrides

SETTINGS = {  # of each rule: under which settings of the demo its fields are idle, and under which they are not
    "policy.kind mlp_flow or gaussian": ({}, {"policy.kind": "mlp_flow"}),
    "policy.kind pi0 or pi05": ({"policy.kind": "mlp_flow"}, {}),
    "policy.freeze_pi0_backbone": ({}, {"policy.freeze_pi0_backbone": True}),
    "agent.best_of_n_strategy chunked": ({}, {"agent.best_of_n_strategy": "chunked"}),
    "agent.best_of_n_strategy auto": ({"agent.best_of_n_strategy": "parallel"}, {}),
    "agent.extraction q_gradient or one of your own": ({}, {"agent.extraction": "q_gradient"}),
    "agent.critic.q_aggregation mean_minus_std": ({}, {"agent.critic.q_aggregation": "mean_minus_std"}),
    "agent.target best_of_n": (IMPLICIT, {}),
    "agent.target implicit": ({}, IMPLICIT),
    "agent.critic.backup_horizon": (
        {},
        {**IMPLICIT, "execute_horizon": 2, "agent.critic.backup_horizon": 4},
    ),
    "agent.extraction guided": ({}, {"agent.extraction": "guided"}),
    "agent.extraction guided with agent.target best_of_n": (
        {"agent.extraction": "guided", **IMPLICIT},
        {"agent.extraction": "guided"},
    ),
    "agent.extraction distill": ({}, {"agent.extraction": "distill"}),
    "an agent.bc_weighting": ({}, {"agent.bc_weighting": "importance"}),
    "agent.critic.use_pi0_features": ({"agent.critic.use_pi0_features": False}, {}),
    "data that the run collects (no data.path)": ({"data.path": "there"}, {}),
    "statistics that the run makes (no data.norm_stats)": (
        {"data.norm_stats": "there", "data.action_normalization": "z_score"},
        {},
    ),
    "rollout.num_workers above 0": ({}, {"rollout.num_workers": 2}),
    "an online phase (env.name and online_steps)": ({"online_steps": 0}, {}),
    "an environment (env.name)": ({"env": None, "data.path": "there"}, {}),
    "a data.validation_fraction": ({}, {"data.validation_fraction": 0.1}),
    "a data.validation_fraction and no environment (--env None)": (
        {"data.validation_fraction": 0.1},
        {"data.validation_fraction": 0.1, "env": None, "data.path": "there"},
    ),
    "a data.online_ratio": ({"data.online_ratio": None}, {}),
    "no agent.policy_ema_decay": ({}, {"agent.policy_ema_decay": None}),
    "online_loss_weights": ({}, {"online_loss_weights.bc_weight": 0.5}),
    "loggers.kinds wandb or trackio": ({"loggers.kinds": ["tensorboard"]}, {"loggers.kinds": ["trackio"]}),
    "loggers.kinds wandb": ({"loggers.kinds": ["trackio"]}, {"loggers.kinds": ["wandb"]}),
    **{
        f"no optimizers.{group}.schedule.rsqrt_timescale": (
            {f"optimizers.{group}.schedule.rsqrt_timescale": 5.0},
            {},
        )
        for group in ("policy", "critic", "temperature")
    },
}
VALUES = {
    "agent.guidance_weights": [0.5],
    "data.prefix_bytes": 5,
    "data.validation_seed": 3,
    "eval.held_out_chunks": 64,
    "policy.dtype": "float32",
    "policy.remat": False,
    "utd_ratio": 0.25,
}
OTHER_PRESET = {"policy.dtype": "droid", "policy.remat": "droid"}  # where the value is not the preset's
FIELDS = [(rule.needs, field) for rule in RULES for field in rule.fields]

# needed to be seen in a small run, or refused by the configuration itself
NOT_IDLE = {
    *("env.name", "env.image_size", "policy.kind", "policy.paligemma_variant", "policy.action_expert_variant"),
    *("policy.vision_variant", "policy.frozen_dtype", "rollout.backend", "data.weights", "data.sources"),
    *(
        "data.online_ratio",
        "data.ends_in_chunks",
        "agent.critic.horizon",
        "agent.target",
        "agent.critic.backup_horizon",
    ),
}


def test_no_field_that_needs_another_is_forgotten():
    assert {rule.needs for rule in RULES} == SETTINGS.keys()
    need = {field for field, (_, _, *also) in SEEN.items() if any(also)}
    assert need <= {field for _, field in FIELDS} | NOT_IDLE


@pytest.mark.parametrize(("needs", "field"), FIELDS)
def test_a_value_without_effect_is_refused(needs, field):
    preset = presets.get_preset(OTHER_PRESET.get(field, "demo"))
    idle, of_use = (apply_config_overrides(preset, each) for each in SETTINGS[needs])
    for before in (idle, of_use):
        refuse_idle(before)
    value = VALUES[field] if field in VALUES else SEEN[field][1]
    refuse_idle(apply_config_overrides(of_use, {field: value}))
    with pytest.raises(ConfigError, match=rf"{re.escape(field)} .* has no effect here: it needs {re.escape(needs)}"):
        refuse_idle(apply_config_overrides(idle, {field: value}))


@pytest.mark.parametrize("in_file", [False, True])
def test_it_is_refused_wherever_it_was_said(tmp_path, capsys, in_file):
    (tmp_path / "changes.yaml").write_text("agent: {best_of_n_block: 3}\n")
    said = ["--config", str(tmp_path / "changes.yaml")] if in_file else ["--agent.best_of_n_block", "3"]
    assert main(["config", "show", "demo", *said]) == 2
    assert "agent.best_of_n_block 3 has no effect here" in capsys.readouterr().err
    assert main(["config", "show", "demo", *said, "--agent.best_of_n_strategy", "chunked"]) == 0


def test_a_run_that_was_started_with_such_a_value_can_go_on(tmp_path, monkeypatch, capsys):
    begun = apply_config_overrides(presets.get_preset("demo"), {"agent.best_of_n_block": 3})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(begun)))
    monkeypatch.setattr(train, "run", lambda config, **how: 0)
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert main(["config", "show", str(tmp_path)]) == 0
    assert main(["train", "--resume", str(tmp_path), "--loggers.wandb_mode", "offline"]) == 2
    assert "loggers.wandb_mode 'offline' has no effect here" in capsys.readouterr().err


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_what_presets_algorithms_and_environments_set_is_never_refused(preset):
    for algorithm, environment in itertools.product(presets.ALGORITHMS, platforms.ENVIRONMENTS):
        flags = ["--algorithm", algorithm, "--environment", environment]
        refuse_idle(starting_point(preset, flags)[0])
