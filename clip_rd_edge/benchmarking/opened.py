"""An encoder with a picture and a text at hand: each step of an answer as a call that can be timed."""

from __future__ import annotations

import numpy as np

from clip_rd_edge.contract.encoder import TowerEncoder, greatest, normalise, probabilities
from clip_rd_edge.contract.images import ImageFile, open_image
from clip_rd_edge.contract.preprocess import preprocess

TEXT = "a photo of a cat"
_BEST = 5  # labels of an answer


class Opened:
    """What is timed of an encoder.

    Args:
        picture: a file.
        labels: how many there are to choose from; random embeddings, whose arithmetic takes as long as any.

    Raises:
        InputError: the picture cannot be read.
    """

    def __init__(self, encoder: TowerEncoder, picture: ImageFile, labels: int) -> None:
        self.encoder = encoder
        self._picture = picture
        self._image = open_image(picture)
        description = encoder.describe()
        self._how, self._logit_scale = description.preprocessing, description.logit_scale
        # Stacked, as encoders do it: `[None]` has other strides, which torch runs up to 1.5 times slower.
        self.pixels = np.stack([preprocess(self._image, self._how)])
        self._ids = encoder.tokenize([TEXT])
        rng = np.random.default_rng(0)
        self._labels = normalise(rng.standard_normal((labels, description.embedding_size)))
        self._embedding = self._labels[:1]

    def embed_picture(self) -> object:
        """Pixels to embedding."""
        return self.encoder.encode_pixels(self.pixels)

    def embed_text(self) -> object:
        """Token ids to embedding."""
        return self.encoder.encode_ids(self._ids)

    def decode(self) -> object:
        """File to pixels."""
        return open_image(self._picture)

    def preprocess(self) -> object:
        """Resize, crop, normalise."""
        return preprocess(self._image, self._how)

    def classify(self) -> object:
        """Embedding to the best labels."""
        return greatest(probabilities(self._embedding, self._labels, self._logit_scale)[0], _BEST)

    def answer(self) -> object:
        """File to the best labels, as a device does it."""
        embedding = self.encoder.encode_images([open_image(self._picture)])
        return greatest(probabilities(embedding, self._labels, self._logit_scale)[0], _BEST)
