import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from acrlpd.data.chunks import gather
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.data.view.transforms import Compose, DeltaActions, Normalize, PadToModel, ResizeImages, TokenizePrompt
from acrlpd.types import ChunkBatch, Episode

STATS = {"state": NormStats(np.ones(3), 2 * np.ones(3)), "actions": NormStats(np.zeros(2), np.ones(2))}
TRANSFORMS = Compose(
    (
        DeltaActions((True, False)),
        Normalize(STATS),
        ResizeImages(4, 4),
        TokenizePrompt(PromptTokenizer(max_length=12)),
        PadToModel(4),
    )
)


def make_store(lengths, *, seed=0, size=(6, 8)):
    rng = np.random.default_rng(seed)
    return EpisodeStore.from_episodes(
        Episode(
            state=rng.normal(size=(n, 3)),
            actions=rng.normal(size=(n, 2)),
            rewards=rng.normal(size=n),
            terminals=np.arange(n) == n - 1,
            task=f"lift number {n}",
            images={"top": rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)},
        )
        for n in lengths
    )


def make_loader(prior=None, replay=None, transform=TRANSFORMS, **changes):
    arguments = {"batch_size": 8, "horizon": 3, "sequence_ratio": 0.5, "seed": 0} | changes
    return ChunkLoader(prior or make_store([7, 2, 9]), transform, replay=replay, **arguments)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_different(first, second):
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second)))


def test_shapes_and_dtypes():
    batch = make_loader().batch(0)
    assert isinstance(batch, ChunkBatch)
    assert all(isinstance(leaf, np.ndarray) and len(leaf) == 8 for leaf in jax.tree.leaves(batch))
    assert batch.actions.shape == (8, 3, 4)
    for observation in (batch.observations, batch.next_observations):
        assert observation.state.shape == (8, 4)
        assert observation.images["top"].shape == (8, 4, 4, 3)
        assert observation.images["top"].dtype == np.uint8
        assert observation.image_masks["top"].all()
        assert observation.tokenized_prompt.shape == (8, 12)
    assert {getattr(batch, key).dtype for key in ("actions", "rewards", "terminals", "valid", "sequence_mask")} == {
        np.dtype(np.float32)
    }
    assert {batch.episode_id.dtype, batch.step_id.dtype} == {np.dtype(np.int32)}


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_may_be_an_int(share):
    assert_same(make_loader(sequence_ratio=share).batch(3), make_loader(sequence_ratio=float(share)).batch(3))


