"""Write a bundle in the layout that immich's machine-learning service reads.

config.json                          sizes
visual/model.onnx                    image (N, 3, H, W) float32 -> embedding
visual/preprocess_cfg.json           in open_clip's format
textual/model.onnx                   text (N, T) int32 -> embedding
textual/tokenizer.json, textual/tokenizer_config.json

immich's server takes models by name, and knows the size of each one's embeddings: a student takes the name of a model
of the same size. Sources: `CLIP_MODEL_INFO` of the server, `OpenClipVisualEncoder` and `OpenClipTextualEncoder` of the
machine-learning service. Where the middle of an image lies between two pixels, its crop begins at the lower one, and
open_clip's at the even one. Up to release 2.2 at least, it crops and resizes with a bicubic filter whatever
preprocess_cfg.json says; its newest source goes by `resize_mode`, shortest or squash, and `interpolation`. Every other
value of its preprocessing of images is equal up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from clip_rd_edge.bundle.manifest import TOKENIZER, Manifest, read_manifest, require_whole_towers
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.errors import UsageError, near_matches
from clip_rd_edge.exporting.graph import rename_tensors
from clip_rd_edge.exporting.layouts import Layout, require_square
from clip_rd_edge.exporting.layouts.huggingface import normalizer_with_cleaning
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.files import write_bytes, write_text
from clip_rd_edge.utils.structs import to_json

# The models of open_clip that immich knows, by the size of their embeddings; the first is the default.
MODELS = {
    512: (
        "ViT-B-32__openai", "ViT-B-32__laion2b-s34b-b79k", "ViT-B-32__laion2b_e16", "ViT-B-32__laion400m_e31",
        "ViT-B-32__laion400m_e32", "ViT-B-16__openai", "ViT-B-16__laion400m_e31", "ViT-B-16__laion400m_e32",
        "RN101__openai", "RN101__yfcc15m",
    ),
    640: ("RN50x4__openai", "ViT-B-16-plus-240__laion400m_e31", "ViT-B-16-plus-240__laion400m_e32"),
    768: (
        "ViT-L-14__openai", "ViT-L-14__laion2b-s32b-b82k", "ViT-L-14__laion400m_e31", "ViT-L-14__laion400m_e32",
        "ViT-L-14-336__openai", "ViT-L-14-quickgelu__dfn2b", "RN50x16__openai",
    ),
    1024: (
        "RN50__openai", "RN50__yfcc15m", "RN50__cc12m", "RN50x64__openai", "ViT-H-14__laion2b-s32b-b79k",
        "ViT-H-14-quickgelu__dfn5b", "ViT-H-14-378-quickgelu__dfn5b", "ViT-g-14__laion2b-s12b-b42k",
    ),
}  # fmt: skip


def immich_name(name: str | None, *, embedding_size: int, model: str) -> str:
    """Return the name under which immich takes a model: `name`, or a default for the size of its embeddings."""
    fitting = MODELS.get(embedding_size, ())
    if fitting and name in (None, *fitting):
        return name or fitting[0]
    expected = f"one of {', '.join(fitting)}" if fitting else f"embeddings of {' or '.join(map(str, MODELS))}"
    raise UsageError(
        f"immich has no model {f'named {name!r} ' if name else ''}with embeddings of {embedding_size} numbers, as "
        f"{model} has; expected {expected}.{near_matches(name or '', fitting)}",
        hint="omit {as_name}" if fitting else "clip-rd-edge distill --embedding-size 512 trains a student that fits",
    )


class Immich(Layout):
    """A model folder for immich."""

    def check_model(self, clip: ClipModel, request: Export) -> None:
        immich_name(request.as_name, embedding_size=clip.embedding_size, model=clip.name)
        require_square(clip.preprocessing, clip.name)

    def write(self, bundles: Mapping[str, Path], folder: Path, clip: ClipModel, request: Export) -> None:
        (bundle,) = bundles.values()
        write_immich(bundle, folder)
        name = immich_name(request.as_name, embedding_size=clip.embedding_size, model=clip.name)
        request.reporter.note(where_it_goes(Path(request.output), name, clip.preprocessing))


def where_it_goes(folder: Path, name: str, preprocessing: Preprocessing) -> str:
    """Report how immich finds the folder, and whether some of its releases resize in another way."""
    given = f"{preprocessing.resize_mode}, {preprocessing.interpolation}"
    note = f"; immich up to 2.2 at least crops images and resizes with a bicubic filter, and this model expects {given}"
    return (
        f"next: copy {folder} to clip/{name} in the model cache of immich's machine-learning service (/cache in its "
        f"container, the volume model-cache), and choose {name} as the smart search model; run smart search for all "
        "assets again, because embeddings of two models cannot be compared"
        f"{note if given != 'shortest, bicubic' else ''}"
    )


def write_immich(bundle: Path, folder: Path) -> None:
    """Write the ONNX bundle `bundle` as a model folder for immich."""
    manifest = read_manifest(bundle)
    require_whole_towers(bundle, manifest, purpose="a model folder for immich")
    image = rename_tensors(onnx.load(bundle / manifest.image.file), {manifest.image.input_name: "image"})
    write_bytes(folder / "visual" / "model.onnx", image.SerializeToString())
    tower = manifest.require_text()
    text = _take_int32_ids(onnx.load(bundle / tower.file), tower.input_name)
    write_bytes(folder / "textual" / "model.onnx", text.SerializeToString())
    write_bytes(folder / "visual" / "preprocess_cfg.json", to_json(manifest.preprocessing.open_clip_cfg()))
    _write_tokenizer(bundle / TOKENIZER, folder / "textual", manifest)
    write_bytes(folder / "config.json", to_json(_model_config(manifest)))


def _model_config(manifest: Manifest) -> dict[str, Any]:
    # Without `tokenizer_kwargs`: immich would remove "_" before the tokenizer file makes a space of it.
    text = {"context_length": manifest.tokenizer.context_length}
    vision = {"image_size": manifest.preprocessing.size[0]}
    return {"embed_dim": manifest.embedding_size, "vision_cfg": vision, "text_cfg": text}


def _take_int32_ids(model: onnx.ModelProto, input_name: str) -> onnx.ModelProto:
    """Change the graph's input in place to `text`, int32, and cast it to the int64 that the tower reads."""
    text = model.graph.input[0]
    text.name = "text"
    text.type.tensor_type.elem_type = TensorProto.INT32
    model.graph.node.insert(0, helper.make_node("Cast", ["text"], [input_name], name="ids", to=TensorProto.INT64))
    return model


def _write_tokenizer(path: Path, folder: Path, manifest: Manifest) -> None:
    from tokenizers import Tokenizer

    content = json.loads(path.read_text(encoding="utf-8"))
    # A bundle's runtime cleans a text before tokenising; immich expects the tokenizer file to do it.
    content["normalizer"] = normalizer_with_cleaning(content["normalizer"], manifest.tokenizer)
    write_text(folder / TOKENIZER, json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    pad_token = Tokenizer.from_file(str(path)).id_to_token(manifest.tokenizer.pad_id)
    write_bytes(folder / "tokenizer_config.json", to_json({"pad_token": pad_token}))
