"""``--overwrite``: the old run is set aside first, and deleted when the new one's first checkpoint is on disk.

If the new run does not start, the old one gets its name back. A process that is killed in between leaves the old one as
``NAME.overwritten``, and the next command on that run says so. Only runs are set aside, and never what the new run
reads.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from acrlpd import files
from acrlpd.config import TrainConfig
from acrlpd.named_code import names_code
from acrlpd.training.guards import LOCK_FILE, RunLock
from acrlpd.training.run import RunFiles

logger = logging.getLogger(__name__)

OURS = {
    *("config.json", "metrics.jsonl", "skipped_updates.jsonl", "summary.json", "best.json", "report.html", LOCK_FILE),
    *("checkpoints", "replay", "prior", "evaluations", "videos", "tensorboard", "wandb", "wandb.json"),
}
"""Names that a run's folder may hold. Any other name is somebody's own, and then the folder is not deleted."""

READ = ("data.path", "data.norm_stats", "data.frame_cache", "policy.weights", "policy.tokenizer")
"""Fields that name files or folders which a run reads. ``data.sources`` have those of ``data``; an environment's name
and that of an extraction may name a file, too."""


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A run that was set aside for a new one of its name."""

    directory: Path
    aside: Path
    lock: RunLock  # the old run's, so that nobody resumes it meanwhile

    def put_back(self) -> None:
        """Give the old run its name back; what exists of the new run is deleted."""
        if os.path.lexists(self.directory):
            files.discard(self.directory)
        self.aside.rename(self.directory)
        self.lock.release()
        logger.warning("the new run did not start; the old one is in %s as it was", self.directory)

    def delete(self) -> None:
        files.discard(self.aside)
        self.lock.release()

    def say_if_kept(self) -> None:
        """Log where the old run is, if the new one has no checkpoint yet."""
        if self.aside.exists():
            logger.warning("the new run has no checkpoint yet, so the old one is kept: %s", self.aside)
        self.lock.release()


def set_aside(config: TrainConfig, run: RunFiles) -> Replaced | None:
    """Move the run that is in the way of a new one to a name beside it; return None if there is none.

    Raises:
        ValueError: it is not a run, it is in use, or the new run reads from it. Nothing was changed.
    """
    directory = run.directory
    if not os.path.lexists(directory):
        return None
    names = _checked_names(directory)
    if not names - {LOCK_FILE}:
        return None
    _check_config(run)
    for field, path in _read_inside(config, directory):
        raise ValueError(
            f"{field} ({path}) lies in {directory}, which --overwrite would delete: choose another --name, or "
            "move what is to be read to another folder"
        )
    lock = RunLock(directory)
    aside = files.set_aside(directory)
    logger.info("the old run is set aside as %s until the new one has a checkpoint", aside)
    return Replaced(directory, aside, lock)


def tell_of_set_aside(path: Path) -> None:
    """Warn of runs that were set aside for one in ``path``, or in a folder that contains ``path``."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents[:2]):
        for aside in files.those_set_aside(folder):
            logger.warning(
                "%s holds the run that --overwrite set aside for a new one in %s: resume it there, rename or delete it",
                *(aside, folder),
            )


def _checked_names(directory: Path) -> set[str]:
    if directory.is_symlink() or not directory.is_dir():
        kind = f"a link to {os.readlink(directory)}" if directory.is_symlink() else "no folder"
        raise ValueError(f"{directory} is {kind}, and --overwrite deletes only runs: choose another --name")
    names = {path.name for path in directory.iterdir() if not files.is_temporary(path)}
    foreign = sorted(names - OURS)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"{directory} holds {', '.join(foreign[:3])}{more}, which no run makes, and --overwrite deletes only "
            "runs: move that away, or choose another --name"
        )
    return names


def _check_config(run: RunFiles) -> None:
    """Refuse a folder whose ``config.json`` belongs to another program; a damaged file is not a reason."""
    try:
        stored = files.read_json(run.config, object, allow_nan=True)
    except (OSError, ValueError):
        return
    if stored and not (isinstance(stored, dict) and {"policy", "agent", "data"} <= stored.keys()):
        raise ValueError(
            f"{run.config} is not the configuration of a run, and --overwrite deletes only runs: choose another --name"
        )


def _read_inside(config: TrainConfig, directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the fields of ``config`` that name something in ``directory``, and what they name."""
    folder = directory.resolve()
    for field, path in _read(config):
        if Path(path).resolve().is_relative_to(folder):
            yield field, path


def _read(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield the fields of ``config`` that name files or folders, and what they name."""
    for field in READ:
        part, name = field.split(".")
        value = getattr(getattr(config, part), name)
        for path in [value] if isinstance(value, str) else value or ():
            yield field, path
    for each in config.data.sources:
        yield "data.sources", each.path
        if each.frame_cache is not None:
            yield "data.sources", each.frame_cache
    if config.env is not None and config.env.name.startswith("custom/"):
        yield "env.name", config.env.name.removeprefix("custom/").rpartition(":")[0]
    if names_code(config.agent.extraction):
        yield "agent.extraction", config.agent.extraction.rpartition(":")[0]
