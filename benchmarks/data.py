"""Measure the speed of batches from mapped files, compressed files, and videos with and without the frame cache; the
time to open data; and the share of its time that a training run waits for data.

    python benchmarks/data.py [--cases state-1M state-10M] [--seconds 5] [--folder data-bench] [--json]

Every case runs in its own process, whose memory is reported as three numbers (without its worker processes):

    private_at_end_mb      memory at the end that only it has and that cannot be reclaimed: this must fit
    mapped_at_end_mb       pages of mapped files in addition, which the kernel reclaims when others need memory
    peak_resident_mb       the maximum of both together at any moment: it grows with the data that is read

Synthetic data is generated once, in ``--folder``; without a folder it is deleted afterwards (all of it takes 4 GB).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import machine
import numpy as np

from acrlpd.data import statistics
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.data.store.windows import open_store
from acrlpd.data.tools import convert
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Compose, Normalize
from acrlpd.pictures import resize_with_pad
from acrlpd.presets import get_preset
from acrlpd.training.setup import make_trainer
from acrlpd.types import Episode

BATCH_SIZE, HORIZON = 256, 5
IMAGE_BATCH_SIZE = 32
WARM_UP, WARM_UP_ROWS = 5, 1 << 18  # batches; rows per read
STATE_DIM, ACTION_DIM, EPISODE_STEPS = 32, 8, 1000
CAMERAS, SIZE = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), 224
VIDEO_SIZE, VIDEO_STEPS, FPS = (240, 320), 250, 25.0
OPENED_EPISODES = 10_000
DEMO_SIZES, DEMO_STEPS, DEMO_UPDATES_PER_S = (39, 4), 150, 20

CASES: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "open-10k": lambda folder, seconds: opening(folder, seconds),
    "open-10k-lerobot": lambda folder, seconds: opening_lerobot(folder, seconds),
    "statistics-100": lambda folder, seconds: chunk_statistics(folder, seconds),
    "state-1M": lambda folder, seconds: states(folder, seconds, num_episodes=1000),
    "state-10M": lambda folder, seconds: states(folder, seconds, num_episodes=10_000),
    "state-10M-to-1M": lambda folder, seconds: states_in_turn(folder, seconds),
    "images": lambda folder, seconds: images(folder, seconds),
    "images-compressed": lambda folder, seconds: images(folder, seconds, compression="lzf"),
    "images-compressed-2-workers": lambda folder, seconds: images(folder, seconds, compression="lzf", num_workers=2),
    "video": lambda folder, seconds: video(folder, seconds),
    "video-batches": lambda folder, seconds: video_batches(folder, seconds, num_workers=0),
    "video-batches-2-workers": lambda folder, seconds: video_batches(folder, seconds, num_workers=2),
    "video-batches-cached": lambda folder, seconds: video_batches(folder, seconds, cached=True),
    "demo-waiting": lambda folder, seconds: demo_waiting(folder, seconds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    parser.add_argument("--folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        found = CASES[arguments.cases[0]](Path(arguments.folder), arguments.seconds)
        print(json.dumps(memory() | found))
        return
    about = machine.describe()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        results = {case: alone(case, folder, arguments.seconds) for case in arguments.cases}
    machine.show({**about, "memory": MEMORY, "cases": results}, as_json=arguments.json, table=table(results))


def alone(case: str, folder: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", "--cases", case, "--folder", str(folder), "--seconds"]
    for attempt, length in {"prepare": 0.0, "measure": seconds}.items():  # making the data would count as memory
        print(f"{case}: {attempt}", file=sys.stderr)
        done = subprocess.run([*command, str(length)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| case | measured |", "| --- | --- |"]
    for case, found in results.items():
        lines.append(f"| {case} | {', '.join(f'{name} {value}' for name, value in found.items())} |")
    return "\n".join([*lines, "", *(f"{name}: {meaning}" for name, meaning in MEMORY.items())])


MEMORY = {
    "private_at_end_mb": "memory of the process alone, without pages of files, at the end of the case",
    "mapped_at_end_mb": "pages of files in memory at that time, which the kernel can reclaim",
    "peak_resident_mb": "the maximum of both together at any moment of the case",
}


def memory() -> dict[str, int]:
    """Return the process's memory in MB, by the names of ``MEMORY``; the first two only on Linux."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KB on Linux
    found = {"peak_resident_mb": round(peak / 1e6)}
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines() if line.startswith("Rss"))
        kinds = {name: int(kilobytes) for name, kilobytes, _ in lines}
        found |= {
            "private_at_end_mb": round(kinds["RssAnon:"] * 1024 / 1e6),
            "mapped_at_end_mb": round(kinds["RssFile:"] * 1024 / 1e6),
        }
    return found


