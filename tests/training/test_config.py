import dataclasses
import json

import pytest

from acrlpd import presets
from acrlpd.config import TrainConfig, from_dict, to_dict


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_survives_json(name):
    config = presets.get_preset(name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


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
