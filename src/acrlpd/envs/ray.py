"""Environments as Ray actors: the interface of the worker processes, on all machines of a cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from acrlpd.envs.env import EnvSpec
from acrlpd.envs.episodes import Command, EpisodeRunner, Lost, Report
from acrlpd.envs.failure import Failure, WorkerError, checked
from acrlpd.envs.vector import MAX_DEATHS_IN_A_ROW, STARTUP_TIMEOUT_S, MakeEnvironment


class RayVectorEnv:
    """Environments in Ray actors: environment i is in actor i modulo ``num_workers``.

    Dead and hung actors are replaced; their episodes are lost. Uses the cluster that ``RAY_ADDRESS`` names, or starts
    one on this machine. The cluster's machines need this package and the simulator.
    """

    def __init__(self, make_one: MakeEnvironment, num_envs: int, *, num_workers: int, timeout_s: float = 120.0):
        if not 1 <= num_workers <= num_envs:
            raise ValueError(f"num_workers must lie between 1 and the {num_envs} environments, got {num_workers}")
        try:
            import ray
        except ImportError as error:
            raise ImportError("rollout.backend='ray' needs Ray: pip install 'acrlpd[ray]'") from error
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self.num_envs = num_envs
        self._make_one = make_one
        self._timeout_s = timeout_s
        self._indices = [tuple(range(first, num_envs, num_workers)) for first in range(num_workers)]
        self._deaths_in_a_row = [0] * num_workers
        self._pending: dict[int, tuple[Any, dict[int, Command]]] = {}  # by actor: its future answer, and its commands
        self._sent = 0.0
        self.actors = [self._begin(indices) for indices in self._indices]
        self.spec: EnvSpec = checked(ray.get(self.actors[0].spec.remote(), timeout=STARTUP_TIMEOUT_S))

    def send(self, commands: Mapping[int, Command]) -> None:
        for number, indices in enumerate(self._indices):
            own = {index: commands[index] for index in indices if index in commands}
            if own:
                self._pending[number] = self.actors[number].obey.remote(own), own
        self._sent = time.monotonic()

    def receive(self) -> dict[int, Report | Lost]:
        answers: dict[int, Report | Lost] = {}
        for number, (answer, commands) in self._pending.items():
            left = max(0.0, self._timeout_s - (time.monotonic() - self._sent))
            fresh = self._deaths_in_a_row[number] > 0  # a new actor has to start first
            try:
                answers |= checked(self._ray.get(answer, timeout=left + fresh * STARTUP_TIMEOUT_S))
                self._deaths_in_a_row[number] = 0
            except self._ray.exceptions.GetTimeoutError:
                answers |= self._replace(number, commands, f"actor {number} hung: no answer in {self._timeout_s:g} s")
            except self._ray.exceptions.RayActorError as error:
                answers |= self._replace(number, commands, f"actor {number} died: {error}")
            except self._ray.exceptions.RayTaskError as error:  # its answer could not be sent
                raise WorkerError(str(error)) from None
        self._pending = {}
        return answers

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)

    def _begin(self, indices: tuple[int, ...]) -> Any:
        actor = self._ray.remote(num_cpus=1, max_restarts=0)(_Runners)
        return actor.remote(self._make_one, indices)

    def _replace(self, number: int, commands: Mapping[int, Command], reason: str) -> dict[int, Report | Lost]:
        self._ray.kill(self.actors[number])
        self._deaths_in_a_row[number] += 1
        if self._deaths_in_a_row[number] >= MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(
                f"{reason}, as did its {MAX_DEATHS_IN_A_ROW - 1} predecessors. Step the environment in this process "
                "(num_workers 0) to see why."
            )
        self.actors[number] = self._begin(self._indices[number])
        return {index: Lost(reason) for index in commands}


class _Runners:
    """The actor. It answers errors as text, also those of its constructor."""

    def __init__(self, make_one: MakeEnvironment, indices: tuple[int, ...]):
        self._failure: Failure | None = None
        try:
            self._runners = {index: EpisodeRunner(make_one()) for index in indices}
        except Exception as error:  # noqa: BLE001 (raised again by the caller)
            self._failure = Failure.of(error)

    def spec(self) -> EnvSpec | Failure:
        return self._failure or next(iter(self._runners.values())).environment.spec

    def obey(self, commands: Mapping[int, Command]) -> dict[int, Report | Lost] | Failure:
        if self._failure is not None:
            return self._failure
        try:
            return {index: self._runners[index].obey(command) for index, command in commands.items()}
        except Exception as error:  # noqa: BLE001 (raised again by the caller)
            return Failure.of(error)
