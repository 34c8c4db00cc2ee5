"""A mixture of data sets: the batches of one run are drawn from each of them by its share.

Every set keeps its own store, so one may be mapped while another is read from videos, and their pictures may differ in
size: only the transforms make rows alike. The sets must agree on the dimensions that determine a model's sizes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from acrlpd.data import chunks
from acrlpd.data.sources import Dataset
from acrlpd.data.store.episodes import EpisodeStore


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts on which data sets of one run must agree. Different rates are allowed; unknown robots are ignored."""

    name: str
    state: int  # dimensions
    actions: int
    cameras: tuple[str, ...]
    fps: float | None = None
    robot: str | None = None

    @classmethod
    def of(cls, source: Dataset, name: str) -> Facts:
        state, actions = (source.window(0, key, 0, 1).shape[1] for key in ("state", "actions"))
        robot = getattr(source, "robot_type", None)  # only LeRobot has it
        return cls(name, state, actions, source.cameras, source.fps, robot)


def check_alike(sets: Sequence[Facts], *, of_one_robot: bool = False) -> None:
    """Refuse sets that do not fit into one batch, and warn of different rates.

    Statistics are computed over all sets together, which makes no sense for different robots. With ``of_one_robot``
    the user says that it is one robot, whose transform gives the cameras their names.
    """
    for each in sets[1:]:
        if found := list(_differences(sets[0], each, of_one_robot)):
            raise ValueError(
                f"{sets[0].name} and {each.name} cannot be trained on together: {'; '.join(found)}. Choose what they "
                "have in common (state_keys, action_keys and cameras, of each in data.sources of a --config file), or "
                "train on one of them"
            )
        if None not in (each.fps, sets[0].fps) and each.fps != sets[0].fps:
            warnings.warn(
                f"{sets[0].name} has {sets[0].fps:g} steps a second and {each.name} {each.fps:g}: chunks of one last "
                "longer than those of the other",
                stacklevel=2,
            )


def _differences(one: Facts, other: Facts, of_one_robot: bool) -> Iterator[str]:
    pairs: dict[str, tuple[Any, Any]] = {
        "state dimensions": (one.state, other.state),
        "action dimensions": (one.actions, other.actions),
    }
    if not of_one_robot:
        pairs["cameras"] = (_told(one.cameras), _told(other.cameras))
    if not of_one_robot and None not in (one.robot, other.robot):
        pairs["robots (a run normalizes by the statistics of one)"] = (one.robot, other.robot)
    yield from (f"{name}: {first} and {second}" for name, (first, second) in pairs.items() if first != second)


def _told(cameras: Sequence[str]) -> str:
    return ", ".join(sorted(cameras)) or "none"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several stores. Episodes are numbered over all of them."""

    stores: tuple[EpisodeStore, ...]
    names: tuple[str, ...] = ("",)
    weights: tuple[float, ...] | None = None  # None: every row of all stores is equally likely

    @classmethod
    def of(cls, data: EpisodeStore | Mixture) -> Mixture:
        return data if isinstance(data, Mixture) else cls((data,))

    @property
    def shares(self) -> tuple[float, ...]:
        """Each store's share of the rows that are drawn; the sum is 1."""
        weights = np.array([store.num_rows for store in self.stores] if self.weights is None else self.weights)
        return tuple((weights / max(weights.sum(), 1e-300)).tolist())

    @property
    def num_rows(self) -> int:
        return sum(store.num_rows for store in self.stores)

    @property
    def first_ids(self) -> tuple[int, ...]:
        """The first episode id of each store, and the first one that is free for other episodes."""
        return (0, *np.cumsum([store.next_episode_id for store in self.stores]).tolist())

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras of the first store, before any transform."""
        return self.stores[0].cameras

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [each for store in self.stores for each in store.skipped]

    @property
    def hit_rate(self) -> float | None:
        """The share of pictures found in memory, averaged over the sets whose rows are read; None if there are none."""
        rates = [store.reader.hit_rate for store in self.stores if store.reader is not None]
        return sum(rates) / len(rates) if rates else None

    def close(self) -> None:
        """Stop the processes that read rows."""
        for store in self.stores:
            if store.reader is not None:
                store.reader.close()

    def start_rows(
        self, rng: np.random.Generator, batch_size: int, horizon: int, sequence_ratio: float
    ) -> list[Int[np.ndarray, " n"]]:
        """Draw the rows of each store at which chunks start, ``batch_size`` in total; see ``chunks.start_rows``."""
        if len(self.stores) == 1:
            return [chunks.start_rows(self.stores[0], rng, batch_size, horizon, sequence_ratio)]
        num_full = round(sequence_ratio * batch_size)
        counts = [rng.multinomial(number, self.shares) for number in (num_full, batch_size - num_full)]
        return [
            chunks.draw_starts(store, rng, horizon, num_full=int(full), num_anywhere=int(anywhere))
            for store, full, anywhere in zip(self.stores, *counts, strict=True)
        ]

    def contents(self) -> dict[str, Any]:
        """Return the ``episodes`` and ``steps`` used, the ones ``skipped``, and if there are several ``sets``, each."""
        sets = [
            {"name": name, "share": share, "episodes": store.num_episodes, "steps": store.num_rows}
            for name, share, store in zip(self.names, self.shares, self.stores, strict=True)
        ]
        found = {
            "episodes": sum(store.num_episodes for store in self.stores),
            "steps": self.num_rows,
            "skipped": [list(each) for each in self.skipped],
        }
        return found | ({"sets": sets} if len(sets) > 1 else {})
