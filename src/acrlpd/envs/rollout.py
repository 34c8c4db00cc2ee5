"""Episodes out of environments: whole chunks executed open loop by a policy, or step by step by a scripted expert.

A policy is a function ``act(observations, numbers) -> actions [n, h, a]`` in the environment's own units. It gets one
row for each of the n environments, always, so that a compiled policy sees one shape: row i belongs to the episode
``numbers[i]``, and a row whose number is -1 is padding, whose actions are ignored.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from acrlpd.envs.env import EnvConfig, Environment, Obs, PhysicsError, SimulatedEnvironment, clip_action, make
from acrlpd.envs.experts import PolicyKind, SmoothNoise, make_expert
from acrlpd.types import Episode

Act: TypeAlias = Callable[[list[Obs], Int[np.ndarray, " n"]], Float[np.ndarray, "n h a"]]


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


@dataclasses.dataclass
class Seconds:
    """Wall time by where it went, added up."""

    simulator: float = 0.0  # stepping, resetting and rendering
    act: float = 0.0  # waiting for the policy


class Collected(NamedTuple):
    rollouts: list[Rollout]  # finished in this call
    num_steps: int  # environment steps taken in this call, over all environments


def episode_seed(seed: int, number: int) -> int:
    """The seed of one episode of a run: neighbouring runs and episodes share nothing."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def rollout(
    environments: Sequence[Environment],
    act: Act,
    seeds: Sequence[int],
    *,
    execute_horizon: int,
    on_episode: Callable[[Rollout], None] | None = None,
    record_images: bool = False,
    seconds: Seconds | None = None,
) -> list[Rollout]:
    """Run every seed exactly once; rollouts come in the order of ``seeds``, ``on_episode`` as they finish.

    Pictures are rendered where the policy looks, at the start of each chunk; ``record_images`` renders and keeps every
    step's.
    """
    if execute_horizon < 1:
        raise ValueError(f"execute_horizon must be at least 1, got {execute_horizon}")
    seconds = Seconds() if seconds is None else seconds
    jobs = iter(list(enumerate(seeds)))
    runs = [_Run(environment, record_images, seconds) for environment in environments]
    for run in runs:
        run.start_next(jobs)
    finished: dict[int, Rollout] = {}
    while any(run.active for run in runs):
        for run, chunk in _choose(runs, act, execute_horizon, seconds):
            result = run.execute(chunk).rollout
            if result is None:
                continue
            finished[result.number] = result
            if on_episode is not None:
                on_episode(result)
            run.start_next(jobs)
    return [finished[number] for number in range(len(seeds))]


