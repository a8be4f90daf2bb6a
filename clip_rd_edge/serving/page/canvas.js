// Whether this browser lets pages read pixels. With Firefox's resistFingerprinting, which Tor Browser, LibreWolf and others
// set, pages get random ones, which they would classify.

export const HIDDEN_PIXELS =
  "This browser hides the pixels of images from pages, against fingerprinting: make an exception for this page, or use another browser.";
const COLOURS = [[200, 40, 120, 255], [30, 160, 90, 255], [240, 210, 20, 255], [90, 70, 180, 255]]; // of one column each
const ROWS = 16;
const TOLERANCE = 16; // levels; other protections change some pixels by a few, and hardly an answer

export function readsPixels() {
  const context = new OffscreenCanvas(COLOURS.length, ROWS).getContext("2d", { willReadFrequently: true });
  COLOURS.forEach(([red, green, blue], column) => {
    context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
    context.fillRect(column, 0, 1, ROWS);
  });
  const expected = COLOURS.flat(); // a row
  const { data } = context.getImageData(0, 0, COLOURS.length, ROWS);
  return data.every((level, i) => Math.abs(level - expected[i % expected.length]) <= TOLERANCE);
}
