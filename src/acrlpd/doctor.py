"""Check that everything a run needs works on this machine. Each check tries the thing itself on a small scale."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import acrlpd
from acrlpd import presets
from acrlpd.config import DataConfig, PolicyConfig, TrainConfig
from acrlpd.data.formats import hdf5
from acrlpd.envs import rendering
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.loop import ACRLPDTrainer
from acrlpd.training.setup import make_trainer
from acrlpd.types import Episode

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "h5py")
EXTRAS = {"metaworld": "metaworld", "ogbench": "ogbench", "report": "matplotlib", "lerobot": "av"}


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check. ``optional``: a run can do without it."""

    name: str
    ok: bool
    text: str  # the finding, or what is missing and how to get it
    optional: bool = False


def validate_installation() -> list[Check]:
    """Run all checks and return their results; none raises. It takes about a minute, mostly compilation."""
    return [
        _tried("versions", _versions),
        _tried("devices", _devices),
        *_extras(),
        _tried("rendering", _rendering, optional=True),
        *_training(),
    ]


def _tried(name: str, check: Callable[[], str], *, optional: bool = False) -> Check:
    try:
        return Check(name, True, check(), optional)
    except Exception as error:  # noqa: BLE001 (any error is the finding)
        return Check(name, False, f"{type(error).__name__}: {error}", optional)


def _versions() -> str:
    own = [f"acrlpd {acrlpd.__version__}", f"Python {platform.python_version()} ({platform.platform(terse=True)})"]
    return ", ".join([*own, *(f"{name} {importlib.metadata.version(name)}" for name in REQUIRED)])


def _devices() -> str:
    kinds = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    slow = "; training a full-size policy needs an accelerator: install jax[cuda12] or jax[tpu]"
    return ", ".join(kinds) + (slow if jax.default_backend() == "cpu" else "")


def _extras() -> list[Check]:
    found = []
    for extra, module in EXTRAS.items():
        present = importlib.util.find_spec(module) is not None
        text = f"{module} is there" if present else f"{module} is missing: pip install 'acrlpd[{extra}]'"
        found.append(Check(extra, present, text, optional=True))
    return found


def _rendering() -> str:
    return f"pictures can be rendered by {rendering.choose_backend()}"


def _training() -> list[Check]:
    """Check a small pi0 and its critics on made-up episodes; each check continues from the one before."""
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, ACRLPDTrainer] = {}

        def batch() -> str:
            made["trainer"] = trainer = make_trainer(_config(Path(folder)))
            found = trainer.loader.batch(0)
            return f"{found.actions.shape[0]} chunks of {found.actions.shape[1]} steps from an HDF5 file"

        def forward() -> str:
            trainer = made["trainer"]
            chunk = trainer.agent.sample_actions(trainer.loader.batch(0).observations, jax.random.key(0), mode="bc")
            return _finite(chunk, "chunk")

        def critic() -> str:
            trainer = made["trainer"]
            chunk = trainer.agent.sample_actions(trainer.loader.batch(0).observations, jax.random.key(0))
            return _finite(chunk, "best of N")

        def checkpoint() -> str:
            trainer = made["trainer"]
            manager = ACRLPDCheckpointManager(Path(folder) / "checkpoints")
            manager.save(trainer.agent, asset_id="doctor", norm_stats=trainer.norm_stats, run={})
            manager.wait()
            manager.restore(trainer.agent)
            manager.close()
            return "written, read back, and its checksums agree"

        named = {"batch": batch, "pi0 forward": forward, "critic": critic, "checkpoint": checkpoint}
        for name, check in named.items():
            checks.append(_tried(name, check))
            if not checks[-1].ok:
                break
    return checks


def _finite(chunk: jax.Array, name: str) -> str:
    if not np.isfinite(np.asarray(chunk)).all():
        raise ValueError(f"the {name} of a fresh policy is not finite")
    return f"{name} {chunk.shape} of a fresh policy is finite"


def _config(folder: Path) -> TrainConfig:
    rng = np.random.default_rng(0)
    terminals = np.arange(8) == 7
    episode = Episode(
        state=rng.normal(size=(8, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(8, 2)).astype(np.float32),
        rewards=np.where(terminals, 0, -1).astype(np.float32),
        terminals=terminals,
        task="wave",
        success=True,
    )
    (folder / "data").mkdir()
    hdf5.write_episode(hdf5.episode_path(folder / "data", 0), episode)
    debug = presets.get_preset("debug")
    policy: PolicyConfig = dataclasses.replace(debug.policy, action_horizon=2)
    data = DataConfig(path=str(folder / "data"), batch_size=jax.device_count(), action_normalization="z_score")
    return dataclasses.replace(debug, name="doctor", run_dir=str(folder / "runs"), env=None, policy=policy, data=data)
