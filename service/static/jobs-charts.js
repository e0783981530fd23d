// Curves over epochs or steps: a chart by uPlot with its legend, its colors, and a text for who cannot see it.

import { make, metric } from "./elements.js";
import { digits } from "./jobs-words.js";

// Colors that Okabe and Ito chose for all kinds of color vision, lighter ones in the dark.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b37a00", "#cc79a7", "#2b8fc4", "#000000"];
const DARK = ["#56b4e9", "#ff9155", "#2fc79a", "#f0c040", "#e39ac4", "#9ad1f5", "#ffffff"];
const DASHES = [[], [7, 4], [2, 3]];
const HEIGHT_PX = 260;
const WHOLE = Array.from({ length: 9 }, (_, zeros) => [1, 2, 5].map((each) => each * 10 ** zeros)).flat();
const FEW_EPOCHS = 3; // below which the axis has parts of epochs too
const LOG_SPAN = 20; // losses that span more than this factor are told apart only on a logarithmic axis
const dark = matchMedia("(prefers-color-scheme: dark)");

export const SPLITS = {
  train_: "training",
  val_: "validation",
  ema_val_: "validation, averaged weights",
  test_: "test",
  ema_test_: "test, averaged weights",
};

/** The color of the series with this index. */
export const color = (index) => (dark.matches ? DARK : LIGHT)[index % LIGHT.length];

/** The line pattern of the series with this index: with the color, it tells 21 apart. */
export const dash = (index) => DASHES[Math.floor(index / LIGHT.length) % DASHES.length];

/** What has curves among the lines of metrics.jsonl: loss first, then the others by name. */
export function quantities(epochs) {
  const names = new Set();
  for (const line of epochs) {
    for (const key of Object.keys(line)) {
      const split = Object.keys(SPLITS).find((each) => key.startsWith(each));
      if (split !== undefined) names.add(key.slice(split.length));
    }
  }
  const weight = (name) => (name === "loss" ? 0 : name === "accuracy" ? 1 : 2);
  return [...names].sort((a, b) => weight(a) - weight(b) || a.localeCompare(b));
}

let library = null;

/** uPlot, loaded when it is needed for the first time. */
function load() {
  library ??= new Promise((resolve, reject) => {
    const script = make("script", { src: "static/uPlot.iife.min.js" });
    script.addEventListener("load", () => resolve(globalThis.uPlot));
    script.addEventListener("error", () => reject(new Error("the charts cannot be loaded")));
    document.head.append(script);
  });
  return library;
}

/**
 * A chart below an element, until the signal aborts.
 *
 * `draw` takes the curves: {name, xs, ys, color, dash, width, band}, where `band` is the name of a
 * group: two curves with the same band have the space between them filled.
 */
