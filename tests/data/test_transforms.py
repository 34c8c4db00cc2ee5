import copy
import time

import numpy as np
import pytest

from acrlpd.data.view import transforms as tf
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.pictures import resize_with_pad

STATS = {
    "state": NormStats(np.array([1.0, 2.0, 0.0]), np.array([2.0, 4.0, 1.0]), -np.ones(3), 3 * np.ones(3)),
    "actions": NormStats(np.array([0.5, 0.0]), np.array([1.0, 2.0]), -np.ones(2), np.ones(2)),
}


def make_data(batch=()):
    rng = np.random.default_rng(0)
    return {
        "state": rng.normal(size=(*batch, 3)),
        "actions": rng.normal(size=(*batch, 4, 2)),
        "image": {"top": rng.integers(0, 256, (*batch, 6, 8, 3), dtype=np.uint8)},
        "prompt": np.full(batch, "lift it"),
    }


def make_list(quantiles=False, discrete_state_input=False):
    return tf.Compose(
        (
            tf.DefaultPrompt("do something"),
            tf.DeltaActions(tf.make_bool_mask(1, -1)),
            tf.Normalize(STATS, quantiles=quantiles),
            tf.ResizeImages(4, 4),
            tf.TokenizePrompt(PromptTokenizer(max_length=30), discrete_state_input=discrete_state_input),
            tf.PadToModel(5, robot_action_dim=2),
        )
    )


