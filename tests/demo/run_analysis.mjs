// Input: {matrices, width, token, image, patch}. Output: what analysis.js finds, and masks that editing.js moves.

const input = JSON.parse((await import("node:fs")).readFileSync(0, "utf8"));
const module = (name) => import(`${process.argv[2]}/${name}.js`);
const { componentColour, cosines, meanToken, nearestPatches, principalComponents, rankPatches } = await module("analysis");
const { boxOf, changeMask, hasContextBlock, isRectangle, moveSet, placeOf, resizeSet } = await module("editing");
const { contextOf, indices, rectangle } = await module("maskers");

const { width, token, image, patch } = input;
const matrices = input.matrices.map((x) => Float32Array.from(x));
const centre = meanToken(matrices, width);
const maps = matrices.map((x) => cosines(Float32Array.from(token), x, centre));
const { explained, axes } = principalComponents(matrices, width);
const components = principalComponents(matrices, width);
const list = (x) => Array.from(x);

const grid = [4, 6];
const block = rectangle(grid, 1, 1, 2, 3);
const mask = { base: rectangle(grid, 0, 0, 4, 5), targets: [block], keep: 6, overlap: false };
const set = (changed) => (changed ? indices(changed) : null);
const editing = {
  moved: set(moveSet(block, grid, 1, -1)),
  stopped: set(moveSet(block, grid, 9, 9)),
  larger: set(resizeSet(block, grid, 9, 0)),
  smallest: set(resizeSet(block, grid, -9, -9)),
  context: set(contextOf(mask)),
  followed: set(contextOf(changeMask(mask, 0, (s) => moveSet(s, grid, -1, -1)))),
  covered: changeMask({ ...mask, base: block, keep: undefined }, 0, (s) => s),
  base: set(changeMask(mask, "context", (s) => moveSet(s, grid, 0, 1)).base),
  box: boxOf(block, grid),
  place: placeOf(block, grid),
  shapes: [isRectangle(block, grid), isRectangle(contextOf(mask), grid)],
  movable: [hasContextBlock(mask), hasContextBlock({ base: new Uint8Array(24).fill(1) })],
};
console.log(JSON.stringify({
  maps: maps.map(list),
  ranked: rankPatches(maps, image, patch),
  nearest: nearestPatches(maps, 5, { image, patch }),
  explained,
  axes: axes.map(list),
  colours: matrices.map((x) => Array.from({ length: x.length / width }, (_, r) => componentColour(components, x, r))),
  editing,
}));
