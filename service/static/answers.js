// What a model makes of an image, as elements: classes, a mask over the picture, or numbers.

import { make, percent, say } from "./elements.js";

const SHOWN_CLASSES = 5;
const SHOWN_SEGMENTS = 12;
const SHOWN_VALUES = 8;
const OPACITY = 60; // percent, of a mask at first

/** The most likely classes with their probabilities. */
export function classes({ label, probabilities }) {
  const best = Object.entries(probabilities)
    .sort(([a, p], [b, q]) => q - p || Number(b === label) - Number(a === label))
    .slice(0, SHOWN_CLASSES);
  return make("ol", { class: "classes" }, ...best.map(([name, share]) => row(name, share)));
}

function row(name, share, ...before) {
  const filled = make("span");
  filled.style.setProperty("--share", String(share));
  return make(
    "li",
    {},
    ...before,
    make("span", { class: "class", title: name }, name),
    make("span", { class: "bar", "aria-hidden": "true" }, filled),
    make("span", { class: "share" }, percent(share)),
  );
}

const present = ({ shares }) =>
  Object.entries(shares)
    .map(([name, share]) => ({ name, share }))
    .filter(({ share }) => share > 0)
    .sort((one, other) => other.share - one.share);

/** The classes of a mask and their shares, in a sentence. */
export function segmentsInWords(prediction) {
  const told = present(prediction).slice(0, SHOWN_CLASSES);
  return told.map(({ name, share }) => `${name} ${percent(share)}`).join(", ");
}

/**
 * The classes of a mask with their colors and shares, and what sets how much of the picture is
 * seen through it. The mask is laid over the picture in `frame`. `names` are those of all classes in
 * the order of the palette, which the keys of `shares` do not keep: names such as "3" come first.
 */
export function segments(prediction, names, palette, frame, fileName) {
  const found = present(prediction);
  const legend = found.slice(0, SHOWN_SEGMENTS).map(({ name, share }) => {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    const color = palette?.[names.indexOf(name)];
    if (color) swatch.style.setProperty("--color", `rgb(${color.map(Number).join(" ")})`);
    return row(name, share, swatch);
  });
  const parts = [make("ul", { class: "classes legend" }, ...legend)];
  if (found.length > SHOWN_SEGMENTS) {
    parts.push(make("p", { class: "hint" }, `and ${found.length - SHOWN_SEGMENTS} more classes`));
  }
  if (prediction.mask === null) {
    parts.push(make("p", { class: "hint" }, "no picture of the mask: it has more than 256 classes"));
  } else {
    overlay(prediction, frame, `mask of ${fileName}: ${segmentsInWords(prediction)}`);
    parts.push(slider(frame));
  }
  return make("div", {}, ...parts);
}

function overlay({ mask, width, height }, frame, description) {
  const image = make("img", { class: "mask", alt: description });
  image.src = `data:image/png;base64,${mask}`;
  frame.classList.add("overlaid");
  // The model saw the middle of the picture in these proportions, and so does the reader.
  frame.style.setProperty("--ratio", String(width / height));
  frame.append(image);
}

function slider(frame) {
  const input = make("input", { type: "range", min: "0", max: "100", value: String(OPACITY) });
  const shown = make("output");
  const set = () => {
    frame.style.setProperty("--opacity", String(Number(input.value) / 100));
    say(shown, `${input.value}%`);
  };
  input.addEventListener("input", set);
  set();
  return make("label", { class: "opacity" }, make("span", {}, "Mask opacity"), input, shown);
}

/** The first numbers of a tensor. */
export function values({ shape, output }) {
  const shown = output.slice(0, SHOWN_VALUES).map((value) => String(Number(value.toPrecision(4))));
  if (output.length > SHOWN_VALUES) shown.push("…");
  return make(
    "div",
    {},
    make("p", { class: "hint" }, `output of shape ${shape.join(" × ") || "()"}`),
    make("p", { class: "values" }, shown.join("  ")),
  );
}
