"""Build a teacher without a CLIP model: an image classifier and a sentence encoder, joined by the names of the classes.

With f (C,) the features of an image, W (K, C) the classifier's weights and T (K, D) the embeddings of the class names,
each less its mean over the classes, the image embedding is the least-squares solution of

    T e = W f

so the similarities of an image to the class names are the classifier's logits (up to what D dimensions can hold). It is
linear in the features: the result is an ordinary open_clip model of a timm trunk, a projection and the sentence
encoder, and no training image is needed. It places an image among all texts, and not only among the class names, by how
the sentence encoder relates them (DeViSE, Frome et al. 2013; ConSE, Norouzi et al. 2014).
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.errors import ConfigError, InputError, UsageError, first_line, near_matches, quoted
from clip_rd_edge.models.classifiers import SENTENCE_ENCODERS, ImageClassifier, load_classifier
from clip_rd_edge.models.clip import ClipModel, float32_on_cpu
from clip_rd_edge.models.hub import NO_STRANGERS
from clip_rd_edge.models.load import load_clip, preprocessing_of
from clip_rd_edge.models.names import is_trained
from clip_rd_edge.models.students import student_config
from clip_rd_edge.models.text_weights import build_text_tower, has_quick_gelu, separate_text_tower
from clip_rd_edge.utils.files import read_text_limited, text_lines
from clip_rd_edge.utils.paths import AnyPath, Typed, as_text, is_file, is_folder
from clip_rd_edge.utils.structs import read_json
from clip_rd_edge.utils.text import SILENT, Reporter

IMAGENET = "imagenet"
# Chosen by benchmarks/training/stitched_teacher.py.
RIDGE = 0.3
LOGIT_SCALE = 20.0
_TEXTS_PER_BATCH = 64


def read_class_names(names: str | os.PathLike[str]) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class, in the order of the classifier's outputs; lines without any are left out.

    Args:
        names: a text file with one class per line, where `;` separates synonyms and descriptions; or `imagenet` for the
            1,000 classes of ImageNet with WordNet's synonyms and descriptions.
    """
    if str(names) == IMAGENET:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return tuple(
            (*info.index_to_description(index).split(", "), info.index_to_description(index, detailed=True))
            for index in range(info.num_classes())
        )
    lines = text_lines(read_text_limited(Path(names)))
    classes = (tuple(name.strip() for name in line.split(";") if name.strip()) for line in lines)
    return tuple(filter(None, classes))


def class_nouns() -> list[str]:
    """Return nouns of all kinds, some 22,000: the names of ImageNet-1k's classes, and the first of ImageNet-22k's."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    synonyms = [name for names in read_class_names(IMAGENET) for name in names[:-1]]
    first = [str(info.index_to_description(index)).split(", ")[0] for index in range(info.num_classes())]
    return list(dict.fromkeys(name.strip() for name in (*synonyms, *first)))


def class_embeddings(text: SentenceEncoder, names: Sequence[Sequence[str]], *, reporter: Reporter = SILENT) -> Tensor:
    """Return one embedding per class, (K, D), L2-normalised: the mean of the embeddings of its names."""
    texts = [name for synonyms in names for name in synonyms]
    reporter.update("embedding the names of the classes", 0, len(texts))
    tokens = text.tokenizer(texts)
    order = text.lengths(tokens).argsort(stable=True)  # short ones together: a quarter less to compute
    embeddings = torch.empty(len(texts), text.embedding_size)
    for batch in in_batches(len(texts), _TEXTS_PER_BATCH):
        embeddings[order[batch]] = text.encode_tokens(tokens[order[batch]])
        reporter.update("embedding the names of the classes", batch.stop, len(texts))
    chunks = torch.split(embeddings, [len(synonyms) for synonyms in names])
    means = [chunk.mean(dim=0) for chunk in chunks]
    return nn.functional.normalize(torch.stack(means), dim=-1)


def solve_projection(weight: Tensor, names: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Return the projection from features to embeddings, (D, C).

    Args:
        weight: W, (K, C), the classifier's weights.
        names: (K, D), the class names' embeddings. Names may repeat.
        ridge: relative to the mean eigenvalue of TᵀT. As it grows, the solution approaches Tᵀ W, the mean of the names
            weighted by the logits.
    """
    # What all classes share does not distinguish them: a softmax ignores it in W, and in T it would dominate.
    weight, names = weight.double() - weight.double().mean(dim=0), names.double() - names.double().mean(dim=0)
    gram = names.T @ names
    penalty = ridge * (gram.trace() / len(gram))
    projection: Tensor = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), names.T @ weight)
    return projection.float()


