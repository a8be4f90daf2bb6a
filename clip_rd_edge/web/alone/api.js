// What the page asks for, answered in the browser itself: the counterpart of demo/page/api.js, which asks a server.

import { prompts } from "./clean.js";

const MOST_THREADS = 4; // more are no faster for one small picture
const bundle = new URL("bundle/", import.meta.url).href;
const threads = crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
const backends = []; // each { backend, worker }, in the order of the page's rows
let manifest;

// What there is to choose from, here what the model runs on; said(sentence) is called while it loads.
export async function choices(said) {
  manifest = await (await fetch(new URL("manifest.json", bundle))).json();
  const sizes = await (await fetch(new URL("sizes.json", import.meta.url))).json();
  backends.push(new Backend("wasm"));
  if (await navigator.gpu?.requestAdapter()) backends.push(new Backend("webgpu"));
  const bank = await backends[0].ask("bankSize", undefined, (read) => said(`Loading, ${megabytes(read)} of ${megabytes(sizes.loaded)} MB.`));
  const facts = { name: manifest.name, precision: manifest.precision, size_bytes: sizes.bundle, bank };
  const shown = { wasm: `WASM, ${threads} thread${threads > 1 ? "s" : ""}`, webgpu: "WebGPU" };
  return {
    choices: backends.map(({ backend }) => ({ ...facts, folder: shown[backend] })),
    labels: [],
    what: "runs on",
    privacy: "Pictures and labels stay in this browser.",
    note: crossOriginIsolated ? "" : "One thread only: the server does not send the headers that threads need.",
  };
}

// The answer, with the time from picture to answer as `asked_ms`; labels that were new are not counted in it.
export async function classify(choice, labels, picture) {
  const backend = backends[choice];
  await backend.setLabels(labels);
  const began = performance.now();
  const answer = await backend.ask("classify", { picture });
  return { ...answer, asked_ms: performance.now() - began };
}

// A camera's frame as `classify` takes it.
export async function packed(canvas) {
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
}

class Backend {
  constructor(backend) {
    this.backend = backend;
    this.waiting = new Map(); // by number, what was asked and is not answered
    this.asked = 0;
  }

  async setLabels(labels) {
    const text = JSON.stringify(labels);
    if (text === this.labels) return;
    const each = labels?.map((label) => prompts(label, manifest.templates, manifest.tokenizer.clean));
    this.labels = text; // before it is answered: what is asked next comes after it
    await this.ask("setLabels", { labels, prompts: each }).catch((error) => {
      this.labels = undefined;
      throw error;
    });
  }

  async ask(name, argument, loading) {
    await this.#open(loading);
    return this.#send(name, argument);
  }

  #open(loading = () => {}) {
    this.opened ??= this.#start(loading).catch((error) => {
      this.opened = undefined;
      this.worker.terminate();
      throw error;
    });
    return this.opened;
  }

  #start(loading) {
    // By way of a blob, whose worker keeps the page's Content-Security-Policy; a file's worker would have none.
    const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
    this.worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
    let read = 0;
    this.worker.addEventListener("message", ({ data }) => {
      if (data.read) {
        loading((read += data.read));
        return;
      }
      const [resolve, reject] = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.error === undefined) resolve(data.result);
      else reject(new Error(data.error));
    });
    this.worker.addEventListener("error", (event) => {
      for (const [, reject] of this.waiting.values()) reject(new Error(event.message || "The model cannot be started."));
      this.waiting.clear();
    });
    return this.#send("open", { backend: this.backend, bundle, threads }).then(() => (loading = () => {}));
  }

  #send(name, argument) {
    const id = ++this.asked;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, [resolve, reject]);
      this.worker.postMessage({ id, name, argument });
    });
  }
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
