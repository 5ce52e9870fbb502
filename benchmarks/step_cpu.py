"""A whole training step on a CPU: MiniLM-L6 with PEFT's AdaLoRA and with the fused one, interleaved in one
process.

    python -m benchmarks.step_cpu [--steps 30] [--threads 2] [--json FILE]

all-MiniLM-L6 (6 layers, width 384, 36 adapted linears), batch 16 x 64 tokens, r = 16, dropout off, allocation
at every
step: forward, backward, AdamW, importance, orthogonality and allocation. The frozen model's forward and
    backward is timed
beside them as the floor. Figures are medians with the 20th and 80th percentile; on a machine with other work
only the ratios mean something, which is why the three take turns step by step. Weights are random unless the
packaged encoder is
installed: the time does not depend on them.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from adalora_fast import fuse
from adalora_fast.environment import environment, write_json

MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
BATCH, LENGTH, RANK, TARGET_RANK = 16, 64, 16, 8


def build() -> BertForSequenceClassification:
    """MiniLM-L6 with random weights, frozen but for its head, in training mode without dropout."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**MINILM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model.train()


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 30522, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64),
        "labels": torch.randint(2, (BATCH,), generator=generator),
    }


def frozen() -> Callable[[], None]:
    """Forward and backward down to the embeddings' output, without any adapter."""
    model, batch = build(), make_batch()
    embed = model.get_input_embeddings()

    def step() -> None:
        inputs = embed(batch["input_ids"]).detach().requires_grad_()
        model(
            inputs_embeds=inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()

    return step


def adapted(fused: bool, steps: int) -> Callable[[], None]:
    """A whole AdaLoRA training step."""
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=RANK,
        target_r=TARGET_RANK,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=10 * steps,
        lora_alpha=32,
        target_modules=TARGETS,
    )
    model, batch = get_peft_model(build(), config), make_batch()
    if fused:
        fuse(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    number = iter(range(10 * steps))

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(next(number))
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each (default 30)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (default 2)")
    parser.add_argument("--json", type=Path, help="write the figures and the environment to this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    contestants = {
        "frozen": frozen(),
        "peft": adapted(False, arguments.steps),
        "adalora_fast": adapted(True, arguments.steps),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(arguments.steps + 3):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            if round_number >= 3:  # the first rounds warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    figures = {}
    for name, milliseconds in times.items():
        cuts = statistics.quantiles(milliseconds, n=5)
        figures[name] = {"median_ms": statistics.median(milliseconds), "p20_ms": cuts[0], "p80_ms": cuts[-1]}
        print(f"{name:14}{figures[name]['median_ms']:8.1f} ms   (p20 {cuts[0]:.1f}, p80 {cuts[-1]:.1f})")
    pairs = [peft / fused for peft, fused in zip(times["peft"], times["adalora_fast"], strict=True)]
    ratio = statistics.median(pairs)
    print(f"PEFT / adalora_fast, median of {len(pairs)} pairs: {ratio:.2f}")
    if arguments.json:
        data = {"benchmark": "step_cpu", "environment": environment(), "threads": arguments.threads}
        write_json(
            arguments.json, {**data, "figures": figures, "ratio_of_pairs": ratio, "milliseconds": times}
        )


if __name__ == "__main__":
    main()
