"""Latency budget: choose the largest measured plan that can be computed before an answer is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

SHRINK = 4  # each plan has a quarter of the candidates of the one before
SAFETY = 1.1  # a plan fits if the time left is at least its expected time times this
SMOOTHING = 0.1  # weight of a new measurement


@dataclasses.dataclass(frozen=True)
class Plan:
    """The amount of computation for an answer."""

    num_samples: int  # candidates
    num_steps: int  # Euler steps of the flow; for pi0-FAST, the max. number of tokens
    guided: bool = False  # whether Q's gradient guides the candidates, which costs a pass of the critics in each step

    def __post_init__(self):
        if self.num_samples < 1 or self.num_steps < 1:
            raise ValueError(f"an answer needs at least one candidate and one flow step, got {self}")


def smaller_plans(plan: Plan) -> tuple[Plan, ...]:
    """Return ``plan`` and smaller ones: first with fewer candidates, then one candidate with half the flow steps.

    Plan(32, 10) gives 32, 8, 2 and 1 candidates in 10 steps, and 1 in 5. A guided one has a quarter of its candidates
    first, and then those of the plan without guidance.
    """
    if plan.guided:
        fewer = dataclasses.replace(plan, num_samples=max(1, plan.num_samples // SHRINK))
        return (*dict.fromkeys((plan, fewer)), *smaller_plans(dataclasses.replace(plan, guided=False)))
    plans = [plan]
    while plans[-1].num_samples > 1:
        plans.append(dataclasses.replace(plan, num_samples=max(1, plans[-1].num_samples // SHRINK)))
    if plan.num_steps > 1:
        plans.append(Plan(1, plan.num_steps // 2))
    return tuple(plans)


class Budget:
    """The measured time of each plan, and a factor for how much slower the machine is now.

    All plans share one factor, so a plan that became too slow and was not tried since can be chosen again.
    """

    def __init__(self, plans: Sequence[Plan]):
        self.plans = tuple(plans)  # the largest first
        self._seconds: dict[tuple[Plan, int], float] = {}
        self._slowdown = 1.0

    def measured(self, plan: Plan, size: int, seconds: float) -> None:
        """Record the time of a plan for a batch of ``size``, compiled and without other load."""
        self._seconds[plan, size] = seconds

    def took(self, plan: Plan, size: int, seconds: float) -> None:
        """Record the time of a call while serving."""
        if (plan, size) in self._seconds:
            ratio = seconds / self._seconds[plan, size]
            self._slowdown += SMOOTHING * (ratio - self._slowdown)

    def expected(self, plan: Plan, size: int) -> float:
        """Return the seconds that a call is expected to take."""
        return self._seconds[plan, size] * self._slowdown

    def choose(self, size: int, seconds_left: float) -> Plan:
        """Return the largest plan that fits; the smallest if none does, since a late answer is better than none."""
        fitting = (plan for plan in self.plans if self.expected(plan, size) * SAFETY <= seconds_left)
        return next(fitting, self.plans[-1])

    def alone(self, seconds: float) -> Plan:
        """Return the largest plan for a request that is served at once and alone; before measurements, the largest."""
        smallest = min((size for _, size in self._seconds), default=None)
        return self.plans[0] if smallest is None else self.choose(smallest, seconds)
