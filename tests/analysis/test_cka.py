"""CKA against its definition, what it must not see, and batches against the whole."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.analysis.cka import MinibatchCKA, cka_matrix, hsic, linear_cka


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def by_centring_matrix(X, Y):
    """tr(KHLH) / √(tr(KHKH) tr(LHLH)) with H = I − 11ᵀ/N, as HSIC is written in the first papers."""
    H = np.eye(len(X)) - 1 / len(X)
    K, L = X @ X.T, Y @ Y.T
    return np.trace(K @ H @ L @ H) / np.sqrt(np.trace(K @ H @ K @ H) * np.trace(L @ H @ L @ H))


def by_features(X, Y):
    """‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred columns."""
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return np.linalg.norm(X.T @ Y) ** 2 / (np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y))


def by_traces(X, Y):
    """HSIC₁ as Song et al. write it."""
    n, K, L = len(X), X @ X.T, Y @ Y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    total = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (total - 2 * (one @ K @ L @ one) / (n - 2)) / (n * (n - 3))


@pytest.mark.parametrize(("rows", "width", "other"), [(5, 9, 12), (60, 7, 3), (33, 33, 33), (2, 4, 1)])
def test_the_formula(rows, width, other):
    X, Y = random(rows, width) + 3, random(rows, other, seed=1)
    Y[:, 0] += 2 * X[:, 0]
    expected = by_centring_matrix(X, Y)
    assert linear_cka(X, Y) == pytest.approx(expected, rel=1e-12)
    assert by_features(X, Y) == pytest.approx(expected, rel=1e-12)
    matrix = cka_matrix([X, X[:, :1]], [Y, X])
    assert matrix[0] == pytest.approx([expected, 1.0], rel=1e-12)
    assert matrix[1, 0] == pytest.approx(by_centring_matrix(X[:, :1], Y), rel=1e-12)


def test_identical_and_unrelated():
    X = random(40, 8).astype(np.float32)
    assert linear_cka(X, X) == pytest.approx(1.0, abs=1e-15)
    assert linear_cka(random(5000, 3), random(5000, 3, seed=1)) < 0.01
    # Columns that are orthogonal to each other's, and centred.
    assert linear_cka([[1.0], [-1], [1], [-1]], [[1.0], [1], [-1], [-1]]) == 0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(3, 30),
    width=st.integers(1, 12),
    scale=st.sampled_from([1e-150, 1e-20, 0.3, -2.0, 1e20, 1e150]),
    shift=st.floats(-100, 100),
)
def test_orthogonal_transforms_scales_and_shifts_do_not_matter(seed, rows, width, scale, shift):
    X, Y = random(rows, width, seed=seed), random(rows, 5, seed=seed + 1)
    Q, _ = np.linalg.qr(random(width, width, seed=seed + 2))
    before, after = linear_cka(X, Y), linear_cka(scale * (X @ Q + shift), Y)
    assert after == pytest.approx(before, rel=1e-9, abs=1e-12)
    assert 0 <= after <= 1 and linear_cka(Y, X) == pytest.approx(before, abs=1e-12)


def test_other_transforms_matter():
    X = random(30, 4)
    assert linear_cka(X, X * [100, 1, 1, 1]) < 0.8


def test_hsic_is_the_unbiased_one():
    X, Y = random(9, 4) + 1, random(9, 6, seed=1) - 2
    assert hsic(X, Y) == pytest.approx(by_traces(X, Y), rel=1e-10)


def test_batches_equal_the_whole_in_expectation():
    """The mean of HSIC₁ over all batches of 4 of 8 rows is HSIC₁ of the 8 rows, so the ratio is too."""
    Xs = [random(8, 3), random(8, 5, seed=1)]
    Ys = [Xs[0] + 0.5 * random(8, 3, seed=2)]
    estimate = MinibatchCKA()
    for batch in combinations(range(8), 4):
        estimate.update([X[list(batch)] for X in Xs], [Y[list(batch)] for Y in Ys])
    expected = [[by_traces(X, Y) / np.sqrt(by_traces(X, X) * by_traces(Y, Y)) for Y in Ys] for X in Xs]
    np.testing.assert_allclose(estimate.value(), expected, rtol=1e-10)


def test_batches_of_much_data_are_near_the_plain_value():
    X = random(4000, 6)
    Y = np.tanh(X @ random(6, 5, seed=1)) + 0.5 * random(4000, 5, seed=2)
    estimate = MinibatchCKA()
    for start in range(0, 4000, 50):
        estimate.update([X[start : start + 50]], [Y[start : start + 50]])
    assert estimate.value()[0, 0] == pytest.approx(linear_cka(X, Y), abs=0.01)


def test_refused():
    X = random(6, 2)
    for bad, match in (
        (X[:5], "5 and 6 rows"),
        (X[0], "shape"),
        (X[:1], "shape"),
        (np.full((6, 2), 7.5), "same for all rows"),
        (np.zeros((6, 2)), "same for all rows"),
        (np.where(X > 0, X, np.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_cka(bad, X)
    with pytest.raises(ValueError, match="3 rows is too small"):
        MinibatchCKA().update([X[:3]], [X[:3]])
    with pytest.raises(ValueError, match="no batch"):
        MinibatchCKA().value()
    estimate = MinibatchCKA()
    estimate.update([np.ones((6, 2))], [X])
    with pytest.raises(ValueError, match="same for all rows"):
        estimate.value()
