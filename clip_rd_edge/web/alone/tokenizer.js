// Texts to token ids by tokenizer.json, the same as contract/tokenizer.py's for every text that was cleaned before.

import { Tokenizer as JsonTokenizer } from "./npm/tokenizers.js";

export class Tokenizer {
  // json: tokenizer.json; spec: the manifest's `tokenizer`.
  constructor(json, spec) {
    this.inner = new JsonTokenizer(json, {});
    this.spec = spec;
    // CLIP's start and end are no added tokens of the file, so that the library finds no id for them.
    this.specials = json.post_processor?.special_tokens ?? {};
  }

  // Ids of all texts in a row, each cut or padded to the context length.
  ids(texts) {
    const { context_length: length, pad_id: pad } = this.spec;
    const ids = new BigInt64Array(texts.length * length).fill(BigInt(pad));
    texts.forEach((text, row) => this.#cut(text).forEach((id, i) => (ids[row * length + i] = BigInt(id))));
    return ids;
  }

  #cut(text) {
    const { context_length: length, end_id: end } = this.spec;
    const all = this.#encoded(text, true);
    if (all.length <= length) return all;
    if (end !== null) return [...all.slice(0, length - 1), end];
    // What the tokenizer puts around a text stays whole; the text itself is cut.
    const own = this.#encoded(text, false);
    const before = all.findIndex((_, place) => own.every((id, i) => all[place + i] === id));
    const after = all.slice(before + own.length);
    return [...all.slice(0, length - after.length), ...after];
  }

  #encoded(text, special) {
    const { ids, tokens } = this.inner.encode(text, { add_special_tokens: special });
    return ids.map((id, i) => id ?? this.specials[tokens[i]].ids[0]);
  }
}
