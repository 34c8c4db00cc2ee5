"""Use any Gymnasium environment: this file is all that MountainCarContinuous needs.

    acrlpd collect --output data/car --name custom/examples/mountain_car.py:mountain_car --policy random --episodes 20
    acrlpd train debug --name car --env.name custom/examples/mountain_car.py:mountain_car --env.max_episode_steps 300 \\
        --data.collect.policy random --policy.max_token_len 16
"""

import gymnasium

from acrlpd.envs.custom import GymnasiumSimulator
from acrlpd.envs.env import Outcome


def mountain_car() -> GymnasiumSimulator:
    env = gymnasium.make("MountainCarContinuous-v0", disable_env_checker=True).unwrapped
    return GymnasiumSimulator(
        env,
        instruction="drive up the hill",
        outcome=lambda observation, reward, terminated, info: Outcome.solved_if(terminated),
        time_limit=999,
    )
