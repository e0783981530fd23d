// One setting of the form: its control, its limits and help, and the list of values that it may become.

import { make, say } from "./elements.js";
import { digits, valueInWords } from "./jobs-words.js";

const ENDLESS = 1_000_000_000;
const MOST_OF_A_RANGE = 10_000; // 0..9999

let made = 0;

/** The limits of a setting in words: "above 0, at most 100". */
function limits({ minimum, exclusive_minimum: above, maximum, exclusive_maximum: below }) {
  if (maximum >= ENDLESS) maximum = undefined; // which nobody needs to be told
  if (minimum !== undefined && maximum !== undefined) {
    return `${digits(minimum)} to ${digits(maximum)}`;
  }
  const told = [];
  if (minimum !== undefined) told.push(`at least ${digits(minimum)}`);
  if (above !== undefined) told.push(`above ${digits(above)}`);
  if (maximum !== undefined) told.push(`at most ${digits(maximum)}`);
  if (below !== undefined) told.push(`below ${digits(below)}`);
  return told.join(", ");
}

/** One value from text, by the setting's type; throws an Error that says what is valid. */
function parse(text, key) {
  const written = text.trim();
  if (written === "" && key.type === "list" && !key.nullable) return [];
  if (written === "" || (key.nullable && written === "null")) {
    if (key.nullable) return null;
    if (key.type === "string") return "";
    throw new Error("a value is needed");
  }
  if (key.type === "list") return parseItems(written, key);
  if (key.type === "string") {
    if (key.pattern === undefined || new RegExp(`^(?:${key.pattern})$`).test(written)) return written;
    throw new Error(`${written} must be ${key.form ?? `of the form ${key.pattern}`}`);
  }
  const value = Number(written);
  const isInteger = key.type === "integer";
  if (!Number.isFinite(value) || (isInteger && !/^[+-]?\d+$/.test(written))) {
    throw new Error(`${written} is not ${isInteger ? "a whole number" : "a number"}`);
  }
  const isInside =
    !(value < key.minimum) &&
    !(value <= key.exclusive_minimum) &&
    !(value > key.maximum) &&
    !(value >= key.exclusive_maximum);
  if (!isInside) throw new Error(`${written} must be ${limits(key).replace(/^(?=[-\d])/, "from ")}`);
  return value;
}

/** The items of one list: "64, 32", in brackets or without. */
function parseItems(written, key) {
  const inner = written.replace(/^\[(.*)\]$/s, "$1").trim();
  const items = inner === "" ? [] : inner.split(",").map((each) => parse(each, { ...key.item }));
  if (items.length > key.max_items) throw new Error(`at most ${key.max_items} items`);
  return items;
}

/** Several values from text: "0.1, 0.2", "0..4" for whole numbers, lists between semicolons. */
function parseSeveral(text, key) {
  const parts = text.split(key.type === "list" ? ";" : ",").map((part) => part.trim());
  const values = parts.flatMap((part) => {
    const range = key.type === "integer" && /^(-?\d+)\.\.(-?\d+)$/.exec(part);
    if (!range) return [parse(part, key)];
    const [from, to] = [parse(range[1], key), parse(range[2], key)];
    if (to < from || to - from >= MOST_OF_A_RANGE) throw new Error(`${part} is not a range`);
    return Array.from({ length: to - from + 1 }, (_, index) => from + index);
  });
  const twice = values.find((value, index) => values.indexOf(value) !== index);
  if (twice !== undefined) throw new Error(`${valueInWords(twice)} is there twice`);
  return values;
}

const asText = (value) =>
  value === null || value === undefined ? "" : Array.isArray(value) ? value.join(", ") : String(value);

/**
 * A setting with its control.
 *
 * @param key of the options, as the service describes it.
 * @param options.mayVary whether it may become a list of values.
 * @param options.changed is called when a person changed it.
 * @param options.title what it is called, if not by its key.
 *
 * The field has `row`, its element; `read()`, which gives {value}, {values} or {error}, and
 * `isChanged`; `write(value)` and `writeSeveral(values)`.
 */
