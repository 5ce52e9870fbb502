// The rank map: layers by matrices, coloured, with the number in every cell.
"use strict";

// matplotlib's cividis, sampled evenly: the same order in grey and for every kind of colour vision.
const COLOURS = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
  [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
];

function colourOf(share) {
  const place = Math.min(1, Math.max(0, share)) * (COLOURS.length - 1);
  const below = Math.min(Math.floor(place), COLOURS.length - 2);
  const mix = COLOURS[below].map((from, i) => Math.round(from + (place - below) * (COLOURS[below + 1][i] - from)));
  return `rgb(${mix.join(", ")})`;
}

/** {step, ranks, words} of every known map of a run, the final one last. */
function framesOf(run) {
  const frames = [];
  let ranks = null;
  (run.maps ? run.maps.steps : []).forEach((step, i) => {
    ranks = run.maps.ranks[i] || ranks;
    frames.push({ step, ranks, words: `step ${shown(step)}` });
  });
  if (run.final) {
    const end = run.counts.steps;
    const last = frames.length ? frames[frames.length - 1] : null;
    const same = last && last.step === end && String(last.ranks) === String(run.final);
    if (!same) frames.push({ step: end, ranks: run.final, words: `end of training${end ? `, step ${shown(end)}` : ""}` });
  }
  return frames;
}

/** A table of cells that `show(ranks)` fills; sums of rows and columns beside. */
function rankMap(grid, most) {
  const cells = grid.rows.map(() => grid.columns.map(() => element("td", { class: "none" })));
  grid.places.forEach(([row, column]) => cells[row][column].setAttribute("class", "rank"));
  const rowSums = grid.rows.map(() => element("td", { class: "sum" }));
  const columnSums = grid.columns.map(() => element("td", { class: "sum" }));
  const total = element("td", { class: "sum" });
  const isOneColumn = grid.columns.length === 1;
  const head = ["layer", ...grid.columns, ...(isOneColumn ? [] : ["sum"])];
  const table = element("table", { class: "map" },
    element("thead", {}, element("tr", {}, head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, grid.rows.map((name, i) =>
      element("tr", {}, element("th", { scope: "row" }, name), cells[i], isOneColumn ? [] : rowSums[i]))),
    element("tfoot", {}, element("tr", {}, element("th", { scope: "row" }, "sum"), columnSums,
      isOneColumn ? [] : total)));

  function show(ranks) {
    const rows = grid.rows.map(() => 0);
    const columns = grid.columns.map(() => 0);
    ranks.forEach((rank, i) => {
      const [row, column] = grid.places[i];
      const cell = cells[row][column];
      const share = most ? rank / most : 0;
      cell.textContent = rank;
      cell.style.backgroundColor = colourOf(share);
      cell.style.color = share > 0.47 ? "#000" : "#fff";
      rows[row] += rank;
      columns[column] += rank;
    });
    rowSums.forEach((cell, i) => { cell.textContent = rows[i]; });
    columnSums.forEach((cell, i) => { cell.textContent = columns[i]; });
    total.textContent = rows.reduce((a, b) => a + b, 0);
  }

  return { node: element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "rank map" }, table), show };
}

function colourScale(most) {
  const stops = COLOURS.map((colour) => `rgb(${colour.join(", ")})`).join(", ");
  const bar = element("span", { class: "bar" });
  bar.style.background = `linear-gradient(to right, ${stops})`;
  return element("p", { class: "scale" }, "rank 0 ", bar, ` ${most}`);
}
