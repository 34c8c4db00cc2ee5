"""The memory and disk space that a run will need, computed from shapes and the compiled program alone.

Nothing is allocated: the agent and its batch are traced, and the update is compiled for one device's share of a batch.
What the program keeps beside its arguments (activations, gradients) is the compiler's own count.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.stages import Lowered

from acrlpd import fields
from acrlpd.agents import agent as agent_module
from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.agents.state import CRITIC_GROUPS
from acrlpd.config import TrainConfig
from acrlpd.envs.registry import make_vector
from acrlpd.fields import PositiveInt
from acrlpd.models.pi0 import CAMERAS
from acrlpd.training.build import Dims, create_agent, model_cameras
from acrlpd.training.sharding import BATCH_AXIS, FSDP_AXIS, parameter_sharding
from acrlpd.types import ChunkBatch, Observation

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8}
QUICKLY: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}  # compile quickly: the program is never run
SLACK = 0.05  # share of a device's memory that the runtime keeps for itself


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a run should fit on. ``device_memory`` is in bytes; None: unknown, so everything fits."""

    devices: PositiveInt = 1
    device_memory: int | None = None

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run; bytes are those on one device unless stated otherwise."""

    parameters: int  # number of parameters of the policy
    trainable: int  # those of them that training changes
    critic_parameters: int  # with those of V, if there is one
    parameter_bytes: int  # policy, critics, targets, temperature
    optimizer_bytes: int
    batch_bytes: int
    gradient_bytes: int
    activation_bytes: int  # kept by the compiled update beside its arguments and the gradients
    checkpoint_bytes: int  # size of one checkpoint on disk
    local_batch: int  # observations on one device
    machine: Machine

    @property
    def total_bytes(self) -> int:
        parts = (self.parameter_bytes, self.optimizer_bytes, self.batch_bytes, self.gradient_bytes)
        return sum(parts) + self.activation_bytes

    @property
    def fits(self) -> bool:
        limit = self.machine.device_memory
        return limit is None or self.total_bytes <= (1 - SLACK) * limit

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes, "fits": self.fits}


def plan(
    config: TrainConfig,
    machine: Machine | None = None,
    *,
    dims: Dims | None = None,
    cameras: tuple[str, ...] | None = None,
) -> Plan:
    """Return the sizes of ``config`` on ``machine`` (by default the devices that are here).

    ``dims`` and ``cameras`` are the data's; None takes them from the configuration, and its environment if it has one.
    """
    machine = Machine(jax.device_count()) if machine is None else machine
    if machine.devices % config.fsdp_devices:
        raise ValueError(f"fsdp_devices ({config.fsdp_devices}) must divide the number of devices ({machine.devices})")
    local_batch = _local_batch(config, machine)
    dims = _dims(config) if dims is None else dims
    if cameras is None:
        cameras = config.data.cameras or (config.env.cameras if config.env else CAMERAS)
    cameras = model_cameras(config, cameras)
    agent = jax.eval_shape(lambda: create_agent(config, dims, cameras))
    batch = batch_shapes(config, dims, cameras, local_batch)
    temporary, aliased_output = _compiled(agent, batch)
    trainable = _local_bytes(config, machine, agent.params)
    gradients = _bytes(agent.params)
    state = (agent.params, agent.frozen, agent.target_critic, agent.ema)
    return Plan(
        parameters=_count(agent.params["policy"]) + _count(agent.frozen),
        trainable=_count(agent.params["policy"]),
        critic_parameters=sum(_count(agent.params[group]) for group in CRITIC_GROUPS if group in agent.params),
        parameter_bytes=_local_bytes(config, machine, state),
        optimizer_bytes=_local_bytes(config, machine, agent.opt_state),
        batch_bytes=_bytes(batch),
        gradient_bytes=min(trainable, temporary),
        activation_bytes=max(temporary - gradients, 0) + aliased_output,
        checkpoint_bytes=_bytes((state, agent.opt_state)),
        local_batch=local_batch,
        machine=machine,
    )


def advice(config: TrainConfig, found: Plan) -> list[str]:
    """Return what to change if the run does not fit, the most effective change first."""
    if found.fits:
        return []
    lines = []
    if found.activation_bytes >= found.total_bytes // 4 and found.local_batch > 1:
        parts = 2 * config.agent.gradient_accumulation_steps
        lines.append(f"--agent.gradient_accumulation_steps {parts}: the same batch in smaller pieces")
    if config.agent.best_of_n_strategy in ("parallel", "auto") and config.agent.candidates_in_target > 1:
        lines.append("--agent.best_of_n_strategy chunked: the candidates of the target in blocks")
    if found.machine.devices > config.fsdp_devices:
        lines.append(f"--fsdp_devices {found.machine.devices}: parameters and optimiser split over all devices")
    has_backbone = config.policy.traits.has_backbone
    if has_backbone and not config.policy.freeze_pi0_backbone:
        lines.append("--policy.freeze_pi0_backbone: no gradient and no optimiser for the vision-language model")
    if has_backbone and not config.policy.remat:
        lines.append("--policy.remat: activations are computed again in the backward pass")
    if not lines:
        lines.append("more devices, or devices with more memory")
    return lines


def parse_bytes(text: str) -> int:
    """Return the bytes of "80GB" (decimal, as device memory is sold), "24GiB" or a bare number."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = match.group(2).upper() if match else "?"
    unit = unit + "B" if unit and not unit.endswith("B") else unit
    if match is None or (unit not in UNITS and unit != "B"):
        raise ValueError(f"{text!r} is not a size. Write a number and its unit, such as 80GB or 24GiB")
    return int(float(match.group(1)) * UNITS.get(unit, 1))


