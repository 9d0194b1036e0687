/**
 * Maskers by the rules of jepa_kit/maskers, with random numbers of their own.
 *
 * H, W  rows and columns of the grid    N  patches, H * W    a set is a Uint8Array [N] of zeros and ones
 *
 * A mask is {base, targets, keep, keys, overlap}: the context is `base` without the targets (unless `overlap`), truncated to
 * `keep` patches: those with the smallest `keys` [N], or the first in raster order. So if a target is moved, the context
 * follows. With `targetKeep`, only so many patches of a target are predicted: those with the smallest `targetKeys` [M][N].
 */

/** Return a function that draws numbers in [0, 1), a pure function of the given integers (Mulberry32). */
export function generator(...seeds) {
  let state = 0x9e3779b9;
  for (const seed of seeds) state = Math.imul(state ^ (seed + 0x7f4a7c15), 0x85ebca6b) ^ (state >>> 13);
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  for (let i = 0; i < 3; i++) next(); // seeds that are close together begin alike
  return next;
}

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const between = ([low, high], u) => low + u * (high - low);
const count = (set) => set.reduce((sum, v) => sum + v, 0);

/** Round to the nearest integer, halves to even, as numpy does. */
function rint(v) {
  const low = Math.floor(v);
  if (v - low === 0.5) return low % 2 ? low + 1 : low;
  return Math.round(v);
}

/** Return (height, width) of a block, from two numbers in [0, 1); `edges` as in jepa_kit/maskers/blocks.py. */
export function blockSize([rows, columns], scale, ratio, edges, u, v) {
  const drawn = rows * columns * between(scale, u);
  const area = Math.max(edges === "released" ? Math.floor(drawn) : drawn, 1);
  const aspect = between(ratio, v);
  let height = Math.sqrt(area * aspect), width = Math.sqrt(area / aspect);
  if (edges === "inclusive") { // if one side does not fit, the other one grows to keep the area
    height = Math.max(height, area / columns);
    width = Math.max(width, area / rows);
  }
  const margin = edges === "released" ? 1 : 0;
  return [clamp(rint(height), 1, rows - margin), clamp(rint(width), 1, columns - margin)];
}

/** Return the first row (or column) of a block; released ones never reach the last row and column. */
function corner(u, size, side, edges) {
  return Math.floor(u * (side - size + (edges === "inclusive" ? 1 : 0)));
}

/** Return the set of a rectangle, clipped to the grid. */
export function rectangle([rows, columns], top, left, height, width) {
  const set = new Uint8Array(rows * columns);
  for (let r = Math.max(top, 0); r < Math.min(top + height, rows); r++) {
    for (let c = Math.max(left, 0); c < Math.min(left + width, columns); c++) set[r * columns + c] = 1;
  }
  return set;
}

/** Return the context of a mask. */
export function contextOf({ base, targets, keep, keys, overlap }) {
  const whole = base.map((v, i) => (v && (overlap || !targets.some((t) => t[i])) ? 1 : 0));
  return keep === undefined ? whole : keepFew(whole, keep, keys);
}

/** Return the sets that are predicted: the targets, truncated. */
export function targetsOf({ targets, targetKeep, targetKeys }) {
  return targetKeep ? targets.map((t, k) => keepFew(t, targetKeep, targetKeys[k])) : targets;
}

/** Return `count` patches of a set: those with the smallest keys, or the first ones. */
function keepFew(set, count, keys) {
  const inside = indices(set);
  if (keys) inside.sort((a, b) => keys[a] - keys[b]);
  const kept = new Uint8Array(set.length);
  for (const i of inside.slice(0, count)) kept[i] = 1;
  return kept;
}

/** Return the numbers of the patches of a set, ascending. */
export function indices(set) {
  return Array.from(set.keys()).filter((i) => set[i]);
}

/** Return the `count` patches with the smallest keys. */
const keepRandom = (keys, count) => keepFew(new Uint8Array(keys.length).fill(1), count, keys);

/** Return the mask of one target set whose context is everything else. */
function hide(target) {
  return { base: new Uint8Array(target.length).fill(1), targets: [target], overlap: false };
}

const not = (set) => set.map((v) => 1 - v);
const ATTEMPTS = 16;

