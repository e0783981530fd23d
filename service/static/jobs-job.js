// A job's page: its state and what can be done with it, kept up to date by events.

import { make, say } from "./elements.js";
import { follow, sleep } from "./events.js";
import { ACTIONS, act } from "./jobs-actions.js";
import { curvesView } from "./jobs-curves.js";
import { logView } from "./jobs-log.js";
import { configurationView, lastNote, pastView } from "./jobs-past.js";
import {
  badge,
  count,
  digits,
  duration,
  progressBar,
  reasonInWords,
  scoreInWords,
  setProgress,
  when,
} from "./jobs-words.js";
import { fetchJson } from "./requests.js";

const DETAILS_MS = 500; // the details are asked for again at most so often

/** Shows the job `id` until the signal aborts. */
export async function enter(element, { id, signal, page }) {
  const path = `v1/jobs/${encodeURIComponent(id)}`;
  const first = await fetchJson(path, { signal });
  const view = newView(first, path, { signal, page });
  element.replaceChildren(view.element);
  view.show(first);
  watch(path, view, { signal, page });
}

function watch(path, view, { signal, page }) {
  const showProblem = (error) => !signal.aborted && page.showProblem(error);
  let isDue = false;
  const detailSoon = async () => {
    if (isDue) return;
    isDue = true;
    await sleep(DETAILS_MS, signal);
    isDue = false;
    if (signal.aborted) return;
    await fetchJson(path, { signal }).then(view.show, showProblem);
  };
  view.refresh = detailSoon;
  view.log.open();
  view.curves.open().catch(showProblem);
  follow(`${path}/events`, {
    signal,
    changed: (isConnected) => {
      page.setConnected(isConnected);
      if (!isConnected) detailSoon(); // now and then at least
    },
    hear: ({ type, data }) => {
      if (type === "state") {
        view.show(data);
        detailSoon();
      } else if (type === "progress") {
        view.show(data.metrics === null ? { progress: data.progress } : data);
        view.curves.fetchSteps(data.progress?.attempt).catch(showProblem);
      } else if (type === "metrics") {
        view.curves.addLine(data);
      } else if (type === "log") {
        view.log.grew();
      } else if (type === "error") {
        page.showProblem(new Error(data.error));
      }
    },
  }).catch(showProblem);
}

function newView(first, path, { signal, page }) {
  let job = first;
  const title = make("h2", { tabindex: "-1" });
  const state = make("span");
  const reason = make("p", { class: "reason" });
  const note = make("p", { class: "warning", hidden: "" });
  const bar = progressBar("progress");
  const facts = make("dl", { class: "facts" });
  const buttons = make("div", { class: "buttons", role: "group", "aria-label": "Actions" });
  const served = make("p", { class: "served", hidden: "" });
  const curves = curvesView(path, first.name, { signal, showProblem: page.showProblem });
  const log = logView(`${path}/log`, signal, page.announce);
  const configuration = configurationView();
  const past = pastView();

  const element = make(
    "article",
    { class: "job" },
    make(
      "section",
      { class: "head" },
      make("p", { class: "back" }, make("a", { href: "#" }, "All jobs")),
      make("div", { class: "title" }, title, state, buttons),
      reason,
      note,
      served,
      bar,
      facts,
    ),
    curves.element,
    log.element,
    configuration.element,
    past.element,
  );

  // State

  function show(newer) {
    const before = job;
    job = { ...job, ...newer };
    if (job.state !== before.state) page.announce(`${job.name} is ${job.state}`);
    document.title = `${job.name}: ${job.state}, syncbn`;
    say(title, job.name);
    if (state.textContent !== job.state) state.replaceChildren(badge(job.state));
    say(reason, reasonInWords(job));
    reason.hidden = reason.textContent === "";
    setProgress(bar, job);
    bar.hidden = !job.progress || job.state === "finished";
    showFacts();
    if (before === first || String(before.actions) !== String(job.actions)) showButtons();
    showServed();
    if (newer.transitions !== undefined) showDetails();
  }

  function showDetails() {
    configuration.show(job);
    past.show(job);
    log.setAttempts(job.attempt);
    say(note, lastNote(job));
    note.hidden = note.textContent === "";
  }

  function showFacts() {
    const ended = job.ended ?? Date.now() / 1000;
    const rows = {
      job: `${job.id}, number ${job.number}`,
      owner: job.owner,
      accuracy: scoreInWords(job.metrics),
      speed: job.state === "running" && job.progress ? speed(job.progress) : "",
      submitted: when(job.submitted),
      started: job.started ? when(job.started) : "",
      "runs for": job.started && !job.ended ? duration(ended - job.started) : "",
      took: job.started && job.ended ? duration(ended - job.started) : "",
      on: [count(job.cores, "core"), job.gpus > 0 ? count(job.gpus, "GPU") : "", job.device]
        .filter(Boolean)
        .join(", "),
      attempt: job.attempt > 1 ? String(job.attempt) : "",
      priority: job.priority === 0 ? "" : String(job.priority),
      retries: job.retries === 0 ? "" : String(job.retries),
      sweep: job.sweep ? make("a", { href: `#?sweep=${encodeURIComponent(job.sweep)}` }, job.sweep) : "",
      wanted: job.wanted ?? "",
    };
    const told = Object.entries(rows).filter(([, value]) => value !== "");
    const text = told.map(([name, value]) => `${name} ${value.textContent ?? value}`).join();
    if (facts.dataset.told === text) return; // so that a selection of text stays
    facts.dataset.told = text;
    facts.replaceChildren(
      ...told.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    );
  }

  const speed = ({ images_per_s: images }) =>
    images ? `${digits(Math.round(images))} images/s` : "";

  function showButtons() {
    const focused = document.activeElement?.dataset?.action;
    const offered = Object.keys(ACTIONS).filter((action) => job.actions.includes(action));
    const made = offered.map((action) => {
      const button = make("button", { type: "button", class: "plain" }, ACTIONS[action]);
      button.dataset.action = action;
      if (action === "cancel") button.classList.add("danger");
      button.addEventListener("click", () => run(action));
      return button;
    });
    const clone = make("a", { class: "button plain", href: `#new/${encodeURIComponent(job.id)}` }, "Clone");
    buttons.replaceChildren(...made, clone);
    if (focused) (made.find(({ dataset }) => dataset.action === focused) ?? title).focus();
  }

  let isActing = false;

  // The button stays as it is, since one that is disabled loses the focus.
  async function run(action) {
    if (isActing) return;
    isActing = true;
    page.showProblem(null);
    try {
      const answer = await act(job, action);
      if (answer === null) return;
      page.announce(`${ACTIONS[action]} requested`);
      show(answer);
      view.refresh();
    } catch (error) {
      if (!signal.aborted) page.showProblem(error);
    } finally {
      isActing = false;
    }
  }

  function showServed() {
    served.hidden = job.published.length === 0;
    const links = job.published.map(({ model, version }) =>
      make("a", { href: `./#${encodeURIComponent(model)}` }, `${model}, version ${version}`),
    );
    if (served.dataset.told === JSON.stringify(job.published)) return;
    served.dataset.told = JSON.stringify(job.published);
    served.replaceChildren("Published as ", ...links.flatMap((link, i) => (i > 0 ? ["; ", link] : [link])));
  }

  const view = {
    element,
    show,
    curves,
    log,
    refresh: () => {},
  };
  return view;
}
