"""Models that are made from others: with a smaller text tower, or with weights between those of two.

Most of a sentence encoder is its vocabulary: MiniLM-L6 has 11.7 of its 22.6 million parameters in the embeddings of
30,522 tokens, XLM-R 192 of 278 million in those of 250,002. Texts of one kind need a part of them, and a word without a
token of its own is spelled with shorter ones (Abdaoui et al. 2020, Load What You Need). Evenly spaced layers of the
tower are then a start that soon learns what all of them returned (Sanh et al. 2019, DistilBERT). CLIP's own towers are
alike: of the 63 million parameters of ViT-B's, 25 are the embeddings of 49,408 tokens.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.bundle.runs import model_folder, read_training_record
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import (
    ClipModel,
    float32_on_cpu,
    form_fingerprint,
    model_fingerprint,
    parameter_count,
    text_module,
)
from clip_rd_edge.models.encoder import (
    CaptionTower,
    TorchEncoder,
    layers_key,
    pooling_of,
    text_layers,
    text_transformer,
    token_embedding,
)
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.text_weights import evenly_spaced
from clip_rd_edge.models.tokenizers import most_used_tokens, needed_tokens, pieces_of, with_tokens, write_clip_tokenizer
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.text import SILENT, Reporter

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_BATCH = 1_024


def trim_text_tower(
    clip: ClipModel,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
    texts: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> tuple[ClipModel, str]:
    """Return a copy of a model with a smaller text tower to train, and a sentence about it; the image tower is shared.

    Args:
        layers: how many of the transformer's layers stay, evenly spaced, the first and the last among them; None for
            all.
        vocabulary: how many tokens stay: those that a text cannot do without, which are special or single characters
            that occur in `texts`, then those that `texts` have most, then those with the lowest ids. A token of BPE, as
            CLIP's are, stays with those that it is merged from. None for all.
        texts: such as the model will be given.
    """
    require_trim(layers, vocabulary, texts)
    before = _text_parameters(clip)
    visual = clip.model.get_submodule("visual")
    model = copy.deepcopy(clip.model, {id(visual): visual})
    clip = replace(clip, model=model, model_cfg=copy.deepcopy(clip.model_cfg))
    kept = []
    if vocabulary is not None:
        clip, which = _trim_vocabulary(clip, vocabulary, texts, reporter)
        kept.append(which)
    if layers is not None:
        kept.append(_trim_layers(clip, layers))
    _leave_out_dropout(clip)
    size = f"{_text_parameters(clip) / 1e6:.1f} of {before / 1e6:.1f} million parameters"
    return clip, f"the text tower keeps {' and '.join(kept)}: {size}"


@float32_on_cpu()
def write_trimmed(
    spec: Typed,
    folder: Path,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
    texts: Sequence[str] = (),
    overwrite: bool = True,
    reporter: Reporter = SILENT,
) -> None:
    """Load a model, trim it as `trim_text_tower` does, and save it in a folder, with what is known of its training.

    Args:
        overwrite: if false, what is in use at `folder` once the model is written is kept.
    """
    require_trim(layers, vocabulary, texts)
    reporter.update("loading the model")
    clip = load_clip(spec)
    trimmed, description = trim_text_tower(clip, layers=layers, vocabulary=vocabulary, texts=texts, reporter=reporter)
    reporter.note(description)
    reporter.update("writing the model")
    record = {"model": spec, "text_layers": layers, "vocabulary": vocabulary}
    save_clip(folder, trimmed, provenance={**read_training_record(spec), "trimmed": record}, overwrite=overwrite)


def require_trim(layers: int | None, vocabulary: int | None, texts: Sequence[str]) -> None:
    """Refuse what `trim_text_tower` refuses whatever the model is."""
    if (layers is None and vocabulary is None) or (vocabulary is not None and not texts):
        raise UsageError(
            "There is nothing to trim by: neither layers to keep, nor tokens and texts to choose them by.",
            hint="{text_layers} N, or {vocabulary} N with {texts} FILE: such as the model will be given, one per line",
        )


def _text_parameters(clip: ClipModel) -> int:
    return parameter_count(clip.model) - parameter_count(clip.model.get_submodule("visual"))


def _trim_layers(clip: ClipModel, count: int) -> str:
    blocks = text_layers(clip)
    total = len(blocks)
    if not 1 <= count < total:
        raise ConfigError(
            f"The text tower of {clip.name} has {total} layers, and {count} are to stay; expected 1 to {total - 1}."
        )
    chosen = evenly_spaced(count, total=total)
    for number in reversed(range(total)):
        if number not in chosen:
            del blocks[number]
    if clip.has_hugging_face_text:
        setattr(text_transformer(clip).config, layers_key(clip), count)
    else:
        clip.model_cfg["text_cfg"]["layers"] = count
    return f"layer{'s' * (count > 1)} {', '.join(str(number + 1) for number in chosen)} of {total}"


def _trim_vocabulary(clip: ClipModel, size: int, texts: Sequence[str], reporter: Reporter) -> tuple[ClipModel, str]:
    clip = _with_tokenizer_file(clip)
    content = json.loads(_backend(clip).to_str())
    pieces = pieces_of(content, clip.name)
    count = len(pieces)
    tokenizer: Any = clip.tokenizer
    used = np.zeros(count, np.int64)
    for part in in_batches(len(texts), _BATCH):
        reporter.update("counting tokens", part.start, len(texts))
        used += np.bincount(tokenizer(list(texts[part])).numpy().ravel(), minlength=count)
    special = {token["id"] for token in content["added_tokens"]}
    if clip.has_hugging_face_text:  # the padding keeps its number, on which RoBERTa's positions depend
        special |= {*range((text_transformer(clip).config.pad_token_id or 0) + 1)}
    needed = needed_tokens(content, pieces, used, special)
    if not len(needed) <= size < count:
        raise ConfigError(
            f"The vocabulary of {clip.name} has {count:,} tokens, and {size:,} are to stay; expected "
            f"{len(needed):,} to {count - 1:,}.",
            hint=f"{len(needed):,} are special, or single characters that texts are spelled with",
        )
    used[list(special)] = 0
    kept = most_used_tokens(content, used, needed, size)
    _keep_embeddings(clip, kept)
    share = used[kept].sum() / max(used.sum(), 1)
    trimmed = replace(clip, tokenizer=_tokenizer_of(clip, with_tokens(content, kept)))
    return trimmed, f"{len(kept):,} of {count:,} tokens ({share:.1%} of those in the texts)"


def _backend(clip: ClipModel) -> Any:
    inner: Any = getattr(clip.tokenizer, "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"The tokenizer of {clip.name} has no {_TOKENIZER}, whose tokens could be left out.",
            hint="omit {vocabulary}",
        )
    return backend


def _with_tokenizer_file(clip: ClipModel) -> ClipModel:
    """Return a model whose tokenizer has a tokenizer.json, which CLIP's own lacks: it always has all of its tokens."""
    import open_clip

    if clip.has_hugging_face_text:
        return clip
    has_end_alone = CaptionTower(nn.Identity(), clip.model).choices and pooling_of(text_module(clip.model)) == "argmax"
    if not has_end_alone:
        raise ConfigError(
            f"What the text tower of {clip.name} returns depends on padding, or on other tokens than the end; expected "
            "a tower as CLIP's own, or of Hugging Face.",
            hint="omit {vocabulary}",
        )
    if not isinstance(clip.tokenizer, open_clip.SimpleTokenizer):
        return clip
    with TemporaryDirectory() as folder:
        options = write_clip_tokenizer(clip.tokenizer, Path(folder))
        tokenizer = open_clip.tokenizer.HFTokenizer(folder, context_length=clip.context_length, **options)
    text_cfg = {**clip.model_cfg["text_cfg"], "hf_tokenizer_name": clip.name, "tokenizer_kwargs": options}
    return replace(clip, tokenizer=tokenizer, model_cfg={**clip.model_cfg, "text_cfg": text_cfg})


