import time

import jax.numpy as jnp
import pytest

from acrlpd.training.loop import breakdown
from acrlpd.training.metrics import MetricAverage, Stopwatch


def test_average_is_over_the_steps_since_the_last_fetch():
    average = MetricAverage()
    for value in (1.0, 2.0, 6.0):
        average.add({"loss": jnp.float32(value)})
    assert average.fetch() == {"loss": 3.0}
    average.add({"loss": jnp.float32(5.0)})
    assert average.fetch() == {"loss": 5.0}


def test_inner_time_counts_once():
    watch = Stopwatch()
    with watch.span("outer"):
        time.sleep(0.02)
        with watch.span("inner"):
            time.sleep(0.03)
    assert watch.seconds["inner"] >= 0.03
    assert 0.02 <= watch.seconds["outer"] < 0.03
    watch.move("outer", "inner", 0.01)
    assert watch.seconds["outer"] < 0.02


def test_breakdown_counts_what_no_span_measured():
    result = breakdown({"update": 6.0, "simulator": 2.0, "data": 1.0, "evaluation": 5.0, "compile": 4.0}, 19.0)
    assert result["other_s"] == pytest.approx(1.0)
    assert result["outside_share"] == pytest.approx(0.2)  # data and other, of the 10 s of training
