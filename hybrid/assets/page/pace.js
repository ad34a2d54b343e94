// Tokens per second in the last minute, a line.

import { colour, css, fresh, onChange } from "./canvas.js";

const POINTS = 60;

export class Pace {
  constructor(canvas) {
    this.canvas = canvas;
    this.values = new Array(POINTS).fill(0);
    onChange(canvas, () => this.draw());
  }

  add(value) {
    this.values.push(value);
    this.values.shift();
    this.draw();
  }

  draw() {
    const { context, width, height } = fresh(this.canvas);
    if (!width) return;
    const top = Math.max(1, ...this.values);
    const at = (value, index) => [(index * width) / (POINTS - 1), height - 1.5 - (value / top) * (height - 4)];
    const line = colour("--accent");
    context.beginPath();
    this.values.forEach((value, index) => context.lineTo(...at(value, index)));
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.strokeStyle = css(line);
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(0, height);
    context.fillStyle = css(line, 0.1);
    context.fill();
    this.canvas.setAttribute("aria-label", `Tokens per second in the last minute: now ${Math.round(this.values.at(-1))}, at most ${Math.round(Math.max(...this.values))}`);
  }
}