def test_a_batch_holds_what_its_ids_say():
    prior = make_store([7, 2, 9])
    batch = make_loader(prior).batch(5)
    starts = np.array([0, 7, 9])[batch.episode_id] + batch.step_id
    raw = gather(prior, starts, 3)
    np.testing.assert_array_equal(batch.rewards, raw["rewards"])  # raw, undiscounted
    np.testing.assert_array_equal(batch.valid, raw["valid"])
    np.testing.assert_array_equal(batch.terminals, raw["terminals"])
    np.testing.assert_array_equal(batch.bootstrap_mask, raw["bootstrap_mask"])
    np.testing.assert_allclose(batch.next_observations.state[:, :3], (raw["next_state"] - 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        batch.actions[..., :2], raw["actions"] - raw["state"][:, None, :2] * np.array([1.0, 0.0]), atol=1e-5
    )
    tokens, _ = PromptTokenizer(max_length=12).encode_batch(raw["prompt"].tolist())
    np.testing.assert_array_equal(batch.observations.tokenized_prompt, tokens)
    np.testing.assert_array_equal(batch.next_observations.tokenized_prompt, tokens)


def test_a_batch_is_a_function_of_seed_step_and_contents():
    loader = make_loader()
    first = loader.batch(11)
    loader.batch(12)
    assert_same(loader.batch(11), first)
    assert_same(make_loader().batch(11), first)
    assert_different(loader.batch(12), first)
    assert_different(make_loader(seed=1).batch(11), first)
    assert_different(make_loader(make_store([7, 2, 9], seed=3)).batch(11), first)


def test_sequence_ratio():
    lengths = np.array([7, 2, 9])
    batch = make_loader(sequence_ratio=1.0, batch_size=64).batch(0)
    assert (batch.step_id + 3 <= lengths[batch.episode_id]).all()
    mixed = make_loader(sequence_ratio=0.25, batch_size=64).batch(0)
    fits = mixed.step_id + 3 <= lengths[mixed.episode_id]
    assert fits[:16].all()
    assert not fits[16:].all()


@pytest.mark.parametrize(("online_ratio", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_online_batches_mix_replay_and_prior(online_ratio, expected):
    prior, replay = make_store([7, 2, 9]), make_store([5, 5], seed=1, size=(3, 3))  # its pictures have another size
    batch = make_loader(prior, replay, online_ratio=online_ratio).batch(3, online=True)
    own = batch.episode_id >= 3  # replayed ids count on after the three prior ones
    np.testing.assert_array_equal(own, np.arange(8) < expected)
    rows = (batch.episode_id[own] - 3) * 5 + batch.step_id[own]
    np.testing.assert_array_equal(batch.rewards[own], gather(replay, rows, 3)["rewards"])
    assert len(jax.tree.leaves(batch)[0]) == 8


def test_without_a_ratio_all_rows_are_equal():
    prior, replay = make_store([7, 2, 9]), make_store([5, 5], seed=1)  # 10 of 28 rows are replayed
    loader = make_loader(prior, replay, online_ratio=None, batch_size=32)
    batches = [loader.batch(step, online=True) for step in range(200)]
    assert all(len(batch.rewards) == 32 for batch in batches)
    shares = np.array([(batch.episode_id >= 3).mean() for batch in batches])
    assert abs(shares.mean() - 10 / 28) < 0.02
    assert len(set(shares)) > 1
    assert_same(loader.batch(7, online=True), batches[7])


def test_chunks_that_an_end_cuts_short_can_be_left_out():
    store = make_store([7, 2, 9])
    rows = np.arange(18)
    kept, dropped = (gather(store, rows, 3, ends_in_chunks=ends) for ends in (True, False))
    fits = kept["step_id"] + 3 <= np.array([7, 2, 9])[kept["episode_id"]]
    np.testing.assert_array_equal(dropped["sequence_mask"], fits)
    np.testing.assert_array_equal(kept["sequence_mask"], fits | kept["terminals"].any(axis=1))
    assert kept["sequence_mask"].sum() > dropped["sequence_mask"].sum()
    batch = make_loader(ends_in_chunks=False, sequence_ratio=0.0).batch(0)
    np.testing.assert_array_equal(batch.sequence_mask, batch.step_id + 3 <= np.array([7, 2, 9])[batch.episode_id])


def test_batches_for_critics_alone_bring_the_chunk_that_follows():
    prior = make_store([7, 2, 9])
    plain = Compose(())
    loader = make_loader(prior, transform=plain, sequence_ratio=0.0, batch_size=64)
    batch, usual = loader.batch(0, critic_alone=True), loader.batch(0)
    assert_same(dataclasses.replace(batch, next_actions=None), usual)
    starts, lengths = np.array([0, 7, 9]), np.array([7, 2, 9])
    ends = (starts + lengths)[batch.episode_id]
    following = np.minimum(starts[batch.episode_id] + batch.step_id + 3, ends - 1)  # episodes end with a terminal
    np.testing.assert_array_equal(batch.next_actions, gather(prior, following, 3)["actions"])


def test_a_successor_that_a_time_limit_cuts_short_has_no_value():
    store = EpisodeStore.from_episodes([dataclasses.replace(make_store([8]).episode(0), terminals=np.zeros(8, bool))])
    loader = make_loader(store, transform=Compose(()), sequence_ratio=0.0, batch_size=64)
    batch = loader.batch(0, critic_alone=True)
    np.testing.assert_array_equal(batch.sequence_mask, batch.step_id + 6 <= 8)
    assert batch.sequence_mask.sum() < loader.batch(0).sequence_mask.sum()


def test_what_follows_comes_after_the_critics_horizon():
    """Chunks of four steps, of which two are judged: the successor starts two steps later and needs two steps."""
    store = EpisodeStore.from_episodes([dataclasses.replace(make_store([8]).episode(0), terminals=np.zeros(8, bool))])
    options = {"transform": Compose(()), "sequence_ratio": 0.0, "batch_size": 64, "horizon": 4, "backup_horizon": 2}
    batch = make_loader(store, **options).batch(0, critic_alone=True)
    np.testing.assert_array_equal(batch.sequence_mask, batch.step_id + 4 <= 8)
    after = np.minimum(batch.step_id + 2, 7)
    np.testing.assert_array_equal(batch.next_observations.state, store.state[after])
    np.testing.assert_array_equal(batch.next_actions, gather(store, after, 4)["actions"])
    np.testing.assert_array_equal(batch.actions, gather(store, batch.step_id, 4)["actions"])
    stored = types.SimpleNamespace(take=lambda rows: rows)
    usual = make_loader(store, prefixes=[stored], **options).batch(0)
    np.testing.assert_array_equal(usual.observations.prefix, usual.step_id)
    np.testing.assert_array_equal(usual.next_observations.prefix, np.minimum(usual.step_id + 2, 7))
    with pytest.raises(ValueError, match=r"backup_horizon must lie between 1 and horizon \(3\), got 4"):
        make_loader(backup_horizon=4)


def test_batches_made_ahead_are_of_the_kind_that_is_asked_for():
    loader = make_loader()
    loader.batch(0, critic_alone=True)
    assert loader.batch(1).next_actions is None
    assert_same(loader.batch(2, critic_alone=True), make_loader(prefetch=0).batch(2, critic_alone=True))


def test_online_without_replayed_rows_is_prior_data():
    replay = EpisodeStore()
    loader = make_loader(replay=replay)
    assert_same(loader.batch(3, online=True), make_loader().batch(3))
    replay.append(make_store([4]).episode(0))
    assert (loader.batch(3, online=True).episode_id >= 3).sum() == 4
    assert (loader.batch(3).episode_id < 3).all()  # offline batches never touch it


@pytest.mark.parametrize(("own_episodes", "expected"), [(1, 0.1), (3, 0.3), (5, 0.5), (9, 0.5)])
def test_the_share_of_own_rows_grows_with_their_episodes(own_episodes, expected):
    loader = make_loader(replay=make_store([4] * own_episodes, seed=1), online_ratio_episodes=5, batch_size=32)
    shares = [float((loader.batch(step, online=True).episode_id >= 3).mean()) for step in range(200)]
    assert abs(np.mean(shares) - expected) < 0.005
    assert max(shares) - min(shares) <= 1 / 32 + 1e-6


@pytest.mark.parametrize(
    "changes",
    [{"sequence_ratio": 1.1}, {"online_ratio": -0.1}, {"online_ratio_episodes": 0}, {"batch_size": 0}, {"seed": -1}],
)
def test_bad_arguments_are_named(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        make_loader(**changes)


def test_empty_prior_is_refused():
    with pytest.raises(ValueError, match="prior data is empty"):
        ChunkLoader(EpisodeStore(), TRANSFORMS, batch_size=1, horizon=1, sequence_ratio=0.0, seed=0)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("acrlpd-prefetch")]


@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [4, 5, 2, 3], [0, 2**30, 2**30 + 1]])
def test_batches_made_ahead_are_those_asked_for(steps):
    """Whatever comes next: a resumed run begins in the middle, one that rolled back jumps."""
    loader, plain = make_loader(), make_loader(prefetch=0)
    for step in steps:
        assert_same(loader.batch(step), plain.batch(step))
    assert len(prefetch_threads()) == 1
    loader.close()
    plain.close()
    assert not prefetch_threads()
    assert_same(loader.batch(7), plain.batch(7))  # close is no end
    loader.close()


def test_online_batches_see_the_newest_episode_and_keep_none_in_store():
    replay = make_store([5], seed=1)
    loader = make_loader(replay=replay)
    loader.batch(0)
    loader.batch(1, online=True)
    replay.append(make_store([4], seed=2).episode(0))
    assert_same(loader.batch(2, online=True), make_loader(replay=replay, prefetch=0).batch(2, online=True))
    assert not loader._ahead
    loader.close()


class FailsAt:
    """A transform that fails at its n-th call; a batch takes two."""

    def __init__(self, call):
        self.calls_left = call

    def __call__(self, data):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise ValueError("the picture is torn")
        return data

    def inverse(self, data):
        return data


def test_an_error_in_the_thread_is_raised_here_at_its_batch():
    failing = 4
    loader = make_loader(transform=FailsAt(2 * failing + 1))
    for step in range(failing):
        loader.batch(step)
    with pytest.raises(ValueError, match="the picture is torn"):
        loader.batch(failing)
    loader.batch(failing)  # it was not remembered
    loader.close()


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_make_slices_of_one_batch(num_hosts, online):
    replay = make_store([4, 4], seed=1)
    whole = make_loader(replay=replay, online_ratio=0.4)  # 3 of 8 replayed: the border falls into a slice
    hosts = [
        make_loader(replay=replay, online_ratio=0.4, host_index=index, num_hosts=num_hosts)
        for index in range(num_hosts)
    ]
    for step in range(3):
        parts = [host.batch(step, online=online) for host in hosts]
        assert {len(part.actions) for part in parts} == {8 // num_hosts}
        assert_same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), whole.batch(step, online=online))


