"""Transforms of observations on their way into the model, and of actions on their way out.

Training and serving use one list of transforms; each is declared with its inverse, so the way back is right by
construction. They work on openpi's data dictionary: ``state``, ``actions``, ``image`` {camera: ...}, ``image_mask``
{camera: ...}, ``prompt``, ``tokenized_prompt``, ``tokenized_prompt_mask``; on one observation or on a batch (any
leading axes; ``actions`` has one more, the horizon). ``actions`` may be absent on the way in. The input is never
changed in place.

The order is openpi's: repack, default prompt, robot, delta actions, normalize, resize, tokenize, pad. Normalization
and the state text of pi0.5 thus see the state before it is padded, and delta actions are computed in raw units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from acrlpd.data.view.normalize import NormStats, normalize, unnormalize
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.pictures import fit
from acrlpd.types import Observation

Data = dict[str, Any]


class Transform(Protocol):
    def __call__(self, data: Data) -> Data:
        """Transform data on its way into the model."""
        ...

    def inverse(self, data: Data) -> Data:
        """Transform back to the robot: ``data`` has the model's output ``actions`` and the ``state`` that it saw."""
        ...


@dataclasses.dataclass(frozen=True)
class Compose:
    """A sequence of transforms; the inverse runs them backwards."""

    transforms: Sequence[Transform]

    def __call__(self, data: Data) -> Data:
        for transform in self.transforms:
            data = transform(data)
        return data

    def inverse(self, data: Data) -> Data:
        for transform in reversed(self.transforms):
            data = transform.inverse(data)
        return data

    def before(self, kind: type) -> Compose:
        """Return the transforms before the first ``kind``, or all. Statistics are computed after these."""
        kinds = [isinstance(transform, kind) for transform in self.transforms]
        return Compose(self.transforms[: kinds.index(True)] if any(kinds) else self.transforms)


class ActionsOnly:
    """The transform that reduces an answer to its actions, as for openpi's robots; it comes first in a list.

    openpi's chunk broker cuts every array of an answer into steps, and a state has no steps.
    """

    def __call__(self, data: Data) -> Data:
        return data

    def inverse(self, data: Data) -> Data:
        return {"actions": data["actions"]}


@dataclasses.dataclass(frozen=True)
class DefaultPrompt:
    """A transform that adds a task text if the data has none (no prompt, None, or an empty one)."""

    prompt: str

    def __call__(self, data: Data) -> Data:
        return data | {"prompt": prompt_texts(data.get("prompt"), self.prompt)}

    def inverse(self, data: Data) -> Data:
        return data


@dataclasses.dataclass(frozen=True)
class DeltaActions:
    """A transform to actions relative to the state at the start of the chunk, where ``mask`` is true; in raw units.

    The mask may be shorter than an action; dimensions beyond it stay absolute.
    """

    mask: Sequence[bool]

    def __call__(self, data: Data) -> Data:
        return self._shifted(data, -1) if "actions" in data else data

    def inverse(self, data: Data) -> Data:
        return self._shifted(data, 1)

    def _shifted(self, data: Data, sign: int) -> Data:
        dim = len(self.mask)
        offset = np.where(np.asarray(self.mask), np.asarray(data["state"])[..., :dim], 0)
        actions = np.array(data["actions"])
        actions[..., :dim] += sign * offset[..., None, :]
        return data | {"actions": actions}


