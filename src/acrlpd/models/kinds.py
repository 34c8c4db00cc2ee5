"""A table of the kinds of policies, with everything that depends only on the kind.

A new kind is an entry here, a name in ``config.PolicyName``, and a case in ``training.build.make_policy``.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PolicyKind:
    """The properties of a kind of policy."""

    has_backbone: bool  # a vision-language model: reads cameras and a prompt, takes openpi's weights, may be frozen
    state_in_prompt: bool = (
        False  # the state is written into the prompt in 256 steps, and is therefore normalized by quantiles
    )
    is_flow: bool = True  # samples by integrating a velocity, so its steps can be guided


POLICY_KINDS: dict[str, PolicyKind] = {
    "pi0": PolicyKind(has_backbone=True),
    "pi05": PolicyKind(has_backbone=True, state_in_prompt=True),
    "mlp_flow": PolicyKind(has_backbone=False),
    "gaussian": PolicyKind(has_backbone=False, is_flow=False),
}
