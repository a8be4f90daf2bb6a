// The page's requests, answered in the browser itself: the counterpart of serving/page/api.js, which asks a server.

import { prompts } from "./clean.js";

const MAX_THREADS = 4; // more are no faster for a single small image
const bundle = new URL("bundle/", import.meta.url).href;
const threads = crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
// A module with one function that uses SIMD: `(func (result v128) (i8x16.splat (i32.const 0)))`.
const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11]);
const NO_SIMD =
  "This browser, or its security mode, does not run WebAssembly with SIMD: make an exception for this page, or use another browser.";
const COPY_AGAIN = "copy the exported folder to it again, if a file is missing there or was cut off.";
const backends = []; // in the order of the page's rows
let manifest;

// The backends to choose from, and the texts that the page shows; showProgress(message) is called while loading.
export async function loadChoices(showProgress) {
  if (!globalThis.WebAssembly?.validate(SIMD)) throw new Error(NO_SIMD);
  manifest = await readJson(new URL("manifest.json", bundle));
  const sizes = await readJson(new URL("sizes.json", import.meta.url));
  backends.push(new Backend("wasm"));
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null); // browsers with WebGPU switched off may throw
  if (adapter) backends.push(new Backend("webgpu"));
  const onBytes = (loaded) => showProgress(`Loading: ${megabytes(loaded)} of ${megabytes(sizes.loaded)} MB.`);
  const bank = await backends[0].call("bankSize", undefined, onBytes);
  const info = { name: manifest.name, precision: manifest.precision, size_bytes: sizes.bundle, bank, texts: manifest.text !== null };
  const names = { wasm: `WASM, ${threads} thread${threads > 1 ? "s" : ""}`, webgpu: "WebGPU" };
  return {
    choices: backends.map(({ name }) => ({ ...info, folder: names[name] })),
    labels: [],
    heading: "backend",
    privacy: "Images and labels stay in this browser.",
    note: crossOriginIsolated ? "" : "Only one thread: the server does not send the headers for multithreading.",
  };
}

export const teaches = true;
export const taughtUrl = null; // what is taught stays in this browser

// The result, with the time from the image to the result as `elapsed_ms`; embedding new labels is not included.
// taught: what results had as `embedding`, by label that their images teach, or undefined.
export async function classify(choice, labels, image, taught) {
  const backend = backends[choice];
  await backend.setLabels(labels, taught);
  const started = performance.now();
  const result = await backend.call("classify", { image });
  const embedding = modelKey() + btoa(String.fromCharCode(...new Uint8Array(result.embedding.buffer)));
  return { ...result, embedding, elapsed_ms: performance.now() - started };
}

const modelKey = () => `${manifest.files[manifest.image.file].slice(0, 8)}:`;

function decoded(embedding) {
  if (embedding.startsWith(modelKey())) {
    const bytes = Uint8Array.from(atob(embedding.slice(modelKey().length)), (character) => character.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }
  const message = "The page was exported anew: what the old one was taught has been forgotten. Teach it again.";
  throw Object.assign(new Error(message), { status: 412 });
}

// A camera frame in the form that `classify` takes.
export async function encodeFrame(canvas) {
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
}

// A worker that runs the model, started when it is first called. name: "wasm" or "webgpu".
class Backend {
  constructor(name) {
    this.name = name;
    this.pending = new Map(); // unanswered calls by id: [resolve, reject]
    this.lastId = 0;
  }

  async setLabels(labels, taught) {
    const text = JSON.stringify([labels, taught]);
    if (text === this.labels) return;
    const entries = taught && Object.entries(taught).map(([label, rows]) => [label, rows.map(decoded)]);
    const images = entries && Object.fromEntries(entries);
    const promptLists = labels?.map((label) => prompts(label, manifest.templates, manifest.tokenizer.clean));
    this.labels = text; // set before the call returns: later calls run after it
    await this.call("setLabels", { labels, promptLists, images }).catch((error) => {
      this.labels = undefined;
      throw error;
    });
  }

  async call(method, argument, onBytes) {
    await this.#open(onBytes);
    return this.#send(method, argument);
  }

  #open(onBytes = () => {}) {
    this.opened ??= this.#start(onBytes).catch((error) => {
      this.opened = undefined;
      this.worker.terminate();
      throw error;
    });
    return this.opened;
  }

  #start(onBytes) {
    // A worker from a blob inherits the page's Content-Security-Policy; one loaded from a file would have none.
    const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
    this.worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
    let loaded = 0;
    this.worker.addEventListener("message", ({ data }) => {
      if (data.bytes) {
        onBytes((loaded += data.bytes));
        return;
      }
      const [resolve, reject] = this.pending.get(data.id);
      this.pending.delete(data.id);
      if (data.error === undefined) resolve(data.result);
      else reject(new Error(data.error));
    });
    this.worker.addEventListener("error", (event) => {
      const error = new Error(event.message || `The model could not be started: ${COPY_AGAIN}`);
      for (const [, reject] of this.pending.values()) reject(error);
      this.pending.clear();
    });
    return this.#send("open", { backend: this.name, bundle, manifest, threads }).then(() => (onBytes = () => {}));
  }

  #send(method, argument) {
    const id = ++this.lastId;
    return new Promise((resolve, reject) => {
      this.pending.set(id, [resolve, reject]);
      this.worker.postMessage({ id, method, argument });
    });
  }
}

// The browser may have kept a file of an earlier export, so it asks the server whether it is still the same.
async function readJson(url) {
  const content = await fetch(url, { cache: "no-cache" }).then((response) => response.ok && response.json()).catch(() => null);
  if (!content) throw new Error(`${url.pathname.split("/").at(-1)} could not be loaded from the server: ${COPY_AGAIN}`);
  return content;
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