@float32_on_cpu()
def stitch_models(
    classifier: str,
    text: Typed,
    names: Sequence[Sequence[str]],
    *,
    pretrained: AnyPath | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    reporter: Reporter = SILENT,
) -> tuple[ClipModel, dict[str, Any]]:
    """Load a classifier and a sentence encoder, and join them; return the model, and where its weights are from.

    Arguments and errors are those of `load_classifier`, `load_sentence_encoder` and `stitch_clip`.
    """
    reporter.update("loading the image classifier")
    image = load_classifier(classifier, pretrained=as_text(pretrained))
    reporter.update("loading the sentence encoder")
    sentences = load_sentence_encoder(text, context_length=context_length)
    clip = stitch_clip(image, sentences, names, image_size=image_size, reporter=reporter)
    return clip, {"classifier": classifier, "image_weights": image.source, "text_weights": sentences.source}


def stitch_clip(
    classifier: ImageClassifier,
    text: SentenceEncoder,
    names: Sequence[Sequence[str]],
    *,
    image_size: int | None = None,
    reporter: Reporter = SILENT,
) -> ClipModel:
    """Join a classifier and a sentence encoder to an open_clip model, whose labels are the first names of the classes.

    Args:
        names: for each class, its name and further names; see `read_class_names`.
        image_size: edge of the input in pixels; None uses the classifier's own.
    """
    import open_clip

    if len(names) != classifier.class_count:
        raise ConfigError(
            f"The classifier has {classifier.class_count:,} classes, but there are {len(names):,} class names.",
            hint="one line per class, in the order of the classifier's outputs",
        )
    image_size = image_size or classifier.image_size
    config = student_config(classifier.architecture, embedding_size=text.embedding_size, image_size=image_size)
    expected = classifier.preprocessing  # not timm's default weights'
    preprocess_cfg = {**config["preprocess_cfg"], "mean": list(expected.mean), "std": list(expected.std)}
    model_cfg = {
        "embed_dim": text.embedding_size,
        "vision_cfg": config["model_cfg"]["vision_cfg"],
        "text_cfg": text.text_cfg,
        "custom_text": True,
    }
    embeddings = class_embeddings(text, names, reporter=reporter)
    reporter.update("joining the two")
    projection = solve_projection(classifier.head.weight.detach(), embeddings)
    # The text tower is there already: a small one is built in its place, and replaced.
    placeholder = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CustomTextCLIP(text.embedding_size, model_cfg["vision_cfg"], placeholder).eval()
    model.text, model.context_length = text.model, text.text_cfg["context_length"]
    _load_image_tower(model.visual, classifier, projection)
    _verify(model.visual, classifier, projection, image_size=image_size)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(LOGIT_SCALE))
    open_clip.model.set_model_preprocess_cfg(model, preprocess_cfg)
    return ClipModel(
        name=f"{classifier.architecture} + {text.source}",
        model=model,
        tokenizer=text.tokenizer,
        preprocessing=preprocessing_of(model),
        model_cfg=model_cfg,
        labels=tuple(dict.fromkeys(synonyms[0] for synonyms in names)),
    )


def _load_image_tower(visual: Any, classifier: ImageClassifier, projection: Tensor) -> None:
    """Copy the classifier's weights, with the projection in place of its last layer."""
    head = classifier.head_name
    state = {k: v for k, v in classifier.model.state_dict().items() if not k.startswith(f"{head}.")}
    # Some trunks keep their last layer as the projection: see `student_config`.
    if "proj" in dict(visual.head.named_children()):
        visual.head.proj.weight = nn.Parameter(projection.clone())
    else:
        state |= {f"{head}.weight": projection, f"{head}.bias": torch.zeros(len(projection))}
    visual.trunk.load_state_dict(state, strict=False)  # what other layers change is verified