def make_bool_mask(*dims: int) -> tuple[bool, ...]:
    """Return a mask from openpi's notation: ``make_bool_mask(6, -1)`` is six times true, once false; 0 adds nothing."""
    return tuple(dim > 0 for dim in dims for _ in range(abs(dim)))


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Normalization to z-scores, or of 1 % and 99 % quantiles to -1 and 1. Keys without statistics stay as they are."""

    stats: Mapping[str, NormStats]
    quantiles: bool = False

    def __call__(self, data: Data) -> Data:
        known = self.stats.keys() & data.keys()
        return data | {
            key: normalize(np.asarray(data[key]), self.stats[key], quantiles=self.quantiles) for key in known
        }

    def inverse(self, data: Data) -> Data:
        missing = self.stats.keys() - data.keys()
        if missing:
            raise ValueError(
                f"Normalize.inverse needs every key of its statistics, got {sorted(data)} without {sorted(missing)}. "
                "Pass the state that the model saw along with its actions."
            )
        return data | {
            key: unnormalize(np.asarray(data[key]), stats, quantiles=self.quantiles)
            for key, stats in self.stats.items()
        }


@dataclasses.dataclass(frozen=True)
class ResizeImages:
    """A transform of images to the model's size, with aspect kept and black padding; images of that size stay as is.

    Only ``cameras`` are kept; pictures of others are not read. None keeps all.
    """

    height: int
    width: int
    cameras: Sequence[str] | None = None

    def __call__(self, data: Data) -> Data:
        given = data.get("image", {})
        cameras = given if self.cameras is None else [camera for camera in self.cameras if camera in given]
        fitted = {camera: fit(given[camera], self.height, self.width, f"image/{camera}") for camera in cameras}
        return data | {"image": fitted}

    def inverse(self, data: Data) -> Data:
        return data


@dataclasses.dataclass(frozen=True)
class TokenizePrompt:
    """A transform of ``prompt`` to tokens. With ``discrete_state_input`` (pi0.5) the state is part of the text."""

    tokenizer: PromptTokenizer
    discrete_state_input: bool = False

    def __call__(self, data: Data) -> Data:
        state = np.asarray(data["state"])
        texts = np.broadcast_to(prompt_texts(data.get("prompt")), state.shape[:-1])
        states = state.reshape(-1, state.shape[-1]) if self.discrete_state_input else None
        tokens, mask = self.tokenizer.encode_batch(texts.ravel().tolist(), states)
        rest = {key: value for key, value in data.items() if key != "prompt"}
        return rest | {
            "tokenized_prompt": tokens.reshape(*texts.shape, -1),
            "tokenized_prompt_mask": mask.reshape(*texts.shape, -1),
        }

    def inverse(self, data: Data) -> Data:
        return data


@dataclasses.dataclass(frozen=True)
class PadToModel:
    """Zero padding of state and actions to the model's action size. Nothing is cut on the way in.

    On the way out the actions are cut to ``robot_action_dim``; None leaves that to the robot's transform.
    """

    action_dim: int
    robot_action_dim: int | None = None

    def __call__(self, data: Data) -> Data:
        return data | {key: self._padded(np.asarray(data[key])) for key in ("state", "actions") if key in data}

    def inverse(self, data: Data) -> Data:
        if self.robot_action_dim is None:
            return data
        return data | {"actions": np.asarray(data["actions"])[..., : self.robot_action_dim]}

    def _padded(self, x: Float[np.ndarray, "*batch d"]) -> Float[np.ndarray, "*batch padded"]:
        missing = max(0, self.action_dim - x.shape[-1])
        return np.concatenate([x, np.zeros((*x.shape[:-1], missing), x.dtype)], axis=-1)


def to_model(
    before: Sequence[Transform],
    stats: Mapping[str, NormStats],
    tokenize: Transform,
    *,
    quantiles: bool,
    image_size: int,
    action_dim: int | None,
    robot_action_dim: int | None = None,
    cameras: Sequence[str] | None = None,
) -> Compose:
    """Return all transforms in openpi's order: ``before``, normalization, images, tokens, padding to ``action_dim``.

    Without ``action_dim`` nothing is padded. ``cameras`` are the model's names of those it reads; None means all.
    """
    steps: list[Transform] = [
        *before,
        Normalize(stats, quantiles),
        ResizeImages(image_size, image_size, cameras),
        tokenize,
    ]
    return Compose(steps if action_dim is None else [*steps, PadToModel(action_dim, robot_action_dim)])


def to_observation(data: Data) -> Observation:
    """Return the model's observation from transformed data, as numpy; images stay uint8, missing masks are true."""
    images = {camera: np.asarray(image) for camera, image in data.get("image", {}).items()}
    given = data.get("image_mask", {})
    masks = {
        camera: np.asarray(given.get(camera, np.ones(image.shape[:-3], dtype=bool))) for camera, image in images.items()
    }
    return Observation(
        state=np.asarray(data["state"], np.float32),
        images=images,
        image_masks=masks,
        tokenized_prompt=_optional(data, "tokenized_prompt", np.int32),
        tokenized_prompt_mask=_optional(data, "tokenized_prompt_mask", bool),
        token_ar_mask=_optional(data, "token_ar_mask", np.int32),
        token_loss_mask=_optional(data, "token_loss_mask", bool),
    )


def _optional(data: Data, key: str, dtype: np.typing.DTypeLike) -> np.ndarray | None:
    return np.asarray(data[key], dtype) if key in data else None


def prompt_texts(prompt: Any, default: str | None = None) -> np.ndarray:
    """Return a prompt, or a batch of prompts, as an array of str; bytes are UTF-8. ``default`` replaces None and "".

    Raises:
        ValueError: a prompt is None and there is no default, or it is not text.
    """
    texts = np.asarray(prompt, None if isinstance(prompt, np.ndarray | np.generic) else object)
    if texts.dtype.kind != "U":
        rows = [_text(each, default) for each in texts.ravel().tolist()]
        texts = np.array(rows, np.str_).reshape(texts.shape)
    return texts if default is None else np.where(texts == "", default, texts)


def _text(prompt: Any, default: str | None) -> str:
    text = default if prompt is None else prompt.decode() if isinstance(prompt, bytes) else prompt
    if text is None:
        raise ValueError("the data has no prompt. Add a task text to the dataset or a default prompt to the config.")
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be text, got {prompt!r:.80} ({type(prompt).__name__})")
    return text
