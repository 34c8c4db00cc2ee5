"""A server of a policy with openpi's websocket protocol, built to run unattended.

On connect the server sends the policy's metadata; then each binary frame is an observation and each answer its actions
with ``server_timing`` (``codec.py`` has the encoding). Errors are sent in a TEXT frame, which openpi's clients raise as
an error. After a refusal (``busy``, ``rate limit``, ``timeout``) the connection stays open; after an invalid request or
an error of the server, it is closed with code 1011, as openpi does.

The event loop never waits for computation: messages with pictures are decoded and transformed in a small thread pool
(a state and a prompt directly, in about a tenth of a millisecond), and the model runs in its own thread, with many
requests in one call (``batching.py``).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hmac
import http
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from acrlpd.data.view.transforms import Data
from acrlpd.serving import codec
from acrlpd.serving.batching import Batcher
from acrlpd.serving.door import Door, ServerConfig, check_keys, open_door
from acrlpd.serving.limits import RateLimit, check_size
from acrlpd.serving.metrics import ServerMetrics
from acrlpd.serving.policy import Policy
from acrlpd.serving.request import Request

if TYPE_CHECKING:
    from websockets.http11 import Request as HTTPRequest
    from websockets.http11 import Response

    from acrlpd.serving.connection import GuardedConnection

logger = logging.getLogger(__name__)

SMALL_MESSAGE_BYTES = 4096  # a state and a prompt: handing them to a thread takes longer than preparing them
LARGE_MESSAGE_BYTES = 2**20  # larger messages have threads of their own, so that no other waits for them
MAX_HELD_MESSAGES = 16  # of the max. size, received but not answered, over all connections
RECENT_S = 5.0  # a client without a request for so long is not expected to send one now
SWITCH_S = 0.0005  # the interpreter's switch interval: the event loop waits so long for each busy thread
MAX_COMPLAINT = 1000  # max. characters of an error in a TEXT frame
INTERNAL_ERROR = 1011


class RefusedError(Exception):
    """A valid request that is not served now; the message tells its sender why."""


class InvalidRequestError(Exception):
    """An invalid message; the error's text tells its sender why."""


