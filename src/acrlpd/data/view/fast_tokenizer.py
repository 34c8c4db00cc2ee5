"""FAST action tokens (Pertsch et al. 2025, arXiv:2501.09747), and the text in which π₀-FAST reads and writes them.

A chunk's cosine transform over time is rounded, so that a smooth motion leaves a few numbers and many zeros. Each
number becomes a character, and byte-pair encoding merges the characters into few tokens. The text then is

    BOS Task: <prompt>, State: <bins>;⏎ | Action: <FAST tokens>| EOS
       given, full attention            | learned, causal attention
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import fft

from acrlpd import files
from acrlpd.data.view.tokenizer import load_processor, state_bins
from acrlpd.data.view.transforms import Data, prompt_texts
from acrlpd.types import typed

logger = logging.getLogger(__name__)

PAD, EOS, BOS = 0, 1, 2
NUM_RESERVED = 128  # ids at the vocabulary's end that openpi does not use for actions: PaliGemma's segmentation tokens
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "processor_config.json"

_ALPHABET = 256  # number of bytes; with all of them in the vocabulary, every text can be encoded
_END_OF_CHARACTERS = 0xD800  # the first code point without an encoding
_NOT_A_CHARACTER = "\ufffd"  # invalid bytes decode to this


@dataclasses.dataclass(frozen=True)
class FastTokenizer:
    """A converter of action chunks to short lists of ids and back; reads the files of ``physical-intelligence/fast``.

    Actions are normalized, about -1 to 1. An id stands for a piece of a text with one character per coefficient, which
    begins with all dimensions of the lowest frequency.
    """

    bpe: Any  # tokenizers.Tokenizer
    scale: float  # coefficients are rounded to the nearest 1 / scale
    min_token: int  # the rounded coefficient of character 0; lower coefficients are raised to it
    action_horizon: int | None = None  # default size of decoded chunks
    action_dim: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    @classmethod
    def load(cls, path: Path | str) -> FastTokenizer:
        """Load the published processor's ``tokenizer.json`` and ``processor_config.json`` from a folder."""
        tokenizers = _import_tokenizers()
        tokenizer_file, config_file = (Path(path) / name for name in (TOKENIZER_FILE, CONFIG_FILE))
        for file in (tokenizer_file, config_file):
            if not file.is_file():
                raise FileNotFoundError(
                    f"no FAST tokenizer at {path}: {file.name} is missing. Download physical-intelligence/fast from "
                    "the Hugging Face hub into that folder, or fit one to your actions (FastTokenizer.fit) and save it."
                )
        config = _read_config(config_file)
        try:
            bpe = tokenizers.Tokenizer.from_str(files.read_text(tokenizer_file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{tokenizer_file} is not a file of the tokenizers library: {error}") from error
        return cls(bpe, config["scale"], config["min_token"], config.get("time_horizon"), config.get("action_dim"))

    def save(self, path: Path | str) -> None:
        """Write the two files that ``load`` reads; refuse to replace existing ones."""
        folder = Path(path)
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            if (folder / name).exists():
                raise FileExistsError(f"{folder / name} exists already: name another folder, or delete it first")
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "action_dim": self.action_dim,
            "min_token": self.min_token,
            "scale": self.scale,
            "time_horizon": self.action_horizon,
            "vocab_size": self.vocab_size,
        }
        self.bpe.save(str(folder / TOKENIZER_FILE))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    @typed
    def fit(cls, chunks: Float[np.ndarray, "n h a"], *, scale: float = 10.0, vocab_size: int = 1024) -> FastTokenizer:
        """Fit a tokenizer to the frequent pieces in normalized ``chunks``; the result is deterministic.

        Other chunks can be encoded too, with more tokens. ``vocab_size`` is reached only if enough pieces occur twice.
        """
        tokenizers = _import_tokenizers()
        if vocab_size < _ALPHABET:
            raise ValueError(f"vocab_size ({vocab_size}) must be at least {_ALPHABET}: each byte is a token")
        _, action_horizon, action_dim = chunks.shape
        min_token = int(_quantize(chunks, scale).min())
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        fitted = cls(bpe, scale, min_token, action_horizon, action_dim)
        bpe.train_from_iterator(fitted._texts(chunks), trainer=trainer)
        return fitted

    @typed
    def encode(self, chunks: Float[np.ndarray, "n h a"]) -> list[list[int]]:
        """Return the ids of each chunk; their number varies."""
        return [self.bpe.encode(text).ids for text in self._texts(chunks)]

    @typed
    def decode(
        self, ids: Sequence[int], *, action_horizon: int | None = None, action_dim: int | None = None
    ) -> Float[np.ndarray, "h a"]:
        """Return the chunk that ids encode; raise ``ValueError`` if they encode none of that size."""
        horizon, dim = action_horizon or self.action_horizon, action_dim or self.action_dim
        if horizon is None or dim is None:
            raise ValueError("this FAST tokenizer does not fix the size of a chunk: give action_horizon and action_dim")
        foreign = [i for i in ids if not 0 <= i < self.vocab_size]
        if foreign:
            raise ValueError(f"{foreign[0]} is not a FAST id: there are {self.vocab_size}")
        text = self.bpe.decode(list(ids), skip_special_tokens=False)
        if len(text) != horizon * dim or _NOT_A_CHARACTER in text:
            raise ValueError(
                f"{len(ids)} FAST ids stand for {len(text)} coefficients, some of them perhaps broken; "
                f"a chunk of {horizon} steps and {dim} dimensions has {horizon * dim}"
            )
        coefficients = np.array([ord(character) for character in text]).reshape(horizon, dim) + self.min_token
        return fft.idct(coefficients / self.scale, axis=0, norm="ortho")

    def _texts(self, chunks: Float[np.ndarray, "n h a"]) -> list[str]:
        codes = np.maximum(_quantize(chunks, self.scale) - self.min_token, 0).reshape(len(chunks), -1)
        if codes.size and codes.max() >= _END_OF_CHARACTERS:
            raise ValueError(
                f"actions as large as {np.abs(chunks).max():g} have no FAST tokens: normalize them to about -1 to 1"
            )
        return ["".join(map(chr, row)) for row in codes.tolist()]


def _quantize(chunks: Float[np.ndarray, "n h a"], scale: float) -> Int[np.ndarray, "n h a"]:
    if not np.isfinite(chunks).all():
        raise ValueError("actions to tokenize must be finite: some are NaN or infinite")
    return np.around(fft.dct(chunks, axis=1, norm="ortho") * scale).astype(np.int64)


def _read_config(file: Path) -> dict[str, Any]:
    config = files.read_json(file)
    expected = "expected a FAST processor's configuration"
    missing = sorted({"scale", "min_token"} - config.keys())
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}: {expected}")
    scale, sizes = config["scale"], [config.get("time_horizon"), config.get("action_dim")]
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ValueError(f"{file}: scale must be a positive number, got {scale!r}: {expected}")
    if not isinstance(config["min_token"], int):
        raise ValueError(f"{file}: min_token must be a whole number, got {config['min_token']!r}: {expected}")
    if any(size is not None and not (isinstance(size, int) and size > 0) for size in sizes):
        raise ValueError(f"{file}: time_horizon and action_dim must be positive or null, got {sizes}: {expected}")
    return config


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"FAST tokens need an extra: pip install 'acrlpd[fast]' ({error})") from error
    return tokenizers


