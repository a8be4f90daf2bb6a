// Decodes image files upright, as their EXIF says. Browsers do that by themselves, but Chromium does not for WebP, nor do
// Firefox and WebKit for PNG.

// The formats that some browsers do not turn: the start of a file, the place of its first chunk, and what the chunk at a
// place is. `probe` is an image of 2 × 1 pixels whose EXIF has orientation 6, which makes it 1 × 2.
const FORMATS = [
  {
    start: /^RIFF.{4}WEBP/s,
    first: 12,
    chunk(view, place) {
      const length = view.getUint32(place + 4, true);
      return { type: text(view, place), length, next: place + 8 + length + (length % 2) };
    },
    probe: "UklGRk4AAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TA4AAAAvAQAAAAcQEf0PRET/A0VYSUYaAAAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA=",
  },
  {
    start: /^\x89PNG/,
    first: 8,
    chunk(view, place) {
      const length = view.getUint32(place);
      return { type: text(view, place + 4), length, next: place + 12 + length };
    },
    probe: "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABAQAAAADcWUInAAAAGmVYSWZNTQAqAAAACAABARIAAwAAAAEABgAAAAAAANZnS2kAAAAKSURBVHjaY2AAAAACAAHlJ978AAAAAElFTkSuQmCC",
  },
];
// By orientation: the transform of a canvas that turns an image of the given size upright.
const TURNS = {
  2: (width) => [-1, 0, 0, 1, width, 0],
  3: (width, height) => [-1, 0, 0, -1, width, height],
  4: (width, height) => [1, 0, 0, -1, 0, height],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (width, height) => [0, 1, -1, 0, height, 0],
  7: (width, height) => [0, -1, -1, 0, height, width],
  8: (width) => [0, -1, 1, 0, 0, width],
};
const browserTurns = new Map(); // by format: a promise of whether this browser turns it by itself

// The bitmap of a file (Blob), with the options of `createImageBitmap`, which reports what it cannot read.
export async function uprightBitmap(file, options = {}) {
  // Without `imageOrientation`: upright is its default, under names that differ, and browsers refuse names they lack.
  const bitmap = await createImageBitmap(file, options);
  const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  const format = FORMATS.find(({ start }) => start.test(head));
  if (!format || (await turnsByItself(format))) return bitmap;
  const turn = TURNS[orientation(new DataView(await file.arrayBuffer()), format)];
  return turn ? turned(bitmap, turn) : bitmap;
}

function turnsByItself(format) {
  if (!browserTurns.has(format)) {
    const probe = Uint8Array.from(atob(format.probe), (character) => character.charCodeAt(0));
    browserTurns.set(format, createImageBitmap(new Blob([probe])).then(({ height }) => height === 2));
  }
  return browserTurns.get(format);
}

function turned(bitmap, turn) {
  const { width, height } = bitmap;
  const transform = turn(width, height);
  const canvas = transform[0] ? new OffscreenCanvas(width, height) : new OffscreenCanvas(height, width);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.setTransform(...transform);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}

// The orientation in the EXIF data of a file; undefined without one.
function orientation(view, { first, chunk }) {
  try {
    for (let place = first; place < view.byteLength; ) {
      const { type, length, next } = chunk(view, place);
      if (type.toUpperCase() === "EXIF") return exifOrientation(new DataView(view.buffer, place + 8, length));
      place = next;
    }
  } catch {
    // damaged, so that there is no orientation
  }
  return undefined;
}

function exifOrientation(view) {
  const start = text(view, 0) === "Exif" ? 6 : 0; // some programs write the header of JPEG's EXIF
  const little = view.getUint16(start) === 0x4949;
  const directory = start + view.getUint32(start + 4, little);
  for (let i = view.getUint16(directory, little), entry = directory + 2; i > 0; i--, entry += 12) {
    if (view.getUint16(entry, little) !== 0x0112) continue;
    const isLong = view.getUint16(entry + 2, little) === 4; // it should be short
    return isLong ? view.getUint32(entry + 8, little) : view.getUint16(entry + 8, little);
  }
  return undefined;
}

function text(view, start) {
  return String.fromCharCode(...Array.from({ length: 4 }, (_, i) => view.getUint8(start + i)));
}