class PolicyServer:
    """A server of ``policy``, active while its ``serving`` context is open, or under ``run`` until SIGTERM or SIGINT.

    Args:
        api_keys: each of them gives access; without any, access is free, which only loopback addresses may allow.
        refresh: called every ``reload_interval_s`` in a thread; returns a newer policy or None. Requests in progress
            are answered by the old one.
        door: the result of ``open_door`` for this configuration; None: it is opened when serving begins.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServerConfig,
        *,
        api_keys: Sequence[str] = (),
        refresh: Callable[[], Policy | None] | None = None,
        door: Door | None = None,
    ):
        check_keys(config, api_keys)
        self.config = config
        self._api_keys = tuple(api_keys)
        self._headers = [f"Api-Key {key}".encode() for key in api_keys]
        self._door = door
        self.metrics = ServerMetrics()
        self._refresh = refresh
        self._ready = asyncio.Event()
        self._draining = False
        self._connections: set[GuardedConnection] = set()
        self._idle: set[GuardedConnection] = set()
        self._per_address: collections.Counter[str] = collections.Counter()
        self._admitted: collections.Counter[Hashable] = collections.Counter()  # number of requests by owner
        self._small = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._large = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) - 1)), thread_name_prefix="prepare large")
        self.batcher = Batcher(
            policy,
            max_batch_size=min(config.max_batch_size, config.max_concurrent_requests),
            batch_wait_s=config.batch_wait_s,
            expected=self._expected,
            on_batch=self.metrics.count_batch,
        )
        self.metrics.watch(self.batcher)

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self, *, on_ready: Callable[[int], Any] = lambda port: None) -> None:
        """Serve until SIGTERM or SIGINT; call ``on_ready`` with the port once everything is compiled."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, stop.set)
        async with self.serving() as port:
            stopped = asyncio.create_task(stop.wait())
            ready = asyncio.create_task(self._ready.wait())
            await asyncio.wait((stopped, ready), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                on_ready(port)
            await stopped
            ready.cancel()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Listen, compile and serve; yield the port. At the end, requests in progress are answered first."""
        door = self._door or open_door(self.config, self._api_keys)
        quiet = logging.getLogger("acrlpd.serving.websockets")
        quiet.setLevel(logging.CRITICAL)  # a port scan would log one traceback per connection
        switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            async with self.batcher.running(), contextlib.AsyncExitStack() as open_sockets:
                servers = [await open_sockets.enter_async_context(each) for each in self._listening(door, quiet)]
                port = servers[0].sockets[0].getsockname()[1]
                logger.info("listening on %s, compiling", self.config.url(port))
                preparing = asyncio.create_task(self._prepare())
                try:
                    yield port
                finally:
                    preparing.cancel()
                    await asyncio.gather(preparing, return_exceptions=True)
                    await self._drain(servers)
        finally:
            sys.setswitchinterval(switch_s)
            door.close()
        for pool in (self._small, self._large):
            pool.shutdown(wait=False)

    def _listening(self, door: Door, quiet: logging.Logger) -> list[Any]:
        """Return a websocket server for each socket of the door."""
        from websockets.asyncio.server import serve

        from acrlpd.serving.connection import CLOSE_S, GuardedConnection, Hold, Listener, Lobby, Pace

        config = self.config
        self._lobby = lobby = Lobby(self.metrics.rejected.labels("silent").inc)
        options: dict[str, Any] = {
            "process_request": self._process_request,
            "create_connection": functools.partial(
                GuardedConnection,
                lobby=lobby,
                pace=Pace(),
                hold=Hold(MAX_HELD_MESSAGES * config.max_message_bytes),
                timeout_s=config.message_timeout_s,
                alone=lambda: len(self._connections) <= 1,
            ),
        }
        if door.tls is not None:
            options |= {"ssl_handshake_timeout": config.message_timeout_s, "ssl_shutdown_timeout": CLOSE_S}
        handle: Any = self._handle  # it takes the connections that the factory makes
        return [
            serve(
                handle,
                sock=Listener.of(bound, lobby),
                ssl=door.tls,
                compression=None,
                server_header=None,
                max_size=config.max_message_bytes,
                max_queue=0,
                open_timeout=config.message_timeout_s,
                ping_interval=config.ping_interval_s,
                ping_timeout=config.ping_interval_s,
                close_timeout=CLOSE_S,
                logger=quiet,
                backlog=1,
                **options,
            )
            for bound in door.sockets
        ]

    def _expected(self) -> int:
        """Return how many clients may send a request at the same time, without idle ones, for which nobody waits."""
        since = time.monotonic() - RECENT_S
        return sum(connection.asked_at > since for connection in self._connections)

    async def wait_ready(self) -> None:
        await self._ready.wait()

    async def _prepare(self) -> None:
        """Compile, report readiness, and from then on look for newer checkpoints."""
        start = time.monotonic()
        try:
            await asyncio.to_thread(self.batcher.policy.warm_up, self.batcher.sizes)
        except Exception:
            logger.exception("the policy does not compile; the server stays alive but is never ready")
            return
        self._ready.set()
        logger.info("ready after %.1f s, batches of %s", time.monotonic() - start, self.batcher.sizes)
        self._count_step()
        while self._refresh is not None and self.config.reload_interval_s is not None:
            await asyncio.sleep(self.config.reload_interval_s)
            await self._reload(self._refresh)

    async def _reload(self, refresh: Callable[[], Policy | None]) -> None:
        try:
            policy = await asyncio.to_thread(refresh)
            if policy is None:
                return
            await asyncio.to_thread(policy.warm_up, self.batcher.sizes)
        except Exception:
            self.metrics.reloads.labels("error").inc()
            logger.exception("a newer checkpoint could not be loaded; the old one is still served")
            return
        self.batcher.policy = policy
        self.metrics.reloads.labels("ok").inc()
        self._count_step()
        logger.info("serving %s now", policy.metadata.get("acrlpd", policy.metadata))

    def _count_step(self) -> None:
        about = self.batcher.policy.metadata.get("acrlpd", {})
        self.metrics.step.set(about.get("step", 0))

    async def _drain(self, servers: Sequence[Any]) -> None:
        """Accept no new connections; close idle ones at once and the others after their answer."""
        self._draining = True
        self._ready.set()  # those that wait for it then find the server draining
        for server in servers:
            server.close(close_connections=False)
        self._lobby.clear()
        await asyncio.gather(*(connection.close(1001, "server shutting down") for connection in list(self._idle)))
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await _all_closed(servers)
        except TimeoutError:
            logger.warning("%d connections cut off after %g s", len(self._connections), self.config.drain_timeout_s)
            for connection in list(self._connections):
                connection.transport.abort()
            await _all_closed(servers)

    # -- the door ------------------------------------------------------------------------------------------------

    def _process_request(self, connection: GuardedConnection, request: HTTPRequest) -> Response | None:
        """Answer HTTP: health for everyone; metrics with a key; the websocket with a key and a free place."""
        connection.ask()
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            if self._ready.is_set() and not self._draining:
                return connection.respond(http.HTTPStatus.OK, "OK\n")
            reason = "draining" if self._draining else "compiling"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n")
        connection.owner = self._owner(connection.address, request.headers.get_all("Authorization"))
        if connection.owner is None:
            self.metrics.rejected.labels("api_key").inc()
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "API key missing or wrong.\n")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.text())
        if self._draining:
            return self._reject(connection, http.HTTPStatus.SERVICE_UNAVAILABLE, "draining")
        if len(self._connections) >= self.config.max_connections:
            return self._reject(connection, http.HTTPStatus.SERVICE_UNAVAILABLE, "max_connections")
        if self._per_address[connection.address] >= self.config.max_connections_per_address:
            return self._reject(connection, http.HTTPStatus.TOO_MANY_REQUESTS, "max_connections_per_address")
        return None

    def _reject(self, connection: GuardedConnection, status: http.HTTPStatus, reason: str) -> Response:
        self.metrics.rejected.labels(reason).inc()
        response = connection.respond(status, f"refused: {reason}; try again later\n")
        response.headers["Retry-After"] = "5"
        return response

    def _owner(self, address: str, authorization: list[str]) -> Hashable:
        """Return the client that owns the requests, or None if the header has none of the keys.

        With several keys, each key is a client; with one or no key, each address is. The time that this takes does not
        reveal how much of a key was right.
        """
        given = authorization[0] if len(authorization) == 1 else ""
        given_bytes = given.encode("utf-8", "surrogateescape")
        matches = [index for index, header in enumerate(self._headers) if hmac.compare_digest(header, given_bytes)]
        if self._headers and not matches:
            return None
        return f"key {matches[0]}" if len(self._headers) > 1 else address

    # -- conversation --------------------------------------------------------------------------------------------

    async def _handle(self, connection: GuardedConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        address = connection.address
        connection.admit()
        self._connections.add(connection)
        self._per_address[address] += 1
        self.metrics.connections.set(len(self._connections))
        try:
            await self._ready.wait()
            await self._send(connection, codec.pack(self.batcher.policy.metadata))
            await self._converse(connection)
        except (ConnectionClosed, TimeoutError):
            pass  # the client is gone or does not read: there is nobody to answer
        finally:
            self._connections.discard(connection)
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]
            self.metrics.connections.set(len(self._connections))

    async def _converse(self, connection: GuardedConnection) -> None:
        """Receive and answer messages in turn, until one side ends the connection."""
        limit = RateLimit(self.config.max_requests_per_s)
        previous_s: float | None = None
        while not self._draining:
            start = time.monotonic()
            self._idle.add(connection)
            try:
                message = await self._receive(connection)
            finally:
                self._idle.discard(connection)
            connection.asked_at = time.monotonic()
            try:
                answer = await self._answer(connection, message, limit)
            except RefusedError as refusal:
                self.metrics.requests.labels("refused").inc()
                await self._send(connection, str(refusal))
                connection.answered(message)
                continue
            except InvalidRequestError as complaint:
                self.metrics.requests.labels("invalid").inc()
                await self._hang_up(connection, str(complaint))
                return
            except Exception as error:
                self.metrics.requests.labels("error").inc()
                logger.exception("a request failed inside the server")
                told = traceback.format_exc() if self.config.show_tracebacks else type(error).__name__
                await self._hang_up(connection, f"internal error, noted in the server's log: {told}")
                return
            if previous_s is not None:
                answer["server_timing"]["prev_total_ms"] = previous_s * 1000
            await self._send(connection, codec.pack(answer))
            connection.answered(message)
            previous_s = time.monotonic() - start
            self.metrics.requests.labels("ok").inc()
        await connection.close(1001, "server shutting down")

    async def _receive(self, connection: GuardedConnection) -> bytes | str:
        """Return the next message. Its first fragment may take forever; the rest has a time limit."""
        fragments: list[Any] = []
        async with asyncio.timeout(None) as limit:
            async for fragment in connection.recv_streaming():
                if not fragments:
                    limit.reschedule(asyncio.get_running_loop().time() + self.config.message_timeout_s)
                    fragments.append(fragment)
                elif fragment:
                    fragments.append(fragment)
        if len(fragments) == 1:
            return fragments[0]
        return type(fragments[0])().join(fragments)

    async def _answer(self, connection: GuardedConnection, message: bytes | str, limit: RateLimit) -> Data:
        config, owner = self.config, connection.owner
        if not limit.allows():
            raise RefusedError(f"rate limit: more than {config.max_requests_per_s:g} requests a second")
        if (total := self._admitted.total()) >= config.max_concurrent_requests and self._admitted[owner]:
            raise RefusedError(f"busy: {total} requests are being served, as many as allowed; try again later")
        self._admitted[owner] += 1
        start = time.monotonic()
        try:
            async with asyncio.timeout(config.request_timeout_s):
                request = await self._prepare_request(connection, message)
                answer = await self.batcher.infer(request, owner)
        except TimeoutError as error:
            raise RefusedError(f"timeout: no answer within {config.request_timeout_s:g} s; try again later") from error
        finally:
            self._admitted -= collections.Counter({owner: 1})  # and drops owners with none left
        seconds = time.monotonic() - start
        self.metrics.latency.observe(seconds)
        return answer | {"server_timing": {"infer_ms": seconds * 1000}}

    async def _prepare_request(self, connection: GuardedConnection, message: bytes | str) -> Request:
        if len(message) > SMALL_MESSAGE_BYTES:
            pool = self._large if len(message) > LARGE_MESSAGE_BYTES else self._small
            loop = asyncio.get_running_loop()
            request, seconds = await loop.run_in_executor(pool, self._prepared_aside, message)
            connection.worked_aside(seconds)
            return request
        with connection.work():
            return self._prepared(message)

    def _prepared_aside(self, message: bytes | str) -> tuple[Request, float]:
        """Return the request and the seconds of processor time that it took."""
        start = time.thread_time()
        return self._prepared(message), time.thread_time() - start

    def _prepared(self, message: bytes | str) -> Request:
        try:
            if isinstance(message, str):
                raise ValueError("expected a binary frame with an observation, got a text frame")
            observation = codec.unpack(message)
            if not isinstance(observation, dict):
                raise ValueError(f"an observation is a dictionary, got {type(observation).__name__}")
            check_size(observation, self.config.max_picture_pixels)
            return self.batcher.policy.prepare(observation)
        except ValueError as error:
            if self.config.show_tracebacks:
                raise InvalidRequestError(traceback.format_exc()) from error
            raise InvalidRequestError(f"invalid request: {str(error)[:MAX_COMPLAINT]}") from error

    async def _send(self, connection: GuardedConnection, message: bytes | str) -> None:
        """Send a message. Raise TimeoutError if the peer does not read it."""
        async with asyncio.timeout(self.config.message_timeout_s):
            await connection.send(message)

    async def _hang_up(self, connection: GuardedConnection, complaint: str) -> None:
        await self._send(connection, complaint)
        traced = "Traceback included in previous frame." if self.config.show_tracebacks else "Reason in previous frame."
        await connection.close(INTERNAL_ERROR, f"Internal server error. {traced}")


async def _all_closed(servers: Sequence[Any]) -> None:
    for server in servers:
        await server.wait_closed()
