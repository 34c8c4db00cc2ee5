"""The clocks of a run: wall and CPU time over all of its processes, and where the wall time went."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from acrlpd.training.run import Progress


class Clocks:
    """The time that a run has taken: what earlier processes counted, as its ``progress`` says, and since then."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.perf_counter) -> None:
        self._progress = progress
        self._clock = clock
        self._started = clock(), time.process_time()
        self._seconds: dict[str, float] = {}  # of wall time since the last ``settle``, by name
        self._inner = [0.0]  # seconds of the spans within each span that is open

    def wall(self) -> float:
        """Return the seconds that have passed while the run had a process."""
        return self._progress.wall_s + self._clock() - self._started[0]

    def cpu(self) -> float:
        """Return the CPU seconds of the run's processes, those of their workers not counted."""
        return self._progress.cpu_s + time.process_time() - self._started[1]

    @contextlib.contextmanager
    def span(self, name: str, *, behind: str | None = None, busy: Callable[[], bool] = bool) -> Iterator[None]:
        """Count the block's time as ``name``, without that of the spans within it.

        If the device is still ``busy`` at the end, the time counts as ``behind``, which is what the device does: it did
        not have to wait for the host.
        """
        start = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._clock() - start
            self._add(behind if behind and busy() else name, elapsed - self._inner.pop())
            self._inner[-1] += elapsed

    def move(self, source: str, target: str, seconds: float) -> None:
        """Move part of a span to another one, for a call whose parts were measured elsewhere."""
        self._add(source, -seconds)
        self._add(target, seconds)

    def settle(self) -> None:
        """Add the time since the last call to the run's progress, which is saved with its checkpoints."""
        now = self._clock(), time.process_time()
        self._progress.wall_s += now[0] - self._started[0]
        self._progress.cpu_s += now[1] - self._started[1]
        self._started = now
        for name, seconds in self._seconds.items():
            self._progress.seconds[name] = self._progress.seconds.get(name, 0.0) + seconds
        self._seconds.clear()

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def breakdown(seconds: Mapping[str, float], wall_s: float) -> dict[str, float]:
    """Return seconds by what they were spent on, and the share of training time outside the update and the simulator.

    Training time is everything but evaluation and the compiler; ``other`` is what no span measured.
    """
    other = max(0.0, wall_s - sum(seconds.values()))
    training = wall_s - seconds.get("evaluation", 0.0) - seconds.get("compile", 0.0)
    useful = seconds.get("update", 0.0) + seconds.get("simulator", 0.0)
    outside = 1 - useful / training if training > 0 else math.nan
    return {**{f"{name}_s": value for name, value in seconds.items()}, "other_s": other, "outside_share": outside}
