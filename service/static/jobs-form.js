// The form for a new job or sweep, made of what the service offers; an earlier job may fill it.

import { make, say } from "./elements.js";
import { post } from "./jobs-actions.js";
import { field } from "./jobs-field.js";
import { count, digits } from "./jobs-words.js";
import { fetchJson } from "./requests.js";

/** Shows an empty form, or one with the settings of the job `id`. */
export async function enter(element, { id, signal, page }) {
  const [options, earlier] = await Promise.all([
    fetchJson("v1/options", { signal }),
    id === "" ? null : fetchJson(`v1/jobs/${encodeURIComponent(id)}`, { signal }),
  ]);
  const form = newForm(options, page);
  if (earlier !== null) form.fill(earlier);
  element.replaceChildren(form.element);
}

function newForm(options, page) {
  const jobFields = new Map();
  const choiceFields = new Map();
  const valueFields = new Map(); // those that are shown
  const kept = new Map(); // what was entered into fields that are not shown, or are to be made anew
  let attempt = { body: "", key: "" };

  const title = make("h2", { tabindex: "-1" }, "New job");
  const origin = make("p", { class: "hint" });
  const find = make("input", { type: "search", placeholder: "by name or help", spellcheck: "false" });
  const onlyChanged = make("input", { type: "checkbox" });
  const sections = make("div", { class: "sections" });
  const summary = make("p", { id: "sweep-count", role: "status" });
  const problem = make("p", { class: "wrong", role: "alert", hidden: "" });
  const submit = make("button", { type: "submit" }, "Submit");
  const request = make("pre", { tabindex: "0", "aria-label": "The request" });
  const element = make(
    "form",
    { class: "new-job", novalidate: "" },
    make("section", {}, make("div", { class: "title" }, title, origin), fieldsOfJob()),
    make(
      "section",
      {},
      make("h2", {}, "Choices"),
      make("p", { class: "hint" }, "What the job is made of. Each choice has settings of its own, below."),
      fieldsOfChoices(),
    ),
    make(
      "section",
      {},
      make(
        "div",
        { class: "title" },
        make("h2", {}, "Settings"),
        make("label", { class: "find" }, "Find ", find),
        make("label", { class: "check" }, onlyChanged, " Only what differs from the defaults"),
      ),
      sections,
    ),
    make(
      "div",
      { class: "submit" },
      make("div", {}, summary, problem),
      make("details", {}, make("summary", {}, "As a request"), request),
      submit,
    ),
  );

  function fieldsOfJob() {
    const grid = make("div", { class: "grid" });
    for (const key of options.job) {
      const each = field(key, { mayVary: false, changed });
      jobFields.set(key.key, each);
      grid.append(each.row);
    }
    return grid;
  }

  function fieldsOfChoices() {
    const grid = make("div", { class: "grid" });
    for (const [name, group] of Object.entries(options.groups)) {
      const key = { key: name, type: "enum", default: group.default, help: group.help };
      key.choices = Object.keys(group.choices);
      const each = field(key, {
        changed: () => {
          showSettings();
          changed();
        },
      });
      choiceFields.set(name, each);
      grid.append(each.row);
    }
    return grid;
  }

  // Settings: those of no group, and those that the choices have

  function keep() {
    for (const [key, each] of valueFields) {
      const told = each.read();
      if (told.error !== undefined || !told.isChanged) kept.delete(key);
      else kept.set(key, told);
    }
  }

  function settingsOf(name, group) {
    const { value, values = [value] } = choiceFields.get(name).read();
    const [first, ...others] = values.map((choice) => group.choices[choice]?.values ?? []);
    return (first ?? []).filter((key) =>
      others.every((keys) => keys.some((other) => other.key === key.key)),
    );
  }

  function showSettings() {
    keep();
    const open = new Map(
      [...sections.children].map((section) => [section.dataset.name, section.open]),
    );
    valueFields.clear();
    sections.replaceChildren();
    addSection("training", "Training", options.values, "", open.get("training") ?? true);
    for (const [name, group] of Object.entries(options.groups)) {
      const { value, values = [value] } = choiceFields.get(name).read();
      const help = values.length === 1 ? (group.choices[values[0]]?.help ?? "") : "what all of them have";
      const words = `${name}: ${values.join(", ")}`;
      addSection(name, words, settingsOf(name, group), help, open.get(name) ?? false);
    }
    narrow();
  }

  function addSection(name, words, keys, help, isOpen) {
    if (keys.length === 0) return;
    const grid = make("div", { class: "grid" });
    const number = make("span", { class: "hint" });
    const hint = make("span", { class: "hint" }, help);
    const section = make(
      "details",
      {},
      make("summary", {}, make("strong", {}, words), " ", number, " ", hint),
      grid,
    );
    section.dataset.name = name;
    section.open = isOpen;
    for (const key of keys) {
      const each = field(key, { changed });
      valueFields.set(key.key, each);
      const told = kept.get(key.key);
      if (told?.values !== undefined) each.writeSeveral(told.values);
      else if (told !== undefined) each.write(told.value);
      grid.append(each.row);
    }
    sections.append(section);
  }

  function narrow() {
    const text = find.value.trim().toLowerCase();
    const isNarrowed = text !== "" || onlyChanged.checked;
    for (const section of sections.children) {
      let matching = 0;
      for (const row of section.lastChild.children) {
        const { key, read } = valueFields.get(row.dataset.key);
        const isFound = `${key.key} ${key.help ?? ""}`.toLowerCase().includes(text);
        row.hidden = !isFound || (onlyChanged.checked && !read().isChanged);
        if (!row.hidden) matching += 1;
      }
      section.hidden = matching === 0;
      if (isNarrowed) section.open = true;
    }
  }

  find.addEventListener("input", narrow);
  onlyChanged.addEventListener("change", narrow);

  // What is submitted

  function body() {
    const told = { choices: {}, values: {}, sweep: {} };
    const errors = [];
    const gather = (fields, into) => {
      for (const [key, each] of fields) {
        const { value, values, error, isChanged } = each.read();
        if (error !== undefined) errors.push({ key, error, each });
        else if (values?.length > 1) told.sweep[key] = values;
        else if (isChanged) into[key] = values === undefined ? value : values[0];
      }
    };
    gather(jobFields, told);
    gather(choiceFields, told.choices);
    gather(valueFields, told.values);
    for (const part of ["choices", "values", "sweep"]) {
      if (Object.keys(told[part]).length === 0) delete told[part];
    }
    return { told, errors };
  }

  function changed() {
    problem.hidden = true;
    const { told, errors } = body();
    const swept = Object.entries(told.sweep ?? {});
    const jobs = swept.reduce((product, [, values]) => product * values.length, 1);
    const most = options.limits?.sweep_jobs ?? Infinity;
    const factors = swept.map(([key, values]) => `${key} (${values.length})`).join(" × ");
    const words =
      errors.length > 0
        ? `${count(errors.length, "setting")} to be mended: ${errors.map(({ key }) => key).join(", ")}`
        : jobs > most
          ? `${count(jobs, "job")}, but a sweep may have ${digits(most)} at most: ${factors}`
          : jobs > 1
            ? `Makes ${count(jobs, "job")}: ${factors}`
            : "Makes one job";
    say(summary, words);
    summary.classList.toggle("wrong", errors.length > 0 || jobs > most);
    say(submit, jobs > 1 ? `Submit ${count(jobs, "job")}` : "Submit");
    submit.disabled = jobs > most;
    say(request, `POST /v1/jobs\n${JSON.stringify(told, null, 2)}`);
    for (const section of sections.children) {
      const number = section.querySelectorAll(".changed").length;
      say(section.querySelector("summary .hint"), number === 0 ? "" : `${number} changed`);
    }
  }

  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { told, errors } = body();
    if (errors.length > 0) {
      reveal(errors[0].each);
      return;
    }
    const text = JSON.stringify(told);
    // The same request once more, because its answer was lost, must not make the jobs twice.
    if (attempt.body !== text) attempt = { body: text, key: randomKey() };
    submit.disabled = true;
    try {
      const answer = await post("v1/jobs", told, { "Idempotency-Key": attempt.key });
      attempt = { body: "", key: "" };
      const isSweep = answer.kind === "sweep";
      page.announce(isSweep ? `${count(answer.jobs.length, "job")} submitted` : "submitted");
      location.hash = isSweep ? `?sweep=${encodeURIComponent(answer.id)}` : encodeURIComponent(answer.id);
    } catch (error) {
      problem.hidden = false;
      say(problem, error.message);
      const [, key] = /^([\w.]+)\s*[=:]/.exec(error.message) ?? [];
      const named = valueFields.get(key) ?? choiceFields.get(key) ?? jobFields.get(key);
      if (named === undefined) problem.scrollIntoView({ block: "nearest" });
      else reveal(named, error.message);
    } finally {
      submit.disabled = false;
    }
  });

  function reveal(each, message) {
    find.value = "";
    onlyChanged.checked = false;
    narrow();
    const section = each.row.closest("details");
    if (section !== null) section.open = true;
    if (message === undefined) each.row.querySelector("input, select").focus();
    else each.refuse(message);
  }

  function fill(job) {
    say(title, `New job like ${job.name}`);
    origin.replaceChildren(
      "with the settings of ",
      make("a", { href: `#${encodeURIComponent(job.id)}` }, job.id),
    );
    for (const name of ["name", "priority", "retries", "publish"]) {
      jobFields.get(name)?.write(job[name] ?? null);
    }
    const settings = Object.entries({ ...job.choices, ...job.values, ...job.sweep_values });
    const gone = [];
    for (const [key, value] of settings) choiceFields.get(key)?.write(value);
    showSettings();
    for (const [key, value] of settings) {
      if (choiceFields.has(key)) continue;
      if (valueFields.has(key)) valueFields.get(key).write(value);
      else gone.push(key);
    }
    if (gone.length > 0) origin.append(`, without ${gone.join(", ")}, which are not offered any more`);
    for (const section of sections.children) {
      section.open = section.open || section.querySelector(".changed") !== null;
    }
    changed();
  }

  showSettings();
  changed();
  return { element, fill };
}

/** As crypto.randomUUID, which a page has only over HTTPS and from this machine. */
function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
