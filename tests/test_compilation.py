"""A program compiled by another process computes what a freshly compiled one does, bit for bit.

The whole suite and the command line rely on it. Under an older JAX, a sampler's loop that came from the disk returned
its input.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest


def outputs() -> dict[str, str]:
    """Hashes of what sampling, acting, a bare while loop and two donated updates give."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from acrlpd.agents.agent import ACRLPDAgent
    from acrlpd.agents.config import AgentConfig
    from acrlpd.models.critic import CriticConfig
    from acrlpd.models.pi0 import Pi0Config
    from acrlpd.types import ChunkBatch, Observation

    def digest(tree) -> str:
        return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()

    sizes = {"paligemma_variant": "nano", "action_expert_variant": "nano_expert", "vision_variant": "nano"}
    config = Pi0Config(
        action_dim=2, action_horizon=3, max_token_len=4, vocab_size=16, cameras=(), dtype="float32", **sizes
    )
    policy = config.create(nnx.Rngs(params=0))
    rows = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    tokens = np.ones((4, 4), np.int32)
    observation = Observation(state=rows, images={}, image_masks={}, tokenized_prompt=tokens,
                              tokenized_prompt_mask=tokens.astype(bool))  # fmt: skip
    actions, ones = np.stack([rows, rows**2, -rows], axis=1), np.ones((4, 3), np.float32)
    batch = ChunkBatch(
        observations=observation, next_observations=observation, actions=actions, rewards=ones, valid=ones,
        terminals=0 * ones, bootstrap_mask=ones[:, 0], sequence_mask=ones[:, 0],
        episode_id=np.arange(4, dtype=np.int32), step_id=np.zeros(4, np.int32),
    )  # fmt: skip
    agent = ACRLPDAgent.create(
        AgentConfig(critic=CriticConfig(2, (8,)), best_of_n_samples=3, flow_steps=3),
        policy,
        dict.fromkeys(("policy", "critic", "temperature"), optax.adam(1e-2)),
        state_dim=2,
        rng=jax.random.key(1),
    )
    halve = jax.jit(lambda x: jax.lax.while_loop(lambda c: c[1] > 0.1, lambda c: (c[0] * 0.7, c[1] - 0.1), (x, 1.0)))
    found = {"loop": digest(halve(jnp.asarray(rows))), "parameters": digest(nnx.state(policy))}
    for mode in ("bc", "greedy", "explore"):
        found[mode] = digest(agent.sample_actions(observation, jax.random.key(2), mode=mode))
    for step in range(2):
        agent, metrics = agent.update(batch, jax.random.key(step))
        found[f"update {step}"] = digest((agent.params, agent.target_critic, agent.opt_state, metrics))
    return found


@pytest.mark.slow
def test_programs_from_the_disk_compute_what_fresh_ones_do(tmp_path):
    def run(cache: str) -> dict[str, str]:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout)

    fresh = run("")
    cold = run(str(tmp_path))
    warm = run(str(tmp_path))
    assert (fresh.pop("hits"), cold.pop("hits")) == (0, 0)
    assert warm.pop("hits") >= len(fresh), "the second process compiled again"
    assert fresh == cold == warm


if __name__ == "__main__":
    import jax

    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    )
    print(json.dumps({**outputs(), "hits": len(hits)}))
