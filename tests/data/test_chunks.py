import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data import chunks
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.types import Episode, FinalObservation


def make_episode(length, *, first=1, terminals=(), task="lift", task_changes=(), cameras=(), final=False):
    """State, actions, rewards and pictures hold the number of the step, counted from ``first``."""
    steps = np.arange(first, first + length)
    pictures = np.broadcast_to(steps[:, None, None, None], (length, 2, 2, 3)).astype(np.uint8)
    after = np.float32([first + length])
    last = {camera: np.full((2, 2, 3), first + length + 10 * i, np.uint8) for i, camera in enumerate(cameras)}
    return Episode(
        state=steps[:, None].astype(np.float32),
        actions=steps[:, None].astype(np.float32),
        rewards=steps.astype(np.float32),
        terminals=np.isin(np.arange(length), list(terminals)),
        task=task,
        task_changes=task_changes,
        images={camera: pictures + 10 * i for i, camera in enumerate(cameras)},
        final=FinalObservation(after, last) if final else None,
    )


def gather_one(episode, step, horizon, **options):
    """One chunk, from a store with a neighbour on either side that must never show."""
    neighbour = make_episode(4, first=900, terminals=[0, 3])
    store = EpisodeStore.from_episodes([neighbour, episode, neighbour])
    chunk = chunks.gather(store, np.array([4 + step]), horizon, **options)
    return {key: value[0] for key, value in chunk.items() if not isinstance(value, dict)}


# an episode of five steps, numbered 1 to 5 in its contents
EDGES = [
    # id, terminals, step, horizon, actions, rewards, terminals, valid, next_state, sequence_mask, bootstrap_mask
    ("first step", [], 0, 3, [1, 2, 3], [1, 2, 3], [0, 0, 0], [1, 1, 1], 4, 1, 1),
    ("window ends at the last step but one", [], 1, 3, [2, 3, 4], [2, 3, 4], [0, 0, 0], [1, 1, 1], 5, 1, 1),
    ("window ends at the last step", [], 2, 3, [3, 4, 5], [3, 4, 5], [0, 0, 0], [1, 1, 1], 5, 0, 1),
    ("last step but one, time limit", [], 3, 3, [4, 5, 5], [4, 5, 0], [0, 0, 0], [1, 1, 0], 5, 0, 1),
    ("last step, time limit", [], 4, 3, [5, 5, 5], [5, 0, 0], [0, 0, 0], [1, 0, 0], 5, 0, 1),
    ("last step but one, terminated", [4], 3, 3, [4, 5, 5], [4, 5, 0], [0, 1, 0], [1, 1, 0], 5, 1, 0),
    ("last step, terminated", [4], 4, 3, [5, 5, 5], [5, 0, 0], [1, 0, 0], [1, 0, 0], 5, 1, 0),
    ("full window up to the terminal", [4], 2, 3, [3, 4, 5], [3, 4, 5], [0, 0, 1], [1, 1, 1], 5, 1, 0),
    ("full window before the terminal", [4], 1, 3, [2, 3, 4], [2, 3, 4], [0, 0, 0], [1, 1, 1], 5, 1, 1),
    ("horizon 1", [], 1, 1, [2], [2], [0], [1], 3, 1, 1),
    ("horizon 1 at the time limit", [], 4, 1, [5], [5], [0], [1], 5, 0, 1),
    ("horizon 1 at a terminal", [4], 4, 1, [5], [5], [1], [1], 5, 1, 0),
    ("longer than the episode", [], 0, 6, [1, 2, 3, 4, 5, 5], [1, 2, 3, 4, 5, 0], [0] * 6, [1] * 5 + [0], 5, 0, 1),
    ("longer, terminated", [4], 0, 6, [1, 2, 3, 4, 5, 5], [1, 2, 3, 4, 5, 0], [0] * 4 + [1, 0], [1] * 5 + [0], 5, 1, 0),
    ("terminal in mid-episode", [1], 0, 3, [1, 2, 3], [1, 2, 3], [0, 1, 0], [1, 1, 0], 4, 1, 0),
    ("two terminals in mid-episode", [1, 2], 0, 4, [1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 1, 0], [1, 1, 0, 0], 5, 1, 0),
    ("just after a mid-episode terminal", [1], 2, 3, [3, 4, 5], [3, 4, 5], [0, 0, 0], [1, 1, 1], 5, 0, 1),
    ("mid-episode terminal, then a time limit", [3], 3, 3, [4, 5, 5], [4, 5, 0], [1, 0, 0], [1, 0, 0], 5, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in EDGES])
