"""The parts of a text tower, be it open_clip's own or one of Hugging Face: transformer, layers, embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from clip_rd_edge.models.clip import ClipModel, text_module


def text_transformer(clip: ClipModel) -> Any:
    """Return the transformer of a model's text tower."""
    return text_module(clip.model).get_submodule("transformer")


def text_layers(clip: ClipModel) -> nn.ModuleList:
    """Return the layers of a model's text tower, in order."""
    transformer = text_transformer(clip)
    if clip.has_hugging_face_text:
        count = getattr(transformer.config, layers_key(clip))
        lists = (module for module in transformer.modules() if isinstance(module, nn.ModuleList))
        return next(module for module in lists if len(module) == count)
    layers: nn.ModuleList = transformer.resblocks
    return layers


def layers_key(clip: ClipModel) -> str:
    """Return what the configuration of a Hugging Face text tower calls the number of its layers."""
    import open_clip

    key: str = open_clip.hf_configs.arch_dict[text_transformer(clip).config.model_type]["config_names"]["layers"]
    return key


def token_embedding(clip: ClipModel) -> Any:
    """Return the module that embeds the tokens."""
    if clip.has_hugging_face_text:
        return text_transformer(clip).get_input_embeddings()
    return text_module(clip.model).get_submodule("token_embedding")


def text_groups(clip: ClipModel) -> list[list[nn.Parameter]]:
    """Return the parameters of a text tower in groups, from the input: embeddings of tokens and positions, each layer.

    What comes after the layers, such as the projection, is in none of them.
    """
    if clip.has_hugging_face_text:
        transformer = text_transformer(clip)
        embeddings = list(getattr(transformer, "embeddings", token_embedding(clip)).parameters())
    else:
        text: Any = text_module(clip.model)
        others = (text.positional_embedding, getattr(text, "cls_emb", None))
        embeddings = [*token_embedding(clip).parameters(), *(one for one in others if one is not None)]
    return [embeddings, *(list(layer.parameters()) for layer in text_layers(clip))]
