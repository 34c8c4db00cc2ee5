"""Requests that wait become one compiled call: a bounded queue in the event loop, the model in a thread of its own.

A call takes what waits, up to ``max_batch_size``, padded to the next power of two, so that few shapes are compiled and
all of them before the first request.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from acrlpd.data.transforms import Data
from acrlpd.serving.policy import NotFiniteError, Policy
from acrlpd.serving.request import Request


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two up to ``max_batch_size``, which is the last: ``batch_sizes(6)`` is (1, 2, 4, 6)."""
    powers = [2**k for k in range(max_batch_size.bit_length()) if 2**k < max_batch_size]
    return (*powers, max_batch_size)


@dataclass(frozen=True)
class _Waiting:
    request: Request
    answer: asyncio.Future[Data]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Answers requests in batches while its ``running`` context is open.

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
        self._queue: collections.deque[_Waiting] = collections.deque()
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

    async def infer(self, request: Request) -> Data:
        """The answer to one request. If this is cancelled while the request waits, nothing is computed for it."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        while True:
            batch = await self._gather()
            if batch:
                await self._answer(batch)

    async def _gather(self) -> list[_Waiting]:
        """Those who wait, the oldest first; for lack of enough of them, after a short wait for more."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        enough = min(self.sizes[-1], self._expected())
        deadline = self._queue[0].since + self._batch_wait_s
        while len(self._queue) < enough and (left := deadline - time.monotonic()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self.sizes[-1]:
            waiting = self._queue.popleft()
            if not waiting.answer.done():  # its sender has gone, or waited too long
                batch.append(waiting)
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
