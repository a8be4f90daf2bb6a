// The search page: a text or an image, and the images nearest to it.

import { element, request } from "./api.js";

const byId = (id) => document.getElementById(id);
const TOP = 24;
let last = 0; // number of the newest search: what belongs to an older one is dropped

async function search(shown, path, options) {
  const number = ++last;
  byId("lead").textContent = "Searching …";
  byId("error").textContent = "";
  try {
    const response = await request(path, options, () => search(shown, path, options));
    const { hits, cutoff } = await response.json();
    if (number !== last) return;
    byId("hits").replaceChildren(...hits.map((hit) => createHit(hit, number)));
    const fit = hits.length && hits[0].similarity < (cutoff ?? -1) ? `Perhaps no image fits “${shown}”.` : shown;
    byId("lead").textContent = hits.length ? fit : "The index has no images.";
  } catch (error) {
    if (number !== last) return;
    byId("hits").replaceChildren();
    byId("lead").textContent = "";
    byId("error").textContent = error.message;
  }
}

function createHit({ path, similarity, thumbnail }, number) {
  const name = path.split(/[\\/]/).at(-1);
  const image = element("img");
  image.alt = "";
  const picture = element("button", "picture", image);
  picture.type = "button";
  picture.setAttribute("aria-label", `More like ${name}`);
  picture.disabled = true;
  const caption = element("span", "name", name);
  caption.title = path;
  caption.dir = "auto";
  if (thumbnail) load(thumbnail, number, picture, image, name);
  return element("li", "", picture, element("div", "caption", caption, element("span", "", similarity.toFixed(3))));
}

async function load(thumbnail, number, picture, image, name) {
  // Relative to this page: a proxy may have the server at a path of its own.
  const response = await request(thumbnail.slice(1)).catch(() => null);
  if (!response || number !== last) return;
  const content = await response.blob();
  image.src = URL.createObjectURL(content);
  image.onload = () => URL.revokeObjectURL(image.src);
  picture.disabled = false;
  picture.onclick = () => byImage(content, `Like ${name}`);
}

function byImage(content, shown) {
  const body = new FormData();
  body.append("image", content);
  body.append("top", TOP);
  byId("query").value = "";
  search(shown, "search", { method: "POST", body });
}

function byText(query) {
  if (query) search(query, `search?q=${encodeURIComponent(query)}&top=${TOP}`);
}

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = byId("query").value.trim();
  history.replaceState(null, "", `?q=${encodeURIComponent(query)}`); // an address that can be passed on
  byText(query);
});
byId("file").addEventListener("change", ({ target }) => {
  if (target.files.length) byImage(target.files[0], `Like ${target.files[0].name}`);
  target.value = "";
});

byId("query").value = new URLSearchParams(location.search).get("q") ?? "";
byText(byId("query").value.trim());
