// Runs the model beside the page, so that the page answers while it works. Called by api.js: { id, name, argument }.

import { Model } from "./model.js";

let model;
let last = Promise.resolve(); // a runtime does one thing at a time

const calls = {
  async open({ backend, bundle, threads }) {
    model = await Model.open({ backend, bundle, threads, read });
  },
  setLabels: ({ labels, prompts }) => model.setLabels(labels, prompts),
  classify: ({ picture }) => model.classify(picture),
  bankSize: () => model.bank?.size ?? 0,
};

addEventListener("message", ({ data: { id, name, argument } }) => {
  last = last
    .then(() => calls[name](argument))
    .then((result) => postMessage({ id, result }))
    .catch((error) => postMessage({ id, error: error?.message ?? String(error) }));
});

// A file's content; tells the page how many bytes came.
async function read(address) {
  const response = await fetch(address).catch(() => null);
  const name = address.split("/").at(-1);
  if (!response?.ok) throw new Error(`${name} cannot be read from the server${response ? ` (${response.status})` : ""}.`);
  const pieces = [];
  for (let reader = response.body.getReader(), piece = {}; !piece.done; ) {
    piece = await reader.read();
    if (piece.done) break;
    pieces.push(piece.value);
    postMessage({ read: piece.value.length });
  }
  return new Blob(pieces).arrayBuffer();
}
