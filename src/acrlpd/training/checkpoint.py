"""Checkpoints: the policy as openpi writes it, everything else beside it, one atomic commit for all.

checkpoints/<step>/params/      the policy's parameters in openpi's layout; their moving average if there is one
                  /assets/<asset id>/norm_stats.json
                  /acrlpd/      critics, V, targets, mean |Q|, temperature, student, optimisers, step; averages' sources
                  /run/         JSON: the configuration, counters of the run, library versions, checksums of all this
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.data.view import normalize
from acrlpd.data.view.normalize import NormStats
from acrlpd.files import read_json
from acrlpd.models.parameters import Params
from acrlpd.models.weights import quiet_orbax
from acrlpd.training import checksum
from acrlpd.training.faults import RunFault
from acrlpd.training.linking import LinkHandler, LinkSave
from acrlpd.training.metrics import write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
FORMAT_VERSION = 1  # of the JSON beside the arrays; JSON that names no version is of version 0
WRITTEN_HERE = ("step", "versions", "structure", "checksums", "format_version")  # the rest comes from the run
SHOWN = 20  # arrays in a message
DAMAGED = "damaged"  # folder for checkpoints that could not be read when a run was resumed


class AssetsHandler(ocp.CheckpointHandler):
    """Orbax's handler for normalization statistics: it writes the file where openpi looks for them."""

    def save(self, directory: os.PathLike[str], args: AssetsSave) -> None:
        if jax.process_index() == 0:
            normalize.save(Path(directory) / args.asset_id / normalize.FILE_NAME, args.norm_stats)

    def restore(self, directory: os.PathLike[str], args: Any = None) -> None:
        raise NotImplementedError("assets are read as files")


