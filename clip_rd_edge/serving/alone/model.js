// A bundle in the browser: its towers in onnxruntime-web, its tokenizer and its label bank.

import { decode, preprocess } from "./pixels.js";
import { readNpz } from "./npz.js";
import { dot, logSum, taughtRows } from "./taught.js";
import { Tokenizer } from "./tokenizer.js";

const BANK_TOP = 20; // results for the bundle's own labels, as many as the demo's server returns
const BATCH_SIZE = 32; // texts per call of the text tower
const LATER = ["background.npz", "known.npz", "taught.npz", "reference.npz"]; // to teach labels, and to refuse images
const REFUSE_KNOWN = 0.05; // share of images of known things that may be refused
const UNCALIBRATED = { slope: 0.97, intercept: -3.3 }; // as in bundle/encoder.py
const RUNTIMES = { wasm: ["ort.wasm", "ort-wasm-simd-threaded"], webgpu: ["ort.webgpu", "ort-wasm-simd-threaded.asyncify"] };

export class Model {
  embedded = new Map(); // the labels that the text tower embedded last

  // backend: "wasm" or "webgpu"; bundle: URL of its folder; manifest: that of the page, so that both are of one export;
  // read(url, options): returns the content as an ArrayBuffer, with the options of `fetch`.
  static async open({ backend, bundle, manifest, read, threads }) {
    const model = new Model();
    const [api, wasm] = RUNTIMES[backend];
    const npmUrl = (name) => new URL(`npm/${name}`, import.meta.url).href;
    const readFile = (name) => readIntact(name, { bundle, manifest, read });
    model.ort = await import(npmUrl(`${api}.js`));
    // Loaded here rather than by the runtime, which requires a media type that some servers do not send.
    model.ort.env.wasm.wasmBinary = await read(npmUrl(`${wasm}.wasm`));
    model.ort.env.wasm.wasmPaths = { mjs: npmUrl(`${wasm}.js`) };
    model.ort.env.wasm.numThreads = threads;
    model.ort.env.logLevel = "error";
    model.provider = backend;
    model.manifest = manifest;
    model.image = await model.#createSession(await readFile(manifest.image.file));
    model.bank = "labels.npz" in manifest.files ? readBank(await readNpz(await readFile("labels.npz"))) : null;
    const { logit_scale: scale, features } = manifest;
    model.bias = features?.logit_bias;
    model.calibration = features?.calibration;
    model.scale = model.bias === undefined ? scale / (model.calibration?.temperature ?? 1) : scale;
    // Loaded now, so that new labels, and what teaches them, need no network later.
    const names = manifest.text ? [manifest.text.file, "tokenizer.json"] : [];
    model.textFiles = names.map(prefetch(readFile));
    const kept = LATER.filter((name) => name in manifest.files).map((name) => [name, prefetch(readFile)(name)]);
    model.kept = new Map(kept);
    if (!model.bank) await model.#openText();
    return model;
  }

  // promptLists: the cleaned prompts of each label; labels null selects the label bank.
  // images: the embeddings of those that teach labels, by label.
  async setLabels(labels, promptLists, images) {
    if (labels === null) this.rows = this.bank;
    else await this.#setRows(labels, promptLists);
    if (labels && images) this.rows = await this.#taught(images);
    // As the demo: a camera also sees what is neither taught nor beside it.
    const background = this.calibration || images ? readBank(await this.#readArrays("background.npz")) : null;
    this.nouns = background?.size ? [...background.values()] : null;
    this.limit = this.nouns && this.calibration ? this.#knownLimit(await this.#readArrays("known.npz")) : null;
  }

  async #readArrays(name) {
    return this.kept.has(name) ? readNpz(await this.kept.get(name)()) : {};
  }