/** Multi-block: targets, and one large block without them as context (I-JEPA, section 3). */
function multiblock(grid, o, seed, images) {
  const [rows, columns] = grid;
  const ranges = [[o.context_scale, o.context_aspect_ratio]];
  for (let m = 0; m < o.num_targets; m++) ranges.push([o.target_scale, o.target_aspect_ratio]);
  const needed = Math.max(o.min_keep, o.truncation === "fixed" ? o.context_length : 0);
  const ofBatch = generator(seed, -1, 0);
  const shared = [0, 1, 2, 3].map(() => ofBatch());
  const masks = images.map((image) => {
    const draw = generator(seed, image, 1);
    const own = [0, 1, 2, 3].map(() => draw());
    const sizes = ranges.map(([scale, ratio], k) => {
      const kind = k ? 2 : 0;
      let [u, v] = o.size_per === "block" ? [draw(), draw()] : (o.size_per === "batch" ? shared : own).slice(kind, kind + 2);
      if (o.coupled_scale_and_aspect) v = u;
      return blockSize(grid, scale, ratio, o.edges, u, v);
    });
    for (let attempt = 0; attempt <= ATTEMPTS; attempt++) {
      const flips = [draw() < 0.5, draw() < 0.5];
      const margin = o.edges === "released" ? 1 : 0;
      const sets = sizes.map(([height, width], k) => {
        let top = corner(draw(), height, rows, o.edges), left = corner(draw(), width, columns, o.edges);
        if (attempt === ATTEMPTS) { // contexts at one end of each side, targets at the other
          top = flips[0] === (k === 0) ? 0 : rows - margin - height;
          left = flips[1] === (k === 0) ? 0 : columns - margin - width;
        }
        return rectangle(grid, top, left, height, width);
      });
      const mask = { base: sets[0], targets: sets.slice(1), overlap: o.allow_overlap };
      if (count(contextOf(mask)) >= needed) return mask;
    }
    throw new RangeError(`These targets can leave fewer than ${needed} patches of context: make them fewer or smaller.`);
  });
  if (o.truncation === "none") return masks;
  const shortest = Math.min(...masks.map((mask) => count(contextOf(mask))));
  masks.forEach((mask, k) => {
    const draw = generator(seed, images[k], 2);
    const keys = () => Array.from({ length: rows * columns }, draw);
    mask.keep = o.truncation === "fixed" ? o.context_length : shortest;
    if (o.truncation !== "released") mask.keys = keys();
    if (o.truncation === "fixed" && o.target_length) {
      mask.targetKeep = o.target_length;
      mask.targetKeys = mask.targets.map(keys);
    }
  });
  return masks;
}

/** Apply a function of the random numbers of one image to each. */
const each = (drawOne) => (grid, o, seed, images) => images.map((image) => drawOne(grid, o, generator(seed, image, 1)));

function block([rows, columns], o, draw) {
  const [height, width] = blockSize([rows, columns], o.target_scale, o.target_aspect_ratio, "inclusive", draw(), draw());
  const top = corner(draw(), height, rows, "inclusive"), left = corner(draw(), width, columns, "inclusive");
  return hide(rectangle([rows, columns], top, left, height, width));
}

function random([rows, columns], o, draw) {
  const keys = Array.from({ length: rows * columns }, draw);
  return hide(keepRandom(keys, clamp(rint(o.ratio * keys.length), 1, keys.length - 1)));
}

function rasterized([rows, columns], o, draw) {
  const r = Math.floor(rows / 2), c = Math.floor(columns / 2);
  const quadrants = [[0, 0, r, c], [0, c, r, columns - c], [r, 0, rows - r, c], [r, c, rows - r, columns - c]];
  const sets = quadrants.map((q) => rectangle([rows, columns], ...q));
  const [base] = sets.splice(Math.floor(4 * draw()), 1);
  return { base, targets: sets, overlap: false };
}

const ROUNDS = 15;

function blockwise([rows, columns], o, draw) {
  const patches = rows * columns;
  const least = Math.max(1, o.min_scale * patches);
  const masked = new Uint8Array(patches);
  const fromLast = draw() < 0.5;
  let missing = rint(o.ratio * patches);
  for (let k = 0; missing > 0; k++) {
    const area = least + draw() * Math.max(missing - least, 0);
    const root = Math.exp(between(o.aspect_ratio.map(Math.log), draw()) / 2), side = Math.sqrt(area);
    const height = Math.min(Math.max(rint(side * root), 1), rows), width = Math.min(Math.max(rint(side / root), 1), columns);
    const top = corner(draw(), height, rows, "inclusive"), left = corner(draw(), width, columns, "inclusive");
    const whole = k === ROUNDS;
    const set = whole ? new Uint8Array(patches).fill(1) : rectangle([rows, columns], top, left, height, width);
    const fresh = indices(set).filter((i) => !masked[i]);
    if (fromLast && fresh.length >= missing) fresh.reverse();
    for (const i of fresh.slice(0, missing)) masked[i] = 1;
    missing -= Math.min(fresh.length, missing);
  }
  return hide(masked);
}

