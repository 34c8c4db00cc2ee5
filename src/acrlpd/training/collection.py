"""Collection of prior data: one HDF5 file per episode, success or failure; only missing episodes are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from acrlpd.agents.agent import ACRLPDAgent, ActingMode
from acrlpd.config import CollectConfig, to_dict
from acrlpd.data.formats import hdf5
from acrlpd.data.view.transforms import Transform
from acrlpd.envs import collect
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.episodes import Rollout
from acrlpd.envs.registry import make_vector
from acrlpd.envs.rollout import episode_seed, rollout
from acrlpd.envs.vector import RolloutConfig
from acrlpd.files import remove_abandoned
from acrlpd.training.evaluate import EpisodeDraws, chunk_policy


def collect_prior(env: EnvConfig, wanted: CollectConfig, directory: Path, *, seed: int) -> None:
    """Collect with a scripted expert or at random. Episode k depends only on the seed and k."""
    noise_range = wanted.noise_range if wanted.policy == "expert" else None
    folder = _Folder(
        directory, {"env": to_dict(env), "policy": wanted.policy, "noise_range": noise_range, "seed": seed}
    )
    missing = folder.missing(wanted.episodes)
    if missing:
        collect.collect(
            env,
            missing,
            policy=wanted.policy,
            noise_range=wanted.noise_range,
            seed=seed,
            num_workers=wanted.num_workers,
            on_episode=folder.write,
        )


def collect_by_agent(
    agent: ACRLPDAgent,
    transform: Transform,
    env: EnvConfig,
    directory: Path,
    *,
    checkpoint: str,
    mode: ActingMode,
    execute_horizon: int,
    episodes: int,
    num_envs: int,
    num_workers: int,
    seed: int,
) -> None:
    """Collect with a trained policy, one call for all environments. An episode whose worker dies stays missing."""
    folder = _Folder(directory, {"env": to_dict(env), "policy": checkpoint, "mode": mode, "seed": seed})
    missing = folder.missing(episodes)
    if not missing:
        return
    seeds = [episode_seed(seed, number) for number in missing]
    environments = make_vector(env, min(num_envs, len(missing)), RolloutConfig(num_workers=num_workers))
    progress = tqdm(desc=f"collect {env.name}", total=len(missing), unit="episode")

    def write(result: Rollout) -> None:
        folder.write(dataclasses.replace(result, number=missing[result.number]))
        progress.update()

    try:
        rollout(
            environments,
            chunk_policy(agent, transform, EpisodeDraws(jax.random.key(seed), seeds), mode=mode),
            seeds,
            execute_horizon=execute_horizon,
            on_episode=write,
            record_images=bool(env.cameras),
        )
    finally:
        progress.close()
        environments.close()


class _Folder:
    """A folder of episodes that were all made in one way, which each file states."""

    def __init__(self, directory: Path, made_by: Mapping[str, Any]):
        self.directory = directory
        self.made_by = made_by

    def missing(self, episodes: int) -> list[int]:
        """Return the numbers of the episodes that have no file yet.

        Raises:
            ValueError: the existing files were made in another way.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.directory)  # even if nothing is left to be written
        numbered = {hdf5.episode_number(path): path for path in self.directory.glob("*.hdf5")}
        done = {number: path for number, path in numbered.items() if number is not None}
        for path in list(done.values())[:1]:
            before = hdf5.read_metadata(path).get("made_by", self.made_by)
            changed = [key for key in self.made_by if before.get(key) != _plain(self.made_by[key])]
            if before is not self.made_by and changed:
                raise ValueError(
                    f"{self.directory} has episodes made with another {', '.join(changed)} ({path.name}): collect into "
                    "another folder, or with the same settings to go on with this one"
                )
        return [number for number in range(episodes) if number not in done]

    def write(self, result: Rollout) -> None:
        path = hdf5.episode_path(self.directory, result.number)
        metadata = {"env": self.made_by["env"]["name"], "seed": result.seed, "made_by": dict(self.made_by)}
        hdf5.write_episode(path, result.episode, metadata)


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value