@ocp.args.register_with_handler(AssetsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class AssetsSave(ocp.args.CheckpointArgs):
    asset_id: str
    norm_stats: Mapping[str, NormStats]


def read_norm_stats(assets: Path, asset_id: str | None = None) -> dict[str, NormStats]:
    """Read the statistics of an asset id under an ``assets`` folder; None: of the only one there."""
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
    """A checkpoint's files are missing, cut short, or hold something other than what was saved."""


class LaterVersion(ValueError):  # noqa: N818 (an error all the same)
    """An intact checkpoint that a later version of this project has written."""


@dataclasses.dataclass(frozen=True)
class _Named(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's policy that keeps the steps of a set, which may grow and shrink meanwhile."""

    steps: set[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


class ACRLPDCheckpointManager:
    """Manager of asynchronous saves. It keeps the newest few, one every ``keep_period`` steps, and the set ``keep``.

    ``writer``: the process trains; it removes what a killed process left half written, which a reader must not do.
    ``params``: the Orbax folder of a policy that never changes, which is linked instead of written; see ``linking``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int = 2,
        keep_period: int | None = None,
        keep: Collection[int] = (),
        writer: bool = False,
        params: Path | None = None,
    ):
        quiet_orbax()
        self.directory = Path(directory).absolute()
        self._is_writer = writer
        self._always = frozenset(keep)
        self.keep = set(keep)
        self._policies = [ocp.checkpoint_managers.LatestN(max_to_keep), _Named(self.keep)]
        if keep_period is not None:
            self._policies.append(ocp.checkpoint_managers.EveryNSteps(keep_period))
        self._arrays = ocp.PyTreeCheckpointHandler(
            use_compression=False
        )  # floats hardly compress, and updates need the cores
        self._params = params
        if writer:
            self._manager.reload()  # creates it, which removes what a killed process left half written

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's own manager, which writes. Reading goes file by file without it, whatever happened to other files."""
        return ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "params": self._arrays if self._params is None else LinkHandler(),
                "acrlpd": self._arrays,
                "assets": AssetsHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(self._policies),
                create=True,
                cleanup_tmp_directories=self._is_writer,
            ),
        )

    @property
    def _begun(self) -> list[int]:
        """The steps that Orbax knows, including those that are still being written."""
        return list(self._manager.all_steps()) if "_manager" in vars(self) else []

    def steps(self) -> list[int]:
        """Return every step that has a folder, whole or not, and those whose save has begun."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        return sorted({*self._begun, *(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))})

    def save(
        self, agent: ACRLPDAgent, *, asset_id: str, norm_stats: Mapping[str, NormStats], run: Mapping[str, Any]
    ) -> int:
        """Start a save under the agent's step and return that step. An existing checkpoint is left as it is.

        Raises:
            RunFault: this save or the one before could not be written; complete checkpoints are unchanged.
        """
        step = int(agent.step)
        if step in self._manager.all_steps():
            return step
        policy, rest = _split(agent)
        kept = {
            "step": step,
            "versions": versions(),
            "structure": _structure({"params": {"params": policy}, "acrlpd": rest}),
            "checksums": {**checksums(agent), "norm_stats": checksum.of_norm_stats(norm_stats)},
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=LinkSave(self._params) if self._params else ocp.args.PyTreeSave({"params": policy}),
                    acrlpd=ocp.args.PyTreeSave(rest),
                    assets=AssetsSave(asset_id, norm_stats),
                    run=ocp.args.JsonSave(_sealed({**run, **kept})),
                ),
            )
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error
        return step

    def replace_run(self, step: int, run: Mapping[str, Any]) -> None:
        """Replace the JSON beside the arrays of a checkpoint atomically, and wait until it is on disk."""
        self.wait()
        if jax.process_index() == 0:
            kept = {name: value for name, value in self.read_run(step).items() if name in WRITTEN_HERE}
            content = {**run, **kept}
            write_json(self._run_file(step), _sealed(content) if "format_version" in kept else content)

    def restore_newest(self, template: ACRLPDAgent, *, before: int | None = None) -> Restored:
        """Restore the newest intact checkpoint, not later than ``before``. Damaged ones are logged and moved away."""
        return self.newest(functools.partial(self.restore, template), before=before)

    def newest(self, read: Callable[[int], T], *, after: int = -1, before: int | None = None) -> T:
        """Return what ``read`` finds in the newest checkpoint, or if that is damaged, in the one before it.

        Steps are later than ``after`` and not later than ``before``. Each damaged one is logged; the process that
        trains also moves it away.

        Raises:
            ValueError: no checkpoint can be read.
            LaterVersion: the newest was written by a later version; nothing was changed.
        """
        told = ""
        for step in reversed(self.steps()):
            if step <= after or (before is not None and step > before):
                continue
            try:
                return read(step)
            except DamagedCheckpoint as error:
                logger.error("%s. Falling back to the checkpoint before it.", error)
                told = told or f" The newest: {error}"
                if self._is_writer:
                    self._set_aside(step)
        if not told:
            raise ValueError(f"{self.directory} holds no checkpoint. Train first, or name another folder.")
        damaged = f" Those set aside lie in {self.directory / DAMAGED}." if self.damaged() else ""
        raise ValueError(
            f"{self.directory} holds no checkpoint that can be read.{damaged} Bring one back, or name another folder."
            + told
        )

    def damaged(self) -> list[str]:
        """Return the names of the checkpoints that were set aside."""
        folder = self.directory / DAMAGED
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def restore(self, template: ACRLPDAgent, step: int | None = None) -> Restored:
        """Restore the checkpoint of ``step`` (the newest by default) in the template's shapes and shardings.

        A template without optimiser state is an agent that only acts: the checkpoint's optimiser state, its larger
        part, is not read, and only checksums of what is read are compared.

        Raises:
            DamagedCheckpoint: it cannot be read, or its numbers are not those that were saved.
            ValueError: it is intact, but its agent has another structure.
        """
        step = self._resolve(step)
        run = self.read_run(step)
        known = self._stored_paths(step, "acrlpd")
        averages_critics = "critic" in template.ema
        if averages_critics and not any(path.startswith("/ema/critic/") for path in known):
            # earlier versions averaged the policy alone
            template = dataclasses.replace(template, ema={k: v for k, v in template.ema.items() if k != "critic"})
        policy, rest = (jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) for tree in _split(template))
        if "/q_scale" not in known:  # earlier versions kept no mean of |Q|
            del rest["q_scale"]
        acts_only = not template.opt_state
        expected = {"params": {"params": policy}, "acrlpd": rest}
        self._check_structure(step, expected, run.get("structure"), unread="/opt_state/" if acts_only else "")
        policy = self._read(step, "params", expected["params"])["params"]
        rest = self._read(step, "acrlpd", rest, partial_restore=acts_only)
        found = _sums_found(run, policy, rest)
        different = [name for name, value in found.items() if run["checksums"].get(name) != value]
        if different:
            raise self._damaged(step, f"the checksum of {', '.join(different)} is not that of what was saved")
        agent = _join(template, policy, rest)
        if averages_critics and "critic" not in agent.ema:
            agent = dataclasses.replace(agent, ema=agent.ema | {"critic": jax.tree.map(jnp.copy, agent.target_critic)})
        return Restored(agent, self.read_norm_stats(step), run, step)

    def _stored_paths(self, step: int, item: str) -> Collection[str]:
        with self._naming(step, folder := self.directory / str(step) / item):
            return _shapes(self._arrays.metadata(folder).tree).keys()

    def release(self, step: int | None) -> None:
        """Stop keeping ``step``, unless it was named at the start."""
        if step is not None and step not in self._always:
            self.keep.discard(step)

    def discard_after(self, step: int) -> None:
        """Delete later checkpoints: the run takes another way from here."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def read_run(self, step: int | None = None) -> dict[str, Any]:
        """Return the JSON of a checkpoint: its configuration and counters.

        Raises:
            DamagedCheckpoint: it cannot be read, or is not what was saved.
            LaterVersion: it is intact, but in a format that this version does not know.
        """
        step = self._resolve(step)
        file = self._run_file(step)
        with self._naming(step, file):
            run = read_json(file, allow_nan=True)
        version, is_whole = run.get("format_version", 0), _sealed(run) == run
        if type(version) is int and version > FORMAT_VERSION:
            told = (
                f"{file}: written by a later version of acrlpd (format {version}; this one reads up to "
                f"{FORMAT_VERSION}): upgrade"
            )
            raise LaterVersion(told) if is_whole else self._damaged(step, f"{told}; or its numbers have changed")
        if "format_version" in run and not is_whole:
            raise self._damaged(step, f"{file} has changed since it was saved (checksum mismatch)")
        if run.get("step", step) != step:
            raise self._damaged(step, f"{file} belongs to step {run['step']}")
        if "format_version" not in run and not _is_of_format_0(run):
            raise self._damaged(step, f"{file} lacks what every checkpoint has")
        return run

    def read_norm_stats(self, step: int | None = None) -> dict[str, NormStats]:
        step = self._resolve(step)
        assets = self.directory / str(step) / "assets"
        with self._naming(step, assets):
            found = read_norm_stats(assets)
        saved = self.read_run(step)["checksums"].get("norm_stats")  # the first versions saved none
        if saved is not None and saved != checksum.of_norm_stats(found):
            raise self._damaged(step, f"{assets}: the statistics are not those that were saved")
        return found

    def wait(self) -> None:
        """Wait until all started saves are on disk."""
        if "_manager" not in vars(self):
            return
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        if "_manager" in vars(self):
            self._manager.close()

    def _run_file(self, step: int) -> Path:
        return self.directory / str(step) / "run" / "metadata"

    def _read(self, step: int, item: str, tree: Any, *, partial_restore: bool = False) -> Any:
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=partial_restore)
        with self._naming(step, folder := self.directory / str(step) / item):
            return self._arrays.restore(folder, args=args)

    def _damaged(self, step: int, reason: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.directory / str(step)} is damaged: {reason}")

    @contextlib.contextmanager
    def _naming(self, step: int, path: Path) -> Iterator[None]:
        """Report any error of the block, which reads ``path``, as damage of its checkpoint.

        Errors of this machine (its memory, its user's rights) are raised as they are.
        """
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError, PermissionError):
            raise
        except Exception as error:  # each kind of file has its own errors; some of Orbax's have no class
            reason = next(iter(str(error).splitlines()), type(error).__name__).partition(" [tensorstore_spec=")[0]
            told = reason if str(path) in reason else f"{path}: {reason}"
            raise self._damaged(step, told) from error

    def _check_structure(self, step: int, expected: dict[str, Any], saved: int | None, *, unread: str) -> None:
        """Raise if the stored arrays are not those that were saved, or not those of this agent.

        ``unread``: the part that is not read, which may differ from the agent's.
        """
        stored: dict[str, tuple[int, ...]] = {}
        for item in expected:
            with self._naming(step, folder := self.directory / str(step) / item):
                stored |= _shapes({item: self._arrays.metadata(folder).tree})
        if saved is not None and checksum.of_text(stored) != saved:
            raise self._damaged(step, "its arrays have other names or shapes than those that were saved")
        wanted = _shapes(expected)
        different = [
            f"{path.removeprefix('/')}: stored {stored.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(stored.keys() | wanted.keys())
            if stored.get(path) != wanted.get(path) and not (unread and path.startswith(f"/acrlpd{unread}"))
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


@functools.cache  # it looks at each package's files, and no update can run meanwhile
def versions() -> dict[str, str]:
    """Return the versions of the libraries whose changes can change results."""
    return {name: importlib.metadata.version(name) for name in ("acrlpd", "jax", "jaxlib", "flax", "optax", "numpy")}


def checksums(agent: ACRLPDAgent) -> dict[str, int]:
    """Return a checksum for each part of a checkpoint that holds arrays. The first call for new shapes compiles."""
    policy, rest = _split(agent)
    return checksum.of_arrays(_groups(policy, rest))


def _groups(policy: Params, rest: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": policy, **{f"acrlpd/{name}": part for name, part in rest.items()}}


def _sums_found(run: Mapping[str, Any], policy: Params, rest: Mapping[str, Any]) -> dict[str, int]:
    """Return the checksums of the arrays that were read, computed as the version that wrote them did."""
    if "format_version" in run:
        return checksum.of_arrays(_groups(policy, rest))
    sums = {"params": checksum.of_format_0(policy)}
    return sums | ({"acrlpd": checksum.of_format_0(rest)} if "opt_state" in rest else {})  # opt_state is in that sum


def _sealed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON with its format version, if it has none yet, and the checksum of everything else in it."""
    content = {"format_version": FORMAT_VERSION, **run}
    content.pop("checksum", None)
    return {**content, "checksum": checksum.of_text(content)}


def _is_of_format_0(run: Mapping[str, Any]) -> bool:
    sums = run.get("checksums")
    has_sums = isinstance(sums, dict) and {"params", "acrlpd"} <= sums.keys()
    kinds = {"config": dict, "progress": dict, "cameras": list}
    return has_sums and all(isinstance(run.get(name, kind()), kind) for name, kind in kinds.items())


def _structure(items: Mapping[str, Any]) -> int:
    return checksum.of_text(_shapes(items))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in checksum.paths(tree).items()}


def _split(agent: ACRLPDAgent) -> tuple[Params, dict[str, Any]]:
    """Return the whole policy that acts (trainable and frozen) as openpi stores it, and everything else."""
    policy = agent.acting_policy
    averages = {group: value for group, value in agent.ema.items() if group != "policy"}
    rest: dict[str, Any] = {
        "params": {group: value for group, value in agent.params.items() if group != "policy" or agent.ema},
        "target_critic": agent.target_critic,
        "health": agent.health,
        "step": agent.step,
        "q_scale": agent.q_scale,
    }
    rest |= {"opt_state": agent.opt_state} if agent.opt_state else {}
    return jax.tree.map(lambda array: {"value": array}, policy), rest | ({"ema": averages} if averages else {})


def _join(template: ACRLPDAgent, policy: Params, rest: Mapping[str, Any]) -> ACRLPDAgent:
    arrays = {path[:-1]: array for path, array in flatten_dict(policy).items()}  # without "value"
    trainable = set(flatten_dict(template.params["policy"]))
    acting = {"policy": unflatten_dict({path: array for path, array in arrays.items() if path in trainable})}
    return dataclasses.replace(
        template,
        params=acting | rest["params"],  # beside an average, use its source
        frozen=unflatten_dict({path: array for path, array in arrays.items() if path not in trainable}),
        target_critic=rest["target_critic"],
        opt_state=rest["opt_state"] if template.opt_state else {},
        health=rest["health"],
        ema=acting | rest.get("ema", {}) if template.ema else {},
        step=rest["step"],
        q_scale=rest.get("q_scale", jnp.zeros(())),  # 0: not known
    )
