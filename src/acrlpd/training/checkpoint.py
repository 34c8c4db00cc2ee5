"""Checkpoints: the policy as openpi writes it, everything else beside it, one atomic commit for all.

checkpoints/<step>/params/      the policy's parameters in openpi's layout
                  /assets/<asset id>/norm_stats.json
                  /acrlpd/      critics, targets, temperature, student, optimisers, step
                  /run/         JSON: the configuration, counters of the run, library versions
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from acrlpd.agents.acrlpd import ACRLPDAgent
from acrlpd.data import normalize
from acrlpd.data.normalize import NormStats

DIRECTORY = "checkpoints"


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


def read_norm_stats(assets: Path) -> dict[str, NormStats]:
    """The statistics under an ``assets`` folder, whatever their asset id."""
    files = sorted(assets.rglob(normalize.FILE_NAME))
    if len(files) != 1:
        raise ValueError(f"{assets} should hold exactly one {normalize.FILE_NAME}, found {len(files)}: {files}")
    return normalize.load(files[0])


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint's content: the agent, and the JSON beside it."""

    agent: ACRLPDAgent
    run: dict[str, Any]
    step: int


class ACRLPDCheckpointManager:
    """Asynchronous saves, the newest few kept, and those whose step is named in ``keep`` for ever."""

    def __init__(self, directory: str | os.PathLike[str], *, max_to_keep: int = 2, keep: Collection[int] = ()):
        self.directory = Path(directory).absolute()
        policies = ocp.checkpoint_managers.AnyPreservationPolicy(
            [
                ocp.checkpoint_managers.LatestN(max_to_keep),
                ocp.checkpoint_managers.CustomSteps(list(keep)),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=policies, create=True),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, agent: ACRLPDAgent, *, asset_id: str, norm_stats: Mapping[str, NormStats], run: Mapping[str, Any]
    ) -> int:
        """Starts a save under the agent's step and returns that step. An existing one is left as it is."""
        step = int(agent.step)
        if step in self._manager.all_steps():
            return step
        policy, rest = _split(agent)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave({"params": policy}),
                acrlpd=ocp.args.PyTreeSave(rest),
                assets=AssetsSave(asset_id, norm_stats),
                run=ocp.args.JsonSave({**run, "versions": versions()}),
            ),
        )
        return step

    def restore(self, template: ACRLPDAgent, step: int | None = None) -> Restored:
        """The checkpoint of ``step`` (the newest by default) in the template's shapes and shardings."""
        step = self._resolve(step)
        policy, rest = (jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) for tree in _split(template))
        params = {"params": policy}
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeRestore(
                        params, restore_args=ocp.checkpoint_utils.construct_restore_args(params)
                    ),
                    acrlpd=ocp.args.PyTreeRestore(rest, restore_args=ocp.checkpoint_utils.construct_restore_args(rest)),
                    run=ocp.args.JsonRestore(),
                ),
            )
        except ValueError as error:
            raise ValueError(
                f"{self.directory / str(step)} does not fit this configuration: {error}\n"
                "Resume with the configuration the run was started with."
            ) from error
        return Restored(_join(template, found.params["params"], found.acrlpd), found.run, step)

    def read_run(self, step: int | None = None) -> dict[str, Any]:
        """The JSON of a checkpoint: its configuration and counters."""
        step = self._resolve(step)
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run

    def read_norm_stats(self, step: int | None = None) -> dict[str, NormStats]:
        step = self._resolve(step)
        return self._manager.restore(step, args=ocp.args.Composite(assets=AssetsRestore())).assets

    def wait(self) -> None:
        """Until all started saves lie on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _resolve(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.directory} holds no checkpoint. Train first, or name another folder.")
        if step is not None and step not in steps:
            raise ValueError(f"{self.directory} holds no checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step


def versions() -> dict[str, str]:
    """Of the libraries whose change can change numbers."""
    return {name: importlib.metadata.version(name) for name in ("acrlpd", "jax", "jaxlib", "flax", "optax", "numpy")}


def _split(agent: ACRLPDAgent) -> tuple[nnx.State, dict[str, Any]]:
    """The whole policy (trainable and frozen), and everything else."""
    policy = nnx.merge_state(agent.params["policy"], agent.frozen)
    rest = {
        "params": {group: value for group, value in agent.params.items() if group != "policy"},
        "target_critic": agent.target_critic,
        "opt_state": agent.opt_state,
        "step": agent.step,
    }
    return policy, rest


def _join(template: ACRLPDAgent, policy: nnx.State, rest: Mapping[str, Any]) -> ACRLPDAgent:
    flat = nnx.to_flat_state(policy)
    trainable = {path for path, _ in nnx.to_flat_state(template.params["policy"])}
    return dataclasses.replace(
        template,
        params={"policy": _pick(flat, lambda path: path in trainable), **rest["params"]},
        frozen=_pick(flat, lambda path: path not in trainable),
        target_critic=rest["target_critic"],
        opt_state=rest["opt_state"],
        step=rest["step"],
    )


def _pick(flat: Any, keep: Any) -> nnx.State:
    return nnx.from_flat_state([(path, value) for path, value in flat if keep(path)])
