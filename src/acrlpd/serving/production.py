"""Serving settings of each robot platform."""

from __future__ import annotations

from typing import Literal, TypedDict

Platform = Literal["droid", "aloha", "libero"]


class ProductionConfig(TypedDict):
    """The settings of one platform."""

    num_diffusion_steps: int  # Euler steps of the flow
    best_of_n_samples: int
    critic_ensemble_size: int  # the export keeps the best critics by TD error
    max_concurrent_requests: int  # more are refused
    request_timeout: float  # seconds


PRODUCTION_SERVING_CONFIG: dict[str, ProductionConfig] = {
    "droid": {
        "num_diffusion_steps": 20,
        "best_of_n_samples": 8,
        "critic_ensemble_size": 5,
        "max_concurrent_requests": 4,
        "request_timeout": 30,
    },
    "aloha": {
        "num_diffusion_steps": 15,
        "best_of_n_samples": 12,
        "critic_ensemble_size": 4,
        "max_concurrent_requests": 2,
        "request_timeout": 45,
    },
    "libero": {
        "num_diffusion_steps": 10,
        "best_of_n_samples": 16,
        "critic_ensemble_size": 8,
        "max_concurrent_requests": 8,
        "request_timeout": 15,
    },
}
