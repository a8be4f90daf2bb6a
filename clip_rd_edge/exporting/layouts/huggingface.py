"""Write bundles in the layout of the Hugging Face hub, as transformers.js and fastembed read it.

config.json, preprocessor_config.json     of model type `clip`, or `siglip`, whose logits clients take sigmoids of
config.4.0.0.json                         of a text tower that is a model of transformers
tokenizer.json, tokenizer_config.json
onnx/vision_model*.onnx                   pixel_values (N, 3, H, W) float32 -> image_embeds (N, D)
onnx/text_model*.onnx                     input_ids (N, any length) int64 -> text_embeds (N, D)
onnx/model*.onnx                          both -> logits_per_image, logits_per_text, text_embeds, image_embeds

`*` is empty for float32, which transformers.js takes by default, or `_fp16`, `_int8` or `_quantized`, which it selects
by the `dtype` fp16, int8 or q8; the last two are the same file. Embeddings are L2-normalised.

open_clip builds a text tower of transformers from the config.json beside its weights, which here is that of CLIP. It
names config.4.0.0.json as its version for transformers from 4.0.0 on, which then reads that file instead; the clients
in JavaScript have no such versions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from clip_rd_edge.benchmarking.results import Results, read_results
from clip_rd_edge.bundle.encoder import Scoring
from clip_rd_edge.bundle.formats import Precision
from clip_rd_edge.bundle.manifest import TOKENIZER, Manifest, read_manifest
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import TRANSFORMERS_CONFIG
from clip_rd_edge.bundle.tokenizer import TokenizerSpec
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.graph import rename_tensors
from clip_rd_edge.exporting.layouts import Layout, require_square
from clip_rd_edge.exporting.layouts.model_card import BOTH, SUFFIXES, TEXT, VISION, write_model_card
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.exporting.towers import MAX_FILE_BYTES
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_open_clip, save_usage, training_facts
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.files import write_bytes, write_text
from clip_rd_edge.utils.paths import as_text
from clip_rd_edge.utils.structs import to_json

_Q8 = "_quantized"  # what transformers.js takes for q8, its default in a browser, and other programs for INT8
_VERSIONED_CONFIG = "config.4.0.0.json"
_END_OF_WORD = "</w>"
# open_clip's pattern for words, without what JavaScript's regular expressions lack. The text is in lower case before.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}" + "\u0345]+"
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
# A sigma that ends a word, as Unicode's Final_Sigma has it, but for two marks in a row before it. Python and JavaScript
# make it ς, which the tokenizers library, in lower case letter by letter, makes σ.
_CASED, _MARK = r"[\p{Lu}\p{Ll}\p{Lt}]", r"['.:·\p{M}\p{Cf}\p{Lm}\p{Sk}]"
_FINAL_SIGMA = rf"(?<={_CASED}|{_CASED}{_MARK})Σ(?!{_MARK}*{_CASED})"
# As ftfy, with which open_clip cleans texts, removes and writes them. The class has escapes that JavaScript knows, too.
_TERMINAL_ESCAPE = r"\x1b\[[0-9;]*[a-zA-Z]"
_CONTROL = r"[\x00-\x08\x0b\x0e-\x1f\x7f" + "\u206a-\u206f\ufeff\ufff9-\ufffc]"
_LIGATURES = {
    "\u0132": "IJ", "\u0133": "ij", "\u0149": "'n", "\u01c4": "DŽ", "\u01c5": "Dž", "\u01c6": "dž", "\u01c7": "LJ",
    "\u01c8": "Lj", "\u01c9": "lj", "\u01ca": "NJ", "\u01cb": "Nj", "\u01cc": "nj", "\u01f1": "DZ", "\u01f2": "Dz",
    "\u01f3": "dz", "\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb05": "ſt",
    "\ufb06": "st",
}  # fmt: skip
# Lanczos. With bicubic, 3, transformers.js resizes in Node without a low-pass filter: images that are much larger than
# the model's input get other embeddings. Its Lanczos has one, as has Pillow's, and is close to Pillow's bicubic.
_RESAMPLE = 1


class HuggingFace(Layout):
    """A folder for the hub: the model in float32 and FP16, and in INT8 if asked for, its weights, and a model card."""

    def precisions(self, plan: Plan) -> tuple[Precision, ...]:
        return ("fp32", "fp16", "int8") if plan.precision == "int8" else ("fp32", "fp16")

    def check_model(self, clip: ClipModel, request: Export) -> None:
        """Raise UsageError if the clients cannot preprocess images for a model, or its towers do not fit one file."""
        require_square(clip.preprocessing, clip.name, modes=("squash",))
        _results(request)  # raises if there are none
        size = sum(tensor.nbytes for tensor in clip.model.state_dict().values())
        if size > MAX_FILE_BYTES:
            raise UsageError(
                f"{clip.name} has {size / 1e9:.1f} GB of weights, and the Hugging Face layout has both towers in one "
                "file of up to 2 GB.",
                hint="omit {layout}, or distil a smaller student",
            )

    def write(self, bundles: Mapping[str, Path], folder: Path, clip: ClipModel, request: Export) -> None:
        save_open_clip(folder, clip, location=Path(request.output))
        save_usage(folder, clip)
        write_huggingface(bundles, folder)
        manifests = {variant: read_manifest(bundle) for variant, bundle in bundles.items()}
        training = training_facts(str(as_text(request.model)))
        write_model_card(folder, manifests, results=_results(request), training=training)


def _results(request: Export) -> Results | None:
    return None if request.report is None else read_results(Path(request.report))


def write_huggingface(bundles: Mapping[str, Path], folder: Path) -> None:
    """Write the files of transformers.js and fastembed for bundles of one model into `folder`, which exists.

    Args:
        bundles: ONNX bundles by precision, whose towers have up to 2 GB together; `fp32` is required.
        folder: a config.json in it, of a text tower of transformers, stays what transformers and open_clip read.
    """
    manifest = read_manifest(bundles["fp32"])
    for variant, bundle in bundles.items():
        towers = read_manifest(bundle)
        image = _renamed(onnx.load(bundle / towers.image.file), "pixel_values", "image_embeds")
        text = _renamed(onnx.load(bundle / towers.require_text().file), "padded_ids", "text_embeds")
        _take_any_length(text, manifest.tokenizer, last_id=_last_id(bundles["fp32"] / TOKENIZER))
        models = {VISION: image, TEXT: text, BOTH: _joined(image, text, manifest.scoring)}
        for name, model in models.items():
            onnx.checker.check_model(model)
            content = model.SerializeToString()
            for suffix in (SUFFIXES[variant], *([_Q8] if variant == "int8" else [])):
                write_bytes(folder / "onnx" / f"{name}{suffix}.onnx", content)
    _write_tokenizer(bundles["fp32"] / TOKENIZER, folder, manifest.tokenizer)
    config = _model_config(manifest)
    if (folder / TRANSFORMERS_CONFIG).is_file():
        (folder / TRANSFORMERS_CONFIG).rename(folder / _VERSIONED_CONFIG)
        config["configuration_files"] = [_VERSIONED_CONFIG]
    write_bytes(folder / TRANSFORMERS_CONFIG, to_json(config))
    write_bytes(folder / "preprocessor_config.json", to_json(_preprocessor_config(manifest.preprocessing)))


def _renamed(model: onnx.ModelProto, input_name: str, output_name: str) -> onnx.ModelProto:
    graph = model.graph
    return rename_tensors(model, {graph.input[0].name: input_name, graph.output[0].name: output_name})


def _last_id(path: Path) -> int | None:
    """Return the id that a tokenizer puts after every text, such as T5's </s>, or None if it puts none there."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    text, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return None if whole[-1:] == text[-1:] else int(whole[-1])


