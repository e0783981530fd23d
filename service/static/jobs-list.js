// The list of jobs: filtered, paged, selected, and kept up to date by events.

import { make, say } from "./elements.js";
import { follow, sleep } from "./events.js";
import { ACTIONS, actOnAll } from "./jobs-actions.js";
import {
  STATES,
  badge,
  count,
  digits,
  progressBar,
  reasonInWords,
  scoreInWords,
  setProgress,
  told,
  when,
} from "./jobs-words.js";
import { fetchJson } from "./requests.js";

const SHOWN = 50; // jobs on a page
const TYPING_MS = 200;
const RELOAD_MS = 1000; // at most so often, however many jobs change
const COMPARED = 50;
const FILTERS = ["state", "text", "name", "owner", "sweep", "archived", "cursor"];
const BULK = ["pause", "resume", "retry", "cancel", "archive"];

const byId = (id) => document.getElementById(id);

const chosen = new Map(); // jobs by their ids, also those of other pages of the list
const rows = new Map(); // rows by the ids of their jobs
let visit; // {query, signal, page} of the present visit
let loading = null; // ends the request that a newer one replaces
let before = []; // the cursors of the pages before this one
let shown = { jobs: [], next: null, total: 0, counts: {} };

/** Shows the list that the address asks for, until the signal aborts. */
export async function enter(element, { query, signal, page }) {
  visit = { query, signal, page };
  before = query.has("cursor") ? [""] : [];
  fillFilters();
  const failure = await load().then(
    () => null,
    (error) => error,
  );
  if (byId("list").classList.contains("unknown") && failure === null) return;
  const isRefused = failure?.status >= 400 && failure.status < 500;
  if (!isRefused) stayCurrent(signal, page, failure === null ? shown.last_event : "");
  if (failure !== null) throw failure;
  showDispatcher(signal).catch(() => {}); // an extra: if it cannot be had, the list says why
}

// What the service has

