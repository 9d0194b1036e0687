/**
 * What is read off tokens: cosines, nearest patches, principal components as colours.
 *
 * B  images    N  patches of an image    D  width of a token; tokens of an image are a Float32Array [N, D]
 */

/** Return the mean over all rows of all matrices, [D]. */
export function meanToken(matrices, width) {
  const mean = new Float64Array(width);
  let rows = 0;
  for (const x of matrices) {
    for (let i = 0; i < x.length; i++) mean[i % width] += x[i];
    rows += x.length / width;
  }
  return mean.map((v) => v / rows);
}

/** Return the cosines of a token [D] with each row of a matrix, after the subtraction of `centre` from both. */
export function cosines(token, matrix, centre) {
  const width = centre.length, out = new Float32Array(matrix.length / width);
  const direction = Float64Array.from(token, (v, i) => v - centre[i]);
  const length = Math.hypot(...direction);
  for (let r = 0; r < out.length; r++) {
    let dot = 0, square = 0;
    for (let i = 0; i < width; i++) {
      const v = matrix[r * width + i] - centre[i];
      dot += v * direction[i];
      square += v * v;
    }
    out[r] = dot / Math.max(Math.sqrt(square) * length, 1e-12);
  }
  return out;
}

/**
 * Rank all patches of all images by their cosine.
 *
 * @param maps cosines of each image, [B][N]
 * @param image, patch the true one
 * @returns {rank (from 1), total, best: [{image, patch, value}] (of each image its best patch, most similar first)}
 */
export function rankPatches(maps, image, patch) {
  const own = maps[image][patch];
  let rank = 1, total = 0;
  const best = maps.map((map, i) => {
    let at = 0;
    map.forEach((v, k) => {
      if (v > own) rank++;
      if (v > map[at]) at = k;
    });
    total += map.length;
    return { image: i, patch: at, value: map[at] };
  });
  best.sort((a, b) => b.value - a.value);
  return { rank, total, best };
}

/** Return the `count` most similar patches of all images, without one of them. */
export function nearestPatches(maps, count, { image, patch }) {
  const all = maps.flatMap((map, i) => Array.from(map, (value, k) => ({ image: i, patch: k, value })));
  return all
    .filter((p) => p.image !== image || p.patch !== patch)
    .sort((a, b) => b.value - a.value)
    .slice(0, count);
}

const STEPS = 60;

/**
 * Return the first three principal components of all rows of matrices, by orthogonal iteration.
 *
 * @returns {mean [D], axes: 3 x [D], of unit length, explained: fraction of the variance, low, high: [3]}; `low` and
 *   `high` are the 1st and 99th percentile of each component
 */
export function principalComponents(matrices, width) {
  const mean = meanToken(matrices, width);
  const covariance = new Float64Array(width * width);
  let variance = 0;
  const row = new Float64Array(width);
  for (const x of matrices) {
    for (let at = 0; at < x.length; at += width) {
      for (let i = 0; i < width; i++) row[i] = x[at + i] - mean[i];
      for (let i = 0; i < width; i++) {
        variance += row[i] * row[i];
        for (let j = 0; j <= i; j++) covariance[i * width + j] += row[i] * row[j];
      }
    }
  }
  for (let i = 0; i < width; i++) {
    for (let j = i + 1; j < width; j++) covariance[i * width + j] = covariance[j * width + i];
  }
  let axes = [0, 1, 2].map((k) => Float64Array.from({ length: width }, (_, i) => Math.sin((i + 1) * (k + 1) * 1.7)));
  let values = [0, 0, 0];
  for (let step = 0; step < STEPS; step++) {
    axes = axes.map((axis) => {
      const out = new Float64Array(width);
      for (let i = 0; i < width; i++) {
        let s = 0;
        for (let j = 0; j < width; j++) s += covariance[i * width + j] * axis[j];
        out[i] = s;
      }
      return out;
    });
    values = axes.map((axis, k) => { // Gram-Schmidt
      for (let before = 0; before < k; before++) {
        const dot = axis.reduce((s, v, i) => s + v * axes[before][i], 0);
        for (let i = 0; i < width; i++) axis[i] -= dot * axes[before][i];
      }
      const length = Math.hypot(...axis);
      for (let i = 0; i < width; i++) axis[i] /= Math.max(length, 1e-300);
      return length;
    });
  }
  for (const axis of axes) { // the largest weight is positive, as in jepa_kit/evaluation/pictures/panels.py
    const top = axis.reduce((best, v) => (Math.abs(v) > Math.abs(best) ? v : best), 0);
    if (top < 0) axis.forEach((v, i) => (axis[i] = -v));
  }
  const found = { mean, axes, explained: values.reduce((s, v) => s + v, 0) / Math.max(variance, 1e-300) };
  const projected = matrices.flatMap((x) => Array.from({ length: x.length / width }, (_, r) => project(found, x, r)));
  const range = [0, 1, 2].map((k) => projected.map((p) => p[k]).sort((a, b) => a - b));
  const at = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];
  return { ...found, low: range.map((s) => at(s, 0.01)), high: range.map((s) => at(s, 0.99)) };
}

/** Return the three components of row r of a matrix. */
function project({ mean, axes }, x, r) {
  const width = mean.length;
  return axes.map((axis) => {
    let s = 0;
    for (let i = 0; i < width; i++) s += (x[r * width + i] - mean[i]) * axis[i];
    return s;
  });
}

/** Return the colour [r, g, b], 0 to 255, of row r of a matrix: its components within their range. */
export function componentColour(components, x, r) {
  const { low, high } = components;
  return project(components, x, r).map((v, k) => {
    const share = (v - low[k]) / Math.max(high[k] - low[k], 1e-12);
    return Math.round(255 * Math.min(Math.max(share, 0), 1));
  });
}