def test_edges_by_hand(case):
    terminals, step, horizon, *expected = case
    chunk = gather_one(make_episode(5, terminals=terminals), step, horizon)
    keys = ["actions", "rewards", "terminals", "valid", "next_state", "sequence_mask", "bootstrap_mask"]
    for key, value in zip(keys, expected, strict=True):
        np.testing.assert_array_equal(np.squeeze(chunk[key]), np.squeeze(value), err_msg=key)
    assert (chunk["state"], chunk["episode_id"], chunk["step_id"]) == ([step + 1], 1, step)


# the same episode where what was seen after its last action, 6, is known: what differs from the above
FINAL_EDGES = [
    # id, terminals, step, horizon, next_state, sequence_mask, bootstrap_mask
    ("window ends at the last step but one", [], 1, 3, 5, 1, 1),
    ("window ends at the last step", [], 2, 3, 6, 1, 1),
    ("last step but one, time limit", [], 3, 3, 5, 0, 1),
    ("full window up to the terminal", [4], 2, 3, 6, 1, 0),
    ("last step, terminated", [4], 4, 3, 5, 1, 0),
    ("horizon 1 at the time limit", [], 4, 1, 6, 1, 1),
    ("the whole episode", [], 0, 5, 6, 1, 1),
    ("longer than the episode", [], 0, 6, 5, 0, 1),
]


@pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in FINAL_EDGES])
def test_edges_with_a_final_observation_by_hand(case):
    terminals, step, horizon, *expected = case
    chunk = gather_one(make_episode(5, terminals=terminals, final=True), step, horizon)
    for key, value in zip(["next_state", "sequence_mask", "bootstrap_mask"], expected, strict=True):
        np.testing.assert_array_equal(np.squeeze(chunk[key]), value, err_msg=key)


# windows of four steps of the same episode, of which critics judge the first two
JUDGED_EDGES = [
    # id, terminals, final, step, valid, next_state, sequence_mask, bootstrap_mask
    ("all inside", [], False, 0, [1, 1, 1, 1], 3, 1, 1),
    ("terminal at the first step", [0], False, 0, [1, 0, 0, 0], 3, 1, 0),
    ("terminal at the last judged step", [1], False, 0, [1, 1, 0, 0], 3, 1, 0),
    ("terminal just after", [2], False, 0, [1, 1, 1, 0], 3, 1, 1),
    ("terminal at the last step of the window", [3], False, 0, [1, 1, 1, 1], 3, 1, 1),
    ("time limit after the judged steps", [], False, 2, [1, 1, 1, 0], 5, 1, 1),
    ("end of the task after the judged steps", [4], False, 2, [1, 1, 1, 0], 5, 1, 1),
    ("time limit with the judged steps", [], False, 3, [1, 1, 0, 0], 5, 0, 1),
    ("time limit with the judged steps, final known", [], True, 3, [1, 1, 0, 0], 6, 1, 1),
    ("end of the task with the judged steps", [4], False, 3, [1, 1, 0, 0], 5, 1, 0),
    ("time limit before", [], True, 4, [1, 0, 0, 0], 5, 0, 1),
    ("end of the task before", [4], True, 4, [1, 0, 0, 0], 5, 1, 0),
]


@pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in JUDGED_EDGES])
def test_edges_of_the_critics_horizon_by_hand(case):
    terminals, final, step, *expected = case
    chunk = gather_one(make_episode(5, terminals=terminals, final=final), step, 4, backup_horizon=2)
    for key, value in zip(["valid", "next_state", "sequence_mask", "bootstrap_mask"], expected, strict=True):
        np.testing.assert_array_equal(np.squeeze(chunk[key]), value, err_msg=key)
    whole = gather_one(make_episode(5, terminals=terminals, final=final), step, 4)
    for key in ("actions", "rewards", "terminals", "valid"):  # what the policy imitates is the same
        np.testing.assert_array_equal(chunk[key], whole[key], err_msg=key)


