/**
 * Encoder, predictor, targets, loss and decoder in plain JavaScript: the same maths as PyTorch's.
 *
 * N  patches of an image    L  tokens of a sequence    D  width of the encoder    E  width of the predictor
 * p  patch size in pixels   h, w  sides of an image    k  tokens of the encoder's prefix (class token, registers)
 *
 * Matrices are Float32Arrays, row after row.
 */

/** Return x W^T + b: [rows, n] -> [rows, m], of W {data, rows: m, cols: n} and b {data} or null. */
export function linear(x, rows, weight, bias) {
  const { data: w, rows: m, cols: n } = weight;
  const out = new Float32Array(rows * m);
  let r = 0;
  for (; r + 4 <= rows; r += 4) { // four rows at a time, so that each weight is read once for all of them
    const a = r * n, b = a + n, c = b + n, d = c + n;
    for (let o = 0; o < m; o++) {
      const at = o * n;
      const first = bias ? bias.data[o] : 0;
      let s0 = first, s1 = first, s2 = first, s3 = first;
      for (let i = 0; i < n; i++) {
        const v = w[at + i];
        s0 += x[a + i] * v;
        s1 += x[b + i] * v;
        s2 += x[c + i] * v;
        s3 += x[d + i] * v;
      }
      const to = r * m + o;
      out[to] = s0;
      out[to + m] = s1;
      out[to + 2 * m] = s2;
      out[to + 3 * m] = s3;
    }
  }
  for (; r < rows; r++) {
    for (let o = 0; o < m; o++) {
      let s = bias ? bias.data[o] : 0;
      for (let i = 0; i < n; i++) s += x[r * n + i] * w[o * n + i];
      out[r * m + o] = s;
    }
  }
  return out;
}

/** Return LayerNorm of each row of x [rows, n]; weight and bias {data} may be null. */
export function layerNorm(x, n, weight, bias, eps) {
  const out = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += n) {
    let mean = 0, square = 0;
    for (let i = 0; i < n; i++) mean += x[at + i];
    mean /= n;
    for (let i = 0; i < n; i++) square += (x[at + i] - mean) ** 2;
    const scale = 1 / Math.sqrt(square / n + eps);
    for (let i = 0; i < n; i++) {
      const y = (x[at + i] - mean) * scale;
      out[at + i] = weight ? y * weight.data[i] + bias.data[i] : y;
    }
  }
  return out;
}

/** Return erf(x), within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26). */
export function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const y = 1 - series * Math.exp(-x * x);
  return x < 0 ? -y : y;
}

/** Apply GELU, x * Phi(x), in place. */
export function gelu(x) {
  for (let i = 0; i < x.length; i++) x[i] *= 0.5 * (1 + erf(x[i] * Math.SQRT1_2));
  return x;
}

/** Return softmax(q k^T / sqrt(d)) v of all heads: [L, 3 * D] -> [L, D]. */
export function attend(qkv, length, width, heads) {
  const out = new Float32Array(length * width);
  const d = width / heads, scale = 1 / Math.sqrt(d), step = 3 * width;
  const scores = new Float32Array(length);
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < length; i++) {
      const q = i * step + head * d;
      let most = -Infinity;
      for (let j = 0; j < length; j++) {
        const key = j * step + width + head * d;
        let s = 0;
        for (let c = 0; c < d; c++) s += qkv[q + c] * qkv[key + c];
        scores[j] = s * scale;
        if (scores[j] > most) most = scores[j];
      }
      let total = 0;
      for (let j = 0; j < length; j++) total += scores[j] = Math.exp(scores[j] - most);
      const to = i * width + head * d;
      for (let j = 0; j < length; j++) {
        const share = scores[j] / total, value = j * step + 2 * width + head * d;
        for (let c = 0; c < d; c++) out[to + c] += share * qkv[value + c];
      }
    }
  }
  return out;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** Run the pre-norm blocks of a network over one sequence [L, D], in place; `after` is called with 0 to depth. */
function runBlocks(tensor, name, x, length, { depth, heads, width, eps }, after = () => {}) {
  after(0);
  for (let b = 0; b < depth; b++) {
    const part = (suffix) => tensor(`${name}.${b}.${suffix}`);
    const affine = (input, layer) => linear(input, length, part(`${layer}.weight`), part(`${layer}.bias`));
    const norm = (layer) => layerNorm(x, width, part(`${layer}.weight`), part(`${layer}.bias`), eps);
    add(x, affine(attend(affine(norm("norm1"), "qkv"), length, width, heads), "proj"));
    add(x, affine(gelu(affine(norm("norm2"), "fc1")), "fc2"));
    after(b + 1);
  }
}

