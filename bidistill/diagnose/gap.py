"""How far apart two sets of hidden states are, in three measures, and how sure that is.

All three are means over points or pairs of points, so they take a weight for each point. The
estimate has weights of one, a bootstrap draw says how often each point was drawn, and a
permutation moves points to the other role:

.. code-block:: text

    MMD^2     = u(a, a) + u(b, b) - 2 u(a, b)     u: mean kernel over pairs of different points
    centroid  = the same with the kernel x.y, whose square root is |mean a - mean b|, in units of
                the spread inside a role; sampling noise does not make it larger
    A-distance= 2 (1 - 2 err), err of a linear classifier on points it was not trained on, the mean
                of both roles' errors: 0 where they cannot be told apart, 2 where always

A point that is drawn twice is not paired with itself, which keeps the draws as unbiased as the
estimate. The forms that a pair of roles is measured in share their draws: the same items are drawn
in each, so the interval of a difference between two forms is that of paired data.

Legend: n points of both roles together, H hidden width, S draws; a and b are weights of the points
of the one and of the other role, zero for those of the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

MEASURES = ("mmd2", "a_distance", "centroid")
DRAWS = 999
"""Bootstrap draws, and permutations."""
FOLDS, REPEATS = 5, 4
"""Of the cross-validation; each repeat deals the folds anew."""
PENALTY = 0.01
"""Inverse strength of the classifier's penalty (scikit-learn's C): there are more coordinates than
points. The same for every form, so that they compare."""
LOW, HIGH = 2.5, 97.5
"""Percentiles that bound an interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def direction(self) -> str:
        """Of a difference: ``smaller``, ``larger``, or ``unclear`` if the interval holds zero."""
        if self.high < 0:
            return "smaller"
        return "larger" if self.low > 0 else "unclear"


@dataclass(frozen=True, slots=True)
class Gap:
    """What lies between two roles in one form."""

    mmd2: Estimate
    a_distance: Estimate
    centroid: Estimate
    p_value: float
    """Share of permutations of the roles whose MMD^2 is at least as large."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two roles in several forms."""

    gaps: dict[str, Gap]
    changes: dict[tuple[str, str], dict[str, Estimate]]
    """By two forms, the first before the second: each measure's second value less its first."""


def median_distance2(states: Float64[np.ndarray, "n H"]) -> float:
    """Median squared distance between two different points: the width of the kernel.

    Example:
        >>> median_distance2(np.array([[0.0], [1.0], [3.0]]))
        4.0
    """
    squares = _distances2(states)
    return float(np.median(squares[np.triu_indices_from(squares, 1)]))


def compare(
    forms: Mapping[str, tuple[Float64[np.ndarray, "a H"], Float64[np.ndarray, "b H"]]],
    widths: Mapping[str, float],
    seed: int,
) -> Comparison:
    """Measure the gap between two roles in every form, and how it changes from form to form.

    Args:
        forms: by name, the states of the one and of the other role; row i of a role is the same
            item in every form. At least two points a role.
        widths: by form, `median_distance2` of what the gaps of this form are to compare with.
        seed: of draws, permutations and folds.

    Returns:
        Gaps with intervals; and the changes from each form to each later one.
    """
    count_a, count_b = map(len, next(iter(forms.values())))
    a, b = _bootstrap(count_a, count_b, seed)
    draws: dict[str, dict[str, np.ndarray]] = {}
    gaps = {}
    for name, (first, second) in forms.items():
        states = np.concatenate([first, second])
        kernel = np.exp(-_distances2(states) / (2 * max(widths[name], np.finfo(float).tiny)))
        wrong = _mistakes(states, count_a, seed)
        draws[name] = {
            "mmd2": mmd2(kernel, a, b),
            "a_distance": _a_distance(wrong, a, b),
            "centroid": _centroid(states, a, b),
        }
        p_value = _p_value(kernel, count_a, draws[name]["mmd2"][0], seed)
        gaps[name] = Gap(**{k: _estimate(v) for k, v in draws[name].items()}, p_value=p_value)
    names = list(forms)
    changes = {
        (old, new): {k: _estimate(draws[new][k] - draws[old][k]) for k in MEASURES}
        for i, old in enumerate(names)
        for new in names[i + 1 :]
    }
    return Comparison(gaps, changes)


