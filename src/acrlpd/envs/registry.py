"""Creation of environments by name, one or many side by side. A new simulator is an entry in ``FAMILIES``."""

from __future__ import annotations

import difflib
import functools
import importlib
import shlex

from acrlpd.envs.env import EnvConfig, SimulatedEnvironment, Simulator
from acrlpd.envs.vector import LocalVectorEnv, ProcessVectorEnv, RolloutConfig, VectorEnv
from acrlpd.named_code import StoredName

# the class of each family, in the module of its name
FAMILIES = {"metaworld": "MetaWorld", "ogbench": "OGBench", "aloha": "Aloha"}
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


def make(config: EnvConfig) -> SimulatedEnvironment:
    """Create the environment that ``config`` names.

    >>> make(EnvConfig("metaworld/drawer-open-v3", max_episode_steps=150))
    """
    check_named(config)
    family, _, task = config.name.partition("/")
    simulators = {**dict.fromkeys(FAMILIES, _simulator), **dict.fromkeys(LIBERO_SUITES, _libero), "custom": _custom}
    if family not in simulators:
        raise ValueError(_unknown(config.name, [f"{name}/" for name in simulators]))
    return SimulatedEnvironment(simulators[family](config.name, task), config)


def names(family: str) -> list[str]:
    """Return the environments of a family of ``FAMILIES`` or ``LIBERO_SUITES``.

    Raises:
        ImportError: the family's extra is not installed; the message names it.
    """
    if family in LIBERO_SUITES:
        from acrlpd.envs import libero  # simulators are optional packages, so they are imported where they are used

        return [f"{family}/{task}" for task in libero.task_names(family)]
    return [f"{family}/{task}" for task in importlib.import_module(f"acrlpd.envs.{family}").task_names()]


def check_named(config: EnvConfig) -> None:
    """Refuse to run code that only a stored configuration names."""
    if isinstance(config.name, StoredName) and config.name.startswith("custom/"):
        raise ValueError(
            f"the environment {config.name} is code that the stored configuration names, and a checkpoint runs no code "
            f"by itself. If you trust it, name it in the command: --env.name {shlex.quote(config.name)} (for eval "
            "--tasks, for collect --name; in Python loading.with_task)"
        )


def make_vector(config: EnvConfig, num_envs: int, rollout: RolloutConfig | None = None) -> VectorEnv:
    """Create ``num_envs`` equal environments, in this process by default, else in the workers of ``rollout``."""
    check_named(config)
    rollout = RolloutConfig() if rollout is None else rollout
    num_workers = min(rollout.num_workers, num_envs)
    if not num_workers:
        return LocalVectorEnv([make(config) for _ in range(num_envs)])
    make_one = functools.partial(make, config)
    if rollout.backend == "ray":
        from acrlpd.envs.ray import RayVectorEnv

        return RayVectorEnv(make_one, num_envs, num_workers=num_workers, timeout_s=rollout.timeout_s)
    return ProcessVectorEnv(make_one, num_envs, num_workers=num_workers, timeout_s=rollout.timeout_s)


def _simulator(name: str, task: str) -> Simulator:
    family = name.partition("/")[0]
    known = names(family)
    if name not in known:
        raise ValueError(_unknown(name, known))
    simulator: Simulator = getattr(importlib.import_module(f"acrlpd.envs.{family}"), FAMILIES[family])(task)
    return simulator


def _libero(name: str, task: str) -> Simulator:
    from acrlpd.envs import libero

    suite = name.partition("/")[0]
    index = libero.task_index(suite, task)
    if index is None:
        names = libero.task_names(suite)
        raise ValueError(
            _unknown(name, [f"{suite}/{known}" for known in names]) + f" Or by number, 0 to {len(names) - 1}"
        )
    return libero.Libero(suite, index)


def _custom(name: str, task: str) -> Simulator:
    from acrlpd.envs import custom

    return custom.load(task)


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"unknown environment {name!r}; did you mean {' or '.join(map(repr, nearest or known[:3]))}?"