def opening(folder: Path, seconds: float) -> dict[str, Any]:
    """Open 10,000 short episodes for the first time, in one process and in one per processor, and then again."""
    root = folder / "many"
    make(root, 1, lambda number: episode(number, 10))
    for number in missing(root, OPENED_EPISODES):
        os.link(hdf5.episode_path(root, 0), hdf5.episode_path(root, number))
    if not seconds:
        return {}
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as empty:
        cache = MetadataCache(Path(empty))
        _, first_s = timed(lambda: H5DatasetReader(root))
        _, parallel_s = timed(lambda: H5DatasetReader(root, num_workers=workers, metadata_cache=cache))
        _, again_s = timed(lambda: H5DatasetReader(root, metadata_cache=cache))
    return {"first_s": first_s, f"first_{workers}_workers_s": parallel_s, "again_s": again_s}


def opening_lerobot(folder: Path, seconds: float) -> dict[str, Any]:
    """Open the same episodes as a LeRobot v3.0 data set."""
    root, raw = folder / "many-lerobot", folder / "many"
    if not root.exists():
        opening(folder, 0.0)
        convert.to_lerobot(H5DatasetReader(raw), root, fps=FPS)
    if not seconds:
        return {}
    with tempfile.TemporaryDirectory() as empty:
        cache = MetadataCache(Path(empty))
        _, first_s = timed(lambda: LeRobotSource(root, metadata_cache=cache))
        _, again_s = timed(lambda: LeRobotSource(root, metadata_cache=cache))
    return {"first_s": first_s, "again_s": again_s}


def chunk_statistics(folder: Path, seconds: float) -> dict[str, Any]:
    """Compute statistics of chunks of 100 episodes, including opening. The videos are empty files: none is read."""
    root = folder / "statistics"
    if not root.exists():
        raw = folder / "statistics-raw"
        make(raw, 100, lambda number: episode(number, VIDEO_STEPS, {"top": moving(number)[:, :64, :64]}))
        convert.to_lerobot(H5DatasetReader(raw), root, fps=FPS)
        for path in root.rglob("*.mp4"):
            path.write_bytes(b"")
    if not seconds:
        return {}
    found = {}
    for horizon in (1, 50):
        _, taken_s = timed(lambda: statistics.from_sources([LeRobotSource(root)], horizon=horizon))  # noqa: B023
        found[f"horizon_{horizon}_s"] = taken_s
    return {"steps": 100 * VIDEO_STEPS} | found


def states(folder: Path, seconds: float, *, num_episodes: int) -> dict[str, Any]:
    """Make batches without pictures."""
    store, found = open_states(folder, num_episodes)
    return found | batches(store, BATCH_SIZE, seconds)


def states_in_turn(folder: Path, seconds: float, *, rounds: int = 9) -> dict[str, Any]:
    """Measure both sizes in one process, one after the other, so that other load of the machine slows both."""
    small, large = (open_states(folder, num_episodes)[0] for num_episodes in (1000, 10_000))
    if not seconds:
        return {}
    pairs = [[batches(store, BATCH_SIZE, seconds / 5) for store in (small, large)] for _ in range(rounds)]
    ratios = [after["batches_per_s"] / before["batches_per_s"] for before, after in pairs]
    return {"ratio": round(float(np.median(ratios)), 3), "ratios": [round(ratio, 3) for ratio in sorted(ratios)]}


