"""Agreement of the critic with the outcome: Q of the chosen chunks against the returns that followed them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from acrlpd.envs.rollout import Rollout

NUM_BINS = 10


@dataclasses.dataclass(frozen=True)
class Choice:
    """The value of one chosen chunk among its candidates."""

    q: float  # Q of the chosen chunk
    q_mean: float  # mean over the candidates
    q_std: float


@dataclasses.dataclass(frozen=True)
class Bin:
    """Chunks of similar Q: their mean Q, and the mean discounted return that followed them."""

    q: float
    returns: float
    count: int


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement between Q of every executed chunk and the discounted return from its start to the end of the episode.

    The return is cut at the time limit, but Q is not: with rewards of -1 and 0 an unsolved episode's true
    return is lower than the one used here, so ``overestimation`` is a lower bound. A number that the episodes do not
    determine (all solved, or none) is None.
    """

    chunks: int
    auc: float | None  # chance that the first Q of a solved episode lies above that of an unsolved one
    q_success_correlation: float | None  # Spearman: first Q of an episode and whether it was solved
    q_return_correlation: float | None  # Spearman: Q and return of all chunks
    overestimation: float  # mean of Q - return
    overestimation_solved: float | None  # the same in solved episodes alone, where the return is exact
    calibration_error: float  # mean over chunks of the distance between a bin's mean Q and its mean return
    bins: tuple[Bin, ...]
    choice_gain: float  # mean Q of the chosen chunk above the mean of its candidates
    candidate_std: float  # mean standard deviation of Q among candidates

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def agreement(
    rollouts: Sequence[Rollout],
    choices: Mapping[int, Sequence[Choice]],
    *,
    discount: float,
    execute_horizon: int,
) -> Agreement:
    """Compare Q with returns. ``choices`` holds the chunks of each episode in order, by the episode's number."""
    returns = [discounted_returns(each.episode.rewards, discount)[::execute_horizon] for each in rollouts]
    chosen = [choices[each.number] for each in rollouts]
    q = np.array([choice.q for episode in chosen for choice in episode])
    achieved = np.concatenate(returns)
    if len(q) != len(achieved):
        raise ValueError(f"{len(q)} chosen chunks for {len(achieved)} executed ones: the choices are of another run")
    success = np.array([each.success for each in rollouts])
    of_solved = np.repeat(success, [len(each) for each in returns])
    first_q = np.array([episode[0].q for episode in chosen])
    bins = calibration(q, achieved)
    return Agreement(
        chunks=len(q),
        auc=auc(first_q[success], first_q[~success]),
        q_success_correlation=spearman(first_q, success.astype(np.float64)),
        q_return_correlation=spearman(q, achieved),
        overestimation=float(np.mean(q - achieved)),
        overestimation_solved=float(np.mean((q - achieved)[of_solved])) if of_solved.any() else None,
        calibration_error=sum(each.count * abs(each.q - each.returns) for each in bins) / len(q),
        bins=bins,
        choice_gain=float(np.mean([choice.q - choice.q_mean for episode in chosen for choice in episode])),
        candidate_std=float(np.mean([choice.q_std for episode in chosen for choice in episode])),
    )


def discounted_returns(rewards: Float[np.ndarray, " t"], discount: float) -> Float[np.ndarray, " t"]:
    """Return the discounted return from each step to the end.

    >>> discounted_returns(np.array([-1.0, -1.0, 0.0]), 0.5)
    array([-1.5, -1. ,  0. ])
    """
    returns = np.zeros(len(rewards))
    following = 0.0
    for step in reversed(range(len(rewards))):
        following = float(rewards[step]) + discount * following
        returns[step] = following
    return returns


def calibration(q: Float[np.ndarray, " n"], returns: Float[np.ndarray, " n"]) -> tuple[Bin, ...]:
    """Return bins of equally many chunks, by increasing Q."""
    order = np.argsort(q, kind="stable")
    parts = [part for part in np.array_split(order, NUM_BINS) if len(part)]
    return tuple(Bin(float(q[part].mean()), float(returns[part].mean()), len(part)) for part in parts)


def auc(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " n"]) -> float | None:
    """Return the area under the ROC curve (Mann-Whitney statistic, ties count half); None if one side is empty."""
    if not len(positive) or not len(negative):
        return None
    of_positive = ranks(np.concatenate([positive, negative]))[: len(positive)]
    pairs = of_positive.sum() - len(positive) * (len(positive) + 1) / 2
    return float(pairs / (len(positive) * len(negative)))


def auc_interval(found: float, positives: int, negatives: int, z: float = 1.959964) -> tuple[float, float]:
    """Return a 95 % interval of an AUC that was found with so many cases of each kind.

    It has the areas from which the one found is no further than ``z`` standard errors, by the variance of Hanley and
    McNeil (1982) with equal numbers of both kinds, which is Newcombe's (2006) method 5. Unlike an interval around the
    area found, it does not shrink to a point at 1: ``auc_interval(1.0, 3, 3)`` is about (0.50, 1).
    """
    area = np.linspace(0, 1, 10_001)
    half = (positives + negatives) / 2 - 1
    variance = area * (1 - area) * (1 + half * (1 - area) / (2 - area) + half * area / (1 + area))
    near = area[np.abs(area - found) <= z * np.sqrt(variance / (positives * negatives)) + 1e-9]
    return float(near[0]), float(near[-1])


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float | None:
    """Return the correlation of the ranks (Spearman 1904); ties share their mean rank. None if either is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def ranks(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the ranks, from 1; equal values share their mean rank.

    >>> ranks(np.array([10.0, 30.0, 10.0]))
    array([1.5, 3. , 1.5])
    """
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