@pytest.mark.parametrize(("terminals", "sequence_mask", "bootstrap_mask"), [([], 0, 1), ([0], 1, 0)])
def test_an_episode_shorter_than_the_critics_horizon(terminals, sequence_mask, bootstrap_mask):
    chunk = gather_one(make_episode(1, terminals=terminals, final=True), 0, 4, backup_horizon=2)
    assert (chunk["sequence_mask"], chunk["bootstrap_mask"], chunk["next_state"]) == (sequence_mask, bootstrap_mask, 1)


@pytest.mark.parametrize("backup_horizon", [0, 5])
def test_a_critics_horizon_outside_of_the_window_is_refused(backup_horizon):
    with pytest.raises(ValueError, match=r"backup_horizon must lie between 1 and horizon \(4\), got"):
        gather_one(make_episode(5), 0, 4, backup_horizon=backup_horizon)


def test_pictures_of_a_final_observation():
    with_final, without = (make_episode(3, cameras=["top", "wrist"], final=final) for final in (True, False))
    store = EpisodeStore.from_episodes([without, with_final])
    chunk = chunks.gather(store, np.array([1, 4, 3]), 2)
    assert chunk["next_row"].tolist() == [2, 7, 5]  # rows 6 and 7 stand for what came after the two episodes
    np.testing.assert_array_equal(chunk["next_image"]["wrist"][:, 0, 0, 0], [13, 14, 13])
    observed = chunks.observe(store, np.array([6, 7, 0]))
    np.testing.assert_array_equal(observed["state"][:, 0], [3, 4, 1])  # that of the first is not known: its last row
    np.testing.assert_array_equal(observed["image"]["top"][:, 1, 1, 2], [3, 4, 1])


def test_an_episode_of_one_step():
    chunk = gather_one(make_episode(1), 0, 3)
    np.testing.assert_array_equal(chunk["actions"][:, 0], [1, 1, 1])
    np.testing.assert_array_equal(chunk["valid"], [1, 0, 0])
    assert (chunk["sequence_mask"], chunk["bootstrap_mask"], chunk["next_state"]) == (0, 1, [1])


def test_fields_of_a_batch():
    store = EpisodeStore.from_episodes(
        [make_episode(3, cameras=["top", "wrist"]), make_episode(2, first=6, task="fold it", cameras=["top", "wrist"])]
    )
    chunk = chunks.gather(store, np.array([4, 1]), 2)
    assert chunk["prompt"].tolist() == ["fold it", "lift"]
    np.testing.assert_array_equal(chunk["image"]["wrist"][:, 0, 0, 0], [17, 12])
    np.testing.assert_array_equal(chunk["next_image"]["wrist"][:, 1, 1, 2], [17, 13])
    assert {key: chunk[key].shape for key in ("state", "actions", "rewards", "valid", "sequence_mask")} == {
        "state": (2, 1), "actions": (2, 2, 1), "rewards": (2, 2), "valid": (2, 2), "sequence_mask": (2,)
    }  # fmt: skip
    assert chunk["image"]["top"].dtype == np.uint8
    assert {chunk[key].dtype for key in ("actions", "rewards", "terminals", "valid", "bootstrap_mask")} == {
        np.dtype(np.float32)
    }
    without = chunks.gather(store, np.array([4, 1]), 2, images=False)
    assert (without["image"], without["next_image"]) == ({}, {})


def test_the_batch_is_a_copy():
    store = EpisodeStore.from_episodes([make_episode(3, cameras=["top"])])
    chunk = chunks.gather(store, np.array([0]), 2)
    for value in (chunk["state"], chunk["actions"], chunk["image"]["top"]):
        value[:] = 0
    assert store.state[0] == store.actions[0] == store.images["top"][0, 0, 0, 0] == 1


