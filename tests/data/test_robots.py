import numpy as np
import pytest

from acrlpd.data.chunks import gather
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.normalize import load
from acrlpd.data.view.robots import aloha, droid, libero
from acrlpd.data.view.robots.mapping import ToRobot, delta_mask, unseen
from acrlpd.data.view.transforms import Compose, DeltaActions, Normalize, PadToModel, ResizeImages, to_observation
from acrlpd.types import Episode


def picture(value, batch=(), *, first=False):
    """One colour, as (h, w, 3) or with the channels first."""
    return np.full((*batch, 3, 4, 6) if first else (*batch, 4, 6, 3), value, np.uint8)


def libero_data(batch=()):
    return {
        "observation/image": picture(1, batch),
        "observation/wrist_image": np.full((*batch, 3, 4, 6), 0.5, np.float32),
        "observation/state": np.zeros((*batch, 8)),
        "prompt": "lift",
    }


@pytest.mark.parametrize("batch", [(), (2,)])
def test_libero(batch):
    there = libero.Libero()(libero_data(batch) | {"actions": np.zeros((*batch, 5, 7))})
    assert there.keys() == {"state", "image", "image_mask", "actions", "prompt"}
    assert [image[(0,) * image.ndim] for image in there["image"].values()] == [1, 127, 0]
    assert {image.shape for image in there["image"].values()} == {(*batch, 4, 6, 3)}
    masks = there["image_mask"]
    assert {camera: mask.all() for camera, mask in masks.items()} == {
        "base_0_rgb": True, "left_wrist_0_rgb": True, "right_wrist_0_rgb": False
    }  # fmt: skip
    assert {mask.shape for mask in masks.values()} == {batch}
    assert libero.Libero(pi0_fast=True)(libero_data(batch))["image_mask"]["right_wrist_0_rgb"].all()
    back = libero.Libero().inverse({"state": np.zeros((*batch, 8)), "actions": np.ones((*batch, 5, 32))})
    assert back.keys() == {"actions"}
    assert back["actions"].shape == (*batch, 5, 7)


def droid_data(batch=()):
    return {
        "observation/exterior_image_1_left": picture(1, batch),
        "observation/wrist_image_left": picture(2, batch),
        "observation/joint_position": np.arange(7.0) + np.zeros((*batch, 7)),
        "observation/gripper_position": np.full((*batch, 1), 7.0),
        "prompt": "lift",
    }


@pytest.mark.parametrize("batch", [(), (2,)])
def test_droid(batch):
    there = droid.Droid()(droid_data(batch))
    np.testing.assert_array_equal(there["state"], np.arange(8.0) + np.zeros((*batch, 8)))
    assert {camera: image.max() for camera, image in there["image"].items()} == {
        "base_0_rgb": 1, "left_wrist_0_rgb": 2, "right_wrist_0_rgb": 0
    }  # fmt: skip
    assert [mask.all() for mask in there["image_mask"].values()] == [True, True, False]
    fast = droid.Droid(pi0_fast=True)(droid_data(batch))
    assert {camera: image.max() for camera, image in fast["image"].items()} == {
        "base_0_rgb": 1, "base_1_rgb": 0, "wrist_0_rgb": 2
    }  # fmt: skip
    assert all(mask.all() for mask in fast["image_mask"].values())
    assert droid.Droid().inverse({"actions": np.zeros((*batch, 5, 32))})["actions"].shape == (*batch, 5, 8)


def test_droid_takes_a_plain_number_as_gripper_and_a_whole_state():
    expected = droid.Droid()(droid_data())["state"]
    np.testing.assert_array_equal(
        droid.Droid()(droid_data() | {"observation/gripper_position": 7.0})["state"], expected
    )
    np.testing.assert_array_equal(droid.Droid()(droid_data() | {"observation/state": -expected})["state"], -expected)


def aloha_data(cameras, batch=()):
    return {
        "state": np.full((*batch, 14), 0.5),
        "images": {camera: picture(i + 1, batch, first=True) for i, camera in enumerate(cameras)},
        "prompt": "fold",
    }


