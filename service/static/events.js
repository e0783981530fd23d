// Follows a stream of server-sent events by fetch, since EventSource cannot send an API key.

import { request } from "./requests.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;
const SILENCE_MS = 60_000; // the service says something more often, if only that it is alive
const LATER = [408, 425, 429];

/**
 * Calls `hear` with each event, {type, data, id}, until the signal aborts.
 *
 * A connection that is lost is taken up again after the last event that was heard, with pauses that
 * double. While nobody looks at the page it is given up, as a browser has only six for all its tabs.
 *
 * @param path of the stream.
 * @param options.signal ends it all.
 * @param options.hear is called with each event.
 * @param options.changed is called with true when a connection stands, and with false when one is
 *   lost; then with true once more.
 * @param options.since the id of the event after which to begin; none: as the service does.
 *
 * Throws a RefusedError if the service refuses for good.
 */
export async function follow(path, options) {
  const { signal, hear, changed = () => {}, since = "" } = options;
  let lastId = since;
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    await untilSeen(signal);
    if (signal.aborted) return;
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    const stopIfHidden = () => document.visibilityState === "hidden" && stop();
    signal.addEventListener("abort", stop);
    document.addEventListener("visibilitychange", stopIfHidden);
    try {
      const headers = { Accept: "text/event-stream" };
      if (lastId !== "") headers["Last-Event-ID"] = lastId;
      const response = await request(path, { headers, signal: attempt.signal });
      changed(true);
      for await (const event of events(response.body)) {
        pause = FIRST_PAUSE_MS;
        if (event.id !== null) lastId = event.id;
        if (event.data !== "") hear({ ...event, data: JSON.parse(event.data) });
      }
    } catch (error) {
      if (signal.aborted) return;
      const isRefused = error.status >= 400 && error.status < 500 && !LATER.includes(error.status);
      const isUnknown = error.status === 400 && lastId !== ""; // of a store that is gone, perhaps
      if (isRefused && !isUnknown) throw error;
      if (isUnknown) lastId = "";
    } finally {
      attempt.abort();
      signal.removeEventListener("abort", stop);
      document.removeEventListener("visibilitychange", stopIfHidden);
    }
    if (document.visibilityState === "hidden") continue;
    changed(false);
    await sleep(pause * (0.75 + Math.random() / 2), signal);
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { type: "message", data: "", id: null };
  try {
    while (true) {
      const { value, done } = await within(reader.read(), SILENCE_MS);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line === "") {
          yield { ...event, data: event.data.slice(0, -1) };
          event = { type: "message", data: "", id: null };
          continue;
        }
        const [field, text = ""] = line.split(/:(.*)/s);
        const content = text.replace(/^ /, "");
        if (field === "event") event.type = content;
        else if (field === "data") event.data += `${content}\n`;
        else if (field === "id") event.id = content;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function within(promise, limitMs) {
  let timer;
  const limit = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("the service fell silent")), limitMs);
  });
  return Promise.race([promise, limit]).finally(() => clearTimeout(timer));
}

/** Waits, but no longer than until the signal aborts. */
export function sleep(ms, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal.addEventListener("abort", end);
  });
}

function untilSeen(signal) {
  if (document.visibilityState !== "hidden") return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (document.visibilityState === "hidden" && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
  });
}
