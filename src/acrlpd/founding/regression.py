"""Checks that a checkpoint behaves as before, after an update of this package or of its dependencies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

import acrlpd
from acrlpd.models import weights
from acrlpd.training import loading, memory
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.evaluate import evaluate
from acrlpd.training.setup import make_environments


@dataclasses.dataclass(frozen=True)
class ACRLPDRegressionTester:
    """Named checks of a checkpoint; ``performance_regression`` needs an environment and a recorded evaluation."""

    episodes: int = 50
    env_name: str | None = None  # names your own environment (custom/...), whose code a checkpoint alone may not run
    extraction: str | None = None  # names your own extraction (FILE.py:NAME)

    def run_regression_suite(self, checkpoint_path: str | Path) -> dict[str, bool]:
        results = {
            "api_compatibility": self.test_api_compatibility(),
            "numerical_stability": self.test_numerical_stability(checkpoint_path),
            "openpi_integration": self.test_openpi_compatibility(checkpoint_path),
        }
        loaded = loading.load_stored(checkpoint_path)
        if loaded.config.env is not None and self._recorded(checkpoint_path) is not None:
            results["performance_regression"] = self.test_performance_metrics(checkpoint_path)
        return results

    def test_api_compatibility(self) -> bool:
        """Return whether every public name can be imported."""
        return all(getattr(acrlpd, name) is not None for name in acrlpd.__all__)

    def test_numerical_stability(self, checkpoint_path: str | Path) -> bool:
        """Return whether the same observation and key give the same finite chunk twice."""
        loaded = loading.load_stored(_exactly(checkpoint_path), self.extraction)
        shapes = memory.batch_shapes(loaded.config, loaded.dims, loaded.cameras, 2).observations
        observation = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
        one, other = (np.asarray(loaded.agent.sample_actions(observation, jax.random.key(0))) for _ in range(2))
        return bool(np.isfinite(one).all() and (one == other).all())

    def test_openpi_compatibility(self, checkpoint_path: str | Path) -> bool:
        """Return whether policy and statistics are where openpi's tools look for them, with finite numbers only."""
        manager, step = _manager(checkpoint_path)
        arrays = weights.read_params(str(manager.directory / str(step) / "params"))
        finite = all(np.isfinite(np.asarray(array, np.float32)).all() for array in arrays.values())
        return bool(finite and set(manager.read_norm_stats(step)) >= {"state", "actions"})

    def test_performance_metrics(self, checkpoint_path: str | Path) -> bool:
        """Return whether the success interval on the run's own seeds does not lie below the recorded one."""
        loaded = loading.load_stored(_exactly(checkpoint_path), self.extraction)
        config, recorded = loaded.config, self._recorded(checkpoint_path)
        if self.env_name is not None:
            config = loading.with_task(config, self.env_name)
        if recorded is None:
            raise ValueError(f"{checkpoint_path} has no recorded evaluation to compare with")
        first = config.eval.first_seed
        environments = make_environments(config, min(self.episodes, config.eval.num_envs))
        result, _ = evaluate(
            loaded.agent,
            loaded.transform,
            environments,
            range(first, first + self.episodes),
            mode="greedy",
            rng=jax.random.key(0),
            execute_horizon=config.executed_steps,
        )
        return result.high >= recorded["low"]

    def _recorded(self, checkpoint_path: str | Path) -> dict[str, float] | None:
        """Return the run's last result: the newest checkpoint knows it, for that of a run is of the policy it keeps."""
        manager, step = _manager(checkpoint_path)
        if loading.kept_step(Path(checkpoint_path)) == step:
            step = manager.steps()[-1]
        results = manager.read_run(step)["progress"]["results"]
        return results.get("online", results.get("offline"))


def _exactly(checkpoint_path: str | Path) -> Path:
    """Return the folder of the step that a path stands for; a damaged one must not be skipped."""
    manager, step = _manager(checkpoint_path)
    return manager.directory / str(step)


def _manager(checkpoint_path: str | Path) -> tuple[ACRLPDCheckpointManager, int]:
    directory, step = loading.locate_checkpoint(Path(checkpoint_path))
    manager = ACRLPDCheckpointManager(directory)
    if step is None:
        step = loading.kept_step(Path(checkpoint_path))
    return manager, manager.steps()[-1] if step is None else step
