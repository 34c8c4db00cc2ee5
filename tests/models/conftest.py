"""openpi's tiny golden models as ours."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acrlpd.models import gemma, lora, pi0, siglip, weights
from acrlpd.types import Observation


@dataclasses.dataclass(frozen=True)
class Golden:
    """The golden folder, and the configs and arrays it describes."""

    folder: Path
    meta: dict[str, Any]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    def group(self, name: str, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in self.arrays(name).items() if key.startswith(prefix)}

    def lora(self, description: dict[str, Any] | None) -> lora.Config | None:
        if description is None:
            return None
        return lora.Config(
            rank=description["rank"], alpha=description["alpha"], rank_stabilized=description.get("rslora", False)
        )

    def config(self, model: str, **changes: Any) -> pi0.Pi0Config:
        """``model`` is pi0, pi05 or pi0_lora, in float32 and without recomputation unless ``changes`` say otherwise."""
        sizes = self.meta["config"]
        adapters = {}
        if model.endswith("_lora"):
            adapters = {
                "attention_lora": self.lora(sizes["lora"]["attn"]),
                "mlp_lora": self.lora(sizes["lora"]["ffn"]),
            }
        fields = {
            "pi05": model.startswith("pi05"),
            "action_dim": sizes["action_dim"],
            "action_horizon": sizes["action_horizon"],
            "max_token_len": sizes["max_token_len"][model.removesuffix("_lora")],
            "paligemma_variant": gemma.Config(**sizes["gemma"]["tiny"], **adapters),
            "action_expert_variant": gemma.Config(**sizes["gemma"]["tiny_expert"], **adapters),
            "vision_variant": self.vision(),
            "vocab_size": sizes["vocab"],
            "dtype": "float32",
            "remat": False,
        }
        return pi0.Pi0Config(**{**fields, **changes})

    def vision(self) -> siglip.Config:
        sizes = dict(self.meta["config"]["vit"])
        return siglip.Config(image_size=sizes.pop("image"), patch_size=sizes.pop("patch"), **sizes)

    def model(self, model: str, params: dict[str, np.ndarray] | None = None, **changes: Any) -> pi0.Pi0:
        """openpi's tiny model, with its parameters."""
        config = self.config(model, **changes)
        policy = nnx.eval_shape(lambda: config.create(nnx.Rngs(0)))
        weights.load_into(policy, self.arrays(f"{model}_params") if params is None else params)
        return policy

    def observation(self, inputs: dict[str, np.ndarray]) -> Observation:
        images = {key.removeprefix("image/"): value for key, value in inputs.items() if key.startswith("image/")}
        observation = Observation(
            state=inputs["state"],
            images=images,
            image_masks={name: inputs[f"image_mask/{name}"] for name in images},
            tokenized_prompt=inputs["tokenized_prompt"],
            tokenized_prompt_mask=inputs["tokenized_prompt_mask"],
        )
        return jax.tree.map(jnp.asarray, observation)


@pytest.fixture(scope="session")
def golden(shared: Path) -> Golden:
    return Golden(shared / "golden", json.loads((shared / "golden" / "meta.json").read_text()))


@pytest.fixture(scope="session")
def param_tables(shared: Path) -> dict[str, Any]:
    """Path, shape and freezing of every parameter of the released models."""
    path = shared / "spec" / "param-tables.json"
    if not path.exists():
        pytest.skip(f"these reference files have no {path.relative_to(shared)}")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def assert_released(param_tables: dict[str, Any]) -> Callable[[str, Any], None]:
    """Compares a config's model with a released one's table."""

    def compare(name: str, config: Any) -> None:
        """Paths, shapes, dtypes, number and what LoRA freezes, without allocating any of it."""
        table = param_tables[name]
        ours = weights.flatten(nnx.eval_shape(lambda: config.create(nnx.Rngs(0))))
        assert {path: (list(value.shape), value.dtype.name) for path, value in ours.items()} == {
            path: (row["shape"], row["dtype"]) for path, row in table["params"].items()
        }
        assert sum(value.size for value in ours.values()) == table["n_params"]
        assert {path for path in ours if config.freezes(path)} == {
            path for path, row in table["params"].items() if row["frozen"]
        }

    return compare


@pytest.fixture(scope="session")
def jit() -> Callable[..., Any]:
    """``jax.jit`` for functions that run once: compiled three times faster, for slower code."""
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def fill() -> Callable[[Callable[[], nnx.Module]], Any]:
    """Builds a module with random parameters everywhere, also where a fresh one has zeros; nothing is compiled."""

    def filled(make: Callable[[], nnx.Module]) -> Any:
        module = nnx.eval_shape(make)
        rng = np.random.default_rng(0)
        shapes = {path: param.shape for path, param in weights.flatten(module).items()}
        weights.load_into(module, {path: rng.normal(0, 0.3, shape) for path, shape in shapes.items()})
        return module

    return filled