def open_states(folder: Path, num_episodes: int) -> tuple[EpisodeStore, dict[str, float]]:
    root = folder / f"state-{num_episodes}"
    make(root, num_episodes, lambda number: episode(number, EPISODE_STEPS))
    cache = MetadataCache(folder / "metadata")
    source, open_s = timed(lambda: H5DatasetReader(root, metadata_cache=cache))
    store, map_s = timed(lambda: open_store(source))
    for first in range(0, store.num_rows, WARM_UP_ROWS):  # into the page cache, so that the disk is not measured
        store.state[np.arange(first, min(first + WARM_UP_ROWS, store.num_rows), 8)]
    return store, {"open_again_s": open_s, "map_s": map_s}


def images(folder: Path, seconds: float, *, compression: str | None = None, num_workers: int = 0) -> dict[str, Any]:
    """Make batches with three cameras at the model's resolution; only a few compressed ones fit into memory."""
    root = folder / f"images-{compression}"
    make(root, 10, lambda number: episode(number, 100, {camera: noise(number, 100) for camera in CAMERAS}), compression)
    memory_bytes = None if compression is None else 64 << 20
    source = H5DatasetReader(root)
    store, load_s = timed(lambda: open_store(source, memory_bytes=memory_bytes, num_workers=num_workers))
    return {"load_s": load_s, "batch_size": IMAGE_BATCH_SIZE} | batches(store, IMAGE_BATCH_SIZE, seconds)


def demo_waiting(folder: Path, seconds: float) -> dict[str, Any]:
    """Run the demo's offline phase on equally many episodes of its shape, for about ``seconds`` after compilation."""
    demo = get_preset("demo")
    root = folder / "demo"
    make(root, demo.data.collect.episodes, lambda number: episode(number, DEMO_STEPS, sizes=DEMO_SIZES))
    if not seconds:
        return {}
    with tempfile.TemporaryDirectory() as runs:
        config = dataclasses.replace(
            demo,
            run_dir=runs,
            env=None,
            data=dataclasses.replace(demo.data, path=str(root), action_normalization="z_score"),
            offline_steps=max(100, round(DEMO_UPDATES_PER_S * seconds)),
            online_steps=0,
        )
        found = make_trainer(config).train()["breakdown"]
    training = sum(found[name] for name in ("data_s", "update_s", "log_s"))
    return {"waiting_share": round(found["data_s"] / training, 4), "training_s": round(training, 1)}


def video(folder: Path, seconds: float) -> dict[str, Any]:
    """Read random frames of a LeRobot data set (AV1, 240x320) at 224x224, one at a time."""
    root = make_video(folder)
    source = LeRobotSource(root)
    shutil.rmtree(folder / "frames", ignore_errors=True)
    cache = FrameCache(folder / "frames", SIZE, SIZE)
    _, build_s = timed(lambda: cache.build(source))
    cached = LeRobotSource(root, frame_cache=cache)
    plain = {
        "plain": lambda episode, step: resize_with_pad(decoded_alone(source, episode, step), SIZE, SIZE),
        "reader": lambda episode, step: resize_with_pad(
            source.window(episode, "images/top", step, step + 1)[0], SIZE, SIZE
        ),
        "frame_cache": lambda episode, step: cached.window(episode, "images/top", step, step + 1)[0],
    }
    first = {name: read(3, 77).astype(int) for name, read in plain.items()}
    assert all(np.abs(first["plain"] - frame).max() <= 1 for frame in first.values())
    rates = {f"{name}_frames_per_s": frames_per_s(read, source, seconds) for name, read in plain.items()}
    return {"build_s": build_s} | rates


