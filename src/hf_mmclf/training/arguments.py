"""What a training run can be told, by flags or one YAML file.

Four sources, each winning over those before it: the defaults here and of `transformers.TrainingArguments`, the
preset's recipe, the YAML file (`--config`), the flags.
"""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..data.augmentation import AugmentationArguments
from ..data.prepare import DataArguments
from ..evaluation.report import FIGURES
from ..evaluation.thresholds import check_objective
from ..inference.predictor import machine_defaults
from ..presets import get_preset
from .losses import MultiLabelLoss


def _field(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class ModelArguments:
    """The architecture, what it starts from, its tokenizer and its pictures. `None` leaves the preset's value."""

    _argument_group_name = "model and tokenizer"
    preset: str | None = _field(
        None, "A row of `hf-mmclf presets`. Default: demo on the embedded data set, else warmerdbert."
    )
    image_backbone: str | None = _field(None, "A timm architecture in place of the preset's, or 'none'.")
    text_backbone: str | None = _field(
        None, "A text encoder (Hub name or folder) in place of the preset's, or 'none'."
    )
    fusion: Literal["self", "cross_text", "cross_image", "concat", "label_queries"] | None = _field(
        None, "How pictures and captions meet. cross_text: text asks, pictures answer; label_queries: each label asks."
    )
    fusion_layers: int | None = _field(None, "Decoder layers of label_queries.")
    fusion_heads: int | None = _field(None, "Heads of label_queries; a divisor of the width.")
    fusion_norm: bool | None = _field(None, "Scale and normalise tokens after attention.", nargs="?", const=True)
    projection_norm: bool | None = _field(
        None, "BatchNorm, ReLU and dropout after each modality's projection.", nargs="?", const=True
    )
    image_tokens: Literal["pooled", "spatial", "stages"] | None = _field(
        None, "What of a picture the fusion sees: one vector, the last map's cells, or what all stages have there."
    )
    width: int | None = _field(None, "Size of each modality's vector before the classifier.")
    dropout: float | None = _field(None, "Dropout probability before the classifier.")
    unfrozen_image_stages: int | None = _field(None, "Train only the last n stages of the image backbone; -1: all.")
    unfrozen_text_layers: int | None = _field(None, "Train only the last n layers of the text backbone; -1: all.")
    learned_missing: bool | None = _field(
        None,
        "Learn a vector for absent pictures and captions. Default: if training rows lack some.",
        nargs="?",
        const=True,
    )
    modality_dropout: float | None = _field(None, "Probability that a training row loses its picture or its caption.")
    from_scratch: bool = _field(False, "Start both backbones from random weights.")
    image_weights: str = _field("hub", "hub, or a weights file or folder for the image backbone.")
    text_weights: str = _field("hub", "hub, or a folder for the text backbone.")
    tokenizer: str | None = _field(
        None, "Hub name, folder, vocab.txt, or 'train'. Default: the text backbone's; 'train' with --from_scratch."
    )
    vocab_size: int = _field(8000, "Largest vocabulary of a trained tokenizer.")
    max_tokens: int = _field(128, "Longer captions are cut.")
    image_size: int | None = _field(None, "Side of the pictures in pixels. Default: the image backbone's.")

    def __post_init__(self):
        name = self.image_backbone
        if name not in (None, "none") and ":" not in name and not timm.is_model(name):
            raise ValueError(f"image_backbone: timm has no architecture {name!r}{_nearest(name, timm.list_models())}")


@dataclasses.dataclass
class MMClfTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with other defaults, and:

    Args:
        backbone_learning_rate (`float`, *optional*): Learning rate of both backbones; defaults to `learning_rate`.
        early_stopping_patience (`int`, *optional*):
            Stop after so many evaluations without a better validation F1; 0 or `None`: never.
        loss (`str`, *optional*, defaults to `"bce"`), positive_weight_power, positive_weight_cap (`float`):
            See [`MultiLabelLoss`], whose smoothing is `label_smoothing_factor`.
        calibrate (`bool`, *optional*, defaults to `False`):
            Divide logits by the temperature that suits the validation rows; the classifier takes it in.
        label_thresholds (`bool`, *optional*, defaults to `False`): Fit one threshold for each label too.
        threshold_objective, threshold_beta, threshold_precision, threshold_shrinkage:
            See [`best_threshold`] and [`label_thresholds`]. The objective defaults to `"micro"`, with label thresholds
            to `"macro"`; a shrinkage of -1 is chosen by cross-validation.
        license (`str`, *optional*):
            Licence for the card, as the Hub writes it (`"mit"`, `"cc-by-4.0"`, `"other"`). Defaults to `"mit"` for a
            model that knows nothing but the embedded data set, else to `"unknown"`.
        save_predictions (`bool`, *optional*, defaults to `False`): Write `predictions-validation.csv`, `-test.csv`.
        ablations (`bool`, *optional*, defaults to `True`):
            At the end, evaluate the last split without captions, without pictures and with captions of other rows too.
        keep_checkpoints (`bool`, *optional*, defaults to `False`): Keep `checkpoints/` in a finished output folder.
        cache_features (`bool`, *optional*, defaults to `False`):
            Compute what the frozen parts make of training and validation rows once and keep it on disk: see
            [`FeatureCache`]. Reports still come from the files.
        cached_views (`int`, *optional*, defaults to 4):
            How many random variants of each training row the cache holds; without augmentation it is 1.
        feature_cache_dir (`str`, *optional*): Where the cache is; defaults to `hf_mmclf/features` in `HF_HOME`.
    """

    _argument_group_name = "training"
    output_dir: str | None = _field(None, "Folder for the finished model. Default: outputs/ and the preset's name.")
    resume_from_checkpoint: str | None = _field(
        None, "'true' to go on from the last checkpoint in --output_dir, or the folder of one."
    )
    eval_strategy: str = _field("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = _field("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = _field(2, "Most checkpoints to keep; the best always stays.")
    load_best_model_at_end: bool = _field(True, "Finish with the checkpoint of the best validation score.")
    metric_for_best_model: str | None = _field("f1", "What the best checkpoint is judged by.")
    logging_steps: float = _field(0.05, "Steps between two logs of the training loss, or their share of all steps.")
    remove_unused_columns: bool = _field(False, "Must stay off: transforms need the columns that the model does not.")
    ddp_find_unused_parameters: bool | None = _field(False, "No parameter is unused here, so searching is lost time.")
    backbone_learning_rate: float | None = _field(None, "Learning rate of both backbones. Default: learning_rate.")
    early_stopping_patience: int | None = _field(
        None, "Stop after so many evaluations without a better score; 0: never."
    )
    loss: Literal["bce", "focal", "asymmetric", "poly", "distribution_balanced", "two_way", "zlpr"] = _field(
        "bce", "What training minimises."
    )
    positive_weight_power: float = _field(0.0, "Positives of a label weigh (negatives / positives) to this power.")
    positive_weight_cap: float = _field(10.0, "The largest such weight.")
    calibrate: bool = _field(False, "Make scores probabilities, by a temperature fitted on the validation rows.")
    label_thresholds: bool = _field(False, "Fit a threshold for each label too, shrunk to the global one if rare.")
    threshold_objective: Literal["micro", "macro", "samples", "precision"] | None = _field(
        None, "What thresholds maximise. precision: recall, at --threshold_precision. Default: micro; by label: macro."
    )
    threshold_beta: float = _field(1.0, "Recall counts so many times as much as precision; 1: F1.")
    threshold_precision: float = _field(0.9, "Smallest precision of the objective of that name.")
    threshold_shrinkage: float = _field(
        2.0, "Positives at which a label's own threshold and the global one weigh the same; -1: cross-validated."
    )
    license: str | None = _field(
        None,
        "Licence for the card, as the Hub writes it: mit, cc-by-4.0, other. Default: unknown; embedded data: mit.",
    )
    save_predictions: bool = _field(False, "Write predictions-validation.csv and predictions-test.csv.")
    ablations: bool = _field(
        True, "Report what is left of the F1 without captions, without pictures, and with captions of other rows."
    )
    keep_checkpoints: bool = _field(False, "Keep checkpoints/ in the finished output folder.")
    cache_features: bool = _field(
        False, "Compute what frozen parts make of the rows once, keep it on disk, and train on that."
    )
    cached_views: int = _field(4, "Random variants of each training row in the feature cache; 1 without augmentation.")
    feature_cache_dir: str | None = _field(
        None, "Folder of the feature cache. Default: beside the caches of the Hub; see hf-mmclf cache."
    )

    def __post_init__(self):
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub would publish a pickle, and checkpoints before they are whole; leave it out, and after "
                f"training run: hf-mmclf push {self.output_dir or 'OUTPUT'} {self.hub_model_id or 'user/name'}"
            )
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"license is {self.license!r}; expected an identifier of the Hub such as mit, apache-2.0, cc-by-4.0, "
                "or 'other' for a licence that it does not know"
            )
        weights = (self.positive_weight_power, self.positive_weight_cap)
        MultiLabelLoss(self.loss, torch.ones(1), 2, *weights, self.label_smoothing_factor)  # now, not after an hour
        check_objective(self.threshold_objective or "micro", self.threshold_beta, self.threshold_precision)
        if self.threshold_shrinkage < 0 and self.threshold_shrinkage != -1:
            raise ValueError(
                f"threshold_shrinkage is {self.threshold_shrinkage}; expected at least 0, or -1 to choose"
            )
        if self.cached_views < 1:
            raise ValueError(f"cached_views is {self.cached_views}; expected at least 1")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.save_steps  # transformers would take logging_steps
        super().__post_init__()
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses persistent workers where there are none
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be off: the transforms read columns the model does not")
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        if self.load_best_model_at_end and metric not in FIGURES:  # Trainer would say so after the first epoch
            raise ValueError(f"metric_for_best_model is {metric!r}; expected one of {', '.join(FIGURES)}")

    @property
    def counts_labels(self) -> bool:
        """`bool`: Whether the loss needs the frequencies of the labels."""
        return self.positive_weight_power > 0 or self.loss == "distribution_balanced"


Arguments = tuple[ModelArguments, DataArguments, AugmentationArguments, MMClfTrainingArguments]
CLASSES = (ModelArguments, DataArguments, AugmentationArguments, MMClfTrainingArguments)

# Shown by --help among the hundred of transformers.TrainingArguments; the others work just the same.
COMMON = (
    "output_dir",
    "learning_rate",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "seed",
    "logging_steps",
    "dataloader_num_workers",
    "resume_from_checkpoint",
)


def _parser(prog: str | None) -> HfArgumentParser:
    parser = HfArgumentParser(
        CLASSES,
        prog=prog,
        usage="%(prog)s [--config FILE] [--argument value ...]",
        allow_abbrev=False,
        description="Train a model for several labels a row. Without arguments it learns the embedded data.",
        epilog="All arguments of transformers.TrainingArguments are accepted too; --help_all lists them.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these arguments; flags win over it.")
    parser.add_argument("--help_all", "--help-all", action="store_true", help="Show all arguments and exit.")
    return parser


def shorten_help(parser: argparse.ArgumentParser, hidden: Collection[str] = ()) -> None:
    """Makes a help that people can read: without `hidden`, second spellings and empty defaults. All still work."""
    parser.formatter_class = argparse.HelpFormatter
    for action in parser._actions:
        spellings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        action.option_strings = spellings or action.option_strings
        if action.option_strings and action.nargs != 0 and not action.choices:
            action.metavar = action.metavar or {int: "N", float: "X"}.get(action.type, "VALUE")
        if action.dest in hidden or action.option_strings[0:1] == [f"--no_{action.dest}"]:
            action.help = argparse.SUPPRESS
        elif action.help and action.default not in (None, argparse.SUPPRESS) and action.default is not False:
            action.help += " (here: %(default)s)" if "Default: " in action.help else " (default: %(default)s)"


def reject_unknown(parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Exits with a message about the first of the flags that a parser did not know, if there are such."""
    if rest:
        name = rest[0].partition("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {name!r}{_nearest(name, flags) or '; --help lists them'}")


def parse_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
    """
    The arguments of a training run.

    Args:
        argv (`Sequence[str]`, *optional*): Flags; defaults to those of the process.
        prog (`str`, *optional*): Name of the program in its help.

    Raises:
        `SystemExit`: a flag or value that does not exist, after a message with the valid ones.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(prog)
    first = argparse.ArgumentParser(prog=prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "data"):
        first.add_argument(f"--{name}")
    first.add_argument("--streaming", nargs="?", const="true", default="false")
    early, _ = first.parse_known_args(argv)
    try:
        from_file = _read_yaml(early.config) if early.config else {}
        preset = early.preset or from_file.get("preset")
        preset = str(preset or ("warmerdbert" if early.data or from_file.get("data") else "demo"))
        streaming = from_file.get("streaming") or early.streaming.lower() == "true"
        by_steps = dict(eval_strategy="steps", save_strategy="steps", eval_steps=0.1, save_steps=0.1)
        defaults = {**machine_defaults(), **get_preset(preset).recipe, **(by_steps if streaming else {})}
        parser.set_defaults(**defaults)
        argv = [*_as_flags(parser, from_file, early.config), *argv]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    parser.set_defaults(preset=preset)
    if "--help_all" in argv or "--help-all" in argv:
        parser.print_help()
        parser.exit()
    shorten_help(parser, {field.name for field in dataclasses.fields(TrainingArguments)} - set(COMMON))
    try:
        *arguments, _, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    reject_unknown(parser, rest)
    return tuple(arguments)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines such as 'learning_rate: 1e-4', got {type(values).__name__}")
    return values


def _as_flags(parser: argparse.ArgumentParser, values: dict[str, Any], path: str) -> list[str]:
    """Values of a file as flags, so that they are converted and checked like those; `null` is `None`."""
    known = {action.dest: action for action in parser._actions}
    flags = []
    for name, value in values.items():
        if name not in known or name in ("help", "help_all", "config"):
            raise ValueError(f"{path}: unknown argument {name!r}{_nearest(str(name), known)}")
        if value is None:
            parser.set_defaults(**{name: None})
        elif isinstance(value, list) and known[name].nargs == "+":
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, str | int | float):  # of which bool is one
            flags.append(f"--{name}={value}")
        else:
            flags.append(f"--{name}={json.dumps(value)}")
    return flags
