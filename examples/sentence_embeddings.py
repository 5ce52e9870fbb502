"""Sentence embeddings with sentence-transformers (pip install sentence-transformers)."""

from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import encoder, show, texts, tokenizer

from adalora_fast import AdaLoraCallback, fuse

for part in (encoder().bert, tokenizer()):  # stands for a model on the hub
    part.save_pretrained("runs/base")
first = Transformer("runs/base")
config = AdaLoraConfig(target_modules=["query", "value"], init_r=8, target_r=4, total_step=10_000)
first.model = get_peft_model(first.model, config)
model = SentenceTransformer(modules=[first, Pooling(32)], device="cpu")
fuse(model)  # finds the adapted model inside

anchors = texts(64)
data = {"anchor": anchors, "positive": anchors[1:] + anchors[:1], "score": [float(i % 2) for i in range(64)]}
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        "runs/embeddings",
        max_steps=40,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict(data),
    loss=CosineSimilarityLoss(model),
    callbacks=[AdaLoraCallback()],
)
trainer.train()

ranks = first.model.base_model.rankallocator.ranks()
show(ranks)
assert sum(ranks.values()) == 4 * len(ranks)
