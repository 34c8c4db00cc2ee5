"""The state of an agent, an immutable pytree, and the static part of an agent, which never changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from acrlpd.agents.config import AgentConfig
from acrlpd.agents.extraction import Guide, Modules
from acrlpd.agents.health import Health
from acrlpd.models import parameters, stacked
from acrlpd.models.parameters import Params

CRITIC_GROUPS = ("critic", "value", "long_critic")  # those that learn what chunks are worth


@dataclasses.dataclass(frozen=True)
class Networks:
    """The structure, choices and optimisers of an agent: everything that no update changes.

    Agents with equal networks share compiled programs. Optimisers are functions, which are equal only if they are the
    same objects; ``training.optimizer`` returns the same objects for equal configurations.
    """

    config: AgentConfig
    policy_def: nnx.GraphDef
    critic_def: nnx.GraphDef
    optimizers: Mapping[str, optax.GradientTransformation]
    action_shape: tuple[int, int]  # horizon and width of the policy's chunks
    action_dim: int  # the robot's; further dimensions are the policy's padding
    critic_horizon: int  # the steps of a chunk that critics judge
    backup_horizon: int  # the steps that a TD target looks ahead: the same, unless there are long critics
    value_def: nnx.GraphDef | None = None  # of V, under ``target="implicit"``
    long_critic_def: nnx.GraphDef | None = None  # with ``critic.backup_horizon``

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """The hash, computed once: walking the definition of a large policy takes as long as a small update."""
        optimizers = frozenset(self.optimizers.items())
        structure = (self.policy_def, self.critic_def, self.value_def, self.long_critic_def)
        sizes = (self.action_shape, self.action_dim, self.critic_horizon, self.backup_horizon)
        return hash((self.config, structure, sizes, optimizers))

    def modules(self, params: dict[str, Params], frozen: Params) -> Modules:
        def policy(*parts: Params) -> Any:
            return stacked.unrolled(nnx.merge(self.policy_def, parameters.join(*parts)))

        def if_there(definition: nnx.GraphDef | None, group: str) -> Any:
            return nnx.merge(definition, params[group]) if definition is not None and group in params else None

        return Modules(
            policy=policy(params["policy"], frozen),
            critic=nnx.merge(self.critic_def, params["critic"]),
            student=policy(params["policy"], frozen, params["student"]) if "student" in params else None,
            value=if_there(self.value_def, "value"),
            long_critic=if_there(self.long_critic_def, "long_critic"),
        )

    @property
    def target_entropy(self) -> float:
        return -self.config.temperature.target_entropy_multiplier * self.critic_horizon * self.action_dim


@struct.dataclass
class AgentState:
    """The state that an update replaces and losses read: policy, critics, temperature and their optimisers."""

    # by group: "policy", "critic", "temperature"; some have "student" (distill), "value" (V) or "long_critic"
    params: dict[str, Params]
    frozen: Params  # the policy's frozen part, which has no optimiser state
    target_critic: Params
    opt_state: dict[str, optax.OptState]
    ema: dict[str, Params]  # moving averages of "policy", "student", "critic" under ``policy_ema_decay``
    health: Health
    step: Int[Array, ""]  # number of updates, skipped ones included, so it also counts batches
    q_scale: Float[Array, ""]  # running mean of |Q_e(s, a)| over members and the data's chunks; 0: not known yet
    nets: Networks = struct.field(pytree_node=False)

    @property
    def config(self) -> AgentConfig:
        return self.nets.config

    def guided(self, modules: Modules) -> Modules:
        """Return the networks together with the target critics that guide their samples, if the extraction is so."""
        if self.config.extraction != "guided":
            return modules
        critic = nnx.merge(self.nets.critic_def, self.target_critic)
        weights = np.full((1, 1), self.config.guidance_weights[0], np.float32)  # where no candidate has its own
        return dataclasses.replace(modules, guide=Guide(critic, self.q_scale, weights))
