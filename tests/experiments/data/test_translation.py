"""Translation through the harness: pairs to the Trainer, sentences to BLEU, runs to a comparison."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.data.translation import (
    generation_config,
    load_pairs,
    pair_hashes,
    set_languages,
)
from adalora_fast.experiments.data.workloads import load_workload
from adalora_fast.experiments.metrics.translation import bleu, bleu_of_sums, bleu_statistics
from adalora_fast.experiments.models.encoders import load_model
from adalora_fast.experiments.models.families import locate_matrix
from adalora_fast.experiments.settings.recipes import Recipe, load_recipe
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.experiments.sweep.plan import make_plan
from tests.experiments.run.test_resume import assert_same_run, interrupt
from tests.helpers.mbart import (
    ENGLISH,
    LAYERS,
    ROMANIAN,
    needs_pairs,
    needs_sentencepiece,
    pairs,
    real_pairs,
    save_mbart,
    write_pairs,
)
from tests.helpers.tiny import changed_encoder, write_parquet
from tests.helpers.training_runs import read, train, without_times

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (the experiments extra)")
pytestmark = needs_sentencepiece

TASK = TASKS["wmt16_ro_en"]
RECIPE = Recipe(
    epochs=2, learning_rate=5e-3, batch_size=8, max_length=20, beams=2, init_r=4, target_r=2, scale=4.0,
    tinit=1, tfinal=2, deltaT=1, warmup=0,
)  # fmt: skip
MATRICES = 12 * LAYERS  # four in the encoder's layers, eight in the decoder's
EOS, PAD = 2, 1


@pytest.fixture(scope="module")
def mbart(tmp_path_factory):
    return save_mbart(tmp_path_factory.mktemp("hub") / "mbart-large-cc25")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 pairs to train on and six others, so that an evaluation in batches of four ends with two."""
    english, romanian = pairs(22)
    return write_pairs(
        tmp_path_factory.mktemp("pairs"),
        train=(english[:16], romanian[:16]),
        validation=(english[16:], romanian[16:]),
    )


@pytest.fixture(scope="module")
def run(mbart, data):
    def make(method="adalora", **options):
        values = {"task": "wmt16_ro_en", "model": str(mbart), "data_dir": str(data), "recipe": RECIPE}
        return RunSettings(method=method, **(values | options))

    return make


@pytest.fixture(scope="module")
def adalora(run, tmp_path_factory):
    """Folder of a complete run with an evaluation after each epoch."""
    folder = tmp_path_factory.mktemp("adalora") / "run"
    train(run(), folder)
    return folder


def load(folder, kind="translation", **options):
    return load_model(str(folder), kind=kind, **options)


def test_tokens_of_both_languages(run, mbart):
    work, (_, tokenizer) = load_workload(run()), load(mbart)
    tables = work.prepare(tokenizer, replace(RECIPE, max_length=18))
    assert set(tables) == {"train", "validation"} and len(tables["validation"]) == 6
    split = work.splits["train"]
    for row, english, romanian in zip(tables["train"], split.sources, split.targets, strict=True):
        assert row["input_ids"][-2:] == [EOS, ENGLISH] and row["labels"][-2:] == [EOS, ROMANIAN]
        assert len(row["input_ids"]) <= 18 and len(row["labels"]) <= 18  # some texts are cut
        for ids, text in ((row["input_ids"], english), (row["labels"], romanian)):
            assert text.startswith(tokenizer.decode(ids, skip_special_tokens=True).strip())
    lengths = {len(ids) for ids in tables["train"]["input_ids"]}
    assert max(lengths) == 18 and min(lengths) < 18
    assert tokenizer("the")["input_ids"][-1] == ENGLISH  # texts without a target are sources, also later


def test_a_batch_is_padded_and_the_decoder_starts_from_the_language(run, mbart):
    from transformers import DataCollatorForSeq2Seq
    from transformers.models.mbart.modeling_mbart import shift_tokens_right

    work, (model, tokenizer) = load_workload(run()), load(mbart)
    rows = work.prepare(tokenizer, RECIPE)["train"].to_list()
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    given = shift_tokens_right(batch["labels"], model.config.pad_token_id)
    padded = batch["labels"] == -100
    assert padded.any() and (given[:, 0] == ROMANIAN).all()
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert labels == row["labels"] + [-100] * (len(labels) - len(row["labels"]))
    config = generation_config(tokenizer, RECIPE)
    assert (config.decoder_start_token_id, config.forced_bos_token_id) == (ROMANIAN, None)
    assert (config.num_beams, config.max_length, config.eos_token_id) == (2, 20, EOS)


