"""What can be chosen about a served policy, and what all of them ask of a request."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import numpy as np

from acrlpd import fields
from acrlpd.data.view.robots.mapping import Robot
from acrlpd.data.view.transforms import DefaultPrompt, Transform
from acrlpd.fields import Interval, NonNegativeFloat, PositiveFloat, PositiveInt
from acrlpd.types import Observation


@dataclasses.dataclass(frozen=True)
class ActingOptions:
    """Options for how a trained agent chooses its actions."""

    mode: Literal["greedy", "bc"] = "greedy"  # bc: imitation, one sample of the flow without the critic
    num_samples: PositiveInt | None = None  # candidates; None: as trained
    num_steps: PositiveInt | None = None  # Euler steps of the flow; None: as trained, 10 for openpi's models
    real_time: bool = False  # chunks may continue the one being executed, if a client sends it
    latency_budget_ms: PositiveFloat | None = None  # compute as many candidates and flow steps as fit; None: always all
    default_prompt: str | None = None  # the prompt for observations without one
    seed: Annotated[int, Interval(f"[0, {2**32})")] = 0  # the seed for requests that bring none of their own
    extraction: str | None = None  # how to choose instead; code of your own (FILE.py:NAME) must be named here
    guidance_weights: tuple[NonNegativeFloat, ...] | None = None  # of the extraction guided; None: as trained

    def __post_init__(self):
        fields.check(self)

    @property
    def budget_s(self) -> float | None:
        return None if self.latency_budget_ms is None else self.latency_budget_ms / 1000


@dataclasses.dataclass(frozen=True)
class OpenPIOptions:
    """Settings that openpi keeps in its configurations and not in its checkpoints."""

    robot: Robot | None = None  # the robot whose observations and actions the checkpoint has
    action_horizon: PositiveInt = 50  # as trained; it cannot be read from the parameters
    asset_id: str | None = None  # which statistics, if the checkpoint has several; None: the only ones
    tokenizer: str | None = None  # PaliGemma's paligemma_tokenizer.model; None: the one for nano models
    fast_tokenizer: str | None = None  # folder of the FAST tokenizer, for a pi0-FAST checkpoint
    temperature: NonNegativeFloat = 0.0  # temperature for sampling pi0-FAST's tokens; 0: the most likely
    delta_mask: tuple[int, ...] | None = None  # 6 -1: six joints relative to the state, one not; None: the robot's
    max_token_len: PositiveInt | None = None  # None: 48 for pi0, 200 for pi0.5, 250 for pi0-FAST
    discrete_state_input: bool | None = None  # write the state into the prompt; None: for pi0.5 only
    quantiles: bool | None = None  # normalize state and actions by quantiles; None: for all but pi0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of parameters and computation; openpi serves bfloat16

    def __post_init__(self):
        fields.check(self)


def refuse_unused(checkpoint: str, openpi: OpenPIOptions) -> None:
    """Refuse openpi's options for a checkpoint of ours, which holds its whole configuration."""
    given = [f.name for f in dataclasses.fields(openpi) if getattr(openpi, f.name) != f.default]
    if given:
        raise ValueError(
            f"--{' and --'.join(given)} say what a checkpoint of openpi's does not hold; {checkpoint} is one of this "
            "project and holds it: leave them out"
        )


def default_prompt_transforms(prompt: str | None, *, needed: bool) -> list[Transform]:
    """Return the transform that fills in a missing prompt; a policy that reads no prompt does not ask for one."""
    if prompt is None and needed:
        return []
    return [DefaultPrompt(prompt or "")]


def observation_spec(state_dim: int, cameras: tuple[str, ...], image_size: int, max_token_len: int) -> Observation:
    return Observation(
        state=jax.ShapeDtypeStruct((state_dim,), np.float32),
        images={camera: jax.ShapeDtypeStruct((image_size, image_size, 3), np.uint8) for camera in cameras},
        image_masks={camera: jax.ShapeDtypeStruct((), np.bool_) for camera in cameras},
        tokenized_prompt=jax.ShapeDtypeStruct((max_token_len,), np.int32),
        tokenized_prompt_mask=jax.ShapeDtypeStruct((max_token_len,), np.bool_),
    )
