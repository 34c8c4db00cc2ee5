import json
import warnings

import numpy as np
import pytest

from acrlpd.data import statistics
from acrlpd.data.store.episodes import EpisodeInfo, EpisodeStore
from acrlpd.data.view import normalize as norm
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import DeltaActions
from acrlpd.types import Episode

STATS = NormStats(
    mean=np.array([1.0, 2.0]), std=np.array([0.5, 4.0]), q01=np.array([-1.0, 0.0]), q99=np.array([3.0, 10.0])
)


def exact(values):
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0).astype(np.float64)
    return NormStats(values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64), q01, q99)


def test_formulas_by_hand():
    x = np.array([[2.0, 10.0]])
    np.testing.assert_allclose(norm.normalize(x, STATS, quantiles=False), [[1 / 0.500001, 8 / 4.000001]])
    np.testing.assert_allclose(norm.normalize(x, STATS, quantiles=True), [[6 / 4.000001 - 1, 20 / 10.000001 - 1]])


def test_values_outside_the_quantiles_are_not_clipped():
    assert norm.normalize(np.array([7.0]), STATS, quantiles=True) > 2.9


@pytest.mark.parametrize("quantiles", [False, True])
def test_inverse_for_any_leading_axes(quantiles):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2))
    there = norm.normalize(x, STATS, quantiles=quantiles)
    np.testing.assert_allclose(norm.unnormalize(there, STATS, quantiles=quantiles), x, atol=1e-12)
    np.testing.assert_array_equal(norm.normalize(x[1, 2, 3], STATS, quantiles=quantiles), there[1, 2, 3])


@pytest.mark.parametrize("quantiles", [False, True])
def test_statistics_are_cut_to_a_narrow_vector(quantiles):
    narrow = norm.normalize(np.array([2.0]), STATS, quantiles=quantiles)
    np.testing.assert_array_equal(narrow, norm.normalize(np.array([2.0, 0.0]), STATS, quantiles=quantiles)[:1])
    back = norm.unnormalize(narrow, STATS, quantiles=quantiles)
    np.testing.assert_allclose(back, [2.0])


def test_padding_on_the_way_back():
    x = np.array([0.0, 0.0, 5.0])
    assert norm.unnormalize(x, STATS, quantiles=False)[2] == 5.0 * (1 + 1e-6)
    assert norm.unnormalize(x, STATS, quantiles=True)[2] == 5.0


def test_quantiles_are_asked_for_but_missing():
    with pytest.raises(ValueError, match="no q01 and q99"):
        norm.normalize(np.zeros(2), NormStats(STATS.mean, STATS.std), quantiles=True)