export function chart(element, signal) {
  const picture = make("div", { class: "picture", role: "img" });
  const nothing = make("p", { class: "hint empty" }, "No values yet.");
  element.append(picture, nothing);
  let plot = null;
  let drawn = ""; // which curves, as their values alone may change
  let latest = null;
  let isZoomed = false;

  async function draw(curves, { quantity, over, label }) {
    latest = [curves, { quantity, over, label }];
    const filled = curves.filter(({ xs }) => xs.length > 0);
    nothing.hidden = filled.length > 0;
    picture.hidden = filled.length === 0;
    picture.setAttribute("aria-label", inWords(filled, quantity, label));
    if (filled.length === 0) return;
    const uPlot = await load();
    if (signal.aborted || latest[0] !== curves) return;
    const data = uPlot.join(filled.map(({ xs, ys }) => [xs, ys]));
    const isLog = isLossOverDecades(filled, quantity);
    const identity = JSON.stringify([filled.map(({ name }) => name), quantity, over, isLog, isLong(filled), dark.matches]);
    if (plot !== null && identity === drawn) {
      plot.setData(data, !isZoomed);
      if (isZoomed) plot.redraw();
      return;
    }
    plot?.destroy();
    isZoomed = false;
    drawn = identity;
    plot = new uPlot(configuration(uPlot, filled, { quantity, over, isLog }), data, picture);
    makeLegendUsable(plot.root);
    filled.forEach(({ band }, index) => {
      plot.root.querySelectorAll(".u-series")[index + 1].hidden = Boolean(band); // its edges need no name
    });
  }

  function configuration(uPlot, curves, { quantity, over, isLog }) {
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ["--faint", "--line"].map((name) => style.getPropertyValue(name).trim());
    const axis = {
      stroke: ink,
      font: "12px system-ui, sans-serif",
      grid: { stroke: line, width: 1 },
      ticks: { stroke: line, width: 1, size: 4 },
    };
    const value = (_, each) => (each === null || each === undefined ? "–" : metric(quantity, each));
    return {
      width: width(),
      height: HEIGHT_PX,
      cursor: { focus: { prox: 24 }, y: false, points: { size: 7 } },
      focus: { alpha: 0.35 },
      legend: { live: true },
      scales: {
        x: { time: false },
        y: { distr: isLog ? 3 : 1 },
      },
      axes: [
        {
          ...axis,
          size: 34,
          incrs: isLong(curves) ? WHOLE : undefined,
          values: (_, ticks) => ticks.map((each) => digits(each)),
        },
        {
          ...axis,
          ...(isLog ? { grid: { ...axis.grid, filter: decades }, ticks: { ...axis.ticks, filter: decades } } : {}),
          size: 56,
          values: (_, ticks) => ticks.map((each) => (each === null ? "" : short(quantity, each))),
        },
      ],
      series: [
        { label: over, value: (_, each) => (each === null ? "–" : String(Number(each.toFixed(2)))) },
        ...curves.map(({ name, color: stroke, dash: pattern, width: thickness = 2, xs, faint }) => ({
          label: name,
          stroke,
          dash: pattern,
          width: thickness,
          alpha: faint ? 0.45 : 1,
          spanGaps: true,
          value,
          points: { show: xs.length < 40 && !faint, size: 5 },
        })),
      ],
      bands: bands(curves),
      hooks: {
        setSelect: [(self) => (isZoomed = self.select.width > 0)],
        ready: [
          (self) => self.over.addEventListener("dblclick", () => (isZoomed = false)),
        ],
      },
    };
  }

  function bands(curves) {
    const found = new Map();
    curves.forEach(({ band }, index) => {
      if (band) found.set(band, [...(found.get(band) ?? []), index + 1]);
    });
    return [...found.values()]
      .filter((series) => series.length === 2)
      .map((series) => ({ series, fill: `${curves[series[0] - 1].color}33` }));
  }

  const width = () => Math.max(200, Math.floor(picture.clientWidth));

  const resized = new ResizeObserver(() => {
    if (plot !== null && !picture.hidden && plot.width !== width()) {
      plot.setSize({ width: width(), height: HEIGHT_PX });
    }
  });
  resized.observe(element);
  const recolor = () => element.dispatchEvent(new Event("recolor"));
  dark.addEventListener("change", recolor, { signal });
  signal.addEventListener("abort", () => {
    resized.disconnect();
    plot?.destroy();
    plot = null;
  });
  return { draw };
}

/** Of the lines of a logarithmic axis those of whole powers of ten. */
const decades = (_, lines) =>
  lines.map((each) => (Math.abs(Math.log10(each) - Math.round(Math.log10(each))) < 1e-9 ? each : null));

const isLong = (curves) => curves.some(({ xs }) => xs.at(-1) > FEW_EPOCHS);

function short(quantity, value) {
  const text = metric(quantity, value);
  return text.replace(/\.0%$/, "%");
}

function isLossOverDecades(curves, quantity) {
  if (!/loss/.test(quantity)) return false;
  let [low, high] = [Infinity, -Infinity];
  const clear = curves.filter(({ faint }) => !faint);
  for (const { ys } of clear.length > 0 ? clear : curves) {
    for (const y of ys) {
      if (y === null) continue;
      if (!(y > 0)) return false;
      low = Math.min(low, y);
      high = Math.max(high, y);
    }
  }
  return high > LOG_SPAN * low;
}

function inWords(curves, quantity, label) {
  const ends = curves
    .slice(0, 12)
    .map(({ name, ys }) => `${name} ${metric(quantity, ys.findLast((each) => each !== null) ?? "–")}`);
  return `${label}; last values: ${ends.join("; ")}`;
}

/** uPlot's legend hides and shows curves, with a mouse alone. */
function makeLegendUsable(root) {
  for (const title of root.querySelectorAll(".u-legend .u-series:not(:first-child) th")) {
    title.tabIndex = 0;
    title.setAttribute("role", "button");
    title.setAttribute("aria-pressed", "true");
    const tell = () =>
      title.setAttribute("aria-pressed", String(!title.parentNode.classList.contains("u-off")));
    title.addEventListener("click", () => setTimeout(tell));
    title.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      title.click();
    });
  }
}

/** A select with the quantities of a chart, which keeps what was chosen while it is there. */
export function fillSelect(select, names, preferred, label = (name) => name) {
  const current = select.value || preferred;
  const same = [...select.options].map(({ value }) => value).join() === names.join();
  if (!same) {
    select.replaceChildren(...names.map((name) => make("option", { value: name }, label(name))));
    select.value = names.includes(current) ? current : names.includes(preferred) ? preferred : (names[0] ?? "");
  }
  return select.value;
}

