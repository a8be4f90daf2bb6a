// Replaces the parts of the page that changed, every few seconds while it is seen.
const INTERVAL_MS = 4000;
const PATIENCE_MS = 15000; // after which a server that hangs is said not to answer
const lost = document.getElementById("lost");
let title = document.title;
let updated = new Date();
let asking = false;

async function refresh() {
  if (document.hidden || asking) return;
  asking = true;
  try {
    const response = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    const next = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!response.ok) showLost(next.querySelector("p")?.textContent ?? `The server answers with status ${response.status}.`);
    else if (next.querySelector("[data-part]")) update(next);
    else showLost("Another page answers in place of clip-rd-edge watch. Reload this page."); // such as one to log in
  } catch {
    showLost("clip-rd-edge watch does not answer any more; start it again to see how the run goes on.");
  } finally {
    asking = false;
  }
}

function update(next) {
  for (const part of next.querySelectorAll("[data-part]")) {
    const shown = document.querySelector(`[data-part="${part.dataset.part}"]`);
    if (shown.innerHTML !== part.innerHTML) shown.innerHTML = part.innerHTML;
  }
  lost.textContent = "";
  document.title = title = next.title;
  updated = new Date();
}

// Say at the figures, and in the title, that they are old, and why.
function showLost(reason) {
  const message = `${reason} This page is as of ${updated.toLocaleTimeString()}.`;
  if (lost.textContent !== message) lost.textContent = message; // which is read out each time
  document.title = `lost, ${title}`;
}

setInterval(refresh, INTERVAL_MS);
document.addEventListener("visibilitychange", refresh);