@torch.no_grad()
def _verify(visual: nn.Module, classifier: ImageClassifier, projection: Tensor, *, image_size: int) -> None:
    """Check that open_clip's image tower returns the projected features of the classifier."""
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        actual, expected = visual(pixels), classifier.features(pixels) @ projection.T
    except Exception as error:  # trunks raise many types for sizes that they do not support
        raise ConfigError(
            f"{classifier.architecture} cannot take images of {image_size} × {image_size} pixels: {first_line(error)}.",
            hint=f"{{image_size}} {classifier.image_size}",
        ) from error
    bound = 1e-3 * float(expected.abs().max())
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-3, atol=bound):
        raise ConfigError(
            f"open_clip cannot hold {classifier.architecture}: its image tower does not return the features that enter "
            "the classifier."
        )


# The pooling modes of sentence-transformers, in its 1_Pooling/config.json, under open_clip's names.
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
# Versions before 6 wrote a flag for each mode.
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_AFTER_PADDING = ("roberta", "xlm-roberta")  # the first position of a text is the one after the padding's token id
_CONTEXT_LENGTH = 77


class _Module(msgspec.Struct, frozen=True):
    type: str


@dataclass(frozen=True)
class SentenceEncoder:
    """A text tower of open_clip, in evaluation mode, with its tokenizer.

    Attributes:
        model: maps token ids (N, T) to features (N, D).
        source: where the weights come from, for the provenance of what is built from them.
        padding: the token id that `model` masks; None if it does not.
    """

    text_cfg: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    embedding_size: int
    source: str
    padding: int | None = None

    def lengths(self, tokens: Tensor) -> Tensor:
        """Return the numbers of tokens of texts, (N,), without the padding that the model masks."""
        if self.padding is None:
            return torch.full((len(tokens),), tokens.shape[1])
        return tokens.shape[1] - (tokens != self.padding).flip(1).long().argmax(dim=1)

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self.encode_tokens(self.tokenizer(list(texts)))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of one batch of token ids, (N, T), as (N, D), L2-normalised."""
        # Columns of padding alone cost most of the time, and change nothing.
        features = self.model(tokens[:, : int(self.lengths(tokens).max())])
        return nn.functional.normalize(features.float(), dim=-1)


def load_sentence_encoder(spec: Typed, *, context_length: int | None = None) -> SentenceEncoder:
    """Load a sentence encoder.

    Args:
        spec: a folder in the layout of sentence-transformers or transformers, or a zip archive of one; the name of such
            a repository on the Hugging Face hub; or a trained model, as `models.names` has it, whose text tower is
            used. `all-MiniLM-L6-v2` is loaded from an installed package where there is one.
        context_length: T, the number of token ids per text. None for 77, or the encoder's maximum, if that is less; an
            open_clip model has its own.
    """
    if is_trained(spec):
        return _text_tower_of(spec, context_length)
    context_length = context_length or _CONTEXT_LENGTH
    packaged = SENTENCE_ENCODERS.get(spec.removeprefix("sentence-transformers/"))
    if packaged and packaged.is_installed():
        with _extracted(packaged.verified()) as folder:
            return _hugging_face(folder, context_length=context_length, name=spec, source=str(packaged))
    path = Path(spec)
    if is_file(path):
        with _extracted(path) as folder:
            return _hugging_face(folder, context_length=context_length, name=path.stem, source=spec)
    if not is_folder(path):
        path = _fetched(spec)
    return _hugging_face(path, context_length=context_length, name=Path(spec).name, source=spec)


def _text_tower_of(spec: Typed, context_length: int | None) -> SentenceEncoder:
    clip = load_clip(spec)
    if context_length not in (None, clip.context_length):
        raise UsageError(
            f"The context length of {spec} is {clip.context_length}; {context_length} was asked for.",
            hint="omit {context_length}",
        )
    model = separate_text_tower(clip)
    if has_quick_gelu(clip.model):
        raise ConfigError(
            f"The text tower of {spec} has QuickGELU, which open_clip configures for both towers together.",
            hint="name another text model",
        )
    return SentenceEncoder(clip.model_cfg["text_cfg"], model.eval(), clip.tokenizer, clip.embedding_size, spec)


def _hugging_face(folder: Path, *, context_length: int, name: str, source: str) -> SentenceEncoder:
    import open_clip
    from transformers import AutoConfig
    from transformers.utils import logging

    # Silence the warning about the pooler, which is not used, and the progress bar.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _loaded_by_transformers(source):
        config = AutoConfig.from_pretrained(folder)
    supported = open_clip.hf_configs.arch_dict
    if config.model_type not in supported:
        raise _cannot_hold(f"type {config.model_type!r}", source, supported)
    width = getattr(config, supported[config.model_type]["config_names"]["width"])
    text_cfg = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": name,
        "hf_proj_type": None,  # the projection would be the identity
        "hf_pooler_type": _pooler(folder, source),
        "context_length": min(context_length, _max_context_length(config) or context_length),
    }
    with _loaded_by_transformers(source):
        model = build_text_tower(text_cfg, embedding_size=int(width))
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=text_cfg["context_length"])
    return SentenceEncoder(text_cfg, model.eval(), tokenizer, int(width), source, padding=config.pad_token_id)


@contextmanager
def _loaded_by_transformers(source: str) -> Iterator[None]:
    try:
        with NO_STRANGERS:
            yield
    except Exception as error:  # transformers raises many types
        raise ConfigError(
            f"The sentence encoder {source} could not be loaded: {first_line(error)}.",
            hint="name a folder that transformers can load, a zip archive of one, or an open_clip model; a newer "
            "transformers may know it, or a file is damaged",
        ) from error


def _cannot_hold(what: str, source: str, expected: Iterable[str]) -> ConfigError:
    known = ", ".join(sorted(expected))
    return ConfigError(f"open_clip cannot hold a sentence encoder of {what} ({source}); expected one of {known}.")


def _max_context_length(config: Any) -> int | None:
    """Return the number of positions that a text may take; None without a limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _AFTER_PADDING:
        return positions - 1 - int(config.pad_token_id)
    return positions


