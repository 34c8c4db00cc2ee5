"""The training loop, in two phases: updates on prior data, then updates in between the steps of online episodes."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig, to_dict
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.view.normalize import NormStats
from acrlpd.envs.rollout import OnlineCollector
from acrlpd.training import ending, guards, phases
from acrlpd.training.clocks import Clocks
from acrlpd.training.ending import Ended
from acrlpd.training.evaluate import EpisodeDraws, chunk_policy, fold_in
from acrlpd.training.evaluations import Evaluations
from acrlpd.training.faults import DataFault, Interrupted
from acrlpd.training.guards import StopRequest
from acrlpd.training.metrics import write_json
from acrlpd.training.parts import RunParts
from acrlpd.training.phases import PHASES, Phase
from acrlpd.training.recovery import Recovery
from acrlpd.training.run import Progress, RunState
from acrlpd.training.run_log import RunLog
from acrlpd.training.saving import Saver
from acrlpd.training.sharding import make_mesh, put_batch
from acrlpd.types import ChunkBatch

logger = logging.getLogger(__name__)

BAR_SECONDS = 1.0 if sys.stderr.isatty() else 30.0  # between redraws; a log file needs few
ROLLBACK_STRIDE = 2**30  # after a rollback, batches and noise are drawn as for steps this much later
_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


class ACRLPDTrainer:
    """A trainer that trains an agent offline, then online, and evaluates it at the end of each phase.

    Everything except the updates happens between two updates. Logging waits for the device only at log points.
    """

    def __init__(self, parts: RunParts):
        self.parts = parts
        self.state = RunState(parts.config, parts.agent, parts.progress)
        self._mesh = make_mesh(parts.config.fsdp_devices)
        self._update_rng, act_rng, eval_rng = jax.random.split(jax.random.key(parts.config.seed + 1), 3)
        self._act_draws = EpisodeDraws(act_rng)
        self._clocks = Clocks(parts.progress)
        self._log = RunLog(self.state, parts.files, self._clocks)
        self._saver = Saver(self.state, parts, self._clocks)
        self._recovery = Recovery(self.state, parts, self._saver)
        self._evaluations = Evaluations(
            self.state, parts, rng=eval_rng, saver=self._saver, log=self._log, clocks=self._clocks
        )
        self._compiled: set[Any] = set()  # what tells one compiled update from another
        self._has_acted = False
        self._chosen_at = 0  # update at which the chunks that are being executed were chosen
        self._ages: list[int] = []  # policy ages, in updates, of the chunks executed since the last log point
        self._newest: Any = None  # an array of the last update; the device may still be computing it

    def train(self) -> dict[str, Any]:
        """Run the rest of both phases; return the summary, which is also written to ``summary.json``."""
        state, files = self.state, self.parts.files
        with guards.explain_storage(files.directory), guards.stop_on_signal() as stop, self.parts.closed_afterwards():
            if ending.is_over(state.config, state.progress, state.step):
                known = ending.known_summary(files, state.progress, state.step)
                if known:
                    return known  # resuming changes nothing
            write_json(files.config, to_dict(state.config))
            with self._log.opened():
                with self._note_the_end(), self._recovery.save_before_leaving():
                    for phase in PHASES:
                        if not phases.is_done(state, phase):
                            self._run(phase, stop)
                ended = ending.is_over(state.config, state.progress, state.step)
                assert ended is not None, "both phases have come to their end"
                return self._summarize(ended)

    def _run(self, phase: Phase, stop: StopRequest) -> None:
        state, config = self.state, self.parts.config
        total, done = phases.extent(state, phase)
        if phase in state.progress.finished:
            state.progress.finished.remove(phase)  # a resume may lengthen it
        with tqdm(total=total, initial=done, desc=phase, unit="step", mininterval=BAR_SECONDS) as bar:
            while not phases.is_finished(state, phase):
                loop = self._clocks.span("loop", behind="update", busy=self._is_updating)
                with loop, guards.if_out_of_memory(self._recovery.lighten):
                    if phase == "online":
                        self._interact()
                    self._update(phase)
                    if state.step % config.log_frequency == 0:
                        bar.set_postfix(self._log.write_training(phase, self._host_metrics(phase)))
                        self._recovery.roll_back_if_diverged()
                    if state.step % phases.evaluation_frequency(config, phase) == 0:
                        self._evaluations.on_the_way(phase)
                    if state.step % config.save_frequency == 0:
                        self.save()
                    bar.update(phases.extent(state, phase)[1] - bar.n)
                if stop:
                    self.save()
                    raise Interrupted(f"{stop.signal_name}: saved step {state.step} in {self.parts.files.directory}")
        self.save()  # before the evaluation, which may take long: a kill during it costs no updates
        self._evaluations.at_the_end(phase, is_last=phases.is_last(state, phase))
        state.progress.finished.append(phase)
        self._saver.save_progress()

    def save(self) -> None:
        """Start saving a checkpoint of the current state; training goes on while it is written."""
        self._saver.save()

    # ---- one step

    def _update(self, phase: Phase) -> None:
        """Make one update, or ``updates_per_call`` of them in one compiled call."""
        state, config = self.state, self.state.config
        steps = range(state.step, state.step + phases.updates_at_once(state, phase))
        draws = [self._draw(step) for step in steps]
        critic_alone = state.step < config.critic_alone_steps
        with self._clocks.span("data", behind="update", busy=self._is_updating):
            own = [self._make_batch(draw, online=phase == "online", critic_alone=critic_alone) for draw in draws]
            batch = put_batch(own, self._mesh)
        program = (len(steps), own[0].next_observations.prefix is None, critic_alone, config.agent)
        with self._clocks.span("update" if program in self._compiled else "compile"):
            weights = [phases.loss_weights(config, step) for step in steps]
            if critic_alone:
                state.agent, metrics = state.agent.update_critic(batch, self._noise_rng(draws[0]))
            elif len(steps) == 1:
                state.agent, metrics = state.agent.update(batch, self._noise_rng(draws[0]), weights[0])
            else:
                stacked = jax.tree.map(lambda *x: np.array(x, np.float32), *weights)
                rngs = _fold_in_each(self._update_rng, np.array(draws, np.uint32))
                state.agent, metrics = state.agent.updates(batch, rngs, stacked)
            self._recovery.skipped.watch(state.step, own, metrics)
            state.step = steps.stop
            if program not in self._compiled:
                jax.block_until_ready(metrics)
                self._compiled.add(program)
        self._log.add(metrics)
        self._newest = metrics["total_loss"]

    def _make_batch(self, draw: int, **kind: bool) -> ChunkBatch:
        try:
            return self.loader.batch(draw, **kind)
        except (OSError, ValueError) as error:
            self.save()
            raise DataFault(
                f"no batch can be made for update {self.state.step}: {error}. The run is saved at this step in "
                f"{self.parts.files.directory}: bring the data back, then use --resume."
            ) from error

    def _draw(self, step: int) -> int:
        """Return the seed of an update's batch and noise: its step, shifted after each rollback."""
        return step + self.progress.rollbacks * ROLLBACK_STRIDE

    def _noise_rng(self, draw: int) -> jax.Array:
        return fold_in(self._update_rng, np.uint32(draw))

    def _is_updating(self) -> bool:
        """Return whether the device is still computing the last update."""
        return self._newest is not None and not self._newest.is_ready()

    # ---- between the updates of the online phase

    def _interact(self) -> None:
        """Execute chunks until an update is owed.

        With ``overlap_rollouts`` the next chunks are chosen at once and executed during the updates that are owed. The
        policy that chose them is then a number of updates older than the learner: its age.
        """
        assert self.parts.interaction is not None, "a run without an environment has no online phase"
        collector, progress = self.parts.interaction.collector, self.progress
        while phases.updates_owed(self.state) < 1:
            if not collector.begun:
                self._choose(collector)
            self._ages.append(max(0, self.state.step - self._chosen_at))  # a rollback lowers the learner's step
            with self._clocks.span("act"):
                before = collector.seconds.simulator
                collected = collector.finish()
                self._clocks.move("act", "simulator", collector.seconds.simulator - before)
            progress.env_steps += collected.num_steps
            progress.lost_episodes += collected.num_lost
            with self._clocks.span("replay"):
                for finished in collected.rollouts:
                    self.parts.interaction.keep(finished)
                    progress.next_episode = self.parts.interaction.journal.next_number
                    progress.journal_episodes = len(self.parts.interaction.journal)
            if self.config.overlap_rollouts:
                self._choose(collector)

    def _choose(self, collector: OnlineCollector) -> None:
        """Let the newest policy choose a chunk for every environment, and start executing them."""
        agent = self.agent
        with self._clocks.span("update"):
            jax.block_until_ready(agent.step)  # the newest policy acts, so wait until it is computed
        with self._clocks.span("act" if self._has_acted else "compile"):
            collector.begin(chunk_policy(agent, self.parts.transform, self._act_draws, mode="explore"))
        self._has_acted = True
        self._chosen_at = self.state.step

    # ---- what is told

    def _host_metrics(self, phase: Phase) -> dict[str, float]:
        """Return what the host knows of the batches and the rollouts since the last log point."""
        found = {f"loader/{name}": value for name, value in self.loader.stats().items()}
        if phase == "offline":
            return found
        ages, self._ages = self._ages, []
        found["rollout/lost_episodes"] = self.progress.lost_episodes
        if ages:
            found |= {"rollout/policy_age_mean": sum(ages) / len(ages), "rollout/policy_age_max": max(ages)}
        return found

    @contextlib.contextmanager
    def _note_the_end(self) -> Iterator[None]:
        """Write to the summary why a run ended early."""
        try:
            yield
        except Exception as error:
            try:
                self._summarize(ending.cut_short(error, self.state.step))
            except Exception:  # the first error is raised below
                logger.exception("%s could not be written", self.parts.files.summary)
            raise

    def _summarize(self, ended: Ended) -> dict[str, Any]:
        self._clocks.settle()
        summary = ending.summarize(self.state, ended, self.loader.contents())
        write_json(self.parts.files.summary, summary)
        return summary

    # ---- for scripts

    @property
    def agent(self) -> ACRLPDAgent:
        return self.state.agent

    @property
    def config(self) -> TrainConfig:
        return self.state.config

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def loader(self) -> ChunkLoader:
        return self.parts.loader

    @property
    def norm_stats(self) -> Mapping[str, NormStats]:
        return self.parts.norm_stats
