// The page's main script: connects the image source, the labels and the model table.

import { classify, loadChoices, taughtUrl, teaches } from "./api.js";
import { ImageSource } from "./images.js";
import { LabelList, percent } from "./labels.js";
import { restore, store } from "./memory.js";

const byId = (id) => document.getElementById(id);
const MEDIAN_COUNT = 30; // number of recent times that the medians cover
const WAITING_MS = 300; // after which an image without an answer is said to be at work
const CAMERA_WAITING_MS = 3000; // the same for a frame: only a server that is gone or stuck takes as long
const QUESTION = byId("lead").textContent;
const START_LABELS = ["a person", "a cat", "a dog", "a flower", "food", "a building"];

let choices = []; // the bundles, or the backends of a browser-only page
let selected = 0; // index of the selected choice
let image = null; // the current image, classified again when the labels or the choice change
let startLabels = []; // the labels that the page starts with, unless others are remembered
let taught = {}; // by choice: by label, the embeddings of the images that have taught it
let lastRequest = 0; // number of the newest request: results of older ones are ignored

byId("unstarted").remove(); // it says what to do if this script does not start

const labels = new LabelList(() => {
  showTaught();
  remember();
  debounce(classifyAgain);
}, teaches ? teach : undefined);
const source = new ImageSource(showImage, showUnreadable, showError);

async function showImage(newImage, captureTime) {
  image = newImage;
  await update(captureTime);
}

function showUnreadable(message) {
  image = null;
  lastRequest++; // an answer to the image before belongs to nothing that is shown
  showFailure(message);
}

const MAX_IMAGES = 16; // that teach a label: what is sent and remembered is limited

// The embeddings by label that are taught to the selected choice, of the labels in the list.
function taughtNow() {
  const own = Object.entries(taught[choices[selected]?.folder] ?? {});
  const shown = own.filter(([label]) => labels.current?.includes(label));
  return shown.length ? Object.fromEntries(shown) : undefined;
}

function showTaught() {
  if (!choices.length) return;
  labels.showTaught(taughtNow() ?? {});
  byId("save").hidden = !taughtNow() || !taughtUrl;
}

// Teach a label by the current image.
async function teach(label) {
  if (!label) return;
  const [choice, shown] = [selected, image];
  if (!shown) {
    showError("Start the camera or choose an image first: it teaches the label.");
    return;
  }
  try {
    const { embedding } = await classify(choice, labels.current, shown, taughtNow(), true);
    const own = (taught[choices[choice].folder] ??= {});
    own[label] = [...(own[label] ?? []), embedding].slice(-MAX_IMAGES);
    showError("");
  } catch (error) {
    showError(error.message);
    return;
  }
  showTaught();
  remember();
  await classifyAgain();
}

byId("save").addEventListener("click", async () => {
  const link = document.createElement("a");
  try {
    link.href = await taughtUrl(selected, labels.current, taughtNow());
  } catch (error) {
    showError(error.message);
    return;
  }
  link.download = "taught.npz";
  link.click();
});

async function classifyAgain() {
  // With the camera on, the next frame uses the new labels anyway.
  if (image && !source.stream) await update();
}

async function update(captureTime = 0) {
  clearTimeout(timer); // this request has the newest labels and bundle: a change that waits needs none of its own
  const number = ++lastRequest;
  const choice = selected;
  const current = labels.current;
  if (current?.length === 0) {
    labels.clear();
    showError("");
    setLead("Add a label to choose from.");
    return;
  }
  const oldError = byId("error").textContent;
  // Do not leave the answer to the last image beside this one. A camera mostly has its next answer soon enough.
  const waiting = setTimeout(() => {
    if (number !== lastRequest) return;
    labels.clear();
    byId("rate").hidden = true;
    showProgress("Classifying …");
  }, source.stream ? CAMERA_WAITING_MS : WAITING_MS);
  try {
    const result = await classify(choice, current, image, taughtNow());
    if (number !== lastRequest) return;
    const received = performance.now();
    // What went wrong since the image was sent, such as a camera that is missing, still has to be read.
    if (byId("error").textContent === oldError) showError("");
    labels.show(result);
    const best = result.probabilities[0];
    if (result.labels.length) setLead(best >= 0.5 ? "" : "Perhaps ", result.labels[0], ` ${percent(best)}`);
    else setLead("None of these.");
    addTime(choice, result.model_ms, captureTime + result.elapsed_ms + (performance.now() - received));
  } catch (error) {
    if (number !== lastRequest) return;
    showFailure(error.message);
    if (error.status === 412) delete taught[choices[choice].folder]; // of the bundle that was exported anew
    showTaught();
    if (source.stream && error.status !== 429) source.stop();
  } finally {
    clearTimeout(waiting);
  }
}