def test_seam_after_the_oldest_episodes_were_dropped():
    bytes_per_row = 4 * 3 + 1  # and a final observation has 4
    store = EpisodeStore(max_bytes=9 * bytes_per_row)
    for i in range(20):
        store.append(make_episode(4, first=100 * i, terminals=[3] if i % 2 else [], final=i % 3 == 0))
    # the buffers have been moved several times; episodes 18 (time limit) and 19 (terminated) are left
    chunk = chunks.gather(store, np.array([0, 2, 3, 4, 7]), 3)
    np.testing.assert_array_equal(
        chunk["actions"][..., 0],
        [[1800, 1801, 1802], [1802, 1803, 1803], [1803] * 3, [1900, 1901, 1902], [1903] * 3],
    )
    np.testing.assert_array_equal(chunk["episode_id"], [18, 18, 18, 19, 19])
    np.testing.assert_array_equal(chunk["step_id"], [0, 2, 3, 0, 3])
    np.testing.assert_array_equal(chunk["sequence_mask"], [1, 0, 0, 1, 1])
    np.testing.assert_array_equal(chunk["bootstrap_mask"], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(chunk["next_state"][:, 0], [1803, 1803, 1803, 1903, 1903])
    assert store.has_final.tolist() == [True, False]
    chunk = chunks.gather(store, np.array([1, 5]), 3)
    np.testing.assert_array_equal(chunk["next_state"][:, 0], [1804, 1903])
    assert store.episode(0).final.state == 1804
    assert store.episode(1).final is None


def slow_gather(episodes, index, step, horizon, judged):
    """The definition, one step at a time (docs/algorithm.md, section 1)."""
    episode = episodes[index]
    length = len(episode)
    actions, rewards, terminals, valid = [], [], [], []
    ended = ended_judged = False
    for t in range(step, step + horizon):
        real = t < length
        actions.append(episode.actions[t if real else length - 1])
        rewards.append(episode.rewards[t] if real else 0.0)
        terminals.append(float(real and episode.terminals[t]))
        valid.append(float(real and not ended))
        ended = ended or bool(terminals[-1])
        ended_judged = ended_judged or (ended and t < step + judged)
    states = [*episode.state, episode.final.state] if episode.final else [*episode.state]
    after = step + judged
    inside = after <= length  # what lies past the end is masked out, and reads the last real step
    return {
        "state": episode.state[step],
        "next_state": states[after] if inside and after < len(states) else episode.state[-1],
        "actions": actions,
        "rewards": rewards,
        "terminals": terminals,
        "valid": valid,
        "bootstrap_mask": float(not ended_judged),
        "sequence_mask": float((inside and after < len(states)) or ended_judged),
        "episode_id": index,
        "step_id": step,
        "prompt": instruction_at(episode, step),
        "next_prompt": instruction_at(episode, min(after, length - 1)),
    }


def instruction_at(episode, step):
    return [text for first, text in [(0, episode.task), *episode.task_changes] if first <= step][-1]


@given(
    flags=st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5),
    changes=st.sets(st.integers(1, 6)),
    horizons=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_dropped=st.integers(0, 3),
    finals=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=150)
def test_agrees_with_a_slow_reference(flags, changes, horizons, num_dropped, finals):
    judged, horizon = sorted(horizons)
    firsts = np.cumsum([0, *map(len, flags)])
    episodes = [
        make_episode(
            len(row),
            first=int(first),
            terminals=np.flatnonzero(row),
            task=f"task {len(row)}",
            task_changes=tuple((step, f"part {step}") for step in sorted(changes) if step < len(row)),
            final=final,
        )
        for row, first, final in zip(flags, firsts, finals, strict=False)
    ]
    num_dropped = min(num_dropped, len(episodes) - 1)
    store = EpisodeStore.from_episodes(episodes)
    for _ in range(num_dropped):
        store._drop_oldest()
    places = [(i, t) for i in range(num_dropped, len(episodes)) for t in range(len(episodes[i]))]
    chunk = chunks.gather(store, np.arange(len(places)), horizon, backup_horizon=judged)
    for row, (index, step) in enumerate(places):
        for key, value in slow_gather(episodes, index, step, horizon, judged).items():
            np.testing.assert_array_equal(chunk[key][row], value, err_msg=f"{key} at episode {index}, step {step}")


