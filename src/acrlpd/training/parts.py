"""The parts that a run is built from, as ``setup.make_trainer`` makes them and a trainer takes them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Transform
from acrlpd.envs.vector import VectorEnv
from acrlpd.training.checkpoint import ACRLPDCheckpointManager
from acrlpd.training.fingerprint import Fingerprint
from acrlpd.training.guards import RunLock
from acrlpd.training.offline_evaluation import HeldOut
from acrlpd.training.overwriting import Replaced
from acrlpd.training.run import Interaction, Progress, RunFiles


@dataclasses.dataclass(frozen=True)
class RunParts:
    """The parts of one run. Those that change while it trains are copied into its ``RunState``."""

    config: TrainConfig
    agent: ACRLPDAgent  # at the start of the run, or as restored
    progress: Progress  # likewise
    fresh_agent: Callable[[], ACRLPDAgent]  # makes the agent of step 0 once more
    files: RunFiles
    checkpoints: ACRLPDCheckpointManager
    loader: ChunkLoader
    transform: Transform
    norm_stats: Mapping[str, NormStats]
    prior: Fingerprint | None = None  # of the prior data
    fps: float | None = None  # steps per second of the prior data; None: unknown, or several sets differ
    interaction: Interaction | None = None  # None: no online phase
    eval_environments: VectorEnv | None = None  # None: no evaluations in a simulator
    held_out: HeldOut | None = None  # None: no evaluations on recorded episodes
    lock: RunLock | None = None  # None: another process holds it for this one
    replaced: Replaced | None = None  # the previous run in this folder, kept until this one has a checkpoint

    @contextlib.contextmanager
    def closed_afterwards(self) -> Iterator[None]:
        """Close, in reverse order, everything that is open, when the block is left."""
        with contextlib.ExitStack() as closing:
            if self.lock is not None:
                closing.callback(self.lock.release)
            closing.callback(self.loader.close)
            if self.replaced is not None:
                closing.callback(self.replaced.say_if_kept)
            closing.callback(self.checkpoints.wait)
            if self.interaction is not None:
                closing.callback(self.interaction.collector.close)
            if self.held_out is not None:
                closing.callback(self.held_out.close)
            if self.eval_environments is not None:
                closing.callback(self.eval_environments.close)
            yield
