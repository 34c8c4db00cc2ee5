"""Ways to look at what a configuration does, each cheap: programs and shapes are traced, nothing large is computed.

A look takes a configuration and returns something that can be compared. ``test_every_field.py`` says which look sees
which field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tests.envs.conftest import CountingSimulator

from acrlpd.agents import agent as agent_module
from acrlpd.agents.losses import LossWeights
from acrlpd.config import DataConfig, OptimizersConfig, PolicyConfig, TrainConfig
from acrlpd.data.formats import rewards
from acrlpd.data.mixture import Mixture
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.view.normalize import NormStats
from acrlpd.envs import registry
from acrlpd.envs.env import EnvConfig, SimulatedEnvironment
from acrlpd.envs.registry import make
from acrlpd.envs.rollout import Collected
from acrlpd.overrides import to_yaml
from acrlpd.presets import NANO
from acrlpd.training import build, collection, evaluations, loop, memory, prior_data, saving, setup, sharding, writers
from acrlpd.training.evaluate import summarize
from acrlpd.training.memory import Machine
from acrlpd.training.optimizer import make_optimizers, make_schedule
from acrlpd.training.parts import RunParts
from acrlpd.training.run import Progress, run_files
from acrlpd.types import Episode

DIMS = build.Dims(4, 2)
CAMERAS = ("top",)
BATCH = 4


def digest(tree: Any) -> tuple[Any, ...]:
    """Arrays as something that can be compared."""
    return tuple((leaf.shape, leaf.dtype.name, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree))


def shape_of(tree: Any) -> tuple[Any, ...]:
    return tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


# ---- the networks and the update


def shapes(config: TrainConfig) -> Any:
    """Of every array of the agent and of a batch."""
    return _shapes(agents_part(config))


@functools.cache
def _shapes(config: TrainConfig) -> Any:
    agent = jax.eval_shape(lambda: build.create_agent(config, DIMS, CAMERAS))
    return shape_of(agent), shape_of(memory.batch_shapes(config, DIMS, CAMERAS, BATCH))


def update_program(config: TrainConfig) -> str:
    """Of the policy as configured, on a batch of four."""
    return _update_program(agents_part(config))


@functools.cache
def _update_program(config: TrainConfig) -> str:
    agent = jax.eval_shape(lambda: build.create_agent(config, DIMS, CAMERAS))
    batch = memory.batch_shapes(config, DIMS, CAMERAS, BATCH)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return str(jax.make_jaxpr(agent_module._update.__wrapped__)(agent, batch, rng, config.agent.loss_weights))


def agents_part(config: TrainConfig) -> TrainConfig:
    """Only what the agent is made of, which many presets have in common: they are looked at once."""
    of_data = {name: getattr(config.data, name) for name in ("robot", "batch_size", "action_normalization")}
    names = ("seed", "policy", "agent", "optimizers", "execute_horizon")
    return TrainConfig(data=DataConfig(path="none", **of_data), **{name: getattr(config, name) for name in names})


def narrow(config: TrainConfig) -> TrainConfig:
    """With the smallest policy; everything about the agent is kept."""
    policy = PolicyConfig(kind="mlp_flow", action_horizon=3, hidden_dims=(4,), weights=None)
    if config.agent.algorithm == "rlpd_ac":
        policy = dataclasses.replace(policy, kind="gaussian")
    data = dataclasses.replace(config.data, batch_size=BATCH)
    return dataclasses.replace(config, policy=policy, data=data)


def learning(config: TrainConfig) -> str:
    """The program of an update, with every number of the configuration that is written into it."""
    return update_program(dataclasses.replace(narrow(config), optimizers=OptimizersConfig()))


def acting(config: TrainConfig) -> str:
    """The program by which the agent chooses chunks while it explores."""
    return _acting(agents_part(narrow(config)))


@functools.cache
def _acting(config: TrainConfig) -> str:
    agent = jax.eval_shape(lambda: build.create_agent(config, DIMS, ()))
    seen = memory.batch_shapes(config, DIMS, (), BATCH).observations
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return str(jax.make_jaxpr(lambda *x: agent_module.choose_chunks.__wrapped__(*x, mode="explore"))(agent, seen, rng))


def valuing(config: TrainConfig) -> Any:
    """Shapes of the critics' arrays on what a pi0 sees."""
    config = dataclasses.replace(config, policy=dataclasses.replace(NANO, action_horizon=3, image_size=16))
    return shape_of(jax.eval_shape(lambda: build.create_agent(config, DIMS, CAMERAS)).params["critic"])


