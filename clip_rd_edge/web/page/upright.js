// Decodes image files upright, as their EXIF says. Browsers do that by themselves, but Chromium does not for WebP.

// A WebP of 2 × 1 pixels whose EXIF has orientation 6, which makes it 1 × 2.
const PROBE = "UklGRk4AAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TA4AAAAvAQAAAAcQEf0PRET/A0VYSUYaAAAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA=";
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
let browserTurns; // a promise of whether this browser turns WebP by itself

// The bitmap of a file (Blob), with the options of `createImageBitmap`, which reports what it cannot read.
export async function uprightBitmap(file, options = {}) {
  // Without `imageOrientation`: upright is the default under each of its names, and browsers refuse names that they lack.
  const bitmap = await createImageBitmap(file, options);
  const turn = TURNS[await webpOrientation(file)];
  if (!turn) return bitmap;
  const probe = Uint8Array.from(atob(PROBE), (character) => character.charCodeAt(0));
  browserTurns ??= createImageBitmap(new Blob([probe])).then(({ height }) => height === 2);
  return (await browserTurns) ? bitmap : turned(bitmap, turn);
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

// The orientation in the EXIF data of a WebP file; undefined for other files, and for those without one.
async function webpOrientation(file) {
  const view = async (start, length) => new DataView(await file.slice(start, start + length).arrayBuffer());
  const head = await view(0, 12);
  if (head.byteLength < 12 || text(head, 0) !== "RIFF" || text(head, 8) !== "WEBP") return undefined;
  for (let start = 12; start + 8 <= file.size; ) {
    const chunk = await view(start, 8);
    const length = chunk.getUint32(4, true);
    if (text(chunk, 0) === "EXIF") return exifOrientation(await view(start + 8, length));
    start += 8 + length + (length % 2);
  }
  return undefined;
}

function exifOrientation(view) {
  try {
    const start = text(view, 0) === "Exif" ? 6 : 0; // some programs write the header of JPEG's EXIF
    const little = view.getUint16(start) === 0x4949;
    const directory = start + view.getUint32(start + 4, little);
    for (let i = view.getUint16(directory, little), entry = directory + 2; i > 0; i--, entry += 12) {
      if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
    }
  } catch {
    // damaged, so that there is no orientation
  }
  return undefined;
}

function text(view, start) {
  return String.fromCharCode(...Array.from({ length: 4 }, (_, i) => view.getUint8(start + i)));
}