  async #setRows(labels, promptLists) {
    // As the runtime does: rows of the bank and of the text tower, which may have another precision, are not mixed.
    // Those that images have taught are the bank's also beside others.
    const all = labels.every((label) => this.bank?.has(label));
    const taught = this.manifest.features?.taught ?? [];
    const find = (label) => (all || taught.includes(label) ? this.bank : this.embedded).get(label);
    const missing = labels.filter((label) => !find(label));
    const embeddings = await this.#embed(missing.map((label) => promptLists[labels.indexOf(label)]));
    this.rows = new Map(labels.map((label) => [label, find(label) ?? embeddings[missing.indexOf(label)]]));
    if (!all) this.embedded = this.rows;
  }

  // The rows of the labels when images have taught some, also those which taught the bundle.
  async #taught(images) {
    const [before, reference] = [await this.#readArrays("taught.npz"), await this.#readArrays("reference.npz")];
    const size = this.manifest.embedding_size;
    const rowsOf = ({ data }) => Array.from({ length: data.length / size }, (_, i) => data.subarray(i * size, (i + 1) * size));
    const kept = rowsOf(before.images ?? reference.image_embeddings ?? { data: [] });
    const keptOf = (number) => kept.filter((_, i) => (before.classes?.data[i] ?? -1) === number);
    const texts = new Map([...this.rows].map(([label, row]) => [label, row.slice(0, size)]));
    const all = { ...images };
    (before.names?.data ?? []).forEach((label, number) => {
      if (!texts.has(label)) return;
      texts.set(label, rowsOf(before.texts)[number]);
      all[label] = [...keptOf(number), ...(images[label] ?? [])];
    });
    return taughtRows({ images: all, none: keptOf(-1), texts, scale: this.scale, bias: this.bias });
  }

  // How well each label fits an image, by its embedding: Scoring.matches of bundle/encoder.py.
  #matches(embedding, rows) {
    const { logit_scale: scale } = this.manifest;
    const mean = logSum(this.nouns.map((noun) => scale * dot(noun, embedding))) - Math.log(this.nouns.length);
    return rows.map((row) => scale * dot(row, embedding) - mean);
  }

  // The match below which an image is refused, as Calibration.limit of bundle/encoder.py has it.
  #knownLimit(known) {
    if (!known.names) return null;
    const rows = [...this.rows.values()];
    const images = [...readBank(known).values()];
    const best = images.map((row, i) => Math.max(this.calibration.curve[i], ...this.#matches([...row, 1], rows)));
    const rank = Math.floor(REFUSE_KNOWN * (best.length + 1) + 1e-9);
    return rank ? best.sort((a, b) => a - b)[rank - 1] : -Infinity;
  }

  // The probability of each label, or nothing if none fits.
  #answer(embedding) {
    const rows = [...this.rows.values()];
    if (this.nouns) {
      const matches = this.#matches(embedding, rows);
      if (Math.max(...matches) < (this.limit ?? usualLimit(this.#matches(embedding, this.nouns), rows.length))) return [];
      const { slope, intercept } = this.calibration ?? UNCALIBRATED;
      if (rows.length === 1 && this.bias === undefined) return [sigmoid(slope * matches[0] + intercept)];
    }
    const logits = rows.map((row) => this.scale * dot(row, embedding));
    return this.bias === undefined ? softmax(logits) : logits.map((logit) => sigmoid(logit + this.bias));
  }

  // The labels, most likely first, or none, with their probabilities, the image's embedding and the times taken.
  async classify(image) {
    const started = performance.now();
    const { image: tower, preprocessing } = this.manifest;
    const pixels = preprocess(await decode(image), preprocessing);
    const opened = performance.now();
    const input = new this.ort.Tensor("float32", pixels, [1, 3, ...preprocessing.size]);
    const own = await this.#run(this.image, tower, input);
    const embedding = [...own, 1]; // for rows that end with an offset
    const best = this.#answer(embedding)
      .map((probability, i) => [probability, i])
      .sort((a, b) => b[0] - a[0] || a[1] - b[1])
      .slice(0, this.rows === this.bank ? BANK_TOP : undefined);
    const names = [...this.rows.keys()];
    return {
      labels: best.map(([, i]) => names[i]),
      probabilities: best.map(([probability]) => probability),
      embedding: own,
      open_ms: opened - started,
      model_ms: performance.now() - opened,
    };
  }

  // One embedding per list of prompts: the normalised mean of the prompts' embeddings. All lists have the same length.
  async #embed(promptLists) {
    const texts = promptLists.flat();
    if (!texts.length) return [];
    await this.#openText();
    const { text: tower, tokenizer, embedding_size: size } = this.manifest;
    const embeddings = new Float32Array(texts.length * size);
    const batchSize = tower.one_at_a_time ? 1 : BATCH_SIZE;
    for (let start = 0; start < texts.length; start += batchSize) {
      const batch = texts.slice(start, start + batchSize);
      const ids = new this.ort.Tensor("int64", this.tokenizer.ids(batch), [batch.length, tokenizer.context_length]);
      embeddings.set(await this.#run(this.text, tower, ids), start * size);
    }
    const step = (texts.length / promptLists.length) * size;
    return promptLists.map((_, i) => normalisedMean(embeddings.subarray(i * step, (i + 1) * step), size));
  }

  async #openText() {
    if (this.text) return;
    if (!this.manifest.text) throw new Error("This model knows its own labels alone: it was exported without its text tower.");
    const [tower, json] = await Promise.all(this.textFiles.map((file) => file()));
    this.tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(json)), this.manifest.tokenizer);
    this.text = await this.#createSession(tower);
  }

  // The embeddings of a batch, one after the other.
  async #run(session, tower, input) {
    const { [tower.output_name]: output } = await session.run({ [tower.input_name]: input });
    const { data, dims } = output;
    if (data.length !== input.dims[0] * this.manifest.embedding_size) {
      throw new Error(`${tower.file} returns embeddings of shape ${dims.join(" × ")}: its manifest has another size.`);
    }
    // With NaN, all comparisons are false, and the answer would be wrong without a word.
    if (!data.every(Number.isFinite)) {
      const advice = this.provider === "webgpu" ? "choose WASM" : "it is damaged, or cannot be run in this browser";
      throw new Error(`${tower.file} computes numbers that are not finite: ${advice}.`);
    }
    return data;
  }

  #createSession(content) {
    // Operators that WebGPU does not support run in WebAssembly.
    const providers = this.provider === "webgpu" ? ["webgpu", "wasm"] : ["wasm"];
    // Errors only: the runtime's warnings are about its own graph optimisations.
    const options = { executionProviders: providers, logSeverityLevel: 3 };
    return this.ort.InferenceSession.create(new Uint8Array(content), options);
  }
}