def test_where_the_language_stands_in_front(mbart, tmp_path):
    """mBART-50: `ro_RO text </s>`, which the decoder is given as `</s> ro_RO text`."""
    from transformers import AutoTokenizer

    folder = changed_encoder(mbart, tmp_path / "fifty")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MBart50Tokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_languages(tokenizer, TASK)
    language = tokenizer.convert_tokens_to_ids("ro_RO")
    assert tokenizer(text_target="luna")["input_ids"][0] == language
    config = generation_config(tokenizer, RECIPE)
    assert (config.decoder_start_token_id, config.forced_bos_token_id) == (EOS, language)


def test_judging_generated_ids(run, mbart):
    """What is generated begins with the language and ends with padding; right sentences get full marks."""
    work, (_, tokenizer) = load_workload(run()), load(mbart)
    work.prepare(tokenizer, RECIPE)
    references = work.splits["validation"].targets
    ids = [[ROMANIAN, *tokenizer(text_target=text)["input_ids"][:-1]] for text in references]
    width = max(map(len, ids)) + 2
    padded = np.array([row + [PAD] + [-100] * (width - len(row) - 1) for row in ids])
    right = work.judge("validation", padded)
    assert right.metrics == {"bleu": 1.0, "chrf": 1.0}
    assert right.answers == {str(row): text for row, text in enumerate(references)}
    wrong = work.judge("validation", (padded[[1, 0, 2, 3, 4, 5]],))
    texts = list(wrong.answers.values())
    assert texts[:2] == references[1::-1] and wrong.metrics["bleu"] == bleu(texts, references) < 1
    assert np.array_equal(wrong.arrays["bleu_statistics"], bleu_statistics(texts, references))
    hashes = pair_hashes(work.splits["validation"].sources, references)  # of the rows, whatever was generated
    assert all(np.array_equal(judged.arrays["pair_hashes"], hashes) for judged in (right, wrong))


def test_a_run_leaves_translations_and_counts(adalora, data):
    result = read(adalora, "result.json")
    assert result["primary_metric"] == "bleu" and result["primary"] == result["metrics"]["validation"]["bleu"]
    assert set(result["metrics"]["validation"]) == {"bleu", "chrf", "loss"}
    assert result["best_epoch"]["primary"] >= result["primary"]
    references = load_pairs(TASK, "validation", data).targets
    texts = read(adalora, "predictions-validation.json")
    assert list(texts) == [str(row) for row in range(6)]
    counts = load_file(adalora / "predictions.safetensors")["validation/bleu_statistics"]
    assert np.array_equal(counts, bleu_statistics(list(texts.values()), references))
    assert bleu_of_sums(counts.sum(axis=0)[None])[0] == pytest.approx(result["primary"], abs=1e-12)


def test_adalora_keeps_its_budget(adalora):
    ranks = read(adalora, "ranks.json")["ranks"]
    assert read(adalora, "result.json")["total_rank"] == sum(ranks.values()) == 2 * MATRICES
    places = [locate_matrix(name) for name in ranks]
    assert None not in places and len(set(places)) == MATRICES
    assert {matrix.split()[0] for _, matrix in places} == {
        "query",
        "key",
        "value",
        "attention",
        "decoder",
        "cross",
    }


@pytest.mark.parametrize(
    ("method", "trained"),
    [("lora", 2 * 2 * 16 * MATRICES), ("peft", (2 * 4 * 16 + 4) * MATRICES), ("full", None)],
)
def test_every_method_trains(run, tmp_path, method, trained):
    result = train(run(method), tmp_path / "run", resumable=False)
    assert 0 <= result["metrics"]["validation"]["bleu"] <= 1 and result["steps"] == 4
    if method == "full":
        config = read(tmp_path / "run" / "adapter", "generation_config.json")
        assert (config["num_beams"], config["decoder_start_token_id"]) == (2, ROMANIAN)
    else:
        assert result["trainable_parameters"] == trained
        saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert all("lora_" in name for name in saved)
        config = read(tmp_path / "run" / "adapter", "adapter_config.json")
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_2_SEQ_LM", None)


