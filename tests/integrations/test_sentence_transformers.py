"""sentence-transformers: the adapted model, after ``add_adapter`` or as PeftModel, is its first module."""

import pytest
import torch
from peft import get_peft_model
from transformers import BertModel, PreTrainedTokenizerFast

from adalora_fast import AdaLoraCallback, fuse, to_lora
from adalora_fast.integrations.locate import tuners
from tests.helpers.injecting import config
from tests.helpers.models import VOCABULARY, awake, bert
from tests.helpers.peft_models import same_state, same_weights

sentence_transformers = pytest.importorskip("sentence_transformers", reason="it is not installed")
pytest.importorskip("datasets", reason="its trainer needs datasets")

STEPS = 12
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny encoder and its tokenizer, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0").save_pretrained(folder)
    encoder = bert().bert
    assert isinstance(encoder, BertModel)
    encoder.save_pretrained(folder)
    return folder


def made(base, kind: str):
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    encoder = Transformer(str(base))
    model = sentence_transformers.SentenceTransformer(modules=[encoder, Pooling(16)], device="cpu")
    torch.manual_seed(1)
    if kind == "add_adapter":
        model.add_adapter(config(target_modules=TARGETS))
    else:
        encoder.model = get_peft_model(encoder.model, config(target_modules=TARGETS))
    return model


def trainer(model, folder, **arguments):
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    texts = [" ".join(f"w{2 + (7 * i + j) % 50}" for j in range(6)) for i in range(32)]
    data = {"anchor": texts, "positive": texts[1:] + texts[:1], "score": [float(i % 2) for i in range(32)]}
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "seed": 3}
    return sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, **settings, **arguments
        ),
        train_dataset=Dataset.from_dict(data),
        loss=CosineSimilarityLoss(model),
        callbacks=[AdaLoraCallback()],
    )


def encoded(model) -> torch.Tensor:
    return torch.as_tensor(model.encode(["w3 w4 w5", "w9 w2"], show_progress_bar=False))


def test_a_run_is_saved_resumed_and_loaded(base, tmp_path):
    model = made(base, "add_adapter")
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=5)
    run.train()
    (tuner,) = tuners(model)
    assert tuner.rankallocator.t == STEPS
    assert sum(tuner.rankallocator.ranks().values()) == 2 * len(tuner.rankallocator.ranks())
    again = made(base, "add_adapter")
    trainer(again, tmp_path, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_weights(model, again)
    assert same_state(tuner.rankallocator.state_dict(), tuners(again)[0].rankallocator.state_dict())
    model.save_pretrained(str(tmp_path / "out"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(encoded(loaded), encoded(model))


def test_a_peft_model_trains_and_is_saved_as_plain_lora(base, tmp_path):
    # sentence-transformers loads adapters by transformers' load_adapter, which refuses the cut-down files of
    # a finished AdaLoRA run.
    model = made(base, "PeftModel")
    trainer(model, tmp_path, save_strategy="no").train()
    (tuner,) = tuners(model)
    assert tuner.rankallocator.t == STEPS
    expected = encoded(model)
    model[0].model = to_lora(model)
    model.save_pretrained(str(tmp_path / "out"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(encoded(loaded), expected, rtol=1e-4, atol=1e-5)


def test_to_lora_gives_the_encoder(base):
    model = fuse(made(base, "add_adapter"))
    awake(model)
    expected = encoded(model)
    plain = to_lora(model)
    other = made(base, "PeftModel")
    other[0].model = plain
    torch.testing.assert_close(encoded(other), expected, rtol=1e-4, atol=1e-5)
