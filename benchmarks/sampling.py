"""Measure best of N on one prefix pass, guided or not, against N tiled observations, and the imitation loss's gradient.

    python benchmarks/sampling.py [--candidates 1 8 32] [--steps 10] [--repeats 5] [--json]

The model is a mid-size pi0 (image tower 384x6, first expert 512x6, action expert 256) with three 224 px cameras,
horizon 50 and float32; guided candidates follow the gradient of ten critics of two layers of 256. Candidates run in the
blocks that ``best_of_n_strategy="auto"`` chooses. Layers are written out one by one, which is fastest for so few
(``policy.unroll``); for sampling, they are separate modules as in a server.
FLOPs are counted from the sizes (two per multiply-add of every matrix product): those computed, and those of the model
as openpi computes it, with the whole last prefix layer, of which only keys and values are needed. Each rate is compared
with that of plain 1024 x 1024 matrix products before and after each call, in the same process; ratios use the computed
FLOPs. Shares and ratios are medians over the repeats, by wall time and by CPU time; on a shared machine, CPU time says
more.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from flax import nnx

from acrlpd.agents import sampling
from acrlpd.agents.config import AgentConfig
from acrlpd.agents.extraction import Guide, Modules
from acrlpd.models import stacked
from acrlpd.models.critic import CriticConfig, CriticNetworks
from acrlpd.models.pi0 import Pi0, Pi0Config
from acrlpd.types import Observation

CONFIG = Pi0Config(
    dtype="float32",
    paligemma_variant="mid",
    action_expert_variant="mid_expert",
    vision_variant="mid",
    vocab_size=1024,
    remat=False,
    unroll=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8], help="batch sizes of the gradient")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    about = machine.describe()
    policy, steps = CONFIG.create(nnx.Rngs(0)), arguments.steps
    served = stacked.unrolled(policy)
    calls: dict[str, tuple[Callable[[], Any], float]] = {}
    prefixes: dict[str, int] = {}  # number of passes over the observation's tokens in a call
    for n in arguments.candidates:
        calls[f"best of {n}"] = best_of(served, n, steps), sampling_flops(n, steps)
        calls[f"{n} tiled"] = tiled_samples(served, n, steps), n * sampling_flops(1, steps)
        calls[f"{n} guided"] = best_of(served, n, steps, guided=True), guided_flops(n, steps)
        prefixes |= {f"best of {n}": 1, f"{n} guided": 1, f"{n} tiled": n}
    for batch in arguments.batches:
        calls[f"gradient, batch {batch}"] = loss_gradient(policy, batch), 3 * batch * loss_flops()
        prefixes[f"gradient, batch {batch}"] = 3 * batch
    rows = Timer(arguments.repeats).rows(calls)
    for row in rows:
        row["gflop_model"] = row["gflop"] + prefixes[row["name"]] * last_layer_flops() / 1e9
        for clock in ("wall", "cpu"):
            share = row[f"share_of_matmul_{clock}"]["median"]
            row[f"share_of_matmul_model_{clock}"] = share * row["gflop_model"] / row["gflop"]
    result = {**about, "load_after": machine.describe()["load_average"], "rows": rows} | ratios(rows, arguments)
    machine.show(result, as_json=arguments.json, table=table(result))


class Timer:
    """A timer that runs calls in turn, each between plain matrix products, so that all see the same load."""

    def __init__(self, repeats: int):
        self._repeats = repeats
        self._square = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)), jnp.float32)
        self._product = jax.jit(lambda a, b: a @ b)  # arguments: a constant product would be computed at compilation
        self._matmul_rate()

    def rows(self, calls: dict[str, tuple[Callable[[], Any], float]]) -> list[dict[str, Any]]:
        """Return a row for each name's call and FLOPs."""
        first = {name: machine.seconds(call)[0] for name, (call, _) in calls.items()}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        shares: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(self._repeats):
            before = self._matmul_rate()
            for name, (call, flops) in calls.items():
                spent, after = machine.seconds(call), self._matmul_rate()
                seconds[name].append(spent)
                wall, cpu = (2 * flops / s / (r0 + r1) for s, r0, r1 in zip(spent, before, after, strict=True))
                shares[name].append((wall, cpu))
                before = after
        return [self._row(name, flops, first[name], seconds[name], shares[name]) for name, (_, flops) in calls.items()]

    def row(self, name: str, call: Callable[[], Any], flops: float) -> dict[str, Any]:
        """Return the row of a single call."""
        return self.rows({name: (call, flops)})[0]

    @staticmethod
    def _row(
        name: str, flops: float, first: float, seconds: list[tuple[float, float]], shares: list[tuple[float, float]]
    ) -> dict[str, Any]:
        (wall, cpu), (share_wall, share_cpu) = map(_spreads, (seconds, shares))
        return {
            "name": name,
            "wall_s": wall,
            "cpu_s": cpu,
            "compile_s": first - wall["median"],
            "gflop": flops / 1e9,
            "share_of_matmul": share_wall["median"],
            "share_of_matmul_wall": share_wall,
            "share_of_matmul_cpu": share_cpu,
        }

    def _matmul_rate(self, count: int = 20) -> tuple[float, float]:
        """Return the FLOPs per second of wall and of CPU time."""

        def products() -> jax.Array:
            for _ in range(count):
                product = self._product(self._square, self._square)
            return product

        wall, cpu = machine.seconds(products)
        return count * 2 * 1024**3 / wall, count * 2 * 1024**3 / cpu


