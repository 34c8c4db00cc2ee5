"""Requests that wait become one compiled call: a bounded queue in the event loop, the model in a thread of its own.

A call takes what waits, up to ``max_batch_size``, padded to the next power of two, so that few shapes are compiled and
all of them before the first request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from acrlpd.data.transforms import Data
from acrlpd.serving.policy import NotFiniteError, Policy
from acrlpd.serving.request import Request


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two up to ``max_batch_size``, which is the last: ``batch_sizes(6)`` is (1, 2, 4, 6)."""
    powers = [2**k for k in range(max_batch_size.bit_length()) if 2**k < max_batch_size]
    return (*powers, max_batch_size)


class Turns:
    """Turns of clients: whoever comes gets the next one, behind those it has had already.

    A client alone has its turns in the order of its coming. Where several wait, each has as many as any other, whatever
    number of requests one of them sends (start-time fair queueing).
    """

    def __init__(self) -> None:
        self._now = 0.0  # the latest turn that was served
        self._next: dict[Hashable, float] = {}

    def take(self, client: Hashable, cost: float = 1.0) -> float:
        """Return the place of the client's next piece of work; the lowest place is served first."""
        place = max(self._now, self._next.get(client, 0.0))
        self._next[client] = place + cost
        return place

    def serve(self, place: float) -> None:
        self._now = max(self._now, place)
        self._next = {client: place for client, place in self._next.items() if place > self._now}


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: Request
    answer: asyncio.Future[Data]
    place: float
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Answers requests in batches while its ``running`` context is open; clients take turns.

    Args:
        policy: may be replaced at any time; a batch is computed by one policy.
        max_batch_size: requests in one call.
        batch_wait_s: how long the first of a batch waits for others, if ``expected`` says that there may be some.
        expected: how many requests may come at the same time.
        on_batch: told the number of requests, the padded size and the seconds of each call.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch_size: int,
        batch_wait_s: float,
        expected: Callable[[], int],
        on_batch: Callable[[int, int, float], None],
    ):
        self.policy = policy
        self.sizes = batch_sizes(max_batch_size)
        self._batch_wait_s = batch_wait_s
        self._expected = expected
        self._on_batch = on_batch
        self._queue: list[_Waiting] = []  # in the order of arrival
        self._turns = Turns()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._thread.shutdown(wait=True)

    async def infer(self, request: Request, owner: Hashable = None) -> Data:
        """The answer to one request of ``owner``. If this is cancelled while it waits, nothing is computed for it."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), self._turns.take(owner))
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        while True:
            batch = await self._gather()
            if batch:
                await self._answer(batch)

    async def _gather(self) -> list[_Waiting]:
        """Those whose turn it is; for lack of enough of them, after a short wait for more."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        enough = min(self.sizes[-1], self._expected())
        deadline = self._queue[0].since + self._batch_wait_s
        while len(self._queue) < enough and (left := deadline - time.monotonic()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        return self._next_batch()

    def _next_batch(self) -> list[_Waiting]:
        """The first in turn, and those after it who can share its call; nobody whose sender has gone."""
        self._queue = [waiting for waiting in self._queue if not waiting.answer.done()]
        in_turn = sorted(self._queue, key=lambda waiting: waiting.place)
        batch = [each for each in in_turn if each.request.kind == in_turn[0].request.kind][: self.sizes[-1]]
        self._queue = [waiting for waiting in self._queue if waiting not in batch]
        for waiting in batch:
            self._turns.serve(waiting.place)
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        size = next(size for size in self.sizes if size >= len(batch))
        requests = [waiting.request for waiting in batch]
        start = time.monotonic()
        loop, policy = asyncio.get_running_loop(), self.policy
        try:
            answers = await loop.run_in_executor(self._thread, lambda: policy.infer_batch(requests, size=size))
        except NotFiniteError as error:
            _tell(batch, [error if answer is None else answer for answer in error.answers])
            return
        except Exception as error:  # noqa: BLE001  # each of those who wait raises it
            _tell(batch, [error] * len(batch))
            return
        self._on_batch(len(batch), size, time.monotonic() - start)
        _tell(batch, answers)


def _tell(batch: Sequence[_Waiting], answers: Sequence[Data | Exception]) -> None:
    """Hand over the answers to those who still wait for them."""
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(answer, Exception):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
