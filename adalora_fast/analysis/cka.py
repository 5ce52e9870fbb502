"""Linear centred kernel alignment (CKA) of representations, in float64.

For X [N, D] and Y [N, E], representations of the same N inputs with their columns centred,

    CKA(X, Y) = ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) = ⟨K, L⟩_F / (‖K‖_F ‖L‖_F)       K = XXᵀ, L = YYᵀ

(Kornblith et al. 2019, equation 5). It is between 0 and 1, and does not change with an orthogonal transform
or a scale of X or of Y. Over batches of n rows it is estimated from unbiased HSIC (Song et al. 2012), after
Nguyen et al. 2021, equations 2 and 3: with K̃ and L̃ those matrices of one batch with a zero diagonal,

    HSIC₁ = [ tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1 / ((n − 1)(n − 2)) − 2 · 1ᵀK̃L̃1 / (n − 2) ] / (n (n − 3))
    CKA   = mean HSIC₁(K, L) / √(mean HSIC₁(K, K) · mean HSIC₁(L, L))

whose means are, over random batches, what HSIC₁ is on all rows. HSIC₁ is an inner product of matrices that
were centred for it (Székely and Rizzo 2014, "U-centred"), which makes all pairs of layers one product here.
"""

from collections.abc import Sequence

import numpy as np

FEWEST_ROWS = 4  # of a batch: HSIC₁ divides by n − 3


def linear_cka(X: np.ndarray, Y: np.ndarray) -> float:
    """CKA(X, Y) of X [N, D] and Y [N, E], any float type.

    Raises:
        ValueError: not two matrices with equally many rows, NaN or infinity, or rows that are all the same.
    """
    return float(cka_matrix([X], [Y])[0, 0])


def cka_matrix(Xs: Sequence[np.ndarray], Ys: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """CKA of every X with every Y, [len(Xs), len(Ys)] float64; Ys of None are the Xs again.

    The same errors as `linear_cka`.
    """
    same = Ys is None
    Xs = [_centred(X) for X in Xs]
    Ys = Xs if same else [_centred(Y) for Y in Ys]
    _check_rows([*Xs, *Ys])
    rows, width = len(Xs[0]), max(values.shape[1] for values in (*Xs, *Ys))
    if rows <= width:
        kernels = [np.stack([(X @ X.T).ravel() for X in each]) for each in ((Xs,) if same else (Xs, Ys))]
        kernels = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in kernels]
        alignment = kernels[0] @ kernels[-1].T
    else:  # many rows: matrices of D × E instead of N × N
        norms = [[np.linalg.norm(X.T @ X) for X in each] for each in (Xs, Ys)]
        alignment = np.array([[np.sum((X.T @ Y) ** 2) for Y in Ys] for X in Xs])
        alignment /= np.outer(*norms)
    # Rounding may leave the range by one unit in the last place.
    return np.clip(alignment, 0.0, 1.0)


class MinibatchCKA:
    """CKA of every X with every Y from batches of rows, which need not be in memory together."""

    def __init__(self) -> None:
        self._sums: list[np.ndarray] = []
        self._batches = 0

    def update(self, Xs: Sequence[np.ndarray], Ys: Sequence[np.ndarray]) -> None:
        """One batch: the same n rows of every representation.

        Raises:
            ValueError: fewer than four rows, or see `linear_cka`.
        """
        rows = {len(values) for values in (*Xs, *Ys)}
        if min(rows) < FEWEST_ROWS:
            raise ValueError(f"a batch of {min(rows)} rows is too small; take {FEWEST_ROWS} or more")
        _check_rows([*Xs, *Ys])
        K, L = (np.stack([_u_centred(values).ravel() for values in each]) for each in (Xs, Ys))
        n = rows.pop()
        each = [K @ L.T, np.sum(K**2, axis=1), np.sum(L**2, axis=1)]
        each = [value / (n * (n - 3)) for value in each]
        self._sums = each if not self._sums else [a + b for a, b in zip(self._sums, each, strict=True)]
        self._batches += 1

    def value(self) -> np.ndarray:
        """[number of Xs, number of Ys] float64. An estimate: it may be a little below 0 or above 1.

        Raises:
            ValueError: no batch yet, or representations in which all rows are the same.
        """
        if not self._batches:
            raise ValueError("there was no batch; give one to update() first")
        cross, own, others = self._sums
        if not (own > 0).all() or not (others > 0).all():
            raise ValueError("a representation is the same for all rows; CKA does not exist there")
        return cross / np.sqrt(np.outer(own, others))


def hsic(X: np.ndarray, Y: np.ndarray) -> float:
    """HSIC₁ of the linear kernels of X [n, D] and Y [n, E], n ≥ 4."""
    n = len(X)
    return float(np.sum(_u_centred(X) * _u_centred(Y)) / (n * (n - 3)))


def _checked(X: np.ndarray) -> np.ndarray:
    values = np.asarray(X, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(
            f"a representation has the shape {values.shape}; give [rows, width], two rows or more"
        )
    if not np.isfinite(values).all():
        raise ValueError("a representation has NaN or infinite numbers; leave out runs that diverged")
    return values


def _centred(X: np.ndarray) -> np.ndarray:
    """Columns with mean 0, and Frobenius norm 1, which CKA does not see and which keeps squares in range."""
    values = _checked(X)
    largest = np.abs(values).max()
    centred = values / (largest or 1.0)
    centred = centred - centred.mean(axis=0)
    norm = np.linalg.norm(centred)
    if norm <= 1e-12 * np.sqrt(values.size):
        raise ValueError("a representation is the same for all rows; CKA does not exist there")
    return centred / norm


def _u_centred(X: np.ndarray) -> np.ndarray:
    """K = XXᵀ with a zero diagonal, and what is left of it off the diagonal when row means are taken out."""
    values = _checked(X)
    values = values - values.mean(axis=0)  # HSIC₁ does not see it; it keeps digits
    n = len(values)
    kernel = values @ values.T
    np.fill_diagonal(kernel, 0.0)
    row = kernel.sum(axis=0) / (n - 2)
    kernel += kernel.sum() / ((n - 1) * (n - 2)) - row[:, None] - row[None, :]
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _check_rows(representations: Sequence[np.ndarray]) -> None:
    rows = sorted({len(values) for values in representations})
    if len(rows) > 1:
        raise ValueError(f"representations have {rows[0]} and {rows[-1]} rows; give the same inputs to each")