def test_half_precision(run, tmp_path):
    half = {"dtype": "bfloat16", "recipe": replace(RECIPE, precision="bf16")}
    result = train(run("lora", **half), tmp_path / "run", resumable=False)
    assert 3 < result["metrics"]["validation"]["loss"] < 7


def test_the_loss_weighs_the_rows_of_a_short_last_batch_by_their_number(run, mbart, tmp_path):
    """In batches of four, the last one of two; at a rate of nothing: what is judged is the checkpoint."""
    recipe = replace(RECIPE, batch_size=4, learning_rate=1e-30, epochs=0.25)
    result = train(run("full", recipe=recipe), tmp_path / "run", resumable=False)
    work, (model, tokenizer) = load_workload(run()), load(mbart)
    from transformers import DataCollatorForSeq2Seq

    rows, collate = work.prepare(tokenizer, recipe)["validation"].to_list(), DataCollatorForSeq2Seq(tokenizer)
    with torch.no_grad():
        losses = [model.eval()(**collate(part)).loss.item() for part in (rows[:4], rows[4:])]
    assert result["metrics"]["validation"]["loss"] == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6)


def test_a_model_learns_eight_pairs_by_heart(mbart, tmp_path):
    english, romanian = pairs(8)
    write_pairs(tmp_path, train=(english * 8, romanian * 8), validation=(english, romanian))
    recipe = replace(
        RECIPE, epochs=26, batch_size=16, max_length=24, learning_rate=0.012, warmup=0.1, dropout=0.0, beams=3
    )
    run = RunSettings(
        task="wmt16_ro_en", model=str(mbart), data_dir=str(tmp_path), method="full", recipe=recipe
    )
    assert train(run, tmp_path / "run", resumable=False)["primary"] > 0.95
    answers = read(tmp_path / "run", "predictions-validation.json")
    assert sum(answers[str(row)] == text for row, text in enumerate(romanian)) >= 7


def test_an_interrupted_run_ends_like_one_that_was_not(run, adalora, tmp_path):
    interrupt(run(), tmp_path / "run", 3)
    train(run(), tmp_path / "run")
    assert_same_run(tmp_path / "run", adalora)
    same = "predictions-validation.json"
    assert read(tmp_path / "run", same) == read(adalora, same)


