"""Scripted experts, random actions, and the noise that makes an expert's data a mixture of success and failure."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float

from acrlpd.envs.aloha import Aloha, TransferCubeExpert
from acrlpd.envs.env import EnvSpec, Obs, SimulatedEnvironment
from acrlpd.envs.libero import BowlExpert, Libero
from acrlpd.envs.metaworld import MetaWorld
from acrlpd.envs.ogbench import OGBench

CollectPolicy: TypeAlias = Literal["expert", "random"]


class Expert(Protocol):
    """A policy for one episode. It may read the simulator's state, so it must be called once per step, in order."""

    def __call__(self, observation: Obs) -> Float[np.ndarray, " a"]: ...


def make_expert(environment: SimulatedEnvironment, kind: CollectPolicy, rng: np.random.Generator) -> Expert:
    """Return a policy for the next episode; call it after ``environment.reset``. All randomness comes from ``rng``."""
    if kind == "random":
        return RandomPolicy(environment.spec, rng)
    if kind != "expert":
        raise ValueError(f"policy must be 'expert' or 'random', got {kind!r}")
    if isinstance(environment.simulator, MetaWorld):
        return MetaWorldExpert(environment.simulator.task)
    if isinstance(environment.simulator, OGBench) and environment.simulator.task.startswith("cube-"):
        return CubeExpert(environment.simulator, rng)
    if isinstance(environment.simulator, Aloha) and environment.simulator.task == "transfer_cube":
        return TransferCubeExpert(environment.simulator)
    if isinstance(environment.simulator, Libero) and environment.simulator.is_bowl_in_reach:
        return BowlExpert(environment.simulator)
    raise ValueError(
        f"there is no scripted expert for {environment.spec.name}: collect at random (--policy random) or with a "
        "trained policy (--policy checkpoint --checkpoint RUN), or train on recorded demonstrations (--data.path "
        "FOLDER). There are experts for metaworld, ogbench's cubes, aloha/transfer_cube and libero_spatial (not for 4, "
        "where the bowl stands in a drawer)"
    )


class RandomPolicy:
    """A policy that draws uniformly from the action space at every step."""

    def __init__(self, spec: EnvSpec, rng: np.random.Generator):
        self._spec = spec
        self._rng = rng

    def __call__(self, observation: Obs) -> Float[np.ndarray, " a"]:
        return self._rng.uniform(self._spec.action_low, self._spec.action_high).astype(np.float32)


class MetaWorldExpert:
    """The scripted policy that MetaWorld ships for the task."""

    def __init__(self, task: str):
        from metaworld.policies import ENV_POLICY_MAP

        policies: Any = ENV_POLICY_MAP  # its type annotation names the abstract base class
        self._policy = policies[task]()

    def __call__(self, observation: Obs) -> Float[np.ndarray, " a"]:
        with warnings.catch_warnings():
            # Most of its policies return actions outside the action space and rely on clipping.
            warnings.filterwarnings("ignore", message="Constant")
            return self._policy.get_action(observation["state"].astype(np.float64))


class CubeExpert:
    """OGBench's Markov oracle, which moves one cube after the other, in the order of their numbers."""

    def __init__(self, simulator: OGBench, rng: np.random.Generator):
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle

        self._simulator = simulator
        self._rng = rng
        self._oracle: Any = CubeMarkovOracle(env=simulator._env)
        self._block: int | None = None

    def __call__(self, observation: Obs) -> Float[np.ndarray, " a"]:
        info = self._simulator.privileged_info()
        if info["privileged/target_block"] != self._block:
            self._block = info["privileged/target_block"]
            with _global_numpy_seed(self._rng):
                self._oracle.reset(observation["state"], info)
        return self._oracle.select_action(observation["state"], info)


class SmoothNoise:
    """Correlated Gaussian noise: n_t = c n_{t-1} + sqrt(1 - c^2) strength e_t, with constant deviation ``strength``.

    The strength is drawn once, uniformly from ``noise_range`` (in units of the action); an instance serves one episode.
    White noise of the same size averages out within a few steps, so an expert still succeeds; correlated noise makes
    it fail.
    """

    def __init__(
        self, rng: np.random.Generator, action_dim: int, noise_range: tuple[float, float], *, correlation: float = 0.9
    ):
        low, high = noise_range
        if not 0 <= low <= high:
            raise ValueError(f"noise_range must be two numbers with 0 <= low <= high, got {noise_range}")
        self.strength = float(rng.uniform(low, high))
        self._rng = rng
        self._correlation = correlation
        self._value = self.strength * rng.standard_normal(action_dim)

    def __call__(self) -> Float[np.ndarray, " a"]:
        value = self._value
        fresh = self.strength * self._rng.standard_normal(len(value))
        self._value = self._correlation * value + np.sqrt(1 - self._correlation**2) * fresh
        return value


@contextlib.contextmanager
def _global_numpy_seed(rng: np.random.Generator) -> Iterator[None]:
    """Seed NumPy's global generator, from which OGBench's oracles draw, and restore its state afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(int(rng.integers(2**32)))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
