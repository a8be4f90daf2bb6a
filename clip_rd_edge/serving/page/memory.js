// What the page remembers over a reload: the labels and choices of its address, in the browser's local storage.

const KEY = `clip-rd-edge ${location.pathname}`;

// state: { start, labels, choice, bank, taught }, with the labels that the page started with as `start`, and without
// `bank` where the choice has no labels of its own.
export function store(state) {
  try {
    localStorage.setItem(KEY, JSON.stringify(state));
  } catch {
    // The browser allows no storage: the page works without.
  }
}

// The remembered state; null if there is none, or if the page has been given other labels to start with since.
export function restore(start) {
  try {
    const state = JSON.parse(localStorage.getItem(KEY));
    const same = JSON.stringify(state?.start) === JSON.stringify(start);
    const valid = Array.isArray(state?.labels) && state.labels.every((label) => typeof label === "string");
    return same && valid ? state : null;
  } catch {
    return null;
  }
}
