"""Checkpoints: the policy as openpi writes it, everything else beside it, one atomic commit for all.

checkpoints/<step>/params/      the policy's parameters in openpi's layout; their moving average where there is one
                  /assets/<asset id>/norm_stats.json
                  /acrlpd/      critics, targets, temperature, student, optimisers, step; beside an average, its source
                  /run/         JSON: the configuration, counters of the run, library versions
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, UInt32

from acrlpd.agents.acrlpd import ACRLPDAgent
from acrlpd.data import normalize
from acrlpd.data.normalize import NormStats
from acrlpd.models.parameters import Params
from acrlpd.models.weights import quiet_orbax
from acrlpd.training.faults import RunFault
from acrlpd.training.metrics import write_json

logger = logging.getLogger(__name__)

SHOWN = 20  # arrays in a message
DAMAGED = "damaged"  # below the checkpoints: what could not be read when a run was resumed


class AssetsHandler(ocp.CheckpointHandler):
    """Normalization statistics in the file where openpi looks for them."""

    def save(self, directory: os.PathLike[str], args: AssetsSave) -> None:
        if jax.process_index() == 0:
            normalize.save(Path(directory) / args.asset_id / normalize.FILE_NAME, args.norm_stats)

    def restore(self, directory: os.PathLike[str], args: AssetsRestore | None = None) -> dict[str, NormStats]:
        return read_norm_stats(Path(directory))


@ocp.args.register_with_handler(AssetsHandler, for_save=True)
@dataclasses.dataclass
class AssetsSave(ocp.args.CheckpointArgs):
    asset_id: str
    norm_stats: Mapping[str, NormStats]


@ocp.args.register_with_handler(AssetsHandler, for_restore=True)
@dataclasses.dataclass
class AssetsRestore(ocp.args.CheckpointArgs):
    """Nothing to say: the statistics come as they are."""


def read_norm_stats(assets: Path, asset_id: str | None = None) -> dict[str, NormStats]:
    """The statistics of an asset id under an ``assets`` folder; None: of the only one there."""
    files = {file.parent.relative_to(assets).as_posix(): file for file in sorted(assets.rglob(normalize.FILE_NAME))}
    if not files:
        raise ValueError(f"{assets} holds no {normalize.FILE_NAME}: expected <asset id>/{normalize.FILE_NAME} there")
    if asset_id is None and len(files) > 1:
        raise ValueError(
            f"{assets} holds statistics of {len(files)} robots: name one (--asset_id) of {', '.join(files)}"
        )
    if asset_id is not None and asset_id not in files:
        raise ValueError(f"{assets} holds no statistics of asset id {asset_id!r}; there are {', '.join(files)}")
    return normalize.load(next(iter(files.values())) if asset_id is None else files[asset_id])


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint's content: the agent, the statistics it was trained with, and the JSON beside them."""

    agent: ACRLPDAgent
    norm_stats: dict[str, NormStats]
    run: dict[str, Any]
    step: int


class DamagedCheckpoint(ValueError):  # noqa: N818 (an error all the same)
    """A checkpoint's files are missing, cut short, or hold other numbers than were saved."""


