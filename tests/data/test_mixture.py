"""Several data sets in one run: who is drawn how often, what must agree, and what one set alone gives."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acrlpd.data import statistics
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.mixture import Facts, Mixture, check_alike
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.transforms import Compose, ResizeImages
from acrlpd.types import Episode

FACTS = Facts("a", 4, 2, ("top", "wrist"), 10.0, "arm")


def make_store(lengths, *, seed=0, size=(6, 8), scale=1.0):
    rng = np.random.default_rng(seed)
    return EpisodeStore.from_episodes(
        Episode(
            state=(scale * rng.normal(size=(n, 3))).astype(np.float32),
            actions=rng.normal(size=(n, 2)).astype(np.float32),
            rewards=np.zeros(n, np.float32),
            terminals=np.zeros(n, bool),
            task=f"set {seed}",
            images={"top": rng.integers(0, 256, (n, *size, 3), np.uint8)},
        )
        for n in lengths
    )


def make_loader(prior, **changes):
    arguments = {"batch_size": 8, "horizon": 3, "sequence_ratio": 0.5, "seed": 0, "prefetch": 0} | changes
    return ChunkLoader(prior, Compose((ResizeImages(4, 4),)), **arguments)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def set_of(batch, mixture):
    """The number of the set that each chunk comes from; the last one is the replay."""
    return np.searchsorted(np.array(mixture.first_ids), batch.episode_id, side="right") - 1


def mixture_of(*stores, weights=None):
    return Mixture(stores, tuple(f"set {number}" for number in range(len(stores))), weights)


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.floats(0.02, 50), min_size=2, max_size=4),
    sequence_ratio=st.sampled_from([0.0, 0.5, 1.0]),
    data=st.data(),
)
def test_chunks_come_from_each_set_by_its_weight(weights, sequence_ratio, data):
    """Whatever the sizes of the sets, in batches of a fixed size; where no whole chunk fits, too."""
    lengths = [data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)) for _ in weights]
    mixture = mixture_of(*(make_store(each, seed=seed) for seed, each in enumerate(lengths)), weights=tuple(weights))
    rng = np.random.default_rng(0)
    counts = np.zeros(len(weights))
    for _ in range(200):
        rows = mixture.start_rows(rng, 64, 5, sequence_ratio)
        assert sum(map(len, rows)) == 64
        for store, own in zip(mixture.stores, rows, strict=True):
            assert ((own >= 0) & (own < store.num_rows)).all()
        counts += [len(own) for own in rows]
    shares = np.array(weights) / sum(weights)
    error = 5 * np.sqrt(shares * (1 - shares) / counts.sum())
    assert (np.abs(counts / counts.sum() - shares) < error).all()
    np.testing.assert_allclose(mixture.shares, shares)


def test_without_weights_every_step_is_as_likely():
    assert mixture_of(make_store([30]), make_store([5, 5])).shares == (0.75, 0.25)


def test_whole_chunks_are_as_many_as_asked_for_though_a_set_gives_few():
    mixture = mixture_of(make_store([50], seed=1), make_store([50], seed=2), weights=(0.97, 0.03))
    loader = make_loader(mixture, sequence_ratio=1.0, batch_size=8)
    found = [loader.batch(step) for step in range(100)]
    assert all(batch.valid.all() for batch in found)
    assert sum((set_of(batch, mixture) == 1).sum() for batch in found) > 0


def test_pictures_of_other_sizes_become_alike():
    mixture = mixture_of(make_store([9], seed=1), make_store([9], seed=2, size=(10, 4)), weights=(1.0, 1.0))
    batch = make_loader(mixture).batch(0)
    assert batch.observations.images["top"].shape == (8, 4, 4, 3)
    assert set(set_of(batch, mixture)) == {0, 1}


@pytest.mark.parametrize("online_ratio", [0.5, None])
@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_a_batch_is_a_function_of_seed_and_step(online_ratio, num_hosts):
    """Asked for in any order, by one process or by several that make a slice each, beside replay or without."""
    mixture = mixture_of(make_store([7, 2], seed=1), make_store([9, 4], seed=2), weights=(0.7, 0.3))
    replay = make_store([6], seed=3)
    for how in ({}, {"online": True}, {"critic_alone": True}):
        expected = [make_loader(mixture, replay=replay, online_ratio=online_ratio).batch(k, **how) for k in (5, 2)]
        hosts = [
            make_loader(mixture, replay=replay, online_ratio=online_ratio, host_index=k, num_hosts=num_hosts)
            for k in range(num_hosts)
        ]
        for step, whole in zip((5, 2), expected, strict=True):
            parts = [host.batch(step, **how) for host in hosts]
            assert_same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), whole)
    assert set(set_of(expected[0], mixture)) <= {0, 1}
    online = make_loader(mixture, replay=replay, online_ratio=0.5).batch(1, online=True)
    assert (set_of(online, mixture)[:4] == 2).all()


def test_one_set_is_drawn_from_as_ever():
    store = make_store([7, 2, 9])
    assert_same(make_loader(store).batch(3), make_loader(mixture_of(store)).batch(3))
    assert_same(make_loader(store).batch(3), make_loader(mixture_of(store, weights=(5.0,))).batch(3))


def test_what_the_sets_give_is_told():
    loader = make_loader(mixture_of(make_store([7, 2]), make_store([9]), weights=(3, 1)))
    first, other = loader.contents()["sets"]
    assert first == {"name": "set 0", "share": 0.75, "episodes": 2, "steps": 9}
    assert other == {"name": "set 1", "share": 0.25, "episodes": 1, "steps": 9}
    assert (loader.contents()["episodes"], loader.contents()["steps"]) == (3, 18)
    assert "sets" not in make_loader(make_store([7])).contents()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": 5}, "state dimensions: 4 and 5"),
        ({"actions": 3}, "action dimensions: 2 and 3"),
        ({"cameras": ("top",)}, "cameras: top, wrist and top"),
        ({"cameras": ()}, "cameras: top, wrist and none"),
        ({"robot": "leg"}, r"robots \(a run normalizes by the statistics of one\): arm and leg"),
    ],
)
def test_sets_that_differ_are_refused(changes, told):
    other = dataclasses.replace(FACTS, name="b", **changes)
    with pytest.raises(ValueError, match=f"a and b cannot be trained on together: {told}"):
        check_alike([FACTS, dataclasses.replace(FACTS, name="same"), other])
    if "cameras" in changes or "robot" in changes:
        check_alike([FACTS, other], of_one_robot=True)


def test_what_sets_may_differ_in():
    check_alike([FACTS, dataclasses.replace(FACTS, name="b", cameras=("wrist", "top"), fps=None, robot=None)])
    with pytest.warns(UserWarning, match="a has 10 steps a second and b 50: chunks of one last longer"):
        check_alike([FACTS, dataclasses.replace(FACTS, name="b", fps=50.0)])


@pytest.mark.parametrize("horizon", [1, 3])
def test_statistics_count_each_set_as_it_is_drawn(horizon):
    """As those of a set in which the rows of each are repeated by weight."""
    one, other = make_store([40], seed=1), make_store([10], seed=2, scale=5.0)
    shares = (0.25, 0.75)
    found = statistics.from_sources([one, other], shares, horizon=horizon, min_std=0)["state"]
    values = np.concatenate([one.state, *[other.state] * 12]).astype(np.float64)  # 40 to 120
    np.testing.assert_allclose(found.mean, values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.std, values.std(axis=0), rtol=1e-6)
    exact = np.quantile(values, [0.01, 0.99], axis=0, method="inverted_cdf")
    np.testing.assert_allclose([found.q01, found.q99], exact, atol=np.ptp(values) / 2000)