def batch_shapes(config: TrainConfig, dims: Dims, cameras: tuple[str, ...], size: int) -> ChunkBatch:
    """Return the shapes of a batch of ``size``, as the loader would make it."""
    policy = config.policy
    horizon, width = policy.action_horizon, policy.action_dim or dims.action

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    image = array(policy.image_size, policy.image_size, 3, dtype=jnp.uint8)
    observation = Observation(
        state=array(policy.action_dim or dims.state),
        images=dict.fromkeys(cameras, image),
        image_masks={camera: array(dtype=jnp.bool_) for camera in cameras},
        tokenized_prompt=array(policy.max_token_len, dtype=jnp.int32),
        tokenized_prompt_mask=array(policy.max_token_len, dtype=jnp.bool_),
    )
    return ChunkBatch(
        observations=observation,
        actions=array(horizon, width),
        rewards=array(horizon),
        terminals=array(horizon),
        valid=array(horizon),
        next_observations=observation,
        bootstrap_mask=array(),
        sequence_mask=array(),
        episode_id=array(dtype=jnp.int32),
        step_id=array(dtype=jnp.int32),
    )


def lower_update(agent: ACRLPDAgent, batch: ChunkBatch) -> Lowered:
    """Lower the agent's update for shapes alone."""
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return agent_module._update.lower(agent, batch, rng, agent.config.loss_weights)


def _local_batch(config: TrainConfig, machine: Machine) -> int:
    size = config.data.batch_size
    if size % machine.devices:
        raise ValueError(f"data.batch_size ({size}) must be a multiple of the number of devices ({machine.devices})")
    return size // machine.devices


def _dims(config: TrainConfig) -> Dims:
    if config.env is not None:
        spec = make_vector(config.env, 1).spec
        return Dims(spec.state_dim, spec.action_dim)
    width = config.data.action_dim or config.policy.action_dim
    if width is None:
        raise ValueError("the widths of state and action come from the data: set data.action_dim or policy.action_dim")
    return Dims(config.policy.action_dim or width, width)


def _compiled(agent: ACRLPDAgent, batch: ChunkBatch) -> tuple[int, int]:
    """Return bytes of temporaries of one update, and of results that do not replace an argument in memory."""
    program = lower_update(agent, batch).compile(QUICKLY)
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend's compiler does not say how much memory a program needs")
    temporary = analysis.temp_size_in_bytes + _library_bytes(program.as_text() or "")
    return temporary, max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)


def _library_bytes(program: str) -> int:
    """Return the bytes that the CPU's matrix library allocates by itself, which the compiler's figure lacks.

    By measurement, a product fused with what follows (bias, norm, activation) takes three times its result.
    """
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* fusion\(([^)]*)\).*__ynn_fusion", program)
    joined = [(dtype, shape) for dtype, shape, operands in found if operands.count("%") > 2]
    sizes = [math.prod(map(int, shape.split(","))) * _BYTES.get(dtype, 4) for dtype, shape in joined]
    return 3 * max(sizes, default=0)


def _local_bytes(config: TrainConfig, machine: Machine, tree: Any) -> int:
    """Return bytes on one device, with large arrays split over the fsdp axis."""
    axes = (machine.devices // config.fsdp_devices, config.fsdp_devices)
    mesh = AbstractMesh(axes, (BATCH_AXIS, FSDP_AXIS))
    placed = parameter_sharding(mesh, tree)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return sum(_size(leaf) // (config.fsdp_devices if FSDP_AXIS in place.spec else 1) for leaf, place in pairs)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _bytes(tree: Any) -> int:
    return sum(_size(leaf) for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