def _take_any_length(model: onnx.ModelProto, spec: TokenizerSpec, *, last_id: int | None = None) -> None:
    """Replace the input `padded_ids` (N, T) in place by `input_ids` of any length, truncated and padded in the graph.

    Clients pad a batch to its longest text, with a padding id of their own choice, and some cut off the end token of
    texts that are too long. With CLIP's tokenizer, everything after the first end token becomes padding, and a text
    without one gets it as its last token, as in open_clip. With others, a text that was cut gets `last_id` as its last
    token; a row that is cut has neither that nor padding there.
    """
    graph, length = model.graph, spec.context_length
    constants = {
        "zero": np.asarray([0]),
        "one": np.asarray([1]),
        "context_length": np.asarray([length]),
        "pad_id": np.asarray(spec.pad_id),
        "no_padding": np.asarray([0, 0, 0]),
    }
    node = helper.make_node
    nodes = [
        node("Slice", ["input_ids", "ids.zero", "ids.context_length", "ids.one"], ["ids.cut"]),
        node("Shape", ["ids.cut"], ["ids.length"], start=1),
    ]
    ids = "ids.cut"
    if spec.end_id is not None:
        constants |= {"end_id": np.asarray(spec.end_id), "start": np.asarray(0), "step": np.asarray(1)}
        nodes += [
            node("Equal", ["ids.cut", "ids.end_id"], ["ids.is_end"]),
            node("Cast", ["ids.is_end"], ["ids.is_end_int"], to=TensorProto.INT32),
            node("ReduceMax", ["ids.is_end_int", "ids.one"], ["ids.has_end_int"], keepdims=1),
            node("Cast", ["ids.has_end_int"], ["ids.has_end"], to=TensorProto.BOOL),
            node("ArgMax", ["ids.is_end_int"], ["ids.first_end"], axis=1, keepdims=1),
            node("Sub", ["ids.length", "ids.one"], ["ids.last"]),
            node("Where", ["ids.has_end", "ids.first_end", "ids.last"], ["ids.end"]),
            node("Squeeze", ["ids.length"], ["ids.limit"]),
            node("Range", ["ids.start", "ids.limit", "ids.step"], ["ids.position"]),
            node("Less", ["ids.position", "ids.end"], ["ids.is_word"]),
            node("Equal", ["ids.position", "ids.end"], ["ids.is_last"]),
            node("Where", ["ids.is_word", "ids.cut", "ids.pad_id"], ["ids.words"]),
            node("Where", ["ids.is_last", "ids.end_id", "ids.words"], ["ids.ended"]),
        ]
        ids = "ids.ended"
    elif last_id is not None:
        constants |= {"last_id": np.asarray(last_id), "minus_one": np.asarray([-1]), "max": np.asarray([2**31 - 1])}
        nodes += [
            node("Slice", ["ids.cut", "ids.zero", "ids.minus_one", "ids.one"], ["ids.before_last"]),
            node("Slice", ["ids.cut", "ids.minus_one", "ids.max", "ids.one"], ["ids.last"]),
            node("Equal", ["ids.last", "ids.pad_id"], ["ids.is_padding"]),
            node("Where", ["ids.is_padding", "ids.last", "ids.last_id"], ["ids.new_last"]),
            node("Concat", ["ids.before_last", "ids.new_last"], ["ids.ended"], axis=1),
        ]
        ids = "ids.ended"
    nodes += [
        node("Sub", ["ids.context_length", "ids.length"], ["ids.missing"]),
        node("Concat", ["ids.no_padding", "ids.missing"], ["ids.padding"], axis=0),
        node("Pad", [ids, "ids.padding", "ids.pad_id"], ["padded_ids"]),
    ]
    for index, added in enumerate(nodes):
        added.name = f"ids.{index}.{added.op_type}"
        graph.node.insert(index, added)
    for name, value in constants.items():  # NumPy 1 makes 32 bits of an int on Windows
        graph.initializer.append(numpy_helper.from_array(value.astype(np.int64), f"ids.{name}"))
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, "sequence"]))


