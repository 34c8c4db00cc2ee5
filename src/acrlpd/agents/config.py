"""The configuration of the algorithms: fields and validation only."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from typing import Annotated, Literal, get_args

from acrlpd import fields
from acrlpd.agents.extraction import BestOfN, Distill, Extraction, ExtractionName, GuidedByQ, QGradient, make_own
from acrlpd.agents.health import HealthConfig
from acrlpd.agents.losses import ImplicitStatistic, LossWeights
from acrlpd.fields import NOT_EMPTY, Interval, NonNegativeFloat, PositiveFloat, PositiveInt
from acrlpd.models.critic import CriticConfig
from acrlpd.named_code import names_code

AlgorithmName = Literal["acrlpd", "bc", "rlpd_ac"]
TargetName = Literal["best_of_n", "implicit"]
BCWeighting = Literal["none", "importance", "difficulty"]
BestOfNStrategy = Literal["parallel", "chunked", "sequential", "auto"]


@dataclasses.dataclass(frozen=True)
class TemperatureConfig:
    """The temperature alpha: of the softmax in exploration, and the weight of the entropy bonus under q_gradient."""

    initial_temp: PositiveFloat = 1.0  # the first value, or the only one
    # target entropy = -multiplier * critic horizon * action_dim; below 0 is fine: differential entropy has both signs
    target_entropy_multiplier: Annotated[float, Interval("(-inf, inf)")] = 0.5
    adaptive: bool = True  # learned, so that candidates keep the target entropy

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class ImplicitConfig:
    """Which statistic of Q V(s) fits under ``target="implicit"``; V uses the critic's widths and learning rate."""

    statistic: ImplicitStatistic = "expectile"  # what V fits; quantile: by absolute errors, not squared ones
    # 0.5: the mean (expectile) or median (quantile) of the data's chunks; near 1: their best
    level: Annotated[float, Interval("(0, 1)")] = 0.9

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The choices of an algorithm, with its critics. Sizes of the policy are in ``PolicyConfig``."""

    algorithm: AlgorithmName = "acrlpd"  # bc (imitation alone) and rlpd_ac are baselines
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    temperature: TemperatureConfig = dataclasses.field(default_factory=TemperatureConfig)
    loss_weights: LossWeights = dataclasses.field(default_factory=LossWeights)
    extraction: str = "best_of_n"  # or q_gradient, distill, guided, or FILE.py:NAME: code of your own (CONTRIBUTING.md)
    # how s' is valued in the TD target: by Q of the best of N chunks sampled there, or by V(s')
    target: TargetName = "best_of_n"
    implicit: ImplicitConfig = dataclasses.field(default_factory=ImplicitConfig)
    discount: Annotated[float, Interval("(0, 1]")] = 0.99  # for each environment step, not for each chunk
    target_update_tau: Annotated[float, Interval("(0, 1]")] = 0.005  # rate at which target critics follow the critics
    act_by_target_critic: bool = True  # if there are no moving averages, target critics choose while acting
    # decay of the moving average of flow and critics that acts; None: none
    policy_ema_decay: Annotated[float, Interval("(0, 1)")] | None = None
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per update; more of them need less activation memory
    best_of_n_samples: PositiveInt = 32  # candidates while acting
    target_samples: PositiveInt | None = None  # candidates in the TD target; None: best_of_n_samples
    best_of_n_strategy: BestOfNStrategy = "auto"  # how many candidates at a time; the result is the same
    best_of_n_block: PositiveInt = 8  # candidates at a time under "chunked"
    best_of_n_bytes: PositiveInt = 2 * 1024**3  # "auto": candidates at a time fit in this and, on a CPU, in its cache
    top_k: PositiveInt | None = None  # explore among this many best candidates; None: among all
    # while acting, choose among this share of the candidates, those nearest to their mean; 1: among all
    typical_share: Annotated[float, Interval("(0, 1]")] = 1.0
    # added to Q while exploring, times the mean distance to the other candidates
    diversity_bonus: NonNegativeFloat = 0.0
    flow_steps: PositiveInt = 10  # Euler steps while acting
    # rank candidates after these few steps, then redo the best; None: no redo
    candidate_flow_steps: PositiveInt | None = None
    target_flow_steps: PositiveInt | None = None  # Euler steps in the TD target; None: flow_steps
    # candidates are clipped to +- this, in normalized units
    action_clip: Annotated[float, Interval("(0, inf]")] | None = None
    huber_delta: Annotated[float, Interval("(0, inf]")] | None = None  # None: squared TD error
    actor_samples: PositiveInt = 2  # q_gradient: chunks per observation; 1 switches the entropy bonus off
    distill_weight: NonNegativeFloat = 100.0  # distill: weight of the distance to the flow, relative to Q
    # guided: weights of Q's gradient, which candidates take in turn: with fewer candidates, the first weights
    guidance_weights: Annotated[tuple[NonNegativeFloat, ...], NOT_EMPTY] = (1.0,)
    target_guidance: bool = False  # guided: guide the candidates in the TD target, too
    # imitate some chunks more: importance: those better than the critic expected; difficulty: those imitated badly
    bc_weighting: BCWeighting = "none"
    bc_weighting_temperature: Annotated[float, Interval("(0, inf]")] = 1.0  # a lower one tells chunks further apart
    bc_weighting_bound: Annotated[float, Interval("[1, inf)")] = 4.0  # max ratio of two weights in a batch
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self):
        fields.check(self)
        if self.extraction not in get_args(ExtractionName) and not names_code(self.extraction):
            near = difflib.get_close_matches(self.extraction, get_args(ExtractionName), n=1)
            raise ValueError(
                f"agent.extraction must be one of {get_args(ExtractionName)} or FILE.py:NAME, got {self.extraction!r}"
                + (f": did you mean {near[0]!r}?" if near else "")
            )
        if self.extraction == "distill" and self.candidate_flow_steps is not None:
            raise ValueError(
                "agent.candidate_flow_steps has no effect with extraction='distill': a student's candidate takes one "
                "step. Leave it out."
            )
        if self.critic.backup_horizon is not None and self.target != "implicit":
            raise ValueError(
                f"agent.critic.backup_horizon ({self.critic.backup_horizon}) needs agent.target='implicit': the value "
                "after so many steps is V's. Set it, or leave backup_horizon out"
            )
        if self.target == "implicit":
            self._check_implicit()
        elif self.algorithm == "acrlpd" and self.temperature.adaptive and self.candidates_in_target < 2:
            raise ValueError(
                "agent.temperature.adaptive needs the spread of at least 2 candidates, but the TD target draws "
                f"{self.candidates_in_target}: raise agent.target_samples or set agent.temperature.adaptive to False"
            )

    def _check_implicit(self) -> None:
        """Refuse what does not go with a target that samples nothing."""
        reasons = {"bc": "it trains no critics", "rlpd_ac": "its target is a sample of its policy, as SAC's is"}
        if self.algorithm in reasons:
            raise ValueError(
                f"agent.target='implicit' does not go with agent.algorithm={self.algorithm!r}: "
                f"{reasons[self.algorithm]}. Leave target at best_of_n"
            )
        if self.temperature.adaptive:
            raise ValueError(
                "agent.temperature.adaptive needs the spread of the candidates in the TD target, and "
                "agent.target='implicit' draws none: set agent.temperature.adaptive to False (the temperature then "
                "stays at initial_temp)"
            )

    def horizons(self, action_horizon: int, executed_steps: int | None = None) -> tuple[int, int]:
        """Return the steps of a chunk that critics judge, and those that a TD target looks ahead.

        ``executed_steps`` of a chunk are executed; None: it is not known how many.

        Raises:
            ValueError: critics would judge less than is executed, or more than the policy predicts.
        """
        judged = self.critic.horizon or executed_steps or action_horizon
        backup = self.critic.backup_horizon or judged
        if not (executed_steps or 1) <= judged <= action_horizon:
            raise ValueError(
                f"agent.critic.horizon ({judged}) must lie between the steps that are executed ({executed_steps or 1}) "
                f"and policy.action_horizon ({action_horizon}): critics judge all that is executed, and no more than "
                "is predicted. Leave it out to judge what is executed, or change execute_horizon."
            )
        if self.critic.backup_horizon is not None and not judged < backup <= action_horizon:
            raise ValueError(
                f"agent.critic.backup_horizon ({backup}) must lie above the steps that critics judge ({judged}), and "
                f"at most at policy.action_horizon ({action_horizon}): name a shorter agent.critic.horizon or "
                "execute_horizon, or leave it out to have no long critics."
            )
        return judged, backup

    @property
    def candidates_in_target(self) -> int:
        """The number of chunks that an update samples at s'."""
        if self.target == "implicit":
            return 0
        return self.best_of_n_samples if self.target_samples is None else self.target_samples

    @property
    def steps_in_target(self) -> int:
        return self.flow_steps if self.target_flow_steps is None else self.target_flow_steps

    @property
    def actor_draws(self) -> int:
        """The number of chunks per observation in the actor loss."""
        return 1 if self.extraction in ("best_of_n", "distill", "guided") else self.actor_samples

    @property
    def in_target(self) -> AgentConfig:
        """The choices for the candidates in the TD target: all count, as plain samples unless ``target_guidance``."""
        plain = self.extraction == "guided" and not self.target_guidance
        return dataclasses.replace(self, typical_share=1.0, extraction="best_of_n" if plain else self.extraction)

    def weights_of_candidates(self, n: int) -> tuple[float, ...] | None:
        """Return the guidance weight of each of n candidates, which take the weights in turn; None if not guided."""
        if self.extraction != "guided":
            return None
        return tuple(itertools.islice(itertools.cycle(self.guidance_weights), n))

    def with_extraction(self, name: str | None, guidance_weights: tuple[float, ...] | None = None) -> AgentConfig:
        """Return the choices with another extraction, or with other guidance weights; None: as they are.

        Raises:
            ValueError: there is no such extraction, or it is not guided and there are weights for it.
        """
        extraction = self.extraction if name is None else name
        if guidance_weights is None:
            return dataclasses.replace(self, extraction=extraction)
        if extraction != "guided":
            raise ValueError(
                f"guidance_weights {guidance_weights} have no effect with extraction {extraction!r}: they need "
                "--extraction guided"
            )
        return dataclasses.replace(self, extraction=extraction, guidance_weights=guidance_weights)

    def make_extraction(self, num_steps: int) -> Extraction:
        if self.extraction == "q_gradient":
            return QGradient(num_steps, self.action_clip)
        if self.extraction == "distill":
            return Distill(num_steps, self.action_clip, self.distill_weight)
        if self.extraction == "guided" and any(self.guidance_weights):
            return GuidedByQ(num_steps, self.action_clip)
        if self.extraction in ("best_of_n", "guided"):
            return BestOfN(num_steps, self.action_clip)
        return make_own(self.extraction, num_steps, self.action_clip)
