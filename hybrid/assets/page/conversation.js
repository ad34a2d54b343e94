// The conversation: what was said, and how it goes on. Kept in sessionStorage, so that it lasts as long as the tab.

import { ApiError, streamChat } from "./api.js";
import { Bubble } from "./bubble.js";
import { byId, tell } from "./dom.js";
import { requestOf } from "./settings.js";

const STORED = "hybrid.conversation";

export class Conversation {
  /** refused: called with the error of a request that asks for a key. changed: when an answer begins and ends. */
  constructor(refused, changed) {
    this.messages = read(); // {role, content, reasoning?, stats?, error?}
    this.bubbles = [];
    this.running = null; // an AbortController
    this.refused = refused;
    this.changed = changed;
    for (const message of this.messages) this.show(message);
    this.showEmpty();
  }

  show(message) {
    const bubble = new Bubble(message, { again: () => this.again(bubble), edit: (text) => this.edit(bubble, text) });
    this.bubbles.push(bubble);
    byId("messages").append(bubble.element);
    return bubble;
  }

  showEmpty() {
    byId("empty").hidden = this.messages.length > 0;
    byId("clear").disabled = this.messages.length === 0;
  }

  ask(text) {
    if (this.running) return;
    this.add({ role: "user", content: text });
    return this.answer();
  }

  add(message) {
    this.messages.push(message);
    this.showEmpty();
    return this.show(message);
  }

  /** Have the last answer given once more, or that of a question whose answer this is. */
  again(bubble) {
    if (this.running) return;
    this.cut(this.bubbles.indexOf(bubble));
    return this.answer();
  }

  edit(bubble, text) {
    if (this.running) return;
    this.cut(this.bubbles.indexOf(bubble));
    return this.ask(text);
  }

  /** Forget what follows. */
  cut(from) {
    this.messages.length = from;
    for (const bubble of this.bubbles.splice(from)) bubble.element.remove();
    this.keep();
    this.showEmpty();
  }

  clear() {
    this.stop();
    this.cut(0);
  }

  stop() {
    this.running?.abort();
  }

  async answer() {
    const asked = turnsOf(this.messages);
    const message = { role: "assistant", content: "", reasoning: "" };
    const bubble = this.add(message);
    const running = (this.running = new AbortController());
    this.changed(true);
    tell("The answer begins.");
    bubble.begin();
    try {
      for await (const chunk of streamChat(requestOf(asked), running.signal)) bubble.take(chunk);
      tell("The answer is complete.");
    } catch (error) {
      this.fail(message, error, running.signal.aborted);
    }
    bubble.end();
    this.running = null;
    this.keep();
    this.changed(false);
  }

  fail(message, error, stopped) {
    if (stopped) {
      message.stopped = true;
      return tell("Stopped.");
    }
    message.error = error instanceof ApiError ? error.message : "the server cannot be reached";
    tell(`Error: ${message.error}`);
    if (error.status === 401) this.refused();
  }

  keep() {
    try {
      sessionStorage.setItem(STORED, JSON.stringify(this.messages));
    } catch {
      sessionStorage.removeItem(STORED); // too long to be kept
    }
  }
}

/** What is sent. Of an answer that was stopped what there is of it is sent too; if that is nothing, the questions before
 * and after it are one, because many templates refuse two messages of one role in a row. */
function turnsOf(messages) {
  const turns = [];
  for (const { role, content } of messages) {
    if (!content.trim()) continue;
    if (turns.at(-1)?.role === role) turns.at(-1).content += `\n\n${content}`;
    else turns.push({ role, content });
  }
  return turns;
}

function read() {
  try {
    return JSON.parse(sessionStorage.getItem(STORED)) ?? [];
  } catch {
    return [];
  }
}
