"""Build the real pi0 (3.24 billion parameters) in bfloat16 on this machine and sample one chunk.

    python benchmarks/full_size.py [--pi05] [--steps 10] [--json]

The weights are random, since time and memory do not depend on them. They are never held in float32, so the peak memory
is only slightly more than their 6.5 GB. The script takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import resource
import time
from typing import Any

# A CPU computes bfloat16 in float32. Layer by layer, the conversion is cheap; but XLA would move it out of the loop
# over layers and convert all of them at once, which takes 11 GB.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
)

import jax
import jax.numpy as jnp
import machine
import numpy as np
import sampling
from flax import nnx

from acrlpd.models.pi0 import Pi0, Pi0Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = Pi0Config(pi05=arguments.pi05, dtype="bfloat16", param_dtype="bfloat16", remat=False)
    result = machine.describe()
    start = time.perf_counter()
    policy = build(config)
    result["build_s"] = time.perf_counter() - start
    result["parameters"] = sum(param.size for param in jax.tree.leaves(nnx.state(policy)))
    result["parameter_bytes"] = sum(param.nbytes for param in jax.tree.leaves(nnx.state(policy)))
    result["peak_bytes_after_build"] = peak_bytes()
    result |= sample(policy, arguments.steps)
    result["peak_bytes"] = peak_bytes()
    machine.show(result, as_json=arguments.json, table=table(result))


def build(config: Pi0Config) -> Pi0:
    """Build a model whose arrays repeat one draw of small normal values, each created directly in its own dtype."""
    policy = nnx.eval_shape(lambda: config.create(nnx.Rngs(0)))
    values = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, 2**20 + 7), config.param_dtype)
    params = nnx.to_flat_state(nnx.state(policy))
    for _, param in params:
        param.set_value(jax.block_until_ready(repeat(values, param.shape)))
    nnx.update(policy, nnx.from_flat_state(params))
    return policy


@functools.partial(jax.jit, static_argnums=1)
def repeat(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    return jnp.tile(values, math.ceil(size / len(values)))[:size].reshape(shape)


def sample(policy: Pi0, steps: int) -> dict[str, Any]:
    """Return the times of one chunk, and the memory that the compiled program allocates in addition to the weights."""
    graphdef, state = nnx.split(policy)
    seen, noise = sampling.observation(1, policy.config), sampling.noise_of(1, config=policy.config)

    @jax.jit
    def run(state, seen, noise):
        return nnx.merge(graphdef, state).sample_actions(jax.random.key(0), seen, num_steps=steps, noise=noise)

    start = time.perf_counter()
    compiled = run.lower(state, seen, noise).compile()
    compile_s = time.perf_counter() - start
    wall, cpu = machine.seconds(lambda: compiled(state, seen, noise))
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "compile_s": compile_s,
        "temporary_bytes": memory.temp_size_in_bytes,
        "sample_wall_s": wall,
        "sample_cpu_s": cpu,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(result: dict[str, Any]) -> str:
    giga = 1e9
    return "\n".join(
        [
            f"{result['command']} on {result['processor']}, load {result['load_average']}",
            "",
            f"parameters     {result['parameters']:,}, {result['parameter_bytes'] / giga:.2f} GB",
            f"built in       {result['build_s']:.1f} s, peak {result['peak_bytes_after_build'] / giga:.2f} GB",
            f"compiled in    {result['compile_s']:.1f} s, {result['temporary_bytes'] / giga:.2f} GB of temporaries",
            f"one chunk in   {result['sample_wall_s']:.1f} s ({result['sample_cpu_s']:.1f} s of CPU time)",
            f"peak memory    {result['peak_bytes'] / giga:.2f} GB",
        ]
    )


if __name__ == "__main__":
    main()
