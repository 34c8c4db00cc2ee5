"""Fingerprints of prior data, so that a resumed run notices if its data was exchanged."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Sequence

import numpy as np

from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.training import checksum

SAMPLED_ROWS = 4096  # spread evenly, or all if there are fewer; reading them takes a moment even from large data


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Sizes and a checksum of prior data, saved with every checkpoint."""

    episodes: int
    steps: int
    checksum: int  # of the episodes' names, lengths, tasks and outcomes, the cameras, and numbers of sampled rows

    def __str__(self) -> str:
        return f"{self.episodes} episodes with {self.steps} steps"


def fingerprint(stores: Sequence[EpisodeStore]) -> Fingerprint:
    """Return the fingerprint of all data sets, which does not depend on where files are or how they are read."""
    total = 0
    for store in stores:
        total = _sum(store, total)
    episodes, steps = (sum(getattr(store, name) for store in stores) for name in ("num_episodes", "num_rows"))
    return Fingerprint(episodes, steps, total)


def _sum(store: EpisodeStore, total: int) -> int:
    infos = [store.info(index) for index in range(store.num_episodes)]
    told = [[os.path.basename(info.source), info.length, info.task, info.task_changes, info.success] for info in infos]
    total = checksum.of_text([total, sorted(store.cameras), told])
    rows = np.unique(np.linspace(0, store.num_rows - 1, min(store.num_rows, SAMPLED_ROWS)).astype(np.int64))
    for column in (store.state, store.actions, store.rewards, store.terminals):
        total = zlib.crc32(np.asarray(column[rows], np.float32).tobytes(), total)
    return total
