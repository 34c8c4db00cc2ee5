"""Training batches of chunks, drawn from prior data and, online, from the replay of the run's own episodes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Int

from acrlpd.data import chunks
from acrlpd.data.mixture import Mixture
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.transforms import Transform, to_observation
from acrlpd.types import ChunkBatch, Observation


class PrefixRows(Protocol):
    """The outputs of a frozen policy for the rows of a store."""

    def take(self, rows: Int[np.ndarray, " b"]) -> Any:
        """Return a pytree of arrays with leading axis b."""
        ...


def _check_shares(**shares: float | None) -> None:
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} is a share and must lie in [0, 1], got {share}")


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The rows of one store at which chunks of a batch start."""

    store: EpisodeStore
    rows: Int[np.ndarray, " n"]
    first_id: int  # added to the ids of its episodes
    prefixes: PrefixRows | None  # in place of the images of the first observations
    next_prefixes: PrefixRows | None


class ChunkLoader:
    """A loader whose batch ``step`` is a pure function of (seed, step, stores): resuming needs no saved iterator.

    A thread makes the next batches of prior data ahead. Online batches depend on episodes that may still be collected,
    so they are made on demand. The processes of ``windows.open_store`` read and decode what is not in memory. Programs
    that are built on Grain get the same batches from ``grain_batches``.

    Args:
        horizon: steps of a chunk, as the policy predicts them.
        backup_horizon: steps of a chunk after which comes the next observation, as a TD target looks ahead; by default
            all.
        sequence_ratio: share of a batch that starts where a full window fits; the rest starts anywhere.
        replay: the run's own episodes, for online batches. Their ids in a batch follow those of ``prior``.
        online_ratio: share of an online batch that comes from ``replay``, once it has a row (RLPD: half). None: every
            row of both is as likely as any other (QC).
        online_ratio_episodes: own episodes with which ``online_ratio`` is reached; before, the share grows with them.
        ends_in_chunks: whether chunks that a terminal cuts short count in the TD loss; QC drops them.
        prefetch: number of batches made ahead; 0 makes each one on demand.
        prior: recorded episodes; a ``Mixture`` draws from several sets by their shares.
        prefixes: stored prefixes of each store of ``prior``; offline batches then have them instead of images. Online
            batches cannot, because there are no stored prefixes of the replay.
        features: the part of the prefixes that critics read, for batches that only train critics.
        next_features: the same part, for the next observations of all offline batches: enough where the target is
            implicit. Without it, next observations get ``prefixes``.
        next_actions: whether batches that only train critics have the data's next chunks.
        host_index, num_hosts: this process makes its slice of each batch, the ``host_index``-th of ``num_hosts`` equal
            ones; together they are the batch that one process would make. ``batch_size`` is the size of the whole.
    """

    def __init__(
        self,
        prior: EpisodeStore | Mixture,
        transform: Transform,
        *,
        batch_size: int,
        horizon: int,
        sequence_ratio: float,
        seed: int,
        backup_horizon: int | None = None,
        replay: EpisodeStore | None = None,
        online_ratio: float | None = 0.5,
        online_ratio_episodes: int = 1,
        ends_in_chunks: bool = True,
        prefetch: int = 2,
        prefixes: Sequence[PrefixRows] | None = None,
        features: Sequence[PrefixRows] | None = None,
        next_features: Sequence[PrefixRows] | None = None,
        next_actions: bool = True,
        host_index: int = 0,
        num_hosts: int = 1,
    ):
        _check_shares(sequence_ratio=sequence_ratio, online_ratio=online_ratio)
        _check_at_least(1, batch_size=batch_size, horizon=horizon, online_ratio_episodes=online_ratio_episodes)
        _check_at_least(0, seed=seed, prefetch=prefetch)
        if backup_horizon is not None and not 1 <= backup_horizon <= horizon:
            raise ValueError(f"backup_horizon must lie between 1 and horizon ({horizon}), got {backup_horizon}")
        if not 0 <= host_index < num_hosts or batch_size % num_hosts:
            raise ValueError(
                f"host_index ({host_index}) must lie in 0..num_hosts-1, and num_hosts ({num_hosts}) must divide "
                f"batch_size ({batch_size})"
            )
        self._prior = Mixture.of(prior)
        if not all(store.num_rows for store in self._prior.stores):
            raise ValueError("the prior data is empty: a ChunkLoader needs at least one episode to draw from")
        self._transform = transform
        self._batch_size = batch_size
        self._horizon = horizon
        self._backup_horizon = horizon if backup_horizon is None else backup_horizon
        self._sequence_ratio = float(sequence_ratio)
        self._seed = seed
        self._replay = replay
        self._online_ratio = online_ratio
        self._online_ratio_episodes = online_ratio_episodes
        self._ends_in_chunks = ends_in_chunks
        self._prefetch = prefetch
        self._prefixes = prefixes
        self._features = features
        self._next_prefixes = next_features or prefixes
        self._next_actions = next_actions
        self._ahead: dict[tuple[int, bool], Future[ChunkBatch]] = {}  # by step and critic_alone
        self._thread: ThreadPoolExecutor | None = None
        self._slice_size = batch_size // num_hosts
        self._slice_start = host_index * self._slice_size
        self._counters = _Counters()

    def batch(self, step: int, *, online: bool = False, critic_alone: bool = False) -> ChunkBatch:
        """Return the batch of a training step as numpy, replayed chunks first. Only one caller may ask at a time.

        ``critic_alone`` adds ``next_actions``, the chunk that follows each one in the data, unless the loader was made
        without them. ``chunks.gather_next`` says which chunks then stay out of the TD loss.
        """
        started = time.perf_counter()
        if online or not self._prefetch:
            self._forget()
            batch = self._make(step, online=online, critic_alone=critic_alone)
        else:
            batch = self._made_ahead(step, critic_alone)
        self._counters.waited(time.perf_counter() - started)
        return batch

    def _made_ahead(self, step: int, critic_alone: bool) -> ChunkBatch:
        """Return batch ``step`` and start preparing the next ones. A batch's error is raised when it is asked for."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="acrlpd-prefetch")
        wanted = [(coming, critic_alone) for coming in range(step, step + 1 + self._prefetch)]
        self._forget(wanted)
        for each in wanted:
            if each not in self._ahead:
                self._ahead[each] = self._thread.submit(self._make, each[0], online=False, critic_alone=critic_alone)
        return self._ahead.pop(wanted[0]).result()

    def _forget(self, but: Container[tuple[int, bool]] = ()) -> None:
        for each in [each for each in self._ahead if each not in but]:
            self._ahead.pop(each).cancel()

    def _make(self, step: int, *, online: bool, critic_alone: bool) -> ChunkBatch:
        started = time.perf_counter()
        rng = chunks.step_rng(self._seed, step)
        replay_size = self._replay_size(rng) if online else 0
        *first_ids, own_ids = self._prior.first_ids
        drawn: list[_Drawn] = []
        if self._replay is not None and replay_size:
            rows = chunks.start_rows(self._replay, rng, replay_size, self._horizon, self._sequence_ratio)
            drawn.append(_Drawn(self._replay, rows, own_ids, None, None))
        if prior_size := self._batch_size - replay_size:
            offline = (self._features, self._features) if critic_alone else (self._prefixes, self._next_prefixes)
            nothing = (None,) * len(first_ids)
            now, after = (nothing if online else each or nothing for each in offline)
            rows_of = self._prior.start_rows(rng, prior_size, self._horizon, self._sequence_ratio)
            drawn += map(_Drawn, self._prior.stores, rows_of, first_ids, now, after)
        parts = [self._read(own, critic_alone=critic_alone) for own in self._own_slice(drawn)]
        # the transforms ran on each part alone, so camera names and picture sizes may differ in the stores
        batch = parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        self._counters.count(batch, time.perf_counter() - started)
        return batch

    def _replay_size(self, rng: np.random.Generator) -> int:
        """Return how many chunks of an online batch come from replay."""
        if self._replay is None or self._replay.num_rows == 0:
            return 0
        if self._online_ratio is None:
            share = self._replay.num_rows / (self._replay.num_rows + self._prior.num_rows)
            return int(rng.binomial(self._batch_size, share))
        if self._replay.num_episodes >= self._online_ratio_episodes:
            return round(self._online_ratio * self._batch_size)
        share = self._online_ratio * self._replay.num_episodes / self._online_ratio_episodes
        return int(share * self._batch_size + rng.random())  # rounded at random: right on average

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras of the prior data, before any transform."""
        return self._prior.cameras

    def stats(self) -> dict[str, float]:
        """Return statistics of all batches so far.

        ``batches`` is their number; ``batches_per_s`` is the rate at which they can be made; ``valid_ratio`` is the
        share of real steps; ``wait_s`` is the mean time that a caller waited for a batch; ``skipped_episodes`` counts
        those of the prior data; and ``cache_hit_rate`` is there if rows are read from their source.
        """
        hit_rate = self._prior.hit_rate
        found = self._counters.summary() | {"skipped_episodes": len(self._prior.skipped)}
        return found | ({} if hit_rate is None else {"cache_hit_rate": hit_rate})

    def contents(self) -> dict[str, Any]:
        """Describe the prior data: ``episodes`` and ``steps`` used, and name and fault of each one ``skipped``.

        If there are several ``sets``, these have the name, share, episodes and steps of each.
        """
        return self._prior.contents()

    def close(self) -> None:
        """Stop the thread, and the processes that read rows from their source."""
        self._forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._prior.close()

    def _own_slice(self, drawn: Iterable[_Drawn]) -> Iterator[_Drawn]:
        """Yield this host's slice of the batch that results from concatenating ``drawn``."""
        start, stop = self._slice_start, self._slice_start + self._slice_size
        for each in drawn:
            own = each.rows[max(start, 0) : max(stop, 0)]
            start, stop = start - len(each.rows), stop - len(each.rows)
            if len(own):
                yield dataclasses.replace(each, rows=own)

    def _read(self, drawn: _Drawn, *, critic_alone: bool) -> ChunkBatch:
        store, now, after = drawn.store, drawn.prefixes, drawn.next_prefixes
        windows: dict[str, Any] = {
            "horizon": self._horizon,
            "backup_horizon": self._backup_horizon,
            "ends_in_chunks": self._ends_in_chunks,
        }
        raw = chunks.gather(store, drawn.rows, images=now is None, next_images=after is None, **windows)
        raw["episode_id"] = raw["episode_id"] + drawn.first_id
        if critic_alone and self._next_actions:
            raw |= chunks.gather_next(store, raw, **windows)
        batch = self._to_batch(raw)
        return dataclasses.replace(
            batch,
            observations=_with_prefix(batch.observations, now, raw["row"]),
            next_observations=_with_prefix(batch.next_observations, after, raw["next_row"]),
        )

    def _to_batch(self, raw: dict[str, Any]) -> ChunkBatch:
        now = self._transform({key: raw[key] for key in ("state", "actions", "image", "prompt")})
        seen = {"state": raw["next_state"], "image": raw["next_image"], "prompt": raw["next_prompt"]}
        if has_next_actions := "next_actions" in raw:
            seen["actions"] = raw["next_actions"]
        after = self._transform(seen)
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
            next_actions=np.asarray(after["actions"], np.float32) if has_next_actions else None,
        )


