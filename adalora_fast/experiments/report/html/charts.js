// Line charts by optimizer step, with the values at the chosen step in their legends.
"use strict";

const BOX = { width: 460, height: 220, left: 50, right: 12, top: 10, bottom: 38 };

/** Round numbers of which about `count` lie between low and high. */
function ticks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

function tickText(value) {
  const text = Math.abs(value) >= 10000 ? `${Number((value / 1000).toPrecision(6))}k` : `${Number(value.toPrecision(6))}`;
  return text.replace("-", "−");
}

/** The last value at or before a step. */
function valueAt(series, step) {
  let found = null;
  for (let i = 0; i < series.x.length && series.x[i] <= step; i += 1) found = series.y[i];
  return found;
}

/**
 * A figure of the series [{name, x, y}] over [0, end]. `zero` begins the axis at 0; `empty` is said where there
 * is nothing to draw; `pick(step)` is called on a click. Returns {node, at}: `at(step)` moves the cursor.
 */
function lineChart({ title, unit, series, end, zero, empty, pick }) {
  const known = series.filter((each) => each.y.some((value) => value !== null));
  const heading = element("figcaption", {}, title, unit ? element("small", {}, ` ${unit}`) : null);
  if (!known.length) {
    return { node: element("figure", { class: "chart" }, heading, element("p", { class: "gap" }, empty)), at() {} };
  }
  const values = known.flatMap((each) => each.y).filter((value) => value !== null);
  let [low, high] = [zero ? Math.min(0, ...values) : Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [zero ? 0 : low - 1, high + 1];
  const room = zero ? 0 : 0.05 * (high - low);
  [low, high] = [low - room, high + 0.05 * (high - low)];
  const x = (step) => BOX.left + ((BOX.width - BOX.left - BOX.right) * step) / end;
  const y = (value) => BOX.height - BOX.bottom - ((BOX.height - BOX.top - BOX.bottom) * (value - low)) / (high - low);
  const cursor = drawn("path", { class: "cursor" });
  const words = known.map((each) => `${each.name} from ${shown(each.y[0])} to ${shown(each.y[each.y.length - 1])}`);
  const picture = drawn("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img",
    "aria-label": `${title}: ${words.join("; ")}`,
    click: (event) => {
      const box = picture.getBoundingClientRect();
      const inside = ((event.clientX - box.left) / box.width) * BOX.width - BOX.left;
      pick((inside / (BOX.width - BOX.left - BOX.right)) * end);
    } },
    ticks(low, high, 4).map((value) => [
      drawn("path", { d: `M${BOX.left} ${y(value)}H${BOX.width - BOX.right}`, class: "rule" }),
      drawn("text", { x: BOX.left - 6, y: y(value) + 4, "text-anchor": "end" }, tickText(value)),
    ]),
    ticks(0, end, 5).map((step) =>
      drawn("text", { x: x(step), y: BOX.height - BOX.bottom + 17, "text-anchor": "middle" }, tickText(step))),
    drawn("text", { x: (BOX.left + BOX.width - BOX.right) / 2, y: BOX.height - 4, "text-anchor": "middle" },
      "optimizer step"),
    cursor,
    known.map((each, i) => line(each, i, x, y)));
  const readings = known.map(() => element("b", {}));
  const legend = element("ul", { class: "legend" }, known.map((each, i) =>
    element("li", {}, drawn("svg", { viewBox: "0 0 26 10", width: 26, height: 10, "aria-hidden": "true" },
      drawn("path", { d: "M0 5H26", class: `curve c${i % 6}` })), ` ${each.name} `, readings[i],
      each.of ? element("small", {}, ` (${each.x.length} of ${shown(each.of)} values)`) : null)));

  function at(step) {
    cursor.setAttribute("d", `M${x(step)} ${BOX.top}V${BOX.height - BOX.bottom}`);
    known.forEach((each, i) => { readings[i].textContent = shown(valueAt(each, step)); });
  }

  return { node: element("figure", { class: "chart" }, heading, picture, legend), at };
}

/** A path that breaks where a value is missing; dots where there are few values. */
function line(series, number, x, y) {
  let path = "";
  let pen = "M";
  series.x.forEach((step, i) => {
    if (series.y[i] === null) pen = "M";
    else {
      path += `${pen}${x(step).toFixed(1)} ${y(series.y[i]).toFixed(1)}`;
      pen = "L";
    }
  });
  const dots = series.x.length > 15 ? [] : series.x.filter((_, i) => series.y[i] !== null).map((step) =>
    drawn("circle", { cx: x(step), cy: y(valueAt(series, step)), r: 3, class: `dot c${number % 6}` }));
  return [drawn("path", { d: path, class: `curve c${number % 6}` }), dots];
}