function setLead(before, strong = "", after = "") {
  const lead = byId("lead");
  // Do not announce camera results: a screen reader could not keep up.
  lead.setAttribute("aria-live", source.stream ? "off" : "polite");
  const best = document.createElement("strong");
  best.textContent = strong;
  best.dir = "auto";
  lead.replaceChildren(before, best, after);
}

function showFailure(message) {
  labels.clear();
  setLead("No result.");
  showError(message);
}

function showProgress(message) {
  byId("lead").setAttribute("aria-live", "off");
  byId("lead").textContent = message;
}

function showError(message) {
  byId("error").textContent = message;
}

function addTime(choice, modelTime, totalTime) {
  // The first call includes loading the model: its times are shown only until there are others.
  const isFirst = !choices[choice].called;
  choices[choice].called = true;
  const times = choices[choice].times.filter((time) => !time.isFirst);
  times.push({ model: modelTime, total: totalTime, at: performance.now(), isFirst });
  if (times.length > MEDIAN_COUNT) times.shift();
  choices[choice].times = times;
  const row = byId("bundles").children[choice];
  row.children[3].textContent = milliseconds(median(times.map((time) => time.model)));
  row.children[4].textContent = milliseconds(median(times.map((time) => time.total)));
  const recent = times.filter((time) => time.at > performance.now() - 2000);
  const seconds = (recent.at(-1).at - recent[0].at) / 1000;
  byId("rate").hidden = !source.stream || recent.length < 3;
  byId("rate").textContent = `${((recent.length - 1) / seconds).toFixed(0)} frames/s`;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

const milliseconds = (value) => `${value < 9.95 ? value.toFixed(1) : value.toFixed(0)} ms`;
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 9.95e6 ? 1 : 0)} MB`;

let timer = 0;
function debounce(action) {
  clearTimeout(timer);
  timer = setTimeout(action, 120); // one request per typed word, not per letter
}

// Keep labels and choices over a reload.
function remember() {
  if (!choices.length) return;
  // Where there are no own labels, nobody has turned them off: a page that gets some later shows them.
  const bank = choices[selected].bank ? byId("bank").checked : undefined;
  store({ start: startLabels, labels: labels.typedLabels, choice: choices[selected].folder, bank, taught });
}

function select(index) {
  selected = index;
  const { bank, texts } = choices[index];
  const own = `the bundle's own ${bank.toLocaleString("en")} labels`;
  byId("bank-switch").hidden = !bank;
  byId("bank-text").textContent = texts ? `use ${own}` : `${own}; it knows no others`;
  byId("bank").disabled = !texts;
  if (!bank || !texts) byId("bank").checked = !texts;
  labels.useBank(byId("bank").checked);
  showTaught();
  remember();
  [...byId("bundles").children].forEach((row, i) => row.classList.toggle("selected", i === index));
  debounce(classifyAgain);
}

function createRow(choice, index) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  const label = document.createElement("label");
  const radio = document.createElement("input");
  radio.type = "radio";
  radio.name = "bundle";
  radio.checked = index === selected;
  radio.addEventListener("change", () => select(index));
  label.append(radio, choice.folder.replaceAll("/", "/\u200b")); // where a line may end
  label.title = choice.name;
  label.dataset.precision = choice.precision; // shown here on a narrow screen, in place of the column
  head.append(label);
  row.append(head);
  for (const text of [choice.precision, megabytes(choice.size_bytes), "–", "–"]) row.insertCell().textContent = text;
  return row;
}

byId("bank").addEventListener("change", () => labels.useBank(byId("bank").checked));
addEventListener("pagehide", () => source.stop());

const loading = setTimeout(() => showProgress("Loading …"), WAITING_MS);
try {
  const setup = await loadChoices(showProgress).finally(() => clearTimeout(loading));
  startLabels = setup.labels;
  const remembered = restore(startLabels);
  selected = Math.max(0, setup.choices.findIndex(({ folder }) => folder === remembered?.choice));
  taught = remembered?.taught ?? {};
  labels.add(remembered?.labels ?? (startLabels.length ? startLabels : START_LABELS));
  choices = setup.choices.map((choice) => ({ ...choice, times: [] }));
  byId("bundles").replaceChildren(...choices.map(createRow));
  byId("privacy").textContent = setup.privacy;
  byId("choice-heading").textContent = setup.heading ?? "bundle";
  byId("note").textContent = setup.note ?? "";
  byId("bank").checked = choices[selected].bank > 0 && (remembered?.bank ?? !startLabels.length);
  setLead(QUESTION);
  select(selected);
} catch (error) {
  setLead("This page could not start."); // in place of how much is loaded
  showError(error.message);
}
