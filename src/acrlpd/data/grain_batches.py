"""The batches of a data set as a Grain data set, for training loops that are built on Grain.

Grain's worker processes make whole batches, and each opens the data itself: the system shares mapped files among them.
The iterator's state, which Orbax can save beside a model, is a position, because batch ``step`` depends only on
(seed, step). The project's own loop does not need this: there a thread makes the next batches, and processes read what
is not in memory (``windows.open_store``).
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import jax

from acrlpd.data import sources
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.store import windows
from acrlpd.data.view.transforms import Compose, Transform
from acrlpd.orphans import end_with_parent
from acrlpd.types import ChunkBatch


def grain_batches(
    data: Any,
    batch_size: int,
    horizon_length: int,
    sequence_ratio: float = 0.5,
    *,
    num_steps: int,
    num_workers: int = 0,
    transform: Transform | None = None,
    seed: int = 0,
    memory_bytes: int | None = None,
    **source_options: Any,
) -> Any:
    """Return a ``grain.IterDataset`` of ``num_steps`` batches: those of ``ACRLPDDataLoader``, as numpy.

    >>> iterator = iter(grain_batches("data/drawer", 256, 5, num_steps=100_000, num_workers=4))
    >>> next(iterator).actions.shape
    (256, 5, 4)
    >>> state = iterator.get_state()  # iterator.set_state(state) continues from here

    Args:
        data: a path. ``source_options`` are those of ``sources.open_episodes``.
        num_workers: processes that make batches, each with its own ``memory_bytes``; 0 makes them in a thread.
        transform: converts the data set's units to the model's; None returns raw numbers.

    Raises:
        ImportError: Grain is not installed.
        ValueError: see ``sources.open_episodes`` and ``ChunkLoader``; the data is opened once here to check.
    """
    grain = _import_grain()
    recipe = _Batches(
        data,
        source_options,
        {"transform": Compose(()) if transform is None else transform, "seed": seed}
        | {"batch_size": batch_size, "horizon": horizon_length, "sequence_ratio": sequence_ratio}
        # asked here, because a worker process is not part of the distributed run
        | {"host_index": jax.process_index(), "num_hosts": jax.process_count()},
        memory_bytes,
        num_steps,
    )
    recipe.open()
    one_reader = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    batches = grain.MapDataset.source(recipe).to_iter_dataset(one_reader)
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers)) if num_workers else batches


@dataclasses.dataclass
class _Batches:
    """A random-access source of batches for Grain; each process opens the data itself, so that none is sent."""

    data: Any
    source_options: dict[str, Any]
    loader_options: dict[str, Any]
    memory_bytes: int | None
    num_steps: int
    _loader: ChunkLoader | None = None
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> ChunkBatch:
        with self._lock:
            return self.open().batch(int(step))

    def open(self) -> ChunkLoader:
        if self._loader is None:
            end_with_parent()  # this may be one of Grain's workers
            source = sources.open_episodes(self.data, **self.source_options)
            store = windows.open_store(source, memory_bytes=self.memory_bytes)
            self._loader = ChunkLoader(store, **self.loader_options, prefetch=0)  # Grain prefetches itself
        return self._loader

    def __reduce__(self) -> tuple[type[_Batches], tuple[Any, ...]]:
        return _Batches, (self.data, self.source_options, self.loader_options, self.memory_bytes, self.num_steps)


def _import_grain() -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise ImportError(f"Grain's data sets need an extra: pip install 'acrlpd[grain]' ({error})") from error
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only absl programs parse
        flags.FLAGS.mark_as_parsed()
    return grain
