"""Every LeRobot set among the reference data, against the values that the real library read from it."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from acrlpd.data import chunks, statistics
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.store.episodes import EpisodeStore

pytestmark = pytest.mark.reference

VIDEO_TOLERANCE = 2e-5  # of 255: two decoders agree but for the rounding of their means to float32


@pytest.fixture(scope="module")
def sets(shared):
    """(source, reference values) of each set that has both."""
    pairs = []
    for path in sorted((shared / "data").rglob("*.reference.npz")):
        folder = path.with_name(path.name.removesuffix(".reference.npz"))
        if (folder / "meta/info.json").is_file():
            with np.load(path, allow_pickle=False) as values:
                pairs.append((LeRobotSource(folder), dict(values)))
    if not pairs:
        pytest.skip("this root has no LeRobot sets")
    return pairs


def frames(reference):
    """(place in the reference, episode, frame)."""
    return enumerate(zip(reference["episode_index"].tolist(), reference["frame_index"].tolist(), strict=True))


def keys(reference, prefix):
    return [key.removeprefix(prefix) for key in reference if key.startswith(prefix)]


def test_tables(sets):
    for source, reference in sets:
        assert source.meta.version == reference["codebase_version"]
        assert source.fps == reference["fps"]
        np.testing.assert_array_equal(source.lengths, reference["episode_lengths"])
        assert source.lengths.sum() == reference["total_frames"]
        assert [source.info(index).task for index in range(source.num_episodes)] == reference["episode_tasks"].tolist()


def test_numbers(sets):
    for source, reference in sets:
        action_key = str(reference["action_key"])
        columns = {"action": action_key, "index": "index", "task_index": "task_index", "task": "task"}
        columns |= {key: key for key in ("next.reward", "next.done", "next.success") if key in reference}
        columns |= {f"state__{key}": key for key in keys(reference, "state__")}
        for place, (episode, frame) in frames(reference):
            for name, key in columns.items():
                row = source.window(episode, key, frame, frame + 1)[0]
                np.testing.assert_array_equal(
                    np.ravel(row), np.ravel(reference[name][place]), err_msg=f"{name} {frame}"
                )
            timestamp = source.window(episode, "timestamp", frame, frame + 1)[0]
            assert timestamp == np.float32(reference["timestamp"][place])
        for key in keys(reference, "sum__"):
            whole = [source.window(index, key, 0, length) for index, length in enumerate(source.lengths.tolist())]
            total = np.concatenate(whole).reshape(-1, reference[f"sum__{key}"].size)
            np.testing.assert_allclose(total.sum(axis=0, dtype=np.float64), reference[f"sum__{key}"], rtol=1e-12)


def test_state_is_the_columns_in_order(sets):
    for source, reference in sets:
        for place, (episode, frame) in frames(reference):
            expected = np.concatenate([np.ravel(reference[f"state__{key}"][place]) for key in source.state_keys])
            state = source.window(episode, "state", frame, frame + 1)
            assert state.dtype == np.float32
            np.testing.assert_array_equal(state, expected[None])


def test_pictures(sets):
    for source, reference in sets:
        for key in keys(reference, "mean__"):
            for place, (episode, frame) in frames(reference):
                picture = source.window(episode, key, frame, frame + 1)[0].astype(np.float64)
                where = f"{source.meta.root} {key} episode {episode} frame {frame}"
                expected = reference[f"mean__{key}"][place]
                np.testing.assert_allclose(picture.mean(axis=(0, 1)), expected, atol=VIDEO_TOLERANCE, err_msg=where)
                expected = reference[f"grid8__{key}"][place]
                np.testing.assert_allclose(grid8(picture), expected, atol=VIDEO_TOLERANCE, err_msg=where)


def grid8(picture):
    """Means over 8 x 8 cells."""
    rows, columns = (np.arange(9) * size // 8 for size in picture.shape[:2])
    return np.array(
        [[picture[a:b, c:d].mean(axis=(0, 1)) for c, d in pairwise(columns)] for a, b in pairwise(rows)],
    )


def test_chunks(sets):
    for source, reference in sets:
        horizon = reference["action_chunk"].shape[1]
        episodes = (without_terminals_and_pictures(source, index) for index in range(source.num_episodes))
        batch = chunks.gather(EpisodeStore.from_episodes(episodes), reference["index"], horizon)
        np.testing.assert_array_equal(batch["actions"], reference["action_chunk"])
        np.testing.assert_array_equal(batch["valid"] == 0, reference["action_is_pad"])
        np.testing.assert_array_equal(batch["step_id"], reference["frame_index"])
        np.testing.assert_array_equal(batch["prompt"], reference["task"])


def without_terminals_and_pictures(source, index):
    """``valid`` is then 0 for padding alone, as LeRobot's mask."""
    numbers = LeRobotSource(source.meta.root, cameras=()).episode(index)
    return dataclasses.replace(numbers, terminals=np.zeros(len(numbers), dtype=bool))


def test_versions_of_a_set_hold_the_same_rows(sets):
    by_name: dict[str, list[LeRobotSource]] = {}
    for source, _ in sets:
        by_name.setdefault(Path(source.meta.root).name, []).append(source)
    for first, *others in by_name.values():
        for other in others:
            for index, length in enumerate(first.lengths.tolist()):
                for key in ("state", "actions", "next.reward", "task"):
                    left, right = (source.window(index, key, 0, length) for source in (first, other))
                    np.testing.assert_array_equal(left, right)


@pytest.mark.filterwarnings("ignore:.*rarely move")
def test_statistics(sets):
    for source, reference in sets:
        stats = statistics.from_sources([source])
        mean = reference[f"sum__{reference['action_key']}"] / reference["total_frames"]
        np.testing.assert_allclose(stats["actions"].mean, mean, rtol=1e-9, atol=1e-12)
