"""BLEU and chrF against sacrebleu on the same texts, and BLEU of resamples from counts per sentence."""

import numpy as np
import pytest

from adalora_fast.experiments.metrics import bootstrap, translation
from adalora_fast.experiments.metrics.bootstrap import draw_counts, interval, resampled, statistic
from adalora_fast.experiments.metrics.translation import chrf, chrf_of_sums, chrf_statistics
from tests.helpers.mbart import needs_pairs, pairs, real_pairs

sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (the experiments extra)")


def spoiled(references, seed=0):
    """Translations that lack some words and have others in another order; some are empty, some right."""
    generator = np.random.default_rng(seed)
    texts = []
    for number, reference in enumerate(references):
        words = [word for word in reference.split() if generator.random() < 0.85]
        if number % 3 == 1:
            generator.shuffle(words)
        texts.append("" if number % 11 == 10 else " ".join(words) if number % 4 else reference)
    return texts


def examples():
    references = pairs(40)[1] + ["", "Da.", "pâine, supă (și ceai) la 12:30 - 3,5%"]
    return [*spoiled(references[:40]), "prea mult", "", "pâine, supă și ceai la 12:30 - 3,5 %"], references


def test_scores_are_those_of_sacrebleu():
    texts, references = examples()
    bleu, chrf = translation.bleu(texts, references), translation.chrf(texts, references)
    assert bleu == sacrebleu.corpus_bleu(texts, [references]).score / 100 and 0.2 < bleu < 0.9
    assert chrf == sacrebleu.corpus_chrf(texts, [references]).score / 100 and 0.2 < chrf < 0.95


def test_the_counts_add_up_to_the_score():
    texts, references = examples()
    counts = translation.bleu_statistics(texts, references)
    assert counts.shape == (43, 10) and counts.dtype == np.int64
    whole = sacrebleu.corpus_bleu(texts, [references])
    total = counts.sum(axis=0)
    assert total.tolist() == [whole.sys_len, whole.ref_len, *whole.counts, *whole.totals]
    assert translation.bleu_of_sums(total[None])[0] == pytest.approx(whole.score / 100, rel=1e-14)


def test_every_resample_has_the_score_of_its_texts():
    texts, references = examples()
    statistics = translation.bleu_statistics(texts, references)
    counts = draw_counts(43, 25, np.random.default_rng(1))
    counts[0] = 0  # the right ones alone, far from them, nothing but an empty translation
    counts[0, 0] = counts[1:3] = 0
    counts[0, 0], counts[1, 41], counts[2, 10] = 3, 1, 2
    expected = []
    for row in counts:
        drawn = np.repeat(np.arange(43), row)
        own = [[column[i] for i in drawn] for column in (texts, references)]
        expected.append(sacrebleu.corpus_bleu(own[0], [own[1]]).score / 100)
    np.testing.assert_allclose(statistic("bleu")(None, statistics, counts), expected, rtol=1e-13)
    assert expected[0] == pytest.approx(1) and expected[1] == expected[2] == 0


@pytest.mark.parametrize(
    ("text", "reference"),
    [("unu doi", "unu doi"), ("a b c d e", "a b x d e"), ("a b c d", "d c b a"), ("a b c d e", "x a y")],
)
def test_smoothing_and_short_texts(text, reference):
    counts = translation.bleu_statistics([text], [reference])
    expected = sacrebleu.corpus_bleu([text], [[reference]]).score / 100
    assert translation.bleu_of_sums(counts)[0] == pytest.approx(expected, rel=1e-13, abs=1e-15)


def test_equal_texts_are_one_and_not_more():
    _, references = pairs(8)
    assert translation.bleu(references, references) == translation.chrf(references, references) == 1.0


def test_intervals_and_several_runs():
    _, references = examples()
    runs = np.stack(
        [translation.bleu_statistics(spoiled(references, seed), references) for seed in (1, 2, 3)]
    )
    counts = draw_counts(43, 7, np.random.default_rng(0))
    values = resampled("bleu", None, runs, counts)
    assert values.shape == (3, 7)
    np.testing.assert_array_equal(values[1], resampled("bleu", None, runs[1], counts))
    found = interval("bleu", None, runs[0], resamples=200)
    assert found.value == pytest.approx(translation.bleu(spoiled(references, 1), references))
    assert found.low < found.value < found.high


@needs_pairs
def test_real_sentences():
    english, romanian = real_pairs(0, 100)
    texts = spoiled(romanian)
    counts = translation.bleu_statistics(texts, romanian)
    expected = sacrebleu.corpus_bleu(texts, [romanian]).score / 100
    assert translation.bleu(texts, romanian) == expected
    assert translation.bleu_of_sums(counts.sum(axis=0)[None])[0] == pytest.approx(expected, rel=1e-13)
    assert translation.bleu(english, romanian) < 0.1


@pytest.mark.parametrize("function", [translation.bleu, translation.chrf, translation.bleu_statistics])
def test_texts_that_do_not_match(function, monkeypatch):
    with pytest.raises(ValueError, match="1 translations do not match 2 references; give one for each"):
        function(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="there are no translations; a metric needs at least one"):
        function([], [])
    monkeypatch.setattr(translation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"by sacrebleu, which is not installed; .* pip install 'adalora_fas"
    ):
        function(["a"], ["a"])


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.ones(10), r"shape \(10,\) and dtype float64 are no counts of sentences; give \[sentences, 10\]"),
        (np.ones((3, 9)), r"shape \(3, 9\)"),
        (np.empty((0, 10)), "there are no sentences"),
        (-np.ones((2, 10)), "a count of a sentence is negative or not a number"),
        (np.full((2, 10), np.nan), "negative or not a number"),
    ],
)
def test_counts_that_are_none(values, error):
    with pytest.raises(ValueError, match=error):
        bootstrap.statistic("bleu")(None, values, np.ones((1, len(values)), int))


def test_chrf_from_sums_over_sentences():
    """That of sacrebleu for the whole and for any resample, empty texts and short ones included."""
    texts = ["luna veche", "", "supa  caldă și nouă", "a", "steaua", "ab", "pâinea este mică"]
    references = ["luna este veche", "supa", "supa caldă și nouă", "", "luna", "abc", "pâinea a fost mică"]
    counts = chrf_statistics(texts, references)
    assert counts.shape == (7, 18)
    generator = np.random.default_rng(0)
    for rows in [list(range(7)), [1], [3], [1, 3], *generator.integers(0, 7, (30, 5)).tolist()]:
        expected = chrf([texts[row] for row in rows], [references[row] for row in rows])
        assert chrf_of_sums(counts[rows].sum(axis=0)[None])[0] == pytest.approx(expected, abs=1e-12)


def test_an_interval_of_chrf():
    texts, references = ["luna veche", "supa rece", "steaua"] * 5, ["luna este veche", "supa", "steaua"] * 5
    found = interval("chrf", None, chrf_statistics(texts, references))
    assert found.value == pytest.approx(chrf(texts, references), abs=1e-12)
    assert 0 < found.low < found.value < found.high <= 1
    with pytest.raises(ValueError, match=r"give \[sentences, 18\], as chrf_statistics makes them"):
        interval("chrf", None, np.ones((3, 10)))
