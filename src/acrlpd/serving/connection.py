"""Connections that are limited to their fair share from the moment they are accepted.

A client that stays silent makes room for later ones (``Lobby``). One that has used much time of the event loop is read
again only after a rest (``Pace``). One that sends tiny frames or does not read is cut off (``GuardedConnection``).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ProtocolError
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import Event

from acrlpd.serving.limits import RateLimit, client_address

MAX_SILENT = 256  # connections that have not finished the opening handshake, including TLS
MAX_SILENT_PER_ADDRESS = 64
BACKLOG = 128  # connections that the system holds until they are accepted
CRUMB_BYTES = 1024  # a smaller frame is a crumb
MAX_CRUMBS, CRUMBS_PER_S = 64, 20.0  # max. crumbs at once or since the last answered message; sustained rate
MAX_UNREAD_BYTES = 2**20  # written for a peer that does not read them
DISCARD_S = 0.1  # pause between two packets of a peer that has broken the protocol and goes on sending
CLOSE_S = 1.0  # max. time to close a connection
FREE_S = 0.001  # time of the event loop that is free of charge: a usual message takes less
REST = 8.0  # seconds of rest per second beyond that: all resting clients together get 1/9 of the event loop
REST_ASIDE = 3.0  # the same per second in another thread: all resting clients together get 1/4 of a core
MAX_REST_S = 2.0
HANDSHAKE_S = 0.002  # delay of an address's next connections per request for one


class Visitor(socket.socket):
    """An accepted socket that is in the lobby until ``admit``."""

    lobby: Lobby
    address: str
    hang_up: Callable[[], None]  # called by others to end the connection

    def cut(self) -> None:
        """End the connection while it has no transport, or before TLS has begun."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:  # the peer has closed it already
            return

    def close(self) -> None:
        self.lobby.leave(self)
        super().close()


class Listener(socket.socket):
    """A listening socket whose visitors wait in a lobby; they are accepted one at a time."""

    lobby: Lobby

    @classmethod
    def of(cls, bound: socket.socket, lobby: Lobby) -> Listener:
        """Return the listener that takes over a bound socket."""
        listener = cls(bound.family, bound.type, bound.proto, bound.detach())
        listener.lobby = lobby
        return listener

    def listen(self, backlog: int = BACKLOG) -> None:
        """Listen with a large backlog, whatever is asked: asyncio blocks while it accepts ``backlog`` connections."""
        super().listen(BACKLOG)

    def accept(self) -> tuple[Visitor, Any]:
        accepted, peer = super().accept()
        visitor = Visitor(accepted.family, accepted.type, accepted.proto, accepted.detach())
        visitor.lobby, visitor.address, visitor.hang_up = self.lobby, client_address(peer), visitor.cut
        self.lobby.enter(visitor)
        return visitor, peer


class Lobby:
    """The connections whose handshake is not finished. If there are too many, the oldest of the busiest address closes.

    So silent connections keep nobody out: a client that makes its request at once is served.
    """

    def __init__(self, evicted: Callable[[], Any]):
        self._inside: dict[Visitor, None] = {}  # the oldest first
        self._evicted = evicted

    def __len__(self) -> int:
        return len(self._inside)

    def enter(self, visitor: Visitor) -> None:
        self._inside[visitor] = None
        counts = collections.Counter(each.address for each in self._inside)
        if counts[visitor.address] > MAX_SILENT_PER_ADDRESS:
            self._evict(visitor.address)
        elif len(self._inside) > MAX_SILENT:
            self._evict(counts.most_common(1)[0][0])

    def _evict(self, address: str) -> None:
        oldest = next(each for each in self._inside if each.address == address)
        self.leave(oldest)
        oldest.hang_up()
        self._evicted()

    def clear(self) -> None:
        """Close all of them, because the server stops."""
        for visitor in list(self._inside):
            visitor.hang_up()

    def meet(self, descriptor: int, hang_up: Callable[[], None]) -> Visitor | None:
        """Return the visitor with this file descriptor; from now on ``hang_up`` closes it, through its transport."""
        visitor = next((each for each in self._inside if each.fileno() == descriptor), None)
        if visitor is not None:
            visitor.hang_up = hang_up
        return visitor

    def leave(self, visitor: Visitor) -> None:
        self._inside.pop(visitor, None)