def video_batches(folder: Path, seconds: float, *, num_workers: int = 0, cached: bool = False) -> dict[str, Any]:
    """Make batches from the videos of the case above; hardly any of their frames is kept in memory."""
    root = make_video(folder)
    cache = FrameCache(folder / "frames", SIZE, SIZE) if cached else None
    source = LeRobotSource(root, frame_cache=cache)
    if cache is not None:
        cache.build(source)
    store = open_store(source, memory_bytes=16 << 20, num_workers=num_workers)
    return {"batch_size": IMAGE_BATCH_SIZE} | batches(store, IMAGE_BATCH_SIZE, seconds)


def make_video(folder: Path) -> Path:
    root = folder / "video"
    if not root.exists():
        raw = folder / "video-raw"
        make(raw, 8, lambda number: episode(number, VIDEO_STEPS, {"top": moving(number)}))
        convert.to_lerobot(H5DatasetReader(raw), root, fps=FPS)
    return root


def decoded_alone(source: LeRobotSource, number: int, step: int) -> np.ndarray:
    """Read a frame as a data set does that opens the video for every sample."""
    span = source.meta.episodes[number].videos["observation.images.top"]
    wanted = span.start_s + step / source.fps
    with av.open(str(span.path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(int(wanted / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if abs(frame.time - wanted) < 1e-4:
                return frame.to_ndarray(format="rgb24")
    raise ValueError(f"{span.path}: no frame at {wanted} s")


def frames_per_s(read: Callable[[int, int], np.ndarray], source: LeRobotSource, seconds: float) -> float:
    rng = np.random.default_rng(0)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        index = int(rng.integers(source.num_episodes))
        read(index, int(rng.integers(source.lengths[index])))
        count += 1
    return round(count / elapsed, 1)


def batches(store: EpisodeStore, batch_size: int, seconds: float) -> dict[str, Any]:
    stats = {
        "state": NormStats(np.zeros(STATE_DIM), np.ones(STATE_DIM)),
        "actions": NormStats(np.zeros(ACTION_DIM), np.ones(ACTION_DIM)),
    }
    normalize = Compose((Normalize(stats), DropPrompt()))
    loader = ChunkLoader(store, normalize, batch_size=batch_size, horizon=HORIZON, sequence_ratio=0.5, seed=0)
    for step in range(WARM_UP):  # this also starts processes
        loader.batch(step)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        loader.batch(WARM_UP + count)
        count += 1
    found = {name: round(value, 4) for name, value in loader.stats().items() if name != "batches_per_s"}
    found |= memory()  # while everything is mapped
    loader.close()
    return {"batches_per_s": round(count / max(elapsed, 1e-9), 1)} | found


class DropPrompt:
    """A replacement for the tokenizer, whose cost is not measured here."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in data.items() if key != "prompt"}

    def inverse(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


def make(root: Path, num_episodes: int, build: Callable[[int], Episode], compression: str | None = None) -> None:
    for number in missing(root, num_episodes):
        hdf5.write_episode(hdf5.episode_path(root, number), build(number), compression=compression)


def missing(root: Path, num_episodes: int) -> Iterator[int]:
    return (number for number in range(num_episodes) if not hdf5.episode_path(root, number).exists())


def episode(
    number: int,
    length: int,
    pictures: dict[str, np.ndarray] | None = None,
    *,
    sizes: tuple[int, int] = (STATE_DIM, ACTION_DIM),
) -> Episode:
    rng = np.random.default_rng(number)
    state, actions = (2 * rng.random((length, size), dtype=np.float32) - 1 for size in sizes)
    return Episode(
        state=state,
        actions=actions,
        rewards=np.arange(length, dtype=np.float32) // (length - 1) - 1,
        terminals=np.arange(length) == length - 1,
        task="benchmark",
        images=pictures or {},
        success=True,
    )


def noise(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (length, SIZE, SIZE, 3), np.uint8)


def moving(seed: int) -> np.ndarray:
    """Return a video of a textured picture that drifts; noise would not compress like a video."""
    height, width = VIDEO_SIZE
    texture = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = texture.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(picture, step, axis=1) for step in range(VIDEO_STEPS)])


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), round(time.perf_counter() - started, 3)


if __name__ == "__main__":
    main()
