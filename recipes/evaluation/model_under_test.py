"""A model under test, whatever the word MODEL on a command line names: a run, or a model that somebody else made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ncreg.checkpoint import load_classifier
from ncreg.models import Classifier
from recipes.core.cli import config_of, parse
from recipes.core.config import DataConfig, TrainConfig
from recipes.core.distributed import pick_device
from recipes.core.errors import UserError
from recipes.core.files import file_name, fitting
from recipes.core.own_code import in_a_line, use_copies
from recipes.core.suggestions import did_you_mean
from recipes.data.class_names import distinct
from recipes.data.held_out import without_classes
from recipes.data.left_out import of_classes
from recipes.data.load import read_source
from recipes.data.split import Source
from recipes.evaluation.class_order import ClassOrder, class_order, listed
from recipes.evaluation.model_images import images_of, take_images
from recipes.evaluation.model_options import OTHER_MODELS, ModelOptions
from recipes.evaluation.model_sources import find_model, source_of
from recipes.evaluation.presets import SPLITS
from recipes.training.own_parts import register_own_parts
from recipes.training.run_dir import RunDir
from recipes.training.same_start import former_images

FOLDER = Path("evaluations")
"""Where the results of models without a run folder go, in the current folder."""

NO_AFFINE_HEAD = (
    "MODEL's logits are no affine map of its pooled features (a ReLU or a pooling stands behind its last layer): "
    "accuracy is that of its own decisions; NC3, NC4 and classifier_accuracy are of the last layer on those features"
)
"""A note on models such as torchvision's squeezenet."""

UNNAMED = "output {}"


@dataclass
class ModelUnderTest:
    """A classifier and what is known of it.

    Attributes:
        word: MODEL, as it was given.
        model: takes images in [0, 1] and gives logits; in eval mode.
        config: a run's configuration; for other models the defaults with the data's keys.
        home: folder of its results.
        is_run: whether recipes/train.py made it.
        names: lists of the names of its outputs, any of which may be the data's; empty where it has none.
        notes: sentences for the user.
    """

    word: str
    model: Classifier
    config: TrainConfig
    home: Path
    is_run: bool
    names: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def side(self) -> int:
        """Side of the images that it takes, a `Side` for models that are no runs."""
        return self.model.image_shape[-1] if self.model.image_shape else 0

    @property
    def image_size(self) -> Callable[[int | None], int]:
        """What data sources ask for the side of the images."""
        return lambda native: self.side

    def order(self, class_names: Sequence[str]) -> ClassOrder:
        """Which of its outputs stand for these classes.

        Raises:
            UserError: it does not know them.
        """
        word = "the run" if self.is_run else "MODEL"
        return class_order(self.names, class_names, self.model.num_classes, model=word)

    def read(self, data: DataConfig) -> Source:
        """The data set as its source provides it, without data.hold_out; it may lack images of some of its classes.

        Raises:
            UserError: an unknown set, or files that are missing or cannot be read.
        """
        if self.is_run:
            former, names = former_images(RunDir(self.home), data), self.model.class_names
            if not data.hold_out:
                return read_source(data, self.image_size, former=former, class_names=names)
            left = without_classes(read_source(data, self.image_size, former=former), data.hold_out)
            return left if names is None else of_classes(left, names)
        return without_classes(read_source(data, self.image_size, partial=True), data.hold_out)

    def check_fit(self, source: Source) -> ClassOrder:
        """Refuse data with other classes or channels than the model's; the order of its outputs.

        Raises:
            UserError: other classes, or channels that no conversion brings to the model's.
        """
        order, channels = self.order(source.class_names), source.train.images.shape[1]
        wanted = self.model.image_shape[0] if self.model.image_shape else channels
        if channels != wanted and (self.is_run or {channels, wanted} != {1, 3}):
            word = "the run takes" if self.is_run else "MODEL takes"
            way = "" if self.is_run else "; --channels N says it if MODEL takes others"
            if {channels, wanted} == {1, 3}:
                way = "; its model in a folder takes both (ncreg.load_classifier(RUN).save_pretrained(FOLDER))"
            raise UserError(
                f"{word} images of {wanted} channel{'s' if wanted > 1 else ''}, the data has {channels}{way}"
            )
        return order

    def notes_on(self, source: Source, order: ClassOrder) -> list[str]:
        """Sentences on how this data and the model were brought together."""
        notes = [order.note] if order.note else []
        channels = source.train.images.shape[1]
        wanted = self.model.image_shape[0] if self.model.image_shape else channels
        if channels != wanted:
            notes.append("gray images are repeated in three channels" if wanted == 3 else "colour is taken as gray")
        return notes

    def notes_on_draw(self, source: Source, split: str, *, all_too: bool = False, whole: bool = False) -> list[str]:
        """What to know of images that are drawn because the data has no such part; nothing where it has one.

        Args:
            source: the data.
            split: train, val, test or all.
            all_too: whether the command has --split all.
            whole: whether there were too few images to draw the split from, so that it has all of them.
        """
        if getattr(source, split, source.train) is not None:
            return []
        drawn = "no test part: a fifth" if split == "test" else "no validation part: the share data.val_share"
        note = f"this data has {drawn} was drawn" + "; --split all takes every image" * all_too
        if whole:
            note = f"this data has no {SPLITS[split]} part, and too few images to draw one: it is all that there are"
        if not self.is_run:
            places = "test/ beside train/" if split == "test" else "val/ and test/ beside train/"
            note += (
                ". If MODEL was trained on this data, these images are not held out: give held-out ones, in "
                f"{places} or their own folder by --data.root{', with --split all' * all_too}"
            )
        return [note]

    def named(self) -> Classifier:
        """The classifier with a name for every output."""
        if self.model.class_names is None:
            known = self.names[-1] if self.names else [UNNAMED.format(i) for i in range(self.model.num_classes)]
            self.model.class_names = tuple(known)
        return self.model