/** Return the image [3, h, w] that the networks are given, of bytes [3, h, w]: normalised by channel. */
export function normalise(bytes, { mean, std }) {
  const pixels = bytes.length / 3;
  return Float32Array.from(bytes, (v, i) => {
    const channel = Math.floor(i / pixels);
    return (v / 255 - mean[channel]) / std[channel];
  });
}

/**
 * Return {centre [3], deviation} that `input_norm: image` takes from a normalised image: mean of each channel, and
 * standard deviation of all values plus 0.1. Zeros and one for `none`.
 */
export function imageScale(image, inputNorm) {
  if (inputNorm !== "image") return { centre: [0, 0, 0], deviation: 1 };
  const pixels = image.length / 3;
  const centre = [0, 1, 2].map((c) => image.subarray(c * pixels, (c + 1) * pixels).reduce((s, v) => s + v, 0) / pixels);
  let square = 0;
  for (let i = 0; i < image.length; i++) square += (image[i] - centre[Math.floor(i / pixels)]) ** 2;
  return { centre, deviation: Math.sqrt(square / (image.length - 1)) + 0.1 };
}

/** Return the pixels of patches, without centre and deviation: [3, h, w] -> [patches, 3 * p * p]. */
function patchPixels(image, patches, { centre, deviation }, { grid, patch_size: p }) {
  const [rows, columns] = grid, h = rows * p, w = columns * p;
  const out = new Float32Array(patches.length * 3 * p * p);
  let at = 0;
  for (const patch of patches) {
    const top = Math.floor(patch / columns) * p, left = (patch % columns) * p;
    for (let c = 0; c < 3; c++) {
      for (let y = 0; y < p; y++) {
        for (let x = 0; x < p; x++) {
          out[at++] = (image[c * h * w + (top + y) * w + left + x] - centre[c]) / deviation;
        }
      }
    }
  }
  return out;
}

/**
 * Encode some patches of an image as one set, which attends only to itself.
 *
 * @param page the data of the page
 * @param tensor from `openTensors`
 * @param which "encoder" or "target"
 * @param image [3, h, w] from `normalise`
 * @param patches their numbers in raster order
 * @param layers numbers of the blocks whose outputs are returned; 0 is the input of the first
 * @param final whether the final norm is applied
 * @returns of each layer {prefix: [k, D], patches: [patches, D]}
 */
export function encodeLayers(page, tensor, which, image, patches, layers, final) {
  const shape = page[which], name = shape.tensors, { width } = shape;
  const pixels = patchPixels(image, patches, imageScale(image, shape.input_norm), page);
  const content = linear(pixels, patches.length, tensor(`${name}.patch.weight`), tensor(`${name}.patch.bias`));
  addPositions(content, tensor(`${name}.positions`), patches, width);
  const prefix = tensor(`${name}.prefix`);
  const k = prefix ? prefix.rows : 0;
  const x = new Float32Array((k + patches.length) * width);
  if (prefix) x.set(prefix.data);
  x.set(content, k * width);
  const norm = final && tensor(`${name}.norm.weight`);
  const outputs = new Map();
  runBlocks(tensor, name, x, k + patches.length, shape, (layer) => {
    if (!layers.includes(layer)) return;
    const out = norm ? layerNorm(x, width, norm, tensor(`${name}.norm.bias`), shape.eps) : x.slice();
    outputs.set(layer, { prefix: out.subarray(0, k * width), patches: out.subarray(k * width) });
  });
  return layers.map((layer) => outputs.get(layer));
}

/** Return the last layer of `encodeLayers`, after the final norm. */
export function encode(page, tensor, which, image, patches) {
  return encodeLayers(page, tensor, which, image, patches, [page[which].depth], true)[0];
}

function addPositions(x, table, patches, width) {
  if (!table) return;
  patches.forEach((patch, r) => {
    for (let i = 0; i < width; i++) x[r * width + i] += table.data[patch * width + i];
  });
}

