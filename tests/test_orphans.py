"""Every kind of worker process ends with the process that started it, also when it is busy and that one is killed."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from acrlpd.data.store import processes

STARTING = """
import multiprocessing, sys, time
from pathlib import Path

def busy(*_, **__):
    print("worker", multiprocessing.current_process().pid, flush=True)
    time.sleep(600)

class Slow:
    state_dim, time_limit, fps, cameras, default_camera, instruction = 1, 9, 1.0, (), "none", "wait"
    action_low, action_high = -__import__("numpy").ones(1, "float32"), __import__("numpy").ones(1, "float32")
    reset = step = busy
    def close(self): pass

def collecting():
    from acrlpd.envs.collect import collect
    from acrlpd.envs.env import EnvConfig
    config = EnvConfig(f"custom/{Path(__file__)}:Slow")
    collect(config, range(4), policy="random", num_workers=2, on_episode=print)

def stepping():
    from acrlpd.envs.env import EnvConfig
    from acrlpd.envs.episodes import Start
    from acrlpd.envs.vector import RolloutConfig
    from acrlpd.envs.registry import make_vector
    environments = make_vector(EnvConfig(f"custom/{Path(__file__)}:Slow"), 2, RolloutConfig(num_workers=2))
    for worker in environments._workers:
        worker.wait_until_ready()
    environments.send({0: Start(0, 0, False), 1: Start(1, 1, False)})
    environments.receive()

def reading():
    from acrlpd.data.store import processes
    pool = processes.start(2, print)
    list(pool.map(busy, range(2)))

def grain():
    import numpy as np
    from acrlpd.data.formats import hdf5
    from acrlpd.data.grain_batches import grain_batches
    from acrlpd.types import Episode
    actions = np.zeros((4, 1), np.float32)
    flags = np.zeros(4, bool)
    episode = Episode(actions, actions, flags * 1.0, flags, task="", success=True)
    hdf5.write_episode(hdf5.episode_path(Path(__file__).parent / "set", 0), episode)
    batches = grain_batches(Path(__file__).parent / "set", 2, 2, num_steps=100, num_workers=2, transform=Busy())
    next(iter(batches))

class Busy:
    def __call__(self, data):
        return data if multiprocessing.parent_process() is None else busy()

if __name__ == "__main__":
    globals()[sys.argv[1]]()
"""


@pytest.mark.parametrize("kind", ["collecting", "stepping", "reading", pytest.param("grain", marks=pytest.mark.slow)])
def test_busy_workers_end_with_a_killed_parent(tmp_path, kind):
    if kind == "grain":
        pytest.importorskip("grain")
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    with subprocess.Popen([sys.executable, str(script), kind], stdout=subprocess.PIPE, text=True) as parent:
        lines = (line.split() for line in iter(parent.stdout.readline, ""))
        workers = [int(line[1]) for line in itertools.islice((line for line in lines if line[:1] == ["worker"]), 2)]
        parent.kill()
    try:
        assert len(workers) == 2, "the workers did not start"
        assert not still_running(workers, seconds=5)
    finally:
        for worker in still_running(workers, seconds=0):
            os.kill(worker, signal.SIGKILL)


def interrupt_oneself(_):
    os.kill(os.getpid(), signal.SIGINT)
    return os.getpid()


def test_a_terminals_ctrl_c_is_the_parents_business():
    """It reaches every process there; a reading one that ended by it would end the run before it has saved."""
    with processes.start(1, ignore) as pool:
        first, second = (pool.submit(interrupt_oneself, 0).result() for _ in range(2))
    assert first == second != os.getpid()


def ignore():
    pass


def still_running(processes, seconds):
    limit = time.monotonic() + seconds
    while (left := [each for each in processes if is_running(each)]) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


def is_running(process):
    """An ended one counts as gone, also where nobody asks for its exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        state = subprocess.run(["ps", "-o", "state=", "-p", str(process)], capture_output=True, text=True).stdout
        return bool(state.strip()) and not state.strip().startswith("Z")
    return False
