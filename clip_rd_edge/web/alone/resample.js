// Pillow's antialiased resize, to the last bit: weights in fixed point, columns first, then rows. (From version 13 on
// Pillow takes the rows of some tall pictures first, which rounds otherwise.)
// A canvas scales in another way in each browser, and the model was trained on this one.

const BITS = 22; // of a weight's fraction: a byte times a weight, summed, stays below 2^31

const FILTERS = {
  bicubic: { support: 2, at: bicubic },
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
};

// source: { width, height, rows(top, count) -> RGBA bytes }; gives RGB bytes of width × height.
export function resize(source, width, height, interpolation) {
  const filter = FILTERS[interpolation];
  return resizeRows(resizeColumns(source, width, filter), width, source.height, height, filter);
}

const STRIP = 256; // rows that are in memory at once beside the result: a phone's picture has 200 MB in all

function resizeColumns(source, width, filter) {
  const { starts, counts, weights, stride } = coefficients(source.width, width, filter);
  const result = new Uint8ClampedArray(source.height * width * 3);
  let to = 0;
  for (let top = 0; top < source.height; top += STRIP) {
    const rows = Math.min(STRIP, source.height - top);
    const pixels = source.rows(top, rows);
    for (let row = 0; row < rows; row++) {
      for (let x = 0; x < width; x++, to += 3) {
        let red = 1 << (BITS - 1), green = red, blue = red;
        let from = (row * source.width + starts[x]) * 4;
        const end = x * stride + counts[x];
        for (let k = x * stride; k < end; k++, from += 4) {
          red += pixels[from] * weights[k];
          green += pixels[from + 1] * weights[k];
          blue += pixels[from + 2] * weights[k];
        }
        result[to] = red >> BITS;
        result[to + 1] = green >> BITS;
        result[to + 2] = blue >> BITS;
      }
    }
  }
  return result;
}

function resizeRows(pixels, width, oldHeight, height, filter) {
  if (height === oldHeight) return pixels;
  const { starts, counts, weights, stride } = coefficients(oldHeight, height, filter);
  const line = width * 3;
  const result = new Uint8ClampedArray(height * line);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < line; x++) {
      let sum = 1 << (BITS - 1);
      for (let k = 0; k < counts[y]; k++) sum += pixels[(starts[y] + k) * line + x] * weights[y * stride + k];
      result[y * line + x] = sum >> BITS;
    }
  }
  return result;
}

// For each new pixel: the first old one that it is made of, how many, and their weights.
function coefficients(oldSize, newSize, { support, at }) {
  if (oldSize === newSize) return unchanged(oldSize);
  const scale = oldSize / newSize;
  const blur = Math.max(scale, 1); // more than one old pixel a new one: the filter grows with them
  const reach = support * blur;
  const stride = 2 * Math.ceil(reach) + 1;
  const starts = new Int32Array(newSize), counts = new Int32Array(newSize), weights = new Int32Array(newSize * stride);
  for (let i = 0; i < newSize; i++) {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - reach + 0.5));
    const count = Math.min(oldSize, Math.trunc(centre + reach + 0.5)) - start;
    const inverse = 1 / blur;
    const exact = Array.from({ length: count }, (_, k) => at((k + start - centre + 0.5) * inverse));
    const sum = exact.reduce((total, each) => total + each, 0);
    exact.forEach((each, k) => {
      const fixed = (sum ? each / sum : each) * (1 << BITS);
      weights[i * stride + k] = Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    });
    starts[i] = start;
    counts[i] = count;
  }
  return { starts, counts, weights, stride };
}

function unchanged(size) {
  const starts = Int32Array.from({ length: size }, (_, i) => i);
  return { starts, counts: new Int32Array(size).fill(1), weights: new Int32Array(size).fill(1 << BITS), stride: 1 };
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}
