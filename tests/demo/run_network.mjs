// Input: {page, tensors (base64), masks: [{image, context, targets}], noise, tokens}. Output: what the page computes of them.

const input = JSON.parse((await import("node:fs")).readFileSync(0, "utf8"));
const module = (name) => import(`${process.argv[2]}/${name}.js`);
const { fromBase64, openTensors } = await module("tensors");
const { decode, encode, energy, normalise, predict, targetTokens } = await module("network");

const { page } = input;
const tensor = openTensors(page.tensors, fromBase64(input.tensors));
const { data, cols } = tensor("images");
const results = input.masks.map(({ image, context, targets }) => {
  const x = normalise(data.subarray(image * cols, (image + 1) * cols), page);
  const seen = encode(page, tensor, "encoder", x, context);
  const truth = targetTokens(page, tensor, x);
  const predictions = targets.map((target) => predict(page, tensor, seen, context, target));
  const width = truth.length / (page.grid[0] * page.grid[1]);
  const energies = targets.map((target, k) => target.map((patch, r) => energy(page.losses, predictions[k], r, truth, patch, width)));
  const list = (values) => Array.from(values);
  return { seen: list(seen.patches), prefix: list(seen.prefix), truth: list(truth), predictions: predictions.map(list), energies };
});
const drawn = input.noise ? Array.from(decode(page, tensor, Float32Array.from(input.tokens), Float32Array.from(input.noise))) : null;
console.log(JSON.stringify({ results, drawn }));
