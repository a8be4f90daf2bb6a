"""Load sentence encoders as text towers that open_clip can build."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.runs import model_folder
from clip_rd_edge.errors import ConfigError, InputError, UsageError, first_line, near_matches, quoted
from clip_rd_edge.models.classifiers import SENTENCE_ENCODERS
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.own_parts import NO_STRANGERS
from clip_rd_edge.models.text_weights import build_text_tower, has_quick_gelu, separate_text_tower
from clip_rd_edge.utils.paths import Typed, is_file, is_folder
from clip_rd_edge.utils.structs import read_json_objects

# The pooling modes of sentence-transformers, in its 1_Pooling/config.json, under open_clip's names.
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
# Versions before 6 wrote a flag for each mode.
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_AFTER_PADDING = ("roberta", "xlm-roberta")  # the first position of a text is the one after the padding's token id
_CONTEXT_LENGTH = 77


class _Module(msgspec.Struct, frozen=True):
    """An entry of sentence-transformers' modules.json."""

    type: str


@dataclass(frozen=True)
class SentenceEncoder:
    """A text tower of open_clip, in evaluation mode, with its tokenizer.

    Attributes:
        text_cfg: from which open_clip builds `model`.
        model: maps token ids (N, T) to features (N, D).
        embedding_size: D.
        source: where the weights come from, for the provenance of what is built from them.
    """

    text_cfg: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    embedding_size: int
    source: str

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of one batch, (N, D), L2-normalised."""
        return nn.functional.normalize(self.model(self.tokenizer(list(texts))).float(), dim=-1)


def load_sentence_encoder(spec: Typed, *, context_length: int | None = None) -> SentenceEncoder:
    """Load a sentence encoder.

    Args:
        spec: a folder in the layout of sentence-transformers or transformers, or a zip archive of one; the name of such
            a repository on the Hugging Face hub; or an open_clip model as `local-dir:PATH` or `hf-hub:ORG/REPO`, whose
            text tower is used. `all-MiniLM-L6-v2` is loaded from an installed package where there is one.
        context_length: T, the number of token ids per text. None for 77, or the encoder's maximum, if that is less; an
            open_clip model has its own.
    """
    if spec.startswith("hf-hub:") or (model_folder(spec) is not None):
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
    if not (folder / "config.json").is_file():
        raise InputError(
            f"The sentence encoder {source} has no config.json.",
            hint="name a folder that transformers can load, a zip archive of one, or an open_clip model",
        )
    try:
        with NO_STRANGERS:
            config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types
        raise ConfigError(
            f"The config.json of the sentence encoder {source} could not be read: {first_line(error)}.",
            hint="a newer transformers may know it, or the file is damaged",
        ) from error
    supported = open_clip.hf_configs.arch_dict
    if config.model_type not in supported:
        raise ConfigError(
            f"open_clip cannot hold a sentence encoder of type {config.model_type!r} ({source}); expected one of "
            f"{', '.join(sorted(supported))}."
        )
    width = getattr(config, supported[config.model_type]["config_names"]["width"])
    text_cfg = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": name,
        "hf_proj_type": None,  # the projection would be the identity
        "hf_pooler_type": _pooler(folder, source),
        "context_length": min(context_length, _max_context_length(config) or context_length),
    }
    try:
        with NO_STRANGERS:
            model = build_text_tower(text_cfg, embedding_size=int(width))
            tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=text_cfg["context_length"])
    except Exception as error:  # transformers raises many types
        raise ConfigError(f"The sentence encoder {source} could not be loaded: {first_line(error)}.") from error
    return SentenceEncoder(text_cfg, model.eval(), tokenizer, int(width), source)


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
        kinds = [module.type.rpartition(".")[2] for module in _read(modules, list[_Module], source)]
        if unsupported := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
            raise ConfigError(
                f"open_clip cannot hold the layer {unsupported[0]} of the sentence encoder {source}; expected a "
                "transformer and a pooling."
            )
    pooling = folder / "1_Pooling" / "config.json"
    if not pooling.is_file():
        return "mean_pooler"
    config = _read(pooling, dict[str, Any], source)
    flags = [name for name, value in config.items() if value is True and name.startswith("pooling_mode_")]
    named = config.get("pooling_mode") or [_FLAGS.get(name, name) for name in flags]
    modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    if len(modes) != 1 or modes[0] not in _POOLERS:
        raise ConfigError(
            f"open_clip cannot hold the pooling of the sentence encoder {source}, {' and '.join(modes) or 'none'}; "
            f"expected one of {', '.join(_POOLERS)}."
        )
    return _POOLERS[modes[0]]


def _read(path: Path, kind: Any, source: str) -> Any:
    try:
        return msgspec.convert(read_json_objects(path), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path.name} of the sentence encoder {source} is invalid: {error}.") from error


@contextmanager
def _extracted(archive: Path) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        except zipfile.BadZipFile as error:
            raise InputError(f"The sentence encoder {archive} is not a zip archive.") from error
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
