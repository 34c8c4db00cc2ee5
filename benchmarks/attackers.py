"""The hostile clients of ``attack.py``, in a process of their own that imports nothing large.

    python benchmarks/attackers.py KIND PORT ADDRESS NUMBER SECONDS < MESSAGE

MESSAGE is a request that some kinds send. Prints a line when the attack begins, and at its end how many connections
were opened and how many megabytes sent.
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
    """What all attackers do until ``end``, each in a thread of its own."""

    port: int
    address: str
    end: float
    message: bytes
    connections: int = 0  # how many all attackers have opened
    megabytes: float = 0.0  # what they have sent

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
        """After the handshake and the metadata."""
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
    """A masked frame; the mask is zero, which costs its sender nothing."""
    size = len(payload)
    if size < 126:
        length = struct.pack("!B", MASKED | size)
    elif size < 2**16:
        length = struct.pack("!BH", MASKED | 126, size)
    else:
        length = struct.pack("!BQ", MASKED | 127, size)
    return bytes([opcode]) + length + bytes(4) + payload


def silent(attacker: Attacker) -> None:
    """Connects and says nothing, as often as it gets a connection."""
    held: list[socket.socket] = []
    while attacker.going_on():
        held.append(attacker.tcp())
        held = held[-100:]
        time.sleep(0.002)


def half_requests(attacker: Attacker) -> None:
    """Sends half of a request for a websocket, and then a byte now and then."""
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
    """Finishes the handshake, leaves, and comes back."""
    while attacker.going_on():
        attacker.websocket().close()


def pings_unread(attacker: Attacker) -> None:
    """Pings as fast as the server takes it and reads nothing."""
    flood(attacker, frame(LAST | PING, b"x" * 125) * 500)


def slow_pings_unread(attacker: Attacker) -> None:
    """Pings as often as is allowed and reads nothing."""
    connection, ping = attacker.websocket(), frame(LAST | PING, b"x" * 125)
    while attacker.going_on():
        attacker.send(connection, ping)
        time.sleep(0.06)


def requests_unread(attacker: Attacker) -> None:
    """Sends sound requests as fast as the server takes them and reads no answer."""
    flood(attacker, frame(LAST | BINARY, attacker.message))


def fragments(attacker: Attacker) -> None:
    """Sends one message in fragments of two bytes."""
    flood(attacker, frame(CONTINUED, b"xx") * 2000, first=frame(BINARY, b"xx"))


def large_pictures(attacker: Attacker) -> None:
    """Sends pictures of almost 16 MiB, which are refused."""
    flood(attacker, frame(LAST | BINARY, attacker.message))


def allowed_pictures(attacker: Attacker) -> None:
    """Sends the largest pictures that are allowed and waits for each answer."""
    ask(attacker, frame(LAST | BINARY, attacker.message))


def half_messages(attacker: Attacker) -> None:
    """Sends all of a message of 16 MiB but its end."""
    flood(attacker, frame(LAST | BINARY, bytes(16 * 2**20 - 2000))[:-1])


def many_requests(attacker: Attacker) -> None:
    """Sends sound requests, one after the other."""
    ask(attacker, frame(LAST | BINARY, attacker.message))


def flood(attacker: Attacker, data: bytes, *, first: bytes = b"") -> None:
    """Sends again and again, without reading; whenever it is thrown out, it comes back."""
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
    """Run the attackers of a kind; one that the server no longer lets in tries again."""

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
