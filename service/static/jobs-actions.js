// What can be done with jobs (cancel, pause, resume, retry, publish, archive), and what is asked before.

import { count } from "./jobs-words.js";
import { make, say } from "./elements.js";
import { fetchJson } from "./requests.js";

const byId = (id) => document.getElementById(id);

/** The actions in the order in which they are offered, with the words on their buttons. */
export const ACTIONS = {
  pause: "Pause",
  resume: "Resume",
  retry: "Retry",
  publish: "Publish",
  cancel: "Cancel",
  archive: "Archive",
};

/** Sends a body of JSON. */
export function post(path, body, headers = {}) {
  return fetchJson(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(body),
  });
}

const requestAction = (id, action, body = {}) =>
  post(`v1/jobs/${encodeURIComponent(id)}/${action}`, body);

/** Asks what an action needs to know, and requests it: the job as it is then, or null. */
export async function act(job, action) {
  if (action === "cancel") {
    return ask({
      title: `Cancel ${job.name}?`,
      body: [make("p", {}, "It writes a checkpoint if it is running, and stops.")],
      yes: "Cancel the job",
      run: () => requestAction(job.id, action),
    });
  }
  if (action === "publish") return publish(job);
  if (action === "resume" && job.state === "finished") return extend(job);
  return requestAction(job.id, action);
}

function publish(job) {
  const input = make("input", { required: "", spellcheck: "false", autocomplete: "off" });
  input.value = job.publish ?? job.name;
  const hint = "The bundle becomes the next version of this model, and is served as soon as it is loaded.";
  return ask({
    title: `Publish ${job.name}`,
    body: [make("label", {}, "Name of the model ", input), make("p", { class: "hint" }, hint)],
    yes: "Publish",
    run: () => requestAction(job.id, "publish", { model: input.value.trim() }),
  });
}

function extend(job) {
  const done = job.progress?.epochs ?? job.config?.epochs ?? 1;
  const input = make("input", { type: "number", required: "", min: String(done + 1), step: "1" });
  input.value = String(2 * done);
  return ask({
    title: `Train ${job.name} for longer`,
    body: [
      make("label", {}, "Epochs in all ", input),
      make("p", { class: "hint" }, `It has trained for ${count(done, "epoch")}.`),
    ],
    yes: "Go on",
    run: () => requestAction(job.id, "resume", { values: { epochs: input.valueAsNumber } }),
  });
}

/** Requests the same of several jobs, and says which of them refused. */
export function actOnAll(jobs, action) {
  const label = ACTIONS[action];
  return ask({
    title: `${label} ${count(jobs.length, "job")}?`,
    body: [make("p", {}, jobs.map((job) => job.name).slice(0, 8).join(", ") + (jobs.length > 8 ? ", …" : ""))],
    yes: `${label} ${count(jobs.length, "job")}`,
    run: async () => {
      const refusals = [];
      for (const job of jobs) {
        await requestAction(job.id, action).catch((error) =>
          refusals.push(`${job.name}: ${error.message}`),
        );
      }
      if (refusals.length > 0) throw new Error(refusals.slice(0, 5).join("; "));
      return jobs;
    },
  });
}

/**
 * A question over the page: what `run` gives, or null if the answer is no.
 *
 * If `run` fails, the question stays and says why.
 */
function ask({ title, body, yes, run }) {
  const dialog = byId("dialog");
  const form = dialog.querySelector("form");
  const isDangerous = /^Cancel/.test(yes);
  say(byId("dialog-title"), title);
  say(byId("dialog-yes"), yes);
  byId("dialog-yes").classList.toggle("danger", isDangerous);
  byId("dialog-body").replaceChildren(...body);
  byId("dialog-error").hidden = true;
  return new Promise((resolve) => {
    let answer = null;
    const listening = new AbortController();
    const { signal } = listening;
    form.addEventListener(
      "submit",
      async (event) => {
        event.preventDefault();
        byId("dialog-yes").disabled = true;
        try {
          answer = await run();
          dialog.close();
        } catch (error) {
          say(byId("dialog-error"), error.message);
          byId("dialog-error").hidden = false;
        } finally {
          byId("dialog-yes").disabled = false;
        }
      },
      { signal },
    );
    byId("dialog-no").addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        resolve(answer);
      },
      { signal },
    );
    dialog.showModal();
    const field = dialog.querySelector("input") ?? byId(isDangerous ? "dialog-no" : "dialog-yes");
    field.focus();
    field.select?.();
  });
}
