import numpy as np
import pytest

from acrlpd.training.evaluate import stack, wilson


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # from the closed form, with z = 1.959964
        (0, 50, 0.0, 0.0713),
        (50, 50, 0.9287, 1.0),
        (25, 50, 0.3664, 0.6336),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson(successes, episodes, low, high):
    np.testing.assert_allclose(wilson(successes, episodes), (low, high), atol=1e-4)


def test_wilson_needs_an_episode():
    with pytest.raises(ValueError, match="at least one episode"):
        wilson(0, 0)


def test_stack_makes_a_batch():
    observations = [
        {"state": np.full(3, i, np.float32), "image": {"top": np.full((2, 2, 3), i, np.uint8)}, "prompt": "go"}
        for i in range(4)
    ]
    batch = stack(observations)
    assert batch["state"].shape == (4, 3)
    assert batch["image"]["top"].shape == (4, 2, 2, 3)
    assert batch["prompt"].tolist() == ["go"] * 4