def open_model(
    word: str | Path,
    options: ModelOptions | None = None,
    *,
    overrides: Sequence[str] = (),
    checkpoint: str | None = None,
    device: str = "auto",
    needs_data: bool = True,
) -> ModelUnderTest:
    """The model that a word names.

    Args:
        word: see `MODEL_HELP` of model_options.
        options: of the command line.
        overrides: `--data.KEY VALUE` words.
        checkpoint: name of a run's checkpoint; None for the newest, or the file that `word` is.
        device: where the model goes.
        needs_data: whether a model that is no run must be given data.

    Raises:
        UserError: no such model, options that it does not take, or no data.
    """
    options, path = options or ModelOptions(), Path(word)
    if is_run(path):
        return _run(path, options, overrides, checkpoint, device)
    source_of(str(word))
    if checkpoint not in (None, "last"):
        raise UserError(f"--checkpoint {checkpoint} is for run folders; MODEL {word} is one model")
    if needs_data and not any(key.startswith("--data.name") for key in overrides):
        raise UserError(f"MODEL {word} comes without data: --data.name SET, or --data.name folder --data.root FOLDER")
    config = parse(["--quiet", *overrides])
    options = _with_side(options, config.data.image_size)
    found = find_model(str(word), options)
    classifier = found.classifier.to(pick_device(device)).requires_grad_(False)
    names = [distinct(known) for known in found.names] if options.class_names is None else [options.class_names]
    if classifier.class_names is not None:
        classifier.class_names = distinct(classifier.class_names)
    if any(len(known) != classifier.num_classes for known in names):
        source = "--class-names has" if options.class_names is not None else "MODEL has"
        raise UserError(f"{source} {listed(names[0])} names for {classifier.num_classes} outputs: one for each")
    images = images_of(classifier, options)
    take_images(classifier, images)
    check_takes(classifier, images.channels, int(images.side))
    home = options.out_dir or FOLDER / slug(str(word), options.weights)
    notes = [*found.notes, f"images: {images}"]
    if hasattr(classifier.backbone, "with_logits"):
        notes.append(NO_AFFINE_HEAD)
    config.model.backbone = str(word)
    config.data.batch_size = 2  # so that any number of images is enough
    return ModelUnderTest(str(word), classifier, config, home, False, names, notes)


@torch.no_grad()
def check_takes(classifier: Classifier, channels: int, side: int) -> None:
    """Refuse a model that fails on images of the side that they are brought to, before any work is done.

    Raises:
        UserError: with the model's own words.
    """
    like = next(classifier.parameters())
    try:
        classifier(torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype))
    except Exception as error:  # somebody's model may raise anything
        raise UserError(
            f"MODEL cannot take images of {channels} x {side} x {side} ({in_a_line(error)}): --image-size N says what "
            "it takes, --channels N their channels"
        ) from None


