"""One environment and its current episode, controlled by two commands: start an episode, execute a chunk.

A chunk is executed where the environment is, which may be another process or machine: one message there, one back.
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
    """One finished episode. ``error`` says why the simulation failed; such an episode counts as failed."""

    episode: Episode  # actions are clipped, as executed; pictures only if they were recorded
    number: int  # index in the list of seeds, or number of the episode in its run
    seed: int
    returns: float  # undiscounted
    length: int
    success: bool
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Start:
    """The command to start an episode. ``record_images`` keeps every step's pictures, not only what the policy sees."""

    number: int
    seed: int
    record_images: bool = False


@dataclasses.dataclass(frozen=True)
class Execute:
    """The command to execute a whole chunk, or its beginning if the episode ends before."""

    chunk: Float[np.ndarray, "h a"]


Command: TypeAlias = Start | Execute


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a command: the observation for the choice of the next chunk, or the finished episode."""

    observation: Obs | None
    rollout: Rollout | None
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Lost:
    """The answer for a lost episode: it could not start, or the worker that ran it is gone."""

    reason: str


class EpisodeRunner:
    """A runner that executes commands in one environment and records the episode."""

    def __init__(self, environment: Environment):
        self.environment = environment
        self.observation: Obs = {}
        self._start: Start | None = None  # the command that started the current episode
        self._observations: list[Obs] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []

    def obey(self, command: Command) -> Report | Lost:
        """Execute a command. If the physics fails, the episode is lost, whether at its reset or in a step."""
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
        """End the episode with the failed step, so that it has at least one: a valid state and a failure's reward."""
        self._record(clip_action(self.environment.spec, np.nan_to_num(action)), self.environment.spec.failure_reward)
        return self._finish(False, False, error)

    def _finish(self, terminated: bool, success: bool, error: str | None = None) -> Rollout:
        """Make the rollout. The last observation is the final one; if the simulation failed, there is none."""
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
    """Film a rollout by executing its actions again: frame t shows the scene after t actions, from none to all."""
    environment.reset(result.seed, render=False)
    frames = [environment.render(size)]
    for action in result.episode.actions:
        environment.step(action)
        frames.append(environment.render(size))
    return np.stack(frames)
