// What drawings share: a canvas of as many pixels as the screen has there, and the colours of the style sheet.

/** Its context in units of CSS pixels, cleared; height: of the canvas, null: as the style sheet says. */
export function fresh(canvas, height = null) {
  if (height !== null) canvas.style.height = `${height}px`;
  const scale = window.devicePixelRatio || 1;
  const box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * scale);
  canvas.height = Math.round(box.height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width: box.width, height: box.height };
}

/** The value of a custom property, as [red, green, blue]. */
export function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => Number.parseInt(text.slice(at, at + 2), 16));
}

export function css([red, green, blue], alpha = 1) {
  return `rgb(${red} ${green} ${blue} / ${alpha})`;
}

/** Between two colours; part: 0 to 1. */
export function mixed(from, to, part) {
  return from.map((value, index) => Math.round(value + (to[index] - value) * part));
}

/** Call when the colours or the size of what is drawn change. */
export function onChange(element, draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width !== width) {
      width = entry.contentRect.width;
      draw();
    }
  }).observe(element);
}
