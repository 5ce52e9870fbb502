"""BLEU and chrF of translations, by sacrebleu, and both from counts per sentence, for the bootstrap.

BLEU (Papineni et al., ACL 2002) and chrF are functions of sums over sentences: what a sentence adds to these
sums is enough to evaluate any resample exactly. Everything is in sacrebleu's default form: its
13a tokenisation, case kept, n-grams up to 4, exponential smoothing (signature nrefs:1|case:mixed|eff:no|
tok:13a|smooth:exp; M. Post, WMT 2018), and one reference per sentence.

Shapes: N sentences, B resamples.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4
COLUMNS = 2 + 2 * ORDERS
CHARACTERS = 6  # orders of chrF
BETA = 2  # of chrF: recall counts twice as much


def check_installed() -> None:
    """ValueError where sacrebleu is missing."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError(
            "translations are judged by sacrebleu, which is not installed; install it with: "
            "pip install 'adalora_fast[experiments]'"
        )


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU as a fraction (0.37, not 37): that of sacrebleu's `corpus_bleu`.

    ValueError where there is nothing to evaluate, or the numbers of texts differ.
    """
    _check(translations, references)
    from sacrebleu.metrics import BLEU

    score = BLEU(force=True).corpus_score(translations, [references]).score
    return min(1.0, score / 100)  # equal texts give 100.00000000000004


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 (Popović, WMT 2015) as a fraction: that of sacrebleu's `corpus_chrf`.

    ValueError as `bleu`.
    """
    _check(translations, references)
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(translations, [references]).score / 100


def bleu_statistics(translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What each sentence adds to BLEU: [N, 10] int64.

    The columns are, in words or n-grams of words: length of the translation, length of the reference, n-grams
    that both have for n = 1 … 4, n-grams of the translation for n = 1 … 4. ValueError as `bleu`.
    """
    _check(translations, references)
    from sacrebleu.metrics import BLEU

    # the order decides the score of a sentence, not its counts
    metric = BLEU(force=True, effective_order=True)
    rows = []
    for translation, reference in zip(translations, references, strict=True):
        score = metric.sentence_score(translation, [reference])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.int64)


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU [B] as fractions, float64, from sums of `bleu_statistics` over sentences [B, 10].

    BP · (Π_n p_n)^¼ with BP = min(1, exp(1 − reference length / length)), p_n = common / own n-grams; the
    k-th order without a common n-gram has p_n = 1 / (2ᵏ own n-grams). 0 where nothing is in common, or where
    there is no n-gram of some order.
    """
    sums = np.asarray(sums, dtype=np.float64)
    lengths, references = sums[:, 0], sums[:, 1]
    common, own = sums[:, 2 : 2 + ORDERS], sums[:, 2 + ORDERS :]
    defined = (own > 0).all(axis=1) & (common > 0).any(axis=1)
    smoothed = np.where(common > 0, common, 0.5 ** np.cumsum(common == 0, axis=1))
    precisions = np.divide(smoothed, own, out=np.ones_like(own), where=defined[:, None])
    shortness = np.divide(references, lengths, out=np.ones_like(lengths), where=defined)
    return np.where(defined, np.exp(np.minimum(0.0, 1.0 - shortness) + np.log(precisions).mean(axis=1)), 0.0)


def chrf_statistics(translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What each sentence adds to chrF: [N, 18] int64.

    The columns are, for n-grams of characters without white space, n = 1 … 6: those of the translation (0
    where the reference has none), those of the reference, and those that both have. ValueError as `bleu`.
    """
    _check(translations, references)
    rows = []
    for pair in zip(translations, references, strict=True):
        row: list[int] = []
        for n in range(1, CHARACTERS + 1):
            own, other = (_character_ngrams(text, n) for text in pair)
            row += [own.total() if other else 0, other.total(), (own & other).total()]
        rows.append(row)
    return np.array(rows, dtype=np.int64)


def chrf_of_sums(sums: np.ndarray) -> np.ndarray:
    """chrF2 [B] as fractions, float64, from sums of `chrf_statistics` over sentences [B, 18].

    (1 + β²) P R / (β² P + R), with precision P and recall R as means over the orders of which both sides have
    n-grams; 0 where nothing is in common.
    """
    own, other, common = np.moveaxis(np.asarray(sums, np.float64).reshape(len(sums), CHARACTERS, 3), 2, 0)
    both = (own > 0) & (other > 0)  # [B, orders]
    orders = np.maximum(both.sum(axis=1), 1)
    precision, recall = (
        np.divide(common, total, out=np.zeros_like(total), where=both).sum(axis=1) / orders
        for total in (own, other)
    )
    below = BETA**2 * precision + recall
    return np.divide((1 + BETA**2) * precision * recall, below, out=np.zeros_like(below), where=below > 0)


def _character_ngrams(text: str, n: int) -> Counter[str]:
    text = "".join(text.split())
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def checked_statistics(values: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """`values` as float64 [N, columns], N > 0, no count negative; whole numbers are exact in float64."""
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != columns or array.dtype.kind not in "iuf":
        raise ValueError(
            f"values of shape {array.shape} and dtype {array.dtype} are no counts of sentences; give "
            f"[sentences, {columns}], as {'bleu' if columns == COLUMNS else 'chrf'}_statistics makes them"
        )
    if not len(array):
        raise ValueError("there are no sentences; BLEU and chrF need at least one")
    if not (array >= 0).all():
        raise ValueError("a count of a sentence is negative or not a number; make the counts again")
    return array.astype(np.float64)


def _check(translations: Sequence[str], references: Sequence[str]) -> None:
    check_installed()
    if len(translations) != len(references):
        raise ValueError(
            f"{len(translations)} translations do not match {len(references)} references; give one for each"
        )
    if not len(translations):
        raise ValueError("there are no translations; a metric needs at least one")
