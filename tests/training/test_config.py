import dataclasses
import json

import pytest

from acrlpd import presets
from acrlpd.config import TrainConfig, from_dict, to_dict


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
    draws = {name: getattr(demo.data, name) for name in ("sequence_ratio", "online_ratio", "ends_in_chunks")}
    assert dataclasses.replace(config.data, **draws) == demo.data
    assert (config.data == demo.data) == (not algorithm.startswith("qc"))  # which draws from all rows alike
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