def _with_side(options: ModelOptions, side: int | None) -> ModelOptions:
    """The options with the side that `--data.image_size` names."""
    if side is None:
        return options
    if options.image_size not in (None, side):
        raise UserError(f"--image-size {options.image_size} and --data.image_size {side} differ: give one of them")
    return replace(options, image_size=side)


def tell(notes: Sequence[str]) -> None:
    """Print sentences for the user beside the output."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def slug(word: str, weights: Path | None = None) -> str:
    """A folder's name for a model and its weights.

    Example:
        >>> slug("timm:resnet18.a1_in1k", Path("mine/best.pth"))
        'timm-resnet18.a1_in1k-best'
    """
    words = [word, *([weights.stem] if weights is not None else [])]
    return fitting("-".join(file_name(text).strip(".-") for text in words)) or "model"


def is_run(path: Path) -> bool:
    """Whether a path is a run folder, or a file where its checkpoints are."""
    return (path / "config.yaml").is_file() or path.suffix == ".pt" or (path / "checkpoints").is_dir()


def _run(
    path: Path, options: ModelOptions, overrides: Sequence[str], checkpoint: str | None, device: str
) -> ModelUnderTest:
    if given := options.given():
        name = next(iter(given)).replace("_", "-")
        raise UserError(f"--{name} is for models that are no runs; RUN {path} knows its own")
    home = run_dir_of(path)
    source = path if checkpoint is None else checkpoint_file(path, checkpoint)
    model = read_classifier(source, device)
    config = config_of(home, overrides)
    names = [] if model.class_names is None else [tuple(model.class_names)]
    return ModelUnderTest(str(source), model.eval(), config, options.out_dir or home, True, names)


def check_own(run: str | Path, options: ModelOptions | None, overrides: Sequence[str]) -> None:
    """Refuse other data and a folder of results for a run, where what is computed is kept in the run.

    Raises:
        UserError: one of them was given.
    """
    for key in (word.partition("=")[0] for word in overrides):
        if key != "--data.root":
            raise UserError(
                f"{key} is for models that are no runs; RUN {run} has data of its own, and --data.root FOLDER says "
                "where they are now"
            )
    if options is not None and options.out_dir is not None:
        raise UserError(f"--out-dir {options.out_dir} is for models that are no runs; results of RUN {run} lie in it")


def run_dir_of(source: Path) -> Path:
    """The run folder, given itself or one of its checkpoint files.

    Raises:
        UserError: it is no run folder.
    """
    folder = source.parent.parent if source.suffix == ".pt" else source
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"RUN {folder} is no run folder: it has no config.yaml; recipes/train.py makes run folders, and prints "
            f"their names. Another MODEL is {OTHER_MODELS}"
        )
    return folder


def run_config(source: Path) -> TrainConfig:
    """The configuration of a run, given its folder or one of its checkpoint files."""
    return config_of(run_dir_of(source))


def checkpoint_file(run: Path, name: str) -> Path:
    """The file of a checkpoint of a run, by its name, such as last or onset.

    Raises:
        UserError: no run folder, or no such checkpoint.
    """
    files = {path.stem: path for path in sorted((run_dir_of(run) / "checkpoints").glob("*.pt"))}
    if name not in files:
        near = did_you_mean(name, files)
        raise UserError(f"RUN {run} has no checkpoint {name!r}; there: {', '.join(files) or 'none'}{near}")
    return files[name]


def use_own_code(source: Path) -> None:
    """Load code of the user's own from the copies that a run keeps of it, its head and norm at once."""
    run = RunDir(source.parent.parent if source.suffix == ".pt" else source)
    if copies := run.code():
        use_copies(copies)
        register_own_parts(run_config(source).model)


def read_classifier(source: Path, device: str) -> Classifier:
    """The classifier of a run folder or of one checkpoint file, on a device.

    Raises:
        UserError: it does not exist, or holds no classifier.
    """
    use_own_code(source)
    try:
        return load_classifier(source, device=pick_device(device))
    except (FileNotFoundError, ValueError) as error:
        argument = "RUN " if str(error).startswith(str(source)) else ""
        raise UserError(f"{argument}{error}") from None