def _spreads(pairs: list[tuple[float, float]]) -> tuple[dict[str, float], dict[str, float]]:
    wall, cpu = zip(*pairs, strict=True)
    return machine.spread(list(wall)), machine.spread(list(cpu))


def observation(batch: int, config: Pi0Config = CONFIG) -> Observation:
    """Return random pictures and prompts without masks."""
    rng = np.random.default_rng(0)
    side = config.image_size
    images = {name: rng.random((batch, side, side, 3), np.float32) * 2 - 1 for name in config.cameras}
    tokens = (batch, config.max_token_len)
    made = Observation(
        state=rng.normal(size=(batch, config.state_dim)).astype(np.float32),
        images=images,
        image_masks={name: np.ones(batch, bool) for name in images},
        tokenized_prompt=rng.integers(0, config.vocab_size, tokens).astype(np.int32),
        tokenized_prompt_mask=np.ones(tokens, bool),
    )
    return jax.device_put(made)


def noise_of(*lead: int, config: Pi0Config = CONFIG) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*lead, config.action_horizon, config.action_dim))


def best_of(policy: Pi0, n: int, steps: int, *, guided: bool = False) -> Callable[[], Any]:
    config = AgentConfig(extraction="guided" if guided else "best_of_n")

    @jax.jit
    def call(state, critics, seen, noise):
        policy, critic = nnx.merge(graph, state), nnx.merge(critic_graph, critics)
        prefix = policy.encode(seen)
        modules = Modules(policy, critic, guide=Guide(critic, jnp.ones(()), jnp.ones((1, 1))))

        def draw(noise: jax.Array) -> jax.Array:
            return config.make_extraction(steps).propose(modules, prefix, noise)

        block_size = sampling.fitting_block(draw, noise, config.best_of_n_bytes)
        return sampling.in_blocks(draw, noise, block_size=block_size)

    graph, state = nnx.split(policy)
    critic_graph, critics = nnx.split(make_critic())
    seen, noise = observation(1), noise_of(n, 1)
    return lambda: call(state, critics, seen, noise)


def make_critic() -> CriticNetworks:
    return CriticNetworks(
        CriticConfig(),
        feature_dim=CONFIG.paligemma.width,
        state_dim=CONFIG.state_dim,
        horizon=CONFIG.action_horizon,
        action_dim=CONFIG.action_dim,
        rngs=nnx.Rngs(0),
    )


def tiled_samples(policy: Pi0, n: int, steps: int) -> Callable[[], Any]:
    @jax.jit
    def call(state, seen, noise):
        return nnx.merge(graph, state).sample_actions(jax.random.key(0), seen, num_steps=steps, noise=noise)

    graph, state = nnx.split(policy)
    seen, noise = observation(n), noise_of(n)
    return lambda: call(state, seen, noise)


def loss_gradient(policy: Pi0, batch: int) -> Callable[[], Any]:
    @jax.jit
    @jax.grad
    def call(state, seen, actions):
        policy = nnx.merge(graph, state)
        return policy.compute_loss(jax.random.key(0), seen, actions).mean()

    graph, state = nnx.split(policy)
    seen, actions = observation(batch), noise_of(batch)
    return lambda: call(state, seen, actions)


# ---- floating-point operations of the matrix products, from the sizes


def prefix_flops() -> float:
    """Count the image tower and the first expert for one observation; for the last layer, only keys and values."""
    vision, expert = CONFIG.vision, CONFIG.paligemma
    patches, width = vision.num_tokens, vision.width
    tower = patches * vision.patch_size**2 * 3 * width + patches * width * expert.width
    tower += vision.depth * (patches * (4 * width**2 + 2 * width * vision.mlp_dim) + 2 * patches**2 * width)
    tokens = len(CONFIG.cameras) * patches + CONFIG.max_token_len
    language = expert.depth * tokens * expert.width * 2 * expert.num_kv_heads * expert.head_dim
    return 2.0 * (len(CONFIG.cameras) * tower + language) + (expert.depth - 1) * last_layer_flops()