def fresh(config: TrainConfig) -> Any:
    """The numbers a run begins with."""
    agent = build.create_agent(narrow(config), DIMS, ())
    return digest((agent.params["critic"], agent.params["temperature"], agent.params["policy"]))


def placed(config: TrainConfig) -> int:
    """Bytes on one of two devices."""
    agent = jax.eval_shape(lambda: build.create_agent(narrow(config), DIMS, ()))
    with mock.patch.object(sharding, "MIN_SHARDED_BYTES", 1):
        return memory._local_bytes(config, Machine(2), agent.params)


# ---- the optimisers

STEPS = np.array([0, 3, 500, 1500, 4000, 20_000, 45_000, 90_000, 10**7])


def descent(config: TrainConfig) -> Any:
    """Learning rates over a run, and what two gradients do to parameters so large that their decay shows."""
    found = {}
    for group, optimizer in make_optimizers(config.optimizers).items():
        rates = make_schedule(getattr(config.optimizers, group).schedule)(STEPS)
        params = jnp.array([1e10, 0.0])
        state, moves = optimizer.init(params), []
        for gradient in ([40.0, 1e-6], [0.1, -1e-7], [5.0, 1e-8]):
            update, state = optimizer.update(jnp.array(gradient), state, params)
            moves.append(np.asarray(update).tolist())
        found[group] = np.asarray(rates).tolist(), moves
    return found


# ---- batches


def episode(length: int, *, success: bool = True) -> Episode:
    rng = np.random.default_rng(length)
    return Episode(
        state=rng.normal(size=(length, DIMS.state)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(length, DIMS.action)).astype(np.float32),
        rewards=np.full(length, -1, np.float32),
        terminals=np.arange(length) == length - 1 if success else np.zeros(length, bool),
        task="push the button",
        images={"top": rng.integers(0, 256, (length, 8, 8, 3), np.uint8)},
        success=success,
    )


STATS = {"state": NormStats(np.zeros(DIMS.state), np.ones(DIMS.state)), "actions": NormStats(np.zeros(2), np.ones(2))}
STATS = {key: dataclasses.replace(each, q01=each.mean - 1, q99=each.mean + 3) for key, each in STATS.items()}


def batches(config: TrainConfig) -> Any:
    """A batch of the offline phase and one of the online phase, of data that is no robot's."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, robot=None, delta_mask=None))
    prior, replay = EpisodeStore.from_episodes([episode(30), episode(60)]), EpisodeStore.from_episodes([episode(40)])
    transform = build.make_transform(config, STATS, DIMS)
    online = types.SimpleNamespace(replay=replay)
    with mock.patch.object(setup.prefixes, "is_legal", return_value=False):
        loader = setup.make_loader(config, Mixture.of(prior), transform, online, None, STATS)
    found = [loader.batch(0), loader.batch(1, online=True)]
    loader.close()
    return digest(found)


def mapped(config: TrainConfig) -> Any:
    """What the data passes before it is normalised, as which cameras, and where it is looked for."""
    steps = [vars(step) if hasattr(step, "__dict__") else {} for step in build.before_normalization(config)]
    names = [type(step).__name__ for step in build.before_normalization(config)]
    cameras = build.model_cameras(config, CAMERAS)
    return names, str(steps), build.delta_mask(config), cameras, prior_data.prior_sets(config)


def statistics(config: TrainConfig) -> Any:
    """Of state and actions, where an environment says how far actions go."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, robot=None, delta_mask=None))
    store = EpisodeStore.from_episodes([episode(30)])
    spec = types.SimpleNamespace(action_low=np.full(2, -3.0), action_high=np.full(2, 3.0))
    stats = prior_data.make_norm_stats(config, Mixture.of(store), [None], spec)
    return digest([(each.mean, each.std) for each in stats.values()])


