// The page: what was run, its tables, and the run that is chosen. Its state is in the address, after "#".
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const chosen = new URLSearchParams(location.hash.slice(1));
const tables = {};
const choices = {};
const view = element("div", {});

function main() {
  const several = data.runs.length + data.missing.length > 1;
  document.getElementById("report").replaceChildren(...[
    element("h1", {}, data.title),
    data.description ? element("p", {}, data.description) : null,
    section("What was run", facts(data.facts, "long")),
    data.results ? section("Results", results()) : null,
    data.contrasts ? section("Contrasts", contrasts()) : null,
    !data.results && data.notes.length ? data.notes.map(prose).flat() : null,
    several ? section("All runs", allRuns()) : null,
    data.runs.length ? section(several ? "One run" : "The run", several ? choosers() : null, view) : null,
    data.remarks.length ? section("Remarks", element("ul", {}, data.remarks.map((text) => element("li", {}, text)))) : null,
    element("footer", {}, "Made by adalora-fast report --html from result files alone. Nothing is loaded from anywhere; " +
      "numbers of curves are rounded to six digits."),
  ].flat().filter(Boolean));
  if (data.runs.length) follow(true);
  sortAsAsked();
}

function section(title, ...content) {
  return element("section", {}, element("h2", {}, title), content);
}

function keep(name, value) {
  chosen.set(name, value);
  history.replaceState(null, "", `#${chosen}`);
}

function addTable(id, table, caption) {
  tables[id] = sortableTable(id, table, { caption, margin: data.margin, choose: chooseNumber,
    sorted: (order) => keep("sort", order) });
  return tables[id].node;
}

function results() {
  return [
    addTable("results", data.results, "Points at the end of training: mean ± standard deviation (n − 1) over n seeds"),
    element("p", {}, "Bold: the 95 % interval of the lead over every other arm excludes 0 (not corrected for the number " +
      "of arms, and no verdict: those are below)."),
    data.notes.map(prose).flat(),
  ];
}

function contrasts() {
  const method = element("details", {}, element("summary", {}, "How it is compared"), prose(data.method));
  if (!data.contrasts.rows.length && !data.exploratory.rows.length) {
    return [element("p", {}, "There is nothing to compare yet: no two arms have a complete run of the same seed."), method];
  }
  const others = data.exploratory.rows.length;
  return [
    data.contrasts.rows.length
      ? addTable("contrasts", data.contrasts, "Declared contrasts, in points: the first arm minus the second")
      : element("p", {}, "No declared contrast has complete runs of both arms."),
    intervalKey(),
    others ? element("details", {}, element("summary", {}, `${others} exploratory pairs`),
      addTable("exploratory", data.exploratory, "Exploratory pairs, not corrected, without verdicts")) : null,
    method,
  ];
}

function intervalKey() {
  return element("p", { class: "key" }, "Thin line: 95 % interval, not corrected; thick: 90 %; grey: " +
    `±${data.margin} points; the vertical line: no difference; every task has its own scale. Square: differs; triangle: equivalent; circle: not ` +
    "decided; cross: exploratory.");
}

function allRuns() {
  const rows = data.all_runs.rows.length;
  const missing = data.missing.length ? `, ${data.missing.length} of them not complete` : "";
  const table = addTable("runs", data.all_runs, "An arm's name shows its run below");
  if (rows <= 24) return table;
  return element("details", {}, element("summary", {}, `${rows} runs${missing}`), table);
}

function choosers() {
  const named = { task: data.order.task, arm: data.order.arm.map((arm) => [arm, arm]),
    seed: data.order.seed.map((seed) => [String(seed), String(seed)]) };
  const fields = Object.entries(named).map(([name, options]) => {
    choices[name] = element("select", { id: name, change: () => { remember(); follow(); } },
      options.map(([value, words]) => element("option", { value }, words)));
    return element("label", { for: name }, `${name} `, choices[name]);
  });
  return element("div", { class: "controls choosers" }, fields);
}

function remember() {
  chosen.delete("step");
  Object.entries(choices).forEach(([name, select]) => keep(name, select.value));
}

function chooseNumber(number) {
  const run = data.runs[number];
  Object.entries(choices).forEach(([name, select]) => { select.value = String(run[name]); });
  remember();
  follow();
  view.scrollIntoView({ block: "start" });
}

/** Show the run of the address; at first, without one, the run that has logged the most. */
function follow(first = false) {
  const wanted = (run) => Object.keys(choices).every((name) => String(run[name]) === choices[name].value);
  if (first) {
    const known = (run) => 2 * Boolean(run.churn) + Boolean(run.maps);
    const start = data.runs.reduce((best, run) => (known(run) > known(best) ? run : best));
    Object.entries(choices).forEach(([name, select]) => {
      const asked = [...select.options].some((option) => option.value === chosen.get(name));
      select.value = asked ? chosen.get(name) : String(start[name]);
    });
  }
  const run = Object.keys(choices).length ? data.runs.find(wanted) : data.runs[0];
  if (Object.keys(choices).length) markOptions();
  if (!run) {
    const gap = data.missing.find(wanted);
    const why = gap ? `${gap.state}${gap.reason ? `: ${gap.reason}` : ""}` : "there is none in this folder";
    view.replaceChildren(element("p", { class: "gap" }, `This run is not complete (${why}).`));
    return;
  }
  const step = chosen.get("step");
  const own = runView(data, run, (moved) => keepStep(moved));
  view.replaceChildren(own.node);
  if (step !== null && Number.isFinite(Number(step))) own.pick(Number(step));
}

let isReady = false; // the first view leaves the address alone

function keepStep(step) {
  if (isReady) keep("step", step);
}

/** Say in the lists which choices have no complete run. */
function markOptions() {
  const at = (name) => choices[name].value;
  const has = (task, arm, seed) => data.runs.some((run) =>
    run.task === task && run.arm === arm && (seed === null || String(run.seed) === seed));
  const mark = (name, test) => [...choices[name].options].forEach((option) => {
    const words = option.textContent.replace(/ \(no run\)$/, "");
    option.textContent = test(option.value) ? words : `${words} (no run)`;
  });
  mark("arm", (arm) => has(at("task"), arm, null));
  mark("seed", (seed) => has(at("task"), at("arm"), seed));
}

/** #sort=<table>:<column>:<ascending or descending>. */
function sortAsAsked() {
  const [id, column, order] = (chosen.get("sort") || "").split(":");
  if (tables[id] && Number(column) < tables[id].columns) {
    tables[id].sort(Number(column), order === "ascending" ? "ascending" : "descending");
  }
}

window.addEventListener("hashchange", () => location.reload());

// Paper folds nothing away.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => { part.open = true; });
});
window.addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));

main();
isReady = true;
