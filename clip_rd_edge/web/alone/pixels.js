// From a picture to what the image tower takes; the same steps, roundings and names as contract/preprocess.py.

import { resize } from "./resample.js";

const MAX_PIXELS = 50_000_000; // a phone's camera has up to that

// A file (Blob) or a camera's frame (ImageData) as { width, height, rows(top, count) -> RGBA bytes }: upright, on white.
export async function decode(picture) {
  if (picture instanceof ImageData) {
    const line = picture.width * 4;
    return {
      width: picture.width,
      height: picture.height,
      rows: (top, count) => picture.data.subarray(top * line, (top + count) * line),
    };
  }
  const bitmap = await createImageBitmap(picture, {
    imageOrientation: "from-image", // as its EXIF says
    colorSpaceConversion: "none", // the model was trained on the bytes as they are in the file
  }).catch(() => {
    throw new Error("This is no picture that the browser can read.");
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`The picture has ${width} × ${height} pixels; at most ${MAX_PIXELS / 1e6} million are read.`);
  }
  // Strip by strip: a canvas as large as a phone's picture is more than some phones allow.
  return {
    width,
    height,
    rows(top, count) {
      const context = new OffscreenCanvas(width, count).getContext("2d", { willReadFrequently: true });
      context.fillStyle = "#fff"; // what a transparent picture is laid on
      context.fillRect(0, 0, width, count);
      context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
      return context.getImageData(0, 0, width, count).data;
    },
  };
}

// The tensor's content, (3, height, width) float32, of a decoded picture.
export function preprocess(source, how) {
  const [width, height] = resized(source, how);
  const pixels = resize(source, width, height, how.interpolation);
  return normalise(centre(pixels, width, height, how), how);
}

function resized({ width, height }, how) {
  const [newHeight, newWidth] = how.size;
  if (how.resize_mode === "squash") return [newWidth, newHeight];
  if (how.resize_mode === "shortest" && newHeight === newWidth) {
    // Cut, not rounded, as torchvision does.
    if (width <= height) return [newWidth, Math.trunc((newWidth * height) / width)];
    return [Math.trunc((newHeight * width) / height), newHeight];
  }
  const either = how.resize_mode === "longest" ? Math.max : Math.min;
  const ratio = either(height / newHeight, width / newWidth);
  return [halfToEven(width / ratio), halfToEven(height / ratio)];
}

// The middle, (height, width, 3) bytes, with the fill colour where the picture is smaller.
function centre(pixels, width, height, how) {
  const [newHeight, newWidth] = how.size;
  const result = new Uint8Array(newHeight * newWidth * 3).fill(how.fill_color);
  const [left, from, columns] = overlap(width, newWidth);
  const [top, fromRow, rows] = overlap(height, newHeight);
  for (let y = 0; y < rows; y++) {
    const start = ((fromRow + y) * width + from) * 3;
    result.set(pixels.subarray(start, start + columns * 3), ((top + y) * newWidth + left) * 3);
  }
  return result;
}

// Where in the new line the old one starts, where in the old one that is, and how many pixels they share.
function overlap(old, size) {
  if (old < size) return [Math.floor((size - old) / 2), 0, old];
  return [0, halfToEven((old - size) / 2), size];
}

function normalise(pixels, how) {
  const { fround } = Math;
  const count = pixels.length / 3;
  const result = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel++) {
    const [mean, std] = [fround(how.mean[channel]), fround(how.std[channel])];
    const levels = Float32Array.from({ length: 256 }, (_, level) => fround(fround(level / 255) - mean) / std);
    for (let i = 0; i < count; i++) result[channel * count + i] = levels[pixels[i * 3 + channel]];
  }
  return result;
}

// Python's round().
function halfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}