@dataclasses.dataclass(frozen=True)
class _Named(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps of a set that may grow and shrink meanwhile."""

    steps: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


class ACRLPDCheckpointManager:
    """Asynchronous saves. The newest few are kept, one every ``keep_period`` steps, and those in the set ``keep``.

    ``writer``: of the process that trains; what a killed one left half written is removed, which a reader must not do.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int = 2,
        keep_period: int | None = None,
        keep: Collection[int] = (),
        writer: bool = False,
    ):
        if writer:
            quiet_orbax()
        self.directory = Path(directory).absolute()
        self._always = frozenset(keep)
        self.keep = set(keep)
        policies = [ocp.checkpoint_managers.LatestN(max_to_keep), _Named(self.keep)]
        if keep_period is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_period))
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)  # floats hardly shrink, and updates want the cores
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "params": arrays,
                "acrlpd": arrays,
                "assets": AssetsHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                create=True,
                cleanup_tmp_directories=writer,
            ),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, agent: ACRLPDAgent, *, asset_id: str, norm_stats: Mapping[str, NormStats], run: Mapping[str, Any]
    ) -> int:
        """Starts a save under the agent's step and returns that step. An existing one is left as it is.

        Raises:
            RunFault: this save or the one before could not be written; complete checkpoints are as they were.
        """
        step = int(agent.step)
        if step in self._manager.all_steps():
            return step
        policy, rest = _split(agent)
        sums = {**checksums(agent), "norm_stats": text_checksum(norm_stats)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave({"params": policy}),
                    acrlpd=ocp.args.PyTreeSave(rest),
                    assets=AssetsSave(asset_id, norm_stats),
                    run=ocp.args.JsonSave({**run, "versions": versions(), "checksums": sums}),
                ),
            )
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error
        return step

    def replace_run(self, step: int, run: Mapping[str, Any]) -> None:
        """Other JSON beside the arrays of a checkpoint, all at once; waits until that lies on disk."""
        self.wait()
        if jax.process_index() == 0:
            kept = {name: value for name, value in self.read_run(step).items() if name in ("versions", "checksums")}
            write_json(self.directory / str(step) / "run" / "metadata", {**run, **kept})

    def restore_newest(self, template: ACRLPDAgent, *, before: int | None = None) -> Restored:
        """The newest checkpoint that is whole, not later than ``before``. Damaged ones are moved away, loudly."""
        for step in reversed(self.steps()):
            if before is not None and step > before:
                continue
            try:
                return self.restore(template, step)
            except DamagedCheckpoint as error:
                logger.error("%s. Falling back to the checkpoint before it.", error)
                self._set_aside(step)
        damaged = f" Those set aside lie in {self.directory / DAMAGED}." if self.damaged() else ""
        raise ValueError(
            f"{self.directory} holds no checkpoint that can be read.{damaged} Train first, or name another folder."
        )

    def damaged(self) -> list[str]:
        """Names of the checkpoints that were set aside."""
        folder = self.directory / DAMAGED
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def restore(self, template: ACRLPDAgent, step: int | None = None) -> Restored:
        """The checkpoint of ``step`` (the newest by default) in the template's shapes and shardings.

        A template without optimiser state is an agent that only acts: the checkpoint's, its larger part, is not read,
        and the checksum of the policy alone is compared.

        Raises:
            DamagedCheckpoint: it cannot be read, or its numbers are not those that were saved.
            ValueError: it is whole, but of an agent of another structure.
        """
        step = self._resolve(step)
        policy, rest = (jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) for tree in _split(template))
        run = self.read_run(step)
        acts_only = not template.opt_state
        self._check_structure(
            step, {"params": {"params": policy}, "acrlpd": rest}, unread="/opt_state/" if acts_only else ""
        )
        found = self._read(
            step,
            ocp.args.Composite(
                params=_restore_args({"params": policy}),
                acrlpd=_restore_args(rest, partial_restore=acts_only),
                assets=AssetsRestore(),
            ),
        )
        policy, rest = found.params["params"], found.acrlpd
        sums = {"params": checksum(policy)} | ({} if acts_only else {"acrlpd": checksum(rest)})
        if "norm_stats" in run["checksums"]:  # a checkpoint of an older version has none of it
            sums["norm_stats"] = text_checksum(found.assets)
        if any(run["checksums"][item] != found_sum for item, found_sum in sums.items()):
            raise DamagedCheckpoint(
                f"checkpoint {self.directory / str(step)} is damaged: its checksums are {sums}, "
                f"those of what was saved {run['checksums']}"
            )
        return Restored(_join(template, policy, rest), found.assets, run, step)

    def release(self, step: int | None) -> None:
        """No longer kept, but for those that were named at the start."""
        if step is not None and step not in self._always:
            self.keep.discard(step)

    def discard_after(self, step: int) -> None:
        """Deletes later checkpoints: the run goes another way from here."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def read_run(self, step: int | None = None) -> dict[str, Any]:
        """The JSON of a checkpoint: its configuration and counters."""
        return self._read(self._resolve(step), ocp.args.Composite(run=ocp.args.JsonRestore())).run

    def read_norm_stats(self, step: int | None = None) -> dict[str, NormStats]:
        return self._read(self._resolve(step), ocp.args.Composite(assets=AssetsRestore())).assets

    def wait(self) -> None:
        """Until all started saves lie on disk."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        self._manager.close()

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError, TypeError) as error:  # as many kinds as there are files to damage
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedCheckpoint(f"checkpoint {self.directory / str(step)} is damaged: {reason}") from error

    def _check_structure(self, step: int, expected: dict[str, Any], *, unread: str) -> None:
        """Raises ValueError where a whole checkpoint is one of another agent, but for what is not read of it."""
        for item, tree in expected.items():
            try:
                stored = _shapes(ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / item).tree)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DamagedCheckpoint(
                    f"checkpoint {self.directory / str(step)} is damaged: {item} has no readable metadata"
                ) from error
            wanted = _shapes(tree)
            different = [
                f"{item}{path}: stored {stored.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
                for path in sorted(stored.keys() | wanted.keys())
                if stored.get(path) != wanted.get(path) and not (unread and path.startswith(unread))
            ]
            if different:
                raise ValueError(
                    f"{self.directory / str(step)} does not fit this configuration; {len(different)} arrays differ:\n  "
                    + "\n  ".join(different[:SHOWN])
                    + "\nResume with the configuration the run was started with."
                )

    def _set_aside(self, step: int) -> None:
        folder = self.directory / DAMAGED
        folder.mkdir(exist_ok=True)
        names = (folder / (f"{step}" if count == 0 else f"{step}-{count}") for count in range(10**6))
        os.replace(self.directory / str(step), next(path for path in names if not path.exists()))
        self._manager.reload()

    def _not_written(self, error: Exception) -> RunFault:
        steps = [step for step in self.steps() if (self.directory / str(step)).is_dir()]
        left = f"the last complete one is {self.directory / str(steps[-1])}" if steps else "there is none yet"
        return RunFault(
            f"a checkpoint could not be written to {self.directory}: {str(error).splitlines()[0]}. Checkpoints before "
            f"it are intact; {left}. Make room (each needs its whole size beside the old ones), then use --resume."
        )

    def _resolve(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.directory} holds no checkpoint. Train first, or name another folder.")
        if step is not None and step not in steps:
            raise ValueError(f"{self.directory} holds no checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step


@functools.cache  # a look at each package's files, while no update can run
def versions() -> dict[str, str]:
    """Of the libraries whose change can change numbers."""
    return {name: importlib.metadata.version(name) for name in ("acrlpd", "jax", "jaxlib", "flax", "optax", "numpy")}


def checksums(agent: ACRLPDAgent) -> dict[str, int]:
    """Of the two parts of a checkpoint that hold arrays. The first call for an agent of its shapes compiles."""
    policy, rest = _split(agent)
    return {"params": checksum(policy), "acrlpd": checksum(rest)}


def text_checksum(norm_stats: Mapping[str, NormStats]) -> int:
    """Of the statistics as they are written down, in which every number keeps its value."""
    return zlib.crc32(json.dumps(normalize.to_dict(norm_stats), sort_keys=True).encode())


def checksum(tree: Any) -> int:
    """Sum of all bits as unsigned integers: the same however the arrays are spread over devices."""
    return int(_bit_sum(jax.tree.leaves(tree)))


@jax.jit
def _bit_sum(leaves: list[Array]) -> UInt32[Array, ""]:
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    total = jnp.uint32(0)
    for x in leaves:
        bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize])
        total += jnp.sum(bits, dtype=jnp.uint32)
    return total


