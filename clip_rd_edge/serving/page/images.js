// Image sources: files that are chosen, dropped or pasted, and the newest frame of the camera.

import { encodeFrame } from "./api.js";
import { HIDDEN_PIXELS, readsPixels } from "./canvas.js";
import { droppedImages, imagesOnly } from "./files.js";
import { uprightBitmap } from "./upright.js";

const stage = document.getElementById("stage");
const video = document.getElementById("video");
const preview = document.getElementById("preview");
const button = document.getElementById("camera");
const PREVIEW_EDGE = 4096; // longest edge of the shown image in pixels; browsers limit that of a canvas
const FRAME_EDGE = 480; // shorter edge of a camera frame in pixels; larger than the input of any small model

const NO_FILE = "The browser hands over an address and no image. Copy the image and paste it here, or save it first.";

export class ImageSource {
  // onImage(image, ms) is called with each image and the time it took to capture, onUnreadable(message) instead for a
  // file that the browser cannot read, and onError(message) for what leaves the current image as it is.
  constructor(onImage, onUnreadable, onError) {
    this.onImage = onImage;
    this.onUnreadable = onUnreadable;
    this.onError = onError;
    this.stream = null;
    this.starting = null; // identifies the start that waits for permission; null if none does
    this.files = [];
    this.position = 0;
    const file = document.getElementById("file");
    file.addEventListener("change", () => {
      this.#openAll([...file.files]);
      file.value = "";
    });
    const folder = document.getElementById("folder");
    folder.addEventListener("change", () => {
      this.#openFolder(imagesOnly(folder.files));
      folder.value = "";
    });
    // WebKit shows an empty stage to a visitor who comes back to the page.
    addEventListener("pageshow", (event) => event.persisted && this.#leaveCamera());
    document.getElementById("previous").addEventListener("click", () => this.#move(-1));
    document.getElementById("next").addEventListener("click", () => this.#move(1));
    addEventListener("paste", (event) => {
      if (!isTextForField(event)) this.#openAll([...event.clipboardData.files]);
    });
    let depth = 0; // dragenter and dragleave also fire for every nested element
    addEventListener("dragenter", (event) => carriesFiles(event) && stage.classList.toggle("over", ++depth > 0));
    addEventListener("dragleave", (event) => carriesFiles(event) && stage.classList.toggle("over", --depth > 0));
    // A browser would leave the page for what is dropped, but for text in a field.
    addEventListener("dragover", (event) => isDroppedText(event) || event.preventDefault());
    addEventListener("drop", (event) => {
      if (isDroppedText(event)) return;
      event.preventDefault();
      depth = 0;
      stage.classList.remove("over");
      if (carriesFiles(event)) this.#openDropped(event.dataTransfer.items);
      else if (event.dataTransfer.types.includes("text/uri-list")) this.onError(NO_FILE);
    });
    button.addEventListener("click", () => (this.stream ? this.#leaveCamera() : this.start()));
  }

  async #openDropped(items) {
    const { files, unreadable } = await droppedImages(items);
    await this.#openFolder(files);
    if (!unreadable.length) return;
    const others = unreadable.length > 1 ? ` and ${unreadable.length - 1} more` : "";
    this.onError(`The browser cannot read ${unreadable[0]}${others}.`);
  }

  async #openFolder(files) {
    if (files.length) await this.#openAll(files);
    else this.onError("There are no images in this folder.");
  }

  // Show the first of several files; the others follow with the buttons.
  async #openAll(files) {
    if (!files.length) return;
    this.files = files;
    this.position = 0;
    await this.#move(0);
  }

  async #move(step) {
    const count = this.files.length;
    this.position = (this.position + step + count) % count;
    const file = this.files[this.position];
    document.getElementById("several").hidden = count < 2;
    const name = file.webkitRelativePath || file.name;
    document.getElementById("position").textContent = `${this.position + 1} of ${count}: ${name}`;
    await this.#open(file);
  }

  async #open(file) {
    this.stop();
    // The browser only shows the image; the model's side reads the file itself, so formats that the browser cannot
    // show may still be classified.
    // Read once: what is shown and what is classified, now and with other labels later, are the same bytes, whatever
    // becomes of the file.
    const image = await file.arrayBuffer().then((content) => new Blob([content], { type: file.type }), () => null);
    const bitmap = image && (await uprightBitmap(image).catch(() => null));
    if (file !== this.files[this.position]) return; // another one was opened in the meantime
    showStill(bitmap);
    if (image) await this.onImage(image, 0);
    else this.onUnreadable(`The browser cannot read ${file.name}: it was changed, moved or is locked. Choose it again.`);
  }

