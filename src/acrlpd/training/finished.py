"""Find out whether resuming a run would change anything, without its data or environments."""

from __future__ import annotations

from collections.abc import Collection

from acrlpd.config import TrainConfig
from acrlpd.data.replay import ReplayJournal
from acrlpd.training import ending, resuming
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, DamagedCheckpoint
from acrlpd.training.ending import Ended
from acrlpd.training.loading import load_stored
from acrlpd.training.run import Progress, RunFiles, run_files


def nothing_left(config: TrainConfig, *, override: Collection[str] = ()) -> Ended | None:
    """Return why the run of ``config`` ended, if it is over and all that it has written is intact; else None.

    Raises:
        ValueError: the run cannot be resumed with this configuration.
    """
    files = run_files(config)
    if not files.summary.is_file() or not files.checkpoints.is_dir():
        return None
    resuming.claim_directory(config, files, resume=True, override=override)
    manager = ACRLPDCheckpointManager(files.checkpoints)
    try:
        newest = max(manager.steps(), default=0)
        progress = Progress(**manager.read_run(newest)["progress"])
        ended = ending.is_over(config, progress, newest)
        if ended is None or load_stored(files.checkpoints / str(newest)).step != newest:
            return None
    except (DamagedCheckpoint, KeyError, TypeError):  # resuming falls back to an older one, and says so
        return None
    is_whole = ending.known_summary(files, progress, newest) is not None and _has_episodes(files, progress)
    return ended if is_whole else None


def _has_episodes(files: RunFiles, progress: Progress) -> bool:
    if not progress.next_episode:
        return True
    return files.replay.is_dir() and len(list(ReplayJournal(files.replay).load())) >= progress.next_episode
