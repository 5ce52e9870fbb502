"""The report's words on contrasts: the method, the pairs, the nulls, what changed, what could be seen."""

from collections import Counter
from typing import Any

from .collect import NULLS, Sweep
from .contrasts import AVERAGE, Contrast, Contrasts
from .estimates import DIFFERS, holm
from .power import DIFFERENCES, POWER, Variances, seeds_needed, smallest_difference
from .tables import markdown, task_name

CLUSTERED = ("mnli", "qnli", "squad", "squad_v2")  # several examples about one premise or passage
FOLDED = 12  # rows from which a table is folded away
LATE = "†"  # declared when there were results


def how_compared(sweep: Sweep, contrasts: Contrasts) -> str:
    """The method of the contrasts in words, with the warnings that the numbers of seeds call for."""
    seeds = min((contrast.seeds for contrast in contrasts.all), default=len(sweep.plan.seeds))
    margin = sweep.plan.margin
    text = (
        "Differences are in points of the primary metric at the end of training. Seeds are paired: the same "
        "initial head and order of the data; only seeds that both arms have enter. All runs are evaluated on "
        "the same examples, so seeds and examples are crossed: the table of a pair's differences, seed by "
        "example, has the mean squares of the seeds, of the examples and of the rest, and SE² = (seeds + "
        "examples − rest) / (seeds × examples), never less than either alone gives, with Satterthwaite's "
        "degrees of freedom; intervals and p are Student's t. A metric that is no mean over examples is "
        "divided among them by the jackknife. For the average over tasks a seed counts with its average over "
        "them, and the examples are those of all; it speaks of these tasks, not of others. p is two-sided. "
        f"Verdicts are on the {len(sweep.plan.declared)} declared contrasts of a task, and of the average, "
        f"over which Holm's correction is: *differs* where Holm's p < {DIFFERS:g}; *equivalent within "
        f"±{margin:g}* where the 90 % interval, which is then given, lies inside (two one-sided tests at "
        "5 %, not corrected for their number); otherwise *not decided*: too few data, or too spread ones, to "
        "say either; not that the arms are alike. Every other pair is *exploratory*: its interval and p are "
        "not corrected, and where so many pairs are looked at some exclude 0 by chance."
    )
    text += f"\n\n{declaration(sweep)}"
    if sweep.plan.tuning is None:
        text += (
            "\n\nLearning rates were not tuned per arm: all arms of a task have one setting, but for what "
            "the recipe says of an arm itself (learning rate or scale). An arm that needs another rate loses "
            "by that, and one that has a setting of its own may gain by it."
        )
    clustered = [task_name(task) for task in sweep.plan.tasks if task in CLUSTERED]
    if clustered:
        text += (
            "\n\nExamples about one passage or premise are taken as independent, which they are not quite: "
            f"intervals on {', '.join(clustered)} are somewhat too narrow."
        )
    if seeds == 1:
        text += (
            "\n\n**One seed: the intervals hold the chance of the examples only, not that of the training, "
            "and nothing is decided.**"
        )
    elif seeds == 2:
        text += "\n\n**Two seeds have one degree of freedom, with which next to nothing is decided.**"
    elif seeds < 5:
        text += (
            f"\n\n**{seeds} seeds are few: their own spread is known badly, and only large differences can "
            "be told from chance.**"
        )
    return text


def declaration(sweep: Sweep) -> str:
    """Which contrasts were declared, by whom, and which of them late."""
    plan = sweep.plan
    listed = ", ".join(f"{a} − {b}" for a, b in plan.declared)
    if not plan.declared:
        return "One arm has nothing to be compared with."
    if plan.contrasts is None:
        return (
            "The plan declares no contrasts of its own, so they are every other arm against "
            f"{plan.declared[0][1]}: {listed}."
        )
    text = f"Declared in the plan: {listed}."
    for entry in plan.amended:
        for name, words in (
            ("seen", "when runs of both arms were complete, so perhaps after a look at them"),
            ("contrasts", "before both arms had a complete run of one task and seed"),
        ):
            pairs = [p for p in entry.get(name) or [] if name == "seen" or p not in (entry.get("seen") or [])]
            if pairs:
                mark = f" ({LATE})" if name == "seen" else ""
                own = ", ".join(f"{a} − {b}" for a, b in pairs)
                text += f" Added on {entry.get('at', 'an unknown date')}, {words}{mark}: {own}."
    return text


