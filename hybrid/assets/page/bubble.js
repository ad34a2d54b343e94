// One message as the page shows it.

import { button, copyText, make } from "./dom.js";
import { Markdown } from "./markdown.js";

export class Bubble {
  /** message: as `Conversation` keeps it. calls.again, calls.edit(text): what its buttons do. */
  constructor(message, calls) {
    this.message = message;
    this.calls = calls;
    this.body = make("div", { class: "text" });
    this.foot = make("footer");
    this.drawn = 0; // the frame that was asked for
    const who = make("h2", { class: "unseen" }, message.role === "user" ? "You" : "The model");
    this.element = make("li", { class: message.role }, who, this.body, this.foot);
    if (message.role === "user") this.showQuestion();
    else this.showAnswer();
  }

  showQuestion() {
    this.body.replaceChildren(this.message.content);
    this.foot.replaceChildren(button("Edit", () => this.editText(), { "aria-label": "Edit this message" }));
  }

  editText() {
    const area = make("textarea", { "aria-label": "Edit this message", rows: "3" });
    area.value = this.message.content;
    const leave = () => {
      this.showQuestion();
      this.foot.querySelector("button").focus();
    };
    const save = () => area.value.trim() && this.calls.edit(area.value.trim());
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        save();
      }
    });
    this.body.replaceChildren(area);
    this.foot.replaceChildren(button("Ask again", save), button("Cancel", leave));
    area.focus();
  }

  showAnswer() {
    const { reasoning, content } = this.message;
    this.thought = make("div", { class: "thought" });
    this.folded = make("details", { hidden: !reasoning }, make("summary", {}, "Reasoning"), this.thought);
    this.said = make("div", { class: "said" });
    this.calledTools = make("div", { class: "calls" });
    this.body.replaceChildren(this.folded, this.said, this.calledTools);
    this.markdown = new Markdown(this.said);
    this.thinking = new Markdown(this.thought);
    this.markdown.show(content);
    this.thinking.show(reasoning ?? "");
    this.showFoot();
  }

  begin() {
    this.element.setAttribute("aria-busy", "true");
    this.started = performance.now();
    this.first = null;
    this.tokens = 0;
    this.foot.replaceChildren(make("span", { class: "stats" }, "reading"));
  }

  /** A chunk of the stream. */
  take(chunk) {
    const message = this.message;
    for (const choice of chunk.choices ?? []) {
      const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
      message.content += content ?? "";
      message.reasoning += reasoning ?? "";
      for (const call of calls ?? []) this.showCall(call.function ?? {});
      if (content || reasoning) {
        this.first ??= performance.now();
        this.tokens++;
      }
      if (choice.finish_reason) message.reason = choice.finish_reason;
    }
    if (chunk.usage) message.stats = statsOf(chunk);
    this.drawn ||= requestAnimationFrame(() => this.draw());
  }

  showCall({ name = "", arguments: given = "" }) {
    this.calledTools.append(make("p", {}, make("code", {}, `${name}(${given})`)));
  }

  draw() {
    cancelAnimationFrame(this.drawn);
    this.drawn = 0;
    const { reasoning, content } = this.message;
    this.folded.hidden = !reasoning;
    if (reasoning) this.folded.firstChild.textContent = content || !this.element.ariaBusy ? "Reasoning" : "Reasoning …";
    this.thinking.show(reasoning);
    this.markdown.show(content);
    const seconds = (performance.now() - this.first) / 1000;
    const speed = this.tokens > 5 && seconds > 0.2 ? `${(this.tokens / seconds).toFixed(1)} tokens/s` : "";
    if (this.element.ariaBusy === "true") this.foot.firstChild.textContent = speed || "writing";
  }

  end() {
    this.element.removeAttribute("aria-busy");
    this.message.stats ??= this.first && { seconds: (performance.now() - this.first) / 1000, tokens: this.tokens };
    this.draw();
    this.showFoot();
  }

  showFoot() {
    const { content, error, stats, reason, stopped } = this.message;
    const copy = button("Copy", (event) => copyText(content, event.currentTarget), { "aria-label": "Copy this answer" });
    this.foot.replaceChildren(
      ...(content ? [copy] : []),
      button("Again", this.calls.again, { "aria-label": "Answer again" }),
      make("span", { class: "stats" }, [...told(stats), ...ending(reason, stopped)].join(" · ")),
    );
    if (error) this.foot.prepend(make("p", { class: "error", role: "alert" }, error));
  }
}

function statsOf({ usage, timings }) {
  return {
    rate: timings?.predicted_per_second,
    tokens: usage.completion_tokens,
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    first: timings ? (timings.queue_ms + timings.prompt_ms) / 1000 : null,
  };
}

function told(stats) {
  if (!stats) return [];
  const rate = stats.rate ?? (stats.seconds ? stats.tokens / stats.seconds : null);
  const parts = [`${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`];
  if (rate) parts.unshift(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  if (stats.first) parts.push(`first after ${stats.first < 1 ? `${Math.round(stats.first * 1000)} ms` : `${stats.first.toFixed(1)} s`}`);
  if (stats.prompt) parts.push(`${stats.cached} of ${stats.prompt} prompt tokens cached`);
  return parts;
}

function ending(reason, stopped) {
  if (stopped) return ["stopped"];
  return reason === "length" ? ["ended by its length"] : [];
}
