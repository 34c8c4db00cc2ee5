from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data.view.fast_tokenizer import FastPromptTokenizer, FastTokenizer, TokenizeFast
from acrlpd.data.view.tokenizer import PromptTokenizer, state_bins

HORIZON, DIM = 8, 3
VOCAB_SIZE = 1024  # of the model: 512 pieces of text, room for 300 FAST ids and 128 reserved ones


def draw_chunks(seed, n=1):
    """Smooth motions in [-1, 1]: straight lines with a wiggle."""
    rng = np.random.default_rng(seed)
    start, end = rng.uniform(-1, 1, (2, n, 1, DIM))
    time = np.linspace(0, 1, HORIZON)[None, :, None]
    return np.clip(start + (end - start) * time + 0.02 * rng.normal(size=(n, HORIZON, DIM)), -1, 1)


@pytest.fixture(scope="module")
def fast():
    return FastTokenizer.fit(draw_chunks(0, 400), vocab_size=300)


@pytest.fixture(scope="module")
def prompts(fast):
    return FastPromptTokenizer(fast, action_horizon=HORIZON, action_dim=DIM, max_length=100, vocab_size=VOCAB_SIZE)


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_ids_by_hand():
    """A constant of 1/2 over 4 steps is a coefficient of 1/2 * sqrt(4) = 1, in tenths 10, and three of 0."""
    fast = FastTokenizer.fit(np.array([[[0.5]] * 4, [[-0.5]] * 4]), scale=10.0, vocab_size=256)  # bytes, nothing merged
    assert (fast.min_token, fast.vocab_size) == (-10, 256)
    positive, negative, zero = fast.encode(np.array([[[0.5]] * 4, [[-0.5]] * 4, [[0.0]] * 4]))
    assert [fast.bpe.decode([i]) for i in positive] == [chr(20), chr(10), chr(10), chr(10)]
    assert [fast.bpe.decode([i]) for i in negative] == [chr(0), chr(10), chr(10), chr(10)]
    assert [fast.bpe.decode([i]) for i in zero] == [chr(10)] * 4
    np.testing.assert_allclose(fast.decode(negative), -0.5 * np.ones((4, 1)))


def test_characters_go_through_a_frequency_before_the_next():
    """Two dimensions, constants of 1/2 and 1: both coefficients of frequency 0 come first."""
    chunk = np.array([[[0.5, 1.0]] * 4])
    fast = FastTokenizer.fit(np.concatenate([chunk, 0 * chunk]), vocab_size=256)
    assert fast.bpe.decode(fast.encode(chunk)[0]) == chr(10) + chr(20) + 6 * chr(0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), rough=st.booleans())
def test_chunk_comes_back_within_its_quantization(fast, seed, rough):
    """Coefficients are off by half a tenth at most, and the transform keeps distances. Rough: nothing like the fit."""
    chunk = np.random.default_rng(seed).uniform(-0.5, 0.5, (HORIZON, DIM)) if rough else draw_chunks(seed)[0]
    (ids,) = fast.encode(chunk[None])
    error = np.linalg.norm(fast.decode(ids) - chunk, axis=0)
    assert (error <= np.sqrt(HORIZON) * 0.5 / fast.scale + 1e-9).all()


def test_finer_scale_is_closer_and_longer():
    chunks = draw_chunks(0, 200)
    coarse, fine = (FastTokenizer.fit(chunks, scale=scale, vocab_size=400) for scale in (5.0, 50.0))
    errors = [np.abs(f.decode(f.encode(chunks[:1])[0]) - chunks[0]).max() for f in (coarse, fine)]
    assert errors[1] < errors[0] / 2
    assert len(fine.encode(chunks[:1])[0]) > len(coarse.encode(chunks[:1])[0])


def test_fitted_pieces_shorten_chunks_like_those_of_the_fit(fast):
    new = draw_chunks(12345, 50)
    bytes_only = FastTokenizer.fit(draw_chunks(0, 400), vocab_size=256)
    lengths = [np.mean([len(ids) for ids in f.encode(new)]) for f in (fast, bytes_only)]
    assert lengths[0] < 0.8 * lengths[1]
    assert lengths[1] >= HORIZON * DIM


