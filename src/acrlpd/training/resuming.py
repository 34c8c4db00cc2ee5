"""Whether a run may use its folder, and where in it it goes on: nothing is mixed, and nothing is lost unasked."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Collection

from acrlpd.agents.acrlpd import ACRLPDAgent
from acrlpd.config import TrainConfig, from_dict, to_dict
from acrlpd.data.normalize import NormStats
from acrlpd.data.replay import ReplayJournal
from acrlpd.overrides import differences
from acrlpd.training.checkpoint import DAMAGED, ACRLPDCheckpointManager, DamagedCheckpoint
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
"""Fields that say how long a run goes, where and what it reports, not what it computes."""


def claim_directory(config: TrainConfig, files: RunFiles, *, resume: bool, override: Collection[str] = ()) -> None:
    """Refuses to mix two runs in one folder, and to resume one with other values where ``override`` names no such."""
    if not files.config.exists():
        return
    if not resume:
        raise ValueError(
            f"run directory {files.directory} already exists. Use --resume to go on with it, --overwrite to delete it, "
            "or another --name."
        )
    before = to_dict(from_dict(TrainConfig, json.loads(files.config.read_text(encoding="utf-8"))))
    lines = differences(before, to_dict(config))
    changed = [line for line in lines if not _may_change(line.split(":")[0], (*CHANGEABLE, *override))]
    if override and lines:
        logger.warning("%s goes on with other values:\n  %s", files.directory, "\n  ".join(lines))
    if changed:
        raise ValueError(
            f"{files.directory} was started with another configuration, so it cannot be resumed with this one:\n  "
            + "\n  ".join(changed)
            + "\nResume with the old values, or say --override to go on with the new ones (--override_lr_schedule: "
            "those of the learning rates alone)."
        )


def _may_change(field: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def resume_from(
    files: RunFiles, checkpoints: ACRLPDCheckpointManager, template: ACRLPDAgent, from_step: int | None
) -> tuple[ACRLPDAgent, Progress, dict[str, NormStats]]:
    """What the newest whole checkpoint holds, or exactly that of ``from_step``.

    Only then are later ones deleted, and episodes that were made after that step set aside.
    """
    if from_step is None:
        restored = checkpoints.restore_newest(template)
    else:
        try:
            restored = checkpoints.restore(template, from_step)
        except DamagedCheckpoint as error:
            others = [step for step in checkpoints.steps() if step != from_step]
            raise ValueError(f"{error}. Nothing was changed; the other steps there are: {others}") from error
    progress = Progress(**restored.run["progress"])
    if from_step is not None:
        if files.replay.is_dir():
            ReplayJournal(files.replay).set_aside_from(progress.next_episode)
        checkpoints.discard_after(from_step)
    logger.info("resumed at update %d", restored.step)
    return restored.agent, progress, restored.norm_stats


def check_nothing_was_learned(config: TrainConfig, files: RunFiles, checkpoints: ACRLPDCheckpointManager) -> None:
    """Refuses to start at step 0 in the folder of a run that had come further. One killed before its first checkpoint
    starts over; if it has no offline phase, with the episodes it has made."""
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