@given(
    flags=st.lists(st.booleans(), min_size=1, max_size=8),
    horizon=st.integers(1, 9),
    final=st.booleans(),
    ends_in_chunks=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_what_bootstraps_does_so_from_the_state_after_the_horizon(flags, horizon, final, ends_in_chunks):
    """The environment counts its steps, so the state h steps later is h more, whatever the ends."""
    store = EpisodeStore.from_episodes([make_episode(len(flags), terminals=np.flatnonzero(flags), final=final)] * 2)
    chunk = chunks.gather(store, np.arange(store.num_rows), horizon, ends_in_chunks=ends_in_chunks)
    bootstraps = (chunk["sequence_mask"] * chunk["bootstrap_mask"]) == 1
    np.testing.assert_array_equal(chunk["next_state"][bootstraps], chunk["state"][bootstraps] + horizon)
    unknown = (chunk["step_id"] + horizon > len(flags)) | ((chunk["step_id"] + horizon == len(flags)) & (not final))
    np.testing.assert_array_equal(bootstraps, ~unknown & (chunk["bootstrap_mask"] == 1))  # and nothing else is left out


def test_a_final_observation_has_the_form_of_the_others():
    episode = make_episode(3, cameras=["top"], final=True)
    for final in (
        FinalObservation(np.zeros(2, np.float32), episode.final.images),
        FinalObservation(np.float32([np.nan]), episode.final.images),
        FinalObservation(np.float32([1]), {}),
        FinalObservation(np.float32([1]), {"top": np.zeros((4, 4, 3), np.uint8)}),
    ):
        with pytest.raises(ValueError, match=r"mine: final (state|images/top): expected finite"):
            EpisodeStore().append(dataclasses.replace(episode, final=final, source="mine"))


def test_bad_horizon():
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        gather_one(make_episode(3), 0, 0)


@pytest.fixture
def store():
    return EpisodeStore.from_episodes([make_episode(length) for length in (5, 2, 3, 4)])


def draw(store, sequence_ratio, *, batch_size=4000, horizon=3):
    return chunks.start_rows(store, chunks.step_rng(0, 0), batch_size, horizon, sequence_ratio)


def test_full_windows_are_drawn_evenly_from_all_that_fit(store):
    rows, counts = np.unique(draw(store, 1.0), return_counts=True)
    np.testing.assert_array_equal(rows, [0, 1, 2, 7, 10, 11])  # episodes start at rows 0, 5, 7, 10
    np.testing.assert_allclose(counts, 4000 / 6, rtol=0.15)


def test_anywhere_means_every_row(store):
    rows, counts = np.unique(draw(store, 0.0), return_counts=True)
    np.testing.assert_array_equal(rows, np.arange(14))
    np.testing.assert_allclose(counts, 4000 / 14, rtol=0.25)


def test_sequence_ratio_is_a_share_of_the_batch(store):
    rows = draw(store, 0.75, batch_size=8)
    assert rows.shape == (8,)
    assert np.isin(rows[:6], [0, 1, 2, 7, 10, 11]).all()
    tails = draw(store, 0.75)[3000:]
    assert not np.isin(tails, [0, 1, 2, 7, 10, 11]).all()


def test_where_no_window_fits_all_rows_are_drawn(store):
    rows = draw(store, 1.0, horizon=6)
    np.testing.assert_array_equal(np.unique(rows), np.arange(14))


def test_an_empty_store_is_refused():
    with pytest.raises(ValueError, match="empty EpisodeStore"):
        draw(EpisodeStore(), 1.0)


def test_rng_is_a_function_of_seed_and_step():
    numbers = {
        (seed, step): chunks.step_rng(seed, step).integers(1 << 60) for seed in range(4) for step in (0, 1, 1 << 33)
    }
    assert len(set(numbers.values())) == 12
    assert chunks.step_rng(3, 1).integers(1 << 60) == numbers[3, 1]
