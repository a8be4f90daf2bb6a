// The page's requests to the demo's server.
// `clip-rd-edge export --target browser` replaces this file with serving/alone/api.js, which needs no server.

export class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// By status: what visitors of the page can do. The server's own messages are for the person who runs it.
const MESSAGES = {
  400: "This image cannot be read. Choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF of at most 52 megapixels.",
  403: "The server does not accept this address. Open the page under the address that clip-rd-edge demo printed.",
  408: "The image took too long to arrive. Try it again, or choose a smaller one.",
  410: "This bundle was removed or exported anew, or the server now has others. Choose another one, or reload the page.",
  412: "The bundle was exported anew: what the old one was taught has been forgotten. Teach it again.",
  413: "This image is too large. Choose one of at most 25 MB.",
  422: "These labels cannot be used: at most 2,000 labels of at most 300 characters each, and some 1,400 images.",
  429: "The server is busy. Try again in a moment.",
  500: "The model failed. The terminal where clip-rd-edge demo runs shows why.",
};

const NO_RESPONSE = "The server does not respond. Is clip-rd-edge demo still running?";
const GONE = [404, 502, 503, 504]; // says what stands before the server, or in its place
const ANOTHER_PAGE = "Something else answered in place of the server, such as a page to log in. Reload this page.";
const LIMIT_OF_OTHERS =
  "What stands before the server takes no image of this size. Choose a smaller one, or raise its limit to 25 MB " +
  "(nginx: client_max_body_size).";

async function request(path, body) {
  const response = await fetch(path, body === undefined ? {} : { method: "POST", body }).catch(() => null);
  if (!response || GONE.includes(response.status)) throw new RequestError(0, NO_RESPONSE);
  if (!response.headers.get("Content-Type")?.startsWith("application/json")) {
    throw new RequestError(0, response.status === 413 ? LIMIT_OF_OTHERS : ANOTHER_PAGE);
  }
  if (!response.ok) throw new RequestError(response.status, MESSAGES[response.status] ?? MESSAGES[500]);
  return response.json().catch(() => {
    throw new RequestError(0, NO_RESPONSE); // it was cut off
  });
}

let names = []; // of the bundles: a server that is started again may have others under their numbers

// The bundles to choose from, and the texts that the page shows about them.
export async function loadChoices() {
  const { bundles, labels } = await request("api/bundles");
  names = bundles.map(({ folder }) => folder);
  const encrypted = location.protocol === "https:"; // by a proxy before the server
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  const privacy = local
    ? "Images are sent only to the program on this machine and are not stored."
    : `Images are sent${encrypted ? "" : " unencrypted"} to ${location.host}, only there, and are not stored.`;
  return { choices: bundles, labels, privacy };
}

// A camera frame in the form that `classify` takes.
export function encodeFrame(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

// Labels are sent once; later requests refer to them by key. null means the bundle's own labels.
const keys = new Map();

async function labelKey(labels, taught) {
  const text = JSON.stringify(taught ? { labels, taught } : labels);
  if (!keys.has(text)) {
    keys.clear();
    keys.set(text, (await request("api/labels", text)).key);
  }
  return keys.get(text);
}

// Whether images can teach labels here.
export const teaches = true;

// Where what was taught is downloaded, for clip-rd-edge teach.
export async function taughtUrl(bundle, labels, taught) {
  keys.clear(); // sent again: nobody sees a download fail because the server was started again
  return `api/taught.npz?${new URLSearchParams({ bundle, name: names[bundle], labels: await labelKey(labels, taught) })}`;
}

// The server's response, with the time of the request as `elapsed_ms`, without that to send and embed new labels.
// taught: the embeddings of images by label, or undefined; embedding: whether the response has the image's.
export async function classify(bundle, labels, image, taught, embedding = false) {
  for (let attempt = 0; ; attempt++) {
    const key = labels === null ? "" : await labelKey(labels, taught);
    const query = new URLSearchParams({ bundle, name: names[bundle], labels: key });
    if (embedding) query.set("embedding", "1");
    try {
      const started = performance.now();
      const result = await request(`api/classify?${query}`, image);
      return { ...result, elapsed_ms: performance.now() - started - result.labels_ms };
    } catch (error) {
      // The server was restarted or has dropped the labels: send them again, once.
      if (error.status !== 409 || attempt) throw error;
      keys.clear();
    }
  }
}
