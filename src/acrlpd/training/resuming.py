"""Checks whether a run may use its folder, and where it continues: no runs are mixed, and nothing is lost unasked."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig, from_stored, to_dict
from acrlpd.data.replay import Entry, ReplayJournal
from acrlpd.data.view.normalize import NormStats
from acrlpd.files import read_json
from acrlpd.overrides import differences
from acrlpd.training.checkpoint import DAMAGED, ACRLPDCheckpointManager, DamagedCheckpoint, Restored
from acrlpd.training.fingerprint import Fingerprint
from acrlpd.training.run import Progress, RunFiles

logger = logging.getLogger(__name__)

CHANGEABLE = (
    *("run_dir", "name", "online_steps", "log_frequency", "save_frequency", "max_to_keep", "keep_period"),
    *("rollout.backend", "rollout.num_workers", "rollout.timeout_s", "loggers.*"),
    *(
        "max_skipped_updates",
        "max_rollbacks",
        "early_stopping_patience",
        "early_stopping_success",
        "eval.frequency",
        "eval.progress_episodes",
    ),
    "updates_per_call",
    "fsdp_devices",
)
"""Fields that say how long a run lasts, where it runs and what it reports, but not what it computes."""
SHOWN = 5  # damaged files in a message
LIGHTENED = ("agent.gradient_accumulation_steps", "agent.best_of_n_strategy")  # changed by a run short of memory


def started_with(directory: Path) -> TrainConfig | None:
    """Return the configuration of the run in this folder; None if there is no run.

    It is read from ``config.json``. If that file is gone or damaged, the newest checkpoint's is taken, with a warning.

    Raises:
        ValueError: ``config.json`` is damaged, and there is no checkpoint whose configuration could be taken.
    """
    files = RunFiles(directory)
    try:
        return _config_of(read_json(files.config), files.config)
    except FileNotFoundError:
        error: Exception | None = None
    except ValueError as refusal:
        error = refusal
    saved = next(iter(_saved_configs(files).items()), None)
    if saved is not None:
        reason = error or f"{files.config} is gone"
        logger.warning("%s. Going on with the configuration that checkpoint %d holds.", reason, saved[0])
        return saved[1]
    if error is not None:
        raise ValueError(f"{error}. Bring it back, or start anew with --overwrite.") from error
    return None


def _config_of(values: Mapping[str, Any], file: Path) -> TrainConfig:
    try:
        return from_stored(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _saved_configs(files: RunFiles) -> dict[int, TrainConfig]:
    """Return the configurations of checkpoints by step, newest first. Damaged ones are reported when restored."""
    checkpoints = ACRLPDCheckpointManager(files.checkpoints)
    found = {}
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(DamagedCheckpoint):
            found[step] = _config_of(checkpoints.read_run(step)["config"], files.checkpoints / str(step))
    return found


def claim_directory(config: TrainConfig, files: RunFiles, *, resume: bool, override: Collection[str] = ()) -> None:
    """Refuse to mix two runs in one folder, and to resume one with other values that ``override`` does not name."""
    saved = _saved_configs(files)
    if not files.config.exists() and not saved:
        return
    if not resume:
        raise ValueError(
            f"run directory {files.directory} already exists. Use --resume to go on with it, --overwrite to delete it, "
            "or another --name."
        )
    before = started_with(files.directory)
    assert before is not None, "there is a file or a checkpoint"
    _check_same_run(saved, before, files, override)
    lines = _differences(before, config)
    changed = _unlike(before, config, override)
    if override and lines:
        logger.warning("%s goes on with other values:\n  %s", files.directory, "\n  ".join(lines))
    if changed:
        raise ValueError(
            f"{files.directory} was started with another configuration, so it cannot be resumed with this one:\n  "
            + "\n  ".join(changed)
            + "\nResume with the old values, or say --override to go on with the new ones (--override_lr_schedule: "
            "those of the learning rates alone)."
        )


def _check_same_run(
    saved: Mapping[int, TrainConfig], config: TrainConfig, files: RunFiles, override: Collection[str]
) -> None:
    """Refuse a ``config.json`` with which no checkpoint was trained: it is another run's, or was changed by hand."""
    foreign = {step: _unlike(each, config, (*LIGHTENED, *override)) for step, each in saved.items()}
    if foreign and all(foreign.values()):
        step, lines = next(iter(foreign.items()))
        raise ValueError(
            f"{files.checkpoints / str(step)} was saved with another configuration than {files.config} has:\n  "
            + "\n  ".join(lines)
            + "\nDelete that file to go on with the checkpoint's, or say --override to go on with the file's."
        )


