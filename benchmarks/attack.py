"""How much hostile clients slow the others down, what the server's memory does, and whether anyone stays locked out.

    python benchmarks/attack.py [--kinds silent fragments] [--seconds 3] [--rounds 3] [--attackers 8] [--json]

The checkpoint and server of ``benchmarks/serving.py`` (an untrained nano pi0) on 127.0.0.1, with the default limits and
no key. Two good clients ask again as soon as they have their answer. Each round measures them undisturbed and then
under the attack, so that whatever else the machine does weighs on both; attackers run in a process of their own, from
the address of the good clients unless ``--attacker_address`` names another one of this machine (127.0.0.2).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import multiprocessing
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
from serving import observation, write_checkpoint
from websockets.asyncio.client import connect

from acrlpd.serving import codec

HOST, CAMERAS, GOOD_CLIENTS = "127.0.0.1", ("camera_0",), 2
MAX_RATIO = 3.0
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n\r\n"
)
BINARY, PING, CONTINUED, LAST, MASKED = 0x02, 0x09, 0x00, 0x80, 0x80


# -- attackers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Attacker:
    """One of those who attack, with a thread of its own, until ``end``."""

    port: int
    address: str
    end: float

    def going_on(self) -> bool:
        return time.monotonic() < self.end

    def tcp(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=5, source_address=(self.address, 0))

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


def picture(height: int, width: int) -> bytes:
    """A request whose picture has this size."""
    pixels = np.zeros((height, width, 3), np.uint8)
    return frame(LAST | BINARY, codec.pack(observation(()) | {"image": {CAMERAS[0]: pixels}}))


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
        connection.sendall(ping)
        time.sleep(0.06)


def requests_unread(attacker: Attacker) -> None:
    """Sends sound requests as fast as the server takes them and reads no answer."""
    flood(attacker, frame(LAST | BINARY, codec.pack(observation(CAMERAS))))


def fragments(attacker: Attacker) -> None:
    """Sends one message in fragments of two bytes."""
    flood(attacker, frame(CONTINUED, b"xx") * 2000, first=frame(BINARY, b"xx"))


def large_pictures(attacker: Attacker) -> None:
    """Sends pictures of almost 16 MiB, which are refused."""
    flood(attacker, picture(2360, 2360))


def allowed_pictures(attacker: Attacker) -> None:
    """Sends the largest pictures that are allowed and waits for each answer."""
    ask(attacker, picture(1080, 1920))


def half_messages(attacker: Attacker) -> None:
    """Sends all of a message of 16 MiB but its end."""
    flood(attacker, frame(LAST | BINARY, bytes(16 * 2**20 - 2000))[:-1])


def many_requests(attacker: Attacker) -> None:
    """Sends sound requests, one after the other."""
    ask(attacker, frame(LAST | BINARY, codec.pack(observation(CAMERAS))))


def flood(attacker: Attacker, data: bytes, *, first: bytes = b"") -> None:
    """Sends again and again, without reading; whenever it is thrown out, it comes back."""
    while attacker.going_on():
        with contextlib.suppress(OSError), attacker.websocket() as connection:
            connection.sendall(first)
            while attacker.going_on():
                connection.settimeout(max(0.01, attacker.end - time.monotonic()))
                connection.sendall(data)


def ask(attacker: Attacker, message: bytes) -> None:
    with attacker.websocket() as connection:
        while attacker.going_on():
            connection.sendall(message)
            connection.recv(65536)


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


def attack(kind: str, port: int, address: str, attackers: int, seconds: float) -> None:
    """All attackers of a kind, each in a thread; one that the server no longer lets in tries again."""
    end = time.monotonic() + seconds

    def persist() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                KINDS[kind](Attacker(port, address, end))

    threads = [threading.Thread(target=persist, daemon=True) for _ in range(attackers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 10)


# -- good clients ------------------------------------------------------------------------------------------------------


async def latencies(port: int, seconds: float) -> list[float]:
    """Milliseconds of each answer to the good clients."""
    message = codec.pack(observation(CAMERAS))
    found: list[float] = []
    end = time.perf_counter() + seconds

    async def good() -> None:
        async with connect(f"ws://{HOST}:{port}", compression=None, max_size=None, open_timeout=30) as connection:
            await connection.recv()
            while (start := time.perf_counter()) < end:
                await connection.send(message)
                answer = await connection.recv()
                if isinstance(answer, str):
                    raise RuntimeError(f"a good client was told: {answer}")
                found.append((time.perf_counter() - start) * 1000)

    await asyncio.gather(*(good() for _ in range(GOOD_CLIENTS)))
    return found


async def new_client_ms(port: int) -> float:
    """Until a client that comes now has its first answer."""
    start = time.perf_counter()
    async with connect(f"ws://{HOST}:{port}", compression=None, max_size=None, open_timeout=60) as connection:
        await connection.recv()
        await connection.send(codec.pack(observation(CAMERAS)))
        answer = await connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"a new client was told: {answer}")
    return (time.perf_counter() - start) * 1000


# -- measuring ---------------------------------------------------------------------------------------------------------


class Memory(threading.Thread):
    """The largest resident memory of a process while this runs."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.most, self.done = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.most = max(self.most, resident_mb(self.pid))


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def served(folder: str) -> Iterator[tuple[int, int]]:
    """Process and port of ``acrlpd serve`` with its defaults."""
    flags = ["--checkpoint", folder, "--port", "0", "--num_samples", "1"]
    command = [sys.executable, "-m", "acrlpd.cli.main", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait(60)


def measure(kind: str, pid: int, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    quiet: list[float] = []
    attacked: list[float] = []
    ratios, came_in = [], []
    before, memory = resident_mb(pid), Memory(pid)
    memory.start()
    for _ in range(arguments.rounds):
        alone = asyncio.run(latencies(port, arguments.seconds))
        started = (kind, port, arguments.attacker_address, arguments.attackers, arguments.seconds + 1.5)
        attackers = multiprocessing.get_context("spawn").Process(target=attack, args=started, daemon=True)
        attackers.start()
        time.sleep(1.0)  # the attack is in full swing
        beside = asyncio.run(latencies(port, arguments.seconds))
        attackers.join(60)
        came_in.append(asyncio.run(new_client_ms(port)))
        ratios.append(statistics.median(beside) / statistics.median(alone))
        quiet += alone
        attacked += beside
    memory.done.set()
    memory.join()
    return {
        "kind": kind,
        "undisturbed_ms": quantiles(quiet),
        "attacked_ms": quantiles(attacked),
        "ratio": statistics.median(attacked) / statistics.median(quiet),
        "ratio_by_round": machine.spread(ratios),
        "memory_before_mb": before,
        "memory_most_mb": memory.most,
        "new_client_after_ms": machine.spread(came_in),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    p25, p50, p75, p99 = np.percentile(values, [25, 50, 75, 99])
    return {"median": float(p50), "p25": float(p25), "p75": float(p75), "p99": float(p99), "answers": len(values)}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['command']}   load {result['load_average']} before, {result['load_after']} after",
        f"{'attack':<18}{'undisturbed':>13}{'attacked':>10}{'p25 to p75':>16}{'ratio':>7}{'rounds':>14}"
        f"{'memory':>16}{'new client after':>18}",
    ]
    for row in result["rows"]:
        quiet, attacked, by_round = row["undisturbed_ms"], row["attacked_ms"], row["ratio_by_round"]
        lines.append(
            f"{row['kind']:<18}{quiet['median']:>10.1f} ms{attacked['median']:>7.1f} ms"
            f"{attacked['p25']:>7.1f} to{attacked['p75']:>6.1f}{row['ratio']:>7.1f}"
            f"{by_round['min']:>7.1f} to{by_round['max']:>4.1f}"
            f"{row['memory_before_mb']:>6.0f} to{row['memory_most_mb']:>5.0f} MB"
            f"{row['new_client_after_ms']['max']:>15.0f} ms"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--attacker_address", default=HOST)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about, rows = machine.describe(), []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), CAMERAS)
        with served(folder) as (pid, port):
            asyncio.run(latencies(port, 1.0))
            rows = [measure(kind, pid, port, arguments) for kind in arguments.kinds]
    result = {**about, "load_after": machine.describe()["load_average"], "max_ratio": MAX_RATIO, "rows": rows}
    machine.show(result, as_json=arguments.json, table=table(result))
    return int(any(row["ratio"] > MAX_RATIO for row in rows))


if __name__ == "__main__":
    sys.exit(main())
