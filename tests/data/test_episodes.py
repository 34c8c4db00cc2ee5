import numpy as np
import pytest

from acrlpd.data.store.episodes import EpisodeSource, EpisodeStore
from acrlpd.types import Episode


def make_episode(length, *, first=0, task="lift", source="file.hdf5", success=None, **changes):
    """State, actions and rewards count the steps from ``first``, so that a row tells where it came from."""
    steps = np.arange(first, first + length, dtype=np.float32)
    fields = {
        "state": np.stack([steps, -steps], axis=1),
        "actions": 10 * steps[:, None],
        "rewards": 100 * steps,
        "terminals": np.zeros(length, dtype=bool),
    }
    return Episode(**(fields | changes), task=task, source=source, success=success)


def test_rows_and_bounds():
    store = EpisodeStore.from_episodes([make_episode(2), make_episode(1, first=5), make_episode(3, first=7)])
    assert (store.num_rows, store.num_episodes) == (6, 3)
    np.testing.assert_array_equal(store.state[:, 0], [0, 1, 5, 7, 8, 9])
    np.testing.assert_array_equal(store.lengths, [2, 1, 3])
    np.testing.assert_array_equal(store.ends, [2, 3, 6])
    np.testing.assert_array_equal(store.starts, [0, 2, 3])
    np.testing.assert_array_equal(store.episode_index(np.array([5, 1, 2])), [2, 0, 1])
    np.testing.assert_array_equal(store.full_windows(2), [1, 1, 3])


def test_tasks_are_stored_once():
    store = EpisodeStore.from_episodes([make_episode(2, task="a"), make_episode(1, task="a longer text")])
    store.append(make_episode(1, task="a"))
    assert store.tasks == ["a", "a longer text"]
    assert store.instructions(np.array([3, 2, 0])).tolist() == ["a", "a longer text", "a"]


def test_an_instruction_may_change_inside_an_episode():
    changing = make_episode(4, task="open", task_changes=((1, "wait"), (3, "close")))
    store = EpisodeStore.from_episodes([make_episode(2, task="open"), changing, make_episode(1, task="wait")])
    expected = ["open", "open", "open", "wait", "wait", "close", "wait"]
    assert store.instructions(np.arange(7)).tolist() == expected
    assert store.tasks == ["open", "wait", "close"]
    assert store.episode(1).task_changes == store.info(1).task_changes == ((1, "wait"), (3, "close"))
    columns = {key: store._rows(key) for key in ("state", "actions", "rewards", "terminals")}
    elsewhere = EpisodeStore.of_columns(columns, [store.info(index) for index in range(3)])
    assert elsewhere.instructions(np.arange(7)).tolist() == expected
    store._drop_oldest()
    store._drop_oldest()
    assert store.instructions(np.array([0])).tolist() == ["wait"]


@pytest.mark.parametrize(
    "changes", [((0, "b"),), ((4, "b"),), ((2, "b"), (1, "c")), ((2, "b"), (2, "c")), ((2, None),)]
)
def test_instructions_that_hold_nowhere_are_refused(changes):
    with pytest.raises(ValueError, match=r"file\.hdf5: task_changes: expected texts behind rising steps in 1\.\.3"):
        EpisodeStore.from_episodes([make_episode(4, task_changes=changes)])


def test_dtypes_are_the_stores():
    store = EpisodeStore.from_episodes([make_episode(2, state=np.zeros((2, 3)), terminals=np.array([0, 1]))])
    assert (store.state.dtype, store.terminals.dtype) == (np.float32, bool)


def test_is_a_source_and_gives_episodes_back():
    images = {"top": np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)}
    store = EpisodeStore.from_episodes(
        [
            make_episode(2, images={"top": np.zeros((2, 2, 2, 3), np.uint8)}),
            make_episode(3, first=4, task="fold", images=images, success=True, source="b.hdf5"),
        ]
    )
    assert isinstance(store, EpisodeSource)
    info = store.info(1)
    assert (info.length, info.task, info.success, info.source) == (3, "fold", True, "b.hdf5")
    episode = store.episode(1)
    np.testing.assert_array_equal(episode.rewards, [400, 500, 600])
    np.testing.assert_array_equal(episode.images["top"], images["top"])
    assert (episode.task, episode.success, episode.source) == ("fold", True, "b.hdf5")
    np.testing.assert_array_equal(store.window(1, "images/top", 1, 3), images["top"][1:])
    np.testing.assert_array_equal(store.window(1, "actions", 2, 3), [[60]])
    again = EpisodeStore.from_source(store)
    np.testing.assert_array_equal(again.state, store.state)
    np.testing.assert_array_equal(again.images["top"], store.images["top"])


