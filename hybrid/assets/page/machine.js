// What the machine does just now, asked once a second while somebody can see it.

import { get } from "./api.js";
import { byId, make } from "./dom.js";
import { ExpertMap } from "./experts.js";
import { Pace } from "./pace.js";

const EVERY = 1000; // milliseconds
const MANY_PLACES = 64;

export class Machine {
  constructor() {
    this.pace = new Pace(byId("pace"));
    this.map = new ExpertMap(byId("experts"), byId("expert"));
    this.shown = false;
    this.timer = null;
    this.before = null;
    document.addEventListener("visibilitychange", () => this.look());
  }

  open() {
    this.opened = true;
    this.look();
  }

  show(shown) {
    this.shown = shown;
    this.look();
  }

  look() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.opened && this.shown && !document.hidden) this.ask();
  }

  async ask() {
    if (this.asking) return;
    this.asking = true;
    try {
      this.take(await get("/activity"), performance.now());
    } catch {
      this.before = null; // the page says elsewhere that the server is not there
    }
    this.asking = false;
    if (this.shown && !document.hidden) this.timer = setTimeout(() => this.look(), EVERY);
  }

  take(now, time) {
    this.showSpeed(now, time);
    this.showQueue(now.queue);
    if (now.engine) {
      this.showMemory(now.memory, now.engine);
      this.showExperts(now.engine);
    }
    this.showCache(now.expert_cache);
    this.before = { ...now, time };
  }

  showSpeed({ rows }, time) {
    if (!this.before) return;
    const seconds = (time - this.before.time) / 1000;
    const decoded = Math.max(0, rows.decode - this.before.rows.decode) / seconds;
    const read = Math.max(0, rows.prompt - this.before.rows.prompt) / seconds;
    byId("speed").textContent = decoded < 100 ? decoded.toFixed(decoded < 10 ? 1 : 0) : Math.round(decoded);
    byId("reading").textContent = read >= 1 ? `and ${count(read)} tokens/s of prompts` : "";
    this.pace.add(decoded);
  }

  showQueue({ running, waiting, sequences, limit }) {
    const places = byId("places");
    const shown = Math.min(sequences, MANY_PLACES);
    while (places.children.length > shown) places.lastChild.remove();
    while (places.children.length < shown) places.append(make("li"));
    const taken = Math.ceil((running * shown) / sequences);
    [...places.children].forEach((place, index) => place.classList.toggle("taken", index < taken));
    const waits = waiting ? `${waiting} of at most ${limit} wait` : "nobody waits";
    byId("queue").textContent = `${running} of ${sequences} places taken, ${waits}`;
  }

  showMemory({ weights, kv_token_bytes: each, kv_token_budget: budget }, engine) {
    const { running_tokens: running, kept_tokens: kept, pool_bytes: pool } = engine;
    const parts = { weights, running: running * each, kept: kept * each, pool };
    const total = weights + budget * each + pool;
    const bar = byId("memory");
    for (const [name, size] of Object.entries(parts)) bar.querySelector(`.${name}`).style.flexBasis = `${(100 * size) / total}%`;
    const free = Math.max(0, budget - running - kept);
    const texts = {
      weights: size(weights),
      "running-tokens": `${count(running)} tokens, ${size(parts.running)}`,
      "kept-tokens": `${count(kept)} tokens in ${engine.kept}, ${size(parts.kept)}`,
      "pool-tokens": `${count(engine.pool_tokens)} tokens, ${size(pool)}`,
      "free-tokens": `${count(free)} tokens, ${size(free * each)}`,
    };
    for (const [id, text] of Object.entries(texts)) byId(id).textContent = text;
    bar.setAttribute("aria-label", `Weights ${texts.weights}; keys and values: running ${texts["running-tokens"]}; kept ${texts["kept-tokens"]}; prefixes ${texts["pool-tokens"]}; room for ${texts["free-tokens"]}`);
  }

  showExperts({ layers, use, resident }) {
    byId("experts-part").hidden = layers.length === 0;
    if (layers.length) this.map.take(layers, use, resident);
  }

  showCache({ hits, misses }) {
    const calls = hits + misses;
    byId("cache").hidden = calls === 0;
    if (!calls) return;
    const before = this.before?.expert_cache ?? { hits: 0, misses: 0 };
    const recent = calls - before.hits - before.misses;
    const rate = recent > 0 ? (hits - before.hits) / recent : hits / calls;
    byId("cache").textContent = `${Math.round(100 * rate)} % found on the device${recent > 0 ? " just now" : ""}, ${Math.round((100 * hits) / calls)} % of all; framed experts lie there`;
  }
}

function count(number) {
  return Math.round(number).toLocaleString("en");
}

function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = bytes < 1 ? 0 : Math.min(4, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 10 && power ? 1 : 0)} ${units[power]}`;
}
