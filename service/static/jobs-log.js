// A job's log: a window over it that moves, follows its end, and is searched through as a whole.

import { make, say } from "./elements.js";
import { digits } from "./jobs-words.js";
import { request } from "./requests.js";

const CHUNK_BYTES = 64 * 1024;
const SEARCHED_BYTES = 1024 * 1024; // at a time
const MOST_LINES = 4000; // in the document
const MOST_MATCHES = 10_000;
const LONGEST_LINE = 4000; // letters
const NEWLINE = 10;
const TYPING_MS = 250;

const text = (bytes) => new TextDecoder().decode(bytes);

/** What a terminal would show of a line: progress bars overwrite themselves. */
function shown(line) {
  if (line.length <= LONGEST_LINE && !/[\r\x1b]/.test(line)) return line;
  const last = line.replace(/\r+$/, "").split("\r").pop().replaceAll(/\x1b\[[0-9;]*[A-Za-z]/g, "");
  if (last.length <= LONGEST_LINE) return last;
  return `${last.slice(0, LONGEST_LINE)} … (${digits(last.length - LONGEST_LINE)} more letters)`;
}

/** Splits bytes at line ends into [{offset, text}] and what remains without one. */
function split(bytes, offset) {
  const whole = bytes.lastIndexOf(NEWLINE) + 1;
  let start = offset;
  // Decoded at once, which is much faster than line by line.
  const lines = text(bytes.subarray(0, whole)).split("\n").slice(0, -1).map((each) => {
    const line = { offset: start, text: each };
    start = offset + bytes.indexOf(NEWLINE, start - offset) + 1;
    return line;
  });
  return { lines, rest: bytes.subarray(whole), restOffset: offset + whole };
}

function joined(one, other) {
  const all = new Uint8Array(one.length + other.length);
  all.set(one);
  all.set(other, one.length);
  return all;
}

/**
 * A view of the log at a path, until the signal aborts.
 *
 * It has `element`; `open()`, which shows the newest lines; and `grew(event)`, which is told of what
 * was added.
 */
export function logView(path, signal, announce) {
  const lines = make("div", {
    class: "lines",
    role: "log",
    "aria-live": "off", // a log that is read out as it grows would drown everything else
    "aria-label": "Log",
    tabindex: "0",
  });
  const find = make("input", { type: "search", spellcheck: "false", "aria-label": "Search the log" });
  find.placeholder = "Search the whole log";
  const previous = make("button", { type: "button", class: "plain", title: "Shift+Enter" }, "Previous");
  const next = make("button", { type: "button", class: "plain", title: "Enter" }, "Next");
  const found = make("span", { class: "hint found", role: "status" });
  const followed = make("input", { type: "checkbox" });
  followed.checked = true;
  const attempts = make("select", { "aria-label": "Of which attempt", hidden: "" });
  const whole = make("button", { type: "button", class: "plain" }, "Download");
  const where = make("p", { class: "hint where" });
  const element = make(
    "section",
    { class: "log", "aria-labelledby": "log-title" },
    make(
      "div",
      { class: "title" },
      make("h3", { id: "log-title" }, "Log"),
      make("div", { class: "search" }, find, previous, next, found),
      attempts,
      make("label", { class: "check" }, followed, " Follow"),
      whole,
    ),
    lines,
    where,
  );

  let start = 0; // what the window shows: bytes from here
  let end = 0; // to here, where an unfinished line may still go on
  let size = 0;
  let open = null; // the unfinished last line: {bytes, offset, row}
  let busy = Promise.resolve(); // the window moves by one step after the other

  async function fetchBytes(offset, limit) {
    const ofAttempt = attempts.value === "" ? "" : `&attempt=${attempts.value}`;
    const answer = await request(`${path}?offset=${offset}&limit=${limit}${ofAttempt}`, { signal });
    const bytes = new Uint8Array(await answer.arrayBuffer());
    size = Number(answer.headers.get("X-Log-Size"));
    return { bytes, offset: Number(answer.headers.get("X-Log-Offset")) - bytes.length };
  }

  const inTurn = (step) => {
    busy = busy.then(() => (signal.aborted ? null : step())).catch((error) => {
      if (!signal.aborted) say(where, error.message);
    });
    return busy;
  };

  // Rows

  function row(line) {
    const each = make("div", { class: "line" }, shown(line.text));
    each.dataset.offset = String(line.offset);
    if (/^=== attempt /.test(line.text)) each.classList.add("attempt");
    else if (/\b(error|exception|traceback)\b/i.test(line.text)) each.classList.add("bad");
    highlight(each);
    return each;
  }

  function append(bytes, offset) {
    const parts = split(joined(open?.bytes ?? new Uint8Array(), bytes), open?.offset ?? offset);
    open?.row.remove();
    const rows = parts.lines.map(row);
    open = null;
    if (parts.rest.length > 0) {
      open = { bytes: parts.rest.slice(), offset: parts.restOffset };
      open.row = row({ offset: open.offset, text: text(open.bytes) });
      rows.push(open.row);
    }
    lines.append(...rows);
    end = offset + bytes.length;
    while (lines.childElementCount > MOST_LINES) lines.firstChild.remove();
    if (lines.firstChild) start = Number(lines.firstChild.dataset.offset);
  }

  function clear(offset) {
    lines.replaceChildren();
    open = null;
    start = end = offset;
  }

  function tell() {
    const kilobytes = (bytes) => `${digits(Math.ceil(bytes / 1000))} kB`;
    const isWhole = start === 0 && end >= size;
    say(
      where,
      size === 0
        ? "Nothing was written yet."
        : isWhole
          ? `The whole log, ${kilobytes(size)}.`
          : `${kilobytes(start)} to ${kilobytes(end)} of ${kilobytes(size)}; scroll for more.`,
    );
  }

  const toEnd = () => {
    lines.scrollTop = lines.scrollHeight;
  };

  // Moving the window

  async function goToEnd() {
    if (end === 0 || size - end > CHUNK_BYTES) {
      const { bytes, offset } = await fetchBytes(-CHUNK_BYTES, CHUNK_BYTES);
      const body = fromLineStart(bytes, offset);
      clear(offset + skipped);
      append(body, offset + skipped);
    }
    await readOn();
    if (followed.checked) toEnd();
    tell();
  }

  let skipped = 0;

  /** Without the end of a line that began before. */
  function fromLineStart(bytes, offset) {
    skipped = offset === 0 ? 0 : bytes.indexOf(NEWLINE) + 1;
    return bytes.subarray(skipped);
  }

  async function readOn(limit = Infinity) {
    let read = 0;
    while (end < size && read < limit) {
      const { bytes } = await fetchBytes(end, CHUNK_BYTES);
      if (bytes.length === 0) return;
      append(bytes, end);
      read += bytes.length;
    }
  }

  async function readBack() {
    if (start === 0) return;
    const from = Math.max(0, start - CHUNK_BYTES);
    const { bytes } = await fetchBytes(from, start - from);
    const body = fromLineStart(bytes, from);
    const parts = split(body, from + skipped);
    if (parts.lines.length === 0) return;
    const anchor = lines.firstChild;
    const top = anchor?.offsetTop ?? 0;
    lines.prepend(...parts.lines.map(row));
    start = from + skipped;
    if (anchor) lines.scrollTop += anchor.offsetTop - top;
    while (lines.childElementCount > MOST_LINES) {
      end = Number(lines.lastChild.dataset.offset);
      open = null;
      lines.lastChild.remove();
    }
    tell();
  }

  async function goTo(offset) {
    let line = lineAt(offset);
    if (line === null) {
      const from = Math.max(0, offset - CHUNK_BYTES / 2);
      const { bytes } = await fetchBytes(from, CHUNK_BYTES);
      const body = fromLineStart(bytes, from);
      clear(from + skipped);
      append(body, from + skipped);
      line = lineAt(offset);
    }
    for (const each of lines.querySelectorAll(".current")) each.classList.remove("current");
    line?.classList.add("current");
    line?.scrollIntoView({ block: "center" });
    tell();
  }

  const lineAt = (offset) => lines.querySelector(`[data-offset="${offset}"]`);

  lines.addEventListener("scroll", () => {
    const below = lines.scrollHeight - lines.scrollTop - lines.clientHeight;
    if (below > 40 && followed.checked && !isMoving) followed.checked = false;
    if (lines.scrollTop < 100 && start > 0 && !isMoving) move(readBack);
    else if (below < 100 && end < size && !followed.checked && !isMoving) move(() => readOn(CHUNK_BYTES));
  });

  let isMoving = false;

  async function move(step) {
    isMoving = true;
    await inTurn(step);
    tell();
    // The scrolling that comes of it is told only in the next frame.
    requestAnimationFrame(() => requestAnimationFrame(() => (isMoving = false)));
  }

  followed.addEventListener("change", () => followed.checked && move(goToEnd));

  // Searching

  let matches = [];
  let current = -1;
  let searching = null;
  let typing;

  async function search() {
    searching?.abort();
    searching = new AbortController();
    const wanted = find.value.toLowerCase();
    matches = [];
    current = -1;
    for (const each of lines.children) highlight(each);
    say(found, "");
    if (wanted === "") return;
    const ending = searching.signal;
    let [offset, rest, restOffset] = [0, new Uint8Array(), 0];
    const look = (line) => {
      if (matches.length >= MOST_MATCHES || !line.text.toLowerCase().includes(wanted)) return;
      if (shown(line.text).toLowerCase().includes(wanted)) matches.push(line.offset);
    };
    try {
      do {
        const { bytes } = await fetchBytes(offset, SEARCHED_BYTES);
        if (ending.aborted || signal.aborted) return;
        if (bytes.length === 0) break;
        const parts = split(joined(rest, bytes), restOffset);
        parts.lines.forEach(look);
        [rest, restOffset] = [parts.rest, parts.restOffset];
        offset += bytes.length;
        if (offset < size) say(found, `${matches.length} so far, ${Math.floor((100 * offset) / size)}%`);
      } while (offset < size);
      if (rest.length > 0) look({ offset: restOffset, text: text(rest) });
    } catch (error) {
      if (!signal.aborted) say(found, error.message);
      return;
    }
    if (matches.length === 0) say(found, "not found");
    else await goToMatch(matches.length - 1);
  }

  async function goToMatch(index) {
    if (matches.length === 0) return;
    current = (index + matches.length) % matches.length;
    followed.checked = false;
    await move(() => goTo(matches[current]));
    const most = matches.length === MOST_MATCHES ? " or more" : "";
    say(found, `${digits(current + 1)} of ${digits(matches.length)}${most}`);
  }

  function highlight(each) {
    const wanted = find.value.toLowerCase();
    const content = each.textContent;
    if (each.querySelector("mark") !== null) each.replaceChildren(content);
    if (wanted === "") return;
    const lower = content.toLowerCase();
    const parts = [];
    let from = 0;
    for (let at = lower.indexOf(wanted); at !== -1; at = lower.indexOf(wanted, from)) {
      parts.push(content.slice(from, at), make("mark", {}, content.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    if (parts.length > 0) each.replaceChildren(...parts, content.slice(from));
  }

  find.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(search, TYPING_MS);
  });
  find.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    goToMatch(event.shiftKey ? current - 1 : current + 1);
  });
  previous.addEventListener("click", () => goToMatch(current - 1));
  next.addEventListener("click", () => goToMatch(current + 1));

  // The whole of it, as a file

  whole.addEventListener("click", async () => {
    whole.disabled = true;
    try {
      const parts = [];
      let offset = 0;
      do {
        const { bytes } = await fetchBytes(offset, SEARCHED_BYTES);
        if (bytes.length === 0) break;
        parts.push(bytes);
        offset += bytes.length;
      } while (offset < size);
      const link = make("a", { download: "console.log" });
      link.href = URL.createObjectURL(new Blob(parts, { type: "text/plain" }));
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      announce("log downloaded");
    } catch (error) {
      if (!signal.aborted) say(where, error.message);
    } finally {
      whole.disabled = false;
    }
  });

  attempts.addEventListener("change", () => {
    clear(0);
    followed.checked = true;
    move(goToEnd);
    search();
  });

  let isDue = false;

  return {
    element,
    /** Offers the log of each attempt, if there was more than one. */
    setAttempts: (number) => {
      attempts.hidden = number < 2;
      while (attempts.options.length <= number) {
        const each = attempts.options.length;
        const words = each === 0 ? "all attempts" : `attempt ${each}`;
        attempts.append(make("option", { value: each === 0 ? "" : String(each) }, words));
      }
    },
    open: () => move(goToEnd),
    /** More was written: it is read from where the window ends, if that is what is shown. */
    grew: () => {
      if (isDue) return;
      isDue = true;
      inTurn(async () => {
        isDue = false;
        const wasAtEnd = end >= size;
        const { bytes } = await fetchBytes(end, CHUNK_BYTES);
        if (followed.checked && size - end > CHUNK_BYTES) await goToEnd();
        else if (followed.checked || wasAtEnd) {
          if (bytes.length > 0) append(bytes, end);
          if (followed.checked) toEnd();
        }
        tell();
      });
    },
  };
}