def pairwise(sweep: Sweep, contrasts: Contrasts) -> str:
    """The declared contrasts, then all other pairs, folded where they are many."""
    tasks = [task for task in (*sweep.plan.tasks, AVERAGE) if contrasts.of(task)]
    parts = [how_compared(sweep, contrasts)]
    if not tasks:
        parts.append("There is nothing to compare yet: no two arms have a complete run of the same seed.")
        return "\n\n".join(parts)
    declared = [contrast for task in tasks for contrast in contrasts.declared(task)]
    if declared:
        parts += ["Declared contrasts:", contrast_table(sweep, declared)]
    rivals = {contrast.b for contrast in declared}
    if len(rivals) == 1:
        parts.append(_count(declared, *rivals))
    others = [c for task in tasks for c in contrasts.of(task) if not c.is_declared]
    if len(others) >= FOLDED:
        table = contrast_table(sweep, others)
        parts.append(f"<details><summary>{len(others)} exploratory pairs</summary>\n\n{table}\n\n</details>")
    elif others:
        parts += ["Exploratory pairs:", contrast_table(sweep, others)]
    return "\n\n".join(parts)


def against_nulls(sweep: Sweep, contrasts: Contrasts) -> str:
    """Every score minus what does not look at importance: uniform ranks, random triplets, plain LoRA."""
    rivals = [arm for arm in sweep.plan.arms if arm.partition("-")[0] in NULLS or arm == "lora"]
    if not rivals or not sweep.plan.scores:
        return "The plan has no uniform, random or lora arm to set the scores against."
    found, rows = [], []
    for task in (*sweep.plan.tasks, AVERAGE):
        for score in sweep.plan.scores:
            own = [contrasts.between(task, score, rival) for rival in rivals]
            if any(own):
                rows.append((task_name(task), score, *("–" if c is None else _brief(c) for c in own)))
                found += [contrast for contrast in own if contrast is not None]
    if not found:
        return "There is nothing to compare yet."
    parts = [
        "Score minus rival in points, its 95 % interval, and the verdict as above, where the contrast is "
        "declared.",
        markdown(("task", "score", *(f"− {rival}" for rival in rivals)), rows, left=2),
    ]
    parts += [_count([c for c in found if c.b == rival], rival) for rival in rivals]
    absent = [arm for arm in ("uniform", "random", "lora") if arm not in rivals]
    if absent:
        parts.append(f"Not in the plan: {', '.join(absent)}.")
    return "\n\n".join(parts)


def what_could_be_seen(sweep: Sweep, contrasts: Contrasts) -> str:
    """Per task the smallest difference that the declared contrasts find with 80 % power, and how many seeds
    some differences need.
    """
    rows = []
    for task in (*sweep.plan.tasks, AVERAGE):
        planned = [
            (variances, contrast.estimate.spread)
            for contrast in contrasts.declared(task)
            if (variances := Variances.of(contrast.estimate.spread)) is not None
        ]
        if not planned:
            continue
        level = DIFFERS / len(contrasts.declared(task))
        alone = [smallest_difference(v, spread.seeds, spread.examples) for v, spread in planned]
        corrected = [
            smallest_difference(v, spread.seeds, spread.examples, level=level) for v, spread in planned
        ]
        needed = [
            _seeds([seeds_needed(v, points, spread.examples, level=level) for v, spread in planned])
            for points in DIFFERENCES
        ]
        seeds = sorted({spread.seeds for _, spread in planned})
        rows.append((
            task_name(task), f"{planned[0][1].examples:,}", ", ".join(map(str, seeds)), _range(alone),
            _range(corrected), *needed,
        ))  # fmt: skip
    if not rows:
        return "With one seed nothing is known of the spread between seeds, and nothing can be planned."
    head = ("task", "examples", "seeds", "smallest difference alone", "by Holm")
    text = (
        f"The smallest difference in points that a test finds with {100 * POWER:g} % power, at 5 % for one "
        "contrast alone and where Holm's correction is over all declared contrasts of the task; and how many "
        "seeds would find a given one under that correction, on as many examples as here. Ranges are over "
        "the declared contrasts: arms that are nearly the same model are told apart by less. *None*: however "
        "many seeds, the chance of these examples hides the difference. The variances are this sweep's own, "
        "known as well as so few seeds can tell: orders of magnitude."
    )
    heads = (*head, *(f"seeds for {points:g}" for points in DIFFERENCES))
    hidden = _hidden(sweep, contrasts)
    return "\n\n".join(filter(None, [text, markdown(heads, rows), hidden]))


def _hidden(sweep: Sweep, contrasts: Contrasts) -> str:
    """The tasks whose development set hides half a point of most declared contrasts."""
    found = []
    for task in sweep.plan.tasks:
        own = [c.estimate.spread for c in contrasts.declared(task)]
        planned = [(v, spread) for spread in own if (v := Variances.of(spread)) is not None]
        without = [seeds_needed(v, 0.5, spread.examples) is None for v, spread in planned]
        if planned and 2 * sum(without) > len(without):
            found.append(f"{task_name(task)} ({planned[0][1].examples:,} rows)")
    if not found:
        return ""
    return (
        f"**Half a point cannot be decided on {', '.join(found)} for most declared contrasts, not even alone "
        "and with any number of seeds: the development set is too small.**"
    )


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _seeds(numbers: list[int | None]) -> str:
    known = sorted(number for number in numbers if number is not None)
    if not known:
        return "none"
    text = f"{known[0]} to {known[-1]}" if known[0] != known[-1] else str(known[0])
    without = len(numbers) - len(known)
    return f"{text}; none for {without} of {len(numbers)}" if without else text


