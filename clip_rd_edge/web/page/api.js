// What the page asks of the server. A refusal comes as a sentence, which is thrown.
// `clip-rd-edge export --target browser` puts demo/alone/api.js in its place, which does the same without a server.

export class Refusal extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

async function ask(path, body) {
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : { method: "POST", body });
  } catch {
    throw new Refusal(0, "The server does not answer. Is clip-rd-edge demo still running?");
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Refusal(response.status, [content.error ?? `The server said ${response.status}.`, content.hint].filter(Boolean).join(" Hint: "));
  }
  return content;
}

// What there is to choose from, and what the page says of it.
export async function choices() {
  const { bundles, labels } = await ask("api/bundles");
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  const privacy = local
    ? "Pictures go to the program on this machine, and no further; they are not kept."
    : `Pictures go to ${location.host} without encryption, and no further; they are not kept.`;
  return { choices: bundles, labels, privacy };
}

// A camera's frame as `classify` takes it.
export function packed(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

// Labels are sent once and named by a key from then on; null means the bundle's own.
const keys = new Map();

async function keyOf(labels) {
  const text = JSON.stringify(labels);
  if (!keys.has(text)) {
    keys.clear();
    keys.set(text, (await ask("api/labels", text)).key);
  }
  return keys.get(text);
}

// The answer, with the time from picture to answer as `asked_ms`; labels that were new are not counted in it.
export async function classify(bundle, labels, picture) {
  for (let again = 0; ; again++) {
    const key = labels === null ? "" : await keyOf(labels);
    try {
      const began = performance.now();
      const answer = await ask(`api/classify?bundle=${bundle}&labels=${key}`, picture);
      return { ...answer, asked_ms: performance.now() - began };
    } catch (refusal) {
      // The server was started anew, or has forgotten the labels: send them again, once.
      if (refusal.status !== 409 || again) throw refusal;
      keys.clear();
    }
  }
}
