// A bundle's towers in onnxruntime-web, and its tokenizer and label bank.

import { decode, preprocess } from "./pixels.js";
import { readNpz } from "./npz.js";
import { Tokenizer } from "./tokenizer.js";

const BANK_SHOWN = 20; // of the bundle's own labels, as many as the demo's server sends
const BATCH = 32; // texts that the text tower sees at once
const RUNTIMES = { wasm: ["ort.wasm", "ort-wasm-simd-threaded"], webgpu: ["ort.webgpu", "ort-wasm-simd-threaded.asyncify"] };

export class Model {
  // backend: "wasm" or "webgpu"; bundle: the address of its folder; read(address): its content as an ArrayBuffer.
  static async open({ backend, bundle, read, threads }) {
    const model = new Model();
    const [api, wasm] = RUNTIMES[backend];
    const at = (name) => new URL(`npm/${name}`, import.meta.url).href;
    const file = (name) => new URL(name, bundle).href;
    model.ort = await import(at(`${api}.js`));
    // Read here and not by the runtime, which would ask for a media type that some servers do not send.
    model.ort.env.wasm.wasmBinary = await read(at(`${wasm}.wasm`));
    model.ort.env.wasm.wasmPaths = { mjs: at(`${wasm}.js`) };
    model.ort.env.wasm.numThreads = threads;
    model.ort.env.logLevel = "error";
    model.provider = backend;
    model.manifest = JSON.parse(new TextDecoder().decode(await read(file("manifest.json"))));
    model.image = await model.#session(await read(file(model.manifest.image.file)));
    model.bank = model.manifest.files["labels.npz"] ? bankOf(await readNpz(await read(file("labels.npz")))) : null;
    // Asked for now, so that new labels need no network later.
    model.textFiles = [file(model.manifest.text.file), file("tokenizer.json")].map(remembered(read));
    if (!model.bank) await model.#openText();
    return model;
  }

  // Labels with the prompts that each is embedded by, already cleaned; null takes the label bank.
  async setLabels(labels, prompts) {
    if (labels === null) {
      this.rows = this.bank;
      return;
    }
    const known = new Map([...(this.bank ?? []), ...(this.rows ?? [])]);
    const rows = new Map();
    const missing = labels.filter((label) => !known.has(label));
    const embedded = await this.#embed(missing.map((label) => prompts[labels.indexOf(label)]));
    missing.forEach((label, i) => known.set(label, embedded[i]));
    labels.forEach((label) => rows.set(label, known.get(label)));
    this.rows = rows;
  }

  // The labels likeliest first with their probabilities, and the time that it took.
  async classify(picture) {
    const began = performance.now();
    const { image, preprocessing, logit_scale: scale } = this.manifest;
    const pixels = preprocess(await decode(picture), preprocessing);
    const opened = performance.now();
    const input = new this.ort.Tensor("float32", pixels, [1, 3, ...preprocessing.size]);
    const embedding = await run(this.image, image, input);
    const best = softmax([...this.rows.values()].map((row) => scale * dot(row, embedding)))
      .map((probability, i) => [probability, i])
      .sort((one, other) => other[0] - one[0] || one[1] - other[1])
      .slice(0, this.rows === this.bank ? BANK_SHOWN : undefined);
    const names = [...this.rows.keys()];
    return {
      labels: best.map(([, i]) => names[i]),
      probabilities: best.map(([probability]) => probability),
      open_ms: opened - began,
      model_ms: performance.now() - opened,
    };
  }

  // One embedding for each list of prompts: the normalised mean of theirs.
  async #embed(lists) {
    const texts = lists.flat();
    if (!texts.length) return [];
    await this.#openText();
    const { text, tokenizer, embedding_size: size } = this.manifest;
    const all = new Float32Array(texts.length * size);
    const most = text.one_at_a_time ? 1 : BATCH;
    for (let start = 0; start < texts.length; start += most) {
      const batch = texts.slice(start, start + most);
      const ids = new this.ort.Tensor("int64", this.tokenizer.ids(batch), [batch.length, tokenizer.context_length]);
      all.set(await run(this.text, text, ids), start * size);
    }
    const each = texts.length / lists.length;
    return lists.map((_, i) => mean(all.subarray(i * each * size, (i + 1) * each * size), size));
  }

  async #openText() {
    if (this.text) return;
    const [tower, json] = await Promise.all(this.textFiles.map((file) => file()));
    this.tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(json)), this.manifest.tokenizer);
    this.text = await this.#session(tower);
  }

  #session(content) {
    // What WebGPU has no kernel for runs in WebAssembly.
    const providers = this.provider === "webgpu" ? ["webgpu", "wasm"] : ["wasm"];
    const options = { executionProviders: providers, logSeverityLevel: 3 }; // its warnings are about its own graphs
    return this.ort.InferenceSession.create(new Uint8Array(content), options);
  }
}

async function run(session, tower, input) {
  const { [tower.output_name]: output } = await session.run({ [tower.input_name]: input });
  return output.data;
}

// Each name's embedding, from the arrays of a label bank.
export function bankOf({ names, embeddings, levels, scales }) {
  const { data, shape } = levels ?? embeddings;
  const row = (i) => data.subarray(i * shape[1], (i + 1) * shape[1]);
  const rowOf = (i) => (levels ? Float32Array.from(row(i), (level) => level * scales.data[i]) : row(i));
  return new Map(names.data.map((name, i) => [name, rowOf(i)]));
}

// Reads at once; again when that failed.
function remembered(read) {
  return (address) => {
    let content = read(address);
    content.catch(() => {});
    return () => (content = content.catch(() => read(address)));
  };
}

function mean(rows, size) {
  const sum = new Float32Array(size);
  rows.forEach((value, i) => (sum[i % size] += value));
  const norm = Math.max(Math.sqrt(dot(sum, sum)), 1e-12);
  return sum.map((value) => value / norm);
}

function dot(one, other) {
  let sum = 0;
  for (let i = 0; i < one.length; i++) sum += one[i] * other[i];
  return sum;
}

function softmax(logits) {
  const most = logits.reduce((one, other) => Math.max(one, other), -Infinity);
  const exponents = logits.map((logit) => Math.exp(logit - most));
  const sum = exponents.reduce((one, other) => one + other, 0);
  return exponents.map((each) => each / sum);
}
