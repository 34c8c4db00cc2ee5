"""How Q improves the policy (``docs/algorithm.md``, section 3), by one of ``ExtractionName`` or by one of your own.

An extraction defines which candidates the agent chooses among and which loss trains the policy beyond imitation.
CONTRIBUTING.md has an example of one that stands in a file of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from acrlpd import named_code
from acrlpd.agents import losses
from acrlpd.models import flow
from acrlpd.models.critic import CriticNetworks, ValueNetwork
from acrlpd.models.flow import FlowPolicy, Prefix
from acrlpd.named_code import StoredName
from acrlpd.types import AnyArray, Metrics

ExtractionName = Literal["best_of_n", "q_gradient", "distill", "guided"]


@dataclasses.dataclass(frozen=True)
class Guide:
    """The target critics, and how strongly their gradient guides candidates while these are denoised (``guided``)."""

    critic: CriticNetworks
    q_scale: Float[Array, ""]  # running mean of |Q|, by which gradients are divided; 0: not known yet
    weights: Float[AnyArray, "#n #b"]


@dataclasses.dataclass(frozen=True)
class Modules:
    """The networks of one update, merged from the agent's parameters; they exist only inside a traced function."""

    policy: FlowPolicy
    critic: CriticNetworks
    student: FlowPolicy | None = None  # has its own action expert and reads the policy's prefix; only for ``distill``
    value: ValueNetwork | None = None  # only for ``target="implicit"``
    long_critic: CriticNetworks | None = None  # only with ``critic.backup_horizon``
    guide: Guide | None = None  # only for ``guided``