def tokens(config: TrainConfig) -> Any:
    """Of a short instruction, or that there is no such tokenizer."""
    try:
        return digest(build.make_transform(config, STATS, DIMS)(_raw())["tokenized_prompt"])
    except FileNotFoundError as error:
        return str(error)


def _raw() -> dict[str, Any]:
    return {"state": np.zeros((1, DIMS.state)), "image": {}, "prompt": np.array(["push"])}


def rewarded(config: TrainConfig) -> Any:
    """Rewards and ends of a success, a failure, and an episode of staged rewards of which nobody knows."""
    given, staged = config.data.rewards, np.array([0, 1, 2], np.float32)
    found = []
    for success, stored in ((True, None), (False, None), (True, staged), (None, None)):
        labeller = rewards.Labeller.of(given, [] if stored is None else [stored])
        try:
            known = labeller.success(success)
            found.append(digest(labeller.label(3, success=known, stored=stored, where="")))
        except ValueError as error:
            found.append(str(error))
    return found


def collecting(config: TrainConfig) -> Any:
    """How prior data is asked for, where there is none."""
    asked: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, _patched(collection.collect, collect=_recorder(asked)):
        here = dataclasses.replace(config, run_dir=folder, env=config.env or EnvConfig())
        here = dataclasses.replace(here, data=dataclasses.replace(config.data, path=None, robot=None))
        with contextlib.suppress(ValueError, FileNotFoundError):  # nothing was collected, so there is nothing to open
            prior_data.open_prior(here)
    ((env, missing), options) = asked[0]
    return env, missing, {name: value for name, value in options.items() if name != "on_episode"}


# ---- environments


def world(config: TrainConfig) -> Any:
    """An environment's first moments: how large, how far, in which words, and what a step pays."""
    env = config.env or EnvConfig()
    cameras = CountingSimulator.cameras[: len(env.cameras)]
    environment = SimulatedEnvironment(CountingSimulator(), dataclasses.replace(env, name="counting", cameras=cameras))
    seen = environment.reset(0)
    pays = environment.step(np.zeros(2, np.float32)).reward
    pictures = {camera: picture.shape for camera, picture in seen["image"].items()}
    return seen["prompt"], pictures, pays, environment.spec.max_episode_steps


def named(config: TrainConfig) -> Any:
    """The environment that is found under the name."""
    environment = make(config.env)
    environment.close()
    return environment.spec.instruction, environment.spec.state_dim


def experience(config: TrainConfig) -> Any:
    """What one choice in every environment of the online phase brings, and how much of it is kept."""
    config = dataclasses.replace(config, env=dataclasses.replace(config.env or EnvConfig(), cameras=()))
    with tempfile.TemporaryDirectory() as folder, _counting():
        files = run_files(dataclasses.replace(config, run_dir=folder))
        made = setup.make_interaction(config, files, Progress())
        taken = made.collector.collect(lambda seen, numbers: np.zeros((len(seen), config.policy.action_horizon, 2)))
        first = made.collector._lanes._observations[0]["state"].tolist()  # begins with the episode's seed
        for length in (30, 40, 50):
            made.replay.append(episode(length))
        made.collector.close()
    return taken.num_steps, first, made.replay.num_episodes


def staging(config: TrainConfig) -> Any:
    """Where environments are stepped, and how many of them evaluate and collect."""
    config = dataclasses.replace(config, env=config.env or EnvConfig())
    asked: list[Any] = []
    ray = types.SimpleNamespace(RayVectorEnv=_recorder(asked, "ray"))
    local = {"LocalVectorEnv": _recorder(asked, "local"), "ProcessVectorEnv": _recorder(asked, "processes")}
    with _counting(), _patched(registry, **local), mock.patch.dict(sys.modules, {"acrlpd.envs.ray": ray}):
        setup.make_environments(config, 6)
    return [(where, {name: each for name, each in options.items() if name != "make_one"}) for where, options in asked]


