"""open_clip's tokenizers as a `tokenizer.json` that the `tokenizers` library reads, so that a device needs no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from clip_rd_edge.contract.bundle import TOKENIZER
from clip_rd_edge.contract.tokenizer import TokenizerSpec
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.utils.io import write_text

# What open_clip's SimpleTokenizer cuts a cleaned text by; its special tokens go in front. Its pattern ignores case, by
# which U+0345, a mark whose upper case is a letter, is neither letter nor other, and is dropped.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{0345}]+"
_END_OF_WORD = "</w>"


def export_tokenizer(tokenizer: Any, folder: Path) -> TokenizerSpec:
    """Write tokenizer.json from an open_clip `SimpleTokenizer` or `HFTokenizer`; return what the file does not say.

    Ids are the same for every text, but for letters that one library's Unicode tables know and the other's do not yet.

    Raises:
        ClipRdEdgeError: another kind of tokenizer, or one with a way of padding that `TokenizerSpec` cannot tell.
    """
    import open_clip

    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return _export_clip_bpe(tokenizer, folder / TOKENIZER)
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        return _export_hugging_face(tokenizer, folder / TOKENIZER)
    raise ClipRdEdgeError(
        f"A tokenizer of the kind {type(tokenizer).__name__} cannot be exported; "
        "expected open_clip's SimpleTokenizer or HFTokenizer."
    )


def _export_clip_bpe(tokenizer: Any, path: Path) -> TokenizerSpec:
    from tokenizers import Regex, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    specials = {name: i for name, i in tokenizer.encoder.items() if i in tokenizer.all_special_ids}
    vocabulary = {name: i for name, i in tokenizer.encoder.items() if name not in specials}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    free = itertools.count(len(tokenizer.encoder))
    for name, token_id in specials.items():
        _merge_whole(name, token_id, vocabulary=vocabulary, merges=merges, free=free)
    fast = FastTokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
    pattern = Regex("|".join([*specials, _WORDS]))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = (next(n for n, i in specials.items() if i == token_id) for token_id in tokenizer.all_special_ids[:2])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, specials[start]), (end, specials[end])]
    )
    _write(fast, path)
    return TokenizerSpec(
        context_length=int(tokenizer.context_length), clean=_cleaning_of(tokenizer), end_id=specials[end]
    )


def _merge_whole(
    name: str, token_id: int, *, vocabulary: dict[str, int], merges: list[tuple[str, str]], free: Iterator[int]
) -> None:
    """Teach the model to merge a special token's name, met as a word of its own in a text, to its one id.

    open_clip does so only where its pattern meets the name as a word: in `!<end_of_text>` the `<` belongs to `!<`.
    The library's added tokens are found anywhere, so these are no added tokens. The merges cannot touch another word,
    since no other has a bracket and a letter in it, and they come after all others, so the pieces are known.
    """
    from tokenizers import models

    pieces = [token.value for token in models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD).tokenize(name)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merges.append((merged, piece))
        merged += piece
        # A step on the way to the whole name, never what a word ends as, so that no text gets an id that is no token's.
        # The ids go on where the tokens' end: the library complains of holes by listing them all.
        vocabulary[merged] = token_id if merged == name + _END_OF_WORD else next(free)


def _export_hugging_face(tokenizer: Any, path: Path) -> TokenizerSpec:
    inner = tokenizer.tokenizer
    backend: Any = getattr(inner, "backend_tokenizer", None)
    for refused, reason in (
        (backend is None, "has no fast version"),
        (tokenizer.tokenizer_mode, f"has the mode {tokenizer.tokenizer_mode!r}"),
        (tokenizer.strip_sep_token, "strips its separator"),
        (inner.padding_side != "right", f"pads on the {inner.padding_side}"),
    ):
        if refused:
            raise ClipRdEdgeError(f"The tokenizer {inner.name_or_path!r} {reason}, which a bundle cannot express.")
    _write(backend, path)
    return TokenizerSpec(
        context_length=int(tokenizer.context_length), clean=_cleaning_of(tokenizer), pad_id=int(inner.pad_token_id)
    )


def _write(tokenizer: Any, path: Path) -> None:
    """Save a `tokenizers.Tokenizer` with its merges as `"a b"`: the file is a tenth smaller and is opened faster."""
    content = json.loads(tokenizer.to_str())
    merges = content["model"].get("merges", [])
    if merges and not any(" " in piece for pair in merges for piece in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    write_text(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def _cleaning_of(tokenizer: Any) -> Literal["lower", "whitespace", "canonicalize"]:
    from open_clip.tokenizer import get_clean_fn

    names: tuple[Literal["lower", "whitespace", "canonicalize"], ...] = ("lower", "whitespace", "canonicalize")
    for name in names:
        if tokenizer.clean_fn is get_clean_fn(name):
            return name
    raise ClipRdEdgeError(f"The tokenizer cleans texts by {tokenizer.clean_fn}, which a bundle cannot express.")