class Pace:
    """Rest periods: a client that used the event loop for a second is not read for eight, longer if others rest too.

    New connections wait until all others from their address have rested, so reconnecting does not help.
    """

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}
        self._doors: dict[str, float] = {}

    def charge(self, who: Hashable, address: str, seconds: float) -> float:
        """Add ``seconds`` of rest, times the number of resting clients; return how long ``who`` rests from now on."""
        now = time.monotonic()
        self._until = {each: until for each, until in self._until.items() if until > now}
        resting = len(self._until.keys() | {who})
        self._until[who] = until = min(now + MAX_REST_S, max(now, self._until.get(who, now)) + seconds * resting)
        self._doors[address] = max(until, self._doors.get(address, now))
        return until - now

    def left(self, who: Hashable) -> float:
        """Return the seconds for which ``who`` still rests."""
        return max(0.0, self._until.get(who, 0.0) - time.monotonic())

    def forget(self, who: Hashable) -> None:
        self._until.pop(who, None)

    def wait(self, address: str) -> float:
        """Return the seconds for which a new connection waits."""
        return max(0.0, self._doors.get(address, 0.0) - time.monotonic())

    def open(self, address: str) -> None:
        """Let the next new connections of this address wait slightly longer, since one has made a request."""
        now = time.monotonic()
        self._doors = {each: until for each, until in self._doors.items() if until > now}
        self._doors[address] = min(now + MAX_REST_S, self._doors.get(address, now) + HANDSHAKE_S)


