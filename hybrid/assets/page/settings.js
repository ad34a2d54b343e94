// What the user has set: kept by this browser, but for the key.

import { getKey, setKey } from "./api.js";
import { byId } from "./dom.js";

const STORED = "hybrid.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

function read() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

/** The messages and parameters of a request that goes on with these. */
export function requestOf(messages) {
  const { system, ...rest } = read();
  const first = system?.trim() ? [{ role: "system", content: system }] : [];
  const numbers = NUMBERS.filter((name) => typeof rest[name] === "number").map((name) => [name, rest[name]]);
  return { messages: [...first, ...messages], ...Object.fromEntries(numbers) };
}

/** Have the dialog open by its button; `changed` is called when it was closed. */
export function bindSettings(changed) {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  const fields = form.elements;
  byId("open-settings").addEventListener("click", () => {
    const known = read();
    for (const name of ["system", ...NUMBERS]) fields[name].value = known[name] ?? "";
    fields.key.value = getKey();
    dialog.showModal();
  });
  byId("defaults").addEventListener("click", () => {
    for (const name of ["system", ...NUMBERS]) fields[name].value = "";
  });
  form.addEventListener("submit", () => {
    const numbers = NUMBERS.filter((name) => fields[name].value !== "").map((name) => [name, fields[name].valueAsNumber]);
    const system = fields.system.value;
    localStorage.setItem(STORED, JSON.stringify({ ...(system && { system }), ...Object.fromEntries(numbers) }));
    setKey(fields.key.value.trim());
    changed();
  });
}

/** Ask for a key until `works` says that one is taken. */
export function askForKey(works) {
  const dialog = byId("ask-key");
  if (dialog.open) return;
  const form = dialog.querySelector("form");
  form.onsubmit = async (event) => {
    event.preventDefault();
    setKey(form.elements.key.value.trim());
    if (await works()) {
      byId("key-problem").textContent = "";
      form.reset();
      dialog.close();
    } else {
      setKey("");
      byId("key-problem").textContent = "The server does not take this key.";
      form.elements.key.select();
    }
  };
  dialog.showModal();
}