def _restore_args(tree: Any, *, partial_restore: bool = False) -> Any:
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=partial_restore)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array by its path, whatever kinds of containers hold it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"".join(f"/{_key(key)}" for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _key(key: Any) -> Any:
    """A key of a path; dataclasses and tuples are stored as dictionaries."""
    return next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))


def _split(agent: ACRLPDAgent) -> tuple[Params, dict[str, Any]]:
    """The whole policy that acts (trainable and frozen) as openpi stores it, and everything else."""
    policy = agent.acting_policy
    averages = {group: value for group, value in agent.ema.items() if group != "policy"}
    rest: dict[str, Any] = {
        "params": {group: value for group, value in agent.params.items() if group != "policy" or agent.ema},
        "target_critic": agent.target_critic,
        "health": agent.health,
        "step": agent.step,
    }
    rest |= {"opt_state": agent.opt_state} if agent.opt_state else {}
    return jax.tree.map(lambda array: {"value": array}, policy), rest | ({"ema": averages} if averages else {})


def _join(template: ACRLPDAgent, policy: Params, rest: Mapping[str, Any]) -> ACRLPDAgent:
    arrays = {path[:-1]: array for path, array in flatten_dict(policy).items()}  # without "value"
    trainable = set(flatten_dict(template.params["policy"]))
    acting = {"policy": unflatten_dict({path: array for path, array in arrays.items() if path in trainable})}
    return dataclasses.replace(
        template,
        params=acting | rest["params"],  # beside an average lies its source
        frozen=unflatten_dict({path: array for path, array in arrays.items() if path not in trainable}),
        target_critic=rest["target_critic"],
        opt_state=rest["opt_state"] if template.opt_state else {},
        health=rest["health"],
        ema=acting | rest.get("ema", {}) if template.ema else {},
        step=rest["step"],
    )
