"""Checks of a run's metrics for signs of trouble, at every log point and in a report afterwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from acrlpd.training.comparison import mcnemar
from acrlpd.training.guides import TROUBLESHOOTING_GUIDE
from acrlpd.training.metrics import read_metrics

logger = logging.getLogger(__name__)

BASELINE_POINTS = 5  # first log points; later losses are compared with their mean loss
TREND_POINTS = 20


class TrainingMetrics:
    """The metrics of a run: for each name, its values in the order of their steps."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}  # the newest value of each
        self._series: dict[str, list[tuple[int, float]]] = {}

    @classmethod
    def read(cls, file: str | Path) -> TrainingMetrics:
        """Read the metrics from a run's ``metrics.jsonl``."""
        found = cls()
        for record in read_metrics(file):
            found.update(record["step"], {name: value for name, value in record.items() if "/" in name})
        return found

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)
        for name, value in metrics.items():
            self._series.setdefault(name, []).append((step, value))

    def series(self, name: str) -> list[float]:
        """Return the finite values, oldest first."""
        return [value for _, value in self._series.get(name, []) if math.isfinite(value)]

    def trend(self, name: str) -> float:
        """Return the relative change from the first to the second half of the last values; 0 if there are too few."""
        recent = self.series(name)[-TREND_POINTS:]
        if len(recent) < 4:
            return 0.0
        before, after = (float(np.mean(half)) for half in (recent[: len(recent) // 2], recent[len(recent) // 2 :]))
        return (after - before) / max(abs(before), 1e-8)


class ACRLPDTrainingMonitor:
    """A monitor that warns once when a metric begins to look wrong, and says what usually helps."""

    def __init__(self) -> None:
        self.history = TrainingMetrics()
        self._known: set[str] = set()

    def monitor_training_step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return the anomalies of this log point; log those that the last one did not have."""
        found = self.detect_training_anomalies(metrics)
        for anomaly in found:
            if anomaly not in self._known:
                logger.warning("step %d: %s", step, anomaly)
        self._known = set(found)
        self.history.update(step, metrics)
        return found

    def monitor_evaluation(self, step: int, offline: Mapping[str, bool], online: Mapping[str, bool]) -> str | None:
        """Log and return a warning if the online policy is worse than the offline one by more than chance, else None.

        Both arguments are outcomes by seed. McNemar's test at 5 % compares, among the seeds that both policies
        finished, those that only one of them solved.
        """
        pairs = [(before, online[seed]) for seed, before in offline.items() if seed in online]
        lost, won = pairs.count((True, False)), pairs.count((False, True))
        p_value = mcnemar(lost, won)
        if lost <= won or p_value > 0.05:
            return None
        helps = TROUBLESHOOTING_GUIDE["online_below_offline"]["solutions"]
        found = (
            f"the online policy solves {sum(after for _, after in pairs)} of {len(pairs)} episodes, the offline one "
            f"solved {sum(before for before, _ in pairs)} of the same: more than chance (p = {p_value:.2g}). The run "
            f"keeps and serves its best policy. If the next evaluation is no better: {'; '.join(helps)}"
        )
        logger.warning("step %d: %s", step, found)
        return found

    def detect_training_anomalies(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the anomalies in ``metrics``, which have their logged names ("train/...")."""
        helps = TROUBLESHOOTING_GUIDE["training_instability"]["solutions"]
        found = []
        if metrics["train/total_loss"] > 10 * self.loss_baseline:
            found.append(f"the loss is above ten times what it was at first. {helps[0]}")
        if "train/critic_loss" in metrics:  # pure imitation has none
            found += self._critic_anomalies(metrics, helps)
        if metrics.get("train/skipped", 0) > 0:
            found.append("updates were skipped for NaN or spikes, see skipped_updates.jsonl")
        return found

    def _critic_anomalies(self, metrics: Mapping[str, float], helps: list[str]) -> list[str]:
        found = []
        if metrics["train/q_std"] < 0.01 and metrics["train/td_error_mean"] > 0.1:
            found.append(f"all Q values are the same, although targets differ. {helps[2]}")
        if "train/bc_loss" not in metrics:  # an update of the critics alone
            return found
        ratio = metrics["train/bc_loss"] / (metrics["train/critic_loss"] + 1e-8)
        if ratio > 100:
            found.append("the imitation loss dominates the critic's: reduce agent.loss_weights.bc_weight")
        elif ratio < 0.001:
            found.append("the imitation loss vanishes beside the critic's: increase agent.loss_weights.bc_weight")
        if not 0.01 <= metrics["train/alpha_value"] <= 10:
            found.append("the temperature left 0.01..10: look at train/entropy_estimate and its target")
        return found

    @property
    def loss_baseline(self) -> float:
        """Mean absolute value of the first losses; infinite until there are enough of them."""
        first = self.history.series("train/total_loss")[:BASELINE_POINTS]
        return float(np.mean(np.abs(first))) if len(first) == BASELINE_POINTS else math.inf

    def suggest_lr_adjustment(self) -> str | None:
        """Suggest a learning rate from the trend of the critic's loss over the last log points."""
        change = self.history.trend("train/critic_loss")
        if change > 0.5:
            return f"the critic's loss rose by {change:.0%} lately: halve optimizers.critic.schedule.peak_lr"
        if abs(change) < 0.01 and len(self.history.series("train/critic_loss")) >= TREND_POINTS:
            return "the critic's loss has not moved lately: let the learning rate decay, or stop"
        return None


class ACRLPDDebugger:
    """A debugger that reports in words on a finished or running run, from the metrics that it logged."""

    def __init__(self, run: str | Path):
        self._metrics = TrainingMetrics.read(Path(run) / "metrics.jsonl")

    def generate_training_report(self) -> str:
        sections = {
            "Losses": ("total_loss", "critic_loss", "bc_loss", "actor_loss", "alpha_loss"),
            "Q values": ("q_mean", "q_std", "target_q_mean", "td_error_mean", "q_ensemble_variance"),
            "Policy": ("alpha_value", "entropy_estimate", "action_diversity", "best_of_n_variance"),
            "Gradients": tuple(
                name.removeprefix("train/") for name in self._metrics.metrics if name.startswith("train/grad_norm/")
            ),
        }
        lines = ["# Training report"]
        for title, names in sections.items():
            lines += ["", f"## {title}", *(self._line(name) for name in names)]
        monitor = ACRLPDTrainingMonitor()
        monitor.history = self._metrics
        advice = [*monitor.detect_training_anomalies(self._metrics.metrics), monitor.suggest_lr_adjustment()]
        return "\n".join([*lines, "", "## Advice", *(f"- {each}" for each in advice if each)])

    def _line(self, name: str) -> str:
        full = f"train/{name}"
        if full not in self._metrics.metrics:
            return f"- {name}: not logged"
        return f"- {name}: {self._metrics.metrics[full]:.4g}, lately {self._metrics.trend(full):+.0%}"
