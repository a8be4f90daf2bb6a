// What is done to a text before it is cut into tokens: clean_text of contract/tokenizer.py, but for two things that
// nobody types and ftfy mends there: text decoded in a wrong encoding (cafÃ© for café), and entities in capitals.

const LIGATURES = {
  "Ĳ": "IJ", "ĳ": "ij", "ŉ": "ʼn", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj",
  "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st",
};
const LIGATURE = new RegExp(`[${Object.keys(LIGATURES).join("")}]`, "gu");
const CONTROL = /[\u0000-\u0008\u000b\u000e-\u001f\u007f\u206a-\u206f\ufeff\ufff9-\ufffc]/gu;
const TERMINAL_ESCAPE = /\u001b\[[\d;]*[a-zA-Z]/gu;
const PUNCTUATION = /[!"#$%&'()*+,\-./:;<=>?@[\\\]^`{|}~]/gu;
const SPACE = /[\t-\r\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u; // Python's

// how: the manifest's tokenizer.clean.
export function clean(text, how) {
  text = unescape(unescape(mend(text)));
  if (how === "canonicalize") text = text.replaceAll("_", " ").replace(PUNCTUATION, "");
  text = text.split(SPACE).filter(Boolean).join(" ");
  return how === "whitespace" ? text : text.toLowerCase();
}

// A label in each of the templates, cleaned.
export function prompts(label, templates, how) {
  return templates.map((template) => {
    const place = template.includes("{c}") ? "{c}" : "{}";
    return clean(template.replaceAll(place, () => label), how);
  });
}

// ftfy's small mendings, until nothing changes, as there.
function mend(text) {
  for (let before = null; before !== text; ) {
    before = text;
    if (!text.includes("<")) text = text.replace(/&#?[0-9A-Za-z]{1,24};/gu, unescape);
    text = text
      .replace(/[\u0080-\u009f]/gu, windows1252)
      .replace(LIGATURE, (each) => LIGATURES[each])
      .replace(/[\u3000\uff01-\uffef]/gu, (each) => each.normalize("NFKC"))
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

function windows1252(character) {
  return new TextDecoder("windows-1252").decode(Uint8Array.of(character.codePointAt(0)));
}

// HTML's entities, by the browser's own table.
function unescape(text) {
  if (!text.includes("&")) return text;
  const page = new DOMParser().parseFromString(text.replaceAll("<", "&lt;"), "text/html");
  return page.documentElement.textContent;
}