def _joined(image: onnx.ModelProto, text: onnx.ModelProto, scoring: Scoring) -> onnx.ModelProto:
    """Return one model of both towers that also computes the logits of all pairs."""
    parts = []
    for tower, prefix in ((image, "image."), (text, "text.")):
        part = compose.add_prefix(tower, prefix, rename_inputs=False, rename_outputs=False)
        batch = f"{prefix}batch"  # as many texts as images are not required
        for value in (*part.graph.input, *part.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = batch
        del part.graph.value_info[:]  # shapes with names of dimensions that both towers have
        parts.append(part)
    numbers = {"logit_scale": scoring.scale} | ({} if scoring.bias is None else {"logit_bias": scoring.bias})
    scaled = "logits_per_image" if scoring.bias is None else "scaled"
    node = helper.make_node
    nodes = [
        node("Transpose", ["text_embeds"], ["text_embeds_t"], name="logits.Transpose", perm=[1, 0]),
        node("MatMul", ["image_embeds", "text_embeds_t"], ["cosines"], name="logits.MatMul"),
        node("Mul", ["cosines", "logit_scale"], [scaled], name="logits.Mul"),
        node("Transpose", ["logits_per_image"], ["logits_per_text"], name="logits.TransposeBack", perm=[1, 0]),
    ]
    if scoring.bias is not None:
        nodes.insert(3, node("Add", [scaled, "logit_bias"], ["logits_per_image"], name="logits.Add"))
    image_part, text_part = parts
    info = helper.make_tensor_value_info
    outputs = [
        info("logits_per_image", TensorProto.FLOAT, ["image.batch", "text.batch"]),
        info("logits_per_text", TensorProto.FLOAT, ["text.batch", "image.batch"]),
        *text_part.graph.output,
        *image_part.graph.output,
    ]
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in numbers.items()]
    graph = helper.make_graph(
        [*image_part.graph.node, *text_part.graph.node, *nodes],
        "clip",
        [*text_part.graph.input, *image_part.graph.input],
        outputs,
        initializer=[*image_part.graph.initializer, *text_part.graph.initializer, *constants],
    )
    opsets: dict[str, int] = {}
    for opset in (*image.opset_import, *text.opset_import):
        # A newer opset of the other tower only adds to the operators that towers use, as `formats.onnx` relies on, too.
        opsets[opset.domain] = max(opsets.get(opset.domain, 0), opset.version)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=max(image.ir_version, text.ir_version))


