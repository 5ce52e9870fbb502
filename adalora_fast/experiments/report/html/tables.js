// Tables that are sorted by a click on a column, and intervals drawn in their cells.
"use strict";

const LONG = 40; // characters from which a cell may be broken into lines

/**
 * A table with a button in every heading. `table` is {columns: [[heading, kind]], rows}, `choose` what the
 * button of a cell with a run does; `sorted` is told after every click.
 */
function sortableTable(id, table, { caption, choose, sorted, margin } = {}) {
  const scales = intervalScales(table, margin);
  const rows = table.rows.map((cells) => ({
    keys: cells.map((cell) => (typeof cell === "string" ? cell : "v" in cell ? cell.v : cell.t)),
    node: element("tr", {}, cells.map((cell, i) => bodyCell(cell, i, table.columns[i][1], scales[cells[0]], choose))),
  }));
  const body = element("tbody", {}, rows.map((row) => row.node));
  const heads = table.columns.map(([heading, kind], i) =>
    element("th", { scope: "col", class: kind, "aria-sort": "none" },
      element("button", { type: "button", title: "sort by this column", click: () => turn(i) },
        heading.replaceAll("/", "/\u200b"), element("span", { class: "arrow", "aria-hidden": "true" }))));

  function turn(column) {
    const first = table.columns[column][1] === "text" ? "ascending" : "descending";
    const now = heads[column].getAttribute("aria-sort");
    sort(column, now === "none" ? first : now === "ascending" ? "descending" : "ascending");
    if (sorted) sorted(`${id}:${column}:${heads[column].getAttribute("aria-sort")}`);
  }

  function sort(column, order) {
    const sign = order === "ascending" ? 1 : -1;
    const known = (row) => row.keys[column] !== null;
    const ordered = [...rows].sort((a, b) => {
      if (!known(a) || !known(b)) return known(b) - known(a); // what is not known comes last, both ways
      return sign * compare(a.keys[column], b.keys[column]);
    });
    body.append(...ordered.map((row) => row.node));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? order : "none"));
  }

  const node = element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    element("table", { id },
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, heads)), body));
  return { node, turn, sort, columns: table.columns.length };
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
}

function bodyCell(cell, place, kind, scale, choose) {
  const { t: text, n: seeds, best, run } = typeof cell === "string" ? { t: cell } : cell;
  const content = [best ? element("strong", {}, text) : text];
  if (run !== undefined && choose) {
    content[0] = element("button", { type: "button", class: "link", title: "show this run",
      click: () => choose(run) }, text);
  }
  if (seeds) content.push(" ", element("small", {}, seeds));
  if (kind === "interval") content.unshift(interval(cell, scale));
  const name = place === 0 && kind === "text" ? "th" : "td";
  const look = kind === "text" && text.length > LONG ? "text long" : kind;
  return element(name, { class: look, scope: name === "th" ? "row" : null }, content);
}

/** By task, the first column: one scale for its intervals, with zero and the margin of equivalence in it. */
function intervalScales(table, margin) {
  const column = table.columns.findIndex(([, kind]) => kind === "interval");
  const scales = {};
  for (const task of column < 0 ? [] : new Set(table.rows.map((row) => row[0]))) {
    const ends = table.rows.filter((row) => row[0] === task).flatMap((row) => row[column].ends);
    const [low, high] = [Math.min(-margin, ...ends), Math.max(margin, ...ends)];
    scales[task] = { margin, at: (value) => 4 + (132 * (value - low)) / (high - low) };
  }
  return scales;
}

/** 95 % thin, 90 % thick, the difference as a mark of the verdict's shape, the margin of equivalence grey. */
function interval({ v: value, ends, kind }, { margin, at }) {
  const [low, high, low90, high90] = ends;
  const x = at(value);
  const marks = {
    differs: drawn("rect", { x: x - 4, y: 6, width: 8, height: 8 }),
    equivalent: drawn("path", { d: `M${x - 5} 14.5h10l-5 -9z` }),
    not: drawn("circle", { cx: x, cy: 10, r: 4 }),
    exploratory: drawn("path", { d: `M${x - 4} 6l8 8m0 -8l-8 8`, class: "line", "stroke-width": 2 }),
  };
  return drawn("svg", { viewBox: "0 0 140 20", width: 140, height: 20, class: `interval ${kind}`,
    "aria-hidden": "true" },
    drawn("rect", { x: at(-margin), y: 0, width: at(margin) - at(-margin), height: 20, class: "margin" }),
    drawn("path", { d: `M${at(0)} 0V20`, class: "zero" }),
    drawn("path", { d: `M${at(low)} 10H${at(high)}`, class: "line", "stroke-width": 1.3 }),
    drawn("path", { d: `M${at(low90)} 10H${at(high90)}`, class: "line", "stroke-width": 3.2 }),
    marks[kind]);
}
