"""A trained run as a policy that answers requests."""

from __future__ import annotations

from pathlib import Path

import jax

from acrlpd.data.view.transforms import ActionsOnly, Compose
from acrlpd.deploy.options import ActingOptions, default_prompt_transforms, observation_spec
from acrlpd.serving.policy import AgentSampler, Policy
from acrlpd.training import loading
from acrlpd.training.build import make_transform, model_cameras
from acrlpd.training.loading import Trained
from acrlpd.types import Observation


def is_ours(path: str | Path) -> bool:
    """Return whether ``path`` is a run of this project's trainer, its checkpoints folder, or one checkpoint."""
    if loading.is_best(Path(path)):
        return True
    if not Path(path).is_dir():
        return False
    directory, step = loading.locate_checkpoint(Path(path))
    steps = [directory / str(step)] if step is not None else list(directory.iterdir())
    return any((each / part).is_dir() for each in steps for part in ("acrlpd", "run"))


def load_trained(
    path: str | Path, extraction: str | None = None, guidance_weights: tuple[float, ...] | None = None
) -> Trained:
    """Load the agent of a checkpoint, ready to act; arguments as in ``training.loading.load_checkpoint``.

    Optimiser state, twice the size of what it optimises, is never read.
    """
    return loading.load_stored(path, extraction, guidance_weights, for_serving=True)


def trained_policy(trained: Trained, options: ActingOptions) -> Policy:
    """Return the policy that a server answers with."""
    config = trained.config
    if options.real_time and not config.policy.traits.is_flow:
        raise ValueError("real_time guides the steps of a flow, and rlpd_ac's policy has none: leave it off")
    sampler = AgentSampler(
        trained.agent, mode=options.mode, num_samples=options.num_samples, num_steps=options.num_steps
    )
    transform = Compose(
        [
            ActionsOnly(),
            *default_prompt_transforms(options.default_prompt, needed=config.policy.traits.has_backbone),
            make_transform(config, trained.stats, trained.dims, _read_cameras(trained)),
        ]
    )
    return Policy(
        sampler,
        transform,
        spec=policy_spec(trained),
        real_time=options.real_time,
        budget_s=options.budget_s,
        rng=jax.random.key(options.seed),
        metadata={"acrlpd": {"step": trained.step, "action_horizon": config.policy.action_horizon}},
    )


def _read_cameras(trained: Trained) -> tuple[str, ...]:
    """Return the data's cameras that the policy reads; clients need not send the others."""
    return trained.cameras if trained.config.policy.traits.has_backbone else ()


def policy_spec(trained: Trained) -> Observation:
    """Return the shapes and types of one observation as the policy reads it."""
    policy, dims = trained.config.policy, trained.dims
    if not policy.traits.has_backbone:
        return observation_spec(dims.state, (), 0, policy.max_token_len)
    cameras = model_cameras(trained.config, trained.cameras)
    return observation_spec(policy.action_dim or dims.state, cameras, policy.image_size, policy.max_token_len)


class Follower:
    """The policy of a run that may still be training; ``refresh`` returns a newer one when there is one."""

    def __init__(self, path: str | Path, options: ActingOptions):
        self._path = Path(path)
        self._options = options
        self._trained = load_trained(path, options.extraction, options.guidance_weights)
        self._fixed = loading.locate_checkpoint(Path(path))[1] is not None

    @property
    def policy(self) -> Policy:
        return trained_policy(self._trained, self._options)

    def refresh(self) -> Policy | None:
        """Return the policy of a better or newer checkpoint than the last one given; None if there is none.

        There never is where the path names one step. A run's is the best, once its evaluations have chosen one.
        """
        if self._fixed:
            return None
        manager, served = self._trained.manager, self._trained.step
        kept = loading.kept_step(self._path)
        if kept is not None:
            if kept == served:
                return None
            self._trained = self._trained.at(kept)
            return self.policy
        if max(manager.steps(), default=-1) <= served:
            return None
        self._trained = manager.newest(self._trained.at, after=served)
        return self.policy
