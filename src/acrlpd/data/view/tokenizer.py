"""Tokenize prompts as PaliGemma and openpi do: SentencePiece with pad 0, EOS 1, BOS 2."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int

from acrlpd.files import read_bytes
from acrlpd.types import typed

NUM_STATE_BINS = 256
_BIN_TEXTS = {i: str(i) for i in range(-1, NUM_STATE_BINS)}
CACHE_SIZE = 4096  # number of texts; a training set has few prompts, but pi0.5 writes the state into the text


class PromptTokenizer:
    """A tokenizer that turns a task text into a fixed number of tokens; for pi0.5 the text includes the state.

    Args:
        path: a SentencePiece model, such as PaliGemma's ``paligemma_tokenizer.model``; the default is the small model
            of this package, for the nano models.
        max_length: number of tokens to which every prompt is padded or cut (openpi: 48 for pi0, 200 for pi0.5).
        vocab_size: number of token embeddings of the model; a larger tokenizer is refused. None skips this check.
    """

    def __init__(self, path: Path | str | None = None, *, max_length: int = 48, vocab_size: int | None = None):
        self.max_length = max_length
        self._path = path
        self._processor = load_processor(path)
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ValueError(
                f"{path or 'the tokenizer of this package'} has {self.vocab_size} pieces, but the model's vocabulary "
                f"has {vocab_size}: the others would have no embedding. Name the tokenizer that belongs to the model."
            )
        self._tokens = functools.lru_cache(maxsize=CACHE_SIZE)(self._encode_uncached)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def check_trained(self, vocab_size: int) -> None:
        """Raise ValueError if the package's own tokenizer would replace the one that the model was trained with."""
        if self._path is None and self.vocab_size != vocab_size:
            raise ValueError(
                f"the model was trained with a vocabulary of {vocab_size}, and the tokenizer of this package has "
                f"{self.vocab_size} pieces: its tokens would mean nothing to the model. Name the model's own, "
                "PaliGemma's paligemma_tokenizer.model, with --tokenizer (in training --policy.tokenizer)."
            )

    @typed
    def encode(
        self, prompt: str, state: Float[np.ndarray, " s"] | None = None
    ) -> tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
        """Return the tokens (int64) and the mask (true = token, false = padding) of one prompt."""
        tokens, mask = self.encode_batch([prompt], None if state is None else state[None])
        return tokens[0], mask[0]

    @typed
    def encode_batch(
        self, prompts: Sequence[str], states: Float[np.ndarray, "b s"] | None = None
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Encode every prompt like ``encode``, equal texts only once. ``states`` are normalized and not padded."""
        texts = list(prompts) if states is None else _with_state(prompts, states)
        index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        rows = np.array([index[text] for text in texts], dtype=np.int64)
        encoded = [self._tokens(text, states is not None) for text in index]
        lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        table = np.zeros((len(encoded), self.max_length), dtype=np.int64)
        for row, tokens in zip(table, encoded, strict=True):
            row[: len(tokens)] = tokens
        return table[rows], np.arange(self.max_length)[None, :] < lengths[rows, None]

    def count(self, prompt: str, state: Float[np.ndarray, " s"] | None = None) -> tuple[int, int]:
        """Return how many tokens a prompt has before it is cut, and how many of them stand for unknown text.

        These are the tokens of single bytes, where the vocabulary has no piece for a character.
        """
        text = prompt if state is None else _with_state([prompt], state[None])[0]
        model = self._processor
        foreign = sum(model.is_byte(token) or model.is_unknown(token) for token in model.encode(clean(prompt)))
        return len(self._uncut(text, state is not None)), foreign

    def _uncut(self, text: str, has_state: bool) -> list[int]:
        if has_state:
            return self._processor.encode(text, add_bos=True)
        # pi0 marks the start of the answer with a newline; encoded separately, it never merges with the text
        return self._processor.encode(clean(text), add_bos=True) + self._processor.encode("\n")

    def _encode_uncached(self, text: str, has_state: bool) -> tuple[int, ...]:
        tokens = self._uncut(text, has_state)
        if len(tokens) > self.max_length:
            warnings.warn(
                f"a prompt of {len(tokens)} tokens was cut to max_length={self.max_length}: {text[:80]!r}. "
                "Shorten the text or raise max_length in the model's configuration.",
                stacklevel=2,
            )
        return tuple(tokens[: self.max_length])


def clean(prompt: str) -> str:
    """Clean a text like openpi. The order matters: a final newline is removed, one before "_" becomes a space."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


@typed
def state_bins(state: Float[np.ndarray, "*batch s"]) -> Int[np.ndarray, "*batch s"]:
    """Return the bin of each number: 0..255, of equal width over [-1, 1]; -1 below, 255 from 1 on, as in openpi."""
    edges = np.linspace(-1.0, 1.0, NUM_STATE_BINS + 1)[:-1]
    return np.searchsorted(edges, state, side="right") - 1


def _with_state(prompts: Sequence[str], states: np.ndarray) -> list[str]:
    return [
        f"Task: {clean(prompt)}, State: {' '.join([_BIN_TEXTS[i] for i in bins])};\nAction: "
        for prompt, bins in zip(prompts, state_bins(states).tolist(), strict=True)
    ]


def load_processor(path: Path | str | None) -> sentencepiece.SentencePieceProcessor:
    if path is None:
        model = resources.files("acrlpd.data").joinpath("assets/nano_tokenizer.model").read_bytes()
    elif Path(path).is_file():
        model = read_bytes(path)
    else:
        raise FileNotFoundError(
            f"no tokenizer model at {path}. pi0 and pi0.5 need PaliGemma's paligemma_tokenizer.model; "
            "leave the path out for the small tokenizer of the nano models."
        )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected a SentencePiece model, such as PaliGemma's paligemma_tokenizer.model; it is damaged or "
            f"another file ({str(error).strip()})"
        ) from error
    ids = (processor.pad_id(), processor.eos_id(), processor.bos_id())
    if ids != (0, 1, 2):
        raise ValueError(f"{path}: pad, EOS and BOS must be tokens 0, 1 and 2 as in PaliGemma, got {ids}")
    return processor
