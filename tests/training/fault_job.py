"""Work of seconds, in a process of its own that a test may kill: ``fault_job.py RUN_DIR [FAULT] [WORK]``.

WORK is a whole run (``train``, ``train-with-workers``), or what others do with it: ``collect``, ``evaluate``,
``export``. FAULT is something a run does to itself: ``journal-file`` and ``journal-line`` die while the first online
episode is written down, ``disk-full`` lets no file grow beyond 2 kB from update 22 on.
"""

import dataclasses
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np

from acrlpd import deploy
from acrlpd.agents.config import AgentConfig
from acrlpd.cli import eval as eval_command
from acrlpd.config import CollectConfig, DataConfig, EvalConfig, PolicyConfig, TrainConfig
from acrlpd.data import replay
from acrlpd.envs import collect, registry
from acrlpd.envs.env import EnvConfig, Outcome, SimulatedEnvironment
from acrlpd.envs.vector import RolloutConfig
from acrlpd.models.critic import CriticConfig
from acrlpd.training import setup
from acrlpd.training.collection import collect_prior
from acrlpd.training.faults import EXIT_FAULT, EXIT_INTERRUPTED, Interrupted, RunFault
from acrlpd.training.run import Interaction

OFFLINE_STEPS = 30


class Point:
    """A point on a plane that should come near the origin."""

    state_dim, instruction, time_limit, fps, cameras, default_camera = 2, "go home", 10, 10.0, (), "none"
    action_low, action_high = np.full(2, -1, np.float32), np.full(2, 1, np.float32)

    def reset(self, seed):
        self._at = np.random.default_rng(seed).uniform(-1, 1, 2)
        return self._at

    def step(self, action):
        self._at = self._at + 0.2 * action
        return self._at, Outcome.solved_if(np.abs(self._at).max() < 0.2)

    def render(self, camera, size):
        raise NotImplementedError

    def close(self):
        pass


def make_config(run_dir: Path) -> TrainConfig:
    return TrainConfig(
        name="job",
        run_dir=str(run_dir),
        env=EnvConfig("toy/point"),
        policy=PolicyConfig(kind="mlp_flow", action_horizon=2, hidden_dims=(8,)),
        agent=AgentConfig(critic=CriticConfig(num_critics=2, hidden_dims=(8,)), best_of_n_samples=2, flow_steps=1),
        data=DataConfig(collect=CollectConfig(episodes=6, policy="random"), batch_size=8),
        eval=EvalConfig(episodes=2, frequency=10**6, num_envs=2),
        offline_steps=OFFLINE_STEPS,
        online_steps=40,
        online_envs=2,
        log_frequency=5,
        save_frequency=10,
    )


def make_point(config: EnvConfig) -> SimulatedEnvironment:
    return SimulatedEnvironment(Point(), config)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(fault: str) -> None:
    checksum = replay._sha256

    def in_the_journal(path: Path) -> str:
        if fault == "journal-line":
            with (path.parent / replay.INDEX).open("a") as index:
                index.write('{"number": 0, "fi')
        die()
        return checksum(path)

    if fault.startswith("journal"):
        replay._sha256 = in_the_journal


def fill_disk_at(trainer, step: int) -> None:
    batch = trainer.loader.batch

    def full(draw, **options):
        if draw == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        return batch(draw, **options)

    trainer.loader.batch = full


def at_work() -> None:
    print("at work", flush=True)


def announce_training(trainer):
    """Prints a line at the first batch: by then signals are handled."""
    batch, said = trainer.loader.batch, []

    def announce():
        if not said:
            said.append(True)
            at_work()

    def announced(draw, **options):
        announce()
        return batch(draw, **options)

    trainer.loader.batch = announced
    return announce


def note_used_episodes(file: Path) -> None:
    """Beside the run's own files: which episodes the trainer has taken over."""
    keep = Interaction.keep

    def noted(self, finished):
        keep(self, finished)
        with file.open("a") as out:
            out.write(json.dumps(finished.number) + "\n")

    Interaction.keep = noted


def collect_episodes(run_dir: Path) -> int:
    wanted = CollectConfig(episodes=60, policy="random", num_workers=2)
    at_work()
    collect_prior(EnvConfig("toy/point"), wanted, run_dir / "collected", seed=3)
    return 0


def evaluate(run_dir: Path) -> int:
    words = ["--checkpoint", str(run_dir / "job"), "--episodes", "20", "--output", str(run_dir / "evaluation.json")]
    at_work()
    return eval_command.main(words)


def export(run_dir: Path) -> int:
    at_work()
    if not (run_dir / "export").exists():  # a folder of this name is there as a whole, or not at all
        deploy.export_acrlpd_model(run_dir / "job", run_dir / "export")
    return 0


WORK = {"collect": collect_episodes, "evaluate": evaluate, "export": export}


def main(run_dir: str, fault: str = "", work: str = "train") -> int:
    logging.basicConfig()
    logging.getLogger("acrlpd").setLevel(logging.INFO)
    if work in WORK:
        return WORK[work](Path(run_dir))
    return train(Path(run_dir), fault, num_workers=2 if work == "train-with-workers" else 0)


def train(run_dir: Path, fault: str, *, num_workers: int) -> int:
    note_used_episodes(run_dir / "used.jsonl")
    config = dataclasses.replace(make_config(run_dir), rollout=RolloutConfig(num_workers=num_workers))
    trainer = setup.make_trainer(config, resume=True)
    arm(fault)
    if fault == "disk-full":
        fill_disk_at(trainer, 22)
    announce = announce_training(trainer)
    try:
        trainer.train()
        announce()  # a run that had nothing left to do
    except RunFault as error:
        print(error, file=sys.stderr)
        return EXIT_FAULT
    except Interrupted:
        return EXIT_INTERRUPTED
    return 0


if __name__ in ("__main__", "__mp_main__"):  # in worker processes too
    registry.make = collect.make = make_point
if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
