/** The page: its state, what follows from it, and what a reader does with it. */

import { cosines, componentColour, meanToken, nearestPatches, principalComponents, rankPatches } from "./analysis.js";
import { buildControls, configLine, element } from "./controls.js";
import { COLOURS, MAGMA_GRADIENT, changePatches, frame, magma, over, parseColour, show, toRgba } from "./drawing.js";
import { boxOf, changeMask, hasContextBlock, isRectangle, moveSet, placeOf, resizeSet, targetsAt } from "./editing.js";
import { MASKERS, contextOf, drawMasks, fromConfig, generator, indices, optionsOf, targetsOf } from "./maskers.js";
import { decode, encode, energy, imageScale, normalise, predict, targetTokens } from "./network.js";
import { fromBase64, openTensors } from "./tensors.js";

const $ = (id) => document.getElementById(id);
const page = JSON.parse($("data").textContent);
const tensor = openTensors(page.tensors, fromBase64($("tensors").textContent));
const { grid, patch_size: p } = page;
const [rows, columns] = grid;
const size = [rows * p, columns * p];
const patches = rows * columns;
const width = page.decoder.width; // of a target
const NONE = new Uint8Array(patches);
const USAGE = 512; // images of the maps of usage
const OTHERS = 6;
const NEAREST = 10;
const DRAWINGS = 8; // of a mean
const trained = fromConfig(page.masker);

/** Images of the page: bytes [3, h, w], RGBA, what the networks are given, and s_y [N, D] once it is computed. */
const images = Array.from({ length: tensor("images").rows }, (_, i) => {
  const { data, cols } = tensor("images");
  const bytes = data.subarray(i * cols, (i + 1) * cols);
  return { bytes, rgba: toRgba(bytes), input: normalise(bytes, page), tokens: null };
});

const state = {
  image: 0,
  masker: "multiblock", // a key of MASKERS, or "run"
  options: optionsOf("multiblock"),
  seed: 0,
  mask: null,
  active: 0, // number of a target, or "context"
  patch: null, // the hidden patch to look at
  noise: 0,
  found: null, // {context, predictions, energies, total, time}: from `compute`
  all: null, // {centre, components, chance}: once every image is encoded
};

