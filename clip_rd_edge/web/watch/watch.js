// Replaces the parts of the page that changed, every few seconds while it is seen.
const INTERVAL_MS = 4000;
const footer = document.querySelector("footer");
const footerText = footer.textContent;

async function refresh() {
  if (document.hidden) return;
  try {
    const response = await fetch(location.href, { cache: "no-store" });
    if (!response.ok) throw new Error(response.status);
    const next = new DOMParser().parseFromString(await response.text(), "text/html");
    document.title = next.title;
    for (const part of next.querySelectorAll("[data-part]")) {
      const shown = document.querySelector(`[data-part="${part.dataset.part}"]`);
      if (shown.innerHTML !== part.innerHTML) shown.innerHTML = part.innerHTML;
    }
    footer.textContent = footerText;
    footer.classList.remove("lost");
  } catch {
    footer.textContent = "clip-rd-edge watch does not answer any more; start it again to see how the run goes on.";
    footer.classList.add("lost");
  }
}

setInterval(refresh, INTERVAL_MS);
document.addEventListener("visibilitychange", refresh);