function inverseBlock([rows, columns], o, draw) {
  const patches = rows * columns;
  const kept = patches - clamp(rint(o.ratio * patches), 1, patches - 1);
  const blocks = Math.max(1, Math.floor((patches * (1 - o.ratio + o.adjust)) / o.block_size ** 2));
  const covered = new Uint8Array(patches);
  for (let k = 0; k < blocks; k++) {
    const half = Math.floor(o.block_size / 2);
    const top = Math.floor(draw() * rows) - half, left = Math.floor(draw() * columns) - half;
    rectangle([rows, columns], top, left, o.block_size, o.block_size).forEach((v, i) => (covered[i] |= v));
  }
  const keys = Array.from(covered, (v) => draw() + (v ? 0 : 1)); // random patches of the blocks first
  return hide(not(keepRandom(keys, kept)));
}

function keptBlock([rows, columns], o, draw) {
  const patches = rows * columns;
  const kept = patches - clamp(rint(o.ratio * patches), 1, patches - 1);
  const limits = o.aspect_ratio.map((v) => Math.log(clamp(v, kept / columns ** 2, rows ** 2 / kept)));
  const root = Math.exp(between(limits, draw()) / 2), side = Math.sqrt(kept);
  const height = Math.min(Math.ceil(side * root), rows), width = Math.min(Math.ceil(side / root), columns);
  const top = corner(draw(), height, rows, "inclusive"), left = corner(draw(), width, columns, "inclusive");
  const down = o.roll ? Math.floor(draw() * rows) : 0, right = o.roll ? Math.floor(draw() * columns) : 0;
  const context = new Uint8Array(patches);
  for (const i of indices(rectangle([rows, columns], top, left, height, width)).slice(0, kept)) {
    context[((Math.floor(i / columns) + down) % rows) * columns + (((i % columns) + right) % columns)] = 1;
  }
  return hide(not(context));
}

function causal([rows, columns], o, draw) {
  const patches = rows * columns;
  const [shortest, longest] = o.context_ratio.map((v) => clamp(rint(v * patches), 1, patches - 1));
  const length = shortest + Math.floor(draw() * (longest - shortest + 1));
  return hide(Uint8Array.from({ length: patches }, (_, i) => (i < length ? 0 : 1)));
}

/**
 * An option: the name in a config, a label, and what it can be; `pair` for (low, high), `more` for the folded part, `only` for
 * the option and its value without which this one has no effect and jepa_kit's default is null.
 */
const number = (name, label, min, max, step, value, more = false) => ({ name, label, min, max, step, value, more });
const pair = (name, label, min, max, step, value, more = false) => ({ name, label, min, max, step, value, more, pair: true });
const choice = (name, label, choices, value) => ({ name, label, choices, value, more: true });
const flag = (name, label, value) => ({ name, label, flag: true, value, more: true });

const RATIO = number("ratio", "Part of the image that is hidden", 0.1, 0.9, 0.05, 0.6);
const TARGET_ASPECT = pair("target_aspect_ratio", "Height over width of a target", 0.25, 4, 0.05, [0.75, 1.5], true);

/**
 * Maskers by name. `options` are those that the page offers, with the defaults of jepa_kit; `masker` is the name in a
 * config, `text` a sentence about it; `draw` maps (grid, options, seed, numbers of the images of a batch) to masks.
 */
