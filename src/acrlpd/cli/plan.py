"""``acrlpd plan PRESET [--devices 8 --device_memory 80GB]``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import tyro

from acrlpd.cli.configured import parse, starting_point, warn_of_the_unusual
from acrlpd.config import TrainConfig
from acrlpd.training import memory

EXIT_DOES_NOT_FIT = 1


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """Compute parameters, memory of each device and size of a checkpoint before a run; nothing is allocated."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    devices: int = 1  # number of devices of the machine that the run is for
    device_memory: str | None = None  # memory of one device, such as 80GB; None: only print the sizes
    fsdp: int | None = None  # number of devices that share large arrays; None: as --fsdp_devices
    json: bool = False


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print("usage: acrlpd plan PRESET|FILE.yaml [--devices 8 --device_memory 80GB --fsdp 4] [--field value ...]")
        return 0 if argv else 2
    config, flags = starting_point(argv[0], argv[1:])
    arguments = parse(PlanArguments, PlanArguments(config), flags, f"acrlpd plan {argv[0]}")
    config = arguments.config
    if arguments.fsdp is not None:
        config = dataclasses.replace(config, fsdp_devices=arguments.fsdp)
    warn_of_the_unusual(config)
    limit = None if arguments.device_memory is None else memory.parse_bytes(arguments.device_memory)
    found = memory.plan(config, memory.Machine(arguments.devices, limit))
    changes = memory.advice(config, found)
    if arguments.json:
        print(json.dumps(found.to_dict() | {"advice": changes}))
    else:
        print("\n".join(_table(found, config)))
        print("\n".join(["it does not fit; try one of", *(f"  {line}" for line in changes)]) if changes else "it fits")
    return 0 if found.fits else EXIT_DOES_NOT_FIT


def _table(found: memory.Plan, config: TrainConfig) -> list[str]:
    machine = found.machine
    rows = {
        "parameters": found.parameter_bytes,
        "optimiser": found.optimizer_bytes,
        "batch": found.batch_bytes,
        "gradients": found.gradient_bytes,
        "activations": found.activation_bytes,
        "together": found.total_bytes,
    }
    limit = "" if machine.device_memory is None else f" of {machine.device_memory / 1e9:.1f} GB"
    candidates = config.agent.candidates_in_target or "no"
    return [
        f"policy        {found.parameters:,} parameters, {found.trainable:,} of them trainable",
        f"critics       {found.critic_parameters:,} parameters",
        f"on each of {machine.devices} devices ({config.fsdp_devices} share the parameters), "
        f"{found.local_batch} of {config.data.batch_size} chunks, {candidates} candidates each:",
        *(f"  {name:<12}{size / 1e9:>10.3f} GB{limit if name == 'together' else ''}" for name, size in rows.items()),
        f"checkpoint    {found.checkpoint_bytes / 1e9:.3f} GB on disk",
    ]
