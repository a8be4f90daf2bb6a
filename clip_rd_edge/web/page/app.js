// Puts the page together: a picture and labels go in, bars and times come out.

import { choices, classify } from "./api.js";
import { Labels, percent } from "./labels.js";
import { Pictures } from "./picture.js";

const byId = (id) => document.getElementById(id);
const REMEMBERED = 30; // times that a median is taken of
const QUESTION = byId("lead").textContent;
const START = ["a person", "a cat", "a dog", "a flower", "food", "a building"];

let known = []; // the bundles, or what else there is to choose from
let chosen = 0; // which of them
let picture = null; // the last one, to be classified again when labels or bundle change
let asked = 0; // number of the last request: an older one that comes late is not shown

const labels = new Labels(() => later(again));
const pictures = new Pictures(taken, fail);

async function taken(blob, taking) {
  picture = blob;
  await ask(taking);
}

async function again() {
  // The camera's next frame brings the change along.
  if (picture && !pictures.stream) await ask();
}

async function ask(taking = 0) {
  const number = ++asked;
  const bundle = chosen;
  const current = labels.current;
  if (current?.length === 0) {
    labels.clear();
    say("Add a label to choose from.");
    return;
  }
  try {
    const answer = await classify(bundle, current, picture);
    if (number !== asked) return;
    const received = performance.now();
    fail("");
    labels.show(answer);
    const best = answer.probabilities[0];
    say(best >= 0.5 ? "" : "Perhaps ", answer.labels[0], ` ${percent(best)}`);
    count(bundle, answer.model_ms, taking + answer.asked_ms + (performance.now() - received));
  } catch (refusal) {
    if (number !== asked) return;
    labels.clear();
    say("No answer.");
    fail(refusal.message);
    if (pictures.stream && refusal.status !== 429) pictures.stop();
  }
}

function say(before, strong = "", after = "") {
  const lead = byId("lead");
  // A screen reader would not come to an end of a camera's answers.
  lead.setAttribute("aria-live", pictures.stream ? "off" : "polite");
  const best = document.createElement("strong");
  best.textContent = strong;
  best.dir = "auto";
  lead.replaceChildren(before, best, after);
}

function loading(sentence) {
  byId("lead").setAttribute("aria-live", "off");
  byId("lead").textContent = sentence;
}

function fail(sentence) {
  byId("error").textContent = sentence;
}

function count(bundle, model, all) {
  const { times } = known[bundle];
  times.push({ model, all, at: performance.now() });
  if (times.length > REMEMBERED) times.shift();
  const row = byId("bundles").children[bundle];
  row.children[3].textContent = milliseconds(median(times.map((time) => time.model)));
  row.children[4].textContent = milliseconds(median(times.map((time) => time.all)));
  const recent = times.filter((time) => time.at > performance.now() - 2000);
  const seconds = (recent.at(-1).at - recent[0].at) / 1000;
  byId("rate").hidden = !pictures.stream || recent.length < 3;
  byId("rate").textContent = `${((recent.length - 1) / seconds).toFixed(0)} frames/s`;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

const milliseconds = (value) => `${value < 9.95 ? value.toFixed(1) : value.toFixed(0)} ms`;
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 9.95e6 ? 1 : 0)} MB`;

let timer = 0;
function later(action) {
  clearTimeout(timer);
  timer = setTimeout(action, 120); // a typed word is one change, not one a letter
}

function choose(bundle) {
  chosen = bundle;
  const { bank } = known[bundle];
  byId("bank-switch").hidden = !bank;
  byId("bank-text").textContent = `use the bundle's own ${bank.toLocaleString("en")}`;
  if (!bank) byId("bank").checked = false;
  labels.useBank(byId("bank").checked);
  [...byId("bundles").children].forEach((row, place) => row.classList.toggle("chosen", place === bundle));
  later(again);
}

function rowOf(bundle, place) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  const label = document.createElement("label");
  const radio = document.createElement("input");
  radio.type = "radio";
  radio.name = "bundle";
  radio.checked = place === 0;
  radio.addEventListener("change", () => choose(place));
  label.append(radio, bundle.folder);
  label.title = bundle.name;
  head.append(label);
  row.append(head);
  for (const text of [bundle.precision, megabytes(bundle.size_bytes), "–", "–"]) row.insertCell().textContent = text;
  return row;
}

byId("bank").addEventListener("change", () => labels.useBank(byId("bank").checked));
addEventListener("pagehide", () => pictures.stop());

try {
  const start = await choices(loading);
  known = start.choices.map((bundle) => ({ ...bundle, times: [] }));
  byId("bundles").replaceChildren(...known.map(rowOf));
  byId("privacy").textContent = start.privacy;
  byId("what").textContent = start.what ?? "bundle";
  byId("note").textContent = start.note ?? "";
  labels.add(start.labels.length ? start.labels : START);
  byId("bank").checked = known[0].bank > 0 && !start.labels.length;
  say(QUESTION);
  choose(0);
} catch (error) {
  fail(error.message);
}
