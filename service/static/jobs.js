// The page at /jobs: which of its views is shown stands behind the # of the address.
// What comes from the service is only ever shown as text, never as markup.

import { make, say } from "./elements.js";
import { retellTimes } from "./jobs-words.js";
import * as list from "./jobs-list.js";
import { useKeys } from "./requests.js";

const RETELL_MS = 10_000;

const byId = (id) => document.getElementById(id);

/**
 * The views by the first word of the address; any other word is a job's id. But for the list, their
 * modules and styles are loaded when they are needed.
 */
const CHARTED = ["uPlot.min.css", "jobs-job.css"];
const VIEWS = {
  "": { id: "list", styles: [], load: async () => list },
  new: { id: "form", styles: ["jobs-form.css"], load: () => import("./jobs-form.js") },
  compare: { id: "compare", styles: CHARTED, load: () => import("./jobs-compare.js") },
};
const JOB = { id: "job", styles: CHARTED, load: () => import("./jobs-job.js") };

let visit = null; // what ends when another view is shown

/** Where the address points: #ID, #new, #new/ID, #compare/ID,ID or #?state=failed. */
function place() {
  const [path, query = ""] = location.hash.slice(1).split("?");
  const [word, ...rest] = path.split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  const view = VIEWS[word] ?? JOB;
  return { view, id: view === JOB ? word : rest.join("/"), query: new URLSearchParams(query) };
}

async function show({ moveFocus = true } = {}) {
  visit?.abort();
  visit = new AbortController();
  const { signal } = visit;
  const { view, id, query } = place();
  showProblem(null);
  byId("connection").hidden = true;
  try {
    const [module] = await Promise.all([view.load(), ...view.styles.map(loadStyle)]);
    if (signal.aborted) return;
    for (const each of [...Object.values(VIEWS), JOB]) byId(each.id).hidden = each !== view;
    if (view.id !== "list") byId(view.id).replaceChildren(waiting());
    await module.enter(byId(view.id), { id, query, signal, page });
    const title = byId(view.id).querySelector("h2");
    if (signal.aborted || title === null) return;
    if (view.id !== "job") document.title = `${title.textContent}, syncbn`;
    if (moveFocus) title.focus();
  } catch (error) {
    if (signal.aborted) return;
    if (view.id !== "list") byId(view.id).replaceChildren();
    showProblem(error);
  }
}

const styles = new Map();

function loadStyle(name) {
  if (!styles.has(name)) {
    const link = make("link", { rel: "stylesheet", href: `static/${name}` });
    styles.set(
      name,
      new Promise((resolve) => {
        link.addEventListener("load", resolve);
        link.addEventListener("error", resolve); // it can be read without
      }),
    );
    document.head.append(link);
  }
  return styles.get(name);
}

function showProblem(error) {
  byId("problem").hidden = error === null || error.status === 401; // the key's form says that
  say(byId("problem"), error === null ? "" : error.message);
}

const waiting = () => make("section", {}, make("p", { class: "hint empty" }, "Asking the service …"));

/** What views tell the whole page. */
const page = {
  showProblem,
  announce: (text) => say(byId("announcement"), text),
  setConnected: (isConnected) => {
    byId("connection").hidden = isConnected;
  },
};

window.addEventListener("hashchange", () => show());
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.querySelector("main > :not([hidden]) h2")?.focus();
});
setInterval(() => retellTimes(document.body), RETELL_MS);
useKeys(show, showProblem);
show({ moveFocus: false });
