import numpy as np
import pytest

from acrlpd.training.comparison import bootstrap_interval, compare, mcnemar


class Outcome:
    def __init__(self, seed, success):
        self.seed, self.success = seed, success


def outcomes(successes, first_seed=0):
    return [Outcome(first_seed + place, bool(success)) for place, success in enumerate(successes)]


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 3, 2 * (1 + 4) / 16),
        (2, 2, 1.0),  # twice the tail is above one
    ],
)
def test_mcnemar(only_first, only_second, expected):
    assert mcnemar(only_first, only_second) == pytest.approx(expected)


def test_compare_pairs_by_seed():
    first, second = outcomes([1, 1, 0, 0, 0, 1]), outcomes([1, 0, 1, 1, 0, 1])
    found = compare(first, list(reversed(second)))
    assert (found.episodes, found.first_successes, found.second_successes) == (6, 3, 4)
    assert (found.only_first, found.only_second) == (1, 2)
    assert found.difference == pytest.approx(1 / 6)
    assert found.low < 1 / 6 < found.high
    assert found.p_value == 1.0


def test_pairing_says_more_than_two_intervals():
    """Equally good on seeds of very different difficulty: pairs that agree leave nothing to doubt."""
    same = outcomes([1, 0] * 50)
    assert (compare(same, same).low, compare(same, same).high) == (0, 0)


def test_an_episode_that_one_lost_does_not_count():
    assert compare(outcomes([1, 0, 1]), outcomes([1, 0])).episodes == 2
    with pytest.raises(ValueError, match="share no seed"):
        compare(outcomes([1]), outcomes([1], first_seed=7))


def test_the_bootstrap_interval_is_about_two_standard_errors():
    rng = np.random.default_rng(0)
    first, second = rng.random(400) < 0.4, rng.random(400) < 0.6
    difference = second.astype(float) - first
    error = difference.std() / 20
    low, high = bootstrap_interval(first, second, num_resamples=10_000)
    assert low == pytest.approx(difference.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(difference.mean() + 1.96 * error, abs=0.01)
