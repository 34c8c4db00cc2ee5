"""One request: a client's checked observation, and its options for the answer."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt32

from acrlpd.models.flow import Guidance
from acrlpd.serving.budget import Plan
from acrlpd.types import Observation

OPTIONS_KEY = "acrlpd"  # key in an observation of our own options, which openpi's clients never send


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that a client may send under the key ``acrlpd`` of an observation; every entry is optional."""

    seed: int | None = None  # the same seed and observation give the same answer; None: every answer is drawn anew
    statistics: bool = False  # add the critic's values to the answer
    deadline_ms: float | None = None  # compute as much as fits into this time; None: the policy's own budget
    previous_actions: Float[np.ndarray, "t a"] | None = None  # of the chunk being executed, from this observation on
    delay: int = 0  # steps of it executed by the time the answer arrives; if it has fewer steps: no guidance

    def __post_init__(self):
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**32):
            raise ValueError(f"{OPTIONS_KEY}.seed must be a whole number from 0 below 2**32, got {self.seed!r:.100}")
        if not isinstance(self.statistics, bool):
            raise ValueError(f"{OPTIONS_KEY}.statistics must be true or false, got {self.statistics!r:.100}")
        if self.deadline_ms is not None and not (isinstance(self.deadline_ms, (int, float)) and self.deadline_ms > 0):
            raise ValueError(f"{OPTIONS_KEY}.deadline_ms must be a positive number, got {self.deadline_ms!r:.100}")
        previous = self.previous_actions
        if previous is not None and (
            not isinstance(previous, np.ndarray) or previous.ndim != 2 or previous.dtype.kind != "f"
        ):
            raise ValueError(f"{OPTIONS_KEY}.previous_actions must be floats of shape (steps, action size)")
        steps = 0 if previous is None else len(previous)
        if not isinstance(self.delay, int) or self.delay < 0 or (previous is None and self.delay):
            raise ValueError(
                f"{OPTIONS_KEY}.delay must be a whole number from 0 to the {steps} steps of previous_actions, got "
                f"{self.delay!r:.100}"
            )

    @property
    def unguided(self) -> str | None:
        """The reason why the chunk does not continue the given ``previous_actions``; None if it does, or none came."""
        if self.previous_actions is None:
            return None
        steps = len(self.previous_actions)
        if not steps:
            return "unguided: previous_actions is empty"
        if steps < self.delay:
            return f"unguided: previous_actions has {steps} steps, the delay is {self.delay}"
        return None

    @classmethod
    def parse(cls, values: Any) -> Options:
        """Read the options from a client's dictionary; refuse unknown entries."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{OPTIONS_KEY} must be a dictionary of options, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"unknown option {OPTIONS_KEY}.{name!s:.100}: {hint}")
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        if _is_nothing(given.get("previous_actions", 0)) and (
            given["previous_actions"] is not None or "delay" in given
        ):
            given["previous_actions"] = np.zeros((0, 0), np.float32)
        return cls(**given)


def _is_nothing(rest: Any) -> bool:
    """Return whether the rest of a chunk that a client sent has no steps, in whatever form."""
    if isinstance(rest, np.ndarray):
        return rest.shape[:1] == (0,)
    return rest is None or rest == []


@dataclasses.dataclass(frozen=True)
class Request:
    """One observation for the model, without a batch axis, and its sender's options for the answer."""

    observation: Observation
    key: UInt32[np.ndarray, " 2"]
    noise: Float[np.ndarray, "h a"] | None = None
    guidance: Guidance | None = None
    options: Options = dataclasses.field(default_factory=Options)
    deadline: float | None = None  # on the monotonic clock
    plan: Plan | None = None  # the largest one before its deadline if it is served at once; None: no deadline

    @property
    def kind(self) -> tuple[Any, ...]:
        """The properties that requests must share to be in one call without changing each other's answers."""
        return self.guidance is not None, self.noise is not None, self.plan


def outline(data: Mapping[str, Any], path: str = "") -> str:
    """Return the keys of an observation with the dtypes and shapes of its arrays, as text."""
    parts = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            parts.append(outline(value, f"{path}{key!s:.50}/"))
        else:
            shape = f" {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else ""
            parts.append(f"{path}{key!s:.50}{shape}")
    return ", ".join(parts) or "nothing"


def conform(observation: Observation, spec: Observation) -> Observation:
    """Return the observation with exactly the spec's entries; other cameras are dropped, as openpi's models do.

    Raises:
        ValueError: an entry is missing or has another shape or dtype, or the state is not finite.
    """
    missing = spec.images.keys() - observation.images.keys()
    if missing:
        raise ValueError(f"the observation lacks the cameras {sorted(missing)}; it has {sorted(observation.images)}")
    chosen = dataclasses.replace(
        observation,
        images={camera: observation.images[camera] for camera in spec.images},
        image_masks={camera: np.asarray(observation.image_masks[camera], bool) for camera in spec.image_masks},
    )
    for field in dataclasses.fields(Observation):
        name, given, wanted = field.name, getattr(chosen, field.name), getattr(spec, field.name)
        if isinstance(wanted, dict):
            for camera in wanted:
                _check(f"{name}/{camera}", given[camera], wanted[camera])
        elif wanted is None:
            nothing: dict[str, Any] = {name: None}
            chosen = dataclasses.replace(chosen, **nothing)
        else:
            _check(name, given, wanted)
    if not np.isfinite(chosen.state).all():
        raise ValueError(f"the state has numbers that are not finite: {chosen.state}")
    return chosen


def _check(name: str, array: np.ndarray | None, wanted: jax.ShapeDtypeStruct) -> None:
    if array is None:
        raise ValueError(f"the observation lacks {name}")
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        raise ValueError(
            f"{name} must be {wanted.dtype} of shape {wanted.shape} where the model reads it, got {array.dtype} of "
            f"shape {array.shape}. An observation has no batch axis."
        )
