"""A bundle in the layout of immich's model folder, as its machine-learning service reads it. Never imports torch.

config.json                          sizes, and how texts are cleaned
visual/model.onnx                    image (N, 3, H, W) float32 -> embedding
visual/preprocess_cfg.json           as open_clip writes it
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
from clip_rd_edge.utils.io import new_folder, refuse_unless_free, write_bytes, write_text


def write_immich(bundle: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write the ONNX bundle `bundle` as a folder for immich.

    Raises:
        UsageError: `output` is in use, or immich cannot preprocess as the model wants it.
    """
    refuse_unless_free(output, overwrite=overwrite)
    manifest = read_manifest(bundle)
    how = manifest.preprocessing
    if manifest.image.preprocesses or how.resize_mode == "longest" or how.size[0] != how.size[1]:
        raise UsageError(
            f"immich preprocesses itself, to squares by the shortest edge; {manifest.name} takes "
            f"{how.size[0]} × {how.size[1]} by {how.resize_mode}"
            f"{' in its graph' if manifest.image.preprocesses else ''}.",
            hint="leave --layout away, or --preprocess-in-graph",
        )
    with new_folder(output) as folder:
        image = _renamed(onnx.load(bundle / manifest.image.file), manifest.image.input_name, "image")
        write_bytes(folder / "visual" / "model.onnx", image.SerializeToString())
        text = _with_int32_ids(onnx.load(bundle / manifest.text.file), manifest.text.input_name)
        write_bytes(folder / "textual" / "model.onnx", text.SerializeToString())
        _write_json(folder / "visual" / "preprocess_cfg.json", {**msgspec.to_builtins(how), "mode": "RGB"})
        _write_tokenizer(bundle / TOKENIZER, folder / "textual", manifest)
        _write_json(folder / "config.json", _config(manifest))


def _config(manifest: Manifest) -> dict[str, Any]:
    text: dict[str, Any] = {"context_length": manifest.tokenizer.context_length}
    if manifest.tokenizer.clean == "canonicalize":
        text["tokenizer_kwargs"] = {"clean": "canonicalize"}
    vision = {"image_size": manifest.preprocessing.size[0]}
    return {"embed_dim": manifest.embedding_size, "vision_cfg": vision, "text_cfg": text}


def _renamed(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    model.graph.input[0].name = new
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return model


def _with_int32_ids(model: onnx.ModelProto, ids: str) -> onnx.ModelProto:
    given = model.graph.input[0]
    given.name = "text"
    given.type.tensor_type.elem_type = TensorProto.INT32
    model.graph.node.insert(0, helper.make_node("Cast", ["text"], [ids], name="ids", to=TensorProto.INT64))
    return model


def _write_tokenizer(path: Path, folder: Path, manifest: Manifest) -> None:
    from tokenizers import Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(path))
    if manifest.tokenizer.clean == "lower":
        # In a bundle the text is made lower case before; immich leaves that to the file.
        lower = normalizers.Lowercase()
        tokenizer.normalizer = (
            normalizers.Sequence([lower, tokenizer.normalizer]) if tokenizer.normalizer is not None else lower
        )
    write_text(folder / TOKENIZER, tokenizer.to_str())
    _write_json(folder / "tokenizer_config.json", {"pad_token": tokenizer.id_to_token(manifest.tokenizer.pad_id)})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