  async start() {
    if (!navigator.mediaDevices) {
      this.onError("Browsers allow the camera only on https pages and on localhost. You can choose an image instead.");
      return;
    }
    if (!readsPixels()) {
      this.onError(HIDDEN_PIXELS);
      return;
    }
    if (this.starting) return; // clicked twice
    const starting = (this.starting = {});
    this.hasFrame = false; // whether `canvas` has one of this camera
    try {
      const constraints = { video: { facingMode: "environment", width: { ideal: 640 } }, audio: false };
      const stream = await navigator.mediaDevices.getUserMedia(constraints);
      if (this.starting !== starting) {
        stopTracks(stream); // an image was opened in the meantime
        return;
      }
      this.stream = stream;
      video.srcObject = stream;
      await video.play();
    } catch (error) {
      if (this.starting !== starting) return; // stopped, which ends play() with an error
      this.stop();
      const reasons = {
        NotAllowedError: "permission was denied",
        NotFoundError: "no camera was found",
        NotReadableError: "another program is using it",
      };
      this.onError(`The camera cannot be used: ${reasons[error.name] ?? error.message}.`);
      return;
    }
    if (this.starting !== starting) return;
    this.starting = null;
    this.stream.getVideoTracks()[0].addEventListener("ended", async () => {
      await this.#leaveCamera();
      this.onError("The camera stopped.");
    });
    this.#show(true);
    this.#next();
  }

  // Turn the camera off, and go back to the image that was chosen before.
  async #leaveCamera() {
    if (this.files.length) await this.#move(0);
    else this.stop();
  }

  // Turn the camera off. Its last frame stays, which the answer belongs to.
  stop() {
    if (this.stream && this.hasFrame) showStill(canvas);
    if (this.stream) stopTracks(this.stream);
    this.stream = this.starting = null;
    video.srcObject = null;
    this.#show(false);
  }

  #show(live) {
    video.hidden = !live;
    if (!live) document.getElementById("rate").hidden = true;
    if (live) preview.hidden = true;
    if (live) document.getElementById("several").hidden = true;
    stage.classList.toggle("live", live);
    if (live) stage.classList.remove("full");
    button.textContent = live ? "Stop the camera" : "Start the camera";
    button.setAttribute("aria-pressed", String(live));
  }

  // One frame at a time, always the newest: a slow model lags by one frame instead of a growing queue.
  #next() {
    const stream = this.stream;
    if (!stream) return;
    const capture = async () => {
      if (this.stream !== stream) return;
      const started = performance.now();
      const image = await captureFrame();
      if (this.stream !== stream) return; // stopped in the meantime: do not replace an image that was dropped since
      this.hasFrame = true;
      await this.onImage(image, performance.now() - started);
      this.#next();
    };
    // Wait for a new frame; neither callback runs while the page is hidden.
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(capture);
    else requestAnimationFrame(capture);
  }
}

function carriesFiles({ dataTransfer: { types } }) {
  return types.includes("Files");
}

function isDroppedText(event) {
  return event.target.type === "text" && !carriesFiles(event);
}

// Whether a text field takes what is pasted: spreadsheets copy an image of the cells beside their text. Of an image that
// was copied on a web page, there is HTML without text; of a file, at most text without HTML.
function isTextForField({ target, clipboardData: { types } }) {
  return target.type === "text" && types.includes("text/plain") && types.includes("text/html");
}

// Show a bitmap or canvas on the stage; null is an image that the browser cannot show.
function showStill(image) {
  preview.hidden = image === null;
  stage.classList.toggle("full", image !== null);
  if (!image) return;
  const scale = Math.min(1, PREVIEW_EDGE / Math.max(image.width, image.height));
  preview.width = Math.max(1, Math.round(image.width * scale));
  preview.height = Math.max(1, Math.round(image.height * scale));
  const context = preview.getContext("2d");
  context.fillStyle = "#fff"; // the background for transparent images that the model sees
  context.fillRect(0, 0, preview.width, preview.height);
  context.drawImage(image, 0, 0, preview.width, preview.height);
}

function stopTracks(stream) {
  stream.getTracks().forEach((track) => track.stop());
}

const canvas = document.createElement("canvas");

function captureFrame() {
  const scale = Math.min(1, FRAME_EDGE / Math.min(video.videoWidth, video.videoHeight));
  canvas.width = Math.round(video.videoWidth * scale);
  canvas.height = Math.round(video.videoHeight * scale);
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.drawImage(video, 0, 0, canvas.width, canvas.height);
  return encodeFrame(canvas);
}