export function field(key, { mayVary = true, changed = () => {}, title = key.key } = {}) {
  made += 1;
  const id = `field-${made}`;
  const isChoice = key.type === "enum" || key.type === "boolean";
  const control = make("div", { class: "control" });
  const label = make("label", { for: id, id: `${id}-label` }, title);
  const range = make("span", { class: "hint", id: `${id}-range` }, limits(key));
  const help = make("p", { class: "hint", id: `${id}-help` });
  const wrong = make("p", { class: "wrong", id: `${id}-wrong`, hidden: "" });
  const row = make("div", { class: "field" }, make("div", { class: "head" }, label, range), control, wrong, help);
  row.dataset.key = key.key;
  say(help, key.help ?? "");

  let isSeveral = false;
  let asked = null; // what the service found wrong

  const usual = valueInWords(key.default);
  const reset = make("button", { type: "button", class: "quiet", title: `to ${usual}` }, "reset");
  reset.setAttribute("aria-label", `Reset ${title} to ${usual}`);
  const vary = make("button", { type: "button", class: "quiet", "aria-pressed": "false" }, "several");
  vary.title = "Try several values, each in a job of its own";
  vary.setAttribute("aria-label", `Several values of ${title}`);

  function build(several, values) {
    isSeveral = several;
    vary.setAttribute("aria-pressed", String(several));
    const inputs = several ? severalInputs(values) : [singleInput(values[0])];
    control.replaceChildren(...inputs, ...(mayVary ? [vary] : []), reset);
    label.htmlFor = several && isChoice ? "" : id;
  }

  function singleInput(value) {
    const common = { id, "aria-describedby": `${id}-wrong ${id}-range ${id}-help` };
    if (isChoice) {
      const options = key.type === "boolean" ? [true, false] : key.choices;
      const select = make("select", common);
      for (const each of key.nullable ? [null, ...options] : options) {
        select.append(make("option", { value: JSON.stringify(each) }, valueInWords(each)));
      }
      select.value = JSON.stringify(value ?? null);
      return select;
    }
    const isNumber = key.type === "number" || key.type === "integer";
    const input = make("input", { ...common, type: "text", spellcheck: "false", autocomplete: "off" });
    if (isNumber) input.inputMode = "decimal";
    if (key.nullable) input.placeholder = "null";
    input.value = asText(value);
    return input;
  }

  function severalInputs(values) {
    if (!isChoice) {
      const input = singleInput(null);
      input.placeholder =
        key.type === "integer" ? "0, 1, 2 or 0..4" : key.type === "list" ? "1, 2; 3, 4" : "one, another";
      input.value = values.map(asText).join(key.type === "list" ? "; " : ", ");
      return [input];
    }
    const options = key.type === "boolean" ? [true, false] : key.choices;
    const group = make("div", { class: "checks", role: "group", "aria-labelledby": `${id}-label` });
    for (const each of options) {
      const check = make("input", { type: "checkbox", value: JSON.stringify(each) });
      check.checked = values.includes(each);
      group.append(make("label", {}, check, valueInWords(each)));
    }
    return [group];
  }

  function read() {
    if (asked !== null) return { error: asked, isChanged: true };
    try {
      if (isSeveral) {
        const values = isChoice
          ? [...control.querySelectorAll(":checked")].map((check) => JSON.parse(check.value))
          : parseSeveral(control.querySelector("input").value, key);
        if (values.length === 0) throw new Error("at least one value is needed");
        return { values, isChanged: true };
      }
      const input = control.querySelector("input, select");
      const value = isChoice ? JSON.parse(input.value) : parse(input.value, key);
      return { value, isChanged: JSON.stringify(value) !== JSON.stringify(key.default ?? null) };
    } catch (error) {
      return { error: error.message, isChanged: true };
    }
  }

  function tell() {
    const { error, isChanged } = read();
    wrong.hidden = error === undefined;
    say(wrong, error ?? "");
    reset.hidden = !isChanged;
    row.classList.toggle("changed", isChanged);
    for (const input of control.querySelectorAll("input, select")) {
      input.setAttribute("aria-invalid", String(error !== undefined));
    }
  }

  function change() {
    asked = null;
    tell();
    changed();
  }

  control.addEventListener("input", change);
  reset.addEventListener("click", () => {
    build(false, [key.default]);
    change();
    control.firstChild.focus();
  });
  vary.addEventListener("click", () => {
    const { value, values = [value ?? key.default] } = read();
    build(!isSeveral, isSeveral ? values.slice(0, 1) : values);
    change();
    control.querySelector("input, select").focus();
  });

  build(false, [key.default]);
  tell();
  return {
    key,
    row,
    read,
    write(value) {
      build(false, [value]);
      tell();
    },
    writeSeveral(values) {
      build(true, values);
      tell();
    },
    /** Shows what the service found wrong, until the value changes. */
    refuse(message) {
      asked = message;
      tell();
      control.querySelector("input, select").focus();
    },
  };
}
