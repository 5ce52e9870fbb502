"""report.html: its data are the files' numbers, its text is text, and a browser draws it."""

import json
import re
import shutil
import subprocess
import tomllib
from itertools import pairwise

import pytest

from adalora_fast.experiments.report import find_runs, write_folder_page, write_report
from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.contrasts import compare_all
from adalora_fast.experiments.report.html import folder_page, sweep_page
from adalora_fast.experiments.report.html.page import HERE, SCRIPTS
from adalora_fast.experiments.report.html.run_data import MOST_MAPS, MOST_POINTS, grid, thin
from adalora_fast.experiments.report.tables import escape_markdown
from tests.helpers.sweeps import INIT_R, agreeing, write_plan, write_run, write_sweep

RATES = {"sensitivity": 0.8, "fisher": 0.7, "lora": 0.6}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Click on play, and write down what the page says of its place.
PLAY = """<script>
const place = document.querySelector('output');
document.body.dataset.seen = '';
const seen = new MutationObserver(() => { document.body.dataset.seen += ` ${place.textContent}`; });
seen.observe(place, { childList: true });
document.getElementById('play').click();
</script></body>"""
SHARE = {"lora_E": 0.6, "lora_A": 0.3, "lora_B": 0.1}


def content(text):
    """What the page will read."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def made(folder):
    sweep = read_sweep(folder)
    return sweep_page(sweep, compare_all(sweep))


def of_folder(folder):
    return content(folder_page(folder, find_runs(folder)))


def write_masks(place):
    """Four masks after the log of a run: what each kept, revived and dropped."""
    terms = {"share": SHARE, "spearman": SHARE, "same_mask": 0.9}
    lines = [
        {"step": step, "mask": {"kept": 20, "revived": revived, "dropped": 4}, "terms": terms}
        for step, revived in ((5, 0), (10, 5), (15, 2), (20, 1))
    ]
    with (place / "allocation.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks, three arms, two seeds; one run is missing, one has logged its masks."""
    place = tmp_path_factory.mktemp("sweep")
    write_sweep(place, RATES, tasks=["sst2", "cola"], seeds=[0, 1])
    write_masks(place / "sst2" / "fisher-seed0")
    shutil.rmtree(place / "cola" / "lora-seed1")
    (place / "cola" / "lora-seed1.failed.json").write_text('{"error": "out of luck"}')
    return place


@pytest.fixture(scope="module")
def text(folder):
    return made(folder)


@pytest.fixture(scope="module")
def shown(text):
    return content(text)


def run_of(shown, task, arm, seed):
    (found,) = [run for run in shown["runs"] if (run["task"], run["arm"], run["seed"]) == (task, arm, seed)]
    return found


def test_every_run_has_the_numbers_of_its_files(folder, shown):
    assert len(shown["runs"]) == 11
    for run in shown["runs"]:
        place = folder / run["task"] / f"{run['arm']}-seed{run['seed']}"
        result = json.loads((place / "result.json").read_text())
        saved = json.loads((place / "ranks.json").read_text())
        log = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in log if "loss" in line}
        assert run["primary"] == pytest.approx(100 * result["primary"], rel=1e-5)
        assert run["final"] == list(saved["ranks"].values()) and run["init_r"] == INIT_R
        assert run["counts"]["total_rank"] == result["total_rank"]
        (loss,) = run["loss"]
        assert loss["x"] == list(losses) and loss["y"] == pytest.approx(list(losses.values()), rel=1e-5)
        key = f"eval_validation_{result['primary_metric']}"
        metrics = [100 * line[key] for line in log if key in line]
        assert run["curves"][0]["y"] == pytest.approx(metrics, rel=1e-5)
    names = list(saved["ranks"])
    places = shown["grids"][run["grid"]]
    assert [places["rows"][row] for row, _ in places["places"]] == [name.split(".")[3] for name in names]
    assert dict(shown["settings"][run["settings"]])["learning_rate"] == "0.001"
    assert dict(run["facts"])["commit"] == "0123456789abcdef"


