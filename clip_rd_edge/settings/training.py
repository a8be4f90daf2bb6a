"""What to train, on what, and how: the options of `distill` and `embed`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Generic, Literal, TypeVar

from clip_rd_edge.settings.options import Reported, Settings, argument, option, output_to
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.text import SILENT, Reporter

_data = partial(option, group="Data")
_teacher = partial(option, group="Teacher")
_student = partial(option, group="Student")
_training = partial(option, group="Training")
_memory = partial(option, group="Memory and speed")
_cluster = partial(option, group="Cluster")
_output = partial(option, group="Output")
_text = partial(option, group="Text")
_classifier = partial(option, group="Classifier")
_weight = partial(option, group="Weight")
_evaluation = partial(option, group="Evaluation")


Workers = Annotated[int, _data(
    "Loader processes; -1 begins with half of the cores, at most 8, and adds more while steps wait for data.",
    metavar="N", ge=-1, le=1_024, resume="free",
)]  # fmt: skip
_OneOrMore = AnyPath | Sequence[AnyPath]
Place = TypeVar("Place")  # of data, a model or a task
Names = TypeVar("Names")  # one place or several
Several = TypeVar("Several")  # any number of places
_NONE: Any = ()
Decode = Literal["scaled", "full"]


ImageColumn = Annotated[str, _data("Column with the image paths, of every table.", metavar="COLUMN")]
CaptionColumn = Annotated[str, _data("Column with the captions, of every table.", metavar="COLUMN")]
JsonKey = Annotated[str, _data(
    "Key of the captions in the shards' .json files.", metavar="KEY", default="captions from .txt files",
)] | None  # fmt: skip
MaxBad = Annotated[float, _data(
    "Max fraction of bad samples, which are skipped and counted.", metavar="FRACTION", ge=0, lt=1, resume="free",
)]  # fmt: skip


class _Data(Settings, Generic[Place, Names, Several], frozen=True, kw_only=True):
    data: Annotated[Place, _data(
        "CSV, TSV or Parquet file of images and captions (columns filepath,title), a folder with a sub-folder of "
        "images for each class, WebDataset shards (a/{000..012}.tar::b.tar), or emoji for the built-in data set.",
        metavar="SOURCE",
        default="none; see {images}", complete="data", resume="content", common=True,
    )] | None = None  # fmt: skip
    images: Annotated[Place, _data(
        "Images without captions, beside the pairs or instead of them: a folder, a table with the column filepath, or "
        "shards.", metavar="SOURCE", default="none", resume="content",
    )] | None = None  # fmt: skip
    texts: Annotated[Place, _data(
        "Captions or labels without images: one per line (a line that starts with # and a space is a comment), a table "
        "or list as for classify --labels, or a Parquet file.", metavar="FILE", default="none", resume="content",
    )] | None = None  # fmt: skip
    templates: Annotated[Several, _data(
        "Prompt template for {texts} and class folders, such as 'a photo of a {}', a file with one per line, or "
        "imagenet for CLIP's 80; can be repeated.", flags=("--template",), metavar="PROMPT|FILE",
        default="texts as they are", complete="imagenet", resume="content",
    )] = _NONE  # fmt: skip
    csv_img_key: ImageColumn = "filepath"
    csv_caption_key: CaptionColumn = "title"
    train_data_upsampling_factors: Annotated[str, _data(
        "How often each source of shards is repeated per epoch, such as 1::2.", metavar="W::W", default="once",
    )] | None = None  # fmt: skip
    json_caption_key: JsonKey = None
    max_bad: MaxBad = 0.01
    workers: Workers = -1
    decode: Annotated[Decode, _data(
        "scaled: decode a large JPEG at 1/2, 1/4 or 1/8 of its size where its crop still has twice the pixels that the "
        "models see; full: decode every pixel.", metavar="NAME",
    )] = "scaled"  # fmt: skip
    teacher_pretrained: Annotated[Place, _teacher(
        "Pretrained tag or checkpoint file, for a teacher given by NAME.", metavar="TAG|FILE", default="none",
        also="pretrained", resume="content",
    )] | None = None  # fmt: skip


class Training(_Data[Place, Names, Several], frozen=True, kw_only=True):
    """What to train, and on what: options of `distill` that a run's config.yaml has, too.

    There, the places are as they were typed, or as a file records them: see `distillation.config`.
    """

    teacher: Annotated[Names, _teacher(
        "The teacher: an open_clip NAME@TAG (or NAME with {teacher_pretrained}), local-dir:PATH, hf-hub:ORG/REPO or a "
        "run's folder; or stored:FILE, for shards with stored embeddings in MobileCLIP's format. Can be repeated: the "
        "student then learns from all of them together.", metavar="MODEL",
        default="none, for recipes without a teacher", resume="content", common=True,
    )] | None = None  # fmt: skip
    store: Annotated[Place, _teacher(
        "Folder for storing the teachers' embeddings, which are then computed only once; requires {views}.",
        metavar="FOLDER", default="none", path=True, resume="free",
    )] | None = None  # fmt: skip
    views: Annotated[int, _teacher(
        "Number of fixed crops per image.", metavar="N", default="new crops every epoch", ge=0,
    )] = 0  # fmt: skip
    student: Annotated[Place, _student(
        "The student: mobilevit_xxs, resnet18, … or any timm name, or open_clip:NAME; or a trained model to fine-tune: "
        "a run's folder, NAME@TAG, local-dir:PATH or hf-hub:ORG/REPO.", metavar="NAME|MODEL", complete="student",
        resume="content", common=True,
    )]  # fmt: skip
    image_size: Annotated[int, _student(
        "Edge of the input images in pixels.", metavar="PIXELS", default="224, or the trained model's", ge=16, le=2_048,
    )] | None = None  # fmt: skip
    text: Annotated[Place, _student(
        "Size of the text tower: tiny, small, standard, or WIDTHxLAYERS such as 512x6; or the folder of a model, for "
        "its text tower; or teacher, for that of the (first) teacher, of which only the projection is trained.",
        metavar="SIZE|MODEL", default="standard, or the trained model's", complete="tiny|small|standard|teacher",
        resume="content", common=True,
    )] | None = None  # fmt: skip
    context_length: Annotated[int, _student(
        "Max tokens per caption.", metavar="TOKENS", default="77, or that of the model whose text tower it is", ge=4,
        le=8_192,
    )] | None = None  # fmt: skip
    embedding_size: Annotated[int, _student(
        "Numbers per embedding.", metavar="N", default="the teacher's, or the sum of all teachers', else 512", ge=0,
        le=65_536,
    )] = 0  # fmt: skip
    pretrained_image: Annotated[Place, _student(
        "Initial weights of the student's image trunk; package: from an installed package, for efficientnet_lite0; "
        "teacher: the (first) teacher's whole image tower, of the same architecture.",
        metavar="timm|package|teacher|FILE", default="random", complete="timm|package|teacher", resume="content",
        common=True,
    )] | None = None  # fmt: skip
    pretrained_text: Annotated[Place, _student(
        "Initial weights of the student's text tower. tokens: only those of the token embeddings, which are what the "
        "teacher says of each token. teacher: evenly spaced layers of the (first) teacher's. FILE: of a checkpoint's.",
        metavar="tokens|teacher|FILE", default="random", complete="tokens|teacher", resume="content",
    )] | None = None  # fmt: skip
    freeze_text: Annotated[bool, _student("Train only the projection of the text tower.")] = False
    freeze_text_layers: Annotated[int, _student(
        "Do not train the first N groups of layers of the text tower, of which the first is the embeddings of the "
        "tokens: steps are faster, and a trained tower keeps words that no caption has.",
        metavar="N", ge=0,
    )] = 0  # fmt: skip
    freeze_image: Annotated[int, _student(
        "Do not train the first N groups of layers of the image tower, as timm groups them: steps are faster, and a "
        "trained model forgets less.", metavar="N", ge=0,
    )] = 0  # fmt: skip
    freeze_norms: Annotated[bool, _student(
        "Keep the statistics of the batch norms: a trained model then forgets less of what is not in the data.",
    )] = False  # fmt: skip
    tuned_share: Annotated[float, _student(
        "Share of the trained weights in the result; the rest are those that a trained model started from.",
        metavar="FRACTION", ge=0, le=1,
    )] = 1.0  # fmt: skip
    quantize: Annotated[Literal["int8"], _student(
        "Fine-tune a trained student for INT8: 300 steps at learning rate 1e-4, unless {steps} or {learning_rate} is "
        "set.", default="off",
    )] | None = None  # fmt: skip
    seed: Annotated[int, _training("Random seed of weights, batches and crops.", metavar="N", ge=0, lt=2**32)] = 0
    terms: Annotated[Several, _training(
        "Python file or module with loss terms of your own, which the recipe weighs by their names; it is run. Can be "
        "repeated.", metavar="FILE|MODULE", default="those of installed packages", resume="content",
    )] = _NONE  # fmt: skip
    compile: Annotated[bool, _memory("Compile the student with torch.compile.")] = False
    gradient_checkpointing: Annotated[bool, _memory(
        "Recompute activations in the backward pass, to save memory.",
    )] = False  # fmt: skip
    accumulate: Annotated[int, _memory(
        "Chunks per batch, to save memory; batch norms see one chunk at a time.", metavar="N", ge=1,
    )] = 1  # fmt: skip
    loss_block: Annotated[int, _memory(
        "Pairs per block of the loss, to save memory.", metavar="PAIRS", default="all", ge=0,
    )] = 0  # fmt: skip
    global_logits: Annotated[bool, _memory(
        "Under torchrun: every process computes the loss of all pairs.",
    )] = False  # fmt: skip
    checkpoint_every: Annotated[int, _output("Steps between checkpoints.", metavar="STEPS", ge=1, resume="free")] = 500
    report_to: Annotated[Literal["tensorboard", "wandb"], _output(
        "Also report the metrics to tensorboard (RUN/tensorboard) or wandb; a resumed run continues there.",
        metavar="NAME", default="RUN/metrics.jsonl alone", resume="free",
    )] | None = None  # fmt: skip
    tasks: Annotated[Several, _evaluation(
        "Evaluate on this task (see clip-rd-edge evaluate) and keep the best student in RUN/best; can be repeated.",
        flags=("--task",), metavar="NAME", default="none", complete="task", resume="free", common=True,
    )] = _NONE  # fmt: skip
    evaluate_every: Annotated[int, _evaluation(
        "Steps between evaluations on the tasks.", metavar="STEPS", default="only at the end", ge=0, resume="free",
    )] = 0  # fmt: skip
    patience: Annotated[int, _evaluation(
        "End the training after so many evaluations without a better one; requires {evaluate_every}.", metavar="N",
        default="train to the last step", ge=0, resume="free",
    )] = 0  # fmt: skip


class Distill(Training[AnyPath, _OneOrMore, _OneOrMore], frozen=True, kw_only=True):
    """Train a compact student."""

    recipe: Annotated[AnyPath, _training(
        "Training recipe: clip-rd, clip-kd, tinyclip, clip, … or a YAML file.", metavar="NAME|FILE",
        complete="recipe", common=True,
    )] = "clip-rd"  # fmt: skip
    epochs: Annotated[int, _training(
        "Passes over the data.", metavar="N", default="the recipe's", ge=1, common=True,
    )] | None = None  # fmt: skip
    steps: Annotated[int, _training(
        "Number of training steps, instead of {epochs}.", metavar="N", default="as many as the epochs have", ge=1,
    )] | None = None  # fmt: skip
    hours: Annotated[float, _training(
        "Train for this many hours, at a speed that is measured first, instead of {epochs} or {steps}.",
        metavar="HOURS", default="as long as the steps take", gt=0, common=True,
    )] | None = None  # fmt: skip
    hold_out: Annotated[float, _evaluation(
        "Hold back this share of the images of a table or of class folders, copies together, and evaluate on them; "
        "written to RUN/data.", metavar="SHARE", default="none", gt=0, le=0.5, common=True,
    )] | None = None  # fmt: skip
    batch_size: Annotated[int, _training(
        "Pairs per step.", metavar="PAIRS", default="the recipe's, at most as many as there are", ge=1, common=True,
    )] | None = None  # fmt: skip
    learning_rate: Annotated[float, _training(
        "Peak learning rate.", flags=("--learning-rate", "--lr"), metavar="X",
        default="the recipe's, times the root of {batch_size} over the recipe's", gt=0,
    )] | None = None  # fmt: skip
    ema_decay: Annotated[float, _training(
        "Keep a moving average of the weights with this decay, such as 0.999.", metavar="DECAY",
        default="the recipe's", ge=0, lt=1,
    )] | None = None  # fmt: skip
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], _memory(
        "fp32, bf16, fp16, or auto, which measures which is fastest.", metavar="NAME", default="the recipe's",
    )] | None = None  # fmt: skip
    output: Annotated[AnyPath, output_to("The run's folder.", metavar="RUN", common=True)]
    resume: Annotated[bool, _output("Resume from the latest intact checkpoint in RUN.", common=True)] = False
    accept_changes: Annotated[bool, _output("Resume although data or teacher changed since the run began.")] = False
    reporter: Reporter = SILENT


class Embed(_Data[AnyPath, _OneOrMore, _OneOrMore], frozen=True, kw_only=True):
    """Compute the embeddings of a teacher once, for many runs."""

    teacher: Annotated[AnyPath | Sequence[AnyPath], _teacher(
        "The teacher, as for distill; can be repeated.", metavar="MODEL",
    )]  # fmt: skip
    precision: Annotated[Literal["fp32", "bf16", "fp16"], _teacher(
        "Precision that the teacher computes in: fp32, bf16 or fp16.", metavar="NAME",
    )] = "fp32"  # fmt: skip
    views: Annotated[int, _teacher("Number of fixed crops per image.", metavar="N", ge=1)] = 1
    recipe: Annotated[AnyPath, _teacher(
        "Recipe whose range of crops is used.", metavar="NAME|FILE", complete="recipe",
    )] = "clip-rd"  # fmt: skip
    terms: Annotated[_OneOrMore, _teacher(
        "Python file or module with loss terms of your own that the recipe weighs, as for distill; can be repeated.",
        metavar="FILE|MODULE", default="those of installed packages",
    )] = ()  # fmt: skip
    seed: Annotated[int, _teacher("Random seed of the crops.", metavar="N")] = 0
    student: Annotated[AnyPath, _teacher(
        "The student of the run, if it is a trained one or a JSON file, for crops of its shape.", metavar="MODEL",
        default="square", complete="student",
    )] | None = None  # fmt: skip
    output: Annotated[AnyPath, output_to("Folder for distill {store}.", metavar="STORE", also="store")]
    ray: Annotated[str, _cluster(
        "Spread the work over a Ray cluster: auto for the one of this machine, or HOST:PORT.", metavar="ADDRESS",
        default="this machine",
    )] | None = None  # fmt: skip
    reporter: Reporter = SILENT


class _Packed(Reported, frozen=True):
    data: Annotated[AnyPath, argument("Images with captions, as distill takes them with {data}.", complete="data")]


class Pack(_Packed, frozen=True, kw_only=True):
    """Pack training data into shards of small images, once for many runs."""

    edge: Annotated[int, _data(
        "Length of an image's shorter edge in pixels; smaller images stay as they are.", metavar="PIXELS", ge=16,
        le=8_192,
    )] = 512  # fmt: skip
    without_captions: Annotated[bool, _data("Pack only images, as distill takes them with {images}.")] = False
    template: Annotated[str, _data(
        "Prompt for the names of class folders, such as 'a photo of a {}'.", metavar="PROMPT", default="the name alone",
    )] | None = None  # fmt: skip
    csv_img_key: ImageColumn = "filepath"
    csv_caption_key: CaptionColumn = "title"
    json_caption_key: JsonKey = None
    max_bad: MaxBad = 0.01
    output: Annotated[AnyPath, output_to("Folder for the shards.")]


Output = Annotated[AnyPath, output_to("Folder for the model.")]
Force = Annotated[bool, _output("Replace an earlier result in FOLDER; a folder with anything else is refused.")]
Templates = str | Sequence[str] | None
Tasks = AnyPath | Any | Iterable[AnyPath | Any]  # names of tasks, or task objects


class _Stitched(Reported, frozen=True):
    classifier: Annotated[str, argument("A timm architecture, such as `resnet18` or `resnet18.tv_in1k`.")]
    output: Output


class Stitch(_Stitched, frozen=True, kw_only=True):
    """Join an image classifier and a sentence encoder."""

    names: Annotated[AnyPath, _text(
        "The names of the classes: one class per line, in the order of the classifier's outputs; ';' separates "
        "synonyms and descriptions. imagenet: the names of ImageNet's 1,000 classes.", metavar="FILE|imagenet",
        complete="imagenet",
    )]  # fmt: skip
    text: Annotated[str, _text(
        "The sentence encoder: all-MiniLM-L6-v2, a folder or zip archive in the layout of transformers, a name on the "
        "hub, or a model of open_clip, such as ViT-B-32@openai, whose text tower is used.", metavar="MODEL",
    )]  # fmt: skip
    pretrained: Annotated[AnyPath, _classifier(
        "The classifier's weights (.safetensors, .pth).", metavar="FILE",
        default="from an installed package, else published ones",
    )] | None = None  # fmt: skip
    image_size: Annotated[int, _classifier(
        "Edge of the input images in pixels.", metavar="PIXELS", default="the classifier's", ge=16,
    )] | None = None  # fmt: skip
    context_length: Annotated[int, _text(
        "Max tokens per text.", metavar="TOKENS", default="77, or the encoder's, if fewer", ge=4,
    )] | None = None  # fmt: skip
    force: Force = False


class _Trimmed(Reported, frozen=True):
    model: Annotated[AnyPath, argument("A run's folder, or any open_clip model.")]
    output: Output


class Trim(_Trimmed, frozen=True, kw_only=True):
    """Leave out layers and tokens of a text tower."""

    text_layers: Annotated[int, _text(
        "Keep N layers of the text tower, evenly spaced, the first and the last among them.", metavar="N",
        default="all", ge=1,
    )] | None = None  # fmt: skip
    vocabulary: Annotated[int, _text(
        "Keep N tokens: those most frequent in {texts}. For CLIP's own text towers, and for those of Hugging Face with "
        "a tokenizer of the kinds WordPiece, Unigram or BPE.", metavar="N", default="all", ge=1,
    )] | None = None  # fmt: skip
    texts: Annotated[AnyPath, _text(
        "Texts such as the model will be given, one per line or a table, as for distill.", metavar="FILE",
        default="none", path=True,
    )] | None = None  # fmt: skip
    force: Force = False


class _Averaged(Reported, frozen=True):
    first: Annotated[AnyPath, argument("A run's folder, `local-dir:PATH` or `hf-hub:ORG/REPO`.")]
    second: Annotated[AnyPath, argument("Another model of the same architecture.")]
    output: Output


class Average(_Averaged, frozen=True, kw_only=True):
    """Average the weights of two models."""

    weight: Annotated[float | Literal["best"], _weight(
        "Share of the second model in the result, from 0 to 1; best: the one with the highest mean accuracy.",
        metavar="SHARE|best",
    )] = 0.5  # fmt: skip
    tasks: Annotated[Tasks, _evaluation(
        "Measure the models between the two at every tenth, on this task (see clip-rd-edge evaluate); can be repeated.",
        flags=("--task",), metavar="NAME", default="none", complete="task",
    )] = ()  # fmt: skip
    templates: Annotated[Templates, _evaluation(
        "Prompt template, such as \"a photo of a {}\", a file with one per line, or imagenet for CLIP's 80; can be "
        "repeated.", flags=("--template",), metavar="PROMPT|FILE", default="the task's own", complete="imagenet",
    )] = None  # fmt: skip
    force: Force = False
