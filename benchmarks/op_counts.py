"""ATen and extension calls of one training step beyond the frozen model's: PEFT's AdaLoRA and the fused one,
on the same model.

    python -m benchmarks.op_counts [--json FILE]

The model is DeBERTa-v2 with 12 layers and 72 adapted linears (96 adapter calls, share_att_key) at a tiny
width: the number of calls does not depend on the width. A step is forward, backward and allocation; the
optimizer's own calls are left out. Calls come from a profiler trace, so that those inside a custom op count
too. Counted is every call of ATen or of the C++ extension that computes, copies, views or detaches and
contains no other counted call; what the profiler shows inside such a call without any work (stride
arithmetic, conjugate checks, allocation) is not. The raw number of leaves is printed beside it.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import AdaLoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from adalora_fast import fuse
from adalora_fast.environment import environment, write_json

TARGETS = ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"]
COUNTED = ("aten::", "adalora_fast_C::")  # PyTorch's own calls and those of the extension
# Without work of their own: stride arithmetic, conjugate bits, allocation, and thin names for one of these.
WORKLESS = {
    f"aten::{name}"
    for name in (
        "as_strided", "as_strided_", "resolve_conj", "resolve_neg", "empty", "empty_strided", "empty_like",
        "resize_", "lift_fresh", "result_type", "set_", "is_nonzero", "t", "transpose", "permute", "expand",
        "expand_as", "select", "slice", "unsqueeze", "squeeze", "unbind", "split", "split_with_sizes",
        "alias", "view_as", "reshape",
        "_reshape_alias", "numpy_T", "new_empty", "new_empty_strided",
    )
}  # fmt: skip


def build() -> torch.nn.Module:
    """The base model, frozen but for its head."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32,
        relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], max_position_embeddings=32, max_relative_positions=-1,
        position_biased_input=False, type_vocab_size=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model


def adapted(fused: bool) -> torch.nn.Module:
    """The base model with PEFT's AdaLoRA on 72 linears, or the fused form of it."""
    config = AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=2, total_step=100, tinit=0, tfinal=10, target_modules=TARGETS
    )
    model = get_peft_model(build(), config)
    assert len([name for name, _ in model.named_parameters() if "lora_E" in name]) == 72
    return fuse(model) if fused else model


def leaves(function: Callable[[], None]) -> tuple[Counter, Counter]:
    """(counted calls, all leaf calls) of ``function`` by name."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    events = [event for event in trace.events() if event.name.startswith(COUNTED)]

    def contains(event, names_left_out: set[str]) -> bool:
        return any(
            (child.name.startswith(COUNTED) and child.name not in names_left_out)
            or contains(child, names_left_out)
            for child in event.cpu_children
        )

    counted = (e.name for e in events if e.name not in WORKLESS and not contains(e, WORKLESS))
    return Counter(counted), Counter(e.name for e in events if not contains(e, set()))


def frozen_step() -> Callable[[], None]:
    """Forward and backward of the frozen model down to its embeddings' output."""
    model, batch = build(), make_batch()
    embed = model.get_input_embeddings()

    def step() -> None:
        inputs = embed(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=batch["labels"]).loss.backward()

    return step


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(64, (2, 8), generator=generator), "labels": torch.tensor([0, 1])}


def adapter_parts(fused: bool) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """(forward and backward, optimizer step, allocation) of an adapted model."""
    model, batch = adapted(fused), make_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps = iter(range(1, 100))

    def train() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()

    return train, optimizer.step, lambda: model.base_model.update_and_allocate(next(steps))


def count(fused: bool) -> dict[str, dict[str, int]]:
    """Counted and raw calls of the two parts of a step beyond the frozen model's."""
    frozen = frozen_step()
    frozen()
    base_counted, base_raw = leaves(frozen)
    train, optimize, allocate = adapter_parts(fused)
    for _ in range(2):
        train(), optimize(), allocate()
    train_counted, train_raw = leaves(train)
    optimize()
    allocate_counted, allocate_raw = leaves(allocate)

    def summary(base: Counter, train: Counter, allocate: Counter) -> dict[str, int]:
        parts = {"forward_backward": train.total() - base.total(), "allocation": allocate.total()}
        return {**parts, "total": sum(parts.values())}

    extra = train_counted + allocate_counted
    extra.subtract(base_counted)
    return {
        "calls": summary(base_counted, train_counted, allocate_counted),
        "raw_leaves": summary(base_raw, train_raw, allocate_raw),
        "by_name": dict(extra.most_common(12)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures and the environment to this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    figures = {"peft": count(fused=False), "adalora_fast": count(fused=True)}
    columns = ("forward+backward", "allocation", "total", "raw leaves")
    print(f"{'calls beyond the frozen model':32}" + "".join(f"{column:>18}" for column in columns))
    for name, figure in figures.items():
        calls = figure["calls"]
        print(
            f"{name:32}{calls['forward_backward']:>18,}{calls['allocation']:>18,}{calls['total']:>18,}"
            f"{figure['raw_leaves']['total']:>18,}"
        )
    print("most frequent:", figures["adalora_fast"]["by_name"])
    if arguments.json:
        write_json(
            arguments.json, {"benchmark": "op_counts", "environment": environment(), "figures": figures}
        )


if __name__ == "__main__":
    main()
