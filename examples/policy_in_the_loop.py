"""A simulated robot in this process with its policy in another, like the control loop of a real robot.

    make demo                                           # trains runs/demo
    acrlpd serve --checkpoint runs/demo                 # in one terminal
    python examples/policy_in_the_loop.py               # in another

It prints success and steps of each episode, and the time per answer.
"""

import argparse
import statistics
import time

import numpy as np
from client import ask
from websockets.sync.client import connect

from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="ws://127.0.0.1:8000")
    parser.add_argument("--env", default="metaworld/drawer-open-v3")
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1_000_000, help="default: as in the demo's evaluation")
    arguments = parser.parse_args()
    environment = make(EnvConfig(arguments.env, max_episode_steps=arguments.max_steps))
    with connect(arguments.url, compression=None, max_size=None) as connection:
        connection.recv()  # the server's metadata
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.episodes):
            success, steps, waits = run(environment, connection, seed)
            ms = statistics.median(waits)
            print(f"seed {seed}: {'success' if success else 'failure'} after {steps} steps, {ms:.1f} ms an answer")


def run(environment, connection, seed):
    """Run one episode: request a chunk, execute all of it, request the next."""
    observation = environment.reset(seed)
    steps, waits = 0, []
    while True:
        start = time.monotonic()
        chunk = ask(connection, {**observation, "prompt": str(observation["prompt"])})["actions"]
        waits.append((time.monotonic() - start) * 1000)
        for index, action in enumerate(np.asarray(chunk, np.float32)):
            step = environment.step(action, render=index == len(chunk) - 1)  # pictures only for the next request
            steps, observation = steps + 1, step.observation
            if step.terminated or step.truncated:
                return step.success, steps, waits


if __name__ == "__main__":
    main()
