// Words and small elements of the job pages: states, times, numbers, progress.

import { make, metric, percent, say, words } from "./elements.js";

/** All states, in the order in which they are offered. */
export const STATES = [
  "running",
  "starting",
  "stopping",
  "queued",
  "submitted",
  "paused",
  "finished",
  "failed",
  "cancelled",
  "lost",
];
const ENDED = ["finished", "failed", "cancelled", "lost"];
const MINUTE_S = 60;
const HOUR_S = 3600;
const DAY_S = 86_400;

/** A number with commas between thousands: 12,345. Intl does it too, but costs the first list time. */
export const digits = (number) => String(number).replace(/\B(?<![.e]\d*)(?=(\d{3})+(?!\d))/g, ",");

export const hasEnded = (job) => ENDED.includes(job.state);
export const count = (number, noun) =>
  `${digits(number)} ${noun}${number === 1 ? "" : "s"}`;

/** A duration with its two largest units: 8 s, 2 min 5 s, 3 h 20 min, 2 d 4 h. */
export function duration(seconds) {
  const all = Math.max(0, Math.round(seconds));
  const units = [
    [DAY_S, "d"],
    [HOUR_S, "h"],
    [MINUTE_S, "min"],
    [1, "s"],
  ];
  const first = units.findIndex(([size]) => all >= size);
  if (first === -1) return "0 s";
  const [size, name] = units[first];
  const told = [`${Math.floor(all / size)} ${name}`];
  if (first + 1 < units.length) {
    const [smaller, itsName] = units[first + 1];
    const rest = Math.floor((all % size) / smaller);
    if (rest > 0) told.push(`${rest} ${itsName}`);
  }
  return told.join(" ");
}

const two = (number) => String(number).padStart(2, "0");

function day(time) {
  const date = new Date(time * 1000);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

/** A point in time where the reader is: 2026-11-30 14:05:09, as in logs. */
export function exactly(time) {
  const date = new Date(time * 1000);
  const clock = [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(":");
  return `${day(time)} ${clock}`;
}

function ago(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 10) return "just now";
  if (seconds < MINUTE_S) return `${Math.floor(seconds)} s ago`;
  if (seconds < HOUR_S) return `${Math.floor(seconds / MINUTE_S)} min ago`;
  if (seconds < DAY_S) return `${Math.floor(seconds / HOUR_S)} h ago`;
  if (seconds < 7 * DAY_S) return `${Math.floor(seconds / DAY_S)} d ago`;
  return day(time);
}

/** A point in time in words, with the exact one when it is pointed at. */
export function when(time) {
  const element = make("time", { datetime: new Date(time * 1000).toISOString(), title: exactly(time) });
  element.dataset.time = String(time);
  element.textContent = ago(time);
  return element;
}

/** Brings the words of all times below an element up to date. */
export function retellTimes(element) {
  for (const each of element.querySelectorAll("time[data-time]")) {
    say(each, ago(Number(each.dataset.time)));
  }
}

/** A state as a badge, whose color never stands alone. */
export function badge(state) {
  return make("span", { class: "state", "data-state": state }, state);
}

/** The metric by which people judge a job: [name, value], or null where there is none yet. */
export function score(metrics) {
  const keys = Object.keys(metrics ?? {}).filter((key) => typeof metrics[key] === "number");
  for (const split of ["val_", "test_", "train_"]) {
    const ofSplit = keys.filter((key) => key.startsWith(split) && !key.endsWith("_loss"));
    const found =
      ofSplit.find((key) => key === `${split}accuracy`) ??
      ofSplit.find((key) => /iou|accuracy|dice/.test(key)) ??
      ofSplit[0];
    if (found !== undefined) return [found, metrics[found]];
  }
  return null;
}

/** The score as text; the name is told unless it is the accuracy of validation. */
export function scoreInWords(metrics) {
  const found = score(metrics);
  if (found === null) return "";
  const [name, value] = found;
  return name === "val_accuracy" ? percent(value) : `${metric(name, value)} ${words(name)}`;
}

/** How far a job is: "step 12 of 120, 8 s left"; of one that has ended, how long it took. */
export function progressInWords({ state, progress, started, ended }) {
  const took = started && ended ? duration(ended - started) : "";
  if (state === "finished" && took !== "") return `took ${took}`;
  if (!progress) return took;
  const { phase, step, total_steps: total, time_left_s: left } = progress;
  const told = [];
  if (state === "running" && phase !== "training" && phase !== "done") told.push(phase);
  told.push(total ? `step ${digits(step)} of ${digits(total)}` : phase);
  const isMoving = state === "running" && typeof left === "number";
  if (isMoving && phase !== "done") told.push(`${duration(left)} left`);
  if (took !== "") told.push(`after ${took}`);
  return told.join(", ");
}

/** A bar and its words, which `setProgress` fills. */
export function progressBar(label) {
  const filled = make("span");
  const bar = make(
    "div",
    { class: "bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" },
    filled,
  );
  bar.setAttribute("aria-label", label);
  return make("div", { class: "progress" }, bar, make("span", { class: "hint" }));
}

export function setProgress(element, job) {
  const [bar, text] = element.children;
  const fraction = job.progress?.fraction ?? null;
  bar.hidden = fraction === null || job.state === "finished";
  if (fraction !== null) {
    bar.setAttribute("aria-valuenow", String(Math.round(100 * fraction)));
    bar.firstChild.style.setProperty("--share", String(Math.min(1, fraction)));
    bar.dataset.state = job.state;
  }
  say(text, progressInWords(job));
}

/** A value of a configuration as text. */
export function valueInWords(value) {
  if (value === null || value === undefined) return "null";
  return Array.isArray(value) ? value.map(valueInWords).join(", ") : String(value);
}

/** What there is to say beyond the state: what it waits for, or how it ended. */
export function reasonInWords(job) {
  if (job.state === "running" && job.progress && !job.wanted) return ""; // the progress says it
  return job.waiting_for || job.reason || "";
}

/** What a job was told beyond its defaults: "norm=local, optim.lr=0.05". */
const toldTo = ({ choices, values, sweep_values: swept }) =>
  Object.entries({ ...choices, ...values, ...swept })
    .map(([key, value]) => `${key}=${Array.isArray(value) ? `[${value}]` : value}`)
    .join(", ");

/** What a job was swept over, or all that it was told where it was not. */
export const told = (job) =>
  Object.keys(job.sweep_values ?? {}).length > 0
    ? toldTo({ sweep_values: job.sweep_values })
    : toldTo(job);
