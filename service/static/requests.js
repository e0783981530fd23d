// Requests to the service, with the API key that a page asks for where the service wants one.

import { say } from "./elements.js";

const KEY = "syncbn-api-key";

const byId = (id) => document.getElementById(id);

/** An answer that is an error; its message is the service's own. */
export class RefusedError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * The answer to a request.
 *
 * Throws a RefusedError if the service refuses, and an Error if it cannot be reached. A refusal for
 * want of a key also shows the form that asks for one.
 */
export async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers };
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service is not reachable, or closed the connection");
  }
  if (response.ok) {
    if (key !== null) byId("key-form").hidden = true;
    return response;
  }
  const body = await response.json().catch(() => null);
  const message = body?.error ?? `${response.status} ${response.statusText}`;
  if (response.status === 401) askForKey(key, message);
  throw new RefusedError(response.status, message);
}

export const fetchJson = async (path, options) => (await request(path, options)).json();

export const isKeyWanted = () => !byId("key-form").hidden;

function askForKey(refusedKey, message) {
  // Another may have been given while this one was under way.
  if (refusedKey !== null && refusedKey === sessionStorage.getItem(KEY)) {
    sessionStorage.removeItem(KEY);
  }
  say(byId("key-hint"), `The service says: ${message}. The key is kept until this tab is closed.`);
  byId("key-form").hidden = false;
}

/** Calls `begin` whenever a key was given, and lets the header's links to data send it. */
export function useKeys(begin, showProblem) {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key").value.trim());
    byId("key").value = "";
    begin();
  });
  // A link sends no key.
  byId("metrics").addEventListener("click", async (event) => {
    if (sessionStorage.getItem(KEY) === null && !isKeyWanted()) return;
    event.preventDefault();
    try {
      const text = await (await request(event.currentTarget.href)).text();
      location.assign(URL.createObjectURL(new Blob([text], { type: "text/plain" })));
    } catch (error) {
      showProblem(error);
    }
  });
}