def _write_tokenizer(path: Path, folder: Path, spec: TokenizerSpec) -> None:
    from tokenizers import Tokenizer

    content = json.loads(path.read_text(encoding="utf-8"))
    if spec.end_id is not None:
        specials = _to_special_tokens(content, spec.end_id)
    else:
        specials = {"pad_token": Tokenizer.from_file(str(path)).id_to_token(spec.pad_id)}
    content["normalizer"] = normalizer_with_cleaning(content["normalizer"], spec)
    content["truncation"] = content["padding"] = None
    write_text(folder / TOKENIZER, json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.context_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    write_bytes(folder / "tokenizer_config.json", to_json(config))


def _to_special_tokens(content: dict[str, Any], end_id: int) -> dict[str, Any]:
    """Turn the start and end tokens of a bundle's CLIP tokenizer in place into the special tokens that clients expect.

    In a bundle, they are words that are merged from pieces, because open_clip does not find them inside a word.
    """
    names = content["post_processor"]["special_tokens"]
    ids = {name: special["ids"][0] for name, special in names.items()}
    model = content["model"]
    last_id = max(ids.values())
    words = {f"{name}{_END_OF_WORD}" for name in ids}
    # Ids beyond the last one are of parts of the special tokens' names.
    vocabulary = {token: id_ for token, id_ in model["vocab"].items() if token not in words and id_ <= last_id}
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    model["merges"] = [merge for merge in merges if merge.replace(" ", "", 1) in vocabulary]
    model["vocab"] = {**vocabulary, **ids}
    (end,) = (name for name, id_ in ids.items() if id_ == end_id)
    (start,) = (name for name in ids if name != end)
    model["unk_token"] = end
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": id_, "content": name, **flags} for name, id_ in ids.items()]
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}


def normalizer_with_cleaning(existing: dict[str, Any] | None, spec: TokenizerSpec) -> dict[str, Any]:
    """Return the normalizer of a tokenizer file that also cleans texts as open_clip does, except what needs code.

    That is HTML entities, full-width letters and text that was decoded with a wrong encoding.

    Args:
        existing: the normalizer of the bundle's file, for texts that were cleaned before.
    """
    replaced = [(_TERMINAL_ESCAPE, ""), (_CONTROL, "")]
    replaced += [("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'), *_LIGATURES.items()]
    if spec.clean == "canonicalize":
        replaced += [("_", " "), (_PUNCTUATION, "")]
    replaced.append((r"\s+", " "))
    if spec.clean != "whitespace":
        replaced.append((_FINAL_SIGMA, "ς"))
    steps: list[dict[str, Any]] = [{"type": "NFC"}]
    steps += ({"type": "Replace", "pattern": {"Regex": old}, "content": new} for old, new in replaced)
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    if spec.clean != "whitespace":
        steps.append({"type": "Lowercase"})
    return {"type": "Sequence", "normalizers": [*steps, *([existing] if existing else [])]}


def _model_config(manifest: Manifest) -> dict[str, Any]:
    spec = manifest.tokenizer
    pad_id = spec.pad_id if spec.end_id is None else spec.end_id
    ids = {"pad_token_id": pad_id} | ({} if spec.end_id is None else {"eos_token_id": spec.end_id})
    size = manifest.embedding_size
    kind, of_kind = ("siglip", "Siglip") if manifest.scoring.is_independent else ("clip", "CLIP")
    return {
        "model_type": kind,
        "architectures": [f"{of_kind}Model"],
        "projection_dim": size,
        "logit_scale_init_value": math.log(manifest.logit_scale),
        # In a browser, transformers.js would ask for model_quantized.onnx by default.
        "transformers.js_config": {"dtype": "fp32"},
        "pad_token_id": pad_id,
        "text_config": {
            "model_type": f"{kind}_text_model",
            "max_position_embeddings": spec.context_length,
            "projection_dim": size,
            **ids,
        },
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "image_size": manifest.preprocessing.size[0],
            "projection_dim": size,
        },
    }


def _preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    height, width = preprocessing.size
    size = {"height": height, "width": width}
    crops = preprocessing.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if crops else size,
        "resample": _RESAMPLE,
        "do_center_crop": crops,
        **({"crop_size": size} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
