"""One geometry and one reading of pictures, for simulators, robots, recorded data and a server's clients."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd import pictures
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.view.robots.mapping import ToRobot
from acrlpd.data.view.transforms import ResizeImages
from acrlpd.envs.custom import GymnasiumSimulator
from acrlpd.envs.env import Outcome
from acrlpd.envs.robot import RobotSimulator

sides = st.integers(4, 12)
FORMS = {
    "channels last": lambda rgb: rgb,
    "channels first": lambda rgb: np.moveaxis(rgb, -1, -3),
    "floats": lambda rgb: (rgb + 0.5) / 255.0,  # cut to whole levels, as openpi does
    "floats, channels first": lambda rgb: (np.moveaxis(rgb, -1, -3) + np.float32(0.5)) / np.float32(255),
    "a batch": lambda rgb: rgb[None],
}
GREY_FORMS = {
    "two axes": lambda grey: grey,
    "one channel": lambda grey: grey[..., None],
    "one channel first": lambda grey: grey[None],
    "floats": lambda grey: (grey + 0.5) / 256.0,
}


@given(sides, sides, st.sampled_from(sorted(FORMS)), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_every_form_of_a_picture_is_the_same_picture(height, width, form, seed):
    rgb = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    found = pictures.to_rgb(FORMS[form](rgb), "top")
    np.testing.assert_array_equal(found, rgb[None] if form == "a batch" else rgb)


@given(sides, sides, st.sampled_from(sorted(GREY_FORMS)), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_grey_is_the_same_in_all_channels(height, width, form, seed):
    grey = np.random.default_rng(seed).integers(0, 255, (height, width), np.uint8)
    found = pictures.to_rgb(GREY_FORMS[form](grey), "top")
    expected = (255 * GREY_FORMS[form](grey)).astype(np.uint8) if form == "floats" else grey
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 6, 4), np.uint8),  # alpha, or depth
        np.zeros((4, 6, 2), np.uint8),
        np.zeros((3, 6, 3), np.uint8),  # either way round
        np.zeros((2, 4, 6), np.uint8),  # a batch of grey ones, or two channels
        np.zeros((1, 6, 1), np.uint8),
        np.zeros((0, 6, 3), np.uint8),
        np.zeros(18, np.uint8),
        np.zeros((4, 6, 3), np.uint16),
        np.full((4, 6, 3), 200, np.int64),
        np.full((4, 6, 3), 200.0),
        np.full((4, 6, 3), -0.5),
        np.full((4, 6, 3), np.nan),
        np.zeros((4, 6, 3), bool),
        "a picture",
        None,
    ],
    ids=repr,
)
def test_what_can_be_read_in_several_ways_or_none_is_refused_in_a_sentence(picture):
    with pytest.raises(ValueError, match=r"^camera top (has the shape|is no picture:|is \w+ from) [^\n]*$"):
        pictures.to_rgb(picture, "camera top")


class Camera(gymnasium.Env):
    metadata, render_mode = {"render_fps": 10}, "rgb_array"
    action_space, observation_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, frame):
        self.frame = frame

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def render(self):
        return self.frame


class Robot:
    def __init__(self, frame):
        self.frame = frame

    def get_observation(self):
        return {"top": self.frame}


def in_a_rollout(frame, size):
    simulator = GymnasiumSimulator(Camera(frame), instruction="x", outcome=lambda *_: Outcome.GOING_ON, time_limit=5)
    return simulator.render("render", size)


def observed_in_a_rollout(frame, size):
    simulator = GymnasiumSimulator(
        Camera(frame),
        instruction="x",
        outcome=lambda *_: Outcome.GOING_ON,
        time_limit=5,
        cameras={"top": lambda _: frame},
    )
    return simulator.render("top", size)


def on_a_robot(frame, size):
    simulator = RobotSimulator(
        Robot(frame),
        instruction="x",
        state=lambda _: np.zeros(1),
        action_low=[-1],
        action_high=[1],
        outcome=lambda *_: Outcome.GOING_ON,
        cameras={"top": lambda seen: seen["top"]},
        fps=10,
        time_limit=5,
    )
    return simulator.render("top", size)


def served(frame, size):
    return ResizeImages(size, size)({"image": {"top": frame}})["image"]["top"]


def served_to_a_robot(frame, size):
    data = {"observation/state": np.zeros(8), "observation/image": frame, "observation/wrist_image": frame}
    return ResizeImages(size, size)(ToRobot("libero")(data))["image"]["base_0_rgb"]


def recorded(frame, size):
    return FrameCache(Path("unused"), size, size).resize(pictures.to_rgb(frame, "top")[None])[0]


@pytest.mark.parametrize("form", ["channels last", "channels first", "floats"])
@pytest.mark.parametrize(
    "way",
    [in_a_rollout, observed_in_a_rollout, on_a_robot, served, served_to_a_robot, recorded],
    ids=lambda w: w.__name__,
)
@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (40, 40)])
def test_a_round_ball_is_round_everywhere(way, form, height, width):
    row, column = np.ogrid[:height, :width]
    ball = (row - height // 2) ** 2 + (column - width // 2) ** 2 < 15**2
    frame = np.repeat(np.where(ball, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    shown = {"channels last": frame, "channels first": np.moveaxis(frame, -1, 0), "floats": frame / 255.0}[form]
    found = way(shown, 32)
    rows, columns = np.nonzero(found[..., 0] > 127)
    assert found.shape == (32, 32, 3)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    np.testing.assert_array_equal(found, served(frame, 32))