async function load() {
  loading?.abort();
  loading = new AbortController();
  const { query, signal, page } = visit;
  const asked = new URLSearchParams({ limit: String(SHOWN) });
  for (const name of FILTERS) if (query.has(name)) asked.set(name, query.get(name));
  try {
    const answer = await fetchJson(`v1/jobs?${asked}`, {
      signal: AbortSignal.any([signal, loading.signal]),
    });
    page.showProblem(null);
    byId("list").classList.remove("unknown");
    show(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    const isWithoutJobs = error.status === 404;
    if (shown.total === 0 || isWithoutJobs) {
      byId("list").classList.add("unknown");
      say(byId("list-state"), isWithoutJobs ? NO_JOBS : "Not known yet.");
    }
    if (!isWithoutJobs) throw error;
  }
}

const NO_JOBS =
  "This service serves models alone. Started with --jobs DIRECTORY, it trains them too.";

function show(answer) {
  shown = answer;
  for (const job of answer.jobs) if (chosen.has(job.id)) chosen.set(job.id, job);
  const wanted = answer.jobs.map((job) => rowOf(job).row);
  const body = byId("rows");
  // Only what changed is moved, so that neither focus nor a selection of text is lost.
  wanted.forEach((row, index) => {
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
  });
  while (body.children.length > wanted.length) body.lastChild.remove();
  const ids = new Set(answer.jobs.map((job) => job.id));
  for (const id of rows.keys()) if (!ids.has(id)) rows.delete(id);
  showStates();
  showPages();
  showChosen();
  byId("jobs").classList.toggle("empty", answer.jobs.length === 0);
  say(byId("list-summary"), count(answer.total, "job"));
  const isFiltered = FILTERS.some((name) => visit.query.has(name));
  say(
    byId("list-state"),
    answer.jobs.length > 0 ? "" : isFiltered ? "No job is like that." : "There is no job yet.",
  );
}

/** Hears of changes: a row changes at once, and what is listed is asked for again soon. */
function stayCurrent(signal, page, since) {
  let isDue = false;
  let isLoaded = since !== ""; // whatever came after it is heard
  const reloadSoon = async () => {
    if (isDue) return;
    isDue = true;
    await sleep(RELOAD_MS, signal);
    isDue = false;
    if (!signal.aborted) load().catch(page.showProblem);
  };
  follow("v1/events", {
    signal,
    since,
    changed: (isConnected) => {
      page.setConnected(isConnected);
      if (isConnected && !isLoaded) load().catch(page.showProblem);
      isLoaded = true;
    },
    hear: ({ type, data }) => {
      if (type === "state") {
        const known = rows.get(data.id);
        if (known) fill(known, data);
        if (chosen.has(data.id)) chosen.set(data.id, data);
        reloadSoon();
      } else if (type === "progress") {
        const known = rows.get(data.id);
        if (!known) return;
        const { progress, metrics } = data;
        fill(known, { ...known.job, progress, metrics: metrics ?? known.job.metrics });
      } else if (type === "error") {
        page.showProblem(new Error(data.error));
      }
    },
  }).catch((error) => !signal.aborted && page.showProblem(error));
}

async function showDispatcher(signal) {
  const { dispatcher } = await fetchJson("v1/options", { signal });
  const isAtWork = dispatcher?.alive ?? dispatcher !== null;
  byId("dispatcher").hidden = isAtWork;
  if (isAtWork) return;
  const silence = dispatcher ? [`; that on ${dispatcher.host} was last heard of `, when(dispatcher.seen)] : [];
  byId("dispatcher").replaceChildren("No dispatcher is at work, so jobs wait", ...silence);
}

// Rows

function rowOf(job) {
  let known = rows.get(job.id);
  if (known === undefined) {
    known = newRow(job.id);
    rows.set(job.id, known);
  }
  fill(known, job);
  return known;
}

function newRow(id) {
  const check = make("input", { type: "checkbox" });
  const link = make("a", { href: `#${encodeURIComponent(id)}` });
  const details = make("div", { class: "hint told" });
  const state = make("td", { "data-title": "state" });
  const reason = make("div", { class: "hint reason" });
  const progress = progressBar("progress");
  const accuracy = make("td", { class: "number", "data-title": "accuracy" });
  const owner = make("td", { "data-title": "owner" });
  const submitted = make("td", { "data-title": "submitted" });
  const row = make(
    "tr",
    {},
    make("td", { class: "check" }, check),
    make("th", { scope: "row" }, link, details),
    state,
    make("td", { "data-title": "progress" }, progress),
    accuracy,
    owner,
    submitted,
  );
  check.addEventListener("click", (event) => choose(id, check.checked, event.shiftKey));
  return { row, check, link, details, state, reason, progress, accuracy, owner, submitted };
}

function fill(parts, job) {
  const { state: oldState, submitted: oldTime } = parts.job ?? {};
  parts.job = job;
  say(parts.link, job.name);
  say(parts.details, told(job));
  parts.details.title = told(job);
  if (job.state !== oldState) parts.state.replaceChildren(badge(job.state), parts.reason);
  say(parts.reason, reasonInWords(job));
  parts.reason.title = reasonInWords(job);
  setProgress(parts.progress, job);
  parts.progress.firstChild.setAttribute("aria-label", `progress of ${job.name}`);
  say(parts.accuracy, scoreInWords(job.metrics));
  say(parts.owner, job.owner);
  if (job.submitted !== oldTime) parts.submitted.replaceChildren(when(job.submitted));
  parts.check.setAttribute("aria-label", `Select ${job.name}`);
  parts.check.checked = chosen.has(job.id);
  parts.row.classList.toggle("chosen", parts.check.checked);
}

// Up and down go from row to row, within what the focus is on.
byId("rows").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const row = event.target.closest("tr");
  if (step === undefined || row === null) return;
  const next = row.parentNode.children[[...row.parentNode.children].indexOf(row) + step];
  if (next === undefined) return;
  event.preventDefault();
  next.querySelector(event.target.matches("input") ? "input" : "a").focus();
});

// Filters, which the address keeps

function narrow(changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (value) visit.query.set(name, value);
    else visit.query.delete(name);
  }
  if (!("cursor" in changes)) {
    visit.query.delete("cursor");
    before = [];
  }
  const asked = visit.query.toString();
  history.replaceState(null, "", asked === "" ? location.pathname : `#?${asked}`);
  showSweep();
  load().then(
    () => visit.page.announce(count(shown.total, "job")),
    (error) => visit.page.showProblem(error),
  );
}

let typing;
byId("filters").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    const fields = [...byId("filters").querySelectorAll("input")];
    const read = ({ type, value, checked }) => (type === "checkbox" ? checked && "true" : value.trim());
    narrow(Object.fromEntries(fields.map((field) => [field.name, read(field)])));
  }, TYPING_MS);
});
byId("filters").addEventListener("submit", (event) => event.preventDefault());

function fillFilters() {
  for (const field of byId("filters").querySelectorAll("input")) {
    const value = visit.query.get(field.name) ?? "";
    if (field.type === "checkbox") field.checked = value === "true";
    else field.value = value;
  }
  showSweep();
}

