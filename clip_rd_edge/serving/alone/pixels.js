// From an image to the input of the image tower: the same steps, rounding and names as bundle/preprocess.py.

import { HIDDEN_PIXELS, readsPixels } from "./canvas.js";
import { resize } from "./resample.js";
import { uprightBitmap } from "./upright.js";

const MAX_PIXELS = 52_000_000; // those of sensors with 50 megapixels have up to 50.3 million
const MAX_CANVAS_EDGE = 16_384; // on a longer one, Firefox throws an error, and Chromium draws nothing

// Decodes a file (Blob) or a camera frame (ImageData) to { width, height, rows(top, count) -> RGBA bytes }: upright, with
// transparency on white.
export async function decode(image) {
  if (image instanceof ImageData) {
    const rowBytes = image.width * 4;
    return {
      width: image.width,
      height: image.height,
      rows: (top, count) => image.data.subarray(top * rowBytes, (top + count) * rowBytes),
    };
  }
  if (!readsPixels()) throw new Error(HIDDEN_PIXELS);
  // The model was trained on the values in the file, without a conversion. WebKit makes one all the same.
  const bitmap = await uprightBitmap(image, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("The browser cannot read this file as an image.");
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`The image has ${width} × ${height} pixels; the limit is ${MAX_PIXELS / 1e6} million.`);
  }
  // In parts: some phones do not allow a canvas as large as their own photos.
  return {
    width,
    height,
    rows(top, count) {
      if (width <= MAX_CANVAS_EDGE) return onWhite(bitmap, 0, top, width, count);
      const result = new Uint8ClampedArray(count * width * 4);
      for (let left = 0; left < width; left += MAX_CANVAS_EDGE) {
        const columns = Math.min(MAX_CANVAS_EDGE, width - left);
        const part = onWhite(bitmap, left, top, columns, count);
        for (let row = 0; row < count; row++) {
          result.set(part.subarray(row * columns * 4, (row + 1) * columns * 4), (row * width + left) * 4);
        }
      }
      return result;
    },
  };
}

// The RGBA bytes of a part of a bitmap, on the background for transparent images.
function onWhite(bitmap, left, top, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, left, top, width, height, 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

// The tensor's content, (3, H, W) float32, from a decoded image; spec is the manifest's `preprocessing`.
export function preprocess(source, spec) {
  const [newHeight, newWidth] = spec.size;
  const [width, height] = resizedSize(source, spec);
  const [left, firstColumn, columns] = overlap(width, newWidth);
  const [top, firstRow, rows] = overlap(height, newHeight);
  // Only what the crop keeps is computed: all of a resized strip of 150,000 × 1 pixels would take 22 GB.
  const kept = resize(
    source,
    { size: width, first: firstColumn, count: columns },
    { size: height, first: firstRow, count: rows },
    evaluationInterpolation(spec),
  );
  return normalise(pad(kept, { left, top, columns, rows }, spec), spec);
}

// open_clip hands no interpolation to its resize for `shortest` to a size that is not square, which is then bicubic.
function evaluationInterpolation({ size, resize_mode: mode, interpolation }) {
  return mode === "shortest" && size[0] !== size[1] ? "bicubic" : interpolation;
}

function resizedSize({ width, height }, spec) {
  const [newHeight, newWidth] = spec.size;
  if (spec.resize_mode === "squash") return [newWidth, newHeight];
  if (spec.resize_mode === "shortest" && newHeight === newWidth) {
    // Truncated, not rounded, as in torchvision.
    if (width <= height) return [newWidth, Math.trunc((newWidth * height) / width)];
    return [Math.trunc((newHeight * width) / height), newHeight];
  }
  const choose = spec.resize_mode === "longest" ? Math.max : Math.min;
  const ratio = choose(height / newHeight, width / newWidth);
  return [Math.max(1, roundHalfToEven(width / ratio)), Math.max(1, roundHalfToEven(height / ratio))];
}

// The model's input, (H, W, 3) bytes: the pixels at their place, and the fill colour around them.
function pad(pixels, { left, top, columns, rows }, spec) {
  const [height, width] = spec.size;
  if (columns === width && rows === height) return pixels;
  const result = new Uint8Array(height * width * 3).fill(spec.fill_color);
  for (let y = 0; y < rows; y++) {
    result.set(pixels.subarray(y * columns * 3, (y + 1) * columns * 3), ((top + y) * width + left) * 3);
  }
  return result;
}

// The overlap of two centred intervals of pixels: its start in the new one, its start in the old one, and its length.
function overlap(oldSize, newSize) {
  if (oldSize < newSize) return [Math.floor((newSize - oldSize) / 2), 0, oldSize];
  return [0, roundHalfToEven((oldSize - newSize) / 2), newSize];
}

function normalise(pixels, spec) {
  const { fround } = Math;
  const count = pixels.length / 3;
  const result = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel++) {
    const [mean, std] = [fround(spec.mean[channel]), fround(spec.std[channel])];
    const levels = Float32Array.from({ length: 256 }, (_, level) => fround(fround(level / 255) - mean) / std);
    for (let i = 0; i < count; i++) result[channel * count + i] = levels[pixels[i * 3 + channel]];
  }
  return result;
}

// Rounds as Python's round() does.
function roundHalfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}
