// Jobs beside each other: their curves in one chart, what differs between them, means over seeds.

import { make, metric, words } from "./elements.js";
import { sleep } from "./events.js";
import { SPLITS, chart, color, dash, fillSelect, quantities } from "./jobs-charts.js";
import { count, hasEnded, valueInWords } from "./jobs-words.js";
import { fetchJson } from "./requests.js";

const AT_ONCE = 4; // requests
const REFRESH_MS = 5000;

/** Compares the jobs whose ids stand in `id`, between commas, until the signal aborts. */
export async function enter(element, { id, signal, page }) {
  const ids = id.split(",").filter(Boolean);
  const lines = new Map();
  const fetchAll = async () => {
    const comparison = await fetchJson(`v1/jobs/compare?ids=${ids.map(encodeURIComponent).join(",")}`, { signal });
    const waiting = comparison.jobs.map((job) => job.id);
    const work = async () => {
      while (waiting.length > 0) {
        const each = waiting.shift();
        const path = `v1/jobs/${encodeURIComponent(each)}/metrics?kind=epochs`;
        lines.set(each, (await fetchJson(path, { signal })).metrics);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    return comparison;
  };
  const comparison = await fetchAll();
  const view = newView(comparison, lines, { signal, page });
  element.replaceChildren(view.element);
  view.show(comparison);
  stayCurrent(fetchAll, view, signal, page);
}

/** Asks again while anyone looks: what is compared may still be training. */
async function stayCurrent(fetchAll, view, signal, page) {
  while (!signal.aborted && !view.isAtRest()) {
    await sleep(REFRESH_MS, signal);
    if (signal.aborted) return;
    if (document.visibilityState === "hidden") continue;
    try {
      view.show(await fetchAll());
      page.setConnected(true);
    } catch (error) {
      if (signal.aborted) return;
      if (error.status !== undefined) return page.showProblem(error);
      page.setConnected(false);
    }
  }
}

function newView(first, lines, { signal, page }) {
  const title = make("h2", { tabindex: "-1" }, `Comparison of ${count(first.jobs.length, "job")}`);
  const quantity = make("select", { "aria-label": "What the chart shows" });
  const split = make("select", { "aria-label": "Of which samples" });
  const manner = make("select", { "aria-label": "Curves" });
  manner.append(make("option", { value: "jobs" }, "each job"));
  manner.append(make("option", { value: "groups" }, "mean ± deviation over seeds"));
  const box = make("div", { class: "chart" });
  const drawing = chart(box, signal);
  const table = make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Jobs" });
  const groups = make("section", { "aria-labelledby": "groups-title", hidden: "" });
  const element = make(
    "article",
    { class: "comparison" },
    make(
      "section",
      { class: "curves" },
      make("p", { class: "back" }, make("a", { href: "#" }, "All jobs")),
      make("div", { class: "title" }, title, quantity, split, manner),
      box,
    ),
    groups,
    make(
      "section",
      { "aria-labelledby": "differences-title" },
      make(
        "div",
        { class: "title" },
        make("h3", { id: "differences-title" }, "What differs"),
        make("p", { class: "hint" }, "Settings that are the same for all are left out."),
      ),
      table,
    ),
  );
  let shown = first;
  let sorting = { column: null, isDown: false };

  for (const each of [quantity, split]) each.addEventListener("change", draw);
  manner.addEventListener("change", () => {
    draw();
    showTable();
  });
  box.addEventListener("recolor", () => {
    draw();
    showTable();
  });

  function show(comparison) {
    shown = comparison;
    const hasGroups = comparison.groups.some((group) => group.n > 1);
    manner.hidden = !hasGroups;
    if (!hasGroups) manner.value = "jobs";
    draw();
    showGroups();
    showTable();
  }

  // Curves

  function draw() {
    const all = [...lines.values()].flat();
    const names = quantities(all);
    const chosen = fillSelect(quantity, names.length > 0 ? names : ["loss"], names[1] ?? "loss", words);
    const splits = Object.keys(SPLITS).filter((each) => all.some((line) => each + chosen in line));
    const from = fillSelect(split, splits.length > 0 ? splits : ["val_"], "val_", (each) => SPLITS[each]);
    const key = from + chosen;
    const curves = manner.value === "groups" ? curvesOfGroups(key) : curvesOfJobs(key);
    const label = `${words(chosen)}, ${SPLITS[from]}, over epochs`;
    drawing.draw(curves, { quantity: chosen, over: "epoch", label }).catch(page.showProblem);
  }

  const known = (id, key) => (lines.get(id) ?? []).filter((line) => typeof line[key] === "number");

  const curvesOfJobs = (key) =>
    shown.jobs.map(({ id, name }, index) => ({
      name: distinct(name, id),
      xs: known(id, key).map((line) => line.epoch),
      ys: known(id, key).map((line) => line[key]),
      color: color(index),
      dash: dash(index),
    }));

  /** Of each group the mean, and around it a band of one standard deviation. */
  function curvesOfGroups(key) {
    return shown.groups.flatMap((group, index) => {
      const byEpoch = new Map();
      for (const id of group.ids) {
        for (const line of known(id, key)) {
          byEpoch.set(line.epoch, [...(byEpoch.get(line.epoch) ?? []), line[key]]);
        }
      }
      const xs = [...byEpoch.keys()].sort((one, other) => one - other);
      const moments = xs.map((x) => meanAndDeviation(byEpoch.get(x)));
      const name = groupName(group);
      const style = { xs, color: color(index) };
      const edge = { ...style, width: 0, faint: true, band: name };
      return [
        { ...style, name, ys: moments.map(([mean]) => mean), dash: dash(index) },
        { ...edge, name: `${name}, above`, ys: moments.map(([mean, deviation]) => mean + deviation) },
        { ...edge, name: `${name}, below`, ys: moments.map(([mean, deviation]) => mean - deviation) },
      ];
    });
  }

  const isUnique = (name) => shown.jobs.filter((job) => job.name === name).length === 1;
  const distinct = (name, id) => {
    if (isUnique(name)) return name;
    const told = Object.entries(shown.keys).map(([key, values]) => `${key}=${valueInWords(values[id])}`);
    const text = told.slice(0, 3).join(" ");
    return text === "" ? `${name} ${id}` : text;
  };

  // Means over seeds

  function groupName({ values }) {
    const told = Object.entries(values).map(([key, value]) => `${key}=${valueInWords(value)}`);
    return told.join(" ") || "all";
  }

  function showGroups() {
    const several = shown.groups.filter((group) => group.n > 1);
    groups.hidden = several.length === 0;
    if (several.length === 0) return;
    const names = metricsOf(several.map((group) => group.mean));
    const head = ["Settings", "Jobs", ...names.map(words)];
    const rows = shown.groups.map((group) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, groupName(group)),
        make("td", { class: "number" }, String(group.n)),
        ...names.map((name) => make("td", { class: "number" }, withDeviation(name, group))),
      ),
    );
    groups.replaceChildren(
      make(
        "div",
        { class: "title" },
        make("h3", { id: "groups-title" }, "Mean ± deviation over seeds"),
      ),
      make("div", { class: "wide", tabindex: "0" }, tableOf(head, rows)),
    );
  }

  function withDeviation(name, { mean, deviation, n }) {
    if (typeof mean[name] !== "number") return "–";
    const text = metric(name, mean[name]);
    const about = deviation?.[name];
    if (n < 2 || typeof about !== "number") return text;
    // One unit for both.
    return text.endsWith("%") ? `${text.slice(0, -1)} ± ${(100 * about).toFixed(1)}%` : `${text} ± ${Number(about.toPrecision(2))}`;
  }

  // What differs

  function showTable() {
    const keys = Object.keys(shown.keys);
    const names = metricsOf(shown.jobs.map((job) => job.metrics ?? {}));
    const columns = [
      ...keys.map((key) => ({ name: key, of: (job) => shown.keys[key][job.id], say: valueInWords })),
      ...names.map((name) => ({
        name: words(name),
        isMetric: true,
        of: (job) => job.metrics?.[name],
        say: (value) => (typeof value === "number" ? metric(name, value) : "–"),
        best: best(name),
      })),
    ];
    const jobs = sorted(shown.jobs, columns);
    const rows = jobs.map((job) => {
      const isGrouped = manner.value === "groups";
      const index = isGrouped
        ? shown.groups.findIndex((group) => group.ids.includes(job.id))
        : shown.jobs.indexOf(job);
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.setProperty("--color", color(index));
      if (dash(index).length > 0) swatch.classList.add(dash(index)[0] > 4 ? "dashed" : "dotted");
      const link = make("a", { href: `#${encodeURIComponent(job.id)}` }, job.name);
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, swatch, link),
        ...columns.map(({ of, say: tell, best: isBest, isMetric }) =>
          make(
            "td",
            { class: `${isMetric ? "number" : ""}${isBest?.(of(job)) ? " best" : ""}` },
            tell(of(job)),
          ),
        ),
      );
    });
    const focused = table.contains(document.activeElement) ? document.activeElement.textContent : null;
    const heads = [{ name: "job", of: (job) => job.name }, ...columns].map(sortable);
    table.replaceChildren(
      make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)),
    );
    if (focused !== null) {
      [...table.querySelectorAll("button, a")].find((each) => each.textContent === focused)?.focus();
    }
  }

  function best(name) {
    const values = shown.jobs.map((job) => job.metrics?.[name]).filter((each) => typeof each === "number");
    if (values.length < 2 || !/_/.test(name)) return undefined;
    const bound = /loss/.test(name) ? Math.min(...values) : Math.max(...values);
    return (value) => value === bound;
  }

  function sortable({ name }) {
    const isSorted = sorting.column === name;
    const direction = isSorted ? (sorting.isDown ? "descending" : "ascending") : "none";
    const button = make("button", { type: "button", class: "quiet" }, name);
    button.addEventListener("click", () => {
      sorting = { column: name, isDown: isSorted && !sorting.isDown };
      showTable();
    });
    return make("th", { scope: "col", "aria-sort": direction }, button);
  }

  function sorted(jobs, columns) {
    const column = [{ name: "job", of: (job) => job.name }, ...columns].find(
      ({ name }) => name === sorting.column,
    );
    if (column === undefined) return jobs;
    const sign = sorting.isDown ? -1 : 1;
    return [...jobs].sort((one, other) => {
      const [a, b] = [column.of(one), column.of(other)];
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * String(a ?? "").localeCompare(String(b ?? ""), "en", { numeric: true });
    });
  }

  return { element, show, isAtRest: () => shown.jobs.every(hasEnded) };
}

/** The metrics to compare by: those of validation and test, or whatever there is. */
function metricsOf(records) {
  const names = [...new Set(records.flatMap((record) => Object.keys(record)))];
  const told = names.filter((name) => /^(val|test)_/.test(name));
  const rest = names.filter((name) => /^train_/.test(name));
  return told.length > 0 ? told : rest;
}

function meanAndDeviation(values) {
  const mean = values.reduce((sum, each) => sum + each, 0) / values.length;
  if (values.length < 2) return [mean, 0];
  const squares = values.reduce((sum, each) => sum + (each - mean) ** 2, 0);
  return [mean, Math.sqrt(squares / (values.length - 1))];
}

function tableOf(head, rows) {
  const titles = make("tr", {}, ...head.map((each) => make("th", { scope: "col" }, each)));
  return make("table", {}, make("thead", {}, titles), make("tbody", {}, ...rows));
}