@pytest.mark.parametrize("batch", [(), (2,)])
def test_aloha_cameras(batch):
    there = aloha.Aloha()(aloha_data(["cam_high", "cam_low", "cam_right_wrist"], batch))
    assert {camera: image.max() for camera, image in there["image"].items()} == {
        "base_0_rgb": 1, "left_wrist_0_rgb": 0, "right_wrist_0_rgb": 3
    }  # fmt: skip
    assert {image.shape for image in there["image"].values()} == {(*batch, 4, 6, 3)}
    assert [mask.all() for mask in there["image_mask"].values()] == [True, False, True]
    assert {mask.shape for mask in there["image_mask"].values()} == {batch}


@pytest.mark.parametrize("cameras", [["cam_low"], ["cam_high", "top"]])
def test_aloha_refuses_other_cameras(cameras):
    with pytest.raises(ValueError, match=f"cam_high must be there; got {', '.join(sorted(cameras))}"):
        aloha.Aloha()(aloha_data(cameras))


def test_aloha_actions_come_back():
    actions = np.random.default_rng(0).normal(size=(2, 5, 14))
    for robot in (aloha.Aloha(), aloha.Aloha(adapt_to_pi=False)):
        there = robot(aloha_data(["cam_high"], (2,)) | {"actions": actions})
        padded = np.concatenate([there["actions"], np.ones((2, 5, 18))], axis=-1)
        back = robot.inverse({"state": there["state"], "actions": padded})
        assert back.keys() == {"actions"}
        np.testing.assert_allclose(back["actions"], actions, atol=1e-12)


def test_aloha_gripper_angles_at_the_ends():
    assert aloha.DELTA_MASK == (True,) * 6 + (False,) + (True,) * 6 + (False,)
    closed = aloha.actions_to_pi0(np.zeros(14))  # the leader's angle -0.6213, counted from pi0's 0.5476
    np.testing.assert_allclose(closed[[6, 13]], -0.6213 - 0.5476)
    opened = aloha.actions_to_pi0(np.ones(14))
    np.testing.assert_allclose(opened[[6, 13]], 1.4910 - 0.5476)
    np.testing.assert_array_equal(opened[[0, 1, 2, 3, 8, 9]], [1, -1, -1, 1, -1, -1])
    # a finger at 0.05800 m: asin of (0.022^2 + 0.058^2 - 0.036^2) / (2 * 0.022 * 0.058) = 0.99999
    finger = aloha.state_to_pi0(np.ones(14))[6]
    assert finger == pytest.approx((np.pi / 2 - 0.5476) / (1.6296 - 0.5476), abs=0.01)
    assert np.isfinite(aloha.state_to_pi0(np.full(14, 1.5))).all()  # past the end of the linkage


@pytest.mark.parametrize(
    ("robot", "cameras", "state_dim"),
    [
        ("libero", ["image", "wrist_image"], 8),
        ("droid", ["exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"], 8),
        ("aloha", ["top", "cam_left_wrist", "angle"], 14),
    ],
)
def test_from_a_store_to_an_observation(robot, cameras, state_dim):
    store = EpisodeStore.from_episodes(
        [
            Episode(
                state=np.zeros((4, state_dim)),
                actions=np.zeros((4, 14)),
                rewards=np.zeros(4),
                terminals=np.zeros(4, bool),
                task="fold",
                images={camera: picture(9, (4,)) for camera in cameras},
            )
        ]
    )
    raw = gather(store, np.array([0, 3]), 2)
    transforms = Compose((ToRobot(robot), ResizeImages(4, 4)))
    data = transforms({key: raw[key] for key in ("state", "actions", "image", "prompt")})
    observation = to_observation(data)
    assert observation.state.shape == (2, state_dim)
    assert {image.shape for image in observation.images.values()} == {(2, 4, 4, 3)}
    assert observation.image_masks["base_0_rgb"].tolist() == [True, True]
    assert observation.image_masks["right_wrist_0_rgb"].tolist() == [False, False]
    assert data["prompt"].tolist() == ["fold", "fold"]
    without_actions = transforms({key: raw[key] for key in ("state", "image", "prompt")})
    assert "actions" not in without_actions
    without_pictures = transforms({key: raw[key] for key in ("state", "actions", "prompt")} | {"image": {}})
    assert to_observation(without_pictures).images == {}
    np.testing.assert_array_equal(without_pictures["state"], data["state"])
    np.testing.assert_array_equal(without_pictures["actions"], data["actions"])
    assert unseen(robot, cameras) == ("right_wrist_0_rgb",)
    with pytest.raises(ValueError, match=rf"{robot} has a state of {state_dim} numbers, got 3"):
        transforms({"state": np.zeros(3), "image": {}})


