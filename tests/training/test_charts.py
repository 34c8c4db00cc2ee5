"""Charts from made-up numbers; their place on a page is tested in test_report.py."""

import math
import re
import sys

import pytest

from acrlpd.training import charts
from acrlpd.training.charts import MAX_POINTS, Curves, Evaluated, Panel, thin

ONE = Curves("One", "A caption.", (Panel("unit", {"q": "Q", "target": "TD target"}),))


def records(*values, metric="q"):
    return [{"step": 10 * step, f"train/{metric}": value} for step, value in enumerate(values, 1)]


def paths(chart):
    """Coordinates of what is drawn in a curve's colour."""
    return re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--blue\)', chart.svg)


def test_thin_keeps_both_ends():
    points = list(range(1001))
    kept = thin(points, 500)
    assert len(kept) == 500
    assert (kept[0], kept[-1]) == (0, 1000)
    assert kept == sorted(set(kept))
    assert thin([1, 2], 500) == [1, 2]


def test_a_value_that_is_not_finite_interrupts_the_curve():
    chart = charts.curves(ONE, records(1.0, 3.0, math.nan, 2.0, 4.0), None)
    (path,) = paths(chart)
    assert path.count("M") == 2  # two pieces
    assert not re.search(r"nan|inf", chart.svg, flags=re.IGNORECASE)
    assert chart.caption == "A caption. Not finite and left out: up to 1 of a curve's points."


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_curve_without_any_finite_value_is_an_empty_chart(value):
    chart = charts.curves(ONE, records(value, value), None)
    assert ">unit</text>" in chart.svg


def test_what_was_not_logged_has_no_chart():
    assert charts.curves(ONE, records(1.0, 2.0, metric="other"), None) is None


def test_an_unused_loss_is_hidden():
    both = Curves("Two", "", (Panel("critic", {"q": "Q"}), Panel("actor", {"actor": "actor"}, hide_zero=True)))
    for value, shown in ((0.0, False), (-0.5, True)):
        values = [{"step": step, "train/q": 1.0 * step, "train/actor": value} for step in (1, 2)]
        assert (">actor</text>" in charts.curves(both, values, None).svg) == shown


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ((1.0, 1000.0), "unit, log"),
        ((1.0, 50.0), "unit"),  # less than two decades
        ((-1.0, 1000.0), "unit"),
        ((0.0, 1000.0), "unit"),
    ],
)
def test_the_axis_is_logarithmic_where_that_helps_and_says_so(values, label):
    what = Curves("One", "", (Panel("unit", {"q": "Q"}, log=True),))
    assert f">{label}</text>" in charts.curves(what, records(*values), None).svg


def test_a_long_curve_is_thinned_and_says_so():
    chart = charts.curves(ONE, records(*(math.sin(step) for step in range(MAX_POINTS + 1))), None)
    assert chart.caption == "A caption. 500 of 501 points, evenly spaced."


def test_the_boundary_is_one_dashed_line():
    without, with_boundary = (charts.curves(ONE, records(1.0, 2.0, 3.0), at).svg for at in (None, 20))
    assert "stroke-dasharray" not in without
    assert with_boundary.count("stroke-dasharray") == 1


def test_a_policy_without_steps_is_shown_in_the_results():
    chart = charts.results({"online": Evaluated(None, None, 0.98, 0.9, 1.0, 50)})
    assert ">online</text>" in chart.svg
    assert ">imitation</text>" not in chart.svg


def test_the_same_numbers_give_the_same_chart():
    assert charts.curves(ONE, records(1.0, 2.0), None) == charts.curves(ONE, records(1.0, 2.0), None)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'acrlpd\[report\]'"):
        charts.curves(ONE, records(1.0, 2.0), None)