const maskerKey = () => (state.masker === "run" ? trained.name : state.masker);
const tokensOf = (i) => (images[i].tokens ??= targetTokens(page, tensor, images[i].input));
const rowOf = (token, matrix) => matrix.subarray(token * width, (token + 1) * width);
const place = (patch) => `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
const colourOf = (which) => (which === "context" ? "#ffffff" : COLOURS[which % COLOURS.length]);

function pale() {
  const grey = matchMedia("(prefers-color-scheme: dark)").matches ? 62 : 214;
  return over([grey, grey, grey], 0.78);
}

// ---- masks

/** Draw masks by the masker; the problem is shown if its options leave too little context. */
function newMasks() {
  const batch = Math.max(Math.min(page.batch_size, 256), images.length);
  const whole = ["released", "random"].includes(state.options.truncation); // masks depend on the batch
  const numbers = whole ? Array.from({ length: batch }, (_, i) => i) : [state.image];
  $("problem").textContent = "";
  try {
    state.mask = drawMasks(maskerKey(), state.options, grid, state.seed, numbers)[whole ? state.image : 0];
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    $("problem").textContent = error.message;
    return false;
  }
  state.active = 0;
  return true;
}

/** Keep the patch to look at if it is hidden, else take one in the middle of the active target. */
function choosePatch() {
  if (state.patch !== null && targetsAt(state.mask, state.patch).length) return;
  const inside = indices(targetsOf(state.mask)[state.active === "context" ? 0 : state.active]);
  state.patch = inside[Math.floor(inside.length / 2)];
}

/** Return the target whose prediction stands for a patch: the active one if it has the patch. */
function targetOf(patch) {
  const those = targetsAt(state.mask, patch);
  return those.includes(state.active) ? state.active : those[0];
}

// ---- what the networks say

/** Run encoder and predictor on the masks. */
function compute() {
  const begin = performance.now();
  const { mask, image } = state;
  const context = indices(contextOf(mask));
  const seen = encode(page, tensor, "encoder", images[image].input, context);
  const truth = tokensOf(image);
  const predictions = targetsOf(mask).map((set) => {
    const target = indices(set);
    const tokens = predict(page, tensor, seen, context, target);
    const energies = target.map((patch, r) => energy(page.losses, tokens, r, truth, patch, width));
    return { patches: target, tokens, energies };
  });
  const means = predictions.map(({ energies }) => energies.reduce((s, v) => s + v, 0) / energies.length);
  const total = means.reduce((s, v) => s + v, 0) / means.length;
  state.found = { context, predictions, total, time: performance.now() - begin };
}

/** Return the prediction of a hidden patch: {token [D], energy}, of the target that stands for it. */
function predictionOf(patch) {
  const { patches: those, tokens, energies } = state.found.predictions[targetOf(patch)];
  const r = those.indexOf(patch);
  return { token: rowOf(r, tokens), energy: energies[r] };
}

/** Encode all images, one after another so that the page stays usable, then compare them. */
async function encodeAll() {
  for (let i = 0; i < images.length; i++) {
    $("loading").textContent = `The target encoder reads the images: ${i} of ${images.length} …`;
    await new Promise((done) => setTimeout(done));
    tokensOf(i);
  }
  $("loading").textContent = "";
  const every = images.map((image) => image.tokens);
  const draw = generator(7), pick = (count) => Math.floor(draw() * count);
  let chance = 0;
  for (let k = 0; k < 1000; k++) {
    const a = pick(images.length), b = (a + 1 + pick(images.length - 1)) % images.length;
    chance += energy(page.losses, every[a], pick(patches), every[b], pick(patches), width) / 1000;
  }
  state.all = { centre: meanToken(every, width), components: principalComponents(every, width), chance };
}

// ---- drawing

let pending = false;
/** Compute and draw everything before the next frame, once. */
function update() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    choosePatch();
    compute();
    draw();
  });
}

function draw() {
  drawStage();
  drawFigures();
  drawFeatures();
  drawPixels();
  drawPatch();
}

/** Frame all targets; the active one with a thicker line. */
function frameTargets(context, s, thick = 2) {
  const { mask, active } = state;
  mask.targets.forEach((set, k) => {
    frame(context, set, grid, p, { colour: colourOf(k), width: s * (k === active ? thick * 1.6 : thick), inset: s * thick * 0.25 });
  });
}

function framePatch(context, s, patch, colour = "#ffffff") {
  const set = new Uint8Array(patches);
  set[patch] = 1;
  frame(context, set, grid, p, { colour, width: 2.5 * s });
}

function drawStage() {
  const { mask, active } = state;
  const seen = contextOf(mask), peek = $("peek").checked, hide = pale();
  const rgba = changePatches(images[state.image].rgba, grid, p, (patch) => {
    if (seen[patch] || peek) return null;
    const [first] = targetsAt(mask, patch);
    if (first === undefined) return hide;
    const tint = parseColour(colourOf(first));
    return (r, g, b) => hide(r, g, b).map((v, c) => 0.86 * v + 0.14 * tint[c]);
  });
  show($("stage-image"), rgba, size, (context, s) => {
    if (hasContextBlock(mask)) frame(context, mask.base, grid, p, { colour: "#ffffff", width: 2 * s, dash: [5 * s, 4 * s] });
    frameTargets(context, s, 2.5);
    framePatch(context, s, state.patch);
  });
  placeChips(active);
  labelCells(seen);
}

function drawFigures() {
  const { found, all } = state;
  $("energy").textContent = found.total.toFixed(3);
  $("chance").textContent = all ? all.chance.toFixed(3) : "–";
  $("time").textContent = `${found.time.toFixed(0)} ms`;
  $("counts").textContent = `${found.context.length}, ${found.predictions.map((one) => one.patches.length).join(" + ")}`;
}

/** Draw an image on a canvas with its patches changed, the targets framed, and a description. */
function panel(id, change, description, rgba = images[state.image].rgba) {
  show($(id), changePatches(rgba, grid, p, change), size, (context, s) => frameTargets(context, s, 1.5));
  $(id).setAttribute("aria-label", description);
}

function drawFeatures() {
  const { found, all, mask } = state;
  const seen = contextOf(mask), hide = pale();
  const hidden = (patch) => targetsAt(mask, patch).length > 0;
  panel("context", (patch) => (seen[patch] ? null : hide), `The context: ${found.context.length} of ${patches} patches`);
  panel("whole", () => null, "The whole image");
  if (!all) return;
  const flat = (colour) => () => colour;
  panel("predicted", (patch) => {
    if (!hidden(patch)) return hide;
    return flat(componentColour(all.components, predictionOf(patch).token, 0));
  }, "Predicted features in the targets, as colours");
  panel("true", (patch) => flat(componentColour(all.components, tokensOf(state.image), patch)), "True features, as colours");
  panel("energies", (patch) => (hidden(patch) ? over(magma(predictionOf(patch).energy / all.chance), 0.92) : hide),
    `Energy of the targets: ${found.total.toFixed(3)} on average; ${all.chance.toFixed(3)} for random patches`);
  $("scale-energy").textContent = all.chance.toFixed(2);
}

/** Return a normally distributed number (Box and Muller 1958). */
function normal(draw) {
  return Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
}

/** Return the noise of patches for a drawing: the first half is that of the drawing, the rest of the patch. */
function noiseOf(those, drawing) {
  const half = page.decoder.noise / 2;
  const numbers = (seed) => {
    const draw = generator(drawing, seed);
    return Array.from({ length: half }, () => normal(draw));
  };
  const shared = numbers(-1);
  return Float32Array.from(those.flatMap((patch) => [...shared, ...numbers(patch)]));
}

/** Return a function for `changePatches` for each patch of `those`, drawn by the decoder from tokens: once, or the mean. */
function drawingOf(those, tokens) {
  const image = images[state.image].input;
  const { centre, deviation } = imageScale(image, page.encoder.input_norm);
  const count = $("average").checked ? DRAWINGS : 1, area = p * p;
  const values = new Float32Array(those.length * 3 * area);
  for (let k = 0; k < count; k++) {
    decode(page, tensor, tokens, noiseOf(those, state.noise + k)).forEach((v, i) => (values[i] += v / count));
  }
  return new Map(those.map((patch, r) => [patch, (_r, _g, _b, at) => [0, 1, 2].map((c) => {
    const value = values[r * 3 * area + c * area + at] * deviation + centre[c];
    return 255 * (value * page.std[c] + page.mean[c]);
  })]));
}

function drawPixels() {
  const { mask } = state;
  const seen = contextOf(mask), hide = pale();
  const hidden = Array.from({ length: patches }, (_, i) => i).filter((i) => targetsAt(mask, i).length);
  const join = (tokens) => Float32Array.from(tokens.flatMap((token) => Array.from(token)));
  const guess = drawingOf(hidden, join(hidden.map((i) => predictionOf(i).token)));
  const truth = drawingOf(hidden, join(hidden.map((i) => rowOf(i, tokensOf(state.image)))));
  const change = (drawing) => (patch) => drawing.get(patch) ?? (seen[patch] ? null : hide);
  panel("drawn", change(guess), "The predicted features of the targets, drawn by the decoder");
  panel("drawn-true", change(truth), "The true features of the targets, drawn by the decoder");
  panel("original", () => null, "The image");
}

/** Return the map [N] of an image as RGBA. */
function heat(image, map, high) {
  return changePatches(images[image].rgba, grid, p, (patch) => over(magma(map[patch] / high), 0.74));
}

function drawPatch() {
  const { all, image, patch } = state;
  if (!all) return;
  const { token, energy: own } = predictionOf(patch);
  const maps = images.map((each) => cosines(token, each.tokens, all.centre));
  const { rank, total, best } = rankPatches(maps, image, patch);
  const high = Math.max(best[0].value, 1e-6);
  show($("heat"), heat(image, maps[image], high), size, (context, s) => framePatch(context, s, patch));
  $("heat").setAttribute("aria-label", `Similarity to the prediction; the patch itself has ${maps[image][patch].toFixed(2)}`);
  $("scale-heat").textContent = high.toFixed(2);
  const others = best.filter((b) => b.image !== image).slice(0, OTHERS);
  others.forEach((b, k) => {
    const canvas = $("others").children[k];
    show(canvas, heat(b.image, maps[b.image], high), size, (context, s) => framePatch(context, s, b.patch));
    canvas.setAttribute("aria-label", `Image ${b.image + 1}: at most ${b.value.toFixed(2)}, at ${place(b.patch)}`);
  });
  nearestPatches(maps, NEAREST, { image: -1, patch: -1 }).forEach((n, k) => drawCrop($("nearest").children[k], n));
  const energies = images.map((each) => energy(page.losses, token, 0, each.tokens, patch, width));
  const closer = energies.filter((e) => e < energies[image]).length;
  drawStrip(energies);
  $("patch-text").textContent =
    `${place(patch)[0].toUpperCase()}${place(patch).slice(1)}, in target ${targetOf(patch) + 1}: energy ${own.toFixed(3)}` +
    ` (random patches ${all.chance.toFixed(3)}). Of all ${total.toLocaleString("en")} patches of the ${images.length} images,` +
    ` the true one is the ${rank > 1 ? `${ordinal(rank)} ` : ""}most similar to the prediction; at this place, ` +
    `${closer ? `${closer} of ${images.length - 1}` : "no"} other image${closer === 1 ? " fits" : closer ? "s fit" : " fits"} it better.`;
}

function ordinal(n) {
  const ending = n % 100 > 10 && n % 100 < 14 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" }[n % 10] ?? "th");
  return `${n.toLocaleString("en")}${ending}`;
}

/** Draw a patch in the middle of its neighbours, as far as the image goes. */
function drawCrop(canvas, { image, patch, value }) {
  const first = (at, count) => Math.min(Math.max(at - 1, 0), count - 3);
  const top = first(Math.floor(patch / columns), rows), left = first(patch % columns, columns);
  const rgba = new Uint8ClampedArray(4 * 9 * p * p);
  for (let y = 0; y < 3 * p; y++) {
    const from = 4 * ((top * p + y) * size[1] + left * p);
    rgba.set(images[image].rgba.subarray(from, from + 12 * p), 12 * p * y);
  }
  const set = new Uint8Array(9);
  set[(Math.floor(patch / columns) - top) * 3 + (patch % columns) - left] = 1;
  const isTrue = image === state.image && patch === state.patch;
  show(canvas, rgba, [3 * p, 3 * p], (context, s) => {
    frame(context, set, [3, 3], p, { colour: isTrue ? COLOURS[0] : "#ffffff", width: 2 * s });
  });
  const whose = isTrue ? "The true patch" : image === state.image ? "This image" : `Image ${image + 1}`;
  canvas.setAttribute("aria-label", `${whose}, ${place(patch)}: ${value.toFixed(2)}`);
  canvas.title = canvas.getAttribute("aria-label");
}

/** Draw the energies of all images on a line. */
function drawStrip(energies) {
  const canvas = $("strip"), style = getComputedStyle(document.documentElement);
  const ratio = globalThis.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  canvas.width = w * ratio;
  canvas.height = h * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const high = Math.max(...energies, state.all.chance) * 1.05;
  const x = (value) => 12 + (w - 24) * (value / high);
  context.strokeStyle = style.getPropertyValue("--line");
  context.fillStyle = style.getPropertyValue("--muted");
  context.font = "12px system-ui, sans-serif";
  context.beginPath();
  context.moveTo(12, 26);
  context.lineTo(w - 12, 26);
  context.stroke();
  for (const [value, text] of [[0, "0"], [state.all.chance, `random ${state.all.chance.toFixed(2)}`]]) {
    context.fillRect(x(value), 21, 1, 10);
    context.textAlign = value ? "center" : "left";
    context.fillText(text, Math.min(x(value), w - 42), 48);
  }
  const own = state.image;
  const order = [...energies.keys()].filter((i) => i !== own).concat(own);
  for (const i of order) {
    context.beginPath();
    context.arc(x(energies[i]), 26, i === own ? 7 : 5, 0, 2 * Math.PI);
    context.fillStyle = i === own ? COLOURS[0] : style.getPropertyValue("--accent");
    context.globalAlpha = i === own ? 1 : 0.45;
    context.fill();
    context.globalAlpha = 1;
    if (i === own) {
      context.lineWidth = 2.5;
      context.strokeStyle = style.getPropertyValue("--text");
      context.stroke();
    }
  }
  const least = Math.min(...energies.filter((_, i) => i !== own));
  canvas.setAttribute("aria-label",
    `Energy with the true image ${energies[own].toFixed(3)}, with the others from ${least.toFixed(3)} to ${Math.max(...energies).toFixed(3)}`);
}

/** Draw how often patches are context and target, and say what is uneven. */
function drawUsage() {
  const batch = Math.min(page.batch_size, 256);
  const context = new Float32Array(patches), target = new Float32Array(patches);
  const lengths = [];
  for (let first = 0, step = 0; first < USAGE; first += batch, step++) {
    const numbers = Array.from({ length: Math.min(batch, USAGE - first) }, (_, i) => first + i);
    let masks;
    try {
      masks = drawMasks(maskerKey(), state.options, grid, 1000 + step, numbers);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      return; // `newMasks` shows it
    }
    for (const mask of masks) {
      const seen = contextOf(mask), targets = targetsOf(mask);
      lengths.push(indices(seen).length);
      for (let i = 0; i < patches; i++) {
        context[i] += seen[i] / USAGE;
        target[i] += targets.some((set) => set[i]) / USAGE;
      }
    }
  }
  const draw = (id, map) => {
    const rgba = toRgba(new Uint8Array(3 * patches * p * p));
    show($(id), changePatches(rgba, grid, p, (patch) => () => magma(map[patch])), size);
    const rowMean = (r) => map.slice(r * columns, (r + 1) * columns).reduce((s, v) => s + v, 0) / columns;
    const text = `first row ${rowMean(0).toFixed(2)}, last row ${rowMean(rows - 1).toFixed(2)}`;
    $(`${id}-text`).textContent = text;
    $(id).setAttribute("aria-label", `How often patches are ${id.split("-")[1]}: ${text}`);
  };
  draw("usage-context", context);
  draw("usage-target", target);
  $("usage-count").textContent = USAGE;
  const never = Array.from(context.keys()).filter((i) => !context[i] && !target[i]);
  const mean = lengths.reduce((s, v) => s + v, 0) / lengths.length;
  const least = Math.min(...lengths), most = Math.max(...lengths);
  const range = least === most ? `${least} in every image` : `${mean.toFixed(1)} on average, from ${least} to ${most}`;
  $("usage-text").textContent = `Context patches: ${range}. ` +
    (never.length ? `${never.length} of ${patches} patches are never used, neither as context nor as target.` : "Every patch is used.");
}

// ---- the stage: patches and blocks under pointer and keyboard

/** Make a grid of cells for patches, so that each can be reached by keyboard and read by a screen reader. */
function buildCells() {
  const cells = $("cells");
  cells.style.gridTemplateRows = `repeat(${rows}, 1fr)`;
  for (let r = 0; r < rows; r++) {
    const row = element("div", { role: "row" });
    row.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    for (let c = 0; c < columns; c++) row.append(element("div", { role: "gridcell", tabindex: -1, "data-patch": r * columns + c }));
    cells.append(row);
  }
}

const cellOf = (patch) => $("cells").querySelector(`[data-patch="${patch}"]`);

function labelCells(seen) {
  const { mask, patch: chosen } = state;
  for (let patch = 0; patch < patches; patch++) {
    const cell = cellOf(patch), those = targetsAt(mask, patch);
    const what = those.length ? `hidden, target ${those.map((k) => k + 1).join(" and ")}` : seen[patch] ? "context" : "not used";
    cell.setAttribute("aria-label", `${place(patch)}, ${what}`);
    cell.setAttribute("aria-selected", patch === chosen);
    cell.className = those.length ? "target" : mask.base[patch] && hasContextBlock(mask) ? "movable" : "";
    if (document.activeElement?.dataset?.patch === undefined) cell.tabIndex = patch === chosen ? 0 : -1;
  }
}

/** Place a button for each set that can be moved, at its upper left patch, and a corner to resize the active one. */
function placeChips(active) {
  const { mask } = state, chips = $("chips");
  const keys = [...mask.targets.keys(), ...(hasContextBlock(mask) ? ["context"] : [])];
  const wanted = keys.map((which) => `chip-${which}`);
  for (const old of [...chips.children]) if (!wanted.includes(old.id)) old.remove();
  const taken = new Map();
  for (const which of keys) {
    const set = which === "context" ? mask.base : mask.targets[which];
    const id = `chip-${which}`;
    let chip = $(id);
    if (!chip) {
      chip = element("button", { type: "button", id, class: which === "context" ? "chip context" : "chip", "data-which": which }, which === "context" ? "C" : `${which + 1}`);
      if (which !== "context") chip.style.background = colourOf(which);
      chips.append(chip);
    }
    const { top, left } = boxOf(set, grid);
    const at = `${top},${left}`, beside = taken.get(at) ?? 0; // sets that begin at one patch: side by side
    taken.set(at, beside + 1);
    chip.style.left = `calc(${(100 * left) / columns}% + ${8 + 28 * beside}px)`;
    chip.style.top = `calc(${(100 * top) / rows}% + 8px)`;
    chip.classList.toggle("active", which === active);
    const name = which === "context" ? "Context block" : `Target ${which + 1}`;
    const sized = isRectangle(set, grid) ? ", Shift with arrow keys changes its size" : "";
    chip.setAttribute("aria-label", `${name}: ${placeOf(set, grid)}. Arrow keys move it${sized}.`);
  }
  placeCorner(active);
}

function placeCorner(active) {
  const set = active === "context" ? state.mask.base : state.mask.targets[active];
  if ((active === "context" && !hasContextBlock(state.mask)) || !isRectangle(set, grid)) return;
  const { top, left, height, width: wide } = boxOf(set, grid);
  const corner = element("div", { class: "corner", id: "chip-corner", "aria-hidden": "true", "data-corner": active });
  corner.style.left = `${(100 * (left + wide)) / columns}%`;
  corner.style.top = `${(100 * (top + height)) / rows}%`;
  corner.style.background = active === "context" ? "#30343b" : colourOf(active);
  $("chips").append(corner);
}

let spoken = 0;
/** Say something to a screen reader once the reader's hands rest. */
function say(text) {
  clearTimeout(spoken);
  spoken = setTimeout(() => ($("live").textContent = text()), 500);
}

/** Apply a change to a set; nothing happens if it would leave no context. */
function edit(which, change, mask = state.mask) {
  const changed = changeMask(mask, which, change);
  if (!changed) {
    say(() => "There must be a patch of context left.");
    return;
  }
  state.mask = changed;
  state.active = which;
  update();
  const set = which === "context" ? changed.base : changed.targets[which];
  say(() => `${which === "context" ? "Context block" : `Target ${which + 1}`}: ${placeOf(set, grid)}. Energy ${state.found.total.toFixed(3)}.`);
}

/** Look at the prediction of a patch, if it is hidden. */
function select(patch) {
  const those = targetsAt(state.mask, patch);
  if (!those.length) {
    say(() => `${place(patch)} is not hidden in a target, so nothing is predicted there.`);
    return;
  }
  state.patch = patch;
  if (!those.includes(state.active)) [state.active] = those;
  draw();
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function pressed(event) {
  const { which, patch } = event.target.dataset;
  const arrow = ARROWS[event.key];
  if (which !== undefined && arrow) {
    const key = which === "context" ? which : Number(which);
    const set = key === "context" ? state.mask.base : state.mask.targets[key];
    if (event.shiftKey && !isRectangle(set, grid)) say(() => "Only rectangles can be resized.");
    else edit(key, (s) => (event.shiftKey ? resizeSet : moveSet)(s, grid, ...arrow));
  } else if (patch !== undefined && arrow) {
    const r = Math.floor(patch / columns) + arrow[0], c = (patch % columns) + arrow[1];
    if (r >= 0 && c >= 0 && r < rows && c < columns) focusCell(r * columns + c);
  } else if (patch !== undefined && (event.key === "Enter" || event.key === " ")) {
    select(Number(patch));
  } else {
    return;
  }
  event.preventDefault();
}

function focusCell(patch) {
  for (const cell of $("cells").querySelectorAll('[tabindex="0"]')) cell.tabIndex = -1;
  cellOf(patch).tabIndex = 0;
  cellOf(patch).focus();
}

let drag = null; // {which, resize, mask, patch, moved}: a set under the pointer, and the masks before

function patchUnder(event) {
  const box = $("cells").getBoundingClientRect();
  return [
    Math.floor(((event.clientY - box.top) / box.height) * rows),
    Math.floor(((event.clientX - box.left) / box.width) * columns),
  ];
}

function down(event) {
  if (event.button) return;
  const [r, c] = patchUnder(event);
  const { which, corner } = event.target.dataset;
  const patch = r * columns + c;
  let key = which ?? corner;
  if (key !== undefined) key = key === "context" ? key : Number(key);
  else if (targetsAt(state.mask, patch).length) key = targetOf(patch);
  else if (event.pointerType !== "touch" && state.mask.base[patch] && hasContextBlock(state.mask)) key = "context";
  drag = { which: key, resize: corner !== undefined, mask: state.mask, at: [r, c], patch: which === undefined ? patch : null, moved: false };
  if (key !== undefined) $("stage").setPointerCapture(event.pointerId);
}

function move(event) {
  if (!drag || drag.which === undefined) return;
  const [r, c] = patchUnder(event);
  const by = [r - drag.at[0], c - drag.at[1]];
  if (!drag.moved && !by[0] && !by[1]) return;
  drag.moved = true;
  $("stage").classList.add("dragging");
  edit(drag.which, (set) => (drag.resize ? resizeSet : moveSet)(set, grid, ...by), drag.mask);
}

/** End a drag; a press without movement looks at the patch, unless the browser took it for scrolling. */
function up(event) {
  if (drag && !drag.moved && event.type === "pointerup") {
    if (drag.which !== undefined) state.active = drag.which;
    if (drag.patch !== null && !drag.resize) select(drag.patch);
    drawStage();
  }
  drag = null;
  $("stage").classList.remove("dragging");
}

// ---- choices

/** Draw masks and everything that follows from them. */
function redraw(usage = true) {
  $("config").textContent = configLine(maskerKey(), state.options);
  if (newMasks()) update();
  if (usage) setTimeout(drawUsage);
}

function chooseMasker(name) {
  state.masker = name;
  state.options = name === "run" ? { ...trained.options } : optionsOf(name);
  $("masker").value = name;
  $("masker-text").textContent = MASKERS[maskerKey()].text;
  buildControls(maskerKey(), state.options, $("options"), $("more"), redraw);
  $("more-box").hidden = !$("more").children.length;
  redraw();
}

function chooseSeed(seed) {
  state.seed = seed;
  $("seed").value = seed;
  redraw(false);
}

function buildThumbs() {
  images.forEach((image, i) => {
    const input = element("input", { type: "radio", name: "image", "aria-label": `Image ${i + 1}`, checked: !i, onchange: () => {
      state.image = i;
      redraw(false);
    } });
    const canvas = element("canvas", { "aria-hidden": "true" });
    $("thumbs").append(element("label", { class: "thumb" }, input, canvas));
    show(canvas, image.rgba, size);
  });
}

function buildAbout() {
  const { encoder, predictor } = page;
  const count = (n) => n.toLocaleString("en");
  const facts = {
    Run: `${page.title}, after ${count(page.step)} updates`,
    Images: `${size[0]} × ${size[1]} pixels, ${rows} × ${columns} patches`,
    Encoder: `ViT of ${encoder.depth} blocks, width ${encoder.width}, ${encoder.heads} heads: ${count(page.weights.encoder)} weights`,
    Predictor: `${predictor.depth} blocks, width ${predictor.width}: ${count(page.weights.predictor)} weights`,
    Energy: page.losses.map(({ name, weight }) => (weight === 1 ? name : `${weight} ${name}`)).join(" + "),
    "Trained with": page.masker ? `masker ${page.masker.name}${trained ? "" : ", which this page does not draw"}` : "no masks",
    "Made by": `tools/demo.py of jepa_kit ${page.version}`,
  };
  for (const [name, text] of Object.entries(facts)) $("about").append(element("dt", {}, name), element("dd", {}, text));
  const removed = page.encoder.input_norm === "image" ? " Overall colour and contrast are the image's: the encoder removes them." : "";
  $("decoder-note").textContent =
    `From true features, drawings explain ${Math.round(100 * page.decoder.explained)} % of the variance of pixels.${removed}`;
}

function start() {
  document.title = `I-JEPA, live: ${page.title}`;
  $("stage").style.aspectRatio = `${columns} / ${rows}`;
  for (const bar of document.querySelectorAll(".magma")) bar.style.background = MAGMA_GRADIENT;
  for (const [id, count] of [["others", OTHERS], ["nearest", NEAREST]]) {
    for (let k = 0; k < count; k++) $(id).append(element("canvas", { role: "img" }));
  }
  const select_ = $("masker");
  if (trained) select_.append(element("option", { value: "run" }, `As in training: ${MASKERS[trained.name].label}`));
  for (const [name, { label }] of Object.entries(MASKERS)) select_.append(element("option", { value: name }, label));
  select_.addEventListener("change", () => chooseMasker(select_.value));
  $("seed").addEventListener("change", () => chooseSeed(Math.max(0, Math.floor($("seed").valueAsNumber) || 0)));
  $("again").addEventListener("click", () => chooseSeed(state.seed + 1));
  $("peek").addEventListener("change", drawStage);
  $("average").addEventListener("change", drawPixels);
  $("redraw").addEventListener("click", () => {
    state.noise += DRAWINGS;
    drawPixels();
  });
  for (const button of document.querySelectorAll("[data-masker]")) button.addEventListener("click", () => chooseMasker(button.dataset.masker));
  const stage = $("stage");
  stage.addEventListener("keydown", pressed);
  stage.addEventListener("pointerdown", down);
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerup", up);
  stage.addEventListener("pointercancel", up);
  buildCells();
  buildThumbs();
  buildAbout();
  chooseMasker("multiblock");
  const again = () => {
    if (state.found) draw();
    drawUsage();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("resize", again);
  encodeAll().then(update);
}

start();
