// Elements without markup: whatever a text holds, it is shown and never read as HTML.

export function byId(id) {
  return document.getElementById(id);
}

/** An element with attributes and children; texts become text nodes, a function listens to the event of its name. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function button(label, click, attributes = {}) {
  return make("button", { type: "button", click, ...attributes }, label);
}

/** Tell those who hear the page. */
export function tell(text) {
  byId("told").textContent = text;
}

export async function copyText(text, control) {
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = copyBySelection(text) ? "Copied" : "Not possible";
  }
  const label = control.textContent;
  if (label === done) return;
  control.textContent = done;
  tell(done);
  setTimeout(() => (control.textContent = label), 1500);
}

/** A page that came by HTTP from another machine has no clipboard, but may copy what is selected. */
function copyBySelection(text) {
  const held = make("textarea", { class: "unseen", readonly: true });
  const focused = document.activeElement;
  held.value = text;
  document.body.append(held);
  held.select();
  const done = document.execCommand("copy");
  held.remove();
  focused?.focus();
  return done;
}