class OnlineCollector:
    """One chunk in each environment whenever asked, so that a trainer can update in between.

    Episode k of the run is seeded by ``episode_seed(seed, k)``; those ``finished`` before are left out. A chunk is
    executed open loop; what an ended episode leaves of it is dropped.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        *,
        seed: int,
        execute_horizon: int,
        first_episode: int = 0,
        finished: Collection[int] = (),
        record_images: bool = True,
    ):
        self.seconds = Seconds()
        self._execute_horizon = execute_horizon
        done = frozenset(finished)
        missing = (number for number in itertools.count(first_episode) if number not in done)
        self._jobs = ((number, episode_seed(seed, number)) for number in missing)
        self._runs = [_Run(environment, record_images, self.seconds) for environment in environments]
        for run in self._runs:
            run.start_next(self._jobs)

    @property
    def next_episode(self) -> int:
        """The lowest number not yet finished: ``first_episode`` of a resumed run. What was under way starts again."""
        return min(run.number for run in self._runs)

    def collect(self, act: Act) -> Collected:
        executed = [run.execute(chunk) for run, chunk in _choose(self._runs, act, self._execute_horizon, self.seconds)]
        for run, outcome in zip(self._runs, executed, strict=True):
            if outcome.rollout is not None:
                run.start_next(self._jobs)
        rollouts = [outcome.rollout for outcome in executed if outcome.rollout is not None]
        return Collected(rollouts, sum(outcome.num_steps for outcome in executed))


def collect(
    config: EnvConfig,
    episodes: Iterable[int],
    *,
    policy: PolicyKind = "expert",
    noise_range: tuple[float, float] = (0.0, 0.8),
    seed: int = 0,
    num_workers: int = 1,
    on_episode: Callable[[Rollout], None],
) -> None:
    """Make prior data: the episodes of these numbers, successes and failures alike, given to ``on_episode`` in order.

    Episode k depends on ``(seed, k)`` alone, whatever the number of workers: to resume, pass the numbers still missing.
    An expert gets ``SmoothNoise`` of a strength drawn from ``noise_range``: on drawer-open-v3 with 150 steps, the
    default leaves it about 4 successes in 10. Pictures are recorded if cameras are configured.
    """
    numbers = list(episodes)
    job = _CollectJob(config, policy, noise_range, seed)
    results = _in_processes(job, numbers, num_workers) if num_workers > 1 else _in_this_process(job, numbers)
    progress = tqdm(results, desc=f"collect {config.name}", total=len(numbers), unit="episode")
    num_successes = 0
    for count, result in enumerate(progress, 1):
        on_episode(result)
        num_successes += result.success
        progress.set_postfix(success=f"{num_successes / count:.2f}")


def replay(environment: Environment, result: Rollout, size: int) -> UInt8[np.ndarray, "frames h w 3"]:
    """Film a rollout by executing its actions again: frame t is the scene after t actions, up to all of them."""
    environment.reset(result.seed, render=False)
    frames = [environment.render(size)]
    for action in result.episode.actions:
        environment.step(action)
        frames.append(environment.render(size))
    return np.stack(frames)


class _Outcome(NamedTuple):
    rollout: Rollout | None
    num_steps: int


class _Run:
    """One environment and the episode under way in it."""

    def __init__(self, environment: Environment, record_images: bool, seconds: Seconds):
        self.environment = environment
        self.observation: Obs = {}
        self.number = self.seed = -1  # of the episode under way
        self.active = False
        self._record_images = record_images
        self._seconds = seconds
        self._observations: list[Obs] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []

    def start_next(self, jobs: Iterator[tuple[int, int]]) -> None:
        """Begin the next ``(number, seed)``; without one left the run goes idle."""
        job = next(jobs, None)
        self.active = job is not None
        if job is None:
            return
        self.number, self.seed = job
        self._observations, self._actions, self._rewards = [], [], []
        start = time.perf_counter()
        self.observation = self.environment.reset(self.seed)
        self._seconds.simulator += time.perf_counter() - start

    def execute(self, chunk: Float[np.ndarray, "h a"]) -> _Outcome:
        """The whole chunk, or as much of it as the episode lasts."""
        for count, action in enumerate(chunk, 1):
            result = self.step(action, render=self._record_images or count == len(chunk))
            if result is not None:
                return _Outcome(result, count)
        return _Outcome(None, len(chunk))

    def step(self, action: Float[np.ndarray, " a"], *, render: bool) -> Rollout | None:
        start = time.perf_counter()
        try:
            step = self.environment.step(action, render=render)
        except PhysicsError as error:
            return self._lost(action, str(error))
        finally:
            self._seconds.simulator += time.perf_counter() - start
        self._record(clip_action(self.environment.spec, action), step.reward)
        self.observation = step.observation
        if step.terminated or step.truncated:
            return self._finish(step.terminated, step.success, None)
        return None

    def _record(self, action: Float[np.ndarray, " a"], reward: float) -> None:
        self._observations.append(self.observation)
        self._actions.append(action)
        self._rewards.append(reward)

    def _lost(self, action: Float[np.ndarray, " a"], error: str) -> Rollout:
        """The failing step is kept, so that every episode has one: its state is good, its reward that of a failure."""
        self._record(clip_action(self.environment.spec, np.nan_to_num(action)), self.environment.spec.failure_reward)
        return self._finish(False, False, error)

    def _finish(self, terminated: bool, success: bool, error: str | None) -> Rollout:
        terminals = np.zeros(len(self._actions), np.bool_)
        terminals[-1] = terminated
        spec = self.environment.spec
        cameras = spec.cameras if self._record_images else ()
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
            source=f"{spec.name} seed {self.seed}",
        )
        returns = float(np.sum(self._rewards))
        return Rollout(episode, self.number, self.seed, returns, len(episode), success, error)


def _choose(
    runs: Sequence[_Run], act: Act, execute_horizon: int, seconds: Seconds
) -> list[tuple[_Run, Float[np.ndarray, "h a"]]]:
    """Ask the policy once for all active runs. Every one of them is at the end of a chunk or at a reset."""
    active = [index for index, run in enumerate(runs) if run.active]
    filler = runs[active[0]].observation
    observations = [run.observation if run.active else filler for run in runs]
    numbers = np.array([run.number if run.active else -1 for run in runs])
    start = time.perf_counter()
    chunks = np.asarray(act(observations, numbers))
    seconds.act += time.perf_counter() - start
    expected = (len(runs), runs[0].environment.spec.action_dim)
    if chunks.ndim != 3 or (chunks.shape[0], chunks.shape[2]) != expected or chunks.shape[1] < execute_horizon:
        raise ValueError(
            f"act returned actions of shape {chunks.shape}; expected ({expected[0]}, h, {expected[1]}) with h at least "
            f"execute_horizon ({execute_horizon})"
        )
    return [(runs[index], chunks[index, :execute_horizon]) for index in active]


@dataclasses.dataclass(frozen=True)
class _CollectJob:
    """All that a worker needs to make episode k."""

    config: EnvConfig
    policy: PolicyKind
    noise_range: tuple[float, float]
    seed: int

    def run(self, environment: SimulatedEnvironment, number: int) -> Rollout:
        rng = np.random.default_rng((self.seed, number))
        run = _Run(environment, record_images=bool(self.config.cameras), seconds=Seconds())
        run.start_next(iter([(number, episode_seed(self.seed, number))]))
        expert = make_expert(environment, self.policy, rng)
        noise = SmoothNoise(rng, environment.spec.action_dim, self.noise_range)
        while True:
            action = expert(run.observation)
            if self.policy == "expert":
                action = clip_action(environment.spec, action) + noise()
            result = run.step(action, render=bool(self.config.cameras))
            if result is not None:
                return result


def _in_this_process(job: _CollectJob, numbers: list[int]) -> Iterator[Rollout]:
    environment = make(job.config)
    try:
        for number in numbers:
            yield job.run(environment, number)
    finally:
        environment.close()


def _in_processes(job: _CollectJob, numbers: list[int], num_workers: int) -> Iterator[Rollout]:
    """Results in the order of ``numbers``; no more than two episodes a worker wait for their turn in memory."""
    executor = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    with executor:
        waiting: deque[concurrent.futures.Future[Rollout]] = deque()
        for number in numbers:
            if len(waiting) == 2 * num_workers:
                yield waiting.popleft().result()
            waiting.append(executor.submit(_run_in_worker, number))
        while waiting:
            yield waiting.popleft().result()


_worker: tuple[_CollectJob, SimulatedEnvironment] | None = (
    None  # of a worker process: built once, used for many episodes
)


def _start_worker(job: _CollectJob) -> None:
    global _worker
    _worker = (job, make(job.config))


def _run_in_worker(number: int) -> Rollout:
    assert _worker is not None, "the pool's initializer has run"
    job, environment = _worker
    return job.run(environment, number)
