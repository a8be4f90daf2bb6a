// Tokenises texts by tokenizer.json: the same ids as bundle/tokenizer.py for every text that was cleaned before.

import { Tokenizer as JsonTokenizer } from "./npm/tokenizers.js";

export class Tokenizer {
  // json: content of tokenizer.json; spec: the manifest's `tokenizer`.
  constructor(json, spec) {
    this.inner = new JsonTokenizer(json, {});
    this.spec = spec;
    // CLIP's start and end tokens are not listed as added tokens in the file, so the library returns no ids for them.
    this.specials = json.post_processor?.special_tokens ?? {};
  }

  // Ids of all texts in one array, each truncated or padded to the context length.
  ids(texts) {
    const { context_length: length, pad_id: pad } = this.spec;
    const ids = new BigInt64Array(texts.length * length).fill(BigInt(pad));
    texts.forEach((text, row) => this.#truncated(text).forEach((id, i) => (ids[row * length + i] = BigInt(id))));
    return ids;
  }

  #truncated(text) {
    const { context_length: length, end_id: end } = this.spec;
    const all = this.#encode(text, true);
    if (all.length <= length) return all;
    if (end !== null) return [...all.slice(0, length - 1), end];
    // Keep the special tokens around the text; truncate the text itself.
    const inner = this.#encode(text, false);
    const before = all.findIndex((_, start) => inner.every((id, i) => all[start + i] === id));
    const after = all.slice(before + inner.length);
    return [...all.slice(0, length - after.length), ...after];
  }

  #encode(text, special) {
    const { ids, tokens } = this.inner.encode(text, { add_special_tokens: special });
    return ids.map((id, i) => id ?? this.specials[tokens[i]].ids[0]);
  }
}