class Hold:
    """The received bytes that are not answered yet, of all connections together.

    If there are too many, a connection that holds more than its share is closed when it sends more.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._bytes: collections.Counter[Hashable] = collections.Counter()

    def change(self, who: Hashable, by: int) -> bool:
        """Change the bytes of ``who`` and return whether it may hold so many."""
        self._bytes[who] = max(0, self._bytes[who] + by)
        return self._bytes.total() <= self._max_bytes or self._bytes[who] <= self._max_bytes / len(self._bytes)

    def forget(self, who: Hashable) -> None:
        self._bytes.pop(who, None)


class _Gate:
    """A transport that reads unless the queue of frames or a rest has paused it."""

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._reasons: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def pause_reading(self, reason: str = "queue") -> None:
        self._reasons.add(reason)
        self._transport.pause_reading()

    def resume_reading(self, reason: str = "queue") -> None:
        self._reasons.discard(reason)
        if not self._reasons:
            self._transport.resume_reading()


class GuardedConnection(ServerConnection):
    """A websocket connection under the limits of this module.

    Args:
        timeout_s: how long a peer may leave data unread, and how long it may take to send a frame.
        alone: returns whether nobody else is connected who could be disturbed.
    """

    def __init__(
        self,
        *arguments: Any,
        lobby: Lobby,
        pace: Pace,
        hold: Hold,
        timeout_s: float,
        alone: Callable[[], bool],
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        self.owner: Hashable = None  # the client whose requests take turns with others': a key or an address
        self.asked_at = time.monotonic()  # time of the last request; before the first, of the connection
        self._lobby, self._pace, self._hold = lobby, pace, hold
        self._timeout_s, self._alone = timeout_s, alone
        self._crumbs = RateLimit(CRUMBS_PER_S, burst=MAX_CRUMBS)
        self._closing = False
        self._busy_s = 0.0  # processor time spent on the current message
        self._unread: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._gate = gate = _Gate(cast(asyncio.Transport, transport))
        super().connection_made(cast(asyncio.Transport, gate))
        self.address = client_address(self.remote_address)
        self._visitor = self._lobby.meet(transport.get_extra_info("socket").fileno(), gate.abort)
        self._take_frame = self.protocol.recv_frame
        self.protocol.recv_frame = self._weigh  # type: ignore[method-assign]  # before the frame is kept
        self._rest(self._pace.wait(self.address))

    def ask(self) -> None:
        """Count an HTTP request, for a websocket or anything else."""
        self._pace.open(self.address)

    def admit(self) -> None:
        """Leave the lobby: the handshake is finished."""
        if self._visitor is not None:
            self._lobby.leave(self._visitor)
        self._hold.forget(self)

    def _weigh(self, frame: Frame) -> None:
        if len(frame.data) < CRUMB_BYTES and not self._crumbs.allows():
            raise ProtocolError(
                f"more than {MAX_CRUMBS} frames of less than {CRUMB_BYTES} bytes before an answer; send larger ones"
            )
        if self._late is not None:
            self._late.cancel()
            self._late = None
        size = len(frame.data)
        header = 6 + (0 if size < 126 else 2 if size < 2**16 else 8)  # of a masked frame
        self._hold.change(self, -header if frame.opcode in DATA_OPCODES else -header - size)
        self._take_frame(frame)

    def answered(self, message: bytes | str) -> None:
        """Forget the frames of a message that was answered."""
        self._crumbs.refill()
        self._busy_s = 0.0
        self._hold.change(self, -len(message))

    def data_received(self, data: bytes) -> None:
        may_hold = self._hold.change(self, len(data))
        with self.work():
            super().data_received(data)
        if self._late is None and self.protocol.reader.buffer:  # a frame has begun
            self._late = self.loop.call_later(self._timeout_s, self.transport.abort)
        if not may_hold or self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.transport.abort()
        elif self._ending is None and self.protocol.close_expected():
            self._ending = self.loop.call_later(CLOSE_S, self.transport.abort)
        if self.protocol.parser_exc is not None:  # it broke the protocol: discard what it still sends, slowly
            self._rest(DISCARD_S)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Count the processor time that a message takes in the event loop; too much of it leads to a rest."""
        start = time.thread_time()
        try:
            yield
        finally:
            before, self._busy_s = self._busy_s, self._busy_s + time.thread_time() - start
            if self._busy_s > FREE_S:
                self._owe(REST * (self._busy_s - max(before, FREE_S)))

    def worked_aside(self, seconds: float) -> None:
        """Count the time that a message took in another thread."""
        if seconds > FREE_S:
            self._owe(REST_ASIDE * (seconds - FREE_S))

    def _owe(self, seconds: float) -> None:
        if not (self._closing or self._alone()):
            self._rest(self._pace.charge(self, self.address, seconds))

    def _rest(self, seconds: float) -> None:
        if seconds > 0:
            self._gate.pause_reading("rest")
            self.loop.call_later(seconds, self._wake)

    def _wake(self) -> None:
        left = self._pace.left(self)
        if left > 0:
            self.loop.call_later(left, self._wake)
        else:
            self._gate.resume_reading("rest")

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close; from now on read only the peer's closing handshake, without a rest."""
        self._closing = True
        self._pace.forget(self)
        for held_up_by in ("rest", "queue"):
            self._gate.resume_reading(held_up_by)
        await super().close(code, reason)

    def process_event(self, event: Event) -> None:
        if not (self._closing and isinstance(event, Frame)):
            super().process_event(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._unread, self._late, self._ending):
            if timer is not None:
                timer.cancel()
        self._hold.forget(self)
        self._pace.forget(self)
        super().connection_lost(exc)
        del self.protocol.recv_frame  # breaks a reference cycle; below, the traceback makes another
        if self.protocol.parser_exc is not None:
            self.protocol.parser_exc.__traceback__ = None
