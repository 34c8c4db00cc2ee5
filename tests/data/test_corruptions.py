"""Five hundred damaged data sets: each gives its whole content or one clear line, in bounded time and memory."""

import json
import select
import subprocess
import sys
from pathlib import Path

import pytest

from acrlpd.files import printable

TIME_S = 20
MEMORY = 1 << 30  # of the whole process, libraries included
NAMES = ("own", "aloha", "aloha-jpeg", "robomimic", "droid", "npz")
NAMES += ("lerobot-v2.0", "lerobot-v2.1-video", "lerobot-v3.0", "lerobot-v3.0-video")
QUICK, ALL = 60, 500


class Worker:
    """The process that damages and reads; a new one where one had to be stopped."""

    def __init__(self, folder):
        self._folder = folder
        self._process = None

    def ask(self, **what):
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("corruption_worker.py")), str(self._folder)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.ask(name="npz", seed=None, skip=False)  # libraries are loaded
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], TIME_S + (60 if what["seed"] is None else 0))
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            pytest.fail(f"{what}: {'the process died' if ready else f'no answer within {TIME_S} s'}")
        return json.loads(line)

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    found = Worker(tmp_path_factory.mktemp("corruptions"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def whole(worker):
    """What the undamaged sets hold, by name."""
    return {name: worker.ask(name=name, seed=None, skip=False) for name in NAMES}


def check(seed, worker, whole):
    name, skip = NAMES[seed % len(NAMES)], seed % 3 == 0
    found = worker.ask(name=name, seed=seed, skip=skip)
    damage = f"{name}, {found['damage']}"
    assert found["peak"] < MEMORY, damage
    if "error" in found:
        told = f"{damage}: {found['kind']}: {found['error'][:1000]}"
        assert found["clear"], f"{told}\n{found['where']}"
        assert "\n" not in found["error"], told
        assert "/case" in found["error"], f"names no file: {told}"
        assert len(found["error"]) < 1500, told
        assert printable(found["error"]) == found["error"], told
        return
    if "scrambled" in damage:  # other pictures, perhaps: no checksum covers a video
        return
    expected = whole[name]
    assert found["fps"] == expected["fps"], damage
    assert found["cameras"] == expected["cameras"], damage
    if not skip:
        assert list(found["episodes"]) == list(expected["episodes"]), damage
    for source, episode in found["episodes"].items():
        assert episode == expected["episodes"][source], f"{damage}: {source} was accepted with other values"


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", range(QUICK))
def test_some_corruptions(seed, worker, whole):
    check(seed, worker, whole)


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", range(QUICK, ALL))
def test_all_corruptions(seed, worker, whole):
    check(seed, worker, whole)
