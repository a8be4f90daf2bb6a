"""Tiny models whose text towers are models of transformers, with a tokenizer of WordPiece or Unigram."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    MT5Config,
    MT5Model,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.stitch import load_sentence_encoder
from clip_rd_edge.models.students import build_student, student_config

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdeghilnorstu"
WORDS = ["red", "green", "blue", "cat", "dog", "house", "tree", "gear", "bolt", "nut"]
_UNIGRAMS = ["▁", *LETTERS, *(f"▁{word}" for word in WORDS)]
SIZE: Any = {
    "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 20
}  # fmt: skip
CONTEXT_LENGTH = 12


def siglip_clip(*, bias: float = 2.5, image_size: int = 32) -> ClipModel:
    """A tiny model with a bias, as SigLIP's have, on whose images and texts its probabilities differ."""
    torch.manual_seed(0)
    config = student_config("test_resnet", embedding_size=16, image_size=image_size, text="64x2", context_length=16)
    config["model_cfg"] |= {"init_logit_bias": bias, "init_logit_scale": math.log(20)}
    config["preprocess_cfg"]["resize_mode"] = "squash"
    clip = build_student(config, name="siglip")
    with torch.no_grad():
        for parameter in clip.model.parameters():
            if parameter.ndim:
                parameter.add_(0.05 * torch.randn_like(parameter))
    clip.model.eval()
    return clip


def bert_clip(folder: Path, *, more: Sequence[str] = (), image_size: int = 64, layers: int = 4) -> ClipModel:
    """A model of some layers of BERT, uncased, with an image tower as in `_clip_of`.

    Args:
        folder: a new one, for the text tower.
        more: tokens beside letters and ten words.
    """
    folder.mkdir()
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS, *more]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(pieces), num_hidden_layers=layers, **SIZE)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return _clip_of(folder, image_size)


def roberta_clip(
    folder: Path, *, more: Sequence[str] = (), image_size: int = 64, before_padding: Sequence[str] = ()
) -> ClipModel:
    """As `bert_clip`, of three layers of XLM-R, whose padding is not 0, and whose tokenizer knows capitals."""
    pieces = ["<s>", *before_padding, "<pad>", "</s>", "<unk>", *_UNIGRAMS, *more]
    tokenizer, special = _unigram_tokenizer(pieces), [(piece, pieces.index(piece)) for piece in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, special)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    padding = pieces.index("<pad>")
    config = XLMRobertaConfig(vocab_size=len(pieces), num_hidden_layers=3, pad_token_id=padding, **SIZE)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return _clip_of(folder, image_size)


def mt5_clip(folder: Path) -> ClipModel:
    """As `bert_clip`, of three layers of mT5's encoder, with the configuration that transformers 4.45 gives it."""
    pieces = ["<pad>", "</s>", "<unk>", *_UNIGRAMS]
    tokenizer = _unigram_tokenizer(pieces)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    size = {"d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 1, "num_heads": 2}
    MT5Model(MT5Config(vocab_size=len(pieces), **size)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    clip = _clip_of(folder, 64)
    text: Any = clip.model.text
    text.transformer.config = copy.deepcopy(text.transformer.config)
    text.transformer.config.is_encoder_decoder = False
    return clip


def _unigram_tokenizer(pieces: Sequence[str]) -> Tokenizer:
    scores = [(piece, -float(n)) for n, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=pieces.index("<unk>")))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def _clip_of(encoder: Path, image_size: int) -> ClipModel:
    text = load_sentence_encoder(str(encoder), context_length=CONTEXT_LENGTH)
    config = student_config("test_resnet", embedding_size=text.embedding_size, image_size=image_size, text="64x1")
    clip = build_student(config, name="tiny")
    model: Any = clip.model.eval()
    model.text, model.context_length = text.model, CONTEXT_LENGTH
    return replace(clip, tokenizer=text.tokenizer, model_cfg={**clip.model_cfg, "text_cfg": text.text_cfg})


def clip_that_reads_signs(kind: str, folder: Path, *, image_size: int = 64) -> ClipModel:
    """A model of `bert_clip` or `roberta_clip` whose tokenizer has a token for many signs, unless it drops them."""
    signs = "éïßAR!.,'’“”;()#_-257猫犬👩🚀"
    if kind == "bert":
        return bert_clip(folder, more=[*signs, *(f"##{sign}" for sign in signs)], image_size=image_size)
    return roberta_clip(folder, more=list(signs), image_size=image_size)
