import numpy as np
import pytest

from acrlpd.envs.rollout import Rollout
from acrlpd.training.agreement import Choice, agreement, auc, calibration, discounted_returns, ranks, spearman
from acrlpd.types import Episode


def rollout(number, rewards, success):
    rewards = np.array(rewards, np.float32)
    length = len(rewards)
    episode = Episode(np.zeros((length, 1)), np.zeros((length, 1)), rewards, np.zeros(length, bool), "go")
    return Rollout(episode, number, 100 + number, float(rewards.sum()), length, success)


def test_agreement_worked_out_by_hand():
    rollouts = [rollout(0, [-1, -1, 0], True), rollout(1, [-1, -1, -1, -1], False)]
    # With discount 0.5: returns at the starts of chunks of two are -1.5, 0 and -1.875, -1.5.
    choices = {
        0: [Choice(-1.0, -1.5, 0.2), Choice(0.5, 0.0, 0.2)],
        1: [Choice(-2.0, -2.0, 0.0), Choice(-1.5, -1.5, 0.0)],
    }
    found = agreement(rollouts, choices, discount=0.5, execute_horizon=2)
    assert found.chunks == 4
    assert found.auc == 1.0
    assert found.q_success_correlation == pytest.approx(1.0)
    assert found.q_return_correlation == pytest.approx(np.corrcoef([3, 4, 1, 2], [2.5, 4, 1, 2.5])[0, 1])
    assert found.overestimation == pytest.approx((0.5 + 0.5 - 0.125 + 0) / 4)
    assert found.overestimation_solved == pytest.approx(0.5)
    assert found.calibration_error == pytest.approx((0.5 + 0.5 + 0.125 + 0) / 4)  # four bins of one chunk
    assert found.choice_gain == pytest.approx(0.25)
    assert found.candidate_std == pytest.approx(0.1)


def test_what_the_episodes_do_not_determine_is_none():
    found = agreement([rollout(0, [-1], False)], {0: [Choice(-1.0, -1.0, 0.0)]}, discount=0.9, execute_horizon=1)
    assert (found.auc, found.q_success_correlation, found.overestimation_solved) == (None, None, None)


def test_choices_of_another_run_are_refused():
    with pytest.raises(ValueError, match="of another run"):
        agreement([rollout(0, [-1, -1], False)], {0: [Choice(0.0, 0.0, 0.0)]}, discount=0.9, execute_horizon=1)


def test_discounted_returns():
    np.testing.assert_allclose(discounted_returns(np.array([-1.0, -1.0, 0.0]), 0.5), [-1.5, -1.0, 0.0])


def test_ranks_share_ties():
    assert ranks(np.array([10.0, 30.0, 10.0])).tolist() == [1.5, 3, 1.5]


def test_auc_counts_a_tie_half():
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == (0.5 + 1 + 1 + 1) / 4
    assert auc(np.array([1.0]), np.array([])) is None


def test_spearman_sees_order_alone():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(x, np.ones(4)) is None


def test_calibration_bins_hold_equally_many():
    q = np.arange(25.0)
    bins = calibration(q, 2 * q)
    assert [each.count for each in bins] == [3] * 5 + [2] * 5
    assert bins[0].q == 1
    assert all(each.returns == 2 * each.q for each in bins)
