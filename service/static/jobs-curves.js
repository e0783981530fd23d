// The curves of one job: two charts, the values of its epochs as a table, and the lines they are made of.

import { make, metric, words } from "./elements.js";
import { SPLITS, chart, color, fillSelect, quantities } from "./jobs-charts.js";
import { fetchJson } from "./requests.js";

const STEP_QUANTITIES = ["lr", "images_per_s"];

/**
 * The curves of the job at a path, until the signal aborts.
 *
 * It has `element`; `open()`, which fetches what there is; `addLine(line)`, for a new line of
 * metrics.jsonl; and `fetchSteps(attempt)`, for those of steps.jsonl.
 */
export function curvesView(path, name, { signal, showProblem }) {
  const epochs = new Map(); // lines of metrics.jsonl by their steps
  const steps = new Map(); // lines of steps.jsonl by theirs
  const over = make("select", { "aria-label": "Horizontal axis" });
  for (const each of ["epoch", "step"]) over.append(make("option", { value: each }, `over ${each}s`));
  const table = make("details", { class: "values" }, make("summary", {}, "Values of each epoch"));
  const panels = [0, 1].map((index) => newPanel(index));
  const element = make(
    "section",
    { class: "curves", "aria-labelledby": "curves-title" },
    make("div", { class: "title" }, make("h3", { id: "curves-title" }, "Curves"), over),
    make("div", { class: "panels" }, ...panels.map((panel) => panel.element)),
    table,
  );

  function newPanel(index) {
    const select = make("select", { "aria-label": `What the ${index === 0 ? "first" : "second"} chart shows` });
    const box = make("div", { class: "chart" });
    const panel = make("div", { class: "panel" }, select, box);
    const drawing = chart(box, signal);
    select.addEventListener("change", () => drawCurves());
    box.addEventListener("recolor", () => drawCurves());
    return { element: panel, select, drawing };
  }

  over.addEventListener("change", () => drawCurves());

  function curvesOf(quantity) {
    const [epochLines, stepLines] = [[...epochs.values()], [...steps.values()]];
    const x = over.value;
    const curves = [];
    const add = (lines, key, name, style) => {
      const known = lines.filter((line) => typeof line[key] === "number" && typeof line[x] === "number");
      if (known.length > 0) {
        curves.push({ name, xs: known.map((line) => line[x]), ys: known.map((line) => line[key]), ...style });
      }
    };
    Object.entries(SPLITS).forEach(([split, name], index) => {
      add(epochLines, split + quantity, name, { color: color(index) });
    });
    const isPlain = STEP_QUANTITIES.includes(quantity);
    const style = isPlain ? { color: color(0) } : { color: color(0), width: 1, faint: true };
    add(stepLines, quantity, isPlain ? words(quantity) : "training, some steps", style);
    return curves;
  }

  let isDrawing = false;

  function drawCurves() {
    if (isDrawing) return;
    isDrawing = true;
    requestAnimationFrame(async () => {
      isDrawing = false;
      if (signal.aborted) return;
      const names = quantities(epochs.values());
      if (names.length === 0) names.push("loss", "accuracy");
      names.push(...STEP_QUANTITIES);
      for (const [index, { select, drawing }] of panels.entries()) {
        const quantity = fillSelect(select, names, names[index], words);
        const label = `${words(quantity)} of ${name} over ${over.value}s`;
        await drawing.draw(curvesOf(quantity), { quantity, over: over.value, label }).catch(showProblem);
      }
      showTable();
    });
  }

  // Numbers that are not finite come as null.
  const told = (key, value) => (value === null || value === undefined ? "–" : metric(key, value));

  function showTable() {
    const lines = [...epochs.values()];
    table.hidden = lines.length === 0;
    if (!table.open || lines.length === 0) return;
    const keys = [...new Set(lines.flatMap((line) => Object.keys(line)))].filter((key) => key !== "time");
    const head = make("tr", {}, ...keys.map((key) => make("th", { scope: "col" }, words(key))));
    const rows = lines.map((line) =>
      make(
        "tr",
        {},
        ...keys.map((key) => make("td", { class: "number" }, told(key, line[key]))),
      ),
    );
    const made = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
    table.replaceChildren(table.firstChild, make("div", { class: "wide", tabindex: "0" }, made));
  }

  table.addEventListener("toggle", showTable);

  /** A line of metrics.jsonl or steps.jsonl; one of a step that was repeated replaces the earlier. */
  function addLine(line) {
    const isOfEpoch = Object.keys(line).some((key) => /^(train|val|ema_val|test)_/.test(key));
    (isOfEpoch ? epochs : steps).set(line.step, line);
    drawCurves();
  }

  async function open() {
    const [{ metrics }] = await Promise.all([
      fetchJson(`${path}/metrics?kind=epochs`, { signal }),
      fetchSteps(),
    ]);
    for (const line of metrics) if (!epochs.has(line.step)) epochs.set(line.step, line);
    sort(epochs);
    drawCurves();
  }

  let isFetching = false;
  let attempt = null;

  /** Lines of steps.jsonl come by no event: those that are new are asked for when there is progress. */
  async function fetchSteps(now = attempt) {
    if (isFetching) return;
    isFetching = true;
    try {
      if (attempt !== null && now !== attempt) steps.clear(); // it went on from an earlier step
      attempt = now;
      const last = [...steps.keys()].at(-1);
      const after = last === undefined ? "" : `&after=${last}`;
      const { metrics } = await fetchJson(`${path}/metrics?kind=steps${after}`, { signal });
      for (const line of metrics) steps.set(line.step, line);
      if (metrics.length > 0) drawCurves();
    } finally {
      isFetching = false;
    }
  }

  return { element, open, addLine, fetchSteps };
}

/** Lines that came by an event while the earlier ones were on their way stand before them. */
function sort(lines) {
  const sorted = [...lines].sort(([one], [other]) => one - other);
  lines.clear();
  for (const [step, line] of sorted) lines.set(step, line);
}
