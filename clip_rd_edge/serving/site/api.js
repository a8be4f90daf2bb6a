// Requests of the pages to their server, with its token, if it has one.

const KEY = "clip-rd-edge-token"; // kept for this tab alone
const form = document.getElementById("access");

// Send a request; where the token is missing or wrong, ask for it, and then call `again`.
export async function request(path, options = {}, again = () => {}) {
  const token = sessionStorage.getItem(KEY);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { ...options, headers }).catch(() => null);
  if (!response) throw new Error("The server does not respond. Is clip-rd-edge serve still running?");
  if (response.status === 401) {
    form.hidden = false;
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, document.getElementById("token").value.trim());
      form.hidden = true;
      again();
    };
    document.getElementById("token").focus();
    throw new Error(token ? "This is not the token of the server." : "This server needs its token.");
  }
  if (!response.ok) {
    const content = await response.json().catch(() => null);
    throw new Error(content?.error?.message ?? `The server answered with the status ${response.status}.`);
  }
  return response;
}

export function element(tag, className = "", ...content) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...content);
  return made;
}
