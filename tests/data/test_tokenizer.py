import importlib.util
import json
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from acrlpd.data.view.tokenizer import CACHE_SIZE, PromptTokenizer, clean, state_bins


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(max_length=48)


def decode(tokenizer, tokens):
    return tokenizer._processor.decode([int(token) for token in tokens])


def test_text_is_cleaned_in_openpis_order():
    assert clean("  Fold_the\ntowel \n") == "Fold the towel"
    assert clean("_lift_\n") == " lift "  # stripped first: what "_" turns into stays


def test_prompt_of_pi0_ends_with_a_newline_of_its_own(tokenizer):
    tokens, mask = tokenizer.encode("pick_up the Cube\n")
    length = int(mask.sum())
    assert (tokens.dtype, mask.dtype, tokens.shape) == (np.int64, bool, (48,))
    assert tokens[0] == 2
    assert decode(tokenizer, tokens[1:length]) == "pick up the Cube\n"
    assert tokens[length - 1] == tokenizer._processor.encode("\n")[0]
    assert mask[:length].all()
    assert not mask[length:].any()
    assert not tokens[length:].any()


def test_prompt_of_pi05_holds_the_state(tokenizer):
    state = np.array([-1.01, -1.0, 0.0, 1.0, 1 - 1e-9], np.float64)
    tokens, mask = tokenizer.encode(" lift_it ", state)
    assert decode(tokenizer, tokens[1 : mask.sum()]) == "Task: lift it, State: -1 0 128 255 255;\nAction: "


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-1.5, -1), (-1.0, 0), (-1 + 2 / 256, 1), (-1e-9, 127), (0.0, 128), (0.999, 255), (1.0, 255), (7.0, 255)],
)
def test_state_bins(value, expected):
    assert state_bins(np.array([value])) == expected


def test_long_prompts_are_cut_at_the_end_with_a_warning():
    short, long = PromptTokenizer(max_length=5), PromptTokenizer(max_length=40)
    with pytest.warns(UserWarning, match=r"tokens was cut to max_length=5: 'pick up the red cube"):
        tokens, mask = short.encode("pick up the red cube from the table")
    np.testing.assert_array_equal(tokens, long.encode("pick up the red cube from the table")[0][:5])
    assert mask.all()


def test_batch_equals_one_by_one(tokenizer):
    prompts = ["lift", "fold the towel", "lift"]
    states = np.array([[0.1, 0.2], [0.3, 0.4], [0.1, -0.2]])
    for given in (None, states):
        tokens, mask = tokenizer.encode_batch(prompts, given)
        for row, prompt in enumerate(prompts):
            one = tokenizer.encode(prompt, None if given is None else given[row])
            np.testing.assert_array_equal(tokens[row], one[0])
            np.testing.assert_array_equal(mask[row], one[1])


def test_the_cache_hands_out_no_shared_array_and_is_bounded():
    tokenizer = PromptTokenizer(max_length=8)
    first, _ = tokenizer.encode("lift")
    first[:] = 99
    assert (tokenizer.encode("lift")[0] != 99).all()
    assert tokenizer._tokens.cache_info().hits == 1
    assert tokenizer._tokens.cache_info().maxsize == CACHE_SIZE


@pytest.mark.parametrize("text", ["把红色的方块拿起来", "öffne die Schublade", "pick-place-v3: 0.25 m", "🦾"])
def test_any_text_encodes_and_comes_back(tokenizer, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, mask = tokenizer.encode(text)
    assert decode(tokenizer, tokens[1 : mask.sum()]) == f"{text}\n"
    assert 3 not in tokens  # unknown


def test_missing_and_foreign_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"paligemma_tokenizer.model; leave the path out"):
        PromptTokenizer(tmp_path / "absent.model")
    sentencepiece.SentencePieceTrainer.train(  # its own defaults: unknown 0, BOS 1, EOS 2, no padding
        sentence_iterator=iter(["lift the cube"]),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"foreign.model: pad, EOS and BOS must be .* got \(-1, 2, 1\)"):
        PromptTokenizer(tmp_path / "foreign.model")


@pytest.mark.parametrize("content", [b"", b"hello world"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "notes.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.model: expected a SentencePiece model"):
        PromptTokenizer(tmp_path / "notes.model")


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(tmp_path):
    own = PromptTokenizer().vocab_size
    with pytest.raises(ValueError, match=rf"tokenizer of this package has {own} pieces, .* vocabulary has {own - 1}"):
        PromptTokenizer(vocab_size=own - 1)
    PromptTokenizer(vocab_size=own).check_trained(own)
    with pytest.raises(ValueError, match=r"vocabulary of 257152.*paligemma_tokenizer.model, with --tokenizer"):
        PromptTokenizer(vocab_size=257_152).check_trained(257_152)
    copy = tmp_path / "own.model"
    copy.write_bytes(resources.files("acrlpd.data").joinpath("assets/nano_tokenizer.model").read_bytes())
    PromptTokenizer(copy, vocab_size=257_152).check_trained(257_152)  # whoever names one is taken at their word


def test_the_packaged_model_is_what_the_script_makes():
    path = Path(__file__).parents[2] / "scripts/train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    packaged = resources.files("acrlpd.data").joinpath("assets/nano_tokenizer.model").read_bytes()
    assert len(packaged) < 50_000
    assert script.train() == packaged
    assert PromptTokenizer().vocab_size == script.VOCAB_SIZE


@pytest.mark.golden
def test_tokens_are_openpis(shared):
    folder = shared / "golden"
    cases = json.loads((folder / "tokenizer.json").read_text())
    assert any(case["state"] is not None for case in cases)
    for case in cases:
        tokenizer = PromptTokenizer(folder / "tiny_sentencepiece.model", max_length=case["max_len"])
        state = None if case["state"] is None else np.array(case["state"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some cases are cut on purpose
            tokens, mask = tokenizer.encode(case["prompt"], state)
        assert tokens.tolist() == case["tokens"]
        assert mask.tolist() == case["mask"]
        assert [str(tokens.dtype), str(mask.dtype)] == case["dtypes"]


@pytest.mark.golden
def test_state_bins_are_openpis(shared):
    arrays = np.load(shared / "golden/functions.npz")
    np.testing.assert_array_equal(state_bins(arrays["state_bins/x"]), arrays["state_bins/bins"])
