"""A checkpoint that openpi's training wrote: served as it is, one sample an answer."""

import json
from unittest import mock

import numpy as np
import pytest
from flax import nnx

from acrlpd import deploy
from acrlpd.data import statistics
from acrlpd.data.view import normalize
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.deploy import openpi
from acrlpd.models import gemma, siglip, weights
from acrlpd.models.pi0 import Pi0Config
from acrlpd.serving.request import OPTIONS_KEY


@pytest.mark.golden
@pytest.mark.slow
def test_openpis_checkpoint_is_served(shared):
    folder = shared / "golden"
    sizes = json.loads((folder / "meta.json").read_text())["config"]
    tower = dict(sizes["vit"])
    model = Pi0Config(
        action_dim=sizes["action_dim"],
        action_horizon=sizes["action_horizon"],
        max_token_len=sizes["max_token_len"]["pi0"],
        paligemma_variant=gemma.Config(**sizes["gemma"]["tiny"]),
        action_expert_variant=gemma.Config(**sizes["gemma"]["tiny_expert"]),
        vision_variant=siglip.Config(image_size=tower.pop("image"), patch_size=tower.pop("patch"), **tower),
        vocab_size=sizes["vocab"],
        dtype="float32",
        remat=False,
    )
    checkpoint = folder / "pi0_ema_checkpoint" / "2"
    assert not deploy.is_ours(checkpoint)
    options = deploy.OpenPIOptions(robot="libero", tokenizer=str(folder / "tiny_sentencepiece.model"))
    policy = deploy.openpi_policy(checkpoint, options, deploy.ActingOptions(num_steps=3), model=model)
    picture = np.zeros((64, 48, 3), np.uint8)
    obs = {
        "observation/state": np.zeros(8, np.float32),
        "observation/image": picture,
        "observation/wrist_image": picture,
        "prompt": "pick up the cup",
        OPTIONS_KEY: {"seed": 3},
    }
    first, again = policy.infer(obs), policy.infer(obs)
    assert sorted(first) == ["actions", "policy_timing"]
    assert first["actions"].shape == (model.action_horizon, 7)  # of LIBERO's robot
    np.testing.assert_array_equal(first["actions"], again["actions"])
    acting = deploy.ActingOptions(num_steps=3, default_prompt=obs["prompt"])
    prompted = deploy.openpi_policy(checkpoint, options, acting, model=model)
    unsaid = {key: value for key, value in obs.items() if key != "prompt"}
    np.testing.assert_array_equal(prompted.infer(unsaid)["actions"], first["actions"])
    with pytest.raises(ValueError, match="say whose: --robot aloha"):
        deploy.openpi_policy(checkpoint, deploy.OpenPIOptions(), deploy.ActingOptions(), model=model)


def write_released(folder, *, vocab_size, asset_ids=("lab/arm",)):
    """A nano model as openpi's releases have it: parameters and statistics side by side, no training state."""
    sizes = {"paligemma_variant": "nano", "action_expert_variant": "nano_expert", "vision_variant": "nano"}
    model = Pi0Config(action_dim=8, vocab_size=vocab_size, **sizes)
    arrays = weights.flatten(nnx.eval_shape(lambda: model.create(nnx.Rngs(0))))
    weights.write_params(folder / "params", {path: np.zeros(leaf.shape, np.float32) for path, leaf in arrays.items()})
    for number, asset_id in enumerate(asset_ids, start=1):
        stats = statistics.bounds_stats(np.zeros(8), np.full(8, 2.0 * number))  # its mean is the number
        normalize.save(folder / "assets" / asset_id / normalize.FILE_NAME, {"state": stats, "actions": stats})
    return folder


def test_a_vocabulary_needs_its_own_tokenizer(tmp_path):
    """Tokens of the small one would be words of another language to a trained model."""
    own = PromptTokenizer().vocab_size
    larger = write_released(tmp_path / "larger", vocab_size=own + 1)
    with pytest.raises(ValueError, match=r"paligemma_tokenizer.model, with --tokenizer"):
        deploy.openpi_policy(larger, deploy.OpenPIOptions("libero"), deploy.ActingOptions())
    smaller = write_released(tmp_path / "smaller", vocab_size=own - 1)
    with pytest.raises(ValueError, match=rf"has {own} pieces, but the model's vocabulary has {own - 1}"):
        deploy.openpi_policy(smaller, deploy.OpenPIOptions("libero"), deploy.ActingOptions())


@pytest.mark.parametrize(
    "path",
    [
        "PaliGemma/llm/embedder/input_embedding",
        "PaliGemma/llm/layers/attn/q_einsum/w",
        "PaliGemma/llm/layers/mlp_1/linear",
        "PaliGemma/img/embedding/kernel",
        "action_out_proj/bias",
    ],
)
@pytest.mark.parametrize("misshapen", [False, True])
def test_a_checkpoint_without_an_array_is_explained(tmp_path, path, misshapen):
    folder = write_released(tmp_path / "whole", vocab_size=PromptTokenizer().vocab_size)
    arrays = weights.read_params(folder)
    if misshapen:
        arrays[path] = np.zeros((), np.float32)
    else:
        del arrays[path]
    weights.write(folder / "params", arrays, overwrite=True)
    problem = rf"shape: {path}, .* found \(\)" if misshapen else f"missing: {path}$"
    with pytest.raises(ValueError, match=rf"{folder}/params looks like pi0, but it is incomplete(.|\n)*{problem}"):
        deploy.openpi_policy(folder, deploy.OpenPIOptions("libero"), deploy.ActingOptions())


@pytest.mark.parametrize("below", ["", "10", "10/params"])
def test_statistics_are_those_of_the_step_that_is_served(tmp_path, monkeypatch, below):
    vocab_size = PromptTokenizer().vocab_size
    write_released(tmp_path / "2", vocab_size=vocab_size)
    write_released(tmp_path / "10", vocab_size=vocab_size, asset_ids=("lab/other",))
    read = mock.Mock(wraps=openpi.read_norm_stats)
    monkeypatch.setattr(openpi, "read_norm_stats", read)
    deploy.openpi_policy(tmp_path / below, deploy.OpenPIOptions("libero"), deploy.ActingOptions())
    read.assert_called_once_with(tmp_path / "10" / "assets", None)


def test_one_of_several_robots_statistics_is_chosen(tmp_path, monkeypatch):
    folder = write_released(tmp_path, vocab_size=PromptTokenizer().vocab_size, asset_ids=("arm", "lab/hand"))
    read = mock.Mock(wraps=openpi.to_model)
    monkeypatch.setattr(openpi, "to_model", read)
    deploy.openpi_policy(folder, deploy.OpenPIOptions("libero", asset_id="lab/hand"), deploy.ActingOptions())
    np.testing.assert_array_equal(read.call_args.args[1]["state"].mean, np.full(8, 2.0))
    with pytest.raises(ValueError, match=r"2 robots: name one \(--asset_id\) of arm, lab/hand"):
        deploy.openpi_policy(folder, deploy.OpenPIOptions("libero"), deploy.ActingOptions())
    with pytest.raises(
        ValueError, match="8 dimensions of state, but aloha has 14: name another --robot, or --asset_id"
    ):
        deploy.openpi_policy(folder, deploy.OpenPIOptions("aloha", asset_id="arm"), deploy.ActingOptions())
    with pytest.raises(ValueError, match="no statistics of asset id 'foot'; there are arm, lab/hand"):
        deploy.openpi_policy(folder, deploy.OpenPIOptions("libero", asset_id="foot"), deploy.ActingOptions())
