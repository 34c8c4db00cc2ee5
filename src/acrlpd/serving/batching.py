"""Batching of waiting requests into one compiled call: a queue in the event loop, the model in its own thread.

A call takes the waiting requests, up to ``max_batch_size``, padded to the next power of two, so that few shapes are
compiled and all of them before the first request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from acrlpd.data.view.transforms import Data
from acrlpd.serving.policy import NotFiniteError, Policy
from acrlpd.serving.request import Request


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Return powers of two below ``max_batch_size``, then that number: ``batch_sizes(6)`` is (1, 2, 4, 6)."""
    powers = [2**k for k in range(max_batch_size.bit_length()) if 2**k < max_batch_size]
    return (*powers, max_batch_size)


class Turns:
    """A fair order of clients' requests: each request gets the next place after the client's previous ones.

    Requests of a single client are served in the order of arrival. If several clients wait, all get equally many turns,
    no matter how many requests one of them sends (start-time fair queueing).
    """

    def __init__(self) -> None:
        self._now = 0.0  # the latest turn that was served
        self._next: dict[Hashable, float] = {}

    def take(self, client: Hashable, cost: float = 1.0) -> float:
        """Return the place of the client's next request; the lowest place is served first."""
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
    """A queue that answers requests in batches while its ``running`` context is open; clients take turns.

    Args:
        policy: may be replaced at any time; each batch is computed by one policy.
        max_batch_size: max. requests in one call.
        batch_wait_s: how long the first request of a batch waits for others, if ``expected`` says that some may come.
        expected: returns how many requests may come at the same time.
        on_batch: called with the number of requests, the padded size and the seconds of each call.
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
        """Answer one request of ``owner``. If this is cancelled while it waits, nothing is computed for it."""
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
        """Return the requests whose turn it is; if there are too few, wait for more for a short time."""
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
        """Return the first request in turn and later ones that can share its call; drop those of senders that left."""
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
        except Exception as error:  # noqa: BLE001  # every waiting ``infer`` raises it
            _tell(batch, [error] * len(batch))
            return
        self._on_batch(len(batch), size, time.monotonic() - start)
        _tell(batch, answers)


def _tell(batch: Sequence[_Waiting], answers: Sequence[Data | Exception]) -> None:
    """Set the answers of requests that are still waiting."""
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(answer, Exception):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
