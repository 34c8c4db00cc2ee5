"""The training loop, in two phases: updates on prior data, then updates in between the steps of online episodes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from acrlpd.agents.agent import ACRLPDAgent, ActingMode
from acrlpd.agents.losses import LossWeights
from acrlpd.config import TrainConfig, to_dict
from acrlpd.data.loader import ChunkLoader
from acrlpd.data.normalize import NormStats
from acrlpd.data.transforms import Transform
from acrlpd.envs.rollout import OnlineCollector, Rollout
from acrlpd.envs.vector import VectorEnv
from acrlpd.overrides import differences
from acrlpd.training import ending, guards
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, checksums
from acrlpd.training.ending import Ended
from acrlpd.training.evaluate import EpisodeDraws, Evaluation, chunk_policy, evaluate, fold_in, outcomes
from acrlpd.training.faults import DataFault, Diverged, Interrupted, RunFault
from acrlpd.training.fingerprint import Fingerprint
from acrlpd.training.guards import RunLock, SkippedUpdates, StopRequest
from acrlpd.training.metrics import MetricAverage, Stopwatch, breakdown, write_json
from acrlpd.training.monitor import ACRLPDTrainingMonitor
from acrlpd.training.overwriting import Replaced
from acrlpd.training.run import Interaction, Progress, RunFiles, save_rollouts, settle_best
from acrlpd.training.sharding import make_mesh, put_batch
from acrlpd.training.writers import make_writers
from acrlpd.types import ChunkBatch

logger = logging.getLogger(__name__)

Phase = Literal["offline", "online"]
BAR_SECONDS = 1.0 if sys.stderr.isatty() else 30.0  # between redraws; a log file needs few
PHASES: tuple[Phase, ...] = ("offline", "online")
_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
ROLLBACK_STRIDE = 2**30  # after a rollback, batches and noise are drawn as for steps this much later


class _Evaluated(NamedTuple):
    """A policy to evaluate, with the update and environment step at which it was the newest."""

    agent: ACRLPDAgent
    step: int
    env_steps: int


class ACRLPDTrainer:
    """A trainer that trains an agent offline, then online, and evaluates it at the end of each phase.

    Everything except the updates happens between two updates. Logging waits for the device only at log points.
    """

    def __init__(
        self,
        agent: ACRLPDAgent,
        loader: ChunkLoader,
        config: TrainConfig,
        *,
        transform: Transform,
        norm_stats: Mapping[str, NormStats],
        files: RunFiles,
        checkpoints: ACRLPDCheckpointManager,
        progress: Progress | None = None,
        interaction: Interaction | None = None,
        eval_environments: VectorEnv | None = None,
        fresh_agent: Callable[[], ACRLPDAgent],
        lock: RunLock | None = None,
        replaced: Replaced | None = None,
        prior: Fingerprint | None = None,
    ):
        self.agent = agent
        self.loader = loader
        self.config = config
        self.progress = progress or Progress()
        self._step = int(agent.step)
        self._transform = transform
        self.norm_stats = norm_stats
        self._prior = prior
        self._files = files
        self._interaction = interaction
        self._eval_environments = eval_environments
        self._mesh = make_mesh(config.fsdp_devices)
        self._update_rng, act_rng, self._eval_rng = jax.random.split(jax.random.key(config.seed + 1), 3)
        self._act_draws = EpisodeDraws(act_rng)
        self._average = MetricAverage()
        self._watch = Stopwatch()
        self._checkpoints = checkpoints
        self._fresh_agent = fresh_agent
        self._monitor = ACRLPDTrainingMonitor()
        self._logged = time.perf_counter(), self._step  # time and step of the last log point
        self._lock = lock
        self._replaced = replaced  # the previous run in this folder, kept until this one has a checkpoint
        self._skipped = SkippedUpdates(files.skipped, limit=config.max_skipped_updates)
        self._started = time.perf_counter(), time.process_time()
        self._compiled: set[tuple[int, bool, bool]] = set()  # (updates per call, no stored prefix of s', critic alone)
        self._has_acted = self._has_saved = False
        self._chosen_at = 0  # update at which the chunks that are being executed were chosen
        self._ages: list[int] = []  # policy ages, in updates, of the chunks executed since the last log point
        self._newest: Any = None  # an array of the last update; the device may still be computing it

    def train(self) -> dict[str, Any]:
        """Run the rest of both phases; return the summary, which is also written to ``summary.json``."""
        with (
            guards.explain_storage(self._files.directory),
            guards.stop_on_signal() as stop,
            contextlib.ExitStack() as closing,
        ):
            if self._lock is not None:
                closing.callback(self._lock.release)
            closing.callback(self.loader.close)
            if self._replaced is not None:
                closing.callback(self._replaced.say_if_kept)
            closing.callback(self._checkpoints.wait)
            if self._interaction is not None:
                closing.callback(self._interaction.collector.close)
            if self._eval_environments is not None:
                closing.callback(self._eval_environments.close)
            ended = ending.is_over(self.config, self.progress, self._step)
            known = ended and ending.known_summary(self._files, self.progress, self._step)
            if known:
                return known  # resuming changes nothing
            write_json(self._files.config, to_dict(self.config))
            self._writer = make_writers(
                self._files.metrics, self.config.loggers, name=self.config.name, run_config=to_dict(self.config)
            )
            closing.callback(self._writer.close)
            with self._note_the_end(), self._save_before_leaving():
                for phase in PHASES:
                    if self._extent(phase)[0] > 0 and not (phase in self.progress.finished and self._finished(phase)):
                        self._run(phase, stop)
            ended = ending.is_over(self.config, self.progress, self._step)
            assert ended is not None, "both phases have come to their end"
            return self._summarize(ended)

    def _run(self, phase: Phase, stop: StopRequest) -> None:
        total, done = self._extent(phase)
        self.progress.finished = [each for each in self.progress.finished if each != phase]  # a resume may lengthen it
        with tqdm(total=total, initial=done, desc=phase, unit="step", mininterval=BAR_SECONDS) as bar:
            while not self._finished(phase):
                loop = self._watch.span("loop", behind="update", busy=self._is_updating)
                with loop, guards.if_out_of_memory(self._lighten):
                    if phase == "online":
                        self._interact()
                    self._update(phase)
                    if self._step % self.config.log_frequency == 0:
                        bar.set_postfix(self._log(phase))
                        self._roll_back_if_diverged()
                    if self._step % self._evaluation_frequency(phase) == 0:
                        self._evaluate_on_the_way(phase)
                    if self._step % self.config.save_frequency == 0:
                        self.save()
                    bar.update(self._extent(phase)[1] - bar.n)
                if stop:
                    self.save()
                    raise Interrupted(f"{stop.signal_name}: saved step {self._step} in {self._files.directory}")
        self._end(phase)

    # ---- one step

    def _update(self, phase: Phase) -> None:
        """Make one update, or ``updates_per_call`` of them in one compiled call."""
        steps = range(self._step, self._step + self._updates_at_once(phase))
        draws = [self._draw(step) for step in steps]
        critic_alone = self._step < self.config.critic_alone_steps
        with self._watch.span("data", behind="update", busy=self._is_updating):
            own = [self._make_batch(draw, online=phase == "online", critic_alone=critic_alone) for draw in draws]
            batch = put_batch(own, self._mesh)
        program = (len(steps), own[0].next_observations.prefix is None, critic_alone)
        with self._watch.span("update" if program in self._compiled else "compile"):
            if critic_alone:
                self.agent, metrics = self.agent.update_critic(batch, fold_in(self._update_rng, np.uint32(draws[0])))
            elif len(steps) == 1:
                rng = fold_in(self._update_rng, np.uint32(draws[0]))
                self.agent, metrics = self.agent.update(batch, rng, self.loss_weights(self._step))
            else:
                weights = jax.tree.map(lambda *x: np.array(x, np.float32), *map(self.loss_weights, steps))
                rngs = _fold_in_each(self._update_rng, np.array(draws, np.uint32))
                self.agent, metrics = self.agent.updates(batch, rngs, weights)
            self._skipped.watch(self._step, own, metrics)
            self._step = steps.stop
            if program not in self._compiled:
                jax.block_until_ready(metrics)
                self._compiled.add(program)
        self._average.add(metrics)
        self._newest = metrics["total_loss"]

    def _updates_at_once(self, phase: Phase) -> int:
        """Return ``updates_per_call`` if nothing is due in between these updates, else 1."""
        config = self.config
        if self._step < config.critic_alone_steps:
            return 1
        frequencies = (config.log_frequency, config.save_frequency, self._evaluation_frequency(phase))
        due = [frequency - self._step % frequency for frequency in frequencies]
        due.append(config.offline_steps - self._step if phase == "offline" else int(self._updates_owed()))
        return config.updates_per_call if config.updates_per_call <= min(due) else 1

    def _make_batch(self, draw: int, **kind: bool) -> ChunkBatch:
        try:
            return self.loader.batch(draw, **kind)
        except (OSError, ValueError) as error:
            self.save()
            raise DataFault(
                f"no batch can be made for update {self._step}: {error}. The run is saved at this step in "
                f"{self._files.directory}: bring the data back, then use --resume."
            ) from error

    def _draw(self, step: int) -> int:
        """Return the seed of an update's batch and noise: its step, shifted after each rollback."""
        return step + self.progress.rollbacks * ROLLBACK_STRIDE

    def _is_updating(self) -> bool:
        """Return whether the device is still computing the last update."""
        return self._newest is not None and not self._newest.is_ready()

    def _interact(self) -> None:
        """Execute chunks until an update is owed.

        With ``overlap_rollouts`` the next chunks are chosen at once and executed during the updates that are owed. The
        policy that chose them is then a number of updates older than the learner: its age.
        """
        assert self._interaction is not None, "_finished ends the online phase of a run without an environment"
        collector = self._interaction.collector
        while self._updates_owed() < 1:
            if not collector.begun:
                self._choose(collector)
            self._ages.append(max(0, self._step - self._chosen_at))  # a rollback lowers the learner's step
            with self._watch.span("act"):
                before = collector.seconds.simulator
                collected = collector.finish()
                self._watch.move("act", "simulator", collector.seconds.simulator - before)
            self.progress.env_steps += collected.num_steps
            self.progress.lost_episodes += collected.num_lost
            with self._watch.span("replay"):
                for finished in collected.rollouts:
                    self._interaction.keep(finished)
                    self.progress.next_episode = self._interaction.journal.next_number
                    self.progress.journal_episodes = len(self._interaction.journal)
            if self.config.overlap_rollouts:
                self._choose(collector)

    def _choose(self, collector: OnlineCollector) -> None:
        """Let the newest policy choose a chunk for every environment, and start executing them."""
        with self._watch.span("update"):
            jax.block_until_ready(self.agent.step)  # the newest policy acts, so wait until it is computed
        with self._watch.span("act" if self._has_acted else "compile"):
            collector.begin(chunk_policy(self.agent, self._transform, self._act_draws, mode="explore"))
        self._has_acted = True
        self._chosen_at = self._step

    def loss_weights(self, step: int) -> LossWeights:
        """Return the loss weights of an update: no actor loss at first, a linear change early in the online phase."""
        config = self.config
        weights = config.agent.loss_weights
        if config.online_loss_weights is not None and step >= config.offline_steps:
            share = min(1.0, (step - config.offline_steps) / config.online_transition_steps)
            weights = jax.tree.map(lambda a, b: a + share * (b - a), weights, config.online_loss_weights)
        if step < config.actor_warmup_steps:
            weights = dataclasses.replace(weights, actor_weight=0.0)
        return weights

    # ---- progress

    def _updates_owed(self) -> float:
        """Return the number of updates that ``utd_ratio`` requires and that have not been made."""
        due = (self.progress.counted_steps - self.config.warmup_env_steps) * self.config.utd_ratio
        return due - (self._step - self.config.offline_steps)

    def _extent(self, phase: Phase) -> tuple[int, int]:
        """Return the length of a phase and how much of it is done: updates offline, environment steps online."""
        if phase == "offline":
            return self.config.offline_steps, min(self._step, self.config.offline_steps)
        total = self.config.online_steps if self.config.env is not None else 0
        return total, min(self.progress.counted_steps, total)

    def _finished(self, phase: Phase) -> bool:
        if phase == "offline":
            return self._step >= self.config.offline_steps
        if self._interaction is None or ending.early_stop(self.config, self.progress) is not None:
            return True
        return self.progress.counted_steps >= self.config.online_steps and self._updates_owed() < 1

    # ---- between steps

    def _log(self, phase: Phase) -> dict[str, str]:
        with self._watch.span("update"):
            metrics = self._average.fetch()  # waits for the device
        with self._watch.span("log"):
            record = {"step": self._step, "phase": phase, "env_steps": self.progress.env_steps, "wall_s": self._wall()}
            numbers = {f"train/{name}": value for name, value in metrics.items()}
            numbers |= {f"loader/{name}": value for name, value in self.loader.stats().items()}
            numbers |= self._throughput() | {"data/mask_ratio": metrics["mask_ratio"]}
            if phase == "online":
                numbers |= self._about_rollouts()
            self._monitor.monitor_training_step(self._step, numbers)
            self._writer.write(record | numbers)
        shown = {"loss": "total_loss", "q": "q_mean"}  # pure imitation has no Q
        return {name: f"{metrics[metric]:.3g}" for name, metric in shown.items() if metric in metrics}

    def _throughput(self) -> dict[str, float]:
        """Return the time per update since the last log point, everything included, and the device memory if known."""
        now, (before, step) = time.perf_counter(), self._logged
        self._logged = now, self._step
        seconds = (now - before) / max(self._step - step, 1)
        found = {"timing/step_duration": seconds, "timing/samples_per_sec": self.config.data.batch_size / seconds}
        memory = jax.local_devices()[0].memory_stats()
        return found | ({"memory/gpu_usage": memory["bytes_in_use"]} if memory else {})

    def _roll_back_if_diverged(self) -> None:
        """Go back to the newest checkpoint before many skipped updates in a row, or to the start of the run."""
        diverged_at = self._skipped.settle()
        if diverged_at is None:
            return
        what = (
            f"{self.config.max_skipped_updates} updates in a row from step {diverged_at} on were skipped for NaN or "
            f"spikes; their episodes are listed in {self._files.skipped}"
        )
        if self.progress.rollbacks >= self.config.max_rollbacks:
            raise Diverged(
                f"{what}. {self.progress.rollbacks} rollbacks did not help: look at those episodes (acrlpd data "
                "validate), lower the learning rates, or raise agent.health.spike_factor."
            )
        self._checkpoints.wait()
        self.agent, earlier = self._last_good(diverged_at)
        self._step = int(self.agent.step)
        self._checkpoints.discard_after(self._step)
        settle_best(self.progress, earlier, self._checkpoints, self._files)
        self.progress.rollbacks += 1
        logger.warning("%s. Rolled back to step %d, where other batches and noise are drawn.", what, self._step)

    def _lighten(self, reason: str) -> None:
        """Go on with smaller micro-batches. If the failed call consumed the agent, restore the last good one."""
        agent_config = guards.lighter(self.config.agent, self.config.data.batch_size, jax.device_count())
        if agent_config is None:
            raise RunFault(
                f"out of memory in update {self._step}, and nothing can be made smaller: {reason}. acrlpd plan says "
                "what this run needs; the last checkpoint is intact."
            )
        logger.warning(
            "out of memory in update %d (%s). Going on with %s.",
            self._step,
            reason,
            "; ".join(
                line.replace(": was", " from").replace(", now", " to")
                for line in differences(
                    dataclasses.asdict(self.config.agent), dataclasses.asdict(agent_config), "agent."
                )
            ),
        )
        self.config = dataclasses.replace(self.config, agent=agent_config)
        self._compiled.clear()
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.agent)):
            self._checkpoints.wait()
            self.agent, _ = self._last_good(self._step)
            self._step = int(self.agent.step)
        nets = dataclasses.replace(self.agent.nets, config=agent_config)
        self.agent = dataclasses.replace(self.agent, nets=nets)

    def _last_good(self, before: int) -> tuple[ACRLPDAgent, Progress]:
        """Return the newest saved agent up to step ``before``, or a fresh one, and the run's progress at that time."""
        if any(step <= before for step in self._checkpoints.steps()):
            restored = self._checkpoints.restore_newest(self.agent, before=before)
            return restored.agent, Progress(**restored.run["progress"])
        return self._fresh_agent(), Progress()

    def _about_rollouts(self) -> dict[str, float]:
        ages, self._ages = self._ages, []
        found: dict[str, float] = {"rollout/lost_episodes": self.progress.lost_episodes}
        if ages:
            found |= {"rollout/policy_age_mean": sum(ages) / len(ages), "rollout/policy_age_max": max(ages)}
        return found

    def _evaluation_frequency(self, phase: Phase) -> int:
        return max(1, self.config.eval.frequency // (2 if phase == "online" else 1))

    def _evaluate_on_the_way(self, phase: Phase) -> None:
        """Evaluate the agent in training on the seeds that decide which policy the run keeps."""
        if self._eval_environments is None:
            return
        result, rollouts = self._evaluate(phase, "greedy", self.config.eval.progress_seeds, self._newest_policy())
        tqdm.write(f"{phase}, step {self._step}: success {result}")
        self.progress.evaluated_step = self._step
        if phase == "online":
            improved = result.success > self.progress.best_success
            self.progress.best_success = max(result.success, self.progress.best_success)
            self.progress.evaluations_since_best = 0 if improved else self.progress.evaluations_since_best + 1
            self._monitor.monitor_evaluation(self._step, self.progress.offline_outcomes, outcomes(rollouts))
        elif self._step >= self.config.offline_steps:
            self.progress.offline_outcomes = outcomes(rollouts)
        if result.success >= self.progress.best_step_success:  # a tie goes to the policy that trained for longer
            self._keep_as_best(result.success)

    def _keep_as_best(self, success: float) -> None:
        """Keep this checkpoint. The previous best is released once this one is complete and ``best.json`` names it."""
        before = self.progress.best_step
        self.progress.best_step, self.progress.best_step_success = self._step, success
        self._checkpoints.keep.add(self._step)
        self.save()
        with self._watch.span("checkpoint"):
            self._checkpoints.wait()
        write_json(self._files.best, {"step": self._step, "success": success})
        self._checkpoints.release(before)

    def _newest_policy(self) -> _Evaluated:
        return _Evaluated(self.agent, self._step, self.progress.env_steps)

    def _kept_policy(self) -> _Evaluated:
        """Return the policy that the run keeps; a restored one has no optimiser state."""
        step = self.progress.best_step
        if step is None or step == self._step:
            return self._newest_policy()
        restored = self._checkpoints.restore(dataclasses.replace(self.agent, opt_state={}), step)
        return _Evaluated(restored.agent, step, restored.run["progress"]["env_steps"])

    def _evaluate(
        self, name: str, mode: ActingMode, seeds: range, policy: _Evaluated
    ) -> tuple[Evaluation, list[Rollout]]:
        assert self._eval_environments is not None, "callers ask first"
        with self._watch.span("update"):
            jax.block_until_ready(self.agent.step)
        before = self._cpu()
        with self._watch.span("evaluation"):
            result, rollouts = evaluate(
                policy.agent,
                self._transform,
                self._eval_environments,
                seeds,
                mode=mode,
                rng=self._eval_rng,  # the same noise each time, so two evaluations differ only in their policies
                execute_horizon=self.config.executed_steps,
            )
        record = {"step": policy.step, "phase": name, "env_steps": policy.env_steps, "wall_s": self._wall()}
        cpu = self._cpu()
        self._writer.write(record | {"cpu_s": cpu, "evaluation_cpu_s": cpu - before} | result.metrics())
        return result, rollouts

    def _end(self, phase: Phase) -> None:
        """Save and evaluate. After the offline phase, also evaluate the flow without the critic ("bc").

        The result of the last phase is that of the policy that the run keeps.
        """
        self.save()  # before the evaluation, which may take long: a kill during it costs no updates
        if self._eval_environments is not None:
            if self.progress.evaluated_step != self._step:  # else the loop has just done it
                self._evaluate_on_the_way(phase)
            if phase == "offline":
                self._evaluate_at_end("bc", "bc", self._newest_policy())
            is_last = phase == "online" or not self._extent("online")[0]
            self._evaluate_at_end(phase, "greedy", self._kept_policy() if is_last else self._newest_policy())
        self.progress.finished = [*self.progress.finished, phase]
        with self._watch.span("checkpoint"):
            self._settle_clocks()
            self._checkpoints.replace_run(self._step, self._run_record())

    def _evaluate_at_end(self, name: str, mode: ActingMode, policy: _Evaluated) -> None:
        result, rollouts = self._evaluate(name, mode, self.config.eval.final_seeds, policy)
        told = {"bc": "imitation alone"}.get(name, f"after the {name} phase")
        tqdm.write(f"{told}, policy of step {policy.step}: success {result}")
        self.progress.results[name] = result.summary()
        save_rollouts(self._files.evaluation(name), rollouts)

    def save(self) -> None:
        """Start saving a checkpoint of the current state; training goes on while it is written."""
        with self._watch.span("update"):
            jax.block_until_ready(self.agent.step)
        if not self._has_saved:
            with self._watch.span("compile"):
                checksums(self.agent)
            self._has_saved = True
        with self._watch.span("checkpoint"):
            self._settle_clocks()
            self._checkpoints.save(
                self.agent,
                asset_id=self.config.asset_id,
                norm_stats=self.norm_stats,
                run=self._run_record(),
            )
            if self._replaced is not None:
                self._checkpoints.wait()
                self._replaced.delete()
                self._replaced = None

    def _run_record(self) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "progress": dataclasses.asdict(self.progress),
            "cameras": list(self.loader.cameras),
            "sets": self.loader.contents().get("sets", []),
            "prior": None if self._prior is None else dataclasses.asdict(self._prior),
        }

    @contextlib.contextmanager
    def _save_before_leaving(self) -> Iterator[None]:
        """Save the agent before an unforeseen error leaves the loop, such as one of a simulator or a logger."""
        try:
            yield
        except (Interrupted, RunFault):
            raise  # the run was saved before these were raised, or their message says why not
        except Exception as error:
            if not guards.is_of_storage(error, self._files.directory) and jax.process_count() == 1:
                self._try_to_save(error)
            raise

    def _try_to_save(self, reason: Exception) -> None:
        try:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.agent)) or self._skipped.settle() is not None:
                return
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self.agent.params)):
                return
            self.save()
            self._checkpoints.wait()
        except Exception:  # the caller raises the first error
            logger.exception("after %r, update %d could not be saved", reason, self._step)
        else:
            logger.error("%r ends the run; update %d is saved, use --resume.", reason, self._step)

    # ---- clocks and summary

    def _wall(self) -> float:
        return self.progress.wall_s + time.perf_counter() - self._started[0]

    def _cpu(self) -> float:
        return self.progress.cpu_s + time.process_time() - self._started[1]

    def _settle_clocks(self) -> None:
        """Add the time since the last call to the run's progress, which is saved with its checkpoints."""
        now = time.perf_counter(), time.process_time()
        self.progress.wall_s += now[0] - self._started[0]
        self.progress.cpu_s += now[1] - self._started[1]
        self._started = now
        for name, seconds in self._watch.seconds.items():
            self.progress.seconds[name] = self.progress.seconds.get(name, 0.0) + seconds
        self._watch.seconds.clear()

    @contextlib.contextmanager
    def _note_the_end(self) -> Iterator[None]:
        """Write to the summary why a run ended early."""
        try:
            yield
        except Exception as error:
            try:
                self._summarize(ending.cut_short(error, self._step))
            except Exception:  # the first error is raised below
                logger.exception("%s could not be written", self._files.summary)
            raise

    def _summarize(self, ended: Ended) -> dict[str, Any]:
        self._settle_clocks()
        summary = {
            "task": self.config.env.name if self.config.env else self.config.data.name,
            "seed": self.config.seed,
            "data": self.loader.contents(),
            "phases": self.progress.results,
            "wall_s": self.progress.wall_s,
            "cpu_s": self.progress.cpu_s,
            "updates": self._step,
            "env_steps": self.progress.env_steps,
            "lost_steps": self.progress.lost_steps,
            "ended": dataclasses.asdict(ended),
            "best": {"step": self.progress.best_step, "success": self.progress.best_step_success},
            "rollbacks": self.progress.rollbacks,
            "lost_episodes": self.progress.lost_episodes,
            "breakdown": breakdown(self.progress.seconds, self.progress.wall_s),
        }
        write_json(self._files.summary, summary)
        return summary
