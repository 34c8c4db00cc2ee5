"""An environment in real time that uses no processor time, like a robot: 20 steps per second."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from acrlpd.envs.env import Outcome

PERIOD_S = 0.05


class Paced:
    state_dim = 39  # as in the demo
    action_low = -np.ones(4, np.float32)
    action_high = np.ones(4, np.float32)
    instruction = "drawer open"
    time_limit = 150
    fps = 1 / PERIOD_S
    cameras = ()
    default_camera = "none"

    def reset(self, seed: int) -> np.ndarray:
        self._rng = np.random.default_rng(seed)
        return self._rng.uniform(-1, 1, self.state_dim)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Outcome]:
        time.sleep(PERIOD_S)
        return self._rng.uniform(-1, 1, self.state_dim), Outcome.GOING_ON

    def render(self, camera: str, size: int) -> Any:
        raise NotImplementedError("it has no camera")

    def close(self) -> None:
        pass


def make() -> Paced:
    return Paced()