/** Return s_y [N, width of a target]: outputs of the target encoder for the whole image, combined as in training. */
export function targetTokens(page, tensor, image) {
  const { width, norm, layers, final_norm, mean_norm, combine } = page.target;
  const every = Array.from({ length: page.grid[0] * page.grid[1] }, (_, i) => i);
  const normalised = (x, mode) => (mode === "layer" ? layerNorm(x, width, null, null, 1e-5) : x);
  const outputs = encodeLayers(page, tensor, "target", image, every, layers, final_norm).map((x) => normalised(x.patches, norm));
  if (outputs.length === 1) return normalised(outputs[0], mean_norm);
  if (combine === "mean") {
    return normalised(outputs[0].map((_, i) => outputs.reduce((s, x) => s + x[i], 0) / outputs.length), mean_norm);
  }
  const wide = new Float32Array(outputs.length * outputs[0].length);
  every.forEach((r) => outputs.forEach((x, k) => {
    wide.set(x.subarray(r * width, (r + 1) * width), (r * outputs.length + k) * width);
  }));
  return wide;
}

/**
 * Predict one target block from the tokens of the context.
 *
 * @param seen of the context, from `encode`
 * @param context, target numbers of their patches
 * @returns s_hat_y [target, D]
 */
export function predict(page, tensor, seen, context, target) {
  const shape = page.predictor, { width } = shape, outside = page.encoder.width;
  const embed = (x) => linear(x, x.length / outside, tensor("predictor.embed.weight"), tensor("predictor.embed.bias"));
  const known = embed(seen.patches);
  addPositions(known, tensor("predictor.positions"), context, width);
  const mask = tensor("predictor.mask").data;
  const hidden = new Float32Array(target.length * width);
  target.forEach((_, r) => hidden.set(mask, r * width));
  addPositions(hidden, tensor("predictor.positions"), target, width);
  const first = shape.prefix ? embed(seen.prefix) : new Float32Array(0);
  const x = new Float32Array(first.length + known.length + hidden.length);
  x.set(first);
  x.set(known, first.length);
  x.set(hidden, first.length + known.length);
  runBlocks(tensor, "predictor", x, x.length / width, shape);
  const last = x.subarray(first.length + known.length);
  const norm = layerNorm(last, width, tensor("predictor.norm.weight"), tensor("predictor.norm.bias"), shape.eps);
  return linear(norm, target.length, tensor("predictor.out.weight"), tensor("predictor.out.bias"));
}

const DISTANCES = {
  smooth_l1: (e, beta) => (Math.abs(e) < beta ? (e * e) / (2 * beta) : Math.abs(e) - beta / 2),
  l2: (e) => e * e,
  l1: (e) => Math.abs(e),
};

/**
 * Return the energy of a patch: the run's loss between a prediction and a target, without regularisers.
 *
 * @param losses of the page: {name, weight, beta}
 * @param a, b matrices [.., D], and ra, rb the rows to compare
 */
export function energy(losses, a, ra, b, rb, width) {
  let total = 0;
  for (const { name, weight, beta } of losses) {
    let sum = 0;
    if (name === "cosine") {
      sum = width * (1 - cosine(a, ra, b, rb, width));
    } else {
      for (let i = 0; i < width; i++) sum += DISTANCES[name](a[ra * width + i] - b[rb * width + i], beta);
    }
    total += (weight * sum) / width;
  }
  return total;
}

/** Return the cosine between row ra of a and row rb of b. */
export function cosine(a, ra, b, rb, width) {
  let dot = 0, aa = 0, bb = 0;
  for (let i = 0; i < width; i++) {
    const x = a[ra * width + i], y = b[rb * width + i];
    dot += x * y;
    aa += x * x;
    bb += y * y;
  }
  return dot / Math.max(Math.sqrt(aa * bb), 1e-16);
}

/**
 * Draw patches from tokens and noise with the decoder.
 *
 * @param tokens [patches, D], noise [patches, Z]
 * @returns [patches, 3 * p * p], normalised, without the centre and deviation of the image
 */
export function decode(page, tensor, tokens, noise) {
  const { width, noise: z } = page.decoder, count = tokens.length / width;
  const x = new Float32Array(count * (width + z));
  for (let r = 0; r < count; r++) {
    x.set(tokens.subarray(r * width, (r + 1) * width), r * (width + z));
    x.set(noise.subarray(r * z, (r + 1) * z), r * (width + z) + width);
  }
  const layer = (input, name) => linear(input, count, tensor(`decoder.${name}.weight`), tensor(`decoder.${name}.bias`));
  const y = gelu(layer(x, "embed"));
  const norm = layerNorm(y, y.length / count, tensor("decoder.norm.weight"), tensor("decoder.norm.bias"), 1e-5);
  add(y, gelu(layer(norm, "hidden")));
  return layer(y, "out");
}
