// One run: its rank map over training, its curves, and what its folder does not have.
"use strict";

const EVERY = 250; // milliseconds between two maps while it plays

/** The view of a run; `moved(step)` is told when another step is chosen. */
function runView(data, run, moved) {
  const frames = framesOf(run);
  const grid = run.grid === undefined ? null : data.grids[run.grid];
  const end = run.counts.steps || Math.max(1, ...(run.loss || []).flatMap((each) => each.x));
  const charts = chartsOf(run, end, pick);
  const map = grid && rankMap(grid, run.init_r);
  const where = element("output", { for: "step", "aria-live": "polite" });
  const slider = element("input", { type: "range", id: "step", min: 0, max: Math.max(0, frames.length - 1),
    step: 1, "aria-label": "step of the rank map", input: () => { stop(); show(Number(slider.value)); } });
  const play = element("button", { type: "button", id: "play", click: () => (timer ? stop() : start()) }, "▶ Play");
  let timer = null;
  let place = 0;

  function show(number) {
    place = Math.min(Math.max(0, number), frames.length - 1);
    slider.value = place;
    const { step, ranks, words } = frames[place];
    where.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    map.show(ranks);
    charts.forEach((chart) => chart.at(step));
    if (!timer) moved(step);
  }

  function start() {
    if (place === frames.length - 1) place = -1;
    timer = setInterval(() => {
      if (!play.isConnected) clearInterval(timer); // another run was chosen
      else if (place + 1 < frames.length) show(place + 1);
      else stop();
    }, EVERY);
    play.textContent = "❚❚ Pause";
  }

  function stop() {
    if (!timer) return;
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
    moved(frames[place].step);
  }

  /** The map nearest to a step. */
  function pick(step) {
    if (!frames.length) return charts.forEach((chart) => chart.at(Math.min(end, Math.max(0, step))));
    stop();
    const distances = frames.map((frame) => Math.abs(frame.step - step));
    return show(distances.indexOf(Math.min(...distances)));
  }

  const node = element("div", { id: "run-view" },
    element("p", { class: "primary" }, element("strong", {}, shown(run.primary)), ` points of ${run.words}`,
      run.sample ? " (on a sample of the official data)" : ""),
    facts([...run.facts, ...countsOf(run)]),
    run.notes.length ? element("ul", { class: "notes" }, run.notes.map((note) => element("li", {}, note))) : null,
    map ? element("section", { class: "ranks" },
      element("h3", {}, "Rank map"),
      frames.length > 1 ? element("div", { class: "controls" }, play, slider, where) : element("p", {}, where),
      map.node, colourScale(run.init_r), thinned(run)) : null,
    element("h3", {}, "Curves"),
    element("div", { class: "charts" }, charts.map((chart) => chart.node)),
    settingsOf(data, run));
  if (frames.length) show(frames.length - 1);
  else charts.forEach((chart) => chart.at(end));
  return { node, pick };
}

function countsOf(run) {
  const names = { total_rank: "total rank", parameters: "parameters trained", steps: "steps", seconds: "seconds" };
  const counts = Object.entries(names).map(([key, name]) => [name, shown(run.counts[key])]);
  return [...run.metrics.map(([name, value]) => [name, shown(value)]), ...counts];
}

function thinned(run) {
  if (!run.maps || run.maps.logged === run.maps.steps.length) return null;
  return element("p", { class: "gap" },
    `${run.maps.steps.length} of ${shown(run.maps.logged)} logged maps are on this page, evenly spaced.`);
}

function chartsOf(run, end, pick) {
  const one = (curve, name) => (curve ? [{ name, ...curve }] : []);
  const terms = { E: "λ", A: "Q (lora_A)", B: "P (lora_B)" };
  const shares = run.share ? Object.entries(terms).flatMap(([key, name]) => one(run.share[key], name)) : [];
  return [
    { title: "Budget", unit: "triplets", series: one(run.budget, "budget"), zero: true, empty: "No budget was logged." },
    { title: "Churn", unit: "% of the kept triplets that the mask before had pruned", series: one(run.churn, "churn"),
      zero: true, empty: "No masks were logged." },
    { title: "Share of the score", unit: "% of Σ|term|", series: shares, zero: true,
      empty: "No shares of λ, P and Q were logged." },
    { title: "Loss", unit: "", series: run.loss || [], zero: false, empty: "No loss was logged." },
    { title: "Metrics", unit: "points", series: run.curves || [], zero: false, empty: "No metric was logged by step." },
  ].map((chart) => lineChart({ ...chart, end, pick }));
}

function settingsOf(data, run) {
  const settings = data.settings[run.settings];
  return element("details", {}, element("summary", {}, "Settings of this run"),
    settings.length ? facts(settings) : element("p", {}, "Its config.json names none."));
}
