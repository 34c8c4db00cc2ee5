"""A checkpoint of a tiny agent that was never trained, and servers in a thread of this process."""

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from acrlpd import deploy
from acrlpd.agents.config import AgentConfig
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig, to_dict
from acrlpd.data.view.normalize import NormStats
from acrlpd.models.critic import CriticConfig
from acrlpd.serving import codec
from acrlpd.serving.policy import Policy
from acrlpd.serving.server import PolicyServer, ServerConfig
from acrlpd.training import build
from acrlpd.training.checkpoint import ACRLPDCheckpointManager

CONFIG = TrainConfig(
    policy=PolicyConfig(kind="mlp_flow", action_horizon=5, hidden_dims=(16,)),
    agent=AgentConfig(critic=CriticConfig(num_critics=4, hidden_dims=(16,)), best_of_n_samples=4, flow_steps=3),
    data=DataConfig(path="data", action_normalization="z_score"),
    online_steps=0,
)
STATS = {
    "state": NormStats(np.array([1.0, -1.0, 0.0]), np.array([2.0, 0.5, 1.0])),
    "actions": NormStats(np.array([5.0, 6.0]), np.array([1.0, 2.0])),
}
OBS = {"state": np.array([0.5, 1.5, 0.0], np.float32)}


def save(
    run: Path,
    step: int,
    *,
    seed: int = 0,
    config: TrainConfig = CONFIG,
    cameras: tuple[str, ...] = (),
    stats: dict[str, NormStats] = STATS,
) -> None:
    """A checkpoint of an agent as it was made."""
    dims = build.Dims(len(stats["state"].mean), len(stats["actions"].mean))
    agent = build.make_agent(dataclasses.replace(config, seed=seed), dims, cameras)
    agent = dataclasses.replace(agent, step=agent.step + step)
    manager = ACRLPDCheckpointManager(run / "checkpoints")
    manager.save(agent, asset_id="tiny", norm_stats=stats, run={"config": to_dict(config), "cameras": list(cameras)})
    manager.wait()
    manager.close()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with one checkpoint, of step 3."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, 3)
    return folder


@pytest.fixture(scope="session")
def trained(run: Path) -> deploy.Trained:
    return deploy.load_trained(run)


@pytest.fixture
def policy(trained: deploy.Trained) -> Policy:
    return deploy.trained_policy(trained, deploy.ActingOptions())


@dataclasses.dataclass
class Running:
    """A server in another thread."""

    server: PolicyServer
    port: int
    stop: "threading.Event"
    thread: threading.Thread

    def connect(self, **options) -> ClientConnection:
        options = {"compression": None, "max_size": None, "open_timeout": 30, **options}
        return connect(f"ws://127.0.0.1:{self.port}", legacy=True, **options)

    def client(self, **options) -> "Client":
        return Client(self.connect(**options))


class Client:
    """What openpi's client does."""

    def __init__(self, connection: ClientConnection):
        self.connection = connection
        self.metadata = codec.unpack(connection.recv(timeout=60))

    def infer(self, obs):
        self.connection.send(codec.pack(obs))
        answer = self.connection.recv(timeout=60)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return codec.unpack(answer)


@contextlib.contextmanager
def running(policy: Policy, *, wait: bool = True, api_keys=(), refresh=None, **options) -> Iterator[Running]:
    config = ServerConfig(port=0, **options)
    started, stop = threading.Event(), threading.Event()
    found = {}

    async def serve() -> None:
        server = PolicyServer(policy, config, api_keys=api_keys, refresh=refresh)
        async with server.serving() as port:
            if wait:
                await server.wait_ready()
            found.update(server=server, port=port)
            started.set()
            await asyncio.to_thread(stop.wait)

    def target() -> None:
        try:
            asyncio.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    started.wait(120)
    try:
        yield Running(found["server"], found["port"], stop, thread)
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(trained: deploy.Trained) -> Iterator[Running]:
    """One server with the defaults for the tests that only look at it."""
    with running(deploy.trained_policy(trained, deploy.ActingOptions())) as server:
        yield server


@contextlib.contextmanager
def spawned(folder: Path, *flags: str, **variables: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """``acrlpd serve`` in a process of its own, ready: the process and its port. It must stop when told to."""
    command = [sys.executable, "-m", "acrlpd.cli.main", "serve", "--checkpoint", str(folder), *flags]
    process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # "serving ws://127.0.0.1:8000"
        assert line.startswith("serving"), line
        yield process, int(line.rsplit(":", 1)[1])
    finally:
        process.terminate()
        assert process.wait(60) == 0
