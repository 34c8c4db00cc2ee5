"""The examples beside a server: they run as they are, and say what can be checked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acrlpd.data.view.normalize import NormStats
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make

sys.path.insert(0, str(Path(__file__).parent))
from conftest import save, spawned

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, port: int, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--url", f"ws://127.0.0.1:{port}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_examples_talk_to_a_server(tmp_path):
    spec = make(EnvConfig("metaworld/drawer-open-v3")).spec
    identity = {
        name: NormStats(np.zeros(size), np.ones(size))
        for name, size in (("state", spec.state_dim), ("actions", spec.action_dim))
    }
    save(tmp_path, 3, stats=identity)
    with spawned(tmp_path, "--port", "0", "--max_batch_size", "1") as (_, port):
        told = example("client.py", port, "--state-dim", str(spec.state_dim), "--count", "2")
        assert "'step': 3" in told
        assert told.count(f"(5, {spec.action_dim}) actions in") == 2
        loop = example("policy_in_the_loop.py", port, "--episodes", "2", "--max-steps", "12")
        assert loop.count("failure after 12 steps") == 2
