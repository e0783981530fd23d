// What is known of a job in tables: its configuration, its attempts, and all that happened to it.

import { make } from "./elements.js";
import { badge, duration, exactly, valueInWords, when } from "./jobs-words.js";

/** The configuration, at first what differs from the defaults: `element`, and `show(job)`. */
export function configurationView() {
  let job = {};
  const config = make("div");
  const all = make("input", { type: "checkbox" });
  const element = make(
    "section",
    { class: "config", "aria-labelledby": "config-title" },
    make(
      "div",
      { class: "title" },
      make("h3", { id: "config-title" }, "Configuration"),
      make("label", { class: "check" }, all, " Defaults too"),
    ),
    config,
  );

  function showConfig() {
    const changed = Object.entries(job.changed ?? {});
    const rows = changed.map(([key, { value, default: usual }]) => rowOf(key, value, usual));
    if (all.checked) {
      for (const [key, value] of Object.entries(job.config ?? {})) {
        if (!(key in job.changed)) rows.push(rowOf(key, value));
      }
    }
    const head = make(
      "tr",
      {},
      ...["Setting", "Value", "Default"].map((each) => make("th", { scope: "col" }, each)),
    );
    config.replaceChildren(
      rows.length > 0
        ? make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))
        : make("p", { class: "hint" }, "Nothing differs from the defaults."),
    );
  }

  function rowOf(key, value, usual) {
    return make(
      "tr",
      usual === undefined ? {} : { class: "changed" },
      make("th", { scope: "row" }, key),
      make("td", {}, valueInWords(value)),
      make("td", { class: "hint" }, usual === undefined ? "" : valueInWords(usual)),
    );
  }

  all.addEventListener("change", showConfig);

  return {
    element,
    show(newer) {
      job = newer;
      showConfig();
    },
  };
}

/** Attempts and history: `element`, and `show(job)`. */
export function pastView() {
  const attempts = make("div");
  const history = make("ol", { class: "history" });
  const element = make(
    "section",
    { class: "past", "aria-labelledby": "past-title" },
    make("div", { class: "title" }, make("h3", { id: "past-title" }, "History")),
    attempts,
    history,
  );

  function show(job) {
    const past = (job.attempts ?? []).map((each) => {
      const took = each.started && each.ended ? duration(each.ended - each.started) : "";
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, String(each.number)),
        make("td", {}, each.started ? when(each.started) : "–"),
        make("td", {}, took),
        make("td", {}, each.status ?? "", each.exit_code ? ` (exit code ${each.exit_code})` : ""),
        make("td", {}, reasonOf(each)),
      );
    });
    const head = ["Attempt", "Started", "Took", "Ended as", "Reason"];
    attempts.replaceChildren();
    if (past.length > 0) {
      const titles = make("tr", {}, ...head.map((each) => make("th", { scope: "col" }, each)));
      const made = make("table", {}, make("thead", {}, titles), make("tbody", {}, ...past));
      attempts.append(make("div", { class: "wide", tabindex: "0" }, made));
    }
    history.replaceChildren(...happened(job).map(event));
  }

  function event(each) {
    const time = make("time", { datetime: new Date(each.time * 1000).toISOString() }, exactly(each.time));
    const kind = each.state ? badge(each.state) : make("span", {}, each.kind);
    return make("li", {}, time, kind, make("span", { class: "hint" }, eventInWords(each)));
  }

  return { element, show };
}

function happened(job) {
  const all = [...(job.transitions ?? []), ...(job.events ?? [])];
  return all.sort((one, other) => one.time - other.time);
}

/** What became of the last request, if it changed no state, such as one that was refused. */
export function lastNote(job) {
  const last = happened(job).at(-1);
  return last?.kind === "note" ? eventInWords(last) : "";
}

const reasonOf = ({ status, reason_code: code, reason }) =>
  [code === status ? "" : code, reason].filter(Boolean).join(": ");

/** What happened, beyond its state: "cancel by anna", "digits, version 3", "resume was refused: …". */
function eventInWords({ kind, data = {}, reason, by }) {
  if (kind === "request") {
    const told = Object.keys(data.arguments ?? {}).length > 0 ? ` ${JSON.stringify(data.arguments)}` : "";
    return `${data.action}${told} by ${data.by}`;
  }
  if (kind === "published") return `${data.model}, version ${data.version}`;
  if (kind !== undefined) return data.text ?? "";
  const isAPerson = by && by !== "dispatcher" && !reason?.includes(by);
  return [reason, isAPerson ? `by ${by}` : ""].filter(Boolean).join(", ");
}
