"""Episodes of a policy: whole chunks executed open loop, in many environments with one policy call for all.

A policy is a function ``act(observations, numbers) -> actions [n, h, a]`` in the environment's own units. It always
gets one row for each of the n environments, so that a compiled policy sees one shape: row i belongs to the episode
``numbers[i]``; a row whose number is -1 is padding and its actions are ignored.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from acrlpd.envs.env import Obs
from acrlpd.envs.episodes import Execute, Lost, Report, Rollout, Start
from acrlpd.envs.vector import VectorEnv

logger = logging.getLogger(__name__)

MAX_BAD_STARTS_IN_A_ROW = 10  # after so many, an environment counts as broken

Act: TypeAlias = Callable[[list[Obs], Int[np.ndarray, " n"]], Float[np.ndarray, "n h a"]]


@dataclasses.dataclass
class Seconds:
    """Accumulated wall time, by what it was spent on."""

    simulator: float = 0.0  # waiting for environments: stepping, resetting and rendering
    act: float = 0.0  # waiting for the policy


class Collected(NamedTuple):
    rollouts: list[Rollout]  # finished in this call
    num_steps: int  # environment steps taken in this call, over all environments
    num_lost: int  # episodes whose worker died or hung, or whose reset failed


def episode_seed(seed: int, number: int, attempt: int = 0) -> int:
    """Return the seed of one episode; seeds of neighbouring runs, episodes and attempts to start are independent."""
    words = (seed, number, attempt) if attempt else (seed, number)
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def rollout(
    environments: VectorEnv,
    act: Act,
    seeds: Sequence[int],
    *,
    execute_horizon: int,
    on_episode: Callable[[Rollout], None] | None = None,
    record_images: bool = False,
    seconds: Seconds | None = None,
) -> list[Rollout]:
    """Run every seed exactly once; return rollouts in the order of ``seeds``; call ``on_episode`` as they finish.

    Pictures are rendered only for the policy, at the start of each chunk; ``record_images`` renders and keeps those of
    every step. An episode whose worker died or whose reset failed is missing from the result.
    """
    jobs = iter(list(enumerate(seeds)))
    lanes = _Lanes(environments, jobs, execute_horizon, record_images, Seconds() if seconds is None else seconds)
    finished: dict[int, Rollout] = {}
    lanes.start_idle()
    while lanes.any_active:
        lanes.begin(act)
        for result in lanes.finish().rollouts:
            finished[result.number] = result
            if on_episode is not None:
                on_episode(result)
        lanes.start_idle()
    return [finished[number] for number in range(len(seeds)) if number in finished]


class OnlineCollector:
    """A collector that runs one chunk per environment on request, so a trainer can update in between or meanwhile.

    Episode k of the run is seeded by ``episode_seed(seed, k)``; episodes in ``finished`` are left out. A chunk is
    executed open loop; its rest is dropped if the episode ends. ``collect`` is ``begin`` and ``finish``: between the
    two, the chunks are chosen and the environments are running, so the caller can work without slowing the rollout.
    """

    def __init__(
        self,
        environments: VectorEnv,
        *,
        seed: int,
        execute_horizon: int,
        first_episode: int = 0,
        finished: Collection[int] = (),
        record_images: bool = True,
    ):
        self.seconds = Seconds()
        done = frozenset(finished)
        missing = (number for number in itertools.count(first_episode) if number not in done)
        jobs = ((number, episode_seed(seed, number)) for number in missing)
        self._lanes = _Lanes(environments, jobs, execute_horizon, record_images, self.seconds)
        self._num_lost = self._lanes.start_idle()  # since the last ``finish``

    @property
    def next_episode(self) -> int:
        """The lowest unfinished number: ``first_episode`` of a resumed run, which restarts the current episodes."""
        return min(self._lanes.numbers)

    @property
    def begun(self) -> bool:
        return self._lanes.begun

    def begin(self, act: Act) -> None:
        self._lanes.begin(act)

    def finish(self) -> Collected:
        collected = self._lanes.finish()
        before, self._num_lost = self._num_lost, 0
        return collected._replace(num_lost=collected.num_lost + before + self._lanes.start_idle())

    def collect(self, act: Act) -> Collected:
        self.begin(act)
        return self.finish()

    def close(self) -> None:
        self._lanes.environments.close()


class _Lanes:
    """The current episode of each environment, and the next observation for the policy."""

    def __init__(
        self,
        environments: VectorEnv,
        jobs: Iterator[tuple[int, int]],
        execute_horizon: int,
        record_images: bool,
        seconds: Seconds,
    ):
        if execute_horizon < 1:
            raise ValueError(f"execute_horizon must be at least 1, got {execute_horizon}")
        self.environments = environments
        self.numbers = [-1] * environments.num_envs  # of the current episodes; -1: none
        self.begun = False
        self._bad_starts = [0] * environments.num_envs  # in a row
        self._observations: list[Obs] = [{} for _ in self.numbers]
        self._jobs = jobs
        self._execute_horizon = execute_horizon
        self._record_images = record_images
        self._seconds = seconds

    @property
    def any_active(self) -> bool:
        return any(number >= 0 for number in self.numbers)

    def start_idle(self) -> int:
        """Start an episode in every idle environment while any are left; return how many were lost in doing so."""
        num_lost = 0
        while True:
            idle = [lane for lane, number in enumerate(self.numbers) if number < 0]
            starts = {lane: Start(*job, self._record_images) for lane, job in zip(idle, self._jobs, strict=False)}
            if not starts:
                return num_lost
            self.environments.send(starts)
            for lane, answer in self._receive().items():
                if isinstance(answer, Lost):
                    num_lost += self._lose(starts[lane].number, answer)
                    self._count_bad_start(lane, answer)
                    continue
                self._bad_starts[lane] = 0
                assert answer.observation is not None, "a started episode has an observation"
                self.numbers[lane], self._observations[lane] = starts[lane].number, answer.observation

    def _count_bad_start(self, lane: int, lost: Lost) -> None:
        self._bad_starts[lane] += 1
        if self._bad_starts[lane] == MAX_BAD_STARTS_IN_A_ROW:
            raise RuntimeError(
                f"{MAX_BAD_STARTS_IN_A_ROW} episodes in a row could not begin in an environment, the last because "
                f"{lost.reason}"
            )

    def begin(self, act: Act) -> None:
        """Call the policy once for all active lanes, each of which needs a new chunk, and send the chunks off."""
        active = [lane for lane, number in enumerate(self.numbers) if number >= 0]
        filler = self._observations[active[0]]
        observations = [self._observations[lane] if number >= 0 else filler for lane, number in enumerate(self.numbers)]
        start = time.perf_counter()
        chunks = np.asarray(act(observations, np.array(self.numbers)))
        self._seconds.act += time.perf_counter() - start
        expected = (len(self.numbers), self.environments.spec.action_dim)
        horizon = self._execute_horizon
        if chunks.ndim != 3 or (chunks.shape[0], chunks.shape[2]) != expected or chunks.shape[1] < horizon:
            raise ValueError(
                f"act returned actions of shape {chunks.shape}; expected ({expected[0]}, h, {expected[1]}) with h at "
                f"least execute_horizon ({horizon})"
            )
        self.environments.send({lane: Execute(chunks[lane, :horizon]) for lane in active})
        self.begun = True

    def finish(self) -> Collected:
        self.begun = False
        rollouts, num_steps, num_lost = [], 0, 0
        for lane, answer in self._receive().items():
            if isinstance(answer, Lost):
                num_lost += self._lose(self.numbers[lane], answer)
                self.numbers[lane] = -1
                continue
            num_steps += answer.num_steps
            if answer.rollout is not None:
                rollouts.append(answer.rollout)
                self.numbers[lane] = -1
            elif answer.observation is not None:
                self._observations[lane] = answer.observation
        return Collected(rollouts, num_steps, num_lost)

    def _receive(self) -> dict[int, Report | Lost]:
        start = time.perf_counter()
        answers = self.environments.receive()
        self._seconds.simulator += time.perf_counter() - start
        return dict(sorted(answers.items()))

    def _lose(self, number: int, lost: Lost) -> int:
        logger.warning("episode %d is lost: %s", number, lost.reason)
        return 1
