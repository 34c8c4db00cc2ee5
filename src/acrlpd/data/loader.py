"""Batches of chunks for training, drawn from prior data and, online, from the replay of one's own episodes."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from acrlpd.data import chunks
from acrlpd.data.episodes import EpisodeStore
from acrlpd.data.transforms import Transform, to_observation
from acrlpd.types import ChunkBatch

PREFETCH = 2  # batches made ahead


class ChunkLoader:
    """Batch ``step`` is a pure function of (seed, step, contents of the stores): resuming needs no saved iterator.

    Args:
        sequence_ratio: share of a batch that starts where a full window fits; the rest starts anywhere.
        replay: own episodes, for online batches. Their ids in a batch count on after those of ``prior``.
        online_ratio: share of an online batch that comes from ``replay``, once it has a row (RLPD: half).
    """

    def __init__(
        self,
        prior: EpisodeStore,
        transform: Transform,
        *,
        batch_size: int,
        horizon: int,
        sequence_ratio: float,
        seed: int,
        replay: EpisodeStore | None = None,
        online_ratio: float = 0.5,
    ):
        for name, ratio in (("sequence_ratio", sequence_ratio), ("online_ratio", online_ratio)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {ratio}")
        for name, value, least in (("batch_size", batch_size, 1), ("horizon", horizon, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if prior.num_rows == 0:
            raise ValueError("the prior data is empty: a ChunkLoader needs at least one episode to draw from")
        self._prior = prior
        self._transform = transform
        self._batch_size = batch_size
        self._horizon = horizon
        self._sequence_ratio = sequence_ratio
        self._seed = seed
        self._replay = replay
        self._online_ratio = online_ratio

    def batch(self, step: int, *, online: bool = False) -> ChunkBatch:
        """The batch of one training step, as numpy: replayed chunks first, then prior ones."""
        rng = chunks.step_rng(self._seed, step)
        num_online = round(self._online_ratio * self._batch_size) if online else 0
        if self._replay is None or self._replay.num_rows == 0 or num_online == 0:
            return self._draw(self._prior, rng, self._batch_size)
        replayed = self._draw(self._replay, rng, num_online)
        own_ids = replayed.episode_id + np.int32(self._prior.next_episode_id)
        replayed = dataclasses.replace(replayed, episode_id=own_ids)
        if num_online == self._batch_size:
            return replayed
        # each part passed the transforms on its own, so the two may differ in camera names and picture sizes before
        prior = self._draw(self._prior, rng, self._batch_size - num_online)
        return jax.tree.map(lambda *parts: np.concatenate(parts), replayed, prior)

    def offline_batches(self, start_step: int, stop_step: int) -> Iterator[ChunkBatch]:
        """Batches ``start_step`` to ``stop_step`` (exclusive), made ahead by one background thread.

        The stores must not change meanwhile. An error in the thread is raised here, at the batch it struck.
        """
        ready: queue.Queue[ChunkBatch | BaseException] = queue.Queue(maxsize=PREFETCH)
        stopped = threading.Event()
        worker = threading.Thread(
            target=self._fill, args=(ready, stopped, start_step, stop_step), name="acrlpd-prefetch", daemon=True
        )
        worker.start()
        try:
            for _ in range(start_step, stop_step):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:  # also when the caller leaves early
            stopped.set()
            worker.join()

    def _fill(self, ready: queue.Queue, stopped: threading.Event, start_step: int, stop_step: int) -> None:
        for step in range(start_step, stop_step):
            item: ChunkBatch | BaseException
            try:
                item = self.batch(step)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                item = error
            if not _put(ready, item, stopped) or isinstance(item, BaseException):
                return

    def _draw(self, store: EpisodeStore, rng: np.random.Generator, size: int) -> ChunkBatch:
        rows = chunks.start_rows(store, rng, size, self._horizon, self._sequence_ratio)
        return self._to_batch(chunks.gather(store, rows, self._horizon))

    def _to_batch(self, raw: dict[str, Any]) -> ChunkBatch:
        now = self._transform({key: raw[key] for key in ("state", "actions", "image", "prompt")})
        after = self._transform({"state": raw["next_state"], "image": raw["next_image"], "prompt": raw["prompt"]})
        return ChunkBatch(
            observations=to_observation(now),
            actions=np.asarray(now["actions"], np.float32),
            rewards=raw["rewards"],
            terminals=raw["terminals"],
            valid=raw["valid"],
            next_observations=to_observation(after),
            bootstrap_mask=raw["bootstrap_mask"],
            sequence_mask=raw["sequence_mask"],
            episode_id=raw["episode_id"].astype(np.int32),
            step_id=raw["step_id"].astype(np.int32),
        )


ACRLPDDataLoader = ChunkLoader  # its name in the founding design


def _put(ready: queue.Queue, item: ChunkBatch | BaseException, stopped: threading.Event) -> bool:
    """Waits for room, but not for a caller who left."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
