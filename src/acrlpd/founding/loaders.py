"""Loaders of a whole data set by its path, with the names of the founding design, built on ``ChunkLoader``."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acrlpd.data import sources
from acrlpd.data.loader import ChunkLoader, place
from acrlpd.data.store import windows
from acrlpd.data.store.episodes import EpisodeSource
from acrlpd.data.view.transforms import Compose, Transform
from acrlpd.types import ChunkBatch

PI0_HORIZON = 50  # number of steps that pi0 predicts


class ACRLPDDataLoader(ChunkLoader):
    """A ``ChunkLoader`` over all episodes of a data set in any supported format.

    >>> loader = ACRLPDDataLoader("data/drawer", batch_size=256, horizon_length=5)
    >>> loader.sample_batch().actions.shape
    (256, 5, 4)

    Args:
        data_dir: a path, an object of the ``lerobot`` library, or an open source.
        transform: converts the data set's units to the model's; None returns raw numbers.
        device_placement: ``"auto"`` splits the batches of ``sample_batch`` over all devices of all processes, each of
            which reads its share; ``"none"`` leaves them in the host's memory.
        backup_horizon: see ``ChunkLoader``.
        memory_bytes, num_workers: see ``windows.open_store``.
        source_options: see ``sources.open_episodes``; not allowed with an open source.
    """

    def __init__(
        self,
        data_dir: Any,
        batch_size: int,
        horizon_length: int,
        sequence_ratio: float = 0.5,
        device_placement: Literal["auto", "none"] = "auto",
        *,
        transform: Transform | None = None,
        seed: int = 0,
        backup_horizon: int | None = None,
        memory_bytes: int | None = None,
        num_workers: int = 0,
        **source_options: Any,
    ):
        if device_placement not in ("auto", "none"):
            raise ValueError(f"device_placement must be 'auto' or 'none', got {device_placement!r}")
        if device_placement == "auto" and batch_size % jax.device_count():
            raise ValueError(f"batch_size ({batch_size}) must be a multiple of the {jax.device_count()} devices")
        given = isinstance(data_dir, EpisodeSource)
        if given and source_options:
            raise ValueError(f"give {', '.join(source_options)} to the source itself")
        self.source: EpisodeSource = data_dir if given else self._open(data_dir, num_workers, source_options)
        super().__init__(
            windows.open_store(self.source, memory_bytes=memory_bytes, num_workers=num_workers),
            Compose(()) if transform is None else transform,
            batch_size=batch_size,
            horizon=horizon_length,
            sequence_ratio=sequence_ratio,
            seed=seed,
            backup_horizon=backup_horizon,
            host_index=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        self.next_step = 0  # the next batch of ``sample_batch``; a resumed run sets it to the step where it continues
        self._sharding = None
        if device_placement == "auto":
            self._sharding = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))

    def sample_batch(self) -> ChunkBatch:
        """Return batch ``next_step`` and increment it. Rewards are raw and per step: see ``docs/algorithm.md``."""
        batch = self.batch(self.next_step)
        self.next_step += 1
        return batch if self._sharding is None else place(batch, self._sharding)

    def _open(self, data: Any, num_workers: int, options: dict[str, Any]) -> EpisodeSource:
        return sources.open_episodes(data, num_workers=num_workers, **options)


class LeRobotACRLPDDataLoader(ACRLPDDataLoader):
    """An ``ACRLPDDataLoader`` of a LeRobot dataset: a folder, a ``lerobot`` library object, or a ``LeRobotSource``.

    The default ``horizon_length`` is pi0's.
    """

    def __init__(
        self,
        lerobot_dataset: Any,
        batch_size: int,
        horizon_length: int = PI0_HORIZON,
        sequence_ratio: float = 0.5,
        device_placement: Literal["auto", "none"] = "auto",
        **options: Any,
    ):
        super().__init__(lerobot_dataset, batch_size, horizon_length, sequence_ratio, device_placement, **options)

    def _open(self, data: Any, num_workers: int, options: dict[str, Any]) -> EpisodeSource:
        if (kind := sources.identify(data)) != "lerobot":
            raise ValueError(f"{data}: expected a LeRobot dataset, found {kind} data: use ACRLPDDataLoader")
        return super()._open(data, num_workers, options)


def create_lerobot_acrlpd_dataloader(
    lerobot_dataset: Any, batch_size: int, horizon_length: int, **options: Any
) -> LeRobotACRLPDDataLoader:
    """Return ``LeRobotACRLPDDataLoader(...)``; see there for the options."""
    return LeRobotACRLPDDataLoader(lerobot_dataset, batch_size, horizon_length, **options)