function showSweep() {
  const sweep = visit.query.get("sweep");
  const line = byId("sweep");
  line.hidden = sweep === null;
  if (sweep === null) return;
  const compare = make("button", { type: "button", class: "plain" }, "Compare them");
  compare.addEventListener("click", () => compareJobs(shown.jobs));
  const all = make("button", { type: "button", class: "plain" }, "Show all jobs");
  all.addEventListener("click", () => narrow({ sweep: "" }));
  line.replaceChildren(`Jobs of the sweep ${sweep} `, compare, " ", all);
}

const stateButtons = new Map();

function showStates() {
  const current = visit.query.get("state") ?? "";
  for (const state of ["", ...STATES]) {
    let button = stateButtons.get(state);
    if (button === undefined) {
      button = make("button", { type: "button", class: "chip" });
      button.append(state === "" ? "All" : badge(state), make("span", { class: "count" }));
      button.addEventListener("click", () => narrow({ state }));
      stateButtons.set(state, button);
      byId("states").append(button);
    }
    const all = Object.values(shown.counts).reduce((sum, each) => sum + each, 0);
    const number = state === "" ? all : (shown.counts[state] ?? 0);
    say(button.lastChild, digits(number));
    button.setAttribute("aria-pressed", String(state === current));
    button.hidden = number === 0 && state !== current && state !== "";
  }
}

// Pages

function showPages() {
  byId("pages").hidden = before.length === 0 && shown.next === null;
  byId("newest").disabled = byId("newer").disabled = before.length === 0;
  byId("older").disabled = shown.next === null;
}

byId("newest").addEventListener("click", () => {
  before = [];
  narrow({ cursor: "" });
});
byId("newer").addEventListener("click", () => narrow({ cursor: before.pop() }));
byId("older").addEventListener("click", () => {
  before.push(visit.query.get("cursor") ?? "");
  narrow({ cursor: shown.next });
});

// Selection

let lastChosen = null;

function choose(id, isChosen, isRange) {
  const ids = shown.jobs.map((job) => job.id);
  const [from, to] = [ids.indexOf(isRange ? lastChosen : id), ids.indexOf(id)].sort((a, b) => a - b);
  for (const each of from === -1 ? [id] : ids.slice(from, to + 1)) mark(each, isChosen);
  lastChosen = id;
  showChosen();
}

function mark(id, isChosen) {
  const parts = rows.get(id);
  if (isChosen) chosen.set(id, parts.job);
  else chosen.delete(id);
  parts.check.checked = isChosen;
  parts.row.classList.toggle("chosen", isChosen);
}

byId("all").addEventListener("change", (event) => {
  for (const { id } of shown.jobs) mark(id, event.target.checked);
  showChosen();
});

function showChosen() {
  const here = shown.jobs.filter((job) => chosen.has(job.id)).length;
  byId("all").checked = here > 0 && here === shown.jobs.length;
  byId("all").indeterminate = here > 0 && here < shown.jobs.length;
  byId("chosen").hidden = chosen.size === 0;
  if (chosen.size === 0) return;
  const jobs = [...chosen.values()];
  const button = (words, run, isPossible = true) => {
    const element = make("button", { type: "button", class: "plain" }, words);
    element.disabled = !isPossible;
    element.addEventListener("click", run);
    return element;
  };
  const buttons = [button("Compare", () => compareJobs(jobs), jobs.length > 1 && jobs.length <= COMPARED)];
  for (const action of BULK) {
    const able = jobs.filter((job) => job.actions.includes(action));
    if (able.length > 0) buttons.push(button(`${ACTIONS[action]} ${able.length}`, () => actOn(able, action)));
  }
  buttons.push(button("Select none", chooseNone));
  const line = make("span", {}, `${count(chosen.size, "job")} selected`);
  const focused = [...byId("chosen").children].indexOf(document.activeElement);
  byId("chosen").replaceChildren(line, ...buttons);
  if (focused > 0) byId("chosen").children[Math.min(focused, buttons.length)].focus();
}

function chooseNone() {
  chosen.clear();
  for (const { check, row } of rows.values()) {
    check.checked = false;
    row.classList.remove("chosen");
  }
  showChosen();
  byId("all").focus();
}

async function actOn(jobs, action) {
  await actOnAll(jobs, action);
  load().catch(visit.page.showProblem);
}

function compareJobs(jobs) {
  const ids = jobs.slice(0, COMPARED).map((job) => encodeURIComponent(job.id));
  location.hash = `compare/${ids.join(",")}`;
}
