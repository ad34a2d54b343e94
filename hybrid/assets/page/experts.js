// Which experts work: a row for each layer, a cell for each expert, coloured by its share of the recent rows.

import { colour, css, fresh, mixed, onChange } from "./canvas.js";

const MEMORY = 400; // rows of a layer after which a row counts half
const MOST = 3; // times an even share: the strongest colour

export class ExpertMap {
  constructor(canvas, note) {
    this.canvas = canvas;
    this.note = note;
    this.cell = null; // [row, column] that is looked at
    this.shares = [];
    onChange(canvas, () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.look(null));
    canvas.addEventListener("blur", () => this.look(null));
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.look(this.cell ?? [0, 0]));
    canvas.addEventListener("keydown", (event) => this.move(event));
  }

  /** layers: their numbers. use: [layers][experts] counts since the server began. resident: keys, or null. */
  take(layers, use, resident) {
    const experts = use[0].length;
    this.layers = layers;
    this.experts = experts;
    this.resident = resident && new Set(resident);
    const grew = this.before?.length === use.length && this.before.every((row, at) => sum(row) <= sum(use[at]));
    this.recent = use.map((row, at) => {
      if (!grew) return row.map(Number);
      const fresh = row.map((count, expert) => Math.max(0, count - this.before[at][expert]));
      const faded = 0.5 ** (sum(fresh) / MEMORY);
      return fresh.map((count, expert) => count + this.recent[at][expert] * faded);
    });
    this.before = use;
    this.shares = this.recent.map((row) => {
      const total = sum(row);
      return row.map((count) => (total ? (count * experts) / total : 0));
    });
    this.draw();
    this.showNote();
  }

  get rows() {
    return this.shares.length;
  }

  draw() {
    if (!this.rows) return;
    const side = this.canvas.parentElement.clientWidth / this.experts;
    const step = Math.max(4, Math.min(side, 16));
    const { context, width } = fresh(this.canvas, Math.round(step * this.rows));
    if (!width) return;
    const [low, high, mark, ink] = ["--cold", "--accent", "--mark", "--ink"].map(colour);
    const column = width / this.experts;
    const gap = column > 5 ? 1 : 0;
    this.shares.forEach((row, layer) =>
      row.forEach((share, expert) => {
        const strength = Math.min(1, share / MOST);
        const box = [expert * column, layer * step, column - gap, step - (gap || step > 5 ? 1 : 0)];
        context.fillStyle = css(mixed(low, high, strength));
        context.fillRect(...box);
        if (this.resident?.has(layer * this.experts + expert)) {
          context.strokeStyle = css(mark);
          context.strokeRect(box[0] + 0.5, box[1] + 0.5, box[2] - 1, box[3] - 1);
        }
      }),
    );
    if (this.cell) {
      context.strokeStyle = css(ink);
      context.lineWidth = 2;
      context.strokeRect(this.cell[1] * column, this.cell[0] * step, column, step);
    }
  }

  point(event) {
    if (!this.rows) return;
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.experts);
    this.look([within(row, this.rows), within(column, this.experts)]);
  }

  move(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !this.rows) return;
    event.preventDefault();
    const [row, column] = this.cell ?? [0, 0];
    this.look([within(row + step[0], this.rows), within(column + step[1], this.experts)]);
  }

  look(cell) {
    this.cell = cell;
    this.draw();
    this.showNote();
  }

  showNote() {
    if (!this.rows) return;
    const busiest = this.busiest();
    const [row, column] = this.cell ?? busiest;
    const place = this.resident?.has(row * this.experts + column) ? ", on the device" : "";
    const share = this.shares[row][column];
    const said = share ? `${share.toFixed(1)} times an even share${place}` : `not used lately${place}`;
    const what = `layer ${this.layers[row]}, expert ${column}`;
    const text = this.cell ? `${what}: ${said}` : share ? `busiest: ${what}, ${said}` : "no expert has worked yet";
    if (this.note.textContent !== text) this.note.textContent = text;
    this.canvas.setAttribute("aria-label", `Use of experts in ${this.rows} layers of ${this.experts}; arrow keys go through them`);
  }

  busiest() {
    let best = [0, 0];
    this.shares.forEach((row, layer) =>
      row.forEach((share, expert) => {
        if (share > this.shares[best[0]][best[1]]) best = [layer, expert];
      }),
    );
    return best;
  }
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function within(value, limit) {
  return Math.max(0, Math.min(limit - 1, value));
}
