"""What a run tells while it trains: lines of ``metrics.jsonl`` and of other loggers, and the monitor's warnings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from acrlpd.config import to_dict
from acrlpd.training.clocks import Clocks
from acrlpd.training.evaluate import Evaluation
from acrlpd.training.metrics import MetricAverage
from acrlpd.training.monitor import ACRLPDTrainingMonitor
from acrlpd.training.offline_evaluation import OfflineEvaluation
from acrlpd.training.run import RunFiles, RunState
from acrlpd.training.writers import Writers, make_writers


class RunLog:
    """The log of a run. Logging waits for the device, so it happens only at log points and after evaluations."""

    def __init__(self, state: RunState, files: RunFiles, clocks: Clocks):
        self.monitor = ACRLPDTrainingMonitor()
        self._state = state
        self._files = files
        self._clocks = clocks
        self._average = MetricAverage()
        self._last = time.perf_counter(), state.step  # time and step of the last log point
        self._writers = Writers([])

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the writers for the block."""
        config = self._state.config
        self._writers = make_writers(self._files.metrics, config.loggers, name=config.name, run_config=to_dict(config))
        try:
            yield
        finally:
            self._writers.close()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics of an update for the next log point, without waiting for them."""
        self._average.add(metrics)

    def write_training(self, phase: str, others: dict[str, float]) -> dict[str, str]:
        """Write the means since the last log point, with ``others`` beside them; return what a progress bar shows."""
        with self._clocks.span("update"):
            metrics = self._average.fetch()  # waits for the device
        with self._clocks.span("log"):
            numbers = {f"train/{name}": value for name, value in metrics.items()}
            numbers |= self._throughput() | {"data/mask_ratio": metrics["mask_ratio"]} | others
            self.monitor.monitor_training_step(self._state.step, numbers)
            self._writers.write(self._counters(phase, self._state.step, self._state.progress.env_steps) | numbers)
        shown = {"loss": "total_loss", "q": "q_mean"}  # pure imitation has no Q
        return {name: f"{metrics[metric]:.3g}" for name, metric in shown.items() if metric in metrics}

    def write_evaluation(self, name: str, result: Evaluation, *, step: int, env_steps: int, cpu_s: float) -> None:
        """Write the result of a policy that was the newest at ``step``, whose episodes took ``cpu_s`` of CPU time."""
        cpu = {"cpu_s": self._clocks.cpu(), "evaluation_cpu_s": cpu_s}
        self._writers.write(self._counters(name, step, env_steps) | cpu | result.metrics())

    def write_offline_evaluation(self, phase: str, result: OfflineEvaluation, *, cpu_s: float) -> None:
        """Write the result of the newest policy on held-out episodes, which took ``cpu_s`` of CPU time."""
        cpu = {"cpu_s": self._clocks.cpu(), "evaluation_cpu_s": cpu_s}
        counters = self._counters(phase, self._state.step, self._state.progress.env_steps)
        self._writers.write(counters | cpu | result.metrics())

    def _counters(self, phase: str, step: int, env_steps: int) -> dict[str, Any]:
        return {"step": step, "phase": phase, "env_steps": env_steps, "wall_s": self._clocks.wall()}

    def _throughput(self) -> dict[str, float]:
        """Return the time per update since the last log point, everything included, and the device memory if known."""
        now, (before, step) = time.perf_counter(), self._last
        self._last = now, self._state.step
        seconds = (now - before) / max(self._state.step - step, 1)
        batch_size = self._state.config.data.batch_size
        found = {"timing/step_duration": seconds, "timing/samples_per_sec": batch_size / seconds}
        memory = jax.local_devices()[0].memory_stats()
        return found | ({"memory/gpu_usage": memory["bytes_in_use"]} if memory else {})
