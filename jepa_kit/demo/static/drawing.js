/**
 * Pictures on canvases: images in patches, maps in colours, frames of sets.
 *
 * N  patches of an image    H, W  rows and columns of patches    h, w  sides of an image in pixels
 */

import { indices } from "./maskers.js";

/** Colours of targets, in turn; those of jepa_kit/evaluation/pictures/panels.py. */
export const COLOURS = ["#e6194b", "#1f77ff", "#ff9f0a", "#2ca02c", "#b44be1", "#00b8c4", "#8c564b", "#f032e6"];

/** Some colours of matplotlib's magma, from low to high. */
const MAGMA = [
  [0, 0, 4], [24, 15, 61], [68, 15, 118], [114, 31, 129], [158, 47, 127],
  [205, 64, 113], [241, 96, 93], [253, 150, 104], [254, 202, 141], [252, 253, 191],
];

/** Return the colour [r, g, b] of a value, 0 for low to 1 for high. */
export function magma(value) {
  const at = Math.min(Math.max(value, 0), 1) * (MAGMA.length - 1), k = Math.min(Math.floor(at), MAGMA.length - 2);
  return MAGMA[k].map((v, c) => Math.round(v + (at - k) * (MAGMA[k + 1][c] - v)));
}

/** Return the CSS of the colours of `magma` from left to right. */
export const MAGMA_GRADIENT = `linear-gradient(to right, ${MAGMA.map((c) => `rgb(${c})`).join(", ")})`;

/** Return "rgb(r, g, b)" of a colour "#rrggbb" as [r, g, b]. */
export function parseColour(text) {
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
}

/** Return an image as RGBA bytes [h, w, 4], of bytes [3, h, w]. */
export function toRgba(bytes) {
  const pixels = bytes.length / 3, out = new Uint8ClampedArray(4 * pixels);
  for (let i = 0; i < pixels; i++) {
    for (let c = 0; c < 3; c++) out[4 * i + c] = bytes[c * pixels + i];
    out[4 * i + 3] = 255;
  }
  return out;
}

/**
 * Return RGBA bytes [h, w, 4] in which a function changes the pixels of patches.
 *
 * @param rgba [h, w, 4]
 * @param grid, p of the patches
 * @param change (patch) -> null, or a function from (r, g, b, pixel of the patch) to [r, g, b]
 */
export function changePatches(rgba, [rows, columns], p, change) {
  const out = new Uint8ClampedArray(rgba), w = columns * p;
  for (let patch = 0; patch < rows * columns; patch++) {
    const colour = change(patch);
    if (!colour) continue;
    const top = Math.floor(patch / columns) * p, left = (patch % columns) * p;
    for (let y = 0; y < p; y++) {
      for (let x = 0; x < p; x++) {
        const at = 4 * ((top + y) * w + left + x);
        const [r, g, b] = colour(rgba[at], rgba[at + 1], rgba[at + 2], y * p + x);
        out[at] = r;
        out[at + 1] = g;
        out[at + 2] = b;
      }
    }
  }
  return out;
}

/** Return a function for `changePatches` that covers an image, grey below, with a colour. */
export function over(colour, share = 0.72) {
  return (r, g, b) => {
    const grey = 0.299 * r + 0.587 * g + 0.114 * b;
    return colour.map((v) => share * v + (1 - share) * grey);
  };
}

/**
 * Show RGBA bytes [h, w, 4] on a canvas, enlarged to its size on the screen, and draw over them.
 *
 * @param canvas its width in CSS pixels decides; its height follows
 * @param paint called with (context, s) to draw in pixels of the image, s of which are a CSS pixel
 */
export function show(canvas, rgba, [h, w], paint = () => {}) {
  const width = canvas.clientWidth || 2 * w;
  const ratio = Math.min(globalThis.devicePixelRatio || 1, 3);
  const scale = Math.max(1, (width * ratio) / w);
  if (canvas.width !== Math.round(w * scale) || canvas.height !== Math.round(h * scale)) {
    canvas.width = Math.round(w * scale);
    canvas.height = Math.round(h * scale);
  }
  const small = document.createElement("canvas");
  small.width = w;
  small.height = h;
  small.getContext("2d").putImageData(new ImageData(rgba, w, h), 0, 0);
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  paint(context, w / width);
}

/**
 * Trace the border of a set of patches as a path, `inset` pixels of the image inside it.
 *
 * Sides between two patches of the set are no border.
 */
function trace(context, set, [rows, columns], p, inset) {
  const inside = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && set[r * columns + c];
  context.beginPath();
  for (const i of indices(set)) {
    const r = Math.floor(i / columns), c = i % columns;
    for (const [dr, dc] of [[-1, 0], [1, 0], [0, -1], [0, 1]]) {
      if (inside(r + dr, c + dc)) continue;
      const ends = [-1, 1].map((along) => {
        const [ar, ac] = dr ? [0, along] : [along, 0];
        const beside = inside(r + ar, c + ac), corner = inside(r + ar + dr, c + ac + dc);
        const reach = !beside ? -inset : corner ? inset : 0; // convex, concave, straight
        return [(c + 0.5 + 0.5 * (dc + ac)) * p - dc * inset + ac * reach, (r + 0.5 + 0.5 * (dr + ar)) * p - dr * inset + ar * reach];
      });
      context.moveTo(...ends[0]);
      context.lineTo(...ends[1]);
    }
  }
}

/** Draw the border of a set of patches: a line of `width` pixels of the image, with a thin dark edge. */
export function frame(context, set, grid, p, { colour, width, inset = 0, dash = [] }) {
  trace(context, set, grid, p, inset + width / 2);
  context.lineCap = dash.length ? "butt" : "square";
  context.setLineDash(dash);
  if (!dash.length) {
    context.strokeStyle = "rgba(0, 0, 0, 0.45)";
    context.lineWidth = width * 1.6;
    context.stroke();
  }
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke();
  context.setLineDash([]);
}