def _with_prefix(seen: Observation, stored: PrefixRows | None, rows: Int[np.ndarray, " b"]) -> Observation:
    return seen if stored is None else dataclasses.replace(seen, prefix=stored.take(rows))


def read_observations(store: EpisodeStore, transform: Transform, rows: Int[np.ndarray, " b"]) -> Observation:
    """Return the model's observations at these rows, which are numbered as in ``chunks.observe``."""
    return to_observation(transform(chunks.observe(store, rows)))


class _Counters:
    """Counters of one loader, with a lock: one thread makes batches, another waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches = self._waits = 0
        self._making_s = self._waiting_s = self._valid = 0.0

    def count(self, batch: ChunkBatch, seconds: float) -> None:
        with self._lock:
            self._batches += 1
            self._making_s += seconds
            self._valid += float(np.mean(batch.valid))

    def waited(self, seconds: float) -> None:
        with self._lock:
            self._waits += 1
            self._waiting_s += seconds

    def summary(self) -> dict[str, float]:
        with self._lock:
            return {
                "batches": self._batches,
                "batches_per_s": self._batches / max(self._making_s, 1e-9),
                "valid_ratio": self._valid / max(self._batches, 1),
                "wait_s": self._waiting_s / max(self._waits, 1),
            }


def place(batch: ChunkBatch, sharding: jax.sharding.Sharding) -> ChunkBatch:
    """Transfer a batch to the devices without waiting, and return it as arrays of the whole batch.

    With several processes, each passes only its slice (``host_index`` of ``num_hosts``) and holds only that.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