def test_rank_maps_and_masks(folder, shown):
    run = run_of(shown, "sst2", "fisher", 0)
    lines = (folder / "sst2" / "fisher-seed0" / "allocation.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "ranks" in line]
    assert run["maps"]["steps"] == [line["step"] for line in logged]
    # The same map as before is not repeated.
    assert run["maps"]["ranks"] == [logged[0]["ranks"], *[None] * (len(logged) - 1)]
    assert run["budget"]["y"] == [line["budget"] for line in logged]
    assert run["churn"] == {"x": [10, 15, 20], "y": [25, 10, 5]}
    assert [run["share"][kind]["y"][0] for kind in "EAB"] == [60, 30, 10]
    assert run["notes"] == []


def test_the_tables_are_those_of_the_markdown_report(folder, shown):
    markdown = write_report(folder)[0].read_text()
    for row in shown["results"]["rows"]:
        assert any(line.startswith(f"| {row[0]} | ") and all(cell["t"] in line for cell in row[1:])
                   for line in markdown.splitlines())  # fmt: skip
    assert [cell["n"] for cell in shown["results"]["rows"][2][1:3]] == ["n = 2", "n = 1 of 2"]
    assert shown["results"]["rows"][2][3] == {"t": "–", "v": None}  # no average without all runs
    for name in ("contrasts", "exploratory"):
        assert shown[name]["rows"]
        for row in shown[name]["rows"]:
            cells = [escape_markdown(cell if isinstance(cell, str) else cell["t"]) for cell in row]
            assert f"| {' | '.join(cells)} |" in markdown
    low, high, low90, high90 = shown["contrasts"]["rows"][0][5]["ends"]
    assert low < low90 < shown["contrasts"]["rows"][0][4]["v"] < high90 < high
    assert ["machine", "A Processor, 1 thread(s)"] in shown["facts"]


def test_what_is_missing_is_said(folder, shown):
    states = [row[3] for row in shown["all_runs"]["rows"]]
    assert states.count("complete") == 11 and "failed: out of luck" in states
    assert "no allocation.jsonl" in " ".join(run_of(shown, "sst2", "lora", 0)["notes"])
    assert "no lines of masks" in " ".join(run_of(shown, "sst2", "fisher", 1)["notes"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("allocation.jsonl", "no allocation.jsonl"), ("metrics.jsonl", "no metrics.jsonl"),
     ("ranks.json", "no ranks.json"), ("config.json", "no config.json")],
)  # fmt: skip
def test_a_run_without_a_file(tmp_path, name, words):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES))
    (tmp_path / "sst2" / "fisher-seed0" / name).unlink()
    (run,) = of_folder(tmp_path)["runs"]
    assert words in " ".join(run["notes"])
    assert run["primary"] is not None


def test_text_stays_text(tmp_path):
    """No name ends the element of the data, opens another one, or is taken for a place of the page."""
    evil = "</script><script>alert(1)</script><!-- scripts --> & \u2028"
    write_plan(tmp_path, tasks=["sst2"], arms=["sensitivity"], seeds=[0], name=evil, description=evil)
    write_run(tmp_path, "sst2", "sensitivity", 0, agreeing(RATES), model=evil)
    text = made(tmp_path)
    found = content(text)
    assert (
        found["title"] == found["description"] == evil and "<!-- scripts -->" in dict(found["facts"])["model"]
    )
    assert "alert(1)</script>" not in text and text.count("<script") == 1 + len(SCRIPTS)
    assert text.count("</script>") == 1 + len(SCRIPTS)
    assert "<title>&lt;/script&gt;" in text


def test_the_parts_fit_into_the_page_and_load_nothing(text):
    for path in HERE.iterdir():
        if path.suffix in (".js", ".css"):
            source = path.read_text()
            assert "</script" not in source and "</style" not in source and "innerHTML" not in source
    own = text[: text.index('<script type="application/json"')]
    assert not re.findall(r"(?:src|href)=|@import|url\(", own)
    assert [a for a in re.findall(r"https?://[^\"' ]+", text) if a != "http://www.w3.org/2000/svg"] == []


def test_the_same_files_give_the_same_page(folder, text):
    assert made(folder) == text


def test_one_run(tmp_path):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES))
    place = tmp_path / "sst2" / "fisher-seed0"
    path = write_folder_page(place, find_runs(place))
    assert path == place / "report" / "report.html"
    found = content(path.read_text())
    assert found["kind"] == "runs" and found["title"] == "fisher-seed0" and len(found["runs"]) == 1
    assert "results" not in found and "contrasts" not in found
    assert (
        write_folder_page(place, find_runs(place), tmp_path / "there") == tmp_path / "there" / "report.html"
    )


def test_a_folder_with_the_same_run_twice(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "sst2", "fisher", 0, agreeing(RATES))
    arms = [run["arm"] for run in of_folder(tmp_path)["runs"]]
    assert arms == ["fisher (a/sst2/fisher-seed0)", "fisher (b/sst2/fisher-seed0)"]


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES))
    path = tmp_path / "sst2" / "fisher-seed0" / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": 1.5}\n{"step": 8, "loss": NaN}\n')
    (run,) = of_folder(tmp_path)["runs"]
    assert run["loss"][0] == {"name": "training", "x": [4, 8], "y": [1.5, None]}
    assert "not finite" in " ".join(run["notes"])


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [("primary", 81.5, "primary is 81.5"), ("primary", "high", "primary is 'high'"),
     ("seed", "0", "seed is '0'"), ("task", 3, "task is 3")],
)  # fmt: skip
def test_a_result_that_no_run_writes(tmp_path, entry, value, words):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES))
    change(tmp_path / "sst2" / "fisher-seed0" / "result.json", **{entry: value})
    with pytest.raises(ValueError, match=rf"result\.json: {words}.*run it again"):
        folder_page(tmp_path, find_runs(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"step": 4, "ranks": [1, 2]}', "ranks of step 4 are not 12 whole numbers"),
     ('{"step": 4, "ranks": "all"}', "ranks of step 4 are not 12 whole numbers"),
     ('{"step": 4, "mask": {}}\n{"step": 5, "mask": {}}', "a mask without kept"),
     ('{"step": 4', "line 1 is not JSON")],
)  # fmt: skip
def test_a_broken_log_is_named(tmp_path, line, words):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES))
    (tmp_path / "sst2" / "fisher-seed0" / "allocation.jsonl").write_text(line)
    with pytest.raises(ValueError, match=rf"allocation\.jsonl.*{words}.*delete that line"):
        folder_page(tmp_path, find_runs(tmp_path))