@pytest.mark.parametrize("quantiles", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_way_back_undoes_the_way_in(batch, quantiles):
    data = make_data(batch)
    transforms = make_list(quantiles)
    there = transforms(data)
    assert there["state"].shape == (*batch, 5)
    assert there["actions"].shape == (*batch, 4, 5)
    assert there["image"]["top"].shape == (*batch, 4, 4, 3)
    assert there["tokenized_prompt"].shape == there["tokenized_prompt_mask"].shape == (*batch, 30)
    back = transforms.inverse({"state": there["state"], "actions": there["actions"]})
    np.testing.assert_allclose(back["actions"], data["actions"], atol=1e-12)
    np.testing.assert_allclose(back["state"][..., :3], data["state"], atol=1e-12)


@pytest.mark.parametrize("discrete_state_input", [False, True])
def test_a_batch_is_its_observations_side_by_side(discrete_state_input):
    data = make_data((3,))
    transforms = make_list(discrete_state_input=discrete_state_input)
    batch = transforms(data)
    for row in range(3):
        one = transforms(
            {key: data[key][row] for key in ("state", "actions", "prompt")}
            | {"image": {"top": data["image"]["top"][row]}}
        )
        for key in ("state", "actions", "tokenized_prompt", "tokenized_prompt_mask"):
            np.testing.assert_array_equal(batch[key][row], one[key])
        np.testing.assert_array_equal(batch["image"]["top"][row], one["image"]["top"])


def test_the_input_is_never_changed():
    data = make_data((2,))
    kept = copy.deepcopy(data)
    transforms = make_list()
    there = transforms(data)
    sent = {"state": there["state"], "actions": there["actions"]}
    kept_sent = copy.deepcopy(sent)
    transforms.inverse(sent)
    assert data.keys() == kept.keys()
    for key in ("state", "actions", "prompt"):
        np.testing.assert_array_equal(data[key], kept[key])
    np.testing.assert_array_equal(data["image"]["top"], kept["image"]["top"])
    for key, value in kept_sent.items():
        np.testing.assert_array_equal(sent[key], value)


def test_an_observation_needs_no_actions():
    data = make_data((2,))
    del data["actions"]
    there = make_list()(data)
    assert "actions" not in there
    np.testing.assert_array_equal(there["state"], make_list()(make_data((2,)))["state"])


def test_normalization_and_state_text_see_the_state_before_padding():
    tokenizer = PromptTokenizer(max_length=60)
    transforms = tf.Compose(
        (tf.Normalize(STATS), tf.TokenizePrompt(tokenizer, discrete_state_input=True), tf.PadToModel(5))
    )
    there = transforms({"state": np.array([1.0, 2.0, -0.5]), "prompt": "lift"})
    expected, _ = tokenizer.encode("lift", np.array([0.0, 0.0, -0.5 / (1 + 1e-6)]))  # three numbers, not five
    np.testing.assert_array_equal(there["tokenized_prompt"], expected)
    np.testing.assert_array_equal(there["state"][3:], [0, 0])


def test_before_gives_what_statistics_are_taken_after():
    transforms = make_list()
    assert transforms.before(tf.Normalize).transforms == transforms.transforms[:2]
    assert transforms.before(tf.ActionsOnly).transforms == transforms.transforms


def test_default_prompt_fills_only_what_is_missing():
    default = tf.DefaultPrompt("do it")
    assert default({})["prompt"] == "do it"
    assert default({"prompt": "fold"})["prompt"] == "fold"
    assert default({"prompt": ""})["prompt"] == "do it"
    assert default({"prompt": None})["prompt"] == "do it"
    assert default({"prompt": ["a", None]})["prompt"].tolist() == ["a", "do it"]
    assert default({"prompt": b"f\xc3\xbcnf"})["prompt"] == "fünf"
    assert default({"prompt": np.array(["a", "", "a longer text"])})["prompt"].tolist() == [
        "a",
        "do it",
        "a longer text",
    ]


def test_bool_mask_notation():
    assert tf.make_bool_mask(2, -1, 0, 1) == (True, True, False, True)


def test_delta_actions_by_hand():
    data = {"state": np.array([1.0, 2.0, 3.0]), "actions": np.array([[10.0, 20.0, 30.0], [11.0, 21.0, 31.0]])}
    delta = tf.DeltaActions((True, False))  # shorter than the action: the third stays
    np.testing.assert_array_equal(delta(data)["actions"], [[9, 20, 30], [10, 21, 31]])
    np.testing.assert_array_equal(delta.inverse(delta(data))["actions"], data["actions"])


def test_keys_without_statistics_are_left_alone_but_needed_on_the_way_back():
    normalize = tf.Normalize(STATS)
    extra = np.arange(2.0)
    assert normalize({"state": np.ones(3), "extra": extra})["extra"] is extra
    with pytest.raises(ValueError, match=r"got \['actions'\] without \['state'\]"):
        normalize.inverse({"actions": np.zeros((4, 2))})


def test_images_of_the_right_size_are_not_touched():
    image = np.zeros((2, 4, 6, 3), np.uint8)
    assert tf.ResizeImages(4, 6)({"image": {"top": image}})["image"]["top"] is image
    with pytest.raises(ValueError, match=r"image/top is float32 from -1 to -1: expected uint8"):
        tf.ResizeImages(4, 6)({"image": {"top": image.astype(np.float32) - 1}})


@pytest.mark.parametrize("other", [np.zeros((4, 4), np.uint16), "no picture", None, np.full((9, 9, 3), np.nan)])
def test_a_camera_that_is_not_read_is_ignored_whatever_it_holds(other):
    image = np.zeros((4, 6, 3), np.uint8)
    resized = tf.ResizeImages(4, 6, ("top", "wrist"))({"image": {"depth": other, "top": image}})
    assert resized == {"image": {"top": image}}


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(8, 8, (2, 6), (0, 8)), (4, 11, (0, 4), (1, 9))])
def test_the_rim_is_black_and_the_smaller_half_comes_first(height, width, rows, columns):
    white = np.full((4, 8, 3), 255, np.uint8)
    resized = resize_with_pad(white, height, width)
    expected = np.zeros((height, width, 3), np.uint8)
    expected[slice(*rows), slice(*columns)] = 255
    np.testing.assert_array_equal(resized, expected)


@pytest.mark.parametrize("data", [{}, {"prompt": None}, {"prompt": np.array(None)}, {"prompt": ["lift", None]}])
def test_a_prompt_is_needed(data):
    with pytest.raises(ValueError, match="no prompt"):
        tf.TokenizePrompt(PromptTokenizer())({"state": np.zeros((2, 3))} | data)