def test_fit_is_deterministic(fast):
    again = FastTokenizer.fit(draw_chunks(0, 400), vocab_size=300)
    assert again.bpe.to_str() == fast.bpe.to_str()


def test_saved_and_loaded(fast, tmp_path):
    fast.save(tmp_path / "fast")
    loaded = FastTokenizer.load(tmp_path / "fast")
    chunks = draw_chunks(1, 5)
    assert loaded.encode(chunks) == fast.encode(chunks)
    np.testing.assert_array_equal(loaded.decode(loaded.encode(chunks)[0]), fast.decode(fast.encode(chunks)[0]))
    config = json.loads((tmp_path / "fast/processor_config.json").read_text())
    assert (config["time_horizon"], config["action_dim"], config["vocab_size"]) == (HORIZON, DIM, fast.vocab_size)
    with pytest.raises(FileExistsError, match=r"tokenizer.json exists already"):
        fast.save(tmp_path / "fast")


def write_published(folder):
    """Files as the published processor has them: another pre-tokenizer, no chunk size, keys that we do not read."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["".join(map(chr, range(340, 370)))] * 3, vocab_size=280, show_progress=False)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "action_dim": None,
        "auto_map": {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
        "min_token": -354,
        "processor_class": "UniversalActionProcessor",
        "scale": 10,
        "time_horizon": None,
        "vocab_size": 2048,
    }
    (folder / "processor_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"scale": 10}', "has no min_token"),
        ('{"scale": 0, "min_token": -1}', "scale must be a positive number, got 0"),
        ('{"scale": 10, "min_token": "x"}', "min_token must be a whole number, got 'x'"),
        ('{"scale": 10, "min_token": -1, "action_dim": 0}', "time_horizon and action_dim must be positive or null"),
    ],
)
def test_broken_configurations_are_named(tmp_path, text, complaint):
    write_published(tmp_path / "fast")
    (tmp_path / "fast" / "processor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"processor_config.json:? {complaint}"):
        FastTokenizer.load(tmp_path / "fast")


def test_published_files_load(tmp_path):
    write_published(tmp_path / "fast")
    fast = FastTokenizer.load(tmp_path / "fast")
    assert (fast.scale, fast.min_token, fast.vocab_size) == (10, -354, 280)
    chunks = draw_chunks(2, 3)
    ids = fast.encode(chunks)
    np.testing.assert_allclose(fast.decode(ids[0], action_horizon=HORIZON, action_dim=DIM), chunks[0], atol=0.15)
    text = fast.bpe.decode(fast.encode(np.zeros((1, HORIZON, DIM)))[0])
    assert text == chr(354) * HORIZON * DIM
    with pytest.raises(ValueError, match="give action_horizon and action_dim"):
        fast.decode(ids[0])


def test_coefficients_below_the_lowest_are_raised_to_it():
    fast = FastTokenizer.fit(np.array([[[0.5]] * 4, [[-0.5]] * 4]), vocab_size=256)
    np.testing.assert_allclose(fast.decode(fast.encode(np.full((1, 4, 1), -3.0))[0]), -0.5 * np.ones((4, 1)))


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing. Download physical-intelligence/fast"):
        FastTokenizer.load(tmp_path)
    write_published(tmp_path / "fast")
    (tmp_path / "fast/processor_config.json").write_text('{"scale": 10}')
    with pytest.raises(ValueError, match=r"processor_config.json has no min_token"):
        FastTokenizer.load(tmp_path / "fast")
    (tmp_path / "fast/processor_config.json").write_text('{"scale": 10, "min_token": 0}')
    (tmp_path / "fast/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a file of the tokenizers library"):
        FastTokenizer.load(tmp_path / "fast")


def test_absent_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[fast\]'"):
        FastTokenizer.load(tmp_path)


def test_actions_without_tokens_are_refused(fast):
    with pytest.raises(ValueError, match="must be finite"):
        fast.encode(np.full((1, HORIZON, DIM), np.nan))
    with pytest.raises(ValueError, match="as large as 1e\\+06 have no FAST tokens: normalize"):
        fast.encode(np.full((1, HORIZON, DIM), 1e6))
    with pytest.raises(ValueError, match="vocab_size \\(10\\) must be at least 256"):
        FastTokenizer.fit(draw_chunks(0, 2), vocab_size=10)


def test_ids_that_are_no_chunk_are_refused(fast):
    (ids,) = fast.encode(draw_chunks(0))
    with pytest.raises(ValueError, match="a chunk of 8 steps and 3 dimensions has 24"):
        fast.decode(ids[:-1])
    with pytest.raises(ValueError, match="300 is not a FAST id: there are 300"):
        fast.decode([*ids, 300])
    lone_byte = fast.bpe.token_to_id("Ã")  # the first of two bytes of a character
    (zeros,) = fast.encode(np.zeros((1, 24, 1)))
    broken = [lone_byte] + [fast.bpe.encode(chr(1)).ids[0]] * 23
    assert len(fast.bpe.decode(broken)) == 24
    assert fast.decode(zeros, action_horizon=24, action_dim=1).any() == 0
    with pytest.raises(ValueError, match="perhaps broken"):
        fast.decode(broken)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_text_of_a_training_sample(prompts, fast):
    """Written out piece by piece, with the masks beside it."""
    state, chunk = np.array([-1.5, 0.0, 1.0]), draw_chunks(4)[0]
    tokens, mask, ar_mask, loss_mask = (x[0] for x in prompts.encode([" Pick_up the CUBE\n"], state[None], chunk[None]))
    text = PromptTokenizer()._processor
    prefix = text.encode("Task: pick up the cube, State: -1 128 255;\n", add_bos=True)
    actions = [VOCAB_SIZE - 1 - 128 - i for i in fast.encode(chunk[None])[0]]
    suffix = [*text.encode("Action: "), *actions, *text.encode("|"), 1]
    length = len(prefix) + len(suffix)
    assert tokens[:length].tolist() == prefix + suffix
    assert not tokens[length:].any()
    np.testing.assert_array_equal(mask, np.arange(100) < length)
    is_suffix = (np.arange(100) >= len(prefix)) & (np.arange(100) < length)
    np.testing.assert_array_equal(ar_mask, is_suffix)
    np.testing.assert_array_equal(loss_mask, is_suffix)
    assert [str(x.dtype) for x in (tokens, mask, ar_mask, loss_mask)] == ["int64", "bool", "int64", "bool"]


def test_text_without_actions_is_the_prefix_of_one_with_them(prompts):
    states, chunks = np.zeros((2, DIM)), draw_chunks(5, 2)
    tasks = ["lift", "fold the towel"]
    given, whole = prompts.encode(tasks, states), prompts.encode(tasks, states, chunks)
    is_prompt = whole.tokenized_prompt_mask & ~whole.token_loss_mask
    np.testing.assert_array_equal(given.tokenized_prompt, whole.tokenized_prompt * is_prompt)
    np.testing.assert_array_equal(given.tokenized_prompt_mask, is_prompt)
    assert not given.token_ar_mask.any()
    assert not given.token_loss_mask.any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_chunk_comes_back_from_its_text(prompts, fast, seed):
    """From all of it, and from what a model generates behind the prompt, with anything behind the end."""
    chunk = draw_chunks(seed)
    encoded = prompts.encode(["lift"], np.zeros((1, DIM)), chunk)
    expected = fast.decode(fast.encode(chunk)[0])
    np.testing.assert_array_equal(prompts.decode(encoded.tokenized_prompt[0]), expected)
    generated = encoded.tokenized_prompt[0][encoded.token_loss_mask[0]]
    rest = np.random.default_rng(seed).integers(0, VOCAB_SIZE, 10)
    np.testing.assert_array_equal(prompts.decode(np.concatenate([generated, rest])), expected)
    np.testing.assert_array_equal(prompts.decode(generated[:-2]), expected)  # neither "|" nor EOS


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tokens: tokens[3:], "there is no 'Action: ' in it"),
        (lambda tokens: np.delete(tokens, 5), "FAST ids stand for"),
        (lambda tokens: np.insert(tokens, 5, VOCAB_SIZE - 1), "-128 is not a FAST id"),
        (lambda tokens: np.zeros_like(tokens), "there is no 'Action: ' in it"),
    ],
)
def test_a_text_without_a_chunk_gives_zeros_and_says_why_each_time(prompts, caplog, spoil, reason):
    encoded = prompts.encode(["lift"], np.zeros((1, DIM)), draw_chunks(7))
    generated = encoded.tokenized_prompt[0][encoded.token_loss_mask[0]]
    for said in (1, 2):
        np.testing.assert_array_equal(prompts.decode(spoil(generated)), np.zeros((HORIZON, DIM)))
        assert len(re.findall(f"zeros stand for it: .*{reason}", caplog.text)) == said


def test_long_texts_are_cut_with_a_warning(fast, prompts, caplog):
    short = FastPromptTokenizer(fast, action_horizon=HORIZON, action_dim=DIM, max_length=20, vocab_size=VOCAB_SIZE)
    arguments = (["lift"], np.zeros((1, DIM)), draw_chunks(8))
    cut = short.encode(*arguments)
    assert "of them actions, was cut to max_length=20" in caplog.text
    for ours, whole in zip(cut, prompts.encode(*arguments), strict=True):
        np.testing.assert_array_equal(ours[0], whole[0, :20])


def test_action_tokens_must_not_end_a_text(fast):
    """The nano tokenizer's 512 pieces leave no room for 300 actions before 128 reserved ids."""
    with pytest.raises(ValueError, match=r"would take the tokens 84 to 383 of 512.* vocab_size of at least 940"):
        FastPromptTokenizer(fast, action_horizon=HORIZON, action_dim=DIM)
    with pytest.raises(ValueError, match=r"vocab_size \(100\) is smaller than the text's \(512\)"):
        FastPromptTokenizer(fast, action_horizon=HORIZON, action_dim=DIM, vocab_size=100)
    roomy = FastPromptTokenizer(fast, action_horizon=HORIZON, action_dim=DIM, vocab_size=940)
    assert roomy._first_action - (fast.vocab_size - 1) == 512