@pytest.mark.parametrize(("host_index", "num_hosts"), [(2, 2), (-1, 2), (0, 3), (0, 0)])
def test_slices_must_be_equal_and_there(host_index, num_hosts):
    with pytest.raises(ValueError, match=r"must divide batch_size \(8\)"):
        make_loader(host_index=host_index, num_hosts=num_hosts)


def test_stats_count_what_was_made():
    loader = make_loader(prior=make_store([2]), sequence_ratio=0.0, prefetch=0)
    assert loader.stats()["batches"] == 0
    batches = [loader.batch(step) for step in range(5)]
    stats = loader.stats()
    assert stats["batches"] == 5
    assert stats["valid_ratio"] == pytest.approx(np.mean([batch.valid for batch in batches]))
    assert stats["valid_ratio"] < 1  # two steps do not fill a horizon of three
    assert stats["batches_per_s"] > 0
    assert stats["wait_s"] > 0
    assert "cache_hit_rate" not in stats


class Rows:
    """Stored numbers of rows: ten times the row's own, so that it shows which row was taken."""

    def __init__(self, kind):
        self.kind = kind

    def take(self, rows):
        return self.kind, 10 * rows


@pytest.mark.parametrize("whole", [True, False])
def test_next_observations_may_have_features_alone(whole):
    """With or without whole prefixes in the place of the first observations; without them, those keep their images."""
    stored = [Rows("whole")] if whole else None
    loader = make_loader(prefixes=stored, next_features=[Rows("features")], prefetch=0)
    plain = make_loader(prefetch=0).batch(3)
    batch, rows = loader.batch(3), drawn_rows(plain)
    assert batch.next_observations.images == {}
    assert batch.next_observations.prefix[0] == "features"
    if whole:
        assert batch.observations.images == {}
        assert batch.observations.prefix[0] == "whole"
        np.testing.assert_array_equal(batch.observations.prefix[1], 10 * rows)
    else:
        assert batch.observations.prefix is None
        assert_same(batch.observations.images, plain.observations.images)
    ends = np.array([6, 8, 17])[np.searchsorted([6, 8, 17], rows)]
    np.testing.assert_array_equal(batch.next_observations.prefix[1], 10 * np.minimum(rows + 3, ends))
    assert_same(batch.next_observations.state, plain.next_observations.state)
    assert loader.batch(3, online=True).next_observations.prefix is None


def drawn_rows(batch):
    """The rows of the store of 7, 2 and 9 steps at which the chunks start."""
    return np.array([0, 7, 9])[batch.episode_id] + batch.step_id


def test_batches_for_critics_alone_may_do_without_next_chunks():
    """Then no chunk stays out of the TD loss for want of a successor."""
    with_next, without = (
        make_loader(next_actions=each, prefetch=0).batch(1, critic_alone=True) for each in (True, False)
    )
    assert with_next.next_actions is not None
    assert without.next_actions is None
    np.testing.assert_array_equal(without.sequence_mask, make_loader(prefetch=0).batch(1).sequence_mask)
