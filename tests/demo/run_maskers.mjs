// Input: {fromConfig: [...], draws: [{name, options, grid, batch, batches}]}. Output: those maskers as the page has them; of
// each batch the mean use of every patch, mean lengths; and the options and defaults of every masker.

const input = JSON.parse((await import("node:fs")).readFileSync(0, "utf8"));
const { MASKERS, contextOf, drawMasks, fromConfig, optionsOf, targetsOf } = await import(`${process.argv[2]}/maskers.js`);

const count = (set) => set.reduce((s, v) => s + v, 0);
const draws = input.draws.map(({ name, options, grid, batch, batches }) =>
  Array.from({ length: batches }, (_, step) => {
    const images = Array.from({ length: batch }, (_, i) => (name === "released" ? i : step * batch + i));
    const masks = drawMasks(name, optionsOf(name, options), grid, step, images);
    const context = new Array(grid[0] * grid[1]).fill(0), target = [...context];
    const lengths = [], sizes = [];
    for (const mask of masks) {
      const seen = contextOf(mask), targets = targetsOf(mask);
      lengths.push(count(seen));
      sizes.push(...targets.map(count));
      for (let i = 0; i < seen.length; i++) {
        context[i] += seen[i] / batch;
        target[i] += count(targets.map((t) => t[i])) / batch;
      }
    }
    return { context, target, lengths, sizes };
  }),
);
const maskers = Object.entries(MASKERS).map(([key, { masker = key, options, changes = {} }]) => ({
  key, masker, changes, options: Object.fromEntries(options.map((o) => [o.name, o.only ? null : o.value])),
}));
console.log(JSON.stringify({ draws, maskers, fromConfig: input.fromConfig.map(fromConfig) }));