@pytest.mark.golden
def test_text_in_openpis_sentencepiece_model(shared, fast):
    """The state's bins and the FAST ids' place, from the formulas alone: the vocabulary's end less 128."""
    model = shared / "golden/tiny_sentencepiece.model"
    text = PromptTokenizer(model)._processor
    prompts = FastPromptTokenizer(
        fast, model, action_horizon=HORIZON, action_dim=DIM, max_length=200, vocab_size=text.vocab_size() + 500
    )
    state, chunk = np.linspace(-1.1, 1.1, DIM), draw_chunks(9)
    tokens, mask, _, loss_mask = (x[0] for x in prompts.encode(["stack_the Blocks "], state[None], chunk))
    bins = " ".join(str(bin) for bin in state_bins(state))
    assert tokens[mask & ~loss_mask].tolist() == [2, *text.encode(f"Task: stack the blocks, State: {bins};\n")]
    actions = tokens[loss_mask][len(text.encode("Action: ")) : -len(text.encode("|")) - 1]
    assert (text.vocab_size() + 500 - 1 - 128 - actions).tolist() == fast.encode(chunk)[0]


# -- as a transform ----------------------------------------------------------------------------------------------------


def test_transform_and_its_inverse(prompts, fast):
    chunks = draw_chunks(10, 2)
    data = {"prompt": np.array(["lift", "fold"]), "state": np.zeros((2, DIM)), "actions": chunks}
    tokenized = TokenizeFast(prompts)(data)
    expected = prompts.encode(["lift", "fold"], data["state"], chunks)
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(tokenized[name], value)
    assert "prompt" not in tokenized
    back = TokenizeFast(prompts).inverse({"state": data["state"], "actions": tokenized["tokenized_prompt"]})
    np.testing.assert_allclose(back["actions"], [fast.decode(ids) for ids in fast.encode(chunks)])


def test_transform_of_one_observation(prompts):
    data = {"prompt": "lift", "state": np.zeros(DIM)}
    tokenized = TokenizeFast(prompts)(data)
    assert tokenized["tokenized_prompt"].shape == tokenized["token_ar_mask"].shape == (100,)
    one = prompts.encode(["lift"], np.zeros((1, DIM)), draw_chunks(11))
    back = TokenizeFast(prompts).inverse(data | {"actions": one.tokenized_prompt[0]})
    assert back["actions"].shape == (HORIZON, DIM)
    with pytest.raises(ValueError, match="the data has no prompt"):
        TokenizeFast(prompts)({"state": data["state"], "prompt": None})
