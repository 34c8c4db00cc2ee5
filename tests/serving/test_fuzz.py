"""Hostile clients, many of them, against a server in a process of its own that goes on serving good ones."""

import asyncio
import random
import socket
import sys
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from acrlpd.serving import codec
from acrlpd.serving.request import OPTIONS_KEY

sys.path.insert(0, str(Path(__file__).parent))
from conftest import OBS, Client, Running, spawned

NUM_MESSAGES = 10_000
NUM_ATTACKERS = 8
MAX_BYTES = 2**20
MAX_GROWTH_BYTES = 300 * 2**20

SEEDS = [
    codec.pack(OBS),
    codec.pack(OBS | {OPTIONS_KEY: {"seed": 3, "statistics": True}}),
    codec.pack({"state": np.zeros(3), "image": {"base": np.zeros((8, 8, 3), np.uint8)}, "prompt": "pick up"}),
    codec.pack({"state": [0.0, np.float32(1), 2], "prompt": np.array(["a", "b"])}),
]
WRONG = [
    b"",
    b"\xc1",
    b"\x91" * 100_000,  # lists in lists
    b"\x81\xa1a" * 100_000,  # dictionaries in dictionaries
    b"\xdd\xff\xff\xff\xff",  # a list of 2**32 entries, none of which comes
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff" + bytes(100),  # 4 GB of bytes
    b"\xdc\xff\xff" + b"\x80" * 65_535,  # many dictionaries
    b"\x92" + b"\xdd\x00\x00\x27\x10" * 400,  # lists of 10000 in each other
    b"\xc7\x08\x05" + bytes(8),  # an extension type
    codec.pack({"state": "a" * 60_000}),
    codec.pack({"state": np.zeros(3, np.float32), "prompt": "a" * 60_000}),
    codec.pack({"state": np.zeros(3, complex).view(np.float64)}),
    codec.pack({"state": np.array(["x", "y", "z"])}),
    codec.pack({"state": np.zeros((1000, 3), np.float32)}),
    codec.pack({"state": np.array([np.inf, 0, 0], np.float32)}),
    codec.pack({"image": {str(k): np.zeros((1, 1, 3), np.uint8) for k in range(2000)}, "state": np.zeros(3)}),
    codec.pack({"image": {"a": np.zeros((300_000, 1, 3), np.uint8)}, "state": np.zeros(3)}),
    codec.pack({OPTIONS_KEY: {"seed": 2**40}}),
    codec.pack({OPTIONS_KEY: [1]}),
    *[
        msgpack.packb({"state": {b"__ndarray__": True, b"data": bytes(12), b"dtype": dtype, b"shape": shape}})
        for dtype in ("|O8", "<f4", "|V4", "<c8", "f4,f4", "<M8[s]", "<U1", "")
        for shape in ([3], [-1], [2**62, 2**62], [0, 2**40], [3.5])
    ],
]


def mutated(rng: random.Random) -> bytes | str:
    """A message that is sound but for a few bytes, or not sound at all."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(WRONG)
    if kind == 1:
        return rng.randbytes(rng.randrange(200))
    message = bytearray(rng.choice(SEEDS))
    if kind == 2:
        return bytes(message[: rng.randrange(len(message))])
    if kind == 3:
        return bytes(message + rng.randbytes(rng.randrange(1, 20)))
    if kind == 4:
        start, end = sorted(rng.randrange(len(message)) for _ in range(2))
        return bytes(message[:end] + message[start:])
    if kind == 5:
        return message.decode("latin-1")
    for _ in range(rng.randrange(1, 6)):
        message[rng.randrange(len(message))] = rng.randrange(256)
    return bytes(message)


async def attack(port: int, rng: random.Random, count: int) -> int:
    """Sends mutated messages, and reconnects as often as it is thrown out; returns how many were answered."""
    answered = sent = 0
    while sent < count:
        async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, open_timeout=60) as client:
            try:
                await client.recv()
                while sent < count:
                    sent += 1
                    await client.send(mutated(rng))
                    await asyncio.wait_for(client.recv(), 60)
                    answered += 1
            except ConnectionClosed:
                pass
    return answered


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class GoodClient(threading.Thread):
    """Asks again and again, and notes how long each answer took."""

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self.client = Client(Running(None, port, None, None).connect())
        self.seconds: list[float] = []
        self.failure: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            while not self.done.is_set():
                start = time.monotonic()
                assert self.client.infer(OBS)["actions"].shape == (5, 2)
                self.seconds.append(time.monotonic() - start)
                self.done.wait(0.02)
        except Exception as error:  # noqa: BLE001  # the test raises it
            self.failure = error


FLAGS = ("--port", "0", "--message_timeout_s", "2", "--ping_interval_s", "1", "--max_message_bytes", str(MAX_BYTES))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_hostile_clients_neither_stop_nor_bloat_the_server(run):
    with spawned(run, *FLAGS) as (process, port):
        good = GoodClient(port)
        good.start()

        async def all_attackers(count: int, seed: int) -> int:
            each = (attack(port, random.Random(seed + k), count // NUM_ATTACKERS) for k in range(NUM_ATTACKERS))
            return sum(await asyncio.gather(*each))

        asyncio.run(all_attackers(800, seed=100))  # everything that is allocated once is now there
        before = resident_bytes(process.pid)
        assert asyncio.run(all_attackers(NUM_MESSAGES, seed=0)) > NUM_MESSAGES / 2
        raw_attacks(port)
        assert process.poll() is None
        assert resident_bytes(process.pid) - before < MAX_GROWTH_BYTES
        good.done.set()
        good.join(60)
        assert good.failure is None
        assert len(good.seconds) > 100
        assert max(good.seconds) < 5


def raw_attacks(port: int) -> None:
    """What needs no websocket library: silence, half a request, half a frame, a frame of 2**40 bytes, fragments."""
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for index, each in enumerate(silent):
        each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n"[: index % 20])
    opened = [upgraded(port) for _ in range(4)]
    stalled, oversized, unmasked, dripping = opened
    stalled.sendall(b"\x82\xfe\xff\xff" + bytes(100))
    oversized.sendall(b"\x82\xff" + (2**40).to_bytes(8, "big") + bytes(4))
    unmasked.sendall(b"\x82\x05hello")
    dripping.sendall(b"\x02\x81" + bytes(5))
    for _ in range(1000):
        dripping.sendall(b"\x00\x80" + bytes(4))
    for each in (*opened, *silent):
        each.settimeout(30)
        received = b"x"
        while received:  # until the server hangs up, which it must
            try:
                received = each.recv(65536)
            except ConnectionError:
                break
        each.close()


def upgraded(port: int) -> socket.socket:
    """A connection after the opening handshake and the metadata."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    received = b""
    while b"action_horizon" not in received:
        received += connection.recv(4096)
    return connection
