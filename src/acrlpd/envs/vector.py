"""N environments behind one interface: in this process, or in worker processes. ``ray.py`` puts them on many machines.

All commands of a round are sent before the first answer is awaited, so the environments run in parallel. A round ends
when all have answered, so the result does not depend on which is faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from acrlpd import fields, main_guard
from acrlpd.envs.env import Environment, EnvSpec
from acrlpd.envs.episodes import Command, EpisodeRunner, Lost, Report
from acrlpd.envs.failure import Failure, checked
from acrlpd.fields import Interval, NonNegativeInt
from acrlpd.orphans import end_with_parent

MakeEnvironment: TypeAlias = Callable[[], Environment]
MAX_DEATHS_IN_A_ROW = 3  # of one worker, without an answer in between; then the installation counts as broken
STARTUP_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The place where environments run."""

    backend: Literal["processes", "ray"] = "processes"  # ray: actors on the cluster that RAY_ADDRESS names
    num_workers: NonNegativeInt = 0  # 0: in this process, one environment after the other
    # a worker that takes longer for one chunk counts as hung and is replaced
    timeout_s: Annotated[float, Interval("(0, inf]")] = 120.0

    def __post_init__(self) -> None:
        fields.check(self)
        if self.backend == "ray" and self.num_workers < 1:
            raise ValueError("rollout.backend='ray' needs rollout.num_workers of at least 1")


class VectorEnv(Protocol):
    """Numbered environments. Every ``send`` is followed by one ``receive``, which answers all its commands."""

    spec: EnvSpec
    num_envs: int

    def send(self, commands: Mapping[int, Command]) -> None: ...

    def receive(self) -> dict[int, Report | Lost]: ...

    def close(self) -> None: ...


class LocalVectorEnv:
    """Environments in this process, run one by one. They act in ``receive``, so a device can compute after ``send``."""

    def __init__(self, environments: Sequence[Environment]):
        self.spec = environments[0].spec
        self.num_envs = len(environments)
        self._runners = [EpisodeRunner(environment) for environment in environments]
        self._commands: Mapping[int, Command] = {}

    def send(self, commands: Mapping[int, Command]) -> None:
        self._commands = commands

    def receive(self) -> dict[int, Report | Lost]:
        commands, self._commands = self._commands, {}
        return {index: self._runners[index].obey(command) for index, command in commands.items()}

    def close(self) -> None:
        for runner in self._runners:
            runner.environment.close()


class ProcessVectorEnv:
    """Environments in worker processes: environment i is in worker i modulo ``num_workers``.

    A worker that dies or takes longer than ``timeout_s`` is replaced and its current episodes are lost (just one if
    every environment has its own worker). An exception in a worker is raised here with its own message.
    """

    def __init__(self, make_one: MakeEnvironment, num_envs: int, *, num_workers: int, timeout_s: float = 120.0):
        if not 1 <= num_workers <= num_envs:
            raise ValueError(f"num_workers must lie between 1 and the {num_envs} environments, got {num_workers}")
        self.num_envs = num_envs
        self._workers = [
            _Worker(make_one, range(first, num_envs, num_workers), timeout_s) for first in range(num_workers)
        ]
        try:
            self.spec = self._workers[0].wait_until_ready()
        except BaseException:
            self.close()
            raise

    def send(self, commands: Mapping[int, Command]) -> None:
        for worker in self._workers:
            worker.send({index: command for index, command in commands.items() if index in worker.indices})

    def receive(self) -> dict[int, Report | Lost]:
        return {index: answer for worker in self._workers for index, answer in worker.receive().items()}

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, make_one: MakeEnvironment, indices: range, timeout_s: float):
        self.indices = indices
        self._make_one = make_one
        self._timeout_s = timeout_s
        self._deaths_in_a_row = 0
        self._spec: EnvSpec | None = None  # None: the process has not reported yet that it is ready
        self._commands: dict[int, Command] = {}
        self._sent = 0.0
        self._begin()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "the process was started"
        return self._process.pid

    def wait_until_ready(self) -> EnvSpec:
        while self._spec is None:
            try:
                self._spec = self._answer(STARTUP_TIMEOUT_S)
            except _GoneError as gone:
                self._replace(str(gone))
        return self._spec

    def send(self, commands: dict[int, Command]) -> None:
        self._commands = commands
        if self._spec is not None:
            self._post()

    def receive(self) -> dict[int, Report | Lost]:
        if not self._commands:
            return {}
        try:
            if self._spec is None:  # a new process: the commands wait until it has reported that it is ready
                self._spec = self._answer(STARTUP_TIMEOUT_S)
                self._post()
            answers = self._answer(max(0.0, self._timeout_s - (time.monotonic() - self._sent)))
        except _GoneError as gone:
            lost: dict[int, Report | Lost] = {index: Lost(str(gone)) for index in self._commands}
            self._replace(str(gone))
            return lost
        self._deaths_in_a_row = 0
        return answers

    def close(self) -> None:
        self._connection.close()  # the process ends when it reads end-of-file
        self._process.join(timeout=5)
        self._end()

    def _begin(self) -> None:
        main_guard.check(tell=False)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._make_one, tuple(self.indices)), name="acrlpd-rollout", daemon=True
        )
        self._process.start()
        theirs.close()  # close our copy of the worker's end, so that end-of-file means the worker died
        self._spec = None

    def _post(self) -> None:
        if not self._commands:
            return
        self._sent = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the worker is gone: no answer will come
            self._connection.send(self._commands)

    def _answer(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                limit = STARTUP_TIMEOUT_S if self._spec is None else self._timeout_s
                raise _GoneError(f"worker {self.pid} hung: no answer in {limit:g} s")
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(timeout=5)
            if self._process.exitcode == main_guard.EXIT_NO_GUARD:
                raise ValueError(main_guard.message()) from None
            raise _GoneError(f"worker {self.pid} died (exit code {self._process.exitcode})") from error
        return checked(answer)

    def _replace(self, reason: str) -> None:
        self._end()
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(
                f"{reason}, as did its {MAX_DEATHS_IN_A_ROW - 1} predecessors. Step the environment in this process "
                "(num_workers 0) to see why."
            )
        self._begin()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


class _GoneError(RuntimeError):
    """A worker died or hung."""


def _serve(connection: Connection, make_one: MakeEnvironment, indices: Sequence[int]) -> None:
    """Run the worker's loop until the parent closes its end. The parent handles Ctrl-C."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runners = {index: EpisodeRunner(make_one()) for index in indices}
        connection.send(runners[indices[0]].environment.spec)
        while True:
            commands = connection.recv()
            connection.send({index: runners[index].obey(command) for index, command in commands.items()})
    except EOFError:  # the parent closed its end, or is gone
        return
    except Exception as error:  # noqa: BLE001 (raised again in the parent)
        with contextlib.suppress(BrokenPipeError):
            connection.send(Failure.of(error))
