"""The choice among candidates, against search by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acrlpd.agents import sampling

N, B = 7, 3


@pytest.fixture(scope="module")
def candidates():
    return jnp.asarray(np.random.default_rng(0).normal(size=(N, B, 2, 2)), jnp.float32)


@pytest.fixture(scope="module")
def scores():
    return jnp.asarray(np.random.default_rng(1).normal(size=(N, B)), jnp.float32)


def test_greedy_is_a_search(candidates, scores):
    chunk, index = sampling.select(candidates, scores)
    for b in range(B):
        best = max(range(N), key=lambda n: scores[n, b])
        assert index[b] == best
        np.testing.assert_array_equal(chunk[b], candidates[best, b])


def test_one_candidate_is_chosen(candidates, scores):
    for rng in (None, jax.random.key(0)):
        chunk, index = sampling.select(candidates[:1], scores[:1], rng, temperature=1.0)
        np.testing.assert_array_equal(index, jnp.zeros(B))
        np.testing.assert_array_equal(chunk, candidates[0])


@pytest.mark.parametrize("block_size", [None, 1, 2, 3, 7, 100])
def test_blocks_draw_the_same(block_size, candidates, scores):
    """Blocks of 3 leave one over, blocks of 2 and 7 do or do not."""

    def draw(noise):
        return {"chunk": 2 * noise, "score": noise.sum(axis=(2, 3))}

    drawn = sampling.in_blocks(draw, candidates, block_size=block_size)
    np.testing.assert_array_equal(drawn["chunk"], 2 * candidates)
    np.testing.assert_allclose(drawn["score"], candidates.sum(axis=(2, 3)), rtol=1e-6)


def test_blocks_bound_what_is_drawn_at_once(candidates):
    sizes = []

    def draw(noise):
        sizes.append(len(noise))
        return noise

    sampling.in_blocks(draw, candidates, block_size=3)
    assert set(sizes) == {3, 1}


@pytest.fixture(scope="module")
def choices(candidates, scores):
    """Indices [draw b] of many keys."""

    def drawn(number=2000, **options):
        keys = jax.random.split(jax.random.key(0), number)
        return np.asarray(jax.vmap(lambda key: sampling.select(candidates, scores, key, **options)[1])(keys))

    return drawn


def test_exploration_follows_the_softmax(choices, scores):
    drawn = choices(temperature=0.7)
    frequency = np.stack([np.bincount(drawn[:, b], minlength=N) for b in range(B)], axis=1) / len(drawn)
    np.testing.assert_allclose(frequency, jax.nn.softmax(scores / 0.7, axis=0), atol=0.04)


def test_top_k_keeps_to_the_best(choices, scores):
    """All of the best three are drawn at a high temperature, and nothing else."""
    drawn = choices(temperature=100.0, top_k=3)
    for b in range(B):
        assert set(drawn[:, b]) == set(np.argsort(-scores[:, b])[:3].tolist())


def test_top_k_of_more_than_there_are_is_all(choices):
    np.testing.assert_array_equal(choices(50, temperature=1.0, top_k=N + 1), choices(50, temperature=1.0))


def test_cold_exploration_is_greedy(choices, scores):
    drawn = choices(20, temperature=1e-9)
    np.testing.assert_array_equal(drawn, np.broadcast_to(np.argmax(scores, axis=0), drawn.shape))


@pytest.mark.parametrize(("share", "kept"), [(1.0, N), (0.5, -(-N // 2)), (0.01, 1)])
def test_typical_candidates_are_those_nearest_to_the_mean(candidates, share, kept):
    found = np.asarray(sampling.typical(candidates, share))
    chunks = np.asarray(candidates)
    distance = np.linalg.norm((chunks - chunks.mean(axis=0)).reshape(N, B, -1), axis=2)
    for b in range(B):
        assert set(np.flatnonzero(found[:, b])) == set(np.argsort(distance[:, b])[:kept].tolist())


def test_mean_distance_by_hand():
    """Three chunks on a line, at 0, 3 and 7, spread over horizon and action as 3-4-5 triangles."""
    unit = np.array([[0.6, 0.0], [0.0, 0.8]])
    line = jnp.asarray(np.stack([0 * unit, 3 * unit, 7 * unit])[:, None], jnp.float32)
    np.testing.assert_allclose(sampling.mean_distance(line)[:, 0], [(3 + 7) / 2, (3 + 4) / 2, (7 + 4) / 2], atol=2e-3)


def test_mean_distance_of_one_is_zero():
    np.testing.assert_allclose(sampling.mean_distance(jnp.ones((1, 2, 2, 2))), jnp.zeros((1, 2)), atol=1e-3)


@pytest.mark.parametrize(("bonus", "expected"), [(0.0, 1), (0.4, 1), (0.6, 2)])
def test_diversity_bonus(bonus, expected):
    """Chunks at 0, 3 and 7 with scores 0, 1, 0: the third is 2 further out than the second, worth 1 from 0.5 on."""
    line = jnp.array([0.0, 3.0, 7.0]).reshape(3, 1, 1, 1)
    _, index = sampling.select(line, jnp.array([[0.0], [1.0], [0.0]]), diversity_bonus=bonus)
    assert index == expected


def test_take():
    table = jnp.arange(6).reshape(3, 2).astype(jnp.float32)
    np.testing.assert_array_equal(sampling.take(table, jnp.array([2, 0])), [4.0, 1.0])
