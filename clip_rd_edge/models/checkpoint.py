"""The student checkpoint: a folder that open_clip itself loads as `local-dir:PATH`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_rd_edge.contract.checkpoint import CONFIG_FILE, DISTILLATION_FILE, WEIGHTS_FILE
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.io import new_folder


def save_clip(
    folder: Path, clip: ClipModel, *, provenance: dict[str, Any], extras: Callable[[Path], None] | None = None
) -> None:
    """Write a model as an open_clip local-dir, whole or not at all, replacing what stood there.

    Args:
        provenance: recipe, teacher, data, seed, versions, metrics: written as distillation.json.
        extras: writes what else belongs in the folder, such as plots.
    """
    from safetensors.torch import save_file

    state = {name: _plain(tensor) for name, tensor in clip.model.state_dict().items()}
    with new_folder(folder) as temporary:
        model_cfg = dict(clip.model_cfg)
        if _is_hugging_face(clip):
            model_cfg["text_cfg"] = {**model_cfg["text_cfg"], "hf_model_name": str(folder.resolve())}
            clip.model.text.transformer.config.save_pretrained(temporary)  # type: ignore[union-attr, operator]
            clip.tokenizer.save_pretrained(temporary)  # type: ignore[attr-defined]
        config = {"model_cfg": model_cfg, "preprocess_cfg": _preprocess_cfg(clip)}
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, str(temporary / WEIGHTS_FILE), metadata={"format": "pt"})
        record = {**provenance, "templates": list(clip.templates)}
        (temporary / DISTILLATION_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if extras is not None:
            extras(temporary)


def _plain(tensor: Tensor) -> Tensor:
    # safetensors stores plain contiguous tensors that share no memory.
    return tensor.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)


def _is_hugging_face(clip: ClipModel) -> bool:
    return "hf_model_name" in clip.model_cfg.get("text_cfg", {})


def _preprocess_cfg(clip: ClipModel) -> dict[str, Any]:
    how = clip.preprocessing
    return {
        "size": list(how.size),
        "mode": "RGB",
        "mean": list(how.mean),
        "std": list(how.std),
        "interpolation": how.interpolation,
        "resize_mode": how.resize_mode,
        "fill_color": how.fill_color,
    }