def reading_room(config: TrainConfig) -> Any:
    """The environments and the places of a trainer that has everything but an agent."""
    config = dataclasses.replace(config, env=config.env or EnvConfig(), online_steps=0)
    asked: list[Any] = []
    patches = {"make_environments": _recorder(asked), "open_sets": _stop}
    with tempfile.TemporaryDirectory() as folder, _patched(setup, **patches), contextlib.suppress(_Enough):
        setup.make_trainer(dataclasses.replace(config, run_dir=folder))
    return [count for (_, count), _ in asked], run_files(config).directory


def described(config: TrainConfig) -> str:
    return to_yaml(config).splitlines()[0]


# ---- what is logged


def logged(config: TrainConfig) -> Any:
    """What the loggers are told when a run begins."""
    told: list[Any] = []
    run = types.SimpleNamespace(define_metric=lambda *names, **options: None, finish=lambda: None)
    modules = {
        name: types.SimpleNamespace(init=_recorder(told, name, returns=run), finish=lambda: None)
        for name in ("wandb", "trackio")
    }
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(sys.modules, modules):
        made = writers.make_writers(Path(folder) / "m.jsonl", config.loggers, name=config.name, run_config={})
        made.close()
    return [
        (name, {key: value for key, value in options.items() if key not in ("dir", "id")}) for name, options in told
    ]


# ---- the loop: what happens, in which order, with an agent that learns nothing