export const MASKERS = {
  multiblock: {
    label: "Multi-block",
    text: "I-JEPA's masks: a few blocks are hidden, and the context is one large block without them.",
    draw: multiblock,
    options: [
      number("num_targets", "Number of targets", 1, 8, 1, 4),
      pair("target_scale", "Area of a target, of the image", 0.05, 0.5, 0.01, [0.15, 0.2]),
      TARGET_ASPECT,
      pair("context_scale", "Area of the context block, of the image", 0.2, 1, 0.05, [0.85, 1], true),
      pair("context_aspect_ratio", "Height over width of the context block", 0.25, 4, 0.05, [1, 1], true),
      number("min_keep", "Fewest patches of context", 1, 20, 1, 4, true),
      flag("allow_overlap", "Context may contain target patches", false),
      choice("edges", "Places of blocks", ["inclusive", "released"], "inclusive"),
      flag("coupled_scale_and_aspect", "One random number for area and shape", false),
      choice("size_per", "Equal sizes within", ["block", "image", "batch"], "block"),
      choice("truncation", "Truncate contexts", ["none", "released", "random", "fixed"], "none"),
      { ...number("context_length", "Patches of a context, if fixed", 1, 64, 1, 24, true), only: ["truncation", "fixed"] },
      { ...number("target_length", "Patches of a target, if fixed (0: all)", 0, 64, 1, 0, true), only: ["truncation", "fixed"] },
    ],
  },
  released: {
    label: "Multi-block, as released",
    masker: "multiblock",
    text:
      "The released code's quirks: blocks never touch the last row and column, all images of a batch share one block size, " +
      "and contexts are cut to the batch's shortest, which drops the bottom of the image.",
    draw: multiblock,
    changes: {
      edges: "released",
      coupled_scale_and_aspect: true,
      size_per: "batch",
      truncation: "released",
      min_keep: 11,
    },
  },
  block: {
    label: "One block",
    text: "One large block is hidden; everything else is context.",
    draw: each(block),
    options: [pair("target_scale", "Area of the target, of the image", 0.05, 0.9, 0.05, [0.6, 0.6]), TARGET_ASPECT],
  },
  random: {
    label: "Random patches",
    text: "Single patches are hidden at random: each has neighbours to copy from, so the task is easier.",
    draw: each(random),
    options: [RATIO],
  },
  rasterized: {
    label: "Quadrants",
    text: "One quarter of the image is context, the other three are targets.",
    draw: each(rasterized),
    options: [],
  },
  blockwise: {
    label: "Blockwise (BEiT)",
    text: "Blocks are added one by one until a fixed part of the image is hidden.",
    draw: each(blockwise),
    options: [
      { ...RATIO, value: 0.4 },
      number("min_scale", "Smallest block, of the image", 0.01, 0.1, 0.01, 0.08, true),
      pair("aspect_ratio", "Height over width of a block", 0.25, 4, 0.05, [0.3, 1 / 0.3], true),
    ],
  },
  inverse_block: {
    label: "Inverse blocks (data2vec 2.0)",
    text: "A few small squares are context; the rest is hidden.",
    draw: each(inverseBlock),
    options: [
      { ...RATIO, value: 0.8 },
      number("block_size", "Side of a square, in patches", 1, 4, 1, 3),
      number("adjust", "Part that squares cover in excess", 0, 0.3, 0.01, 0.07, true),
    ],
  },
  kept_block: {
    label: "Kept block (CAPI)",
    text: "One block is context, rolled around the edges; the rest is hidden.",
    draw: each(keptBlock),
    options: [
      { ...RATIO, value: 0.65 },
      pair("aspect_ratio", "Height over width of the block", 0.25, 4, 0.05, [0.5, 2], true),
      flag("roll", "Roll around the edges", true),
    ],
  },
  causal: {
    label: "Causal (AIM)",
    text: "The first rows are context; the patches after them are hidden.",
    draw: each(causal),
    options: [pair("context_ratio", "Part of the image that is context", 0, 1, 0.05, [0, 1])],
  },
};
MASKERS.released.options = MASKERS.multiblock.options;

/** Return the options of a masker with their defaults, changed by those given. */
export function optionsOf(name, given = {}) {
  const { options, changes = {} } = MASKERS[name];
  return Object.fromEntries(options.map((o) => [o.name, given[o.name] ?? changes[o.name] ?? o.value]));
}

/** Options of jepa_kit that the page does not offer: limits that change no mask, and the only value that it draws. */
const LIMITS = ["min_keep", "min_keep_target"];
const FIXED = { num_contexts: 1, target_length: null, unit: null, count: "exact", num_masks: 1 };

/**
 * Return the masker of a run as {name, options}; null if the page cannot draw it.
 *
 * @param given name and all options, as in the run's config, or null
 */
export function fromConfig(given) {
  const name = given?.name === "multiblock" && given.edges === "released" ? "released" : given?.name;
  const fits = name in MASKERS && Object.entries(given).every(([key, value]) => {
    const option = MASKERS[name].options.find((o) => o.name === key);
    if (!option) return key === "name" || LIMITS.includes(key) || FIXED[key] === value;
    if (option.only) return true;
    return option.choices ? option.choices.includes(value) : Array.isArray(value) === Boolean(option.pair);
  });
  return fits ? { name, options: optionsOf(name, given) } : null;
}

/**
 * Draw the masks of a batch.
 *
 * @param name of the masker
 * @param options from `optionsOf`
 * @param grid [H, W]
 * @param seed an integer
 * @param images the numbers of the images of the batch
 * @throws RangeError if the targets leave too little context
 */
export function drawMasks(name, options, grid, seed, images) {
  return MASKERS[name].draw(grid, options, seed, images);
}
