// The page at /: models, predictions of images dropped on it, and drift.
// What comes from the service or from a file's name is only ever shown as text, never as markup.

import { classes, segments, segmentsInWords, values } from "./answers.js";
import { evaluation, make, metric, percent, say, words } from "./elements.js";
import { fetchJson, isKeyWanted, useKeys } from "./requests.js";

const REFRESH_MS = 10_000;
const AT_ONCE = 4; // requests: a browser has about six connections, and the lists need one
const SHOWN_LAYERS = 3;
const KEPT_RESULTS = 50;
const DRIFTED = 1; // the distance from which the page says so
const SMALL_PX = 96; // the thumbnail's own size

const byId = (id) => document.getElementById(id);

const duration = (ms) => (ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`);

function showProblem(error) {
  byId("problem").hidden = error === null || error.status === 401; // the key's form says that
  say(byId("problem"), error === null ? "" : error.message);
  if (error !== null && listed === "") say(byId("models-state"), "Not known yet.");
}

// Models

let chosen = null;
let wanted = named(); // the model that the address names, until it is seen or another is chosen
let listed = "";
const parametersOf = new Map(); // by model

/** What stands behind the # of the address: /#digits-cnn is a link to that model. */
function named() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

window.addEventListener("hashchange", () => {
  wanted = named();
  listed = "";
  refresh();
});

function showModels(models) {
  const has = (name) => models.some((model) => model.name === name);
  if (has(wanted)) {
    choose(wanted);
    wanted = "";
  } else if (!has(chosen)) {
    choose(models[0]?.name ?? null);
  }
  say(
    byId("models-state"),
    models.length > 0
      ? ""
      : "No model is loaded yet. One that is published into the models directory appears here by itself.",
  );
  for (const { name, parameters } of models) parametersOf.set(name, parameters ?? {});
  const list = JSON.stringify(models);
  if (list === listed) return; // and neither focus nor scroll position is lost
  listed = list;
  const hadFocus = byId("models").contains(document.activeElement);
  byId("models").replaceChildren(...models.map(modelChoice));
  if (hadFocus) byId("models").querySelector(":checked")?.focus();
}

function modelChoice(model, index) {
  const ids = {
    name: `model-${index}`,
    facts: `model-${index}-facts`,
    quality: `model-${index}-quality`,
  };
  const input = make("input", {
    type: "radio",
    name: "model",
    "aria-labelledby": ids.name,
    "aria-describedby": `${ids.facts} ${ids.quality}`,
  });
  input.checked = model.name === chosen;
  input.addEventListener("change", () => {
    wanted = "";
    choose(model.name);
  });
  const facts = make("dl", { id: ids.facts });
  const add = (term, value) =>
    facts.append(make("div", {}, make("dt", {}, term), make("dd", {}, value)));
  const { architecture, classes: names, metrics, task, evaluations } = model.parameters ?? {};
  const versions = model.versions ?? [];
  if (versions.length > 0) add(versions.length === 1 ? "version" : "versions", versions.join(", "));
  for (const { shape } of model.inputs ?? []) add("input", shape.slice(1).join(" × "));
  if (architecture) add("architecture", architecture);
  if (task) add("task", task);
  if (names?.length) add("classes", String(names.length));
  const quality = make("ul", { id: ids.quality, class: "quality" });
  if (evaluations?.length) {
    const unit = model.inputs?.[0]?.shape.length === 4 ? "images" : "samples";
    quality.append(...evaluations.map((each) => make("li", {}, evaluation(each, unit))));
  } else {
    for (const [name, value] of Object.entries(metrics ?? {})) add(words(name), metric(name, value));
  }
  return make(
    "label",
    { class: "model" },
    input,
    make("span", { class: "name", id: ids.name }, model.name),
    facts,
    quality,
  );
}

function choose(name) {
  chosen = name;
  say(byId("chosen"), name ?? "");
  byId("for-model").hidden = name === null;
  byId("files").disabled = name === null;
}

// Drift

async function showDrift(models) {
  const rows = [];
  for (const { name } of models) {
    const path = `v2/models/${encodeURIComponent(name)}/drift`;
    try {
      rows.push(driftRow(name, await fetchJson(path)));
    } catch (error) {
      if (error.status === 401) throw error;
      const cell = make("td", { colspan: "3", class: "error" }, error.message);
      rows.push(make("tr", {}, make("th", { scope: "row" }, name), cell));
    }
  }
  byId("drift-rows").replaceChildren(...rows);
  byId("drift").hidden = rows.length === 0;
}

function driftRow(name, { samples, input, layers }) {
  const most = layers
    .filter((layer) => layer.distance !== null)
    .sort((one, other) => other.distance - one.distance)
    .slice(0, SHOWN_LAYERS);
  const items = most.map((layer) => make("li", {}, `${layer.name} `, distance(layer.distance)));
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, name),
    make("td", { "data-title": "samples" }, samples.toLocaleString("en")),
    make("td", { "data-title": "input" }, distance(input.distance)),
    make("td", { "data-title": "layers" }, items.length > 0 ? make("ul", {}, ...items) : "–"),
  );
}

function distance(value) {
  if (value === null) return "too few samples yet";
  const text = value < 1000 ? value.toFixed(2) : value.toExponential(1);
  return value > DRIFTED ? make("span", { class: "drifted" }, `${text} drifted`) : text;
}

// Predictions

const waiting = [];
let underWay = 0;

function predict(files) {
  const results = files.map((file) => {
    const body = make("p", { class: "hint" }, "waiting …");
    const small = make("small");
    const text = make("div", {}, make("h3", {}, `${file.name} `, small), body);
    const frame = thumbnail(file);
    if (chosen === null) {
      body.replaceWith(failure(file, "there is no model to ask yet"));
    } else {
      waiting.push({ file, model: chosen, body, small, frame });
    }
    return make("li", { class: "result" }, frame, text);
  });
  byId("results").prepend(...results);
  while (byId("results").children.length > KEPT_RESULTS) byId("results").lastChild.remove();
  work();
}

async function work() {
  if (underWay >= AT_ONCE || waiting.length === 0) return;
  underWay += 1;
  const { file, model, body, small, frame } = waiting.shift();
  work(); // the next, beside this one
  try {
    await readable(file);
    const form = new FormData();
    form.append("files", file);
    const start = performance.now();
    const { task, classes: names = [], palette } = parametersOf.get(model) ?? {};
    const query = task === "segmentation" ? "?mask=png" : "";
    const answer = await fetchJson(`predict/${encodeURIComponent(model)}${query}`, {
      method: "POST",
      body: form,
    });
    const took = duration(performance.now() - start);
    const [prediction] = answer.predictions;
    say(small, `${answer.model_name}, version ${answer.model_version}, ${took}`);
    if (prediction.shares) {
      body.replaceWith(segments(prediction, names, palette, frame, file.name));
      announce(`${file.name}: ${segmentsInWords(prediction)}`);
    } else if (prediction.output) {
      body.replaceWith(values(prediction));
      announce(`${file.name}: answered`);
    } else {
      body.replaceWith(classes(prediction));
      announce(`${file.name}: ${prediction.label}, ${percent(prediction.probability)}`);
    }
  } catch (error) {
    say(small, model);
    body.replaceWith(failure(file, error.message));
  } finally {
    underWay -= 1;
    work();
  }
}

/** A folder can be dropped too, and a file be gone since: fetch would blame the service. */
async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("this cannot be read as a file");
  }
}

function thumbnail(file) {
  const image = make("img", { alt: "" });
  const frame = make("div", { class: "thumbnail" }, image);
  const url = URL.createObjectURL(file);
  image.addEventListener("load", () => {
    URL.revokeObjectURL(url);
    if (Math.max(image.naturalWidth, image.naturalHeight) < SMALL_PX) image.className = "small";
  });
  image.addEventListener("error", () => {
    URL.revokeObjectURL(url);
    frame.replaceChildren("no preview");
  });
  image.src = url;
  return frame;
}

function failure(file, message) {
  announce(`${file.name}: ${message}`);
  return make("p", { class: "error" }, message);
}

function announce(text) {
  byId("announcement").textContent = text;
}

byId("files").addEventListener("change", (event) => {
  predict([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => predict([...(event.clipboardData?.files ?? [])]));

// Anywhere on the page: a browser would leave it to show a file that misses the marked place.
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;

document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) byId("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  byId("drop").classList.remove("over");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  predict([...event.dataTransfer.files]);
});

// Keeping up to date, while anyone looks

let refreshing = false;

async function refresh() {
  if (refreshing) return;
  refreshing = true;
  try {
    const { models } = await fetchJson("v2/models");
    showModels(models);
    await showDrift(models);
    showProblem(null);
  } catch (error) {
    showProblem(error);
  } finally {
    refreshing = false;
  }
}

function refreshIfWatched() {
  // Without the key that it asks for, each would be refused.
  if (document.visibilityState === "visible" && !isKeyWanted()) refresh();
}

document.addEventListener("visibilitychange", refreshIfWatched);
setInterval(refreshIfWatched, REFRESH_MS);
useKeys(refresh, showProblem);
refresh();
