// Elements and words that the page's parts share.
// What comes from the service or from a file's name is only ever shown as text, never as markup.

/** An element with attributes and children; strings become text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets a text only where it differs: a screen reader reads out whatever is set. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const words = (name) => name.replaceAll("_", " ").replace(/\biou\b/i, "IoU");
export const percent = (share) =>
  share > 0 && share < 0.0005 ? "<0.1%" : `${(100 * share).toFixed(1)}%`;

const isShare = (name, value) =>
  /accuracy|iou|dice|precision|recall/i.test(name) && value >= 0 && value <= 1;
const short = (value) => String(Number(value.toPrecision(4)));

export function metric(name, value) {
  if (typeof value !== "number") return String(value);
  return isShare(name, value) ? percent(value) : short(value);
}

const SPLITS = { test: "test", validation: "validation", train: "training" };

/** How good a model was on one split, in words. */
export function evaluation({ split, samples, statistics, metrics }, unit) {
  const told = Object.entries(metrics).map(([name, { value, low, high }]) => {
    // One unit for all three, or none.
    const number = isShare(name, value) ? (each) => (100 * each).toFixed(1) : short;
    const interval = low === null || high === null ? "" : ` (${number(low)} to ${number(high)})`;
    return `${words(name)} ${metric(name, value)}${interval}`;
  });
  const count = `${samples.toLocaleString("en")} ${SPLITS[split] ?? split} ${unit}`;
  return `${told.join(", ")} on ${count}, statistics ${statistics}`;
}
