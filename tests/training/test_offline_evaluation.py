"""Evaluation without a simulator: errors worked out by hand for policies that know what they say."""

import dataclasses

import jax
import numpy as np
import pytest

from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Compose, Normalize
from acrlpd.training import offline_evaluation
from acrlpd.training.agreement import auc_interval
from acrlpd.training.measuring import Measured, Subject, subject_of_agent
from acrlpd.training.offline_evaluation import evaluate_offline, sentences, spread_of, spread_starts
from acrlpd.types import Episode

RNG = jax.random.key(0)
STATS = {
    "state": NormStats(np.zeros(2), np.ones(2)),
    "actions": NormStats(np.array([5.0, 0.0]), np.array([2.0, 1.0])),
}


def episode(length, *, success=True, slope=1.0):
    steps = np.arange(length, dtype=np.float32)
    actions = np.stack([slope * steps, np.full(length, 3.0, np.float32)], axis=1)
    return Episode(
        state=np.stack([steps, np.full(length, float(success is not False))], axis=1).astype(np.float32),
        actions=actions,
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, bool),
        task="climb",
        success=success,
        source=f"episode of {length}",
    )


def knowing(offset, *, q=False, horizon=3, executed=2):
    """A policy that predicts the recorded chunk, off by ``offset`` in normalized units; Q is 1 in successes alone."""

    def measure(seen, actions, valid, keys):
        assert len(valid) == offline_evaluation.BATCH
        return Measured(actions + offset, q=seen.state[:, 1] if q else None)

    return Subject(measure, Compose([Normalize(STATS)]), horizon, executed, has_critics=q)


def evaluated(subject, store, num_chunks, spread=(2.0, 0.0)):
    return evaluate_offline(subject, [store], spread=np.array(spread), num_chunks=num_chunks, rng=RNG)


def test_errors_are_in_the_robots_units_and_relative_to_the_spread():
    """The first dimension rises by 1 a step, and the second never moves, so it has no spread to divide by."""
    found = evaluated(knowing(0.25), EpisodeStore.from_episodes([episode(11)]), 100)
    assert (found.episodes, found.chunks) == (1, 10)  # at steps 1..10; a last action comes before each of them
    np.testing.assert_allclose(found.errors["sample"].dims, [0.5, 0.25], atol=1e-5)
    assert found.score == pytest.approx(0.25, rel=1e-4)
    actions = np.concatenate([np.arange(1, 11), np.arange(2, 11)])  # executed and real: 1 2, 2 3, ..., 9 10, 10
    assert found.errors["mean"].relative == pytest.approx(np.abs(actions - actions.mean()).mean() / 2)
    assert found.errors["repeat"].dims[0] == pytest.approx((10 * 1 + 9 * 2) / 19)
    np.testing.assert_allclose(found.errors["repeat"].steps, [0.5, 1, 1.5], rtol=1e-5)
    assert found.baseline == found.errors["repeat"].relative
    assert found.flow_loss is None
    assert "eval/flow_loss" not in found.metrics()
    assert found.metrics()["eval/action_error"] == found.score
    np.testing.assert_allclose(spread_of([EpisodeStore.from_episodes([episode(11)])]), [np.std(np.arange(11)), 0])


def test_a_failure_is_not_to_be_imitated_but_to_be_told():
    store = EpisodeStore.from_episodes([episode(9, success=False, slope=-4.0), episode(9), episode(9)])
    found = evaluated(knowing(0.0, q=True), store, 30)
    assert (found.episodes, found.judged_episodes) == (3, 2)
    alone = evaluated(knowing(0.0), EpisodeStore.from_episodes([episode(9)]), 10)
    assert found.errors["mean"].relative == pytest.approx(alone.errors["mean"].relative)
    assert dataclasses.astuple(found.telling) == (1.0, *auc_interval(1.0, 2, 1), 2, 1)
    success, failure = found.courses
    assert (success.success, failure.success) == (True, False)
    assert success.places == (0, 2, 4, 6, 8)
    assert success.q == pytest.approx((1.0,) * 5, rel=1e-5)
    np.testing.assert_allclose(success.predicted, success.recorded, atol=1e-5)
    assert np.shape(failure.recorded) == (9, 2)
    assert "lies above that of a failure 100%" in " ".join(sentences(found))
    failures = EpisodeStore.from_episodes([episode(9, success=False)])
    assert evaluated(knowing(0.0, q=True), failures, 9).judged_episodes == 1


def test_chunks_are_spread_over_all_episodes():
    store = EpisodeStore.from_episodes([episode(n) for n in (1, 2, 30, 60)])
    starts = spread_starts([store], 20)
    assert [each.episode for each in starts] == [1, 2, 3]  # one step has no second one
    assert [len(each.rows) for each in starts] == [1, 7, 13]
    for each in starts:
        steps = each.rows - store.starts[each.episode]
        assert 1 <= steps.min() <= steps.max() < store.lengths[each.episode]
    assert len(spread_starts([store, store], 2)) == 2
    with pytest.raises(ValueError, match="no episode has two steps"):
        spread_starts([EpisodeStore.from_episodes([episode(1)])], 5)


def test_what_cannot_be_compared_is_refused():
    still = EpisodeStore.from_episodes([episode(5, slope=0.0)])
    with pytest.raises(ValueError, match="do not move in any dimension"):
        evaluated(knowing(0.0), still, 4, (0.0, 0.0))

    def narrow(seen, actions, valid, keys):
        return Measured(actions[..., :1])

    stats = {key: NormStats(each.mean[:1], each.std[:1]) for key, each in STATS.items()}
    other = Subject(narrow, Compose([Normalize({"actions": stats["actions"]})]), 3, 2, reads_actions=False)
    with pytest.raises(ValueError, match="chunks of 3 steps with 1 dimensions, and the data has actions of 2"):
        evaluated(other, EpisodeStore.from_episodes([episode(5)]), 4)


def test_an_agent_is_measured_in_one_pass(finished, monkeypatch):
    """The same twice; Q and the chosen chunk are the agent's own; draws do not depend on the other episodes."""
    store = finished.loader._prior.stores[0]
    config = dataclasses.replace(finished.config, execute_horizon=2)
    subject = subject_of_agent(finished.agent, finished.parts.transform, config)
    found = evaluated(subject, store, 40, (1.0, 1.0))
    again = evaluated(subject, store, 40, (1.0, 1.0))
    assert found == again
    assert found.errors.keys() == {"sample", "best", "repeat", "mean"}
    assert found.acting is found.errors["best"]
    assert (found.num_samples, found.executed) == (3, 2)
    assert 0.1 < found.flow_loss < 10
    assert (found.telling.successes, found.telling.failures) == (2, 2)
    assert all(course.q for course in found.courses)
    told = "\n".join(sentences(found))
    assert "best of 3" in told
    assert "flow loss" in told
    assert "2 successes, 2 failures" in told


def test_the_interval_of_an_area():
    low, high = auc_interval(0.5, 10, 10)
    assert low == pytest.approx(1 - high)
    assert 0.2 < low < 0.35
    assert auc_interval(1.0, 3, 3)[1] == 1
    assert 0.4 < auc_interval(1.0, 3, 3)[0] < 0.6
    assert auc_interval(1.0, 300, 300)[0] > 0.98