def _keep_embeddings(clip: ClipModel, kept: Sequence[int]) -> None:
    text: Any = text_module(clip.model)
    embedding = token_embedding(clip)
    if clip.has_hugging_face_text:
        text_transformer(clip).config.vocab_size = len(kept)
    else:
        clip.model_cfg["text_cfg"]["vocab_size"] = len(kept)
    with torch.no_grad():
        embedding.weight = nn.Parameter(embedding.weight[kept].clone())
    model: Any = clip.model
    embedding.num_embeddings = text.vocab_size = model.vocab_size = len(kept)


def _tokenizer_of(clip: ClipModel, content: dict[str, Any]) -> Any:
    import open_clip

    text_cfg = clip.model_cfg["text_cfg"]
    with TemporaryDirectory() as folder:
        clip.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        config = json.loads((Path(folder) / _TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)  # has the numbers, as transformers 4 writes it
        for path in Path(folder).iterdir():  # they may hold the whole vocabulary
            path.unlink()
        (Path(folder) / _TOKENIZER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        (Path(folder) / _TOKENIZER).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return open_clip.tokenizer.HFTokenizer(
            folder,
            context_length=clip.context_length,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            **text_cfg.get("tokenizer_kwargs", {}),
        )


def _leave_out_dropout(clip: ClipModel) -> None:
    """Have the tower trained without dropout, which would only disturb a tower that is to imitate another."""
    if clip.has_hugging_face_text:
        config = text_transformer(clip).config
        for name in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
            setattr(config, name, 0.0)


def interpolate_clip(before: ClipModel, after: ClipModel, *, share: float) -> ClipModel:
    """Return a model with the weights (1 − share) · before + share · after (WiSE-FT, Wortsman et al. 2022).

    A fine-tuned model has forgotten some of what it could do before. Between the two there are weights that are nearly
    as good on the new data and nearly as good on the old, as long as the fine-tuning did not go far. Counters, such as
    the number of batches that a norm has seen, are those of `after`.
    """
    old, new = before.model.state_dict(), after.model.state_dict()
    model = copy.deepcopy(after.model)
    model.load_state_dict(
        {name: torch.lerp(old[name], own, share) if own.is_floating_point() else own for name, own in new.items()}
    )
    return replace(after, model=model)


class CurvePoint(msgspec.Struct, frozen=True):
    """The accuracy of the model with this share of the second model's weights: top-1 or R@1, by task."""

    weight: float
    scores: dict[str, float]


@dataclass(frozen=True)
class AveragedModel(os.PathLike[str]):
    """An average of two models. It is path-like: pass it wherever the folder of a model is expected.

    Attributes:
        folder: an open_clip folder.
        weight: share of the second model's weights.
        curve: accuracy by weight, in ascending order; empty without tasks.
    """

    folder: Path
    weight: float
    curve: tuple[CurvePoint, ...] = ()

    def __fspath__(self) -> str:
        return str(self.folder)


@float32_on_cpu()
def average_models(
    names: tuple[Typed, Typed],
    folder: Path,
    *,
    weight: float | Literal["best"],
    score: Callable[[TorchEncoder], dict[str, float]] | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> AveragedModel:
    """Write the model with the weights (1 − weight) · first + weight · second to `folder`.

    Args:
        names: two trained models of one form.
        weight: a number from 0 to 1; or `best` for the one on the curve with the highest mean score, and the nearest to
            0.5 if several have it.
        score: measures a model, by task; every tenth is measured, and the weight itself.
        force: replace an earlier average in `folder`; a folder with anything else is refused.
    """
    if weight != "best" and not (isinstance(weight, float | int) and 0 <= weight <= 1):
        raise UsageError(f"The weight is {weight!r}; expected a number from 0 to 1, or best.")
    if weight == "best" and score is None:
        raise UsageError(
            "The best weight was asked for, but there is no task to measure it on.",
            hint="name labelled images: {tasks} my-images/, or a number: {weight} 0.5",
        )
    sources = [source for name in names if (source := model_folder(name))]
    require_output(folder, "average", overwrite=force, sources=sources)
    reporter.update("loading both models")
    first, second = (load_clip(name, separate_text=True) for name in names)
    if form_fingerprint(first) != form_fingerprint(second):
        raise ConfigError(
            f"{first.name} and {second.name} differ in architecture, preprocessing or tokenizer; expected models that "
            "differ in their weights alone.",
            hint="average a model with one that was trained from it, or two runs from the same start",
        )
    own = () if weight == "best" else (float(weight),)
    curve = []
    if score:
        for number, share in enumerate(weights := sorted({*(tenth / 10 for tenth in range(11)), *own})):
            reporter.update("evaluating weights", number, len(weights))
            curve.append(CurvePoint(share, score(TorchEncoder(interpolate_clip(first, second, share=share)))))
    best = max(curve, key=lambda p: (statistics.fmean(p.scores.values()), -abs(p.weight - 0.5)), default=None)
    chosen = best.weight if weight == "best" and best else float(weight)
    before, after = map(read_training_record, names)
    record = {
        **((after or before) if chosen > 0 else before),  # with a weight of 0, it is the first
        "average": {
            "models": [first.name, second.name],
            "sha256": [model_fingerprint(first), model_fingerprint(second)],
            "weight": chosen,
            "chosen_by": "best" if weight == "best" else "user",
            "curve": msgspec.to_builtins(curve),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    save_clip(folder, interpolate_clip(first, second, share=chosen), provenance=record, overwrite=force)
    return AveragedModel(folder, chosen, tuple(curve))
