// Reads numpy's .npz, a zip of .npy files, as a bundle has them: floats, integers, booleans and Unicode text.

// Returns the arrays by name: { shape, data }, with data an array of numbers of its type, or of strings.
export async function readNpz(buffer) {
  const view = new DataView(buffer);
  const arrays = {};
  let offset = view.byteLength - 22; // the end-of-directory record; numpy writes no comment after it
  const count = view.getUint16(offset + 10, true);
  offset = view.getUint32(offset + 16, true);
  for (let i = 0; i < count; i++) {
    const nameLength = view.getUint16(offset + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, offset + 46, nameLength));
    const size = view.getUint32(offset + 20, true);
    const start = contentStart(view, view.getUint32(offset + 42, true));
    const content = new Uint8Array(buffer, start, size);
    const compressed = view.getUint16(offset + 10, true) !== 0;
    arrays[name.replace(/\.npy$/, "")] = readNpy(compressed ? await inflate(content) : content.slice().buffer);
    offset += 46 + nameLength + view.getUint16(offset + 30, true) + view.getUint16(offset + 32, true);
  }
  return arrays;
}

function contentStart(view, header) {
  return header + 30 + view.getUint16(header + 26, true) + view.getUint16(header + 28, true);
}

function inflate(content) {
  const stream = new Blob([content]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}

function readNpy(buffer) {
  const view = new DataView(buffer);
  const start = 10; // that of format version 1: only arrays with thousands of fields have another
  const length = view.getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, start, length));
  const dtype = /'descr': '([^']*)'/.exec(header)[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((text) => text.trim()).map(Number);
  const content = buffer.slice(start + length);
  if (dtype === "<f4") return { shape, data: new Float32Array(content) };
  if (dtype === "<f2") return { shape, data: Float32Array.from(new Uint16Array(content), fromHalf) };
  const type = { "|i1": Int8Array, "|u1": Uint8Array, "|b1": Uint8Array, "<i4": Int32Array }[dtype];
  if (type) return { shape, data: new type(content) };
  if (dtype.startsWith("<U")) return { shape, data: strings(new Uint32Array(content), Number(dtype.slice(2))) };
  throw new Error(`The labels in the bundle have the dtype ${dtype}, which this page cannot read.`);
}

// The value of a float16 with these bits; not every browser has Float16Array.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// Strings of a fixed length, one code point per number, padded with zeros.
function strings(codes, length) {
  return Array.from({ length: codes.length / length }, (_, i) => {
    const text = codes.subarray(i * length, (i + 1) * length);
    return String.fromCodePoint(...text).replace(/\0+$/, "");
  });
}
