// Runs the model in a worker, so that the page stays responsive. Receives { id, method, argument } from api.js.

import { Model } from "./model.js";

let model;
let queue = Promise.resolve(); // the runtime handles one call at a time

const methods = {
  async open(choice) {
    model = await Model.open({ ...choice, read });
  },
  setLabels: ({ labels, promptLists, images }) => model.setLabels(labels, promptLists, images),
  classify: ({ image }) => model.classify(image),
  bankSize: () => model.bank?.size ?? 0,
};

addEventListener("message", ({ data: { id, method, argument } }) => {
  queue = queue
    .then(() => methods[method](argument))
    .then((result) => postMessage({ id, result }))
    .catch((error) => postMessage({ id, error: error?.message ?? String(error) }));
});

// The content of a file, loaded with the options of `fetch`; reports the number of bytes to the page as they arrive.
async function read(url, options) {
  const response = await fetch(url, options).catch(() => null);
  const name = url.split("/").at(-1);
  if (!response?.ok) {
    throw new Error(`${name} could not be loaded from the server${response ? ` (${response.status})` : ""}.`);
  }
  const chunks = [];
  for (let reader = response.body.getReader(), chunk = {}; !chunk.done; ) {
    chunk = await reader.read();
    if (chunk.done) break;
    chunks.push(chunk.value);
    postMessage({ bytes: chunk.value.length });
  }
  return new Blob(chunks).arrayBuffer();
}
