"""Generate play data with OGBench's protocol for ``cube-single-play``: any number of episodes, without a download.

    python benchmarks/play_data.py OUT.npz [--episodes 100] [--seed 101]

The planning oracle moves the cube to one random target after the other for 1001 steps per episode, with smooth noise of
0.1 on its plans. Equal seeds and versions of MuJoCo give identical files, bit for bit. An episode takes about 2.5 s.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from acrlpd import files
from acrlpd.envs import rendering

EPISODE_STEPS = 1001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=101)
    arguments = parser.parse_args()
    write(arguments.path, arguments.episodes, arguments.seed)
    print(f"{arguments.path}: {arguments.episodes} episodes of {EPISODE_STEPS} rows")


def write(path: Path, episodes: int, seed: int) -> None:
    """Write a file in OGBench's format."""
    arrays = play(episodes, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]  # to the stubs, a name may be allow_pickle


def play(episodes: int, seed: int) -> dict[str, np.ndarray]:
    rendering.choose_backend()
    import gymnasium
    import ogbench.manipspace  # noqa: F401
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    np.random.seed(seed)  # noqa: NPY002  (the oracle draws from NumPy's global generator)
    env: Any = gymnasium.make(
        "cube-single-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=EPISODE_STEPS
    )
    oracle = CubePlanOracle(env=env, noise=0.1, noise_smoothing=0.5)
    rows: dict[str, list[Any]] = defaultdict(list)
    env.reset(seed=seed)
    for _ in range(episodes):
        observation, info = env.reset()
        oracle.reset(observation, info)
        over = False
        while not over:
            action = np.array(oracle.select_action(observation, info))
            after, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            rows["observations"].append(observation)
            rows["actions"].append(action)
            rows["terminals"].append(over)
            rows["qpos"].append(info["prev_qpos"])
            rows["qvel"].append(info["prev_qvel"])
            observation = after
            if oracle.done:
                oracle.reset(*env.unwrapped.set_new_target())
    env.close()
    return {name: np.array(each, bool if name == "terminals" else np.float32) for name, each in rows.items()}


if __name__ == "__main__":
    main()
