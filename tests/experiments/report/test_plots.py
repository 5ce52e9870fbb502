"""Rank heat-maps: their values, and files that are the same for the same results."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from adalora_fast.experiments.models.families import FAMILIES
from adalora_fast.experiments.report.plots import plot_ranks, rank_figure, rank_grid


def ranks(layers=3, start=0, family="bert"):
    names = [
        f"bert.encoder.layer.{i}.{suffix}"
        for i in range(layers)
        for suffix in FAMILIES[family].matrices.values()
    ]
    return {name: (start + place) % 17 for place, name in enumerate(names)}


def write_run(folder, saved, method="fisher", init_r=16):
    folder.mkdir(parents=True)
    result = {"method": method, "primary_metric": "accuracy", "primary": 0.8125}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "ranks.json").write_text(json.dumps({"init_r": init_r, "ranks": saved}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_grid(family):
    expected = list(FAMILIES[family].matrices)
    grid, layers, matrices = rank_grid(ranks(family=family))
    assert layers == [0, 1, 2] and matrices == expected
    assert np.array_equal(grid, np.arange(3 * len(expected)).reshape(3, -1) % 17)


def test_grid_of_part_of_the_matrices():
    some = {
        "m.layer.10.attention.self.query": 3,
        "m.layer.2.attention.self.query": 1,
        "m.layer.2.output.dense": 4,
        "classifier": 9,
    }
    grid, layers, matrices = rank_grid(some)
    assert layers == [2, 10] and matrices == ["query", "output"]  # layers are numbers, not words
    assert np.array_equal(grid, [[1, 4], [3, np.nan]], equal_nan=True)


@pytest.mark.parametrize("names", [{}, {"classifier": 3}])
def test_nothing_to_draw(names):
    with pytest.raises(ValueError, match="is in a numbered layer; nothing to draw"):
        rank_grid(names)


def panels_of(figure):
    return [axis for axis in figure.axes if axis.images and axis.get_title()]


def drawn(axis):
    """What stands in the cells, as an array."""
    grid = np.full(axis.images[0].get_array().shape, np.nan)
    for text in axis.texts:
        column, row = text.get_position()
        grid[int(row), int(column)] = float(text.get_text())
    return grid


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_panel_shows_its_own_run_on_one_scale(count):
    saved = [ranks(start=5 * i) for i in range(count)]
    figure = rank_figure([(f"run {i}", own) for i, own in enumerate(saved)], init_r=20, title="Ranks")
    panels = [axis for axis in panels_of(figure) if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == [f"run {i}" for i in range(count)]
    for axis, own in zip(panels, saved, strict=True):
        expected = rank_grid(own)[0]
        assert np.array_equal(axis.images[0].get_array(), expected)
        assert np.array_equal(drawn(axis), expected)
        assert axis.images[0].get_clim() == (0, 20)
    assert figure.get_suptitle() == "Ranks"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_column_of_panels_names_its_matrices(count):
    figure = rank_figure([(f"run {i}", ranks()) for i in range(count)], init_r=16, title="Ranks")
    figure.canvas.draw()
    visible = [axis for axis in panels_of(figure) if axis.get_visible()]
    named = {
        round(axis.get_position().x0, 2)
        for axis in visible
        if any(label.get_text() and label.get_visible() for label in axis.get_xticklabels())
        and axis.xaxis.get_tick_params()["labelbottom"]
    }
    assert named == {round(axis.get_position().x0, 2) for axis in visible}


def test_a_panel_of_other_layers_is_drawn_under_its_own_names():
    """The second run adapts fewer matrices than the first: no value under a foreign name."""
    few = {name: rank for name, rank in ranks().items() if "query" not in name}
    figure = rank_figure([("all", ranks()), ("few", few)], init_r=16, title="Ranks")
    figure.canvas.draw()
    second = panels_of(figure)[1]
    labels = [label.get_text().replace("\n", " ") for label in second.get_xticklabels()]
    values = drawn(second)
    assert values[0, labels.index("key")] == few["bert.encoder.layer.0.attention.self.key"]


def test_digits_stand_out_from_their_cell():
    figure = rank_figure([("run", ranks())], init_r=16, title="Ranks")
    (panel,) = panels_of(figure)
    image = panel.images[0]

    def luminance(colour):
        from matplotlib.colors import to_rgb

        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for text in panel.texts:
        cell = luminance(image.cmap(image.norm(float(text.get_text())))[:3])
        light, dark = sorted((cell, luminance(text.get_color())), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.0  # what readability guidelines ask of large text


def test_files(tmp_path):
    folders = [write_run(tmp_path / name, ranks(start=i), name) for i, name in enumerate(("fisher", "gsnr"))]
    files = plot_ranks(folders, tmp_path / "ranks-seed0", title="Where rank goes")
    assert [file.name for file in files] == ["ranks-seed0.png", "ranks-seed0.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(files[1]).getroot().tag.endswith("svg")
    svg = files[1].read_text()
    for words in ("Where rank goes", "fisher: accuracy 0.812", "gsnr: accuracy 0.812", "layer", "final rank"):
        assert words in svg  # text stays text


def test_a_dot_in_the_stem(tmp_path):
    folder = write_run(tmp_path / "run", ranks())
    files = plot_ranks([folder], tmp_path / "ranks-lr0.001", title="Ranks")
    assert [file.name for file in files] == ["ranks-lr0.001.png", "ranks-lr0.001.svg"]


def test_the_same_results_give_the_same_files_in_another_process(tmp_path):
    folder = write_run(tmp_path / "run", ranks())
    here = plot_ranks([folder], tmp_path / "here", title="Ranks")
    again = plot_ranks([folder], tmp_path / "again", title="Ranks")
    code = (
        "from pathlib import Path\n"
        "from adalora_fast.experiments.report.plots import plot_ranks\n"
        f"plot_ranks([Path({str(folder)!r})], Path({str(tmp_path / 'there')!r}), title='Ranks')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[3])
    for first, second in zip(here, again, strict=True):
        there = tmp_path / f"there{first.suffix}"
        assert first.read_bytes() == second.read_bytes() == there.read_bytes()
