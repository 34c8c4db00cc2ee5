"""The real openpi-client from PyPI against ``acrlpd serve``. It needs numpy 1, so it runs in its own environment."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acrlpd import deploy
from acrlpd.config import PolicyConfig
from acrlpd.presets import NANO
from acrlpd.serving.request import OPTIONS_KEY

sys.path.insert(0, str(Path(__file__).parent))
import conftest
from conftest import save, spawned

SCRIPT = Path(__file__).parent / "openpi_client_script.py"
NANO_POLICY: PolicyConfig = dataclasses.replace(NANO, max_token_len=16)


@pytest.fixture(scope="module")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with openpi-client 0.1.2."""
    candidates = [sys.executable, *map(shutil.which, ("python3.12", "python3.11", "python3.10"))]
    python = next((each for each in candidates if each and _version(each) < (3, 13)), None)
    if python is None:
        pytest.skip("openpi-client needs numpy 1, which needs a Python before 3.13, and there is none here")
    folder = tmp_path_factory.mktemp("openpi-client")
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    packages = ("openpi-client==0.1.2", "numpy<2", "typing-extensions")  # the last is imported and not declared
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python")
    done = subprocess.run([*pip, "install", "-q", "--no-compile", *packages], capture_output=True, text=True)
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1]
        if os.environ.get("CI"):
            pytest.fail(f"the package index gave no openpi-client: {complaint}")
        pytest.skip(f"no package index, so no openpi-client: {complaint}")
    return folder / "bin/python"


def _version(python: str) -> tuple[int, ...]:
    told = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    return tuple(map(int, told.stdout.split())) if told.returncode == 0 else (99,)


@pytest.mark.slow
def test_openpis_client_is_served(client_python, tmp_path, monkeypatch):
    config = dataclasses.replace(
        conftest.CONFIG,
        policy=NANO_POLICY,
        agent=dataclasses.replace(conftest.CONFIG.agent, best_of_n_samples=2, flow_steps=2),
    )
    save(tmp_path, 3, config=config, cameras=("base",))
    flags = ("--port", str(free_port()), "--max_batch_size", "1")
    told: dict[str, list] = {}
    variables = {"ACRLPD_API_KEY": "secret"}
    with spawned(tmp_path, *flags, **variables) as (_, port):
        command = [str(client_python), str(SCRIPT), str(port), "secret"]
        client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]}
        )
        assert client.stdout is not None
        for line in client.stdout:
            for name, value in json.loads(line).items():
                told.setdefault(name, []).append(value)
            if "connected" in told:
                break
    with spawned(tmp_path, *flags, **variables):
        rest, _ = client.communicate("\n", timeout=300)
    for line in rest.splitlines():
        for name, value in json.loads(line).items():
            told.setdefault(name, []).append(value)

    assert told["numpy"][0].startswith("1.")
    assert len(told["refused"]) == 2
    assert all("401" in refusal for refusal in told["refused"])
    assert told["metadata"] == [{"acrlpd": {"step": 3, "action_horizon": 5}}]
    assert told["keys"] == [["actions", "policy_timing", "server_timing"]]
    assert told["dtype_shape"][0][1] == [5, 2]
    assert told["timing"] == [["infer_ms", "prev_total_ms"]]
    assert told["broker"] == [[[2]] * 6]
    assert told["broker_chunks_differ"] == [True]
    assert "not one of this robot" in told["error"][0]
    assert told["lost"]
    assert told["after_restart"] == [[5, 2]]
    policy = deploy.trained_policy(deploy.load_trained(tmp_path), deploy.ActingOptions())
    obs = {
        "state": np.array([0.5, 1.5, 0.0], np.float32),
        "image": {"base": padded(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))},
        "prompt": "open the drawer",
        OPTIONS_KEY: {"seed": 7},
    }
    np.testing.assert_allclose(told["seeded"][0], policy.infer(obs)["actions"], atol=1e-4)


def padded(image: np.ndarray) -> np.ndarray:
    """48 rows in the middle of 64, as openpi's image tools pad."""
    return np.pad(image, ((8, 8), (0, 0), (0, 0)))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