def last_layer_flops() -> float:
    """Count a layer of the first expert without keys and values; for the last layer, this part is never needed."""
    expert = CONFIG.paligemma
    tokens = len(CONFIG.cameras) * CONFIG.vision.num_tokens + CONFIG.max_token_len
    heads = expert.num_heads * expert.head_dim
    return 2.0 * (tokens * (2 * expert.width * heads + 3 * expert.width * expert.mlp_dim) + 2 * tokens**2 * heads)


def suffix_flops() -> float:
    """Count one evaluation of the velocity for one candidate."""
    expert, horizon = CONFIG.action_expert, CONFIG.action_horizon
    tokens = horizon + 1  # 1 for the state
    seen = len(CONFIG.cameras) * CONFIG.vision.num_tokens + CONFIG.max_token_len + tokens
    heads, keys = expert.num_heads * expert.head_dim, expert.num_kv_heads * expert.head_dim
    layer = tokens * expert.width * (2 * heads + 2 * keys + 3 * expert.mlp_dim) + 2 * tokens * seen * heads
    ends = horizon * (2 * CONFIG.action_dim * expert.width + 3 * expert.width**2) + CONFIG.state_dim * expert.width
    return 2.0 * (expert.depth * layer + ends)


def sampling_flops(n: int, steps: int) -> float:
    return prefix_flops() + n * steps * suffix_flops()


def guided_flops(n: int, steps: int) -> float:
    """Count sampling whose every step takes a gradient of the critics, by the chunk alone: about two forward passes."""
    critic = CriticConfig()
    widths = (CONFIG.action_horizon * CONFIG.action_dim, *critic.hidden_dims, 1)
    forward = 2.0 * critic.num_critics * sum(a * b for a, b in itertools.pairwise(widths))
    return sampling_flops(n, steps) + 2 * n * steps * forward


def loss_flops() -> float:
    return prefix_flops() + suffix_flops()


def ratios(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the ratios of our claims: growth of time over growth of FLOPs, and one prefix pass against n."""
    by_name = {row["name"]: row for row in rows}
    first = by_name[f"best of {arguments.candidates[0]}"]
    found: dict[str, dict[str, float]] = {}
    for n in arguments.candidates:
        best, tiled, guided = (by_name[name] for name in (f"best of {n}", f"{n} tiled", f"{n} guided"))
        found[str(n)] = {}
        for clock in ("wall", "cpu"):
            one, many, apart = (row[f"{clock}_s"]["median"] for row in (first, best, tiled))
            found[str(n)][f"time_growth_over_flop_growth_{clock}"] = many / one / (best["gflop"] / first["gflop"])
            found[str(n)][f"faster_than_tiled_{clock}"] = apart / many
            found[str(n)][f"guided_over_plain_{clock}"] = guided[f"{clock}_s"]["median"] / many
    return {"ratios": found}


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['command']} on {result['processor']}, load {result['load_average']}", ""]
    lines.append(f"{'':50}{'done, of matmul':>26}{'model, of matmul':>26}")
    lines.append(f"{'':20}{'wall ms':>10}{'cpu ms':>10}{'compile s':>10}" + 2 * f"{'GFLOP':>12}{'wall':>7}{'cpu':>7}")
    for row in result["rows"]:
        wall, cpu = row["wall_s"]["median"], row["cpu_s"]["median"]
        lines.append(
            f"{row['name']:20}{wall * 1e3:10.1f}{cpu * 1e3:10.1f}{row['compile_s']:10.1f}{row['gflop']:12.1f}"
            f"{row['share_of_matmul_wall']['median']:7.2f}{row['share_of_matmul_cpu']['median']:7.2f}"
            f"{row['gflop_model']:12.1f}{row['share_of_matmul_model_wall']:7.2f}{row['share_of_matmul_model_cpu']:7.2f}"
        )
    for n, each in result["ratios"].items():
        faster, growth, guided = (
            [each[f"{name}_{clock}"] for clock in ("wall", "cpu")]
            for name in ("faster_than_tiled", "time_growth_over_flop_growth", "guided_over_plain")
        )
        lines.append(
            f"N={n}: {faster[0]:.2f} ({faster[1]:.2f} by cpu) x as fast as tiled; time grows {growth[0]:.2f} "
            f"({growth[1]:.2f}) x as much as FLOPs; guided takes {guided[0]:.3f} ({guided[1]:.3f}) x as long"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