class Extraction(Protocol):
    """One way to improve a policy with a critic."""

    def propose(self, modules: Modules, prefix: Prefix, noise: Float[Array, "n b h a"]) -> Float[Array, "n b h a"]:
        """Return one candidate chunk for each noise; all read the same prefix."""
        ...

    def actor_loss(
        self, modules: Modules, prefix: Prefix, noise: Float[Array, "m b h a"], temperature: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss beyond imitation. ``modules.critic`` holds constants: no gradient reaches it."""
        ...


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """Best-of-N sampling: the policy only imitates, and the critic chooses among its samples (QC)."""

    num_steps: int
    action_clip: float | None

    def propose(self, modules: Modules, prefix: Prefix, noise: Float[Array, "n b h a"]) -> Float[Array, "n b h a"]:
        return clip(flow.sample(modules.policy, prefix, noise, num_steps=self.num_steps), self.action_clip)

    def actor_loss(
        self, modules: Modules, prefix: Prefix, noise: Float[Array, "m b h a"], temperature: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        return jnp.zeros(()), {}


@dataclasses.dataclass(frozen=True)
class QGradient:
    """Policy improvement by Q's gradient, backpropagated through every Euler step; each step is rematerialised."""

    num_steps: int
    action_clip: float | None

    propose = BestOfN.propose

    def actor_loss(
        self, modules: Modules, prefix: Prefix, noise: Float[Array, "m b h a"], temperature: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        chunks = flow.sample(modules.policy, prefix, noise, num_steps=self.num_steps, remat=True)
        chunks = clip(chunks, self.action_clip)
        q = modules.critic.aggregate(_q(modules.critic, prefix, chunks))
        loss = losses.q_gradient_loss(q)
        if noise.shape[0] > 1:  # one chunk has no spread
            judged = modules.critic.judged(chunks)  # no entropy bonus for anything else
            loss = loss - temperature * jnp.mean(losses.gaussian_entropy(judged))
        return loss, {"actor_q_mean": q.mean()}


@dataclasses.dataclass(frozen=True)
class Distill:
    """A student that maps noise to a chunk in one step, trained to match the flow and to increase Q (QC-FQL)."""

    num_steps: int
    action_clip: float | None
    distill_weight: float

    def propose(self, modules: Modules, prefix: Prefix, noise: Float[Array, "n b h a"]) -> Float[Array, "n b h a"]:
        return clip(one_step(modules.student, prefix, noise), self.action_clip)

    def actor_loss(
        self, modules: Modules, prefix: Prefix, noise: Float[Array, "m b h a"], temperature: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        prefix = jax.lax.stop_gradient(prefix)  # this loss trains the student only; the prefix belongs to the teacher
        teacher = clip(flow.sample(modules.policy, prefix, noise, num_steps=self.num_steps), self.action_clip)
        teacher = jax.lax.stop_gradient(teacher)
        student = one_step(modules.student, prefix, noise)
        distill = losses.distill_loss(student[0], teacher[0])
        q = _q(modules.critic, prefix, clip(student, self.action_clip))  # [e 1 b]: QC-FQL maximizes their mean
        return self.distill_weight * distill - jnp.mean(q), {"distill_loss": distill, "actor_q_mean": q.mean()}


@dataclasses.dataclass(frozen=True)
class GuidedByQ:
    """Samples that the target critics' gradient guides while they are denoised (QGF, arXiv:2606.11087).

    No network is trained for it. Gradients are divided by the running mean of |Q|, so that a weight means the same at
    any scale of the rewards. Before the first update there is no such mean, and samples are plain.
    """

    num_steps: int
    action_clip: float | None

    def propose(self, modules: Modules, prefix: Prefix, noise: Float[Array, "n b h a"]) -> Float[Array, "n b h a"]:
        guide = modules.guide
        if guide is None:
            raise ValueError("these networks have no guide: they were merged for another extraction than 'guided'")

        def value(chunks: Float[Array, "n b h a"]) -> Float[Array, ""]:
            return guide.critic.aggregate(_q(guide.critic, prefix, chunks)).sum()  # each value depends on its own chunk

        weights = guide.weights / jnp.where(guide.q_scale > 0, guide.q_scale, jnp.inf)
        policy = flow.climbing(modules.policy, flow.Climb(jax.grad(value), weights, self.action_clip))
        return clip(flow.sample(policy, prefix, noise, num_steps=self.num_steps), self.action_clip)

    actor_loss = BestOfN.actor_loss


def make_own(name: str, num_steps: int, action_clip: float | None) -> Extraction:
    """Return what the class or function that ``FILE.py:NAME`` or ``MODULE:NAME`` names makes.

    It is called with ``num_steps`` (Euler steps of the flow) and ``action_clip`` by name, whenever a program that needs
    the extraction is compiled. Its file runs once in a process.

    Raises:
        ValueError: a stored configuration alone names this code; there is no such file or name; what it makes is no
            ``Extraction``.
    """
    if isinstance(name, StoredName):
        raise ValueError(
            f"the extraction {name} is code that the stored configuration names, and a checkpoint runs no code by "
            f"itself. If you trust it, name it in the command: --extraction {shlex.quote(name)} (for train "
            "--agent.extraction; in Python load_checkpoint(path, extraction=...))"
        )
    own = _loaded(name, os.getcwd())(num_steps=num_steps, action_clip=action_clip)
    missing = [method for method in ("propose", "actor_loss") if not callable(getattr(own, method, None))]
    if missing:
        raise ValueError(
            f"agent.extraction {name}: expected an object with the methods propose and actor_loss "
            f"(acrlpd.agents.extraction.Extraction), but {type(own).__name__} has no {' and no '.join(missing)}"
        )
    return own


@functools.cache
def _loaded(name: str, working_directory: str) -> Callable[..., Any]:
    return named_code.load(name)


def one_step(student: FlowPolicy | None, prefix: Prefix, noise: Float[Array, "n b h a"]) -> Float[Array, "n b h a"]:
    """Return the student's chunks: a single Euler step from time 1 to time 0."""
    if student is None:
        raise ValueError("this agent has no student: it was made with another extraction than 'distill'")
    return flow.sample(student, prefix, noise, num_steps=1)


def clip(chunks: Float[Array, "n b h a"], limit: float | None) -> Float[Array, "n b h a"]:
    """Clip chunks to the normalized action space, as they will be executed. A ``limit`` of None clips nothing."""
    return chunks if limit is None else jnp.clip(chunks, -limit, limit)


def _q(critic: CriticNetworks, prefix: Prefix, chunks: Float[Array, "n b h a"]) -> Float[Array, "e n b"]:
    return critic(jax.lax.stop_gradient(prefix.features), prefix.state, chunks)
