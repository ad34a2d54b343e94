// Wires the page together: state of the server, composer, keys, panels.

import { ApiError, get, getState } from "./api.js";
import { Conversation } from "./conversation.js";
import { button, byId } from "./dom.js";
import { Machine } from "./machine.js";
import { askForKey, bindSettings } from "./settings.js";

const IDEAS = ["Tell me a story about a fox.", "What lives in the forest?", "Who are you?"];
const WIDE = matchMedia("(min-width: 60rem)");

const scroll = byId("scroll");
const field = byId("message");
const conversation = new Conversation(askKey, showRunning);
const machine = new Machine();

function showState(state, text) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

/** Whether the server does not refuse the key at hand. */
async function connect() {
  try {
    const info = await get("/info");
    byId("model").textContent = info.models[0];
    byId("model").title = info.description;
    document.title = `${info.models[0]} · hybrid`;
    showState("ready", "ready");
    machine.open(info);
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) showState("gone", "not reachable");
    else if (error.status === 401) askKey();
    else await showNotReady();
    return !(error instanceof ApiError && error.status === 401);
  }
}

async function showNotReady() {
  const { status, progress } = await getState();
  const done = progress?.total ? ` ${Math.floor((100 * progress.done) / progress.total)} %` : "";
  showState("wait", `${status}${done}`);
}

function askKey() {
  showState("wait", "asks for a key");
  askForKey(connect);
}

/** Look again and again: the server may end, begin, or have loaded its model. */
async function watch() {
  for (;;) {
    await new Promise((resume) => setTimeout(resume, 2000));
    if (document.hidden || byId("ask-key").open) continue;
    try {
      const { status } = await getState();
      if (status !== "ok") await showNotReady();
      else if (byId("state").dataset.state !== "ready") await connect();
    } catch {
      showState("gone", "not reachable");
    }
  }
}

function showRunning(running) {
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  document.body.classList.toggle("running", running);
  if (running) toEnd();
  else if (!byId("ask-key").open) field.focus({ preventScroll: true });
}

function send(event) {
  event?.preventDefault();
  const text = field.value.trim();
  if (!text || conversation.running) return;
  field.value = "";
  fit();
  conversation.ask(text);
}

/** The field is as high as its text, up to a limit that the style sheet sets. */
function fit() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

let following = true; // whether the end stays in sight while it grows
let height = 0; // how far it was scrolled

function toEnd() {
  following = true;
  scroll.scrollTop = scroll.scrollHeight;
}

function bindScrolling() {
  scroll.addEventListener("scroll", () => {
    const left = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
    following = left < 60 || (following && scroll.scrollTop >= height);
    height = scroll.scrollTop;
    byId("to-end").hidden = following;
  });
  new ResizeObserver(() => following && toEnd()).observe(byId("messages"));
  byId("to-end").addEventListener("click", toEnd);
}

function bindComposer() {
  byId("composer").addEventListener("submit", send);
  field.addEventListener("input", fit);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  byId("stop").addEventListener("click", () => conversation.stop());
  byId("clear").addEventListener("click", () => {
    conversation.clear();
    field.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) conversation.stop();
  });
  byId("ideas").append(
    ...IDEAS.map((idea) => {
      const item = document.createElement("li");
      item.append(button(idea, () => conversation.ask(idea)));
      return item;
    }),
  );
}

function bindMachine() {
  const toggle = byId("toggle-machine");
  const show = (shown) => {
    toggle.setAttribute("aria-expanded", String(shown));
    byId("machine").hidden = !shown;
    byId("talk").inert = shown && !WIDE.matches;
    machine.show(shown);
  };
  toggle.addEventListener("click", () => show(byId("machine").hidden));
  WIDE.addEventListener("change", () => show(WIDE.matches));
  show(WIDE.matches);
}

bindComposer();
bindScrolling();
bindMachine();
bindSettings(connect);
showRunning(false);
toEnd();
connect();
watch();