WINDOW = 14  # events that are looked at from each place on


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a run a look begins."""

    step: int = 0
    env_steps: int = 0
    online: bool = False
    evaluations_since_best: int = 0


class _Enough(BaseException):
    pass


def _stop(*arguments: Any, **options: Any) -> None:
    raise _Enough


class _Diary(list):
    def note(self, *event: Any) -> None:
        self.append(event)
        if len(self) >= WINDOW:
            raise _Enough


@dataclasses.dataclass(frozen=True)
class _Still:
    """Counts its updates."""

    step: int
    diary: _Diary
    params: Any = dataclasses.field(default_factory=dict)

    def update(self, batch: Any, rng: Any, weights: LossWeights) -> Any:
        self.diary.note("update", self.step, dataclasses.astuple(weights))
        return dataclasses.replace(self, step=self.step + 1), _metrics()

    def update_critic(self, batch: Any, rng: Any) -> Any:
        self.diary.note("update_critic", self.step)
        return dataclasses.replace(self, step=self.step + 1), _metrics()

    def updates(self, batches: Any, rngs: Any, weights: Any) -> Any:
        count = len(jax.tree.leaves(rngs)[0])
        self.diary.note("updates", self.step, count)
        return dataclasses.replace(self, step=self.step + count), jax.tree.map(lambda x: jnp.full(count, x), _metrics())


@functools.cache
def _metrics() -> dict[str, Any]:
    numbers = {"total_loss": 1.0, "q_mean": 1.0, "mask_ratio": 1.0, "skipped": 0.0, "skipped_in_a_row": 0}
    return {name: jnp.asarray(value) for name, value in numbers.items()}


class _Collector:
    """Every choice is four steps."""

    begun = False

    def __init__(self, diary: _Diary):
        self._diary, self.seconds = diary, types.SimpleNamespace(simulator=0.0)

    def begin(self, act: Any) -> None:
        self.begun = True
        self._diary.note("choose")

    def finish(self) -> Collected:
        self.begun = False
        self._diary.note("act")
        return Collected([], 4, 0)

    def close(self) -> None:
        pass


@functools.cache
def story(config: TrainConfig, place: Place) -> tuple[Any, ...]:
    """The next events of a run that has come to ``place``, in an environment if the configuration names none.

    One preset is compared with many others, so its own are kept.
    """
    diary = _Diary()
    env = config.env or EnvConfig()
    config = dataclasses.replace(config, env=env, data=dataclasses.replace(config.data, batch_size=BATCH))
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), memory.batch_shapes(narrow(config), DIMS, (), BATCH))
    rollout = types.SimpleNamespace(success=False, returns=-1.0, length=3)

    def evaluate(agent: Any, transform: Any, environments: Any, seeds: Any, **options: Any) -> Any:
        diary.note("evaluate", seeds, options["mode"], options["execute_horizon"])
        return summarize([rollout] * len(seeds)), []

    loader = mock.Mock(batch=lambda draw, **kind: batch, stats=dict, contents=dict, cameras=())
    checkpoints = mock.Mock(
        save=lambda agent, **options: diary.note("save", agent.step, options["asset_id"]), keep=set()
    )
    progress = Progress(
        env_steps=place.env_steps,
        finished=["offline"] if place.online else [],
        evaluations_since_best=place.evaluations_since_best,
        best_success=0.9,
        best_step_success=0.9,
    )
    patches = (
        _patched(evaluations, evaluate=evaluate, save_rollouts=_nothing),
        _patched(saving, checksums=_nothing),
        _patched(loop, chunk_policy=_nothing),
    )
    with contextlib.ExitStack() as patched, tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        for patch in patches:
            patched.enter_context(patch)
        parts = RunParts(
            config,
            _Still(place.step, diary),
            progress,
            fresh_agent=_nothing,
            files=run_files(dataclasses.replace(config, run_dir=folder)),
            checkpoints=checkpoints,
            loader=loader,
            transform=None,
            norm_stats={},
            interaction=mock.Mock(collector=_Collector(diary)),
            eval_environments=mock.Mock(),
        )
        trainer = loop.ACRLPDTrainer(parts)
        log = trainer._log.write_training
        trainer._log.write_training = lambda *what: diary.note("log", trainer.state.step) or log(*what)
        trainer.train()
        diary.append("end")
    return tuple(diary)


def _nothing(*arguments: Any, **options: Any) -> None:
    return None


def places(*configs: TrainConfig) -> list[Place]:
    """Just before something should happen in one of the runs."""
    found: dict[Place, None] = {}
    for config in configs:
        frequencies = (config.log_frequency, config.save_frequency, config.eval.frequency)
        for step in (0, *(frequency - 2 for frequency in frequencies), config.offline_steps - 2):
            found[Place(max(0, min(step, config.offline_steps - 1)))] = None
        half = max(1, config.eval.frequency // 2)
        evaluation = -(-(config.offline_steps + 1) // half) * half - 1  # of the online phase, the first one
        for step in (config.offline_steps, config.offline_steps + config.online_transition_steps // 2, evaluation):
            env_steps = int(config.warmup_env_steps + (step - config.offline_steps) / config.utd_ratio)
            found[Place(step, env_steps, online=True)] = None
        found[Place(evaluation, env_steps, True, config.early_stopping_patience - 1)] = None
        last = config.online_steps - 2
        step = config.offline_steps + int((last - config.warmup_env_steps) * config.utd_ratio)
        if step >= config.offline_steps:
            found[Place(step, last, online=True)] = None
        found[Place(config.offline_steps, 0, online=True)] = None
    return list(found)


def _recorder(calls: list[Any], name: str = "", returns: Any = None) -> Any:
    """Remembers how it was called."""

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append((name or arguments, options))
        return returns

    return called


def _patched(module: Any, **values: Any) -> Any:
    return mock.patch.multiple(module, **values)


def _counting() -> Any:
    """Environments that cost nothing, in the place of simulators."""
    return _patched(registry, make=lambda config: SimulatedEnvironment(CountingSimulator(), config))


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Every field of a configuration by its dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{path}{field.name}.")
        else:
            found[f"{path}{field.name}"] = value
    return found


def differ(look: Any, one: TrainConfig, other: TrainConfig) -> bool:
    """Whether ``look`` tells two configurations apart."""
    if look is story:
        return any(story(one, place) != story(other, place) for place in places(one, other))
    return bool(_outcome(look, one) != _outcome(look, other))


@functools.cache
def _outcome(look: Any, config: TrainConfig) -> Any:
    return look(config)
