// Runs functions of the page's scripts, as Playwright's `page.evaluate` does, with what Node lacks of a browser. Each line
// of stdin is JSON, { code, argument }, and each line of stdout is the function's { result } or its { error }.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";

let receive; // what the worker's script listens with

Object.assign(globalThis, {
  crossOriginIsolated: false,
  ImageData: class {
    constructor(data, width) {
      Object.assign(this, { data, width, height: data.length / width / 4 });
    }
  },
  fetch: async (url) => readFile(new URL(url, import.meta.url)).then((content) => new Response(content), () => new Response("", { status: 404 })),
  // One worker, in the same thread: the script that it would run is ./worker.js.
  Worker: class extends EventTarget {
    constructor() {
      super();
      globalThis.postMessage = (data) => this.dispatchEvent(Object.assign(new Event("message"), { data }));
      globalThis.addEventListener = (type, listener) => (receive = listener);
      this.started = import("./worker.js");
    }
    postMessage(data) {
      this.started.then(() => receive({ data }));
    }
    terminate() {}
  },
});
Object.defineProperty(globalThis, "navigator", { value: { hardwareConcurrency: 1 } });

for await (const line of createInterface({ input: process.stdin })) {
  const { code, argument } = JSON.parse(line);
  const answer = await Promise.resolve()
    .then(() => eval(`(${code})`)(argument))
    .then((result) => ({ result }), (error) => ({ error: error.message }));
  console.log(JSON.stringify(answer));
}
