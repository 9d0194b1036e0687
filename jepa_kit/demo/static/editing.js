/**
 * Masks changed by hand: sets of patches that are moved and resized, and the words for them.
 *
 * A set is a Uint8Array [N] on a grid [H, W]; a box is {top, left, height, width} in patches.
 */

import { contextOf, indices, rectangle, targetsOf } from "./maskers.js";

/** Return the bounding box of a set. */
export function boxOf(set, [, columns]) {
  const patches = indices(set);
  const rows = patches.map((i) => Math.floor(i / columns)), cols = patches.map((i) => i % columns);
  const top = Math.min(...rows), left = Math.min(...cols);
  return { top, left, height: Math.max(...rows) - top + 1, width: Math.max(...cols) - left + 1 };
}

/** Return whether a set is a rectangle. */
export function isRectangle(set, grid) {
  const { height, width } = boxOf(set, grid);
  return height * width === indices(set).length;
}

/** Return a set moved by rows and columns, as far as its box stays inside the grid. */
export function moveSet(set, [rows, columns], down, right) {
  const box = boxOf(set, [rows, columns]);
  const dy = Math.min(Math.max(down, -box.top), rows - box.top - box.height);
  const dx = Math.min(Math.max(right, -box.left), columns - box.left - box.width);
  const moved = new Uint8Array(set.length);
  for (const i of indices(set)) moved[i + dy * columns + dx] = 1;
  return moved;
}

/** Return a rectangle whose lower right corner is moved, at least one patch large and inside the grid. */
export function resizeSet(set, [rows, columns], down, right) {
  const { top, left, height, width } = boxOf(set, [rows, columns]);
  const h = Math.min(Math.max(height + down, 1), rows - top), w = Math.min(Math.max(width + right, 1), columns - left);
  return rectangle([rows, columns], top, left, h, w);
}

/** Return whether the context of a mask is a block that can be moved, not simply the rest. */
export function hasContextBlock(mask) {
  return mask.base.some((v) => !v);
}

/**
 * Return a mask with one set changed, or null if no context would be left.
 *
 * @param which number of a target, or "context"
 * @param change from a set to a set
 */
export function changeMask(mask, which, change) {
  const changed = which === "context"
    ? { ...mask, base: change(mask.base) }
    : { ...mask, targets: mask.targets.map((t, k) => (k === which ? change(t) : t)) };
  return contextOf(changed).some((v) => v) ? changed : null;
}

const found = new WeakMap(); // mask -> of each patch, the targets that have it

/** Return the numbers of the targets in which a patch is predicted. */
export function targetsAt(mask, patch) {
  if (!found.has(mask)) {
    const targets = targetsOf(mask), numbers = Array.from(targets.keys());
    found.set(mask, Array.from(mask.base, (_, i) => numbers.filter((k) => targets[k][i])));
  }
  return found.get(mask)[patch];
}

/** Return the place of a set: "rows 2 to 4, columns 1 to 3", counted from 1. */
export function placeOf(set, grid) {
  const { top, left, height, width } = boxOf(set, grid);
  const span = (name, first, count) => (count === 1 ? `${name} ${first + 1}` : `${name}s ${first + 1} to ${first + count}`);
  return `${span("row", top, height)}, ${span("column", left, width)}`;
}