def _pooler(folder: Path, source: str) -> str:
    """Return open_clip's name of the pooling that sentence-transformers records; the mean where it records none."""
    modules = folder / "modules.json"
    if modules.is_file():
        kinds = [module.type.rpartition(".")[2] for module in read_json(modules, list[_Module])]
        layers = ("Transformer", "Pooling", "Normalize")
        if unsupported := [kind for kind in kinds if kind not in layers]:
            raise _cannot_hold(f"the layer {unsupported[0]}", source, layers)
    pooling = folder / "1_Pooling" / "config.json"
    if not pooling.is_file():
        return "mean_pooler"
    config = read_json(pooling, dict[str, Any])
    flags = [name for name, value in config.items() if value is True and name.startswith("pooling_mode_")]
    named = config.get("pooling_mode") or [_FLAGS.get(name, name) for name in flags]
    modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    if len(modes) != 1 or modes[0] not in _POOLERS:
        raise _cannot_hold(f"the pooling {' and '.join(modes) or 'none'}", source, _POOLERS)
    return _POOLERS[modes[0]]


@contextmanager
def _extracted(archive: Path) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        with _loaded_by_transformers(str(archive)), zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        yield Path(folder)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]))
    except Exception as error:  # the hub client raises many types
        raise InputError(
            f"No sentence encoder {quoted(name)}: it is neither a folder, a zip archive nor an open_clip model, and it "
            f"could not be fetched from the hub.{near_matches(name, SENTENCE_ENCODERS)}",
            hint="check the name, or download it on a machine with network access, and pass its folder",
        ) from error
