"""The hostile clients of ``attack.py``, in a separate process that imports nothing large.

    python benchmarks/attackers.py KIND PORT ADDRESS NUMBER SECONDS < MESSAGE

MESSAGE is a request that some kinds send. The script prints a line when the attack begins, and at its end how many
connections were opened and how many megabytes sent.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

HOST = "127.0.0.1"
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n\r\n"
)
BINARY, PING, CONTINUED, LAST, MASKED = 0x02, 0x09, 0x00, 0x80, 0x80


@dataclasses.dataclass
class Attacker:
    """The shared state of all attackers, each of which runs in its own thread until ``end``."""

    port: int
    address: str
    end: float
    message: bytes
    connections: int = 0  # opened by all attackers
    megabytes: float = 0.0  # sent by all attackers

    def going_on(self) -> bool:
        return time.monotonic() < self.end

    def tcp(self) -> socket.socket:
        connection = socket.create_connection((HOST, self.port), timeout=5, source_address=(self.address, 0))
        self.connections += 1
        return connection

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        self.megabytes += len(data) / 1e6

    def websocket(self) -> socket.socket:
        """Return a connection after the handshake and the metadata."""
        connection = self.tcp()
        connection.sendall(HANDSHAKE)
        received = b""
        while b"acrlpd" not in received:
            more = connection.recv(4096)
            if not more:
                raise ConnectionError("refused")
            received += more
        return connection


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a masked frame; the mask is zero, which costs its sender nothing."""
    size = len(payload)
    if size < 126:
        length = struct.pack("!B", MASKED | size)
    elif size < 2**16:
        length = struct.pack("!BH", MASKED | 126, size)
    else:
        length = struct.pack("!BQ", MASKED | 127, size)
    return bytes([opcode]) + length + bytes(4) + payload


def silent(attacker: Attacker) -> None:
    """Connect and send nothing, as often as possible."""
    held: list[socket.socket] = []
    while attacker.going_on():
        held.append(attacker.tcp())
        held = held[-100:]
        time.sleep(0.002)


def half_requests(attacker: Attacker) -> None:
    """Send half of a websocket request, and then single bytes from time to time."""
    held: list[socket.socket] = []
    while attacker.going_on():
        held.append(attacker.tcp())
        held[-1].sendall(HANDSHAKE[:60])
        held = held[-100:]
        for each in held[:-1]:
            with contextlib.suppress(OSError):
                each.send(b"x")
        time.sleep(0.02)


def reconnects(attacker: Attacker) -> None:
    """Finish the handshake, disconnect, and reconnect."""
    while attacker.going_on():
        attacker.websocket().close()


def pings_unread(attacker: Attacker) -> None:
    """Send pings as fast as the server takes them, and read nothing."""
    flood(attacker, frame(LAST | PING, b"x" * 125) * 500)


def slow_pings_unread(attacker: Attacker) -> None:
    """Send pings as often as is allowed, and read nothing."""
    connection, ping = attacker.websocket(), frame(LAST | PING, b"x" * 125)
    while attacker.going_on():
        attacker.send(connection, ping)
        time.sleep(0.06)


def requests_unread(attacker: Attacker) -> None:
    """Send valid requests as fast as the server takes them, and read no answer."""
    flood(attacker, frame(LAST | BINARY, attacker.message))


def fragments(attacker: Attacker) -> None:
    """Send one message in fragments of two bytes."""
    flood(attacker, frame(CONTINUED, b"xx") * 2000, first=frame(BINARY, b"xx"))


def large_pictures(attacker: Attacker) -> None:
    """Send pictures of almost 16 MiB, which are refused."""
    flood(attacker, frame(LAST | BINARY, attacker.message))


def allowed_pictures(attacker: Attacker) -> None:
    """Send the largest allowed pictures and wait for each answer."""
    ask(attacker, frame(LAST | BINARY, attacker.message))


def half_messages(attacker: Attacker) -> None:
    """Send a message of 16 MiB without its end."""
    flood(attacker, frame(LAST | BINARY, bytes(16 * 2**20 - 2000))[:-1])


def many_requests(attacker: Attacker) -> None:
    """Send valid requests, one after the other."""
    ask(attacker, frame(LAST | BINARY, attacker.message))


def flood(attacker: Attacker, data: bytes, *, first: bytes = b"") -> None:
    """Send again and again without reading; reconnect whenever the server closes the connection."""
    while attacker.going_on():
        with contextlib.suppress(OSError), attacker.websocket() as connection:
            attacker.send(connection, first)
            while attacker.going_on():
                connection.settimeout(max(0.01, attacker.end - time.monotonic()))
                attacker.send(connection, data)


def ask(attacker: Attacker, message: bytes) -> None:
    with attacker.websocket() as connection:
        while attacker.going_on():
            attacker.send(connection, message)
            if not connection.recv(65536):
                return


KINDS: dict[str, Callable[[Attacker], None]] = {
    each.__name__: each
    for each in (
        silent,
        half_requests,
        reconnects,
        pings_unread,
        slow_pings_unread,
        requests_unread,
        fragments,
        large_pictures,
        allowed_pictures,
        half_messages,
        many_requests,
    )
}


def attack(kind: str, attacker: Attacker, number: int) -> None:
    """Run the attackers of a kind; one that the server refuses tries again."""

    def persist() -> None:
        while attacker.going_on():
            with contextlib.suppress(OSError):
                KINDS[kind](attacker)

    threads = [threading.Thread(target=persist, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10 + attacker.end - time.monotonic())


def main() -> None:
    kind, port, address, number, seconds = sys.argv[1:]
    message = sys.stdin.buffer.read()
    attacker = Attacker(int(port), address, time.monotonic() + float(seconds), message)
    print("begins", flush=True)
    attack(kind, attacker, int(number))
    print(json.dumps({"connections": attacker.connections, "megabytes": round(attacker.megabytes, 1)}))


if __name__ == "__main__":
    main()
