"""Measures of the gap on clouds whose distance is known."""

import numpy as np
import pytest

import bidistill.diagnose.gap as gap_module
from bidistill.diagnose.gap import Estimate, compare, median_distance2, mmd2

WIDTH = 8


def cloud(seed, count=60, shift=0.0, scale=1.0):
    """Gaussian points; the shift is along the first coordinate."""
    points = np.random.default_rng(seed).normal(scale=scale, size=(count, WIDTH))
    points[:, 0] += shift
    return points


def compared(**forms):
    widths = {name: median_distance2(np.concatenate(pair)) for name, pair in forms.items()}
    return compare(forms, widths, seed=0)


def whole(count_a, count_b):
    """Weights of one for each role, as the estimate has them."""
    a = np.r_[np.ones(count_a), np.zeros(count_b)]
    return a[None], 1 - a[None]


def test_mmd2_is_its_definition():
    """Three double sums, written out."""
    x, y = cloud(1, 7), cloud(2, 5, shift=1)
    k = lambda p, q: float(np.exp(-((p - q) ** 2).sum() / 6))  # noqa: E731
    within = [
        np.mean([k(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j])
        for s in (x, y)
    ]
    expected = sum(within) - 2 * np.mean([k(p, q) for p in x for q in y])
    points = np.concatenate([x, y])
    kernel = np.array([[k(p, q) for q in points] for p in points])
    assert mmd2(kernel, *whole(7, 5)).item() == pytest.approx(expected, abs=1e-14)


def test_a_point_drawn_twice_is_not_paired_with_itself():
    """Roles of the points 0, 0, 1 and 2, 3: within the first, its pairs are 01, 01 alone."""
    kernel = np.array([[9, 2, 3, 4], [2, 9, 5, 6], [3, 5, 9, 7], [4, 6, 7, 9]], float)
    value = mmd2(kernel, np.array([[2.0, 1, 0, 0]]), np.array([[0.0, 0, 1, 1]])).item()
    assert value == pytest.approx(2 + 7 - 2 * (2 * 3 + 2 * 4 + 5 + 6) / 6)


@pytest.fixture
def _no_classifier(monkeypatch):
    """Twenty fits for each pair of clouds are slow, and not every test looks at them."""
    monkeypatch.setattr(gap_module, "_mistakes", lambda states, *_: np.zeros(len(states)))


def test_equal_distributions_have_no_gap():
    """Unbiased: over many pairs of samples the mean is zero, and as many are below it."""
    values = []
    for seed in range(200):
        points = np.concatenate([cloud(2 * seed, 12), cloud(2 * seed + 1, 20)])
        squares = ((points[:, None] - points) ** 2).sum(-1)
        values.append(mmd2(np.exp(-squares / (2 * WIDTH)), *whole(12, 20)).item())
    spread = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * spread
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8


def test_gap_of_equal_clouds():
    gap = compared(only=(cloud(1, 200), cloud(2, 200))).gaps["only"]
    assert abs(gap.mmd2.value) < 0.005
    assert abs(gap.a_distance.value) < 0.4
    assert gap.centroid.value < 0.1
    assert gap.p_value > 0.05


def test_gap_of_shifted_clouds():
    """Twenty standard deviations: always told apart, and the centroids are where they were put."""
    gap = compared(only=(cloud(1, 100), cloud(2, 100, shift=20))).gaps["only"]
    assert gap.a_distance == Estimate(2, 2, 2)
    assert gap.mmd2.value > 0.5
    assert gap.centroid.low < 20 / WIDTH**0.5 < gap.centroid.high
    assert gap.centroid.value == pytest.approx(20 / WIDTH**0.5, rel=0.05)
    assert gap.p_value == pytest.approx(1 / 1000)


@pytest.mark.usefixtures("_no_classifier")
def test_intervals_hold_the_truth_as_often_as_they_say():
    """The distance of a known shift, over fresh samples: 95 %, and no wider than needed."""
    truth, found = 2 / WIDTH**0.5, []
    for seed in range(60):
        pair = cloud(2 * seed, 50), cloud(2 * seed + 1, 40, shift=2)
        found.append(compared(only=pair).gaps["only"].centroid)
    assert sum(e.low < truth < e.high for e in found) >= 52
    width = np.mean([e.high - e.low for e in found])
    assert width == pytest.approx(2 * 1.96 * np.std([e.value for e in found]), rel=0.3)


@pytest.mark.usefixtures("_no_classifier")
def test_p_values_of_equal_clouds_are_spread_evenly():
    values = [
        compared(only=(cloud(2 * seed, 20), cloud(2 * seed + 1, 30))).gaps["only"].p_value
        for seed in range(60)
    ]
    assert np.mean(np.array(values) < 0.2) < 0.4
    assert 0.35 < np.mean(values) < 0.65


def test_units_do_not_matter():
    """Other units or another origin of the same clouds: the same gap."""
    pair = cloud(1), cloud(2, 40, shift=1)
    gap = compared(only=pair).gaps["only"]
    other = compared(only=tuple(1000 * points + 7 for points in pair)).gaps["only"]
    for measure in ("mmd2", "a_distance", "centroid"):
        assert getattr(other, measure).value == pytest.approx(getattr(gap, measure).value, abs=1e-6)


@pytest.mark.parametrize(("shift", "direction"), [(0.5, "smaller"), (8.0, "larger")])
def test_changes(shift, direction):
    first = cloud(1), cloud(2, shift=3)
    second = cloud(1), cloud(2, shift=shift)
    change = compared(raw=first, unified=second).changes["raw", "unified"]
    assert change["mmd2"].direction == direction
    assert change["centroid"].direction == direction


def test_no_change_between_equal_forms():
    pair = cloud(1), cloud(2, shift=1)
    changes = compared(raw=pair, unified=pair).changes["raw", "unified"]
    assert all(change == Estimate(0, 0, 0) for change in changes.values())
    assert all(change.direction == "unclear" for change in changes.values())


def test_paired_items_narrow_the_interval_of_a_change():
    """The same items in another form, against other items of the same distribution."""
    pair = cloud(1), cloud(2, shift=2)
    rest = [points + 0.1 * cloud(9, len(points)) for points in pair]
    other = cloud(3), cloud(4, shift=2)
    width = lambda e: e.high - e.low  # noqa: E731
    paired = compared(raw=pair, unified=tuple(rest)).changes["raw", "unified"]["centroid"]
    loose = compared(raw=pair, unified=other).changes["raw", "unified"]["centroid"]
    assert width(paired) < width(loose) / 3


def test_the_classifier_is_judged_on_points_it_has_not_seen():
    """More coordinates than points: a classifier fits any labels, and learns nothing."""
    noise = np.random.default_rng(0).normal(size=(60, 400))
    gap = compare({"only": (noise[:30], noise[30:])}, {"only": 800.0}, seed=0).gaps["only"]
    assert gap.a_distance.value < 0.6


def test_roles_of_unequal_size_count_alike():
    """Calling every point the larger role's is no skill."""
    gap = compared(only=(cloud(1, 10), cloud(2, 300))).gaps["only"]
    assert abs(gap.a_distance.value) < 0.8


def test_same_seed_same_numbers():
    pair = cloud(1), cloud(2, shift=1)
    assert compared(only=pair) == compared(only=pair)


def test_identical_points_have_no_gap():
    """Nothing to divide by: the width of the kernel and the spread are zero."""
    pair = np.ones((20, WIDTH)), np.ones((20, WIDTH))
    gap = compared(only=pair).gaps["only"]
    assert (gap.mmd2.value, gap.centroid.value, gap.p_value) == (0, 0, 1)
