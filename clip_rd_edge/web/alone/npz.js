// numpy's .npz: a zip of .npy files. Reads what write_labels in contract/label_bank.py writes:
// floats, int8 and Unicode text.

// Its arrays by name: { shape, data }, data a Float32Array, an Int8Array or a list of strings.
export async function readNpz(buffer) {
  const view = new DataView(buffer);
  const arrays = {};
  let at = view.byteLength - 22; // the zip's directory is told at its end, before a comment that numpy does not write
  const count = view.getUint16(at + 10, true);
  at = view.getUint32(at + 16, true);
  for (let i = 0; i < count; i++) {
    const nameLength = view.getUint16(at + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, nameLength));
    const size = view.getUint32(at + 20, true);
    const start = contentStart(view, view.getUint32(at + 42, true));
    const content = new Uint8Array(buffer, start, size);
    const packed = view.getUint16(at + 10, true) !== 0;
    arrays[name.replace(/\.npy$/, "")] = readNpy(packed ? await inflate(content) : content.slice().buffer);
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
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
  const long = view.getUint8(6) > 1; // format version 2 and 3 have a longer length
  const start = long ? 12 : 10;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, start, length));
  const type = /'descr': '([^']*)'/.exec(header)[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((each) => each.trim()).map(Number);
  const content = buffer.slice(start + length);
  if (type === "<f4") return { shape, data: new Float32Array(content) };
  if (type === "<f2") return { shape, data: Float32Array.from(new Uint16Array(content), fromHalf) };
  if (type === "|i1") return { shape, data: new Int8Array(content) };
  if (type.startsWith("<U")) return { shape, data: texts(new Uint32Array(content), Number(type.slice(2))) };
  throw new Error(`The label bank has the type ${type}, which this page does not read.`);
}

// The number whose float16 has these bits; not every browser has Float16Array.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// Texts of one length, a number a character, filled up with zeros.
function texts(codes, length) {
  return Array.from({ length: codes.length / length }, (_, i) => {
    const text = codes.subarray(i * length, (i + 1) * length);
    return String.fromCodePoint(...text).replace(/\0+$/, "");
  });
}
