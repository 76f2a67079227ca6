"""Arguments of tables: where rows come from, and how they are read and split."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclasses.dataclass
class DataArguments:
    """
    Where the rows come from, and how they are read and split.

    Args:
        data (`str`, *optional*):
            A table (.csv, .tsv, .jsonl, .json, .parquet, .xlsx, also .csv.gz), a folder, or a data set on the Hub. By
            default, the embedded data set. From Python, also a pandas or `datasets` object.
        demo_rows (`int`, *optional*, defaults to 3000):
            Number of rows of the embedded data set.
        validation_data (`str`, *optional*):
            Validation rows, if they are in a place of their own.
        test_data (`str`, *optional*):
            Test rows, if they are in a place of their own.
        image_dir (`str`, *optional*):
            The folder to which image names are relative. By default, the folder of the table.
        image_column (`str`, *optional*):
            The column of images, or none to go without. By default, the first that exists of image, ImageID,
            file_name, image_path, path, filename.
        text_column (`str`, *optional*):
            The column of texts, or none to go without. By default, the first that exists of text, Caption, caption,
            sentence.
        label_column (`str`, *optional*):
            The column of labels. By default, the first that exists of labels, Labels, label.
        label_columns (`list[str]`, *optional*):
            Columns of 0 and 1, one for each label, in place of a label column. A cell of -1 is an unknown label.
        label_delimiter (`str`, *optional*):
            The separator of labels in a cell. By default, the first of | ; , that occurs in the label column,
            otherwise white space.
        empty_is_unknown (`bool`, *optional*, defaults to `False`):
            An empty label cell means that the labels are unknown. By default, it means that there is no label.
        label_names_file (`str`, *optional*):
            A JSON file with an object from label to name, such as {"1": "person"}. It fixes the set of labels, and
            its order is that of multi-hot lists.
        validation_fraction (`float`, *optional*, defaults to 0.1):
            Share of the training rows that become validation rows when no validation rows are given.
        test_fraction (`float`, *optional*, defaults to 0.1):
            Share of the training rows that become test rows when neither validation nor test rows are given.
        split_seed (`int`, *optional*, defaults to 0):
            Seed of the stratified split.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the training rows one after another and never keep all of them. Needs --max_steps.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Number of rows in the buffer that shuffles a stream.
        validation_rows (`int`, *optional*, defaults to 0):
            Number of rows at the beginning of a stream that become validation rows.
        bad_images (`str`, *optional*, defaults to `"error"`):
            What happens if an image cannot be read: error stops, skip leaves the row out, missing keeps the row
            without its image.
        pixel_limit (`float`, *optional*, defaults to 100.0):
            Images with more megapixels count as images that cannot be read. Pillow has a limit of 178 of its own.
    """

    _argument_group_name = "data"

    data: str | None = None
    demo_rows: int = 3000
    validation_data: str | None = None
    test_data: str | None = None
    image_dir: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    label_columns: list[str] | None = None
    label_delimiter: str | None = None
    empty_is_unknown: bool = False
    label_names_file: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    streaming: bool = False
    shuffle_buffer: int = 1000
    validation_rows: int = 0
    bad_images: Literal["error", "skip", "missing"] = "error"
    pixel_limit: float = 100.0


def changed_fields(args: Any, recipe: Mapping[str, Any] | None = None) -> set[str]:
    """Return the fields of a dataclass whose values are neither the default nor those of a preset's recipe."""
    changed = set()
    for field in dataclasses.fields(args):
        value, usual = getattr(args, field.name), (field.default, (recipe or {}).get(field.name, field.default))
        if not isinstance(value, str | int | float | list | None) or value not in usual:  # tables have no plain ==
            changed.add(field.name)
    return changed


Rules = Iterable[tuple[bool, Sequence[str], str]]
"""Whether some arguments have an effect, their names, and the reason if they do not."""


def idle_arguments(given: Collection[str], rules: Rules) -> list[str]:
    """Return a sentence for each rule by which arguments that are `given` have no effect."""
    idle = [([f"--{name}" for name in names if name in given], why) for works, names, why in rules if not works]
    return [
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect, because {why}"
        for names, why in idle
        if names
    ]


def refuse_idle(given: Collection[str], rules: Rules) -> None:
    """Raise `ValueError` for arguments that are `given` and have no effect."""
    for sentence in idle_arguments(given, rules):
        raise ValueError(f"{sentence}; leave it out")


def check_effects(args: DataArguments, is_given: bool, is_streamed: bool, uses_image: bool, with_labels: bool) -> None:
    """
    Refuse arguments that contradict each other or have no effect, before anything is read. Warn of those of images.

    Args:
        args ([`DataArguments`]): The arguments.
        is_given (`bool`): Whether the rows are given without a table.
        is_streamed (`bool`): Whether the training rows are a stream.
        uses_image (`bool`): Whether the model has an image backbone.
        with_labels (`bool`): Whether labels are read.

    Raises:
        `ValueError`: If there are such arguments.
    """
    if args.label_columns and args.label_column:
        raise ValueError("--label_column and --label_columns are both given; leave one out")
    if args.label_delimiter == "":
        raise ValueError("--label_delimiter is empty; leave it out for white space")
    labels = ("label_column", "label_columns", "label_delimiter", "empty_is_unknown", "label_names_file")
    places = ("data", "validation_data", "test_data", *labels, "demo_rows")
    rules = [
        (not is_given, places, "the rows are given without a table"),
        (args.data is None or is_given, ["demo_rows"], "--data has rows of its own"),
        (args.data is not None or is_given, ["image_dir"], "the embedded data set has no image files"),
        (args.streaming, ["shuffle_buffer", "validation_rows"], "--streaming is not given"),
        (is_streamed, ["streaming"], "only training reads a stream"),
        (with_labels, labels, "a prediction reads no labels"),
    ]
    refuse_idle(changed_fields(args), rules)
    # One file of arguments may serve models with and without images, so these are no errors.
    of_images = ("bad_images", "pixel_limit", "image_dir")
    rules = [(uses_image or is_streamed, of_images, "the model has no image backbone")]
    for sentence in idle_arguments(changed_fields(args), rules):
        logger.warning(sentence)


def check_splits(args: DataArguments, sources: Collection[str], is_new: bool) -> None:
    """
    Check that a source has training rows, and refuse shares and the seed of a split that is not drawn.

    Args:
        args ([`DataArguments`]): The arguments.
        sources (`Collection[str]`): The names of the splits that the source has.
        is_new (`bool`): Whether a new model is trained on the rows.

    Raises:
        `ValueError`: If there are no training rows, or if there are such arguments.
    """
    if is_new and "train" not in sources:
        raise ValueError(f"no training rows; the source has only {', '.join(sources)}")
    reason = "only training splits rows" if not is_new else "the rows of {} are given"
    if args.streaming:
        reason = "a stream is not split; --validation_rows takes rows from its beginning"
    drawn = [name for name in ("validation", "test") if is_new and not {"validation", name} & set(sources)]
    validation = reason.format("validation")
    test = reason.format("test") if "test" in sources else validation
    rules = [
        ("validation" in drawn, ["validation_fraction", "split_seed"], validation),
        ("test" in drawn or args.test_fraction == 0, ["test_fraction"], test),
    ]
    refuse_idle(changed_fields(args), rules)