@pytest.mark.parametrize("prompt", [3, np.float32(0.5), np.array([1, 2]), ["lift", 3], True])
def test_a_prompt_is_text(prompt):
    for transform in (tf.DefaultPrompt("do it"), tf.TokenizePrompt(PromptTokenizer())):
        with pytest.raises(ValueError, match="a prompt must be text, got "):
            transform({"state": np.zeros((2, 3)), "prompt": prompt})


def test_one_prompt_serves_a_whole_batch():
    data = {"state": np.zeros((3, 2)), "prompt": "lift"}
    there = tf.TokenizePrompt(PromptTokenizer(max_length=6))(data)
    assert "prompt" not in there
    assert there["tokenized_prompt"].shape == (3, 6)
    assert (there["tokenized_prompt"] == there["tokenized_prompt"][:1]).all()


def test_padding_never_cuts_on_the_way_in():
    data = {"state": np.arange(4.0), "actions": np.ones((2, 3))}
    np.testing.assert_array_equal(tf.PadToModel(4)(data)["actions"], [[1, 1, 1, 0]] * 2)
    np.testing.assert_array_equal(tf.PadToModel(2)(data)["state"], np.arange(4.0))
    assert tf.PadToModel(4).inverse({"actions": np.ones((2, 4))})["actions"].shape == (2, 4)
    assert tf.PadToModel(4, robot_action_dim=3).inverse({"actions": np.ones((2, 4))})["actions"].shape == (2, 3)


def test_to_observation():
    data = {
        "state": np.zeros((2, 3)),
        "image": {"top": np.zeros((2, 4, 4, 3), np.uint8), "wrist": np.zeros((2, 4, 4, 3), np.uint8)},
        "image_mask": {"wrist": np.array([True, False])},
        "tokenized_prompt": np.zeros((2, 5), np.int64),
        "tokenized_prompt_mask": np.ones((2, 5), bool),
    }
    observation = tf.to_observation(data)
    assert observation.state.dtype == np.float32
    assert observation.images["top"].dtype == np.uint8
    np.testing.assert_array_equal(observation.image_masks["top"], [True, True])
    np.testing.assert_array_equal(observation.image_masks["wrist"], [True, False])
    assert observation.tokenized_prompt.dtype == np.int32
    assert observation.token_ar_mask is None
    state_only = tf.to_observation({"state": np.zeros((2, 3))})
    assert (state_only.images, state_only.image_masks, state_only.tokenized_prompt) == ({}, {}, None)


def test_state_only_batches_are_fast():
    data = make_data((256,)) | {"image": {}}
    transforms = make_list()
    transforms(data)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        transforms(data)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5e-3  # some 0.4 ms; tokenizing each prompt anew would take ten times as long


@pytest.mark.golden
def test_resize_is_openpis(shared):
    arrays = np.load(shared / "golden/functions.npz")
    cases = {key.rsplit("/", 1)[0] for key in arrays.files if key.startswith("resize/")}
    assert cases
    for case in cases:
        height, width = map(int, arrays[f"{case}/size"])
        resized = resize_with_pad(arrays[f"{case}/in_u8"], height, width)
        np.testing.assert_array_equal(resized, arrays[f"{case}/out_pil_u8"])


@pytest.mark.golden
def test_delta_actions_are_openpis(shared):
    arrays = np.load(shared / "golden/functions.npz")
    delta = tf.DeltaActions(tuple(arrays["delta/mask"].tolist()))
    data = {"state": arrays["delta/state"], "actions": arrays["delta/actions"]}
    there = delta(data)
    np.testing.assert_array_equal(there["actions"], arrays["delta/out"])
    np.testing.assert_array_equal(delta.inverse(there)["actions"], arrays["delta/back"])
    assert there["actions"].dtype == arrays["delta/out"].dtype
