"""A client's pictures: those that the model reads in every unambiguous form, all others ignored whatever they hold."""

import dataclasses

import numpy as np
import pytest
from tests.serving.conftest import CONFIG, OBS, STATS

from acrlpd.config import PolicyConfig
from acrlpd.data.view.transforms import to_observation
from acrlpd.training import setup

ODD = {
    "depth": np.full((9, 9), 3000, np.uint16),
    "broken": np.full((4, 4, 3), np.nan),
    "stereo": np.zeros((2, 8, 8, 3, 1), np.uint8),
    "none": None,
}


@pytest.mark.parametrize("camera", ODD)
def test_a_policy_of_states_alone_ignores_every_camera(policy, camera):
    options = {"acrlpd": {"seed": 1}}
    expected = policy.infer(OBS | options)["actions"]
    np.testing.assert_array_equal(policy.infer(OBS | options | {"image": {camera: ODD[camera]}})["actions"], expected)


@pytest.fixture(scope="module")
def transform():
    """That of a pi0 which reads the camera ``top``."""
    config = dataclasses.replace(CONFIG, policy=PolicyConfig(kind="pi0", image_size=16, max_token_len=8))
    return setup.make_transform(config, STATS, setup.Dims(3, 2), ("top",))


@pytest.mark.parametrize("camera", ODD)
def test_cameras_beside_those_of_the_model_are_ignored(transform, camera):
    seen = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    sent = OBS | {"prompt": "go", "image": {camera: ODD[camera], "top": seen}}
    observation = to_observation(transform(sent))
    assert list(observation.images) == list(observation.image_masks) == ["top"]
    np.testing.assert_array_equal(observation.images["top"][4:12], seen)
    turned = to_observation(transform(sent | {"image": {"top": np.moveaxis(seen, -1, 0)}}))
    np.testing.assert_array_equal(turned.images["top"], observation.images["top"])


@pytest.mark.parametrize("camera", ODD)
def test_what_the_model_reads_must_be_a_picture(transform, camera):
    with pytest.raises(
        ValueError, match=r"^image/top (has the shape|is no picture|is \w+ from) [^\n]*$|^image/top is no"
    ):
        transform(OBS | {"prompt": "go", "image": {"top": ODD[camera]}})