def test_a_file_is_in_the_way(tmp_path):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES))
    (tmp_path / "report").write_text("mine")
    with pytest.raises(ValueError, match="report is a file; give a folder"):
        write_folder_page(tmp_path, find_runs(tmp_path))


def test_a_later_report_without_a_page_takes_the_old_one_away(tmp_path):
    write_sweep(tmp_path, {"sensitivity": 0.8}, tasks=["sst2"], seeds=[0])
    assert "report.html" in [path.name for path in write_report(tmp_path, as_html=True)]
    assert (tmp_path / "report" / "report.html").is_file()
    write_report(tmp_path)
    assert not (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 100, 101])
def test_thinning_keeps_the_ends(count):
    steps = list(range(10, 10 * count + 1, 10))
    kept = thin(steps, 6)
    assert len(kept) <= 6 and kept[:1] == steps[:1] and kept[-1:] == steps[-1:]
    assert len(steps) > 6 or kept == steps
    assert len({b - a for a, b in pairwise(kept[:-1])}) <= 1  # evenly


def test_a_long_run_stays_small(tmp_path):
    write_run(tmp_path, "sst2", "fisher", 0, agreeing(RATES), steps=20000)
    (run,) = of_folder(tmp_path)["runs"]
    assert run["maps"]["logged"] == 5000 and len(run["maps"]["steps"]) <= MOST_MAPS
    assert len(run["loss"][0]["x"]) <= MOST_POINTS and run["loss"][0]["x"][-1] == 20000
    assert run["loss"][0]["of"] == run["budget"]["of"] == 5000
    assert len(json.dumps(run)) < 20000


def test_matrices_outside_of_numbered_layers_are_one_column():
    assert grid(["pooler", "encoder.layer.0.attention.self.query"]) == {
        "rows": ["pooler", "encoder.layer.0.attention.self.query"], "columns": ["rank"],
        "places": [[0, 0], [1, 0]],
    }  # fmt: skip


def test_the_parts_are_package_data():
    root = HERE.parents[3]
    with (root / "pyproject.toml").open("rb") as file:
        globs = tomllib.load(file)["tool"]["setuptools"]["package-data"]["adalora_fast"]
    covered = {path for pattern in globs for path in (root / "adalora_fast").glob(pattern)}
    parts = {path for path in HERE.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert len(parts) == 2 + len(SCRIPTS) and parts <= covered


def browse(path, fragment, profile):
    """The page after its scripts, and what the browser's console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000", "--dump-dom",
         "--enable-logging=stderr", f"--user-data-dir={profile}", f"{path.as_uri()}#{fragment}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def cells_of(dom, table):
    """The texts of a table's body rows."""
    body = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page with")
def test_a_browser_draws_it(folder, text, tmp_path):
    """The chosen run's map, its curves, a column sorted by a click, every map played, a silent console."""
    script = "<script>document.querySelectorAll('#results thead button')[1].click()</script></body>"
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", script))
    dom, said = browse(path, "task=sst2&arm=fisher&seed=0&step=12", tmp_path / "profile")
    assert said == []
    ranks = json.loads((folder / "sst2" / "fisher-seed0" / "ranks.json").read_text())["ranks"]
    drawn = re.findall(r'<td class="rank"[^>]*>(\d+)</td>', dom)
    assert sorted(map(int, drawn)) == sorted(ranks.values())
    assert re.search(r'<output for="step"[^>]*>step 12</output>', dom)
    assert len(re.findall(r'<figure class="chart">', dom)) == 5 and '<p class="gap">No masks' not in dom
    # A click sorts numbers from the highest; the arms of RATES are in that order of accuracy from the start.
    assert [row[0] for row in cells_of(dom, "results")] == ["sensitivity", "fisher", "lora"]
    path.write_text(text.replace("</body>", PLAY))
    dom, said = browse(path, "task=sst2&arm=fisher&seed=0", tmp_path / "profile")
    assert said == []
    assert re.search(r'data-seen="([^"]*)"', dom)[1] == "".join(f" step {step}" for step in range(4, 41, 4))
    path.write_text(text)
    dom, said = browse(path, "sort=results:1:ascending&task=cola&arm=lora&seed=1", tmp_path / "profile")
    assert said == []
    assert [row[0] for row in cells_of(dom, "results")] == ["lora", "fisher", "sensitivity"]
    assert "This run is not complete (failed: out of luck)." in dom
