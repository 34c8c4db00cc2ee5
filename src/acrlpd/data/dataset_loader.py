"""Batches from a whole data set, by its path: the loaders of the founding design, on the machinery of all others."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acrlpd.data import sources, windows
from acrlpd.data.episodes import EpisodeSource
from acrlpd.data.loader import ChunkLoader, place
from acrlpd.data.transforms import Compose, Transform
from acrlpd.types import ChunkBatch

PI0_HORIZON = 50  # steps that pi0 predicts


class ACRLPDDataLoader(ChunkLoader):
    """A ``ChunkLoader`` of all episodes of a data set in any format we read.

    >>> loader = ACRLPDDataLoader("data/drawer", batch_size=256, horizon_length=5)
    >>> loader.sample_batch().actions.shape
    (256, 5, 4)

    Args:
        data_dir: a path, an object of the ``lerobot`` library, or an open source.
        transform: from the data set's units to the model's; None hands out raw numbers.
        device_placement: ``"auto"`` splits the batches of ``sample_batch`` over all devices of all processes, each of
            which reads its share; ``"none"`` leaves them in the host's memory.
        memory_bytes, num_workers: see ``windows.open_store``.
        source_options: see ``sources.open_episodes``; not together with a source.
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
            host_index=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        self.next_step = 0  # of ``sample_batch``; a resumed run sets it to the step it goes on with
        self._sharding = None
        if device_placement == "auto":
            self._sharding = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))

    def sample_batch(self) -> ChunkBatch:
        """The batch of ``next_step``, which goes up by one. Rewards are raw, per step: see ``docs/algorithm.md``."""
        batch = self.batch(self.next_step)
        self.next_step += 1
        return batch if self._sharding is None else place(batch, self._sharding)

    def _open(self, data: Any, num_workers: int, options: dict[str, Any]) -> EpisodeSource:
        return sources.open_episodes(data, num_workers=num_workers, **options)


class LeRobotACRLPDDataLoader(ACRLPDDataLoader):
    """The same for a LeRobot dataset: a folder, an object of the ``lerobot`` library, or a ``LeRobotSource``.

    ``horizon_length`` is pi0's, unless another one is given.
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
    """Another way to say ``LeRobotACRLPDDataLoader(...)``, which has the options."""
    return LeRobotACRLPDDataLoader(lerobot_dataset, batch_size, horizon_length, **options)
