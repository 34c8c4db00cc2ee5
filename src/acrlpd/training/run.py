"""What a run consists of while it trains: its state and its progress, its online episodes, and its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig
from acrlpd.data.replay import ReplayJournal
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.envs.rollout import OnlineCollector, Rollout
from acrlpd.files import written_whole
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.metrics import write_json


@dataclasses.dataclass
class Progress:
    """The progress of a run, saved with every checkpoint. The number of updates is the agent's step."""

    env_steps: int = 0  # all environment steps executed so far
    lost_steps: int = 0  # those in episodes that a stop cut short; they are executed again
    finished: list[str] = dataclasses.field(default_factory=list)  # phases
    results: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # "bc", "offline", "online"
    best_success: float = -1.0
    evaluations_since_best: int = 0
    best_step: int | None = None  # the step of the checkpoint that is kept as the best
    best_step_success: float = -1.0
    best_step_error: float | None = None  # the action error on held-out episodes by which it was chosen, if it was
    evaluated_step: int | None = None  # the step of the newest evaluation on the way
    offline_outcomes: dict[str, bool] = dataclasses.field(default_factory=dict)  # by seed, at the end of that phase
    rollbacks: int = 0
    lost_episodes: int = 0  # online episodes whose worker died or hung, or whose reset failed
    next_episode: int = 0  # the next number in the journal, which held only smaller ones at this moment
    journal_episodes: int = 0  # the number of episodes in the journal at this moment
    wall_s: float = 0.0
    cpu_s: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def counted_steps(self) -> int:
        """The steps that count towards ``online_steps``: those of episodes in the journal or in progress."""
        return self.env_steps - self.lost_steps

    @property
    def best_score(self) -> dict[str, float]:
        """The number by which the best checkpoint was chosen, with its name."""
        if self.best_step_error is not None:
            return {"action_error": self.best_step_error}
        return {"success": self.best_step_success}

    def count_from(self, journal_steps: int) -> None:
        """Count only the steps that the journal holds; the others were lost with their episodes."""
        self.env_steps = max(self.env_steps, self.lost_steps + journal_steps)
        self.lost_steps = self.env_steps - journal_steps

    def count_online_evaluation(self, success: float) -> None:
        """Count the evaluations since the best one, by which early stopping decides."""
        is_better = success > self.best_success
        self.best_success = max(success, self.best_success)
        self.evaluations_since_best = 0 if is_better else self.evaluations_since_best + 1


@dataclasses.dataclass
class RunState:
    """What changes while a run trains."""

    config: TrainConfig  # the run's own; a shortage of memory changes how its updates are computed
    agent: ACRLPDAgent
    progress: Progress
    step: int = dataclasses.field(init=False)  # that of the agent, known without waiting for the device

    def __post_init__(self) -> None:
        self.step = int(self.agent.step)

    def replace_agent(self, agent: ACRLPDAgent) -> None:
        """Go on with an agent that was saved, or a fresh one."""
        self.agent, self.step = agent, int(agent.step)


@dataclasses.dataclass(frozen=True)
class Interaction:
    """The online side of a run: the collector that makes episodes, and the journal and replay that keep them."""

    collector: OnlineCollector
    journal: ReplayJournal
    replay: EpisodeStore

    def keep(self, finished: Rollout) -> None:
        """Check an episode, then store it in the journal and the replay, so every episode that is used is on disk."""
        self.replay.checked(finished.episode)
        self.journal.append(finished.episode, {"seed": finished.seed, "episode": finished.number})
        self.replay.append(finished.episode)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files that a run writes, under ``run_dir/name``."""

    directory: Path

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        """The updates that were skipped, with the episodes in their batches."""
        return self.directory / "skipped_updates.jsonl"

    @property
    def summary(self) -> Path:
        return self.directory / "summary.json"

    @property
    def best(self) -> Path:
        """The step and score of the best evaluation on the way; its checkpoint is kept."""
        return self.directory / "best.json"

    def write_best(self, progress: Progress) -> None:
        write_json(self.best, {"step": progress.best_step} | progress.best_score)

    @property
    def config(self) -> Path:
        return self.directory / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def replay(self) -> Path:
        return self.directory / "replay"

    @property
    def full_evaluation(self) -> Path:
        """The results of ``acrlpd eval --full``."""
        return self.directory / "evaluations" / "full.json"

    @property
    def offline_evaluation(self) -> Path:
        """The results of ``acrlpd eval --data``, or of the last evaluation of a run without a simulator."""
        return self.directory / "evaluations" / "held_out.json"

    @property
    def held_out_pictures(self) -> Path:
        """A few frames of the episode that the last offline evaluation followed."""
        return self.directory / "evaluations" / "held_out_pictures.npz"

    @property
    def videos(self) -> Path:
        return self.directory / "videos"

    def evaluation(self, policy: str) -> Path:
        """Seeds, outcomes and executed actions of an evaluation at the end of a phase."""
        return self.directory / "evaluations" / f"{policy}.npz"


def run_files(config: TrainConfig) -> RunFiles:
    """Return the files of the run that ``config`` describes."""
    name = config.name
    if name in ("", ".", "..") or not name.isprintable() or any(separator in name for separator in "/\\"):
        raise ValueError(
            f"name {name!r}: expected the name of one folder below run_dir, without separators or control characters"
        )
    return RunFiles(Path(config.run_dir) / name)


def settle_best(progress: Progress, earlier: Progress, checkpoints: ACRLPDCheckpointManager, files: RunFiles) -> None:
    """Fall back to the best of ``earlier``, else to none, if the best checkpoint is missing; rewrite ``best.json``."""
    for known in (progress, earlier, Progress()):
        if known.best_step is None or known.best_step in checkpoints.steps():
            break
    checkpoints.release(progress.best_step)
    for name in ("best_step", "best_step_success", "best_step_error"):
        setattr(progress, name, getattr(known, name))
    if progress.best_step is None:
        files.best.unlink(missing_ok=True)
    else:
        checkpoints.keep.add(progress.best_step)
        files.write_best(progress)


def save_rollouts(path: Path, rollouts: list[Rollout]) -> None:
    """Save outcomes and executed actions, from which an episode can be replayed with pictures."""
    longest = max(each.length for each in rollouts)
    actions = np.zeros((len(rollouts), longest, rollouts[0].episode.actions.shape[1]), np.float32)
    for row, each in zip(actions, rollouts, strict=True):
        row[: each.length] = each.episode.actions
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        np.savez_compressed(
            temporary,
            seed=[each.seed for each in rollouts],
            success=[each.success for each in rollouts],
            length=[each.length for each in rollouts],
            actions=actions,
        )
