// Cleans texts before tokenisation, like clean_text in bundle/tokenizer.py, except for two of ftfy's fixes that typed
// text does not need: text decoded with a wrong encoding (cafÃ© for café), and HTML entities in capitals.

const LIGATURES = {
  "Ĳ": "IJ", "ĳ": "ij", "ŉ": "ʼn", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj",
  "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st",
};
const LIGATURE = new RegExp(`[${Object.keys(LIGATURES).join("")}]`, "gu");
const CONTROL = /[\u0000-\u0008\u000b\u000e-\u001f\u007f\u206a-\u206f\ufeff\ufff9-\ufffc]/gu;
const TERMINAL_ESCAPE = /\u001b\[[\d;]*[a-zA-Z]/gu;
const PUNCTUATION = /[!"#$%&'()*+,\-./:;<=>?@[\\\]^`{|}~]/gu;
const SPACE = /[\t-\r\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u; // as in Python

// mode: `tokenizer.clean` of the manifest.
export function clean(text, mode) {
  text = unescapeHtml(unescapeHtml(fixText(text)));
  if (mode === "canonicalize") text = text.replaceAll("_", " ").replace(PUNCTUATION, "");
  text = text.split(SPACE).filter(Boolean).join(" ");
  return mode === "whitespace" ? text : text.toLowerCase();
}

// The cleaned prompts of a label, one per template.
export function prompts(label, templates, mode) {
  return templates.map((template) => {
    const placeholder = template.includes("{c}") ? "{c}" : "{}";
    return clean(template.replaceAll(placeholder, () => label), mode);
  });
}

// ftfy's simple fixes, repeated until nothing changes, as ftfy does.
function fixText(text) {
  for (let before = null; before !== text; ) {
    before = text;
    if (!text.includes("<")) text = text.replace(/&#?[0-9A-Za-z]{1,24};/gu, unescapeHtml);
    text = text
      .replace(/[\u0080-\u009f]/gu, decodeWindows1252)
      .replace(LIGATURE, (character) => LIGATURES[character])
      .replace(/[\u3000\uff01-\uffef]/gu, (character) => character.normalize("NFKC"))
      .replace(/[“-‟]/gu, '"')
      .replace(/[ʼ‘-‛]/gu, "'")
      .replace(/\r\n|[\r\u2028\u2029\u0085]/gu, "\n")
      .toWellFormed()
      .replace(TERMINAL_ESCAPE, "")
      .replace(CONTROL, "")
      .normalize("NFC");
  }
  return text;
}

function decodeWindows1252(character) {
  return new TextDecoder("windows-1252").decode(Uint8Array.of(character.codePointAt(0)));
}

// Decodes HTML entities with the browser's own parser.
function unescapeHtml(text) {
  if (!text.includes("&")) return text;
  const page = new DOMParser().parseFromString(text.replaceAll("<", "&lt;"), "text/html");
  return page.documentElement.textContent;
}