// The embeddings of a label bank's arrays, by label.
export function readBank({ names, embeddings, levels, scales }) {
  if (!names) return new Map();
  const { data, shape } = levels ?? embeddings;
  const row = (i) => data.subarray(i * shape[1], (i + 1) * shape[1]);
  const embedding = (i) => (levels ? Float32Array.from(row(i), (level) => level * scales.data[i]) : row(i));
  return new Map(names.data.map((name, i) => [name, embedding(i)]));
}

// The content of a bundle's file. A file of another export, which the browser or the server has kept from before, is an
// error where it can be told: browsers compute SHA-256 only on pages that are served over https or from localhost.
async function readIntact(name, { bundle, manifest, read }) {
  const content = await read(new URL(name, bundle).href, { cache: "no-cache" }); // ask whether it is still the same
  if (crypto.subtle && hex(await crypto.subtle.digest("SHA-256", content)) !== manifest.files[name]) {
    throw new Error(`${name} is not of this export: reload the page, or copy the exported folder to the server again.`);
  }
  return content;
}

function hex(buffer) {
  return Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Starts to load a file at once; the returned function returns its content, and retries if loading failed.
function prefetch(read) {
  return (name) => {
    let content = read(name);
    content.catch(() => {});
    return () => (content = content.catch(() => read(name)));
  };
}

function normalisedMean(rows, size) {
  const sum = new Float32Array(size);
  rows.forEach((value, i) => (sum[i % size] += value));
  const norm = Math.max(Math.sqrt(dot(sum, sum)), 1e-12);
  return sum.map((value) => value / norm);
}

// The match below which an image is refused without calibration: usual_limit of bundle/encoder.py.
function usualLimit(matches, labels) {
  const at = (1 - Math.min(0.5, 2 / (labels + 1))) * (matches.length - 1);
  const sorted = [...matches].sort((a, b) => a - b);
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]];
  return low + (high - low) * (at - Math.floor(at));
}

const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));

function softmax(logits) {
  const max = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponents = logits.map((logit) => Math.exp(logit - max));
  const sum = exponents.reduce((a, b) => a + b, 0);
  return exponents.map((exponent) => exponent / sum);
}