def _unlike(before: TrainConfig, after: TrainConfig, allowed: Collection[str]) -> list[str]:
    """Return one line for each field that differs and may not."""
    lines = _differences(before, after)
    return [line for line in lines if not _may_change(line.split(":")[0], (*CHANGEABLE, *allowed))]


def _differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Return one line for each field that differs. A critic horizon that was left out counts as its resolved value."""
    first, second = (to_dict(config.with_critic_horizon(config.critic_horizon)) for config in (before, after))
    return differences(first, second)


def _may_change(field: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def resume_from(
    files: RunFiles,
    checkpoints: ACRLPDCheckpointManager,
    template: ACRLPDAgent,
    from_step: int | None,
    *,
    config: TrainConfig,
    prior: tuple[str, Fingerprint],
    override: Collection[str] = (),
) -> tuple[ACRLPDAgent, Progress, dict[str, NormStats]]:
    """Restore the newest intact checkpoint, or exactly that of ``from_step``.

    With ``from_step``, later checkpoints are then deleted, and episodes that were made after that step are set aside.
    """
    if from_step is None:
        restored = checkpoints.restore_newest(template)
    else:
        try:
            restored = checkpoints.restore(template, from_step)
        except DamagedCheckpoint as error:
            others = [step for step in checkpoints.steps() if step != from_step]
            raise ValueError(f"{error}. Nothing was changed; the other steps there are: {others}") from error
    of_it = _config_of(restored.run["config"], files.checkpoints / str(restored.step))
    _check_same_run({restored.step: of_it}, config, files, override)
    check_prior(restored, *prior, files, override)
    progress = Progress(**restored.run["progress"])
    if from_step is not None:
        if files.replay.is_dir():
            ReplayJournal(files.replay).set_aside_from(progress.next_episode)
        checkpoints.discard_after(from_step)
    logger.info("resumed at update %d", restored.step)
    return restored.agent, progress, restored.norm_stats


def check_prior(restored: Restored, where: str, found: Fingerprint, files: RunFiles, override: Collection[str]) -> None:
    """Refuse prior data that is not what the checkpoint was trained on, unless ``override`` allows other data."""
    known = restored.run.get("prior")  # missing in checkpoints of format 0
    before = Fingerprint(**known) if known else found
    if before == found:
        return
    told = (
        f"{where}: the prior data has changed since {files.checkpoints / str(restored.step)} was saved: it was "
        f"{before}, now it is {found}" + ("" if str(before) != str(found) else ", of other names or numbers")
    )
    if not _may_change("data", override):
        raise ValueError(f"{told}. Bring the old data back, or say --override to go on with what is there now.")
    logger.warning("%s", told)


def check_journal(
    journal: ReplayJournal,
    damaged: Mapping[Entry, str],
    progress: Progress,
    override: Collection[str],
) -> None:
    """Refuse a journal that holds fewer episodes than when the checkpoint was saved, unless ``override`` allows it."""
    known = progress.journal_episodes or min(1, progress.next_episode)  # format 0 does not say how many they were
    whole = [number for number in journal.numbers() if number not in {entry.number for entry in damaged}]
    found = sum(number < progress.next_episode for number in whole)
    if found >= known:
        return
    reasons = "".join(f"; {entry.file}: {reason}" for entry, reason in list(damaged.items())[:SHOWN])
    told = f"{journal.directory} holds {found} of the {known} episodes that the checkpoint knows{reasons}"
    if not _may_change("replay", override):
        raise ValueError(
            f"{told}. Bring them back (from a backup, or from its folder damaged), or say --override to go on without."
        )
    logger.warning("%s. Going on without.", told)


def check_nothing_was_learned(config: TrainConfig, files: RunFiles, checkpoints: ACRLPDCheckpointManager) -> None:
    """Refuse to start at step 0 in the folder of a run that had come further. A run killed before its first checkpoint
    starts over; if it has no offline phase, it keeps the episodes it has made."""
    damaged, episodes = checkpoints.damaged(), len(ReplayJournal(files.replay)) if files.replay.is_dir() else 0
    if not damaged and episodes and not config.offline_steps:
        logger.warning("no checkpoint yet: starting at step 0 with the %d episodes of %s", episodes, files.replay)
    elif damaged or episodes:
        found = ([f"damaged ones ({', '.join(damaged)}) in {checkpoints.directory / DAMAGED}"] if damaged else []) + (
            [f"{episodes} episodes in {files.replay}"] if episodes else []
        )
        raise ValueError(
            f"{files.directory} has no checkpoint to resume from, but {' and '.join(found)}: it would start over at "
            f"step 0. Bring a checkpoint back to {checkpoints.directory} (from a backup), then use --resume; or start "
            "anew with another --name, or with --overwrite, which deletes all that."
        )
