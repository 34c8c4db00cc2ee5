"""How much to compute for an answer that is due at a given time: the largest measured plan that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

SHRINK = 4  # each plan has a quarter of the candidates of the one before
SAFETY = 1.1  # a plan fits if this much of its expected time is left
SMOOTHING = 0.1  # weight of a new measurement


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is computed for an answer."""

    num_samples: int  # candidates
    num_steps: int  # Euler steps of the flow; of pi0-FAST, the most tokens

    def __post_init__(self):
        if self.num_samples < 1 or self.num_steps < 1:
            raise ValueError(f"an answer needs at least one candidate and one flow step, got {self}")


def smaller_plans(plan: Plan) -> tuple[Plan, ...]:
    """``plan`` and ever smaller ones: fewer candidates first, then one candidate in half of the flow steps.

    Plan(32, 10) gives 32, 8, 2 and 1 candidates in 10 steps, and 1 in 5.
    """
    plans = [plan]
    while plans[-1].num_samples > 1:
        plans.append(dataclasses.replace(plan, num_samples=max(1, plans[-1].num_samples // SHRINK)))
    if plan.num_steps > 1:
        plans.append(Plan(1, plan.num_steps // 2))
    return tuple(plans)


class Budget:
    """What each plan took when it was measured, and how much slower the machine is now.

    The one factor for all plans is what lets a plan come back that had become too slow and was not tried since.
    """

    def __init__(self, plans: Sequence[Plan]):
        self.plans = tuple(plans)  # the largest first
        self._seconds: dict[tuple[Plan, int], float] = {}
        self._slowdown = 1.0

    def measured(self, plan: Plan, size: int, seconds: float) -> None:
        """The time of a plan for a batch of ``size``, compiled and alone."""
        self._seconds[plan, size] = seconds

    def took(self, plan: Plan, size: int, seconds: float) -> None:
        """The time of a call while serving."""
        if (plan, size) in self._seconds:
            ratio = seconds / self._seconds[plan, size]
            self._slowdown += SMOOTHING * (ratio - self._slowdown)

    def expected(self, plan: Plan, size: int) -> float:
        """Seconds that a call will take."""
        return self._seconds[plan, size] * self._slowdown

    def choose(self, size: int, seconds_left: float) -> Plan:
        """The largest plan that fits; the smallest if none does, since a late answer is better than none."""
        fitting = (plan for plan in self.plans if self.expected(plan, size) * SAFETY <= seconds_left)
        return next(fitting, self.plans[-1])

    def alone(self, seconds: float) -> Plan:
        """Return the largest plan for a request that is served at once and alone; before anything is measured, all."""
        smallest = min((size for _, size in self._seconds), default=None)
        return self.plans[0] if smallest is None else self.choose(smallest, seconds)
