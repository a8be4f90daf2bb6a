"""Write a bundle in the layout that immich's machine-learning service reads. Never imports torch.

config.json                          sizes and text cleaning
visual/model.onnx                    image (N, 3, H, W) float32 -> embedding
visual/preprocess_cfg.json           in open_clip's format
textual/model.onnx                   text (N, T) int32 -> embedding
textual/tokenizer.json, textual/tokenizer_config.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import onnx
from onnx import TensorProto, helper

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, read_manifest
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.io import new_folder, require_free_output, write_bytes, write_text


def write_immich(bundle: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write the ONNX bundle `bundle` as a model folder for immich.

    Raises:
        UsageError: `output` is in use, or immich does not support the model's preprocessing.
    """
    require_free_output(output, overwrite=overwrite)
    manifest = read_manifest(bundle)
    preprocessing = manifest.preprocessing
    height, width = preprocessing.size
    if manifest.image.preprocesses or preprocessing.resize_mode == "longest" or height != width:
        raise UsageError(
            "immich does its own preprocessing: it resizes the shortest edge and crops a square; "
            f"{manifest.name} takes {height} × {width} with resize mode {preprocessing.resize_mode}"
            f"{', preprocessed in its graph' if manifest.image.preprocesses else ''}.",
            hint="omit --layout or --preprocess-in-graph",
        )
    with new_folder(output) as folder:
        image = _rename_input(onnx.load(bundle / manifest.image.file), manifest.image.input_name, "image")
        write_bytes(folder / "visual" / "model.onnx", image.SerializeToString())
        text = _take_int32_ids(onnx.load(bundle / manifest.text.file), manifest.text.input_name)
        write_bytes(folder / "textual" / "model.onnx", text.SerializeToString())
        _write_json(folder / "visual" / "preprocess_cfg.json", {**msgspec.to_builtins(preprocessing), "mode": "RGB"})
        _write_tokenizer(bundle / TOKENIZER, folder / "textual", manifest)
        _write_json(folder / "config.json", _model_config(manifest))


def _model_config(manifest: Manifest) -> dict[str, Any]:
    text: dict[str, Any] = {"context_length": manifest.tokenizer.context_length}
    if manifest.tokenizer.clean == "canonicalize":
        text["tokenizer_kwargs"] = {"clean": "canonicalize"}
    vision = {"image_size": manifest.preprocessing.size[0]}
    return {"embed_dim": manifest.embedding_size, "vision_cfg": vision, "text_cfg": text}


def _rename_input(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    """Rename the graph's input in place."""
    model.graph.input[0].name = new
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return model


def _take_int32_ids(model: onnx.ModelProto, input_name: str) -> onnx.ModelProto:
    """Change the graph's input in place to `text`, int32, and cast it to the int64 that the tower reads."""
    text = model.graph.input[0]
    text.name = "text"
    text.type.tensor_type.elem_type = TensorProto.INT32
    model.graph.node.insert(0, helper.make_node("Cast", ["text"], [input_name], name="ids", to=TensorProto.INT64))
    return model


def _write_tokenizer(path: Path, folder: Path, manifest: Manifest) -> None:
    from tokenizers import Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(path))
    if manifest.tokenizer.clean == "lower":
        # A bundle's runtime lower-cases the text before tokenising; immich expects the tokenizer file to do it.
        lower = normalizers.Lowercase()
        tokenizer.normalizer = (
            normalizers.Sequence([lower, tokenizer.normalizer]) if tokenizer.normalizer is not None else lower
        )
    write_text(folder / TOKENIZER, tokenizer.to_str())
    _write_json(folder / "tokenizer_config.json", {"pad_token": tokenizer.id_to_token(manifest.tokenizer.pad_id)})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