def test_full_fine_tuning_resumes_with_its_tied_embeddings(run, tmp_path):
    train(run("full"), tmp_path / "whole")
    interrupt(run("full"), tmp_path / "run", 3)
    train(run("full"), tmp_path / "run")
    results = [without_times(read(tmp_path / name, "result.json")) for name in ("run", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["resumed"]


def test_held_out_pairs_have_other_sources(run, tmp_path):
    english, romanian = pairs(10)
    data = write_pairs(tmp_path, train=(english * 2, romanian + [text.upper() for text in romanian]))
    work = load_workload(run(data_dir=str(data), held_out=0.3))
    assert work.evaluation == ("held_out",) and len(work.splits["held_out"]) == 6
    assert not set(work.splits["train"].sources) & set(work.splits["held_out"].sources)


def test_a_part_of_the_pairs(run):
    work = load_workload(run(recipe=replace(RECIPE, train_rows=5, evaluation_rows=2)))
    assert {name: (len(split), split.sample) for name, split in work.splits.items()} == {
        "train": (5, True), "validation": (2, True),
    }  # fmt: skip
    english, romanian = pairs(22)
    assert all(
        romanian[english.index(s)] == t
        for s, t in zip(work.splits["train"].sources, work.splits["train"].targets)
    )


def test_empty_texts_are_kept(tmp_path):
    write_pairs(tmp_path, train=(["", "the moon"], ["luna", ""]))
    split = load_pairs(TASK, "train", tmp_path)
    assert (split.sources, split.targets) == (["", "the moon"], ["luna", ""])


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [{"en": "a", "ro": "b"}, {"en": "a", "ro": None}],
            "row 1: translation has None for 'ro', not a text",
        ),
        (
            [{"en": "a", "de": "b"}],
            "row 0: translation has None for 'ro', not a text; remove or fix that row",
        ),
        ([None, {"en": "a", "ro": "b"}], "row 0: translation has None for 'en'"),
        ([{"en": 3, "ro": "b"}], "row 0: translation has 3 for 'en'"),
        (["a"], "row 0: translation has None for 'en'"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, rows, error):
    write_parquet(tmp_path / "wmt16_ro_en" / "train.parquet", translation=rows)
    with pytest.raises(ValueError, match=error):
        load_pairs(TASK, "train", tmp_path)


def test_files_that_are_missing(run, tmp_path):
    write_pairs(tmp_path, validation=pairs(2))
    with pytest.raises(FileNotFoundError, match=r"no train\.parquet or train_sample\.parquet in .*; check"):
        load_workload(run(data_dir=str(tmp_path)))
    write_parquet(tmp_path / "wmt16_ro_en" / "train.parquet", en=["a"], ro=["b"])
    with pytest.raises(ValueError, match=r"has no column 'translation' \(it has en, ro\); rename its col"):
        load_workload(run(data_dir=str(tmp_path)))


def test_a_model_of_the_other_sort(mbart, encoder):
    with pytest.raises(ValueError, match=r"'bert' is not for translation here; choose one of type mbart$"):
        load(encoder)
    with pytest.raises(
        ValueError,
        match="of type 'mbart' is not for question answering here; choose one of type bert, electra, ",
    ):
        load(mbart, "question_answering")


def test_dropout(mbart):
    for own, dropout in ((0.1, None), (0.25, 0.25)):
        layer = load(mbart, dropout=dropout)[0].model.decoder.layers[1]
        assert layer.dropout == own and layer.activation_dropout == layer.self_attn.dropout == (
            dropout or 0.0
        )
    with pytest.raises(
        ValueError, match=r"a mbart model has no dropout of its own before its translation head"
    ):
        load(mbart, classifier_dropout=0.1)


def test_a_checkpoint_that_is_not_whole(mbart, tmp_path):
    folder = changed_encoder(mbart, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.1.encoder_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of the encoder, one of them model\.decoder\.layers\.1"
    ):
        load(folder)


def test_tokenizers_that_do_not_fit(mbart, run, encoder, tmp_path):
    folder = changed_encoder(mbart, tmp_path / "folder")
    (folder / "sentencepiece.bpe.model").unlink()
    with pytest.raises(ValueError, match="comes without a vocabulary; save its tokenizer beside it"):
        load(folder)
    from transformers import AutoTokenizer

    with pytest.raises(
        ValueError, match="has no language codes en_XX and ro_RO; give a model with mBART's own"
    ):
        load_workload(run()).prepare(AutoTokenizer.from_pretrained(encoder), RECIPE)


def test_there_is_no_head_to_train(run, tmp_path):
    with pytest.raises(
        ValueError, match="trains the head alone, and translation has none; choose another --method"
    ):
        train(run("head"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_packaged_recipe():
    plan = make_plan(recipe="thesis-enro")
    assert plan.model == "facebook/mbart-large-cc25" and plan.seeds == tuple(range(7))
    for arm in (*plan.arms, "sensitivity-r1", "sensitivity-r64", "sensitivity-r256"):
        recipe = load_recipe("thesis-enro", "wmt16_ro_en", arm)
        assert recipe.scale == 4.0 and recipe.beams == 5
        if arm != "full":
            assert recipe.target_r == int(arm.rpartition("-r")[2])
        assert (recipe.init_r > recipe.target_r) == (not arm.startswith("lora"))
    assert plan.settings("wmt16_ro_en", "full", 0).recipe.learning_rate == 3e-5


@needs_pairs
def test_a_run_on_real_pairs(mbart, run, tmp_path):
    """From the real rows to a result; the model has none of the language yet."""
    write_pairs(tmp_path / "data", train=real_pairs(0, 8), validation=real_pairs(8, 12))
    recipe = replace(RECIPE, epochs=1, batch_size=2, max_length=48)
    result = train(run(data_dir=str(tmp_path / "data"), recipe=recipe), tmp_path / "run", resumable=False)
    assert result["splits"]["validation"] == {
        "rows": 4, "source": str(tmp_path / "data" / "wmt16_ro_en" / "validation.parquet"), "sample": False
    }  # fmt: skip
    assert result["total_rank"] == 2 * MATRICES and result["metrics"]["validation"]["loss"] < 7
