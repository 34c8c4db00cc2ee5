"""Outcomes of an evaluation by seed, and films of its episodes, made by executing their actions again."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from acrlpd.envs.env import Environment, PhysicsError
from acrlpd.files import NPZ_DAMAGE, npz_outline, one_line

NUM_FRAMES = 8  # frames of one filmstrip
FRAME_SIZE = 192  # pixels


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Outcomes of an evaluation at the end of a phase, by seed, as ``run.save_rollouts`` writes them."""

    seed: Int[np.ndarray, " n"]
    success: Bool[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    actions: Float[np.ndarray, "n t a"]  # executed; zero past the length

    @property
    def seeds(self) -> set[int]:
        return set(self.seed.tolist())

    @property
    def solved(self) -> set[int]:
        return set(self.seed[self.success].tolist())

    @property
    def failed(self) -> set[int]:
        return self.seeds - self.solved

    def episode(self, seed: int) -> tuple[bool, Float[np.ndarray, "t a"]]:
        row = self.seed.tolist().index(seed)
        return bool(self.success[row]), self.actions[row, : self.length[row]]


RENDERING_ERRORS = (RuntimeError, ImportError, ValueError, AttributeError)
"""Errors if the renderer or the run's simulator is missing. PyOpenGL raises AttributeError without its library."""


def load_outcomes(path: Path) -> Outcomes:
    try:
        npz_outline(path)
        with np.load(path, allow_pickle=False) as arrays:
            return Outcomes(**{field.name: arrays[field.name] for field in dataclasses.fields(Outcomes)})
    except NPZ_DAMAGE as error:
        raise ValueError(f"{path}: expected a complete .npz file of an evaluation ({one_line(error)})") from error


def improved_seed(before: Outcomes, after: Outcomes) -> int | None:
    """Return the first seed that failed before and succeeded after; None if there is none."""
    return next((seed for seed in before.seed.tolist() if seed in before.failed & after.solved), None)


def film(environment: Environment, seed: int, actions: Float[np.ndarray, "t a"]) -> tuple[dict[int, np.ndarray], bool]:
    """Execute recorded actions; return pictures by the number of steps before them, and whether the task was solved.

    Only the ``NUM_FRAMES`` moments that are shown are rendered, including the start and the end.
    """
    moments = set(np.linspace(0, len(actions), NUM_FRAMES).round().astype(int).tolist())
    environment.reset(seed, render=False)
    frames = {0: environment.render(FRAME_SIZE)}
    for number, action in enumerate(actions, 1):
        try:
            step = environment.step(action)
        except PhysicsError:
            return frames, False  # the episode was lost here when it was recorded, too
        ended = step.terminated or step.truncated
        if number in moments or ended:
            frames[number] = environment.render(FRAME_SIZE)
        if ended:
            return frames, step.success
    return frames, False


def jpeg(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