def test_which_actions_are_relative():
    """openpi's configurations: ALOHA's joints; LIBERO's arm for pi0 alone; DROID's are velocities."""
    masks = {
        (robot, pi05): sum(delta_mask(robot, None, pi05=pi05))
        for robot in ("aloha", "droid", "libero")
        for pi05 in (False, True)
    }
    assert list(masks.values()) == [12, 12, 0, 0, 6, 0]
    assert delta_mask("aloha", (), pi05=False) == ()
    assert delta_mask("droid", (7, -1), pi05=False) == (True,) * 7 + (False,)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "adapt"), [("adapt", True), ("plain", False)])
def test_aloha_is_openpis(shared, name, adapt):
    arrays = np.load(shared / "golden/functions.npz")
    robot = aloha.Aloha(adapt_to_pi=adapt)
    data = {"state": arrays["aloha/state"], "actions": arrays["aloha/actions"], "images": {"cam_high": picture(1)}}
    there = robot(data)
    np.testing.assert_allclose(there["state"], arrays[f"aloha/{name}_state"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(there["actions"], arrays[f"aloha/{name}_actions"], rtol=1e-6, atol=1e-9)
    back = robot.inverse({"actions": arrays["aloha/actions"]})
    np.testing.assert_allclose(back["actions"], arrays[f"aloha/{name}_out"], rtol=1e-6, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "quantiles"), [("pi0", False), ("pi05", True)])
def test_a_libero_call_as_far_as_the_transforms_go(shared, name, quantiles):
    """The model's part of this call is tested with the policy; here its answer is worked back from openpi's."""
    call = np.load(shared / f"golden/{name}_policy.npz")
    stats = load(shared / f"golden/{name}_policy_norm_stats.json")
    size = min(call["observation/wrist_image"].shape[:2])
    transforms = Compose(
        (
            libero.Libero(),
            DeltaActions(tuple(call["delta_mask"].tolist())),
            Normalize(stats, quantiles=quantiles),
            ResizeImages(size, size),
            PadToModel(call["noise"].shape[-1]),
        )
    )
    sent = {key: call[key] for key in call.files if key.startswith("observation/")}
    there = transforms(sent | {"actions": call["actions"]})
    state, raw = stats["state"], call["observation/state"]
    by_hand = (
        2 * (raw - state.q01) / (state.q99 - state.q01 + 1e-6) - 1
        if quantiles
        else (raw - state.mean) / (state.std + 1e-6)
    )
    np.testing.assert_allclose(there["state"][: len(raw)], by_hand, rtol=1e-12)
    assert {image.shape for image in there["image"].values()} == {(size, size, 3)}
    np.testing.assert_array_equal(there["image"]["left_wrist_0_rgb"], call["observation/wrist_image"])  # right size
    assert not there["image_mask"]["right_wrist_0_rgb"]
    assert there["actions"].shape == call["noise"].shape
    back = transforms.inverse({"state": there["state"], "actions": there["actions"]})["actions"]
    np.testing.assert_allclose(back, call["actions"], atol=1e-9)
    assert back.dtype == call["actions"].dtype
