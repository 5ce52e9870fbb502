"""Model cards of adapters: what AdaLoRA chose and by which score; no path of the machine they come from."""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
TRAINED, EXPORTED, RUN = "## AdaLoRA", "## From AdaLoRA", "## Training run"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def finish_card(card: Path, title: str, heading: str, section: str) -> None:
    """Make a card that PEFT has just written or brought up to date a real one.

    The base model's path is left out if it is one of this machine, a template that nobody filled in goes,
    and the section under ``heading`` is written or replaced. What an owner has written stays.
    """
    content = ModelCard.load(card, ignore_metadata_errors=True)
    base = getattr(content.data, "base_model", None)
    if isinstance(base, str) and base and not is_on_hub(base):
        content.data.base_model = None
        content.data.tags = [tag for tag in content.data.tags or [] if base not in tag] or None
    template = ModelCard.from_template(ModelCardData()).text.strip()
    if content.text.strip().startswith(template):
        lines = [f"# {title}"]
        if isinstance(base, str) and base:
            lines.append(f"Base model: {shown_base(base)}")
        content.text = "\n\n".join([*lines, content.text.strip().removeprefix(template).strip()])
    content.save(card)
    write_section(card, heading, section)


def new_card(card: Path, base: str | None) -> None:
    """A card for an exported adapter, as short as it can be."""
    lines = ["---", "library_name: peft", "tags:", "- lora", "- adalora", "---", "", "# LoRA adapter"]
    if base:
        lines += ["", f"Base model: {shown_base(base)}"]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_section(card: Path, heading: str, section: str) -> None:
    """Write or replace the section under ``heading``, up to the next heading of its level."""
    before, _, after = f"\n{card.read_text(encoding='utf-8')}".partition(f"\n{heading}\n")
    following = re.search(r"\n## ", after)
    rest = after[following.start() :].strip("\n") if following else ""
    parts = [before.strip("\n"), f"{heading}\n\n{section.strip()}", rest]
    card.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def section_of(card: Path, heading: str) -> str | None:
    """The text of the section under ``heading``, or None if the card has none."""
    try:
        text = f"\n{card.read_text(encoding='utf-8')}"
    except (OSError, ValueError):
        return None
    _, found, after = text.partition(f"\n{heading}\n")
    return re.split(r"\n## ", after)[0].strip() if found else None


def trained_section(facts: Mapping[str, Any] | None, ranks: Mapping[str, int]) -> str:
    """What an AdaLoRA adapter's card says.

    Args:
        facts: ``config`` of the allocator's state; None if there is none.
        ranks: kept triplets by layer.
    """
    return "\n\n".join(["An AdaLoRA adapter (arXiv 2303.10512).", *_allocation(facts), ranks_table(ranks)])


def exported_section(facts: Mapping[str, Any] | None, ranks: Mapping[str, int]) -> str:
    """What the card of a plain LoRA adapter says that was one of AdaLoRA's; arguments as above."""
    origin = (
        "This LoRA adapter is the exact form of an AdaLoRA adapter (arXiv 2303.10512): singular values and "
        "scale are folded into the factors, pruned triplets are left out."
    )
    return "\n\n".join([origin, *_allocation(facts), ranks_table(ranks)])


def shown_base(base: str) -> str:
    """A base model's name; of a path on this machine only its last part."""
    base = " ".join(base.split())
    if is_on_hub(base):
        return base
    return f"{PureWindowsPath(base).name} (a local folder)"  # both kinds of slashes


def is_on_hub(name: str) -> bool:
    """Whether this is a name on the model hub and not a folder of this machine."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _allocation(facts: Mapping[str, Any] | None) -> list[str]:
    """One line about the score and the schedule."""
    if facts is None:
        return []
    schedule = facts["schedule"]
    state = "the final mask is made" if facts["is_final"] else "the final mask is not made yet"
    schedule_text = ", ".join(f"{name} {schedule[name]}" for name in ("tinit", "tfinal", "deltaT"))
    return [
        f"Importance score `{facts['score']}`, smoothing `{facts['smoothing']}`, of the "
        f"{facts['score_gradient']} gradient{_stability(facts)}; step {facts['t']} of "
        f"{schedule['total_step']} ({schedule_text}); {state}."
    ]


def _stability(facts: Mapping[str, Any]) -> str:
    """What is unlike AdaLoRA in how triplets are scored and kept; "" where nothing is."""
    parts = [
        "of λ alone" if facts["triplet"] == "lambda" else "",
        f"hysteresis {facts['hysteresis']:g}" if facts["hysteresis"] else "",
        "λ remembered" if facts["remember"] else "",
    ]
    return "".join(f", {part}" for part in parts if part)


def ranks_table(ranks: Mapping[str, int]) -> str:
    """Every matrix and its kept triplets."""
    rows = "\n".join(f"| `{name}` | {rank} |" for name, rank in ranks.items())
    return f"{sum(ranks.values())} triplets in {len(ranks)} matrices.\n\n| matrix | rank |\n|---|---|\n{rows}"