def verdicts_that_changed(sweep: Sweep, contrasts: Contrasts) -> str:
    """Beside those of an earlier method, which the folder keeps in verdicts-before.json; "" without it."""
    before = sweep.before
    if before is None:
        return ""
    rows = []
    of_all = {
        (c.task, frozenset((c.a, c.b))): p
        for task in (*sweep.plan.tasks, AVERAGE)
        for own in [contrasts.of(task)]
        for c, p in zip(own, holm([each.estimate.bounds.p for each in own]), strict=True)
    }
    for entry in before["verdicts"]:
        contrast = contrasts.between(entry["task"], entry["a"], entry["b"])
        if contrast is not None and _is_news(entry["verdict"], contrast):
            rows.append((
                task_name(contrast.task), f"{contrast.a} − {contrast.b}", signed(contrast.estimate.value),
                entry["verdict"], probability(entry["holm_p"]), contrast.verdict,
                "–" if contrast.holm_p is None else probability(contrast.holm_p),
                probability(of_all[contrast.task, frozenset((contrast.a, contrast.b))]),
            ))  # fmt: skip
    text = f"Before: {before['method']}"
    if not rows:
        return f"{text}\n\nNo verdict changed."
    text += (
        "\n\nTwo things are new, the standard error and the pairs over which Holm corrects; the last column "
        "is the new p corrected over all pairs, as before, so that it shows the first alone."
    )
    head = (
        "task", "arms", "difference", "before", "Holm's p before", "now", "Holm's p now",
        "Holm's p now, over all pairs",
    )  # fmt: skip
    return f"{text}\n\n{markdown(head, rows, left=2)}"


def _is_news(earlier: str, contrast: Contrast) -> bool:
    """Whether another verdict is given, or one that there was is no longer given. A pair that was not decided
    and is exploratory now had no verdict to lose.
    """
    return earlier != contrast.verdict if contrast.is_declared else earlier != "not decided"


def _brief(contrast: Contrast) -> str:
    e = contrast.estimate
    return f"{signed(e.value)} ({signed(e.bounds.low)} to {signed(e.bounds.high)}): {verdict_words(contrast)}"


def verdict_words(contrast: Contrast) -> str:
    """With the 90 % interval where it says that two arms are alike."""
    e = contrast.estimate
    if "within" not in contrast.verdict and "less than" not in contrast.verdict:
        return contrast.verdict
    return f"{contrast.verdict} (90 %: {signed(e.bounds.low90)} to {signed(e.bounds.high90)})"


def signed(value: float) -> str:
    """Two decimals with a sign, and none for what rounds to zero."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def contrast_table(sweep: Sweep, found: list[Contrast]) -> str:
    late = {frozenset(pair) for pair in sweep.plan.seen_contrasts}
    declared = any(contrast.is_declared for contrast in found)
    rows = []
    for contrast in found:
        e = contrast.estimate
        mark = f" {LATE}" if {contrast.a, contrast.b} in late and contrast.is_declared else ""
        row: list[Any] = [
            task_name(contrast.task), f"{contrast.a} − {contrast.b}{mark}", verdict_words(contrast),
            contrast.seeds, signed(e.value), f"{signed(e.bounds.low)} to {signed(e.bounds.high)}",
            probability(e.bounds.p),
        ]  # fmt: skip
        rows.append([*row, probability(contrast.holm_p)] if declared else row)
    head = ("task", "arms", "verdict", "seeds", "difference", "95 % interval", "p")
    return markdown((*head, "Holm's p") if declared else head, rows, left=3)


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(found: list[Contrast], rival: str) -> str:
    """How many of these differences went which way, in one sentence."""
    if not found:
        return f"Nothing is complete enough to be set against {rival}."
    kinds = Counter(
        ("better" if c.estimate.value > 0 else "worse")
        if c.verdict.startswith("differs")
        else c.verdict.replace(",", "").split()[0]
        for c in found
    )
    words = {
        "better": f"better than {rival}",
        "worse": f"worse than {rival}",
        "equivalent": "equivalent within the margin",
        "not": "not decided",
        "exploratory": "exploratory",
    }
    counted = ", ".join(f"{kinds[kind]} {text}" for kind, text in words.items() if kinds[kind])
    return f"Of {len(found)} differences from {rival} (tasks and average): {counted}."
