"""Finding and loading of trained agents: by the path of a run, of its checkpoints, or of one step."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig, from_stored
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Transform
from acrlpd.files import read_json
from acrlpd.training import overwriting
from acrlpd.training.build import Dims, abstract_agent, make_transform
from acrlpd.training.checkpoint import ACRLPDCheckpointManager, DamagedCheckpoint
from acrlpd.training.run import RunFiles

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained agent, with everything that its checkpoint says of how it acts."""

    agent: ACRLPDAgent
    config: TrainConfig
    stats: Mapping[str, NormStats]
    cameras: tuple[str, ...]  # those of the data
    step: int
    manager: ACRLPDCheckpointManager  # of the checkpoint's folder

    @property
    def dims(self) -> Dims:
        return Dims.of(self.stats)

    @functools.cached_property
    def transform(self) -> Transform:
        """The transform between the environment's observations and actions and the agent's."""
        return make_transform(self.config, self.stats, self.dims, self.cameras)

    def at(self, step: int) -> Trained:
        """Load the same agent at another step. Programs that were compiled for one step fit the other."""
        restored = self.manager.restore(self.agent, step)
        return dataclasses.replace(self, agent=restored.agent, step=restored.step)


def load_checkpoint(
    path: str | Path, *, extraction: str | None = None, guidance_weights: tuple[float, ...] | None = None
) -> Trained:
    """Return the agent of a checkpoint, sharded over devices as in training if their number allows it.

    ``path`` is a run (its best policy, or the newest if none was evaluated), its ``checkpoints`` folder (the newest),
    the folder of one step, or RUN/best. Loading runs no code that the checkpoint names, but a script that makes
    environments from its ``config`` runs the code that ``config.env.name`` names.

    ``extraction`` replaces the one that the agent was trained with. An agent that was trained with a user's extraction,
    which is code, acts only if that code or a built-in extraction is named here. ``guidance_weights`` replaces the
    weights of ``guided``.
    """
    loaded = load_stored(path, extraction, guidance_weights)
    env = loaded.config.env
    return loaded if env is None else dataclasses.replace(loaded, config=with_task(loaded.config, str(env.name)))


def load_stored(
    path: str | Path,
    extraction: str | None = None,
    guidance_weights: tuple[float, ...] | None = None,
    *,
    for_serving: bool = False,
) -> Trained:
    """Load as ``load_checkpoint``, for a command, which runs only code that its user names: see ``StoredName``.

    ``for_serving`` leaves out the optimiser state, twice the size of what it optimises, and puts the whole agent on
    every device.
    """
    trained = _read(Path(path), functools.partial(_load, for_serving=for_serving))
    if extraction is None and guidance_weights is None:
        return trained
    config = with_extraction(trained.config, extraction, guidance_weights)
    agent = trained.agent.with_extraction(extraction, guidance_weights)
    return dataclasses.replace(trained, agent=agent, config=config)


def _read(path: Path, read: Callable[[ACRLPDCheckpointManager, int], Trained]) -> Trained:
    """Read the checkpoint that ``path`` names: for a run its best one, for a folder of several the newest.

    If that one is damaged and ``path`` does not name it explicitly, log an error and read another one.
    """
    directory, step = locate_checkpoint(path)
    manager = ACRLPDCheckpointManager(directory)
    if step is not None:
        return read(manager, step)
    kept = kept_step(path)
    if kept is not None:
        try:
            return read(manager, kept)
        except DamagedCheckpoint as error:
            logger.error("%s. It is the best of %s: falling back to the newest.", error, path)
    return manager.newest(functools.partial(read, manager))


def _load(manager: ACRLPDCheckpointManager, step: int, *, for_serving: bool) -> Trained:
    run, stats = manager.read_run(step), manager.read_norm_stats(step)
    try:
        config = from_stored(run["config"])
    except ValueError as error:
        raise ValueError(f"checkpoint {manager.directory / str(step)}: {error}") from error
    if for_serving:
        config = dataclasses.replace(config, fsdp_devices=1)
    fits = jax.device_count() % config.fsdp_devices == 0
    cameras, here = tuple(run["cameras"]), config if fits else dataclasses.replace(config, fsdp_devices=1)
    shapes = abstract_agent(here, Dims.of(stats), cameras)
    if for_serving:
        shapes = dataclasses.replace(shapes, opt_state={})
    return Trained(shapes, config, stats, cameras, step, manager).at(step)


def locate_checkpoint(path: Path) -> tuple[Path, int | None]:
    """Return the checkpoints folder, and the step if ``path`` names one; ``<run>/best`` names the best evaluation's."""
    overwriting.tell_of_set_aside(path)
    best = RunFiles(path.parent).best
    if is_best(path):
        return RunFiles(path.parent).checkpoints, _best_step(best)
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} is not a folder. Name a run (runs/demo), or a step below its checkpoints.")
    if path.name.isdigit():
        return path.parent, int(path.name)
    return (path / "checkpoints", None) if (path / "checkpoints").is_dir() else (path, None)


def is_best(path: Path) -> bool:
    """Return whether ``path`` is ``<run>/best``, which names a run's best checkpoint but is not a folder."""
    return path.name == "best" and RunFiles(path.parent).best.is_file()


def kept_step(path: Path) -> int | None:
    """Return the step of the best policy of the run ``path``; None if no evaluation chose one, or it is gone.

    The best is chosen by the evaluations on the way, which use other seeds than the run's results.
    """
    if not (path / "checkpoints").is_dir() or not RunFiles(path).best.is_file():
        return None
    step = _best_step(RunFiles(path).best)
    return step if step in ACRLPDCheckpointManager(path / "checkpoints").steps() else None


def _best_step(file: Path) -> int:
    step = read_json(file, allow_nan=True).get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(
            f"{file}: expected the step of the best evaluation, found {step!r:.100}. Without this file, the newest "
            "checkpoint is taken"
        )
    return step


def with_task(config: TrainConfig, task: str) -> TrainConfig:
    """Return the configuration with another environment of the run's robot, whose instruction is its own.

    Passing the run's own environment name as plain text permits running the code that the checkpoint names.
    """
    if config.env is None:
        raise ValueError("this run has no environment: set env.name")
    instruction = config.env.instruction if task == config.env.name else None
    return dataclasses.replace(config, env=dataclasses.replace(config.env, name=task, instruction=instruction))


def with_extraction(
    config: TrainConfig, name: str | None, guidance_weights: tuple[float, ...] | None = None
) -> TrainConfig:
    """Return the configuration with another extraction. Passing its own as plain text permits running its code."""
    return dataclasses.replace(config, agent=config.agent.with_extraction(name, guidance_weights))