def mmd2(
    kernel: Float64[np.ndarray, "n n"],
    a: Float64[np.ndarray, "S n"],
    b: Float64[np.ndarray, "S n"],
) -> Float64[np.ndarray, " S"]:
    """Unbiased squared maximum mean discrepancy, one for each row of weights."""
    return _mean(kernel, a, a) + _mean(kernel, b, b) - 2 * _mean(kernel, a, b)


def _mean(kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> Float64[np.ndarray, " S"]:
    """Weighted mean of the kernel over pairs of different points."""
    same = a * b
    total = ((a @ kernel) * b).sum(1) - same @ kernel.diagonal()
    return total / (a.sum(1) * b.sum(1) - same.sum(1))


def _centroid(states: np.ndarray, a: np.ndarray, b: np.ndarray) -> Float64[np.ndarray, " S"]:
    """Distance of the means over the root mean square distance of a point from its own mean."""
    centred = states - states.mean(0)
    products = centred @ centred.T
    spreads = [
        w @ products.diagonal() / w.sum(1) - _mean(products, w, w)  # unbiased, as the distance is
        for w in (a, b)
    ]
    spread2 = np.maximum((spreads[0] + spreads[1]) / 2, np.finfo(float).tiny)
    return np.sqrt(np.maximum(mmd2(products, a, b), 0) / spread2)


def _a_distance(wrong: np.ndarray, a: np.ndarray, b: np.ndarray) -> Float64[np.ndarray, " S"]:
    """From each point's share of mistakes; both roles count alike, however many points they have.

    The draws do not train the classifier again: the interval is that of the test points.
    """
    error = (a @ wrong / a.sum(1) + b @ wrong / b.sum(1)) / 2
    return 2 * (1 - 2 * error)


def _mistakes(states: np.ndarray, count_a: int, seed: int) -> Float64[np.ndarray, " n"]:
    """How often, of all repeats, a classifier that never saw a point takes it for the other role's.

    Logistic regression on standardised coordinates, roles weighted to count alike.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    role = np.arange(len(states)) >= count_a
    folds = min(FOLDS, count_a, len(states) - count_a)
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000)
    )
    wrong = np.zeros(len(states))
    for repeat in range(REPEATS):
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)
        wrong += cross_val_predict(model, states, role, cv=splitter) != role
    return wrong / REPEATS


def _bootstrap(count_a: int, count_b: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of both roles: ones in row 0, then draws with replacement inside each role.

    A draw of one point again and again has no pair to average over; it becomes the whole sample.
    """
    random = np.random.default_rng((seed, 0))
    parts = []
    for count in (count_a, count_b):
        drawn = random.multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)
        drawn[(drawn > 0).sum(1) < 2] = 1
        parts.append(np.concatenate([np.ones((1, count)), drawn]))
    zeros = [np.zeros_like(part) for part in parts]
    return np.hstack([parts[0], zeros[1]]), np.hstack([zeros[0], parts[1]])


def _p_value(kernel: np.ndarray, count_a: int, observed: float, seed: int) -> float:
    """One-sided; the observed assignment counts as one permutation, so it is never zero."""
    random = np.random.default_rng((seed, 1))
    first = np.arange(len(kernel)) < count_a
    a = random.permuted(np.tile(first, (DRAWS, 1)), axis=1).astype(float)
    larger = (mmd2(kernel, a, 1 - a) >= observed).sum()
    return float((1 + larger) / (1 + DRAWS))


def _estimate(draws: np.ndarray) -> Estimate:
    """Row 0 is the value, the others its bootstrap distribution."""
    low, high = np.percentile(draws[1:], (LOW, HIGH))
    return Estimate(float(draws[0]), float(low), float(high))


def _distances2(states: np.ndarray) -> Float64[np.ndarray, "n n"]:
    """Squared distances of all pairs of rows; centred first, which loses fewer digits."""
    centred = states - states.mean(0)
    norms = (centred * centred).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * centred @ centred.T, 0)
