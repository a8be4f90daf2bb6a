"""The model class of the Python API: classifies and embeds image paths, PIL images, arrays, and lists of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from clip_rd_edge.bundle.encoder import Description, Embeddings, TowerEncoder, as_list, embeds_texts
from clip_rd_edge.bundle.images import ImageInput, is_single_image
from clip_rd_edge.bundle.labels import TemplateNames, parse_templates, template_words
from clip_rd_edge.runtime.classifier import Deciding, Prediction, ZeroShotClassifier
from clip_rd_edge.runtime.labels import Labels, label_names
from clip_rd_edge.runtime.load import encode_inputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from clip_rd_edge.runtime.taught import Examples, Lesson


class Model:
    """An open bundle or CLIP model, as `clip_rd_edge.load` returns it.

    Methods return a single result for a single image or text, and one result per item for a list.

    Attributes:
        encoder: the same encoder, whose other methods this class does not have.
    """

    def __init__(self, encoder: TowerEncoder) -> None:
        self.encoder = encoder
        self._classifier: tuple[tuple[Any, ...], ZeroShotClassifier] | None = None

    def __repr__(self) -> str:
        info = self.describe()
        return f"<clip_rd_edge model {info.name}: {info.precision} in {info.runtime}, D = {info.embedding_size}>"

    def describe(self) -> Description:
        """Return the model's name, runtime, precision, preprocessing and size."""
        return self.encoder.describe()

    @property
    def label_bank(self) -> Any:
        """The bundle's precomputed labels and their embeddings, or None."""
        return getattr(self.encoder, "label_bank", None)

    @property
    def has_text_tower(self) -> bool:
        """Whether the model embeds texts; a bundle exported without its text tower does not."""
        return embeds_texts(self.encoder)

    def encode_images(self, images: ImageInput | Iterable[ImageInput], *, quick: bool = False) -> Embeddings:
        """Embed images.

        Args:
            images: an image, a list of images, or a uint8 array of shape (N, H, W, 3).
            quick: decode large JPEGs at a fraction of their size, which changes embeddings slightly.

        Returns:
            L2-normalised float32 embeddings: (D,) for one image, (N, D) otherwise.

        Raises:
            InputError: an image could not be read; the message names the first one.
        """
        rows = encode_inputs(self.encoder, images, quick=quick)
        first: Embeddings = rows[0] if is_single_image(images) else rows
        return first

    def encode_texts(self, texts: str | Iterable[str]) -> Embeddings:
        """Embed texts as they are, without templates.

        Returns:
            L2-normalised float32 embeddings: (D,) for one text, (N, D) for a list.
        """
        if isinstance(texts, str):
            row: Embeddings = self.encoder.encode_texts([texts])[0]
            return row
        return self.encoder.encode_texts(as_list(texts))

    def teach(self, examples: Examples, *, forget: Sequence[str] = (), alone: bool = False) -> Lesson:
        """Teach this model labels from a few images of each; `classify` without labels then chooses among them as well.

        Nothing is written: `clip_rd_edge.teach` writes a bundle.

        Args:
            examples: images by label, such as `{"my mug": ["mug-1.jpg", "mug-2.jpg"]}`; those of a label that was
                taught before are added to its earlier ones.
            forget: labels to be forgotten with their images.
            alone: leave out the model's labels that have only texts.

        Returns:
            What was taught, with its accuracy on images that are left out.

        Raises:
            InputError: an image could not be read, or a label to forget was not taught.
        """
        from clip_rd_edge.runtime.taught import teach

        lesson = teach(self.encoder, examples, forget=forget, alone=alone)
        self._classifier = None
        return lesson

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str, though a sequence, is one image
        self,
        images: ImageInput,
        labels: Labels = None,
        *,
        templates: TemplateNames = None,
        top: int = 5,
        cache: bool = True,
        quick: bool = False,
        **deciding: Unpack[Deciding],
    ) -> list[Prediction]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageInput],
        labels: Labels = None,
        *,
        templates: TemplateNames = None,
        top: int = 5,
        cache: bool = True,
        quick: bool = False,
        **deciding: Unpack[Deciding],
    ) -> list[list[Prediction]]: ...

    def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        labels: Labels = None,
        *,
        templates: TemplateNames = None,
        top: int = 5,
        cache: bool = True,
        quick: bool = False,
        **deciding: Unpack[Deciding],
    ) -> list[Prediction] | list[list[Prediction]]:
        """Return the most likely labels of an image, most likely first; for several images, one such list per image.

        The label embeddings of the last call are kept, so the text tower does not run again for the same labels. Files
        of labels and templates are read at each call.

        Args:
            images: see `encode_images`.
            labels, templates, cache: see `ZeroShotClassifier`.
            top: max number of labels per image.
            quick: see `encode_images`.
            deciding: `none`, `refuse_known`, `multi` and `raw`: see `Deciding`.

        Raises:
            InputError: an image could not be read, or the labels or templates are invalid.
            UsageError: `refuse_known` is not a share.
        """
        classifier = self._classifier_for(labels, templates, cache, deciding)
        single = is_single_image(images)
        embeddings = encode_inputs(self.encoder, images, quick=quick)
        predictions = classifier.classify_embeddings(embeddings, top=top)
        return predictions[0] if single else predictions

    def classify_camera(
        self,
        camera: str | int = 0,
        labels: Labels = None,
        *,
        templates: TemplateNames = None,
        top: int = 5,
        **deciding: Unpack[Deciding],
    ) -> Iterator[list[Prediction]]:
        """Yield the predictions for the newest frames of a camera or stream, or for all frames of a video.

        Args:
            camera: a camera number, a device path, a video file or a stream URL.
            labels, templates, top, deciding: see `classify`.

        Raises:
            MissingExtraError: OpenCV is not installed.
            InputError: the video cannot be read or, after its last frame, is cut off.
            ClipRdEdgeError: the camera or stream cannot be opened or stops sending frames.
        """
        from clip_rd_edge.runtime.camera import frames

        classifier = self._classifier_for(labels, templates, True, deciding)
        for frame in frames(str(camera)):
            yield classifier.classify([frame], top=top)[0]

    def _classifier_for(
        self, labels: Labels, templates: TemplateNames, cache: bool, deciding: Deciding
    ) -> ZeroShotClassifier:
        # A file may have been edited since the last call, such as in a notebook.
        names, prompts = label_names(labels), parse_templates(template_words(templates)).prompts
        key = (None if names is None else tuple(names), prompts, cache, tuple(sorted(deciding.items())))
        kept = self._classifier  # another thread may replace it meanwhile
        if kept is None or kept[0] != key:
            kept = (key, ZeroShotClassifier(self.encoder, names, templates=prompts, cache=cache, **deciding))
            self._classifier = kept
        return kept[1]
