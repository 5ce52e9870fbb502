"""Runs of translation beside each other: contrasts of BLEU, published numbers, maps of ranks."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from adalora_fast.experiments.data.translation import pair_hashes
from adalora_fast.experiments.metrics.translation import bleu, bleu_statistics, chrf
from adalora_fast.experiments.models.families import FAMILIES
from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.contrasts import compare_all
from adalora_fast.experiments.report.examples import task_examples
from adalora_fast.experiments.report.plots import rank_grid
from adalora_fast.experiments.report.sections_results import beside_published, results
from tests.helpers.mbart import pairs
from tests.helpers.sweeps import write_json, write_plan

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (the experiments extra)")

MODEL = "facebook/mbart-large-cc25"


def write_sweep(folder, references, arms, model=MODEL):
    """A sweep whose run of an arm and a seed gave the translations `arms`[arm][seed]."""
    seeds = list(range(len(next(iter(arms.values())))))
    write_plan(folder, tasks=["wmt16_ro_en"], arms=list(arms), seeds=seeds, model=model)
    for arm, by_seed in arms.items():
        for seed, texts in enumerate(by_seed):
            place = folder / "wmt16_ro_en" / f"{arm}-seed{seed}"
            place.mkdir(parents=True)
            scores = {"bleu": bleu(texts, references), "chrf": chrf(texts, references), "loss": 3.0}
            result = {
                "task": "wmt16_ro_en", "model": model, "arm": arm, "seed": seed, "sample": False,
                "primary_metric": "bleu", "primary": scores["bleu"], "metrics": {"validation": scores},
                "trainable_parameters": 1, "total_rank": 1, "train_seconds": 1.0, "seconds": 1.0,
            }  # fmt: skip
            write_json(place / "result.json", result)
            counts = bleu_statistics(texts, references)
            hashes = pair_hashes(pairs(len(references))[0], references)
            arrays = {"validation/bleu_statistics": counts, "validation/pair_hashes": hashes}
            save_file(arrays, place / "predictions.safetensors")
    return folder


def reversed_words(texts, seed):
    return [" ".join(text.split()[seed:][::-1]) for text in texts]


def test_arms_are_compared_by_bleu(tmp_path):
    references = pairs(60)[1]
    worse = [[*reversed_words(references[:40], seed), *references[40:]] for seed in (0, 1, 2)]
    better = [[*references[:seed], "supa", *references[seed + 1 :]] for seed in (0, 1, 2)]
    arms = {"lora-r1": worse, "lora-r4": better}
    sweep = read_sweep(write_sweep(tmp_path / "sweep", references, arms))
    measured = task_examples(sweep, "wmt16_ro_en")
    assert measured.remarks == () and len(measured.values) == 6
    assert all(values.shape == (60,) and np.ptp(values) > 0 for values in measured.values.values())
    contrasts = compare_all(sweep)
    found = contrasts.between("wmt16_ro_en", "lora-r4", "lora-r1")
    expected = 100 * np.mean([bleu(a, references) - bleu(b, references) for a, b in zip(better, worse)])
    assert found.estimate.value == pytest.approx(expected)
    assert 0 < found.estimate.bounds.low < expected < found.estimate.bounds.high and found.seeds == 3
    table = results(sweep, contrasts)
    assert "WMT16 En-Ro BLEU" in table and "WMT16 En-Ro chrF" in table


@pytest.mark.parametrize("model", [MODEL, "facebook/mbart-large-50"])
def test_published_numbers_are_of_one_model(tmp_path, model):
    references = pairs(12)[1]
    arms = {"lora-r4": [references], "full": [references]}
    shown = beside_published(read_sweep(write_sweep(tmp_path / "sweep", references, arms, model)))
    assert "| LoRA r 4 | published | 30.40 |" in shown and "| lora-r4 | here | 100.00 |" in shown
    words = "The published numbers that follow are of mbart-large-cc25, these are of facebook/mbart-large-50"
    assert (words in shown) == (model != MODEL)
    assert ("do not measure the same thing" in shown) == (model != MODEL)
    assert "deberta" not in shown


def test_the_hash_of_a_pair():
    """Whatever the machine: BLAKE2b of both texts with a NUL between them."""
    found = pair_hashes(["the moon", "a", "ab", ""], ["luna știe", "bc", "c", ""])
    assert found.dtype == np.int64 and len(set(found.tolist())) == 4
    for value, text in zip(found.tolist(), ("the moon\0luna știe", "a\0bc", "ab\0c", "\0"), strict=True):
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        assert value == int.from_bytes(digest, "little", signed=True)
    assert pair_hashes([], []).shape == (0,)


def test_runs_on_other_sentences_are_not_compared(tmp_path):
    references = pairs(12)[1]
    folder = write_sweep(tmp_path / "a", references, {"lora-r1": [references], "full": [references]})
    path = folder / "wmt16_ro_en" / "full-seed0" / "predictions.safetensors"
    counts, sources = bleu_statistics(references, references), pairs(12)[0]
    spelled = [*references[:-1], f"{references[-1]}ă"]  # another word, no more words
    for others in ((sources, spelled), (sources[::-1], references), (sources[:11], references[:11])):
        hashes = pair_hashes(*others)  # the counts of words are the same
        arrays = {"validation/bleu_statistics": counts[: len(hashes)], "validation/pair_hashes": hashes}
        save_file(arrays, path)
        with pytest.raises(ValueError, match="were not evaluated on the same rows of validation; evaluate"):
            task_examples(read_sweep(folder), "wmt16_ro_en")
    hashes = pair_hashes(sources, references)
    arrays = {"validation/bleu_statistics": np.ones(12, dtype=np.int64), "validation/pair_hashes": hashes}
    save_file(arrays, path)
    with pytest.raises(ValueError, match=r"full-seed0/predictions\.safetensors.*\(12,\)"):
        task_examples(read_sweep(folder), "wmt16_ro_en")
    save_file({"validation/bleu_statistics": counts}, path)
    with pytest.raises(ValueError, match="has no labels and predictions of validation; delete"):
        task_examples(read_sweep(folder), "wmt16_ro_en")


def test_encoder_and_decoder_have_places_of_their_own_in_a_map():
    suffixes = list(FAMILIES["mbart"].matrices.values())[:8]
    encoder = [f"model.encoder.layers.{i}.{suffix}" for i in range(3) for suffix in suffixes[:4]]
    decoder = [f"model.decoder.layers.{i}.{suffix}" for i in range(3) for suffix in suffixes]
    ranks = {name: rank for rank, name in enumerate([*encoder, *decoder])}
    grid, layers, matrices = rank_grid(ranks)
    assert layers == [0, 1, 2] and len(matrices) == 12 and sorted(grid.ravel()) == sorted(ranks.values())
    assert matrices[:5] == ["query", "key", "value", "attention output", "decoder query"]
    assert grid[2, matrices.index("cross output")] == ranks["model.decoder.layers.2.encoder_attn.out_proj"]
