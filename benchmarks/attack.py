"""Measure how much hostile clients slow others down, the server's memory, and whether anyone stays locked out.

    python benchmarks/attack.py [--kinds silent fragments] [--seconds 3] [--rounds 3] [--attackers 8] [--json]

The checkpoint and server are those of ``benchmarks/serving.py`` (an untrained nano pi0) on 127.0.0.1, with the default
limits and no key. Two good clients send the next request as soon as they have an answer. Each round measures them
undisturbed and then under the attack, so that other load of the machine affects both. Attackers run in a separate
process. They use the good clients' address, so that only limits per connection help; except for ``many_requests``,
whose requests are valid, because clients are distinguished by address. ``--attacker_address`` sets one for all kinds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
from attackers import HOST, KINDS
from serving import observation, write_checkpoint
from websockets.asyncio.client import connect

from acrlpd.serving import codec

CAMERAS, GOOD_CLIENTS = ("camera_0",), 2
MAX_RATIO = 3.0
OTHER_HOST = "127.0.0.2"  # this machine too
PICTURES = {"large_pictures": (2360, 2360), "allowed_pictures": (1080, 1920)}  # other kinds: 64 x 64


# -- good clients ------------------------------------------------------------------------------------------------------


async def latencies(port: int, seconds: float) -> list[float]:
    """Return the milliseconds of each answer to the good clients."""
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
    """Return the milliseconds until a client that connects now has its first answer."""
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
    """A thread that records the maximal resident memory of a process while it runs."""

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
    """Run ``acrlpd serve`` with its defaults; yield its process id and port."""
    flags = ["--checkpoint", folder, "--port", "0", "--num_samples", "1"]
    command = [sys.executable, "-m", "acrlpd.cli.main", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def attack(kind: str, port: int, arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Attack while this is open; at its end, the yielded dictionary holds what the attackers have sent."""
    script = Path(__file__).with_name("attackers.py")
    address = arguments.attacker_address or (OTHER_HOST if kind == "many_requests" else HOST)
    words = (kind, port, address, arguments.attackers, arguments.seconds + 1.5)
    command = [sys.executable, str(script), *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    side = PICTURES.get(kind, (64, 64))
    picture = {"image": {CAMERAS[0]: np.zeros((*side, 3), np.uint8)}}
    process.stdin.write(codec.pack(observation(()) | picture))
    process.stdin.close()
    assert process.stdout.readline() == b"begins\n"
    time.sleep(0.5)  # until the attack is in full swing
    counted: dict[str, float] = {}
    yield counted
    counted |= json.loads(process.stdout.readline())
    process.wait(60)


def measure(kind: str, pid: int, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    quiet: list[float] = []
    attacked: list[float] = []
    ratios, came_in = [], []
    done: list[dict[str, float]] = []
    before, memory = resident_mb(pid), Memory(pid)
    memory.start()
    for _ in range(arguments.rounds):
        alone = asyncio.run(latencies(port, arguments.seconds))
        with attack(kind, port, arguments) as counted:
            beside = asyncio.run(latencies(port, arguments.seconds))
        done.append(counted)
        came_in.append(asyncio.run(new_client_ms(port)))
        ratios.append(statistics.median(beside) / statistics.median(alone))
        quiet += alone
        attacked += beside
    memory.done.set()
    memory.join()
    return {
        "kind": kind,
        "attackers_connections": sum(each["connections"] for each in done),
        "attackers_megabytes": sum(each["megabytes"] for each in done),
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
        f"{result['command']}   {result['cpu_count']} cores",
        f"load {result['load_average']} before, {result['load_after']} after",
        f"{'attack':<18}{'undisturbed':>13}{'attacked':>10}{'p25 to p75':>16}{'ratio':>7}{'rounds':>14}"
        f"{'memory':>16}{'new client after':>18}{'attackers':>26}",
    ]
    for row in result["rows"]:
        quiet, attacked, by_round = row["undisturbed_ms"], row["attacked_ms"], row["ratio_by_round"]
        lines.append(
            f"{row['kind']:<18}{quiet['median']:>10.1f} ms{attacked['median']:>7.1f} ms"
            f"{attacked['p25']:>7.1f} to{attacked['p75']:>6.1f}{row['ratio']:>7.1f}"
            f"{by_round['min']:>7.1f} to{by_round['max']:>4.1f}"
            f"{row['memory_before_mb']:>6.0f} to{row['memory_most_mb']:>5.0f} MB"
            f"{row['new_client_after_ms']['max']:>15.0f} ms"
            f"{row['attackers_connections']:>8} times{row['attackers_megabytes']:>9.0f} MB"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--attacker_address")
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
