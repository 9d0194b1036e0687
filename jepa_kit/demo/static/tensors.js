/**
 * Tensors of the page: one block of bytes, and an entry for each tensor that says where it is.
 *
 * "i16"  each row is integers times a scale of its own (float32), so that a weight takes two bytes
 * "f32"  float32
 * "u8"   bytes, such as pixels
 */

/** Return the bytes of a base64 text. */
export function fromBase64(text) {
  const binary = atob(text.trim());
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/**
 * Return a function from the name of a tensor to {data, rows, cols}; data is a Uint8Array for "u8", else a Float32Array.
 *
 * @param entries name -> [kind, offset in bytes, rows, cols]
 * @param bytes of all tensors, little-endian, each at a multiple of 4
 */
export function openTensors(entries, bytes) {
  const opened = new Map();
  const read = (name) => {
    const [kind, offset, rows, cols] = entries[name];
    const view = (type, at, length) => new type(bytes.buffer, bytes.byteOffset + at, length);
    if (kind === "u8") return { data: view(Uint8Array, offset, rows * cols), rows, cols };
    if (kind === "f32") return { data: view(Float32Array, offset, rows * cols), rows, cols };
    const scales = view(Float32Array, offset, rows);
    const integers = view(Int16Array, offset + 4 * rows, rows * cols);
    const data = new Float32Array(rows * cols);
    for (let r = 0; r < rows; r++) {
      for (let i = r * cols; i < (r + 1) * cols; i++) data[i] = integers[i] * scales[r];
    }
    return { data, rows, cols };
  };
  return (name) => {
    if (!opened.has(name)) opened.set(name, name in entries ? read(name) : null);
    return opened.get(name);
  };
}
