"""The data that every layer shares: one observation, one episode, one batch of chunks.

Axis letters, the same in every file: b batch, h horizon, a action, s state, e critics, n candidates, l prompt tokens,
t episode time, p prefix tokens, f features. Flow time runs from 1 (noise) to 0 (data), as in openpi.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from beartype import beartype
from flax import struct
from jaxtyping import Bool, Float, Int, UInt8, jaxtyped

typed = jaxtyped(typechecker=beartype)
"""Decorator that checks the declared array shapes and dtypes, at every call outside a compiled program."""

AnyArray: TypeAlias = Any
"""A batch holds numpy arrays until it is placed on a device; JAX may rebuild its pytree with other objects."""

Metrics = Mapping[str, Any]
"""Scalars by name; they stay on the device until they are logged."""


@struct.dataclass
class Observation:
    """The input of a policy at one step, with openpi's field names.

    Images stay uint8 until they are on the device; a model maps them to [-1, 1]. A state is normalized.
    """

    state: Float[AnyArray, "b s"]
    images: dict[str, Float[AnyArray, "b _ _ 3"] | UInt8[AnyArray, "b _ _ 3"]] = struct.field(default_factory=dict)
    image_masks: dict[str, Bool[AnyArray, " b"]] = struct.field(default_factory=dict)
    tokenized_prompt: Int[AnyArray, "b l"] | None = None
    tokenized_prompt_mask: Bool[AnyArray, "b l"] | None = None
    token_ar_mask: Int[AnyArray, "b l"] | None = None  # pi0-FAST only
    token_loss_mask: Bool[AnyArray, "b l"] | None = None  # pi0-FAST only
    prefix: Any = None  # computed earlier by a frozen policy, batch first; images are then left out


@struct.dataclass
class ChunkBatch:
    """A batch of action chunks: facts only, rewards raw and undiscounted (``docs/algorithm.md``, section 1)."""

    observations: Observation  # at the first step of the chunk
    actions: Float[AnyArray, "b h a"]  # normalized; repeats the last action past the end of the episode
    rewards: Float[AnyArray, "b h"]  # per step, undiscounted; 0 past the end
    terminals: Float[AnyArray, "b h"]  # the task truly ended here (success or failure); a time limit does not count
    valid: Float[AnyArray, "b h"]  # 1 where the step is real and no terminal came before it in the window
    next_observations: Observation  # after the critic's horizon; s_T if the episode ends there, else its last step
    bootstrap_mask: Float[AnyArray, " b"]  # 0 if the task terminated inside the critic's horizon, else 1
    sequence_mask: Float[AnyArray, " b"]  # 1 where the chunk may be used for the TD loss
    episode_id: Int[AnyArray, " b"]
    step_id: Int[AnyArray, " b"]
    next_actions: Float[AnyArray, "b h a"] | None = None  # the data's, at next_observations; only critics use them


@dataclasses.dataclass(frozen=True)
class FinalObservation:
    """The observation after the last action of an episode (s_T); no row of the episode holds it."""

    state: Float[np.ndarray, " s"]
    images: dict[str, UInt8[np.ndarray, "_ _ 3"]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Episode:
    """One rollout in time order, as it is stored on disk: raw units, numpy, no padding."""

    state: Float[np.ndarray, "t s"]
    actions: Float[np.ndarray, "t a"]
    rewards: Float[np.ndarray, " t"]
    terminals: Bool[np.ndarray, " t"]  # true where the task ended; a time limit leaves it false
    task: str  # the instruction at the first step
    images: dict[str, UInt8[np.ndarray, "t _ _ 3"]] = dataclasses.field(default_factory=dict)
    success: bool | None = None  # None: unknown
    source: str = ""  # the file (and group) it came from, for messages
    task_changes: tuple[tuple[int, str], ...] = ()  # later instructions, each after its first step
    final: FinalObservation | None = None  # None: not recorded

    def __len__(self) -> int:
        return len(self.actions)