def test_window_stays_in_the_episode():
    store = EpisodeStore.from_episodes([make_episode(2), make_episode(2)])
    with pytest.raises(IndexError, match=r"file.hdf5: window 1..3 leaves"):
        store.window(0, "state", 1, 3)
    with pytest.raises(IndexError, match="episode index 2"):
        store.episode(2)
    with pytest.raises(KeyError, match="no key 'images/top'"):
        store.window(0, "images/top", 0, 1)
    with pytest.raises(IndexError, match=r"0..3, got 0..4"):
        store.episode_index(np.array([0, 4]))


def test_oldest_whole_episodes_make_room():
    bytes_per_row = 4 * (2 + 1 + 1) + 1
    store = EpisodeStore(max_bytes=6 * bytes_per_row)
    ids = [store.append(make_episode(2, first=10 * i)) for i in range(3)]
    assert ids == [0, 1, 2]
    assert store.nbytes == 6 * bytes_per_row
    assert store.append(make_episode(3, first=30)) == 3  # needs three rows: two episodes go
    np.testing.assert_array_equal(store.state[:, 0], [20, 21, 30, 31, 32])
    np.testing.assert_array_equal(store.starts, [0, 2])
    np.testing.assert_array_equal(store.full_windows(3), [0, 1])
    np.testing.assert_array_equal(store.ends, [2, 5])
    assert (store.first_episode_id, store.next_episode_id) == (2, 4)
    np.testing.assert_array_equal(store.episode(0).state[:, 0], [20, 21])


def test_many_appends_keep_the_newest_rows_and_bounded_buffers():
    rng = np.random.default_rng(0)
    bytes_per_row = 17
    store = EpisodeStore(max_bytes=50 * bytes_per_row)
    first = 0
    for length in rng.integers(1, 9, size=300).tolist():
        store.append(make_episode(length, first=first))
        first += length
        assert store.nbytes <= store.max_bytes
        np.testing.assert_array_equal(store.state[:, 0], np.arange(first - store.num_rows, first))
        np.testing.assert_array_equal(store.rewards, 100 * np.arange(first - store.num_rows, first))
    assert store.num_rows > 40
    assert len(store._columns["state"]._buffer) <= 1.5 * 50


def test_an_episode_above_the_limit_is_refused_and_the_store_unchanged():
    store = EpisodeStore(max_bytes=3 * 17)
    store.append(make_episode(2))
    with pytest.raises(ValueError, match=r"long.hdf5: the episode needs 68 bytes, more than max_bytes \(51\)"):
        store.append(make_episode(4, source="long.hdf5"))
    assert (store.num_rows, store.num_episodes) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"actions": np.zeros((3, 2))},
            r"actions has shape \(2,\), expected \(1,\) as in the first episode \(a.hdf5\)",
        ),
        ({"state": np.zeros((3, 5))}, "state has shape"),
        ({"images": {"top": np.zeros((3, 4, 4, 3), np.uint8)}}, "same cameras"),
        ({"rewards": np.zeros(2)}, "same number of steps"),
        ({"rewards": np.zeros((3, 1))}, "expected 1 axes"),
        ({"state": np.full((3, 2), np.nan)}, "not finite"),
        ({"images": {"top": np.zeros((3, 4, 4, 3), np.float32)}}, "images/top is float32"),
    ],
)
def test_wrong_episodes_are_refused_by_name(changes, message):
    store = EpisodeStore.from_episodes([make_episode(2, source="a.hdf5")])
    with pytest.raises(ValueError, match=f"^b.hdf5: .*{message}"):
        store.append(make_episode(3, source="b.hdf5", **changes))
    assert store.num_rows == 2


def test_empty_episode_and_bad_limit():
    with pytest.raises(ValueError, match="empty"):
        EpisodeStore.from_episodes([make_episode(0)])
    with pytest.raises(ValueError, match="max_bytes"):
        EpisodeStore(max_bytes=0)
    assert EpisodeStore().num_rows == 0
