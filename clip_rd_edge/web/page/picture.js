// Where pictures come from: a file that is chosen, dropped or pasted, or the camera, whose newest frame is taken.

import { packed } from "./api.js";

const stage = document.getElementById("stage");
const video = document.getElementById("video");
const still = document.getElementById("still");
const button = document.getElementById("camera");
const FRAME = 480; // shorter edge of a camera's frame as it is sent; more than any small model looks at

export class Pictures {
  // taken(blob, ms) is called with each picture and the time that getting it took, failed(sentence) when one cannot be had.
  constructor(taken, failed) {
    this.taken = taken;
    this.failed = failed;
    this.stream = null;
    const file = document.getElementById("file");
    file.addEventListener("change", () => {
      if (file.files.length) this.#open(file.files[0]);
      file.value = "";
    });
    addEventListener("paste", (event) => {
      const pasted = [...event.clipboardData.files][0];
      if (pasted) this.#open(pasted);
    });
    let depth = 0; // dragenter comes again for every element below
    addEventListener("dragenter", () => stage.classList.toggle("over", ++depth > 0));
    addEventListener("dragleave", () => stage.classList.toggle("over", --depth > 0));
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      depth = 0;
      stage.classList.remove("over");
      if (event.dataTransfer.files.length) this.#open(event.dataTransfer.files[0]);
    });
    button.addEventListener("click", () => (this.stream ? this.stop() : this.start()));
  }

  async #open(file) {
    this.stop();
    // Shown by the browser, read by the server: what a browser cannot show may still be classified.
    const picture = await createImageBitmap(file).catch(() => null);
    still.hidden = picture === null;
    stage.classList.toggle("full", picture !== null);
    if (picture) {
      still.width = picture.width;
      still.height = picture.height;
      const context = still.getContext("2d");
      context.fillStyle = "#fff"; // what the server lays a transparent picture on
      context.fillRect(0, 0, still.width, still.height);
      context.drawImage(picture, 0, 0);
    }
    this.taken(file, 0);
  }

  async start() {
    if (!navigator.mediaDevices) {
      this.failed("A browser gives its camera to pages of this machine, or with https, only. A picture can be chosen instead.");
      return;
    }
    try {
      const wanted = { video: { facingMode: "environment", width: { ideal: 640 } }, audio: false };
      this.stream = await navigator.mediaDevices.getUserMedia(wanted);
    } catch (error) {
      const reasons = { NotAllowedError: "its use was not allowed", NotFoundError: "there is none", NotReadableError: "something else uses it" };
      this.failed(`The camera cannot be used: ${reasons[error.name] ?? error.message}.`);
      return;
    }
    this.stream.getVideoTracks()[0].addEventListener("ended", () => {
      this.stop();
      this.failed("The camera stopped.");
    });
    video.srcObject = this.stream;
    await video.play();
    this.#show(true);
    this.#next();
  }

  stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    video.srcObject = null;
    this.#show(false);
  }

  #show(live) {
    video.hidden = !live;
    if (!live) document.getElementById("rate").hidden = true;
    if (live) still.hidden = true;
    stage.classList.toggle("live", live);
    if (live) stage.classList.remove("full");
    button.textContent = live ? "Stop the camera" : "Start the camera";
    button.setAttribute("aria-pressed", String(live));
  }

  // One frame at a time, and always the newest: a slow model lags by one frame and not by a queue of them.
  #next() {
    const stream = this.stream;
    if (!stream) return;
    const take = async () => {
      if (this.stream !== stream) return;
      const began = performance.now();
      const picture = await frame();
      if (this.stream !== stream) return; // stopped meanwhile: what was dropped instead shall not be replaced
      await this.taken(picture, performance.now() - began);
      this.#next();
    };
    // Waits for a frame that was not sent before; not while the page is hidden.
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(take);
    else requestAnimationFrame(take);
  }
}

const canvas = document.createElement("canvas");

function frame() {
  const scale = Math.min(1, FRAME / Math.min(video.videoWidth, video.videoHeight));
  canvas.width = Math.round(video.videoWidth * scale);
  canvas.height = Math.round(video.videoHeight * scale);
  canvas.getContext("2d", { alpha: false, willReadFrequently: true }).drawImage(video, 0, 0, canvas.width, canvas.height);
  return packed(canvas);
}
