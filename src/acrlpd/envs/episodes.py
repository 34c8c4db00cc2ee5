"""One environment and the episode under way in it, driven by two commands: start an episode, execute a chunk.

A chunk is executed where the environment lives, be that another process or machine: one message there, one back.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from acrlpd.envs.env import Environment, Obs, PhysicsError, clip_action
from acrlpd.types import Episode, FinalObservation


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One finished episode. ``error`` says why the simulation gave up; such an episode counts as failed."""

    episode: Episode  # actions as executed, that is clipped; pictures only if they were recorded
    number: int  # place in the list of seeds, or number of the episode in its run
    seed: int
    returns: float  # undiscounted
    length: int
    success: bool
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Start:
    """Begin an episode. ``record_images`` renders and keeps every step's pictures, not only those the policy sees."""

    number: int
    seed: int
    record_images: bool = False


@dataclasses.dataclass(frozen=True)
class Execute:
    """The whole chunk, or as much of it as the episode lasts."""

    chunk: Float[np.ndarray, "h a"]


Command: TypeAlias = Start | Execute


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command came to: the observation to choose the next chunk by, or the finished episode."""

    observation: Obs | None
    rollout: Rollout | None
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Lost:
    """There is no answer: the episode could not begin, or whoever had it is gone, and the episode with it."""

    reason: str


class EpisodeRunner:
    """Carries out commands in one environment and keeps what happens in the episode."""

    def __init__(self, environment: Environment):
        self.environment = environment
        self.observation: Obs = {}
        self._start: Start | None = None  # of the episode under way
        self._observations: list[Obs] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []

    def obey(self, command: Command) -> Report | Lost:
        """Carry out a command. A reset that fails costs the episode it was to begin, as a step does its own."""
        if isinstance(command, Start):
            try:
                return Report(self.start(command), None, 0)
            except PhysicsError as error:
                self._start = None
                return Lost(f"its reset failed: {error}")
        if self._start is None:
            return Lost("the worker that had begun the episode was replaced")
        return self.execute(command.chunk)

    def start(self, command: Start) -> Obs:
        self._start = command
        self._observations, self._actions, self._rewards = [], [], []
        self.observation = self.environment.reset(command.seed)
        return self.observation

    def execute(self, chunk: Float[np.ndarray, "h a"]) -> Report:
        assert self._start is not None, "start comes first"
        for count, action in enumerate(chunk, 1):
            result = self.step(action, render=self._start.record_images or count == len(chunk))
            if result is not None:
                return Report(None, result, count)
        return Report(self.observation, None, len(chunk))

    def step(self, action: Float[np.ndarray, " a"], *, render: bool) -> Rollout | None:
        try:
            step = self.environment.step(action, render=render)
        except PhysicsError as error:
            return self._lost(action, str(error))
        self._record(clip_action(self.environment.spec, action), step.reward)
        self.observation = step.observation
        if step.terminated or step.truncated:
            return self._finish(step.terminated, step.success)
        return None

    def _record(self, action: Float[np.ndarray, " a"], reward: float) -> None:
        self._observations.append(self.observation)
        self._actions.append(action)
        self._rewards.append(reward)

    def _lost(self, action: Float[np.ndarray, " a"], error: str) -> Rollout:
        """The failing step is kept, so that every episode has one: its state is good, its reward that of a failure."""
        self._record(clip_action(self.environment.spec, np.nan_to_num(action)), self.environment.spec.failure_reward)
        return self._finish(False, False, error)

    def _finish(self, terminated: bool, success: bool, error: str | None = None) -> Rollout:
        """Make the rollout. The last observation is the final one; where the simulation gave up, there is none."""
        start, self._start = self._start, None
        assert start is not None, "an episode ends once"
        terminals = np.zeros(len(self._actions), np.bool_)
        terminals[-1] = terminated
        spec = self.environment.spec
        cameras = spec.cameras if start.record_images else ()
        episode = Episode(
            state=np.stack([observation["state"] for observation in self._observations]),
            actions=np.stack(self._actions),
            rewards=np.array(self._rewards, np.float32),
            terminals=terminals,
            task=spec.instruction,
            images={
                camera: np.stack([observation["image"][camera] for observation in self._observations])
                for camera in cameras
            },
            success=success,
            source=f"{spec.name} seed {start.seed}",
            final=None if error else self._final(cameras),
        )
        returns = float(np.sum(self._rewards))
        return Rollout(episode, start.number, start.seed, returns, len(episode), success, error)

    def _final(self, cameras: tuple[str, ...]) -> FinalObservation:
        images = {camera: self.observation["image"][camera] for camera in cameras}
        return FinalObservation(self.observation["state"], images)


def replay(environment: Environment, result: Rollout, size: int) -> UInt8[np.ndarray, "frames h w 3"]:
    """Film a rollout by executing its actions again: frame t is the scene after t actions, up to all of them."""
    environment.reset(result.seed, render=False)
    frames = [environment.render(size)]
    for action in result.episode.actions:
        environment.step(action)
        frames.append(environment.render(size))
    return np.stack(frames)
