// Pillow's antialiased resize, bit-exact: fixed-point weights, columns first, then rows. (From version 13 on, Pillow
// resizes the rows of some tall images first, which rounds differently.)
// A canvas would not do: each browser scales differently, and the model was trained with Pillow's filter.

const FRACTION_BITS = 22; // of a weight: the weighted sum of bytes stays below 2^31

const FILTERS = {
  bicubic: { support: 2, weight: bicubic },
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
};

// source: { width, height, rows(top, count) -> RGBA bytes }. columns, rows: { size, first, count }, the length of an edge
// after resizing, and the part of it to compute. Returns columns.count × rows.count RGB bytes.
export function resize(source, columns, rows, interpolation) {
  const filter = FILTERS[interpolation];
  return resizeRows(resizeColumns(source, columns, filter), columns.count, source.height, rows, filter);
}

const STRIP_ROWS = 256; // source rows in memory at once: a whole phone photo would take 200 MB

function resizeColumns(source, columns, filter) {
  const width = columns.count;
  const { starts, counts, weights, stride } = coefficients(source.width, columns, filter);
  const result = new Uint8ClampedArray(source.height * width * 3);
  let target = 0;
  for (let top = 0; top < source.height; top += STRIP_ROWS) {
    const rows = Math.min(STRIP_ROWS, source.height - top);
    const pixels = source.rows(top, rows);
    for (let row = 0; row < rows; row++) {
      for (let x = 0; x < width; x++, target += 3) {
        let red = 1 << (FRACTION_BITS - 1), green = red, blue = red;
        let offset = (row * source.width + starts[x]) * 4;
        const end = x * stride + counts[x];
        for (let k = x * stride; k < end; k++, offset += 4) {
          red += pixels[offset] * weights[k];
          green += pixels[offset + 1] * weights[k];
          blue += pixels[offset + 2] * weights[k];
        }
        result[target] = red >> FRACTION_BITS;
        result[target + 1] = green >> FRACTION_BITS;
        result[target + 2] = blue >> FRACTION_BITS;
      }
    }
  }
  return result;
}

function resizeRows(pixels, width, oldHeight, rows, filter) {
  const height = rows.count;
  if (height === oldHeight && rows.size === oldHeight) return pixels;
  const { starts, counts, weights, stride } = coefficients(oldHeight, rows, filter);
  const rowBytes = width * 3;
  const result = new Uint8ClampedArray(height * rowBytes);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < rowBytes; x++) {
      let sum = 1 << (FRACTION_BITS - 1);
      for (let k = 0; k < counts[y]; k++) sum += pixels[(starts[y] + k) * rowBytes + x] * weights[y * stride + k];
      result[y * rowBytes + x] = sum >> FRACTION_BITS;
    }
  }
  return result;
}

// For each new pixel to compute: the first old pixel that contributes to it, their number, and their weights.
function coefficients(oldSize, { size, first, count: newCount }, { support, weight }) {
  if (oldSize === size) return identity(first, newCount);
  const scale = oldSize / size;
  const filterScale = Math.max(scale, 1); // when downscaling, the filter widens with the scale
  const radius = support * filterScale;
  const stride = 2 * Math.ceil(radius) + 1;
  const starts = new Int32Array(newCount), counts = new Int32Array(newCount), weights = new Int32Array(newCount * stride);
  for (let i = 0; i < newCount; i++) {
    const centre = (first + i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - radius + 0.5));
    const count = Math.min(oldSize, Math.trunc(centre + radius + 0.5)) - start;
    const inverse = 1 / filterScale;
    const exact = Array.from({ length: count }, (_, k) => weight((k + start - centre + 0.5) * inverse));
    const sum = exact.reduce((total, value) => total + value, 0);
    exact.forEach((value, k) => {
      const fixed = (sum ? value / sum : value) * (1 << FRACTION_BITS);
      weights[i * stride + k] = Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    });
    starts[i] = start;
    counts[i] = count;
  }
  return { starts, counts, weights, stride };
}

function identity(first, count) {
  const starts = Int32Array.from({ length: count }, (_, i) => first + i);
  const weights = new Int32Array(count).fill(1 << FRACTION_BITS);
  return { starts, counts: new Int32Array(count).fill(1), weights, stride: 1 };
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}
