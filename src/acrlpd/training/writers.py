"""Writers of a run's numbers: JSON lines always, and beside them TensorBoard, Weights & Biases, or Trackio.

A writer has ``write(record)`` and ``close()``. A record is flat: "step", "phase", and numbers by name.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from acrlpd.config import LoggerConfig, LoggerKind
from acrlpd.files import read_json
from acrlpd.training.metrics import JsonlWriter, write_json

WANDB_METRIC_GROUPS: dict[str, list[str]] = {
    "loss_components": [
        *("train/total_loss", "train/critic_loss", "train/bc_loss"),
        *("train/actor_loss", "train/alpha_loss"),
    ],
    "q_value_analysis": [
        *("train/q_mean", "train/q_std", "train/target_q_mean"),
        *("train/td_error_mean", "train/q_ensemble_variance"),
    ],
    "exploration_metrics": [
        *("train/alpha_value", "train/entropy_estimate"),
        *("train/best_of_n_variance", "train/action_diversity"),
    ],
    "training_efficiency": [
        *("timing/samples_per_sec", "timing/step_duration"),
        *("memory/gpu_usage", "data/mask_ratio"),
    ],
    "evaluation_performance": [
        *("eval/episode_reward_mean", "eval/episode_reward_std"),
        *("eval/success_rate", "eval/episode_length_mean"),
    ],
}
"""The metrics of each chart. ``memory/gpu_usage`` exists on devices that count their bytes."""


class Writer(Protocol):
    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one. The first is the run's own file; an error of another one ends the run loudly."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def write(self, record: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        with contextlib.ExitStack() as closing:
            for writer in self._writers:
                closing.callback(writer.close)


def make_writers(path: Path, config: LoggerConfig, *, name: str, run_config: Mapping[str, Any]) -> Writers:
    """Return a writer of JSON lines to ``path``, and of the loggers of ``config`` beside it.

    Raises:
        ImportError: a logger's package is missing; the message names the extra that has it.
    """
    makers: dict[LoggerKind, Any] = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter, "trackio": TrackioWriter}
    others = [makers[kind](path.parent, config, name, run_config) for kind in config.kinds]
    return Writers([JsonlWriter(path), *others])


class TensorBoardWriter:
    """Writer of event files to the run's ``tensorboard`` folder."""

    def __init__(self, directory: Path, config: LoggerConfig, name: str, run_config: Mapping[str, Any]):
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._event, self._summary = Event, Summary
        self._file = EventFileWriter(str(directory / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in numbers(record).items()]
        self._file.add_event(
            self._event(step=record["step"], wall_time=time.time(), summary=self._summary(value=values))
        )

    def close(self) -> None:
        self._file.close()


class WandbWriter:
    """Writer to Weights & Biases; "offline" writes below the run's folder, to be synchronised later."""

    def __init__(self, directory: Path, config: LoggerConfig, name: str, run_config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        self._run = wandb.init(
            project=config.project,
            name=name,
            id=_stored_id(directory / "wandb.json", f"{config.project}-{name}".replace("/", "-")),
            resume="allow",
            mode=config.wandb_mode,
            dir=str(directory),
            config=dict(run_config),
        )
        for metrics in WANDB_METRIC_GROUPS.values():
            for metric in metrics:
                self._run.define_metric(metric, step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(numbers(record) | {"step": record["step"]})

    def close(self) -> None:
        self._run.finish()


def _stored_id(file: Path, name: str) -> str:
    """Return the id of a run's folder, made once: a resumed run keeps it, one that starts anew there has another."""
    if not file.exists():
        write_json(file, {"id": f"{name}-{secrets.token_hex(4)}"})
    return read_json(file)["id"]


class TrackioWriter:
    """Writer to Trackio's local database."""

    def __init__(self, directory: Path, config: LoggerConfig, name: str, run_config: Mapping[str, Any]):
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio", error) from error
        self._trackio = trackio
        trackio.init(project=config.project, name=name, config=dict(run_config), resume="allow")

    def write(self, record: Mapping[str, Any]) -> None:
        self._trackio.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self._trackio.finish()


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what can be drawn from a record: finite numbers under a group's name."""
    drawn = {name: value for name, value in record.items() if "/" in name and isinstance(value, (int, float))}
    return {name: float(value) for name, value in drawn.items() if math.isfinite(value)}


def _missing(extra: LoggerKind, error: ImportError) -> ImportError:
    return ImportError(f"logging to {extra} needs its package ({error}): pip install 'acrlpd[{extra}]'")
