"""Detection of episodes without an instruction: a language policy learns nothing from them, or confuses tasks."""

from __future__ import annotations

import dataclasses

from acrlpd.data.sources import Dataset
from acrlpd.data.store.episodes import task_runs

CURE = "set it with default_task (--data.default_task TEXT in a run, --default-task TEXT in acrlpd data)"
SHOWN = 4  # max number of tasks in a message


@dataclasses.dataclass(frozen=True)
class Untold:
    """The facts about episodes in which some step has no instruction."""

    episodes: int
    total: int  # episodes of the data set
    example: str  # the source of one such episode
    tasks: tuple[str, ...]  # descriptions that distinguish their tasks

    @property
    def is_shared(self) -> bool:
        """Return whether several tasks would have the same empty text."""
        return len(self.tasks) > 1

    @property
    def told(self) -> str:
        some = (
            "no episode has an instruction"
            if self.episodes == self.total
            else (f"{self.episodes} of {self.total} episodes have no instruction, {self.example} among them")
        )
        if not self.is_shared:
            return f"{some}: an empty text tells a policy that reads language (pi0, pi05) nothing; {CURE}."
        shown = ", ".join(self.tasks[:SHOWN]) + (", ..." if len(self.tasks) > SHOWN else "")
        return (
            f"{some}; they belong to {len(self.tasks)} tasks ({shown}), which a policy that reads language (pi0, pi05) "
            "could not tell apart, so it is not trained on them. Write each task's text into the files or, if one text "
            f"fits all, {CURE}."
        )


def untold(dataset: Dataset) -> Untold | None:
    """Return the facts about the episodes without an instruction; None if there are none."""
    infos = map(dataset.info, range(dataset.num_episodes))
    silent = [info for info in infos if not all(text.strip() for _, text in task_runs(info))]
    if not silent:
        return None
    return Untold(len(silent), dataset.num_episodes, silent[0].source, tuple(dataset.untold_tasks))
