"""The soup of runs, from their folders to its own."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from adalora_fast.environment import write_json, write_text

from .common import data_of, header, make_folder, open_in_order
from .progress import AnalysisProgress, Silent
from .report import soup_report
from .rows import Evaluation, RowSet, selection_and_report
from .saved import SavedRun, names_of
from .shared import SharedModel, check_precision
from .soup import STEPS, averaging_soup, ensemble_logits, greedy_soup, uniform_soup
from .soup_files import check_free, save_full, save_lora


def make_soup(
    folders: Sequence[Path | str],
    output: Path,
    *,
    recipe: str = "greedy",
    save: str = "lora",
    rank: int | None = None,
    selection: str = "halves",
    split: str | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    precision: str = "fp32",
    generate: bool = False,
    progress: AnalysisProgress | None = None,
) -> dict[str, Any]:
    """A soup of runs, beside its best member, the other soups and the ensemble of logits.

    Writes soup.json and soup.md, and into `model/` the soup itself. soup.json is there before the soup is
    saved, with `finished` of false, and is written again at the end.

    Args:
        folders: of finished runs of one task and base model; their ranks and methods may differ.
        output: a new or empty folder, or one with an unfinished soup, which is begun anew.
        recipe: which soup is saved, greedy, averaging or uniform.
        save: lora (a plain LoRA adapter), full (merged into the base), or none.
        rank: the largest rank of the LoRA; None keeps it exact, with the members' ranks added up.
        selection: rows to choose by, see `rows.selection_and_report`.
        split, model, data_dir, precision, progress: see `analyze_cka`.
        generate: of translations also BLEU and chrF. They have no ensemble: its logits are one number for
            every token of the vocabulary at every place.

    Raises:
        ValueError, FileNotFoundError: see `analyze_cka`; a fully trained run in a LoRA; a folder in the way.
    """
    for name, value, allowed in (
        ("soup", recipe, ("greedy", "averaging", "uniform")),
        ("form", save, ("lora", "full", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(allowed)}")
    if rank is not None and save != "lora":
        raise ValueError(f"a rank of {rank} is for save = lora, and save is {save}; leave it out")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank is {rank}; choose 1 or more")
    check_precision(precision)
    if not _is_unfinished(output):
        check_free(output)
    progress = progress or Silent()
    runs, settings = open_in_order(folders, model)
    if save == "lora":
        check_lora(runs)
    chosen, reported = selection_and_report(settings, selection, split, data_dir)
    make_folder(output)
    shared = SharedModel.load(settings, precision=precision)
    data = data_of(settings, {"selection": chosen, "report": reported}, shared, generate)
    changes, names = shared.read(runs), names_of(runs)

    def judged(weights: list[float], part: str) -> Evaluation:
        with shared.mixed(changes, weights) as mixed:
            return data.evaluate(mixed, part)

    def split_of(part: str) -> str:
        if part == "selection" and selection == "held_out":
            return "train, held out"
        return split or runs[0].task.evaluation[0]

    outputs, members = {"selection": [], "report": []}, []

    def member(model: nn.Module, part: str, name: str) -> Evaluation:
        if not isinstance(data, RowSet):
            return data.evaluate(model, part, name)
        outputs[part].append(data.logits(model, part))
        return data.judge(outputs[part][-1], part, name)

    with progress.steps("runs", len(runs)) as advance:
        for change, name in zip(changes, names, strict=True):
            with shared.mixed([change], [1.0]) as mixed:
                members.append({part: asdict(member(mixed, part, name)) for part in outputs})
            advance()
    with progress.steps("soup", STEPS * (len(runs) - 1)) as advance:

        def tried(weights: list[float]) -> float:
            loss = judged(weights, "selection").loss
            advance()
            return loss

        losses = [member["selection"]["loss"] for member in members]
        greedy, averaging = greedy_soup(losses, tried), averaging_soup(losses, tried)
    uniform = uniform_soup(len(runs))
    result = {
        **header(runs, settings, precision),
        "rows": {part: {"split": split_of(part), **rows} for part, rows in data.describe().items()},
        "settings": json.loads(json.dumps(asdict(settings))),  # lists, as the file has them
        "selection": selection,
        "members": members,
        "best_member": greedy.order[0],
        "greedy": {
            **asdict(greedy),
            **{part: asdict(judged(greedy.weights, part)) for part in outputs},
        },
        "averaging": {
            **asdict(averaging),
            **{part: asdict(judged(averaging.weights, part)) for part in outputs},
        },
        "uniform": {"weights": uniform, **{part: asdict(judged(uniform, part)) for part in outputs}},
        "ensemble": {
            part: asdict(data.judge(ensemble_logits(each), part, "the ensemble"))
            for part, each in outputs.items()
        }
        if isinstance(data, RowSet)
        else None,
        "saved": None,
        "finished": False,
    }
    write_json(output / "soup.json", result)
    if (output / "model").exists():  # a part of the unfinished one
        shutil.rmtree(output / "model")
    if save != "none":
        weights = {"greedy": greedy.weights, "averaging": averaging.weights, "uniform": uniform}[recipe]
        result["saved"] = {"soup": recipe, "form": save}
        if save == "lora":
            saved = save_lora(shared, changes, weights, settings, output / "model", rank=rank)
            result["saved"] |= asdict(saved)
        else:
            save_full(shared, changes, weights, output / "model")
    write_text(output / "soup.md", soup_report(result))
    result["finished"] = True
    write_json(output / "soup.json", result)
    return result


def check_lora(runs: Sequence[SavedRun]) -> None:
    """ValueError where a plain LoRA cannot hold a soup of these runs."""
    full = next((run for run in runs if run.settings.method == "full"), None)
    if full is not None:
        raise ValueError(f"{full.path} was trained fully, which no LoRA holds; give --save full")
    if all(run.settings.method in ("head", "bitfit") for run in runs):
        raise ValueError("none of these runs has adapted a matrix, so there is no LoRA; give --save full")


def _is_unfinished(output: Path) -> bool:
    """Whether this folder is that of a soup whose process ended before it was saved."""
    try:
        found = json.loads((output / "soup.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("finished") is False
