"""The model card of an exported adapter: PEFT's, or a short one, with the ranks that AdaLoRA chose."""

from pathlib import Path

CARD = "README.md"
HEADING = "## From AdaLoRA"


def write_ranks(card: Path, ranks: dict[str, int]) -> None:
    """Say in a model card that the adapter came from AdaLoRA, and with which ranks."""
    kept = "\n".join(f"| `{name}` | {rank} |" for name, rank in ranks.items())
    section = (
        f"{HEADING}\n\nThis LoRA adapter is the exact form of an AdaLoRA adapter (arXiv 2303.10512): "
        "singular values and scale are folded into the factors, pruned triplets are left out. "
        f"{sum(ranks.values())} triplets in {len(ranks)} matrices.\n\n| matrix | rank |\n|---|---|\n{kept}\n"
    )
    text = card.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[0].rstrip("\n")
    card.write_text(f"{text}\n\n{section}", encoding="utf-8")


def new_card(card: Path, base: str | None) -> None:
    """A card as short as it can be."""
    lines = ["---", "library_name: peft", "tags:", "- lora", "- adalora", "---", "", "# LoRA adapter"]
    if base:
        lines += ["", f"Base model: {' '.join(base.split())}"]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
