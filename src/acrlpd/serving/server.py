"""openpi's websocket protocol around a policy, fit to be left running.

On connect the server sends the policy's metadata; then each binary frame is an observation and each answer its actions
with ``server_timing`` (``codec.py`` has the encoding). What goes wrong is told in a TEXT frame, which openpi's clients
raise as an error. After a refusal (``busy``, ``rate limit``, ``timeout``) the connection stays open; after a request
that makes no sense, or a fault of the server, it is closed with code 1011, as openpi does.

The event loop never waits for computation: messages with pictures are decoded and transformed in a small thread pool
(a state and a prompt on the spot, in about a tenth of a millisecond), and the model runs in a thread of its own, many
requests in one call (``batching.py``).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hmac
import http
import logging
import signal
import ssl
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acrlpd.data.transforms import Data
from acrlpd.serving import codec
from acrlpd.serving.batching import Batcher
from acrlpd.serving.limits import RateLimit, check_size, is_loopback
from acrlpd.serving.metrics import ServerMetrics
from acrlpd.serving.policy import Policy
from acrlpd.serving.request import Request

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request as HTTPRequest
    from websockets.http11 import Response

logger = logging.getLogger(__name__)

MAX_HANDSHAKES = 64  # connections that have not said yet what they want
SMALL_MESSAGE_BYTES = 4096  # a state and a prompt: handing them to a thread takes longer than preparing them
MAX_COMPLAINT = 1000  # characters of a TEXT frame
INTERNAL_ERROR = 1011


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Address and limits. The defaults serve one machine's own robots."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    max_batch_size: int = 8  # requests in one call of the policy
    batch_wait_s: float = 0.002  # how long a request waits for others to join it, where other clients are connected
    max_concurrent_requests: int = 64  # decoded, waiting and running; more are refused
    request_timeout_s: float = 30.0
    max_requests_per_s: float | None = None  # of one connection; None: no limit
    max_connections: int = 64
    max_connections_per_address: int = 64
    max_message_bytes: int = 16 * 1024**2
    message_timeout_s: float = 10.0  # for a whole message to arrive once it has begun, and for an answer to be taken
    ping_interval_s: float = 20.0  # a peer that answers no ping for as long again is gone
    allow_anonymous: bool = False  # serve an address that others can reach without a key
    tls_cert: str | None = None  # a PEM file, as its key
    tls_key: str | None = None
    reload_interval_s: float | None = None  # look for a newer checkpoint this often; None: never
    drain_timeout_s: float = 30.0  # for the requests under way when the server is told to stop
    show_tracebacks: bool = False  # send them to clients, as openpi does

    def __post_init__(self):
        for name in ("max_batch_size", "max_concurrent_requests", "max_connections", "max_message_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("request_timeout_s", "message_timeout_s", "ping_interval_s", "drain_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_requests_per_s", "reload_interval_s"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive or absent, got {value}")
        if self.batch_wait_s < 0:
            raise ValueError(f"batch_wait_s must not be negative, got {self.batch_wait_s}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key")


class RefusedError(Exception):
    """A sound request that is not served now; the text tells its sender why."""


class InvalidRequestError(Exception):
    """A message that makes no sense; the text tells its sender why."""


class PolicyServer:
    """Serves ``policy`` while its ``serving`` context is open, or until SIGTERM or SIGINT under ``run``.

    Args:
        api_keys: any of them opens the door; none leaves it open, which only loopback addresses may.
        refresh: called every ``reload_interval_s`` in a thread; a newer policy, or None. Requests under way are
            answered by the old one.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServerConfig,
        *,
        api_keys: Sequence[str] = (),
        refresh: Callable[[], Policy | None] | None = None,
    ):
        if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in api_keys):
            raise ValueError("an API key must be printable ASCII without spaces around it, and not empty")
        if not (api_keys or config.allow_anonymous or is_loopback(config.host)):
            raise ValueError(
                f"others can reach {config.host}, and without an API key anyone may move the robot. Give a key, bind "
                "to 127.0.0.1, or set allow_anonymous if the network itself is guarded."
            )
        self.config = config
        self._headers = [f"Api-Key {key}".encode() for key in api_keys]
        self.metrics = ServerMetrics()
        self._refresh = refresh
        self._ready = asyncio.Event()
        self._draining = False
        self._connections: set[ServerConnection] = set()
        self._idle: set[ServerConnection] = set()
        self._per_address: collections.Counter[str] = collections.Counter()
        self._admitted = 0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self.batcher = Batcher(
            policy,
            max_batch_size=min(config.max_batch_size, config.max_concurrent_requests),
            batch_wait_s=config.batch_wait_s,
            expected=lambda: len(self._connections),
            on_batch=self.metrics.count_batch,
        )
        self.metrics.watch(self.batcher)

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self, *, on_ready: Callable[[int], Any] = lambda port: None) -> None:
        """Until SIGTERM or SIGINT; ``on_ready`` is told the port once everything is compiled."""
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
        """Listens, compiles, serves; gives the port. At the end, requests under way are answered first."""
        from websockets.asyncio.server import ServerConnection, serve

        class Limited(ServerConnection):
            """Cuts off whoever opens connections without end and says nothing."""

            def connection_made(this, transport: asyncio.BaseTransport) -> None:  # noqa: N805
                super().connection_made(transport)
                if len(this.server.all_connections) > self.config.max_connections + MAX_HANDSHAKES:
                    this.transport.abort()

        config = self.config
        quiet = logging.getLogger("acrlpd.serving.websockets")
        quiet.setLevel(logging.CRITICAL)  # a scan of the port would fill the log with one traceback a connection
        async with (
            self.batcher.running(),
            serve(
                self._handle,
                config.host,
                config.port,
                ssl=_ssl_context(config),
                process_request=self._process_request,
                compression=None,
                server_header=None,
                max_size=config.max_message_bytes,
                max_queue=2,
                open_timeout=config.message_timeout_s,
                ping_interval=config.ping_interval_s,
                ping_timeout=config.ping_interval_s,
                close_timeout=1.0,
                create_connection=Limited,
                logger=quiet,
            ) as server,
        ):
            port = server.sockets[0].getsockname()[1]
            logger.info("listening on %s:%d, compiling", config.host, port)
            tasks = [asyncio.create_task(self._prepare())]
            try:
                yield port
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._drain(server)
        self._pool.shutdown(wait=False)

    async def wait_ready(self) -> None:
        await self._ready.wait()

    async def _prepare(self) -> None:
        """Compiles, says so, and from then on looks for newer checkpoints."""
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
            logger.exception("a newer checkpoint could not be loaded; the old one is served on")
            return
        self.batcher.policy = policy
        self.metrics.reloads.labels("ok").inc()
        self._count_step()
        logger.info("serving %s now", policy.metadata.get("acrlpd", policy.metadata))

    def _count_step(self) -> None:
        about = self.batcher.policy.metadata.get("acrlpd", {})
        self.metrics.step.set(about.get("step", 0))

    async def _drain(self, server: Any) -> None:
        """No new connections; idle ones are closed; the others after their answer."""
        self._draining = True
        self._ready.set()  # whoever waits for it finds the server draining
        server.close(close_connections=False)
        await asyncio.gather(*(connection.close(1001, "server shutting down") for connection in list(self._idle)))
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await server.wait_closed()
        except TimeoutError:
            logger.warning("%d connections cut off after %g s", len(self._connections), self.config.drain_timeout_s)
            for connection in list(self._connections):
                connection.transport.abort()
            await server.wait_closed()

    # -- the door ------------------------------------------------------------------------------------------------

    def _process_request(self, connection: ServerConnection, request: HTTPRequest) -> Response | None:
        """HTTP: health for everyone; metrics and the websocket for those who have the key and find a place."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            if self._ready.is_set() and not self._draining:
                return connection.respond(http.HTTPStatus.OK, "OK\n")
            reason = "draining" if self._draining else "compiling"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n")
        if not self._knows_key(request.headers.get_all("Authorization")):
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
        if self._per_address[_address(connection)] >= self.config.max_connections_per_address:
            return self._reject(connection, http.HTTPStatus.TOO_MANY_REQUESTS, "max_connections_per_address")
        return None

    def _reject(self, connection: ServerConnection, status: http.HTTPStatus, reason: str) -> Response:
        self.metrics.rejected.labels(reason).inc()
        response = connection.respond(status, f"refused: {reason}; try again later\n")
        response.headers["Retry-After"] = "5"
        return response

    def _knows_key(self, authorization: list[str]) -> bool:
        """Whether the header carries one of the keys; how long this takes does not tell how much of one was right."""
        if not self._headers:
            return True
        given = authorization[0] if len(authorization) == 1 else ""
        given_bytes = given.encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(header, given_bytes) for header in self._headers]
        return any(matches)

    # -- conversation --------------------------------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        address = _address(connection)
        self._connections.add(connection)
        self._per_address[address] += 1
        self.metrics.connections.set(len(self._connections))
        try:
            await self._ready.wait()
            await self._send(connection, codec.pack(self.batcher.policy.metadata))
            await self._converse(connection)
        except (ConnectionClosed, TimeoutError):
            pass  # they have gone, or take no answer: nobody is left to tell
        finally:
            self._connections.discard(connection)
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]
            self.metrics.connections.set(len(self._connections))

    async def _converse(self, connection: ServerConnection) -> None:
        """Message, answer, message, answer, until one side ends it."""
        limit = RateLimit(self.config.max_requests_per_s)
        previous_s: float | None = None
        while not self._draining:
            start = time.monotonic()
            self._idle.add(connection)
            try:
                message = await self._receive(connection)
            finally:
                self._idle.discard(connection)
            try:
                answer = await self._answer(message, limit)
            except RefusedError as refusal:
                self.metrics.requests.labels("refused").inc()
                await self._send(connection, str(refusal))
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
            previous_s = time.monotonic() - start
            self.metrics.requests.labels("ok").inc()
        await connection.close(1001, "server shutting down")

    async def _receive(self, connection: ServerConnection) -> bytes | str:
        """The next message. Its first fragment may take for ever, the rest may not."""
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

    async def _answer(self, message: bytes | str, limit: RateLimit) -> Data:
        config = self.config
        if not limit.allows():
            raise RefusedError(f"rate limit: more than {config.max_requests_per_s:g} requests a second")
        if self._admitted >= config.max_concurrent_requests:
            raise RefusedError(f"busy: {self._admitted} requests are being served, as many as allowed; try again later")
        self._admitted += 1
        start = time.monotonic()
        try:
            async with asyncio.timeout(config.request_timeout_s):
                if len(message) <= SMALL_MESSAGE_BYTES:
                    request = self._prepared(message)
                else:
                    request = await asyncio.get_running_loop().run_in_executor(self._pool, self._prepared, message)
                answer = await self.batcher.infer(request)
        except TimeoutError as error:
            raise RefusedError(f"timeout: no answer within {config.request_timeout_s:g} s; try again later") from error
        finally:
            self._admitted -= 1
        seconds = time.monotonic() - start
        self.metrics.latency.observe(seconds)
        return answer | {"server_timing": {"infer_ms": seconds * 1000}}

    def _prepared(self, message: bytes | str) -> Request:
        try:
            if isinstance(message, str):
                raise ValueError("expected a binary frame with an observation, got a text frame")
            observation = codec.unpack(message)
            if not isinstance(observation, dict):
                raise ValueError(f"an observation is a dictionary, got {type(observation).__name__}")
            check_size(observation)
            return self.batcher.policy.prepare(observation)
        except ValueError as error:
            if self.config.show_tracebacks:
                raise InvalidRequestError(traceback.format_exc()) from error
            raise InvalidRequestError(f"invalid request: {str(error)[:MAX_COMPLAINT]}") from error

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        """Raises TimeoutError if the peer does not read."""
        async with asyncio.timeout(self.config.message_timeout_s):
            await connection.send(message)

    async def _hang_up(self, connection: ServerConnection, complaint: str) -> None:
        await self._send(connection, complaint)
        traced = "Traceback included in previous frame." if self.config.show_tracebacks else "Reason in previous frame."
        await connection.close(INTERNAL_ERROR, f"Internal server error. {traced}")


def _address(connection: ServerConnection) -> str:
    peer = connection.remote_address
    return str(peer[0]) if peer else "gone"


def _ssl_context(config: ServerConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    for path in (config.tls_cert, config.tls_key):
        if not Path(path).is_file():
            raise ValueError(f"TLS: no file {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(config.tls_cert, config.tls_key)
    return context
