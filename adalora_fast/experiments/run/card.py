"""The model card in a run's `adapter` folder: what was trained on what, by which command, and how well."""

import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.integrations.model_card import (
    CARD,
    RUN,
    TRAINED,
    finish_card,
    ranks_table,
    section_of,
    shown_base,
)


def write_card(
    folder: Path,
    settings: RunSettings,
    result: Mapping[str, Any],
    environment: Mapping[str, Any],
    ranks: Mapping[str, int] | None,
) -> None:
    """Finish the README.md that PEFT wrote into `folder`; what other methods save there has none.

    `result` is that of result.json, `environment` what config.json says of versions and command, `ranks` the
    kept triplets by matrix. Of every path of this machine the card has the last part only.
    """
    card = folder / CARD
    if not card.is_file():
        return
    section = _section(settings, result, environment)
    if ranks and section_of(card, TRAINED) is None:
        section += f"\n\n{ranks_table(ranks)}"
    finish_card(card, _title(settings, result), RUN, section)


def _title(settings: RunSettings, result: Mapping[str, Any]) -> str:
    return f"{shown_base(settings.model)}, {result['method']} on {result['task']}"


def _section(settings: RunSettings, result: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    recipe = settings.recipe
    names = sorted({name for values in result["metrics"].values() for name in values})
    rows = [
        f"| {split} | {' | '.join(_figure(values.get(name)) for name in names)} |"
        for split, values in result["metrics"].items()
    ]
    data = ", ".join(
        f"{name} {described['rows']} rows{' (a sample)' if described.get('sample') else ''}"
        for name, described in result["splits"].items()
    )
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    lines = [
        f"- method: `{result['arm']}`, seed {result['seed']}, {result['steps']} steps",
        f"- recipe: learning rate {recipe.learning_rate:g}, batches of {recipe.batch_size}, "
        f"{recipe.epochs} epochs, init_r {recipe.init_r}, target_r {recipe.target_r}",
        f"- data: {result['task']}; {data}",
        f"- trained parameters: {result['trainable_parameters']:,}, total rank {result['total_rank']}",
        f"- command: `{shlex.join(map(_without_path, environment['command']))}`",
        f"- versions: {versions}",
    ]
    table = [f"| split | {' | '.join(names)} |", f"|---{'|---' * len(names)}|", *rows]
    return "\n".join(table) + "\n\n" + "\n".join(lines)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _without_path(word: str) -> str:
    """A word of the command; of an absolute path, also behind `--flag=`, the last part."""
    flag, equals, value = word.rpartition("=")
    path = PureWindowsPath(value)
    is_path = value.startswith(("/", "~", "..")) or path.is_absolute() or Path(value).is_dir()
    return f"{flag}{equals}{path.name}" if is_path else word