def test_file_round_trip(tmp_path):
    stats = {"state": STATS, "actions": NormStats(np.array([0.1]), np.array([np.float64(1) / 3]))}
    path = tmp_path / "assets/some/robot/norm_stats.json"
    norm.save(path, stats)
    assert json.loads(path.read_text())["norm_stats"]["actions"] == {
        "mean": [0.1], "std": [1 / 3], "q01": None, "q99": None
    }  # fmt: skip
    for place in (path, path.parent):
        again = norm.load(place)
        assert list(again) == ["state", "actions"]
        np.testing.assert_array_equal(again["state"].q99, STATS.q99)
        np.testing.assert_array_equal(again["actions"].std, [1 / 3])
        assert again["actions"].q01 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ('{"state": {}}', "KeyError"),
        ('{"norm_stats": {"state": {"mean": [1.0]}}}', "std"),
        ('{"norm_stats": {"state": {"mean": [1.0], "std": [1.0, 2.0]}}}', "same length"),
        ('{"norm_stats": {"state": {"mean": ["x"], "std": [1.0]}}}', "could not convert"),
        ('{"norm_stats": {"state": {"mean": [0, NaN], "std": [1, 1]}}}', "state: mean must be finite, .* dimension 1"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [Infinity]}}}', "state: std must be finite, .* dimension 0"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [-1]}}}', "state: std must not be negative"),
        (
            '{"norm_stats": {"actions": {"mean": [0], "std": [1], "q01": [1], "q99": [-1]}}}',
            "actions: q01 exceeds q99 in dimension 0",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "norm_stats.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"norm_stats.json: .*{message}"):
        norm.load(path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no normalization statistics at .*norm_stats.json"):
        norm.load(tmp_path)


def test_running_statistics_agree_with_exact_ones():
    values = np.random.default_rng(0).normal(size=(5000, 3)) * [1.0, 10.0, 0.01] + [0.0, 5.0, -1.0]
    running = statistics.RunningStats()
    for part in np.split(values, [10, 700, 3001]):
        running.update(part[None])
    result, true = running.result(), exact(values)
    np.testing.assert_allclose(result.mean, true.mean, atol=1e-12)
    np.testing.assert_allclose(result.std, true.std, rtol=1e-9)
    for name in ("q01", "q99"):
        np.testing.assert_allclose(getattr(result, name), getattr(true, name), atol=0.05 * true.std.max(), rtol=0.05)


def test_running_statistics_of_too_little_or_changing_data():
    running = statistics.RunningStats()
    running.update(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        running.result()
    with pytest.raises(ValueError, match="3 dimensions, expected 2"):
        running.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        statistics.from_sources([OneEpisode(np.zeros((1, 2)))])


def test_floor_widens_still_dimensions_and_names_them():
    stats = NormStats(
        mean=np.array([0.0, 5.0, 0.0]),
        std=np.array([1.0, 0.0, 0.2]),
        q01=np.array([-2.0, 5.0, 0.0]),
        q99=np.array([2.0, 5.0, 0.0]),  # the last one moves, but in fewer than one step in a hundred
    )
    with pytest.warns(UserWarning, match=r"actions: 2 of 3 dimensions \(1-2\) hardly or rarely move"):
        floored = statistics.with_floor(stats, "actions", min_std=0.1)
    np.testing.assert_array_equal(floored.std, [1.0, 0.1, 0.2])
    np.testing.assert_allclose(floored.q01, [-2.0, 4.9, -0.1])
    np.testing.assert_allclose(floored.q99, [2.0, 5.1, 0.1])
    np.testing.assert_array_equal(floored.mean, stats.mean)


def rarely_closed(rng):
    return (np.arange(3000) % 250 == 0).astype(np.float32)  # 0.4 % of the rows


def rarely_closed_and_noisy(rng):
    return rarely_closed(rng) + 0.003 * rng.normal(size=3000).astype(np.float32)


def with_one_outlier_alone(rng):
    return np.where(np.arange(3000) == 7, -50.0, 3.7).astype(np.float32)


def rows_of(state, key):
    return state if key in ("state", "actions") else np.zeros(len(state), bool if key == "terminals" else np.float32)


class OneEpisode:
    """A source of one, for statistics an episode at a time."""

    num_episodes = 1

    def __init__(self, state):
        self.state = state
        self.lengths = np.array([len(state)])

    def info(self, index):
        return EpisodeInfo(len(self.state), "lift", False, "")

    def window(self, index, key, start, stop):
        return rows_of(self.state, key)[start:stop]


def streamed(source, **options):
    return statistics.from_sources([source], **options)


@pytest.mark.parametrize("quantiles", [False, True])
@pytest.mark.parametrize("column", [rarely_closed, rarely_closed_and_noisy, with_one_outlier_alone])
def test_what_rarely_moves_is_not_blown_up(column, quantiles):
    """No value of the data is normalized to more than 10; the ordinary dimension beside it keeps its numbers."""
    rng = np.random.default_rng(0)
    state = np.stack([rng.normal(size=3000).astype(np.float32), column(rng)], axis=1)
    episode = Episode(state, state, np.zeros(3000, np.float32), np.zeros(3000, bool), task="lift")
    for make, source in ((statistics.from_store, EpisodeStore.from_episodes([episode])), (streamed, OneEpisode(state))):
        with pytest.warns(UserWarning, match=r"state: 1 of 2 dimensions \(1\) hardly or rarely move"):
            stats = make(source)["state"]
        values = norm.normalize(state, stats, quantiles=quantiles)
        assert (
            1.0
            < np.abs(values[:, 1]).max()
            <= (statistics.MAX_NORMALIZED if quantiles or column is rarely_closed else 16)
        )
        true = exact(state)
        np.testing.assert_allclose([stats.std[0], stats.q01[0]], [true.std[0], true.q01[0]], atol=0.01)
        bare = make(source, min_std=0.0)["state"]
        np.testing.assert_allclose(bare.std, true.std, rtol=1e-5)


@pytest.mark.parametrize("fault", [50.0, 1e3, 1e6, 1e9, 1e15])
@pytest.mark.parametrize("make", [statistics.from_store, streamed])
def test_a_faulty_value_neither_moves_the_quantiles_nor_hides_the_others(make, fault):
    rng = np.random.default_rng(0)
    state = rng.normal(size=(3000, 1)).astype(np.float32)
    clean = exact(state)
    state[7] = fault
    episode = Episode(state, state, np.zeros(3000, np.float32), np.zeros(3000, bool), task="lift")
    source = EpisodeStore.from_episodes([episode]) if make is statistics.from_store else OneEpisode(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats = make(source)["state"]
    told = [str(warning.message) for warning in caught if str(warning.message).startswith("state")]
    assert [message[:70] for message in told] == [
        "state: 1 of 1 dimensions (0) have a few values more than 100 times as "
    ] * (fault >= 1e3)
    np.testing.assert_allclose([stats.q01, stats.q99], [clean.q01, clean.q99], atol=0.1)


def test_floor_leaves_moving_dimensions_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        floored = statistics.with_floor(STATS, "state")
    np.testing.assert_array_equal(floored.std, STATS.std)
    np.testing.assert_array_equal(floored.q01, STATS.q01)


def test_formulas_put_no_floor():
    still = NormStats(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1))
    assert norm.normalize(np.ones(1), still, quantiles=False) == pytest.approx(1e6)


@pytest.mark.parametrize("quantiles", [False, True])
def test_bounds_map_to_one(quantiles):
    low, high = np.array([-1.0, -0.05, 0.0]), np.array([1.0, 0.05, 200.0])
    stats = statistics.bounds_stats(low, high)
    np.testing.assert_allclose(norm.normalize(low, stats, quantiles=quantiles), -np.ones(3), atol=1e-9)
    np.testing.assert_allclose(norm.normalize(high, stats, quantiles=quantiles), np.ones(3), atol=1e-9)
    np.testing.assert_allclose(norm.unnormalize(np.zeros(3), stats, quantiles=quantiles), (low + high) / 2, atol=1e-6)


@pytest.mark.parametrize("high", [[1.0, 0.0], [1.0, np.inf]])
def test_bounds_must_be_bounds(high):
    with pytest.raises(ValueError, match="bounds must be finite"):
        statistics.bounds_stats(np.zeros(2), np.array(high))


def make_store(lengths):
    rng = np.random.default_rng(0)
    return EpisodeStore.from_episodes(
        Episode(
            state=rng.normal(size=(n, 2)),
            actions=rng.normal(size=(n, 2)),
            rewards=np.zeros(n),
            terminals=np.zeros(n, bool),
            task="lift",
        )
        for n in lengths
    )


class Blocks(OneEpisode):
    """As many episodes as there are parts of the state."""

    def __init__(self, parts):
        self.parts, self.lengths, self.num_episodes = parts, np.array([len(part) for part in parts]), len(parts)

    def info(self, index):
        return EpisodeInfo(len(self.parts[index]), "lift", False, "")

    def window(self, index, key, start, stop):
        return rows_of(self.parts[index], key)[start:stop]


@pytest.mark.parametrize("num", [2, 3, 50, 99, 100, 101, 102, 149, 251, 3000, 12_345])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
def test_one_pass_finds_numpys_quantiles_in_memory_and_by_parts(monkeypatch, num, scale):
    """Bit for bit, also where the outermost values are looked for many times on the way."""
    monkeypatch.setattr(statistics, "SORTED_AT_ONCE", 16)
    rng = np.random.default_rng(num)
    values = (rng.normal(size=(num, 3)) * scale + [0.0, 7.0, -1e3]).astype(np.float32)
    values[:, 2] = np.round(values[:, 2])  # many equal ones
    true = exact(values)
    for cuts in ([], sorted(rng.integers(1, num, size=5))):
        parts = Blocks([part for part in np.split(values, cuts) if len(part)])
        found = statistics.from_sources([parts], min_std=0.0)["state"]
        np.testing.assert_array_equal(found.q01, true.q01)
        np.testing.assert_array_equal(found.q99, true.q99)
        np.testing.assert_allclose(found.mean, true.mean, rtol=1e-12, atol=1e-12 * scale)
        np.testing.assert_allclose(found.std, true.std, rtol=1e-9)
    in_memory = statistics.from_store(EpisodeStore.from_episodes([_episode(values)]), min_std=0.0)["state"]
    for name, value in vars(true).items():
        np.testing.assert_array_equal(getattr(in_memory, name), value)


@pytest.mark.parametrize(("share", "is_low"), [(0.005, False), (0.0231, True), (0.47, True)])
def test_weights_decide_which_values_are_the_outermost(share, is_low):
    """300 rows lie below 1000 others; whether q01 is one of them depends on the weight that they have together."""
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(300, 1)).astype(np.float32) - 100, rng.normal(size=(1000, 1)).astype(np.float32)
    found = statistics.from_sources([Blocks([few]), Blocks([many])], (share, 1 - share), min_std=0.0)["state"]
    weights = np.repeat([share / 300, (1 - share) / 1000], [300, 1000])
    true = np.quantile(np.concatenate([few, many]), [0.01, 0.99], 0, weights=weights, method="inverted_cdf")
    np.testing.assert_array_equal([found.q01, found.q99], true)
    assert (found.q01 < -90) == is_low


def _episode(state):
    length = len(state)
    return Episode(state, state, np.zeros(length, np.float32), np.zeros(length, bool), task="lift")


def test_from_store_is_exact():
    store = make_store([100, 60])
    stats = statistics.from_store(store)
    np.testing.assert_allclose(stats["state"].mean, store.state.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["actions"].std, store.actions.astype(np.float64).std(0), rtol=1e-6)
    np.testing.assert_allclose(stats["actions"].q99, np.quantile(store.actions, 0.99, axis=0), rtol=1e-6)


def test_from_store_takes_transformed_chunks_with_repeated_actions():
    store = make_store([300, 2])
    horizon = 3
    deltas = []
    for episode in (store.episode(0), store.episode(1)):
        for t in range(len(episode)):
            for k in range(horizon):
                action = episode.actions[min(t + k, len(episode) - 1)].copy()
                action[0] -= episode.state[t, 0]
                deltas.append(action)
    stats = statistics.from_store(store, DeltaActions((True,)), horizon=horizon)
    np.testing.assert_allclose(stats["actions"].mean, np.mean(deltas, axis=0, dtype=np.float64), atol=1e-7)
    np.testing.assert_allclose(stats["actions"].q01, np.quantile(deltas, 0.01, axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["state"].std, store.state.std(0, dtype=np.float64), rtol=1e-6)


@pytest.fixture
def golden(shared):
    return np.load(shared / "golden/functions.npz")


def golden_stats(golden):
    return NormStats(*(golden[f"stats/{name}"] for name in ("mean", "std", "q01", "q99")))


@pytest.mark.golden
def test_running_statistics_are_openpis(golden):
    running = statistics.RunningStats()
    for key in sorted(key for key in golden.files if key.startswith("stats/batch_")):
        running.update(golden[key])
    result = running.result()
    for name in ("mean", "std", "q01", "q99"):
        np.testing.assert_allclose(getattr(result, name), golden[f"stats/{name}"], rtol=1e-6, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "quantiles"), [("zscore", False), ("quantile", True)])
def test_formulas_are_openpis(golden, name, quantiles):
    stats, x = golden_stats(golden), golden["normalize/x"]
    for value, key in (
        (x[0], "state"),
        (x, "actions"),
        (x[:, : golden[f"normalize/{name}_narrow"].shape[-1]], "narrow"),
    ):
        expected = golden[f"normalize/{name}_{key}"]
        result = norm.normalize(value, stats, quantiles=quantiles)
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
        assert result.dtype == expected.dtype
    result = norm.unnormalize(golden[f"unnormalize/{name}_in"], stats, quantiles=quantiles)
    np.testing.assert_allclose(result, golden[f"unnormalize/{name}_out"], rtol=1e-6, atol=1e-6)
    assert result.dtype == golden[f"unnormalize/{name}_out"].dtype


@pytest.mark.golden
def test_file_is_openpis(shared, tmp_path):
    original = shared / "golden/norm_stats_example.json"
    stats = norm.load(original)
    norm.save(tmp_path / "norm_stats.json", stats)
    text = (tmp_path / "norm_stats.json").read_text()
    assert json.loads(text) == json.loads(original.read_text())
    # line by line the same layout; a number may be written otherwise (3e-05 for 0.00003)
    layout = [line[: len(line) - len(line.lstrip())] for line in original.read_text().splitlines()]
    assert [line[: len(line) - len(line.lstrip())] for line in text.splitlines()] == layout