class PromptTokens(NamedTuple):
    """A batch of tokenized texts, with the fields of an ``Observation``."""

    tokenized_prompt: Int[np.ndarray, "b l"]  # int64
    tokenized_prompt_mask: Bool[np.ndarray, "b l"]  # true = token, false = padding
    token_ar_mask: Int[np.ndarray, "b l"]  # int64; 1 = causal attention (actions), 0 = prompt or padding
    token_loss_mask: Bool[np.ndarray, "b l"]  # true = learned


class FastPromptTokenizer:
    """A converter of task, state and actions to the text of π₀-FAST, and of the text that it writes to actions.

    FAST id i is the i-th token (from 0) from the end of the vocabulary, not counting the reserved ids.

    Args:
        fast: the tokenizer of the actions.
        path: the tokenizer of the text, a SentencePiece model as for ``PromptTokenizer``.
        action_horizon: steps of a decoded chunk.
        action_dim: dimensions of a decoded action.
        max_length: number of tokens to which every text is padded or cut.
        vocab_size: the model's vocabulary size, if larger than the text tokenizer's. FAST ids then lie behind all text
            pieces, which the nano tokenizer needs. openpi puts them on PaliGemma's last pieces, which no text uses.
        num_reserved: ids at the vocabulary's end that no action uses.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        path: Path | str | None = None,
        *,
        action_horizon: int,
        action_dim: int,
        max_length: int = 250,
        vocab_size: int | None = None,
        num_reserved: int = NUM_RESERVED,
    ):
        self.fast = fast
        self.action_horizon = action_horizon
        self.action_dim = action_dim
        self.max_length = max_length
        self._processor = load_processor(path)
        self.vocab_size = self._processor.vocab_size() if vocab_size is None else vocab_size
        if self.vocab_size < self._processor.vocab_size():
            raise ValueError(
                f"vocab_size ({self.vocab_size}) is smaller than the text's ({self._processor.vocab_size()})"
            )
        self._start, self._end = self._processor.encode("Action: "), self._processor.encode("|")
        self._first_action = self.vocab_size - 1 - num_reserved  # the token of FAST id 0; others count down from it
        last_action = self._first_action - (fast.vocab_size - 1)
        taken = [i for i in (PAD, EOS, BOS, *self._end) if last_action <= i <= self._first_action]
        if taken or last_action < 0:
            raise ValueError(
                f"{fast.vocab_size} FAST ids would take the tokens {last_action} to {self._first_action} of "
                f"{self.vocab_size}, among them those that end a text. Give a vocab_size of at least "
                f"{self._processor.vocab_size() + fast.vocab_size + num_reserved}, here and to the model."
            )

    @typed
    def encode(
        self,
        prompts: Sequence[str],
        states: Float[np.ndarray, "b s"],
        actions: Float[np.ndarray, "b h a"] | None = None,
    ) -> PromptTokens:
        """Encode normalized, unpadded states and actions. Without actions the texts end where the model continues."""
        prefixes = [self._prefix(prompt, state) for prompt, state in zip(prompts, states, strict=True)]
        suffixes = [[]] * len(prefixes) if actions is None else self._suffixes(actions)
        b, l = len(prefixes), self.max_length  # noqa: E741
        tokens = np.full((b, l), PAD, np.int64)
        for row, prefix, suffix in zip(tokens, prefixes, suffixes, strict=True):
            text = prefix + suffix
            if len(text) > l:
                logger.warning(
                    "a text of %d tokens, %d of them actions, was cut to max_length=%d. Shorten the prompt or the "
                    "chunk, or raise max_length here and in the model's configuration.",
                    *(len(text), len(suffix), l),
                )
            row[: len(text)] = text[:l]
        column = np.arange(l)[None, :]
        prefix_end = np.array([len(prefix) for prefix in prefixes], np.int64)[:, None]
        end = prefix_end + np.array([len(suffix) for suffix in suffixes], np.int64)[:, None]
        is_suffix = (column >= prefix_end) & (column < end)
        return PromptTokens(tokens, column < end, is_suffix.astype(np.int64), is_suffix)

    @typed
    def decode(self, tokens: Int[np.ndarray, " l"]) -> Float[np.ndarray, "h a"]:
        """Return the chunk between ``Action: `` and ``|`` (or EOS, or the end); if invalid, warn and return zeros.

        openpi decodes the tokens to text and encodes that again, which gives the same ids unless pieces of text merge;
        here the ids are used directly.
        """
        ids = tokens.tolist()
        start = _find(ids, self._start)
        if start is None:
            return self._none("there is no 'Action: ' in it")
        written = ids[start + len(self._start) :]
        ends = [end for end in (_find(written, self._end), _find(written, [EOS])) if end is not None]
        chunk = [self._first_action - i for i in written[: min(ends, default=None)] if i != PAD]
        try:
            return self.fast.decode(chunk, action_horizon=self.action_horizon, action_dim=self.action_dim)
        except ValueError as error:
            return self._none(str(error))

    def _prefix(self, prompt: str, state: np.ndarray) -> list[int]:
        text = prompt.lower().strip().replace("_", " ")
        bins = " ".join(map(str, state_bins(state).tolist()))
        return self._processor.encode(f"Task: {text}, State: {bins};\n", add_bos=True)

    def _suffixes(self, actions: np.ndarray) -> list[list[int]]:
        return [
            [*self._start, *(self._first_action - i for i in ids), *self._end, EOS] for ids in self.fast.encode(actions)
        ]

    def _none(self, reason: str) -> np.ndarray:
        # log every time, because a robot gets the zeros; ``warnings`` would report it only once
        logger.warning("the model wrote no action chunk, zeros stand for it: %s", reason)
        return np.zeros((self.action_horizon, self.action_dim))


def _find(ids: list[int], pattern: list[int]) -> int | None:
    """Return the index at which ``pattern`` first begins, or None."""
    begins = range(len(ids) - len(pattern) + 1)
    return next((i for i in begins if ids[i : i + len(pattern)] == pattern), None)


@dataclasses.dataclass(frozen=True)
class TokenizeFast:
    """A transform of ``prompt``, ``state`` and, in training, ``actions`` to tokens; its inverse decodes ``actions``.

    It replaces ``transforms.TokenizePrompt`` of the other models. As in openpi, state and actions are then not padded.
    """

    tokenizer: FastPromptTokenizer

    def __call__(self, data: Data) -> Data:
        state = np.asarray(data["state"])
        batch = state.shape[:-1]
        prompts = np.broadcast_to(prompt_texts(data.get("prompt")), batch).ravel().tolist()
        actions = None
        if "actions" in data:
            actions = np.asarray(data["actions"])
            actions = actions.reshape(-1, *actions.shape[-2:])
        tokens = self.tokenizer.encode(prompts, state.reshape(-1, state.shape[-1]), actions)
        rest = {key: value for key, value in data.items() if key != "prompt"}
        return rest | {key: value.reshape(*batch, -1) for key, value in tokens._asdict().items()}

    def inverse(self, data: Data) -> Data:
        tokens = np.asarray(data["actions"])
        chunks = np.stack([self.tokenizer.decode(row) for row in tokens.reshape(-1, tokens.shape[-1])])
        return data | {"actions": chunks.reshape(*tokens.shape[:-1], *chunks.shape[1:])}
