"""Arguments of a training run: the architecture and its weights, and `transformers.TrainingArguments` with more."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import timm
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from hf_mmclf_cli import did_you_mean

from ..data.arguments import DataArguments, changed_fields, refuse_idle
from ..data.augmentation import AugmentationArguments
from ..model.configuration_mmclf import MMClfConfig

OF_UPLOADS = ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_token", "hub_always_push", "hub_revision")
ARCHITECTURE = [field for field in dataclasses.fields(MMClfConfig) if field.metadata.get("flag")]


def _flag(field: dataclasses.Field) -> tuple[str, Any, dataclasses.Field]:
    """Return the optional argument for a field of the configuration."""
    kind = float if field.type == float | int else field.type
    metadata = {"nargs": "?", "const": True} if kind is bool else {}  # `--name` alone means true
    return field.name, kind | None, dataclasses.field(default=None, kw_only=True, metadata=metadata)


ArchitectureArguments = dataclasses.make_dataclass(
    "ArchitectureArguments",
    map(_flag, ARCHITECTURE),
    namespace={"__doc__": MMClfConfig.__doc__},  # which documents the fields
)


@dataclasses.dataclass
class ModelArguments(ArchitectureArguments):
    """
    The architecture, its initial weights, its tokenizer and its image size. Arguments of the architecture that are not
    given keep the preset's value; -1 unfrozen stages or layers train the whole backbone.

    Args:
        preset (`str`, *optional*):
            Name of a preset; `hf-mmclf presets` lists them. Without a name it is `"demo"` for the embedded data set
            and `"warmerdbert"` for other data.
        image_backbone (`str`, *optional*):
            timm architecture that replaces the preset's image backbone, or `"none"` for a model without images.
        text_backbone (`str`, *optional*):
            Text encoder (Hub name or folder) that replaces the preset's text backbone, or `"none"` for a model
            without texts.
        from_scratch (`bool`, *optional*, defaults to `False`):
            Initialize both backbones with random weights.
        image_weights (`str`, *optional*):
            Pretrained weights of the image backbone: `"hub"`, or a weights file or folder, also that of a finished
            model with this backbone. Without it they are those of the Hub, with `from_scratch` random ones.
        text_weights (`str`, *optional*):
            Pretrained weights of the text backbone: `"hub"`, or a folder, also that of a finished model with this
            backbone. Without it they are those of the Hub, with `from_scratch` random ones.
        tokenizer (`str`, *optional*):
            Hub name, folder, vocab.txt, or `"train"` for a tokenizer that is trained on the training texts. Without a
            name it is the text backbone's own, with `from_scratch` a trained one.
        vocab_size (`int`, *optional*, defaults to 8000):
            Largest vocabulary of a trained tokenizer.
        max_tokens (`int`, *optional*, defaults to 128):
            Longer texts are truncated to this many tokens.
        image_size (`int`, *optional*):
            Side length of the square images in pixels. Without it the image backbone's own size is used.
        init_from (`str`, *optional*):
            Output folder of a training run, or its name on the Hub. The run starts from its weights, architecture,
            preprocessing and tokenizer. Labels are matched by name: known ones keep their classifier, new ones start
            with random weights.

    Raises:
        `ValueError`: If timm has no architecture of the name `image_backbone`.
    """

    _argument_group_name = "model and tokenizer"
    preset: str | None = None
    image_backbone: str | None = None
    text_backbone: str | None = None
    from_scratch: bool = False
    image_weights: str | None = None
    text_weights: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 8000
    max_tokens: int = 128
    image_size: int | None = None
    init_from: str | None = None

    def __post_init__(self):
        name = self.image_backbone
        if name not in (None, "none") and ":" not in name and not timm.is_model(name):
            near = did_you_mean(name, timm.list_models())
            raise ValueError(f"image_backbone: timm has no architecture {name!r}{near}")

    def backbone_weights(self) -> dict[str, str | None]:
        """Return the pretrained weights by modality: what is given, else those of the Hub unless `from_scratch`."""
        default = None if self.from_scratch else "hub"
        text = self.text_weights or default
        if text == "hub" and self.text_backbone and Path(self.text_backbone).is_dir():
            text = self.text_backbone
        return {"image": self.image_weights or default, "text": text}


@dataclasses.dataclass
class MMClfTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with other defaults and more arguments.

    Args:
        output_dir (`str`, *optional*):
            Folder for the trained model. Without it a new folder in outputs/ gets the preset's name.
        resume_from_checkpoint (`str`, *optional*):
            `"true"` to resume from the newest whole checkpoint in the output folder, or the folder of a checkpoint.
            Rows and settings must be those of the interrupted run. Only the number of epochs or steps may differ; the
            learning rates then follow the schedule of the new number. If the run has finished, nothing is trained.
        eval_strategy (`str`, *optional*, defaults to `"epoch"`):
            When to evaluate: `"no"`, `"steps"` or `"epoch"`.
        save_strategy (`str`, *optional*, defaults to `"epoch"`):
            When to save a checkpoint: `"no"`, `"steps"`, `"epoch"` or `"best"`.
        save_total_limit (`int`, *optional*, defaults to 2):
            Largest number of checkpoints to keep. The best one is always kept.
        load_best_model_at_end (`bool`, *optional*, defaults to `True`):
            Load the checkpoint with the best validation score at the end of training.
        metric_for_best_model (`str`, *optional*, defaults to `"f1"`):
            Metric that chooses the best checkpoint.
        learning_rate (`float`, *optional*, defaults to 5e-5):
            Highest learning rate of the schedule.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Weight decay of all parameters with several dimensions. Biases and norms have none.
        num_train_epochs (`float`, *optional*, defaults to 3.0):
            Number of epochs.
        max_steps (`int`, *optional*, defaults to -1):
            Number of optimizer steps, which replaces the number of epochs if it is positive.
        per_device_train_batch_size (`int`, *optional*, defaults to 8):
            Number of training rows in the batch of one process.
        per_device_eval_batch_size (`int`, *optional*, defaults to 8):
            Number of validation or test rows in the batch of one process.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Number of batches whose gradients are averaged for one optimizer step.
        lr_scheduler_type (`str`, *optional*, defaults to `"linear"`):
            Schedule of the learning rate, such as linear, cosine or constant.
        warmup_steps (`float`, *optional*, defaults to 0):
            Number of steps in which the learning rate grows from 0 or, below 1, their share of all steps.
        bf16 (`bool`, *optional*, defaults to `False`):
            Train in bfloat16 mixed precision. The command turns it on if the accelerator supports it.
        seed (`int`, *optional*, defaults to 42):
            Seed of the initial weights, the order of the rows and the augmentation.
        dataloader_num_workers (`int`, *optional*, defaults to 0):
            Number of processes that load rows. The command chooses it by the number of CPU cores.
        logging_steps (`float`, *optional*, defaults to 0.05):
            Number of steps between two logs of the training loss or, below 1, their share of all steps.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must be off, because the transforms read columns that the model does not.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Off, because the model has no unused parameters.
        backbone_learning_rate (`float`, *optional*):
            Learning rate of both backbones. Without it they use `learning_rate`.
        early_stopping_patience (`int`, *optional*):
            Stop after this many evaluations without a better validation score. 0 never stops early.
        loss (`str`, *optional*, defaults to `"bce"`):
            Training loss; see [`MultiLabelLoss`].
        positive_weight_power (`float`, *optional*, defaults to 0.0):
            Positives of a label are weighted by (negatives / positives) to this power.
        positive_weight_cap (`float`, *optional*, defaults to 10.0):
            Upper limit of these weights.
        calibrate (`bool`, *optional*, defaults to `False`):
            Calibrate the scores by a temperature that is fitted on the validation rows.
        label_thresholds (`bool`, *optional*, defaults to `False`):
            Fit one threshold for each label too, shrunk to the global threshold where the label is rare.
        threshold_objective (`str`, *optional*):
            What the thresholds maximize. `"precision"` maximizes recall at a precision of `threshold_precision`.
            Without it the global threshold maximizes micro-F1 and label thresholds maximize macro-F1.
        threshold_beta (`float`, *optional*, defaults to 1.0):
            Weight of recall relative to precision in the objective; 1 is F1.
        threshold_precision (`float`, *optional*, defaults to 0.9):
            Smallest precision that the objective `"precision"` accepts.
        threshold_shrinkage (`float`, *optional*, defaults to 2.0):
            Number of positives at which a label's own threshold and the global one have equal weight. -1 chooses it by
            cross-validation.
        license (`str`, *optional*):
            License for the model card, as the Hub writes it: `"mit"`, `"cc-by-4.0"`, `"other"`. Without it the card
            says `"mit"` for a model that was trained from scratch on the embedded data set, otherwise `"unknown"`.
        save_predictions (`bool`, *optional*, defaults to `False`):
            Write predictions-validation.csv and predictions-test.csv.
        ablations (`bool`, *optional*, defaults to `True`):
            Report the F1 without texts, without images, and with texts of other rows.
        keep_checkpoints (`bool`, *optional*, defaults to `False`):
            Keep the folder checkpoints/ after training.
        cache_features (`bool`, *optional*, defaults to `False`):
            Compute the features of frozen backbones once, keep them on disk and train on them.
        cached_views (`int`, *optional*, defaults to 4):
            Random variants of each training row in the feature cache. Without augmentation there is one.
        feature_cache_dir (`str`, *optional*):
            Folder of the feature cache. Without it the folder is hf_mmclf/features in HF_HOME; see `hf-mmclf cache`.

    Raises:
        `ValueError`: If a value is out of range, or if two values contradict each other.
    """

    _argument_group_name = "training"
    output_dir: str | None = None
    resume_from_checkpoint: str | None = None
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "f1"
    logging_steps: float = 0.05
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    backbone_learning_rate: float | None = None
    early_stopping_patience: int | None = None
    loss: Literal["bce", "focal", "asymmetric", "poly", "distribution_balanced", "two_way", "zlpr"] = "bce"
    positive_weight_power: float = 0.0
    positive_weight_cap: float = 10.0
    calibrate: bool = False
    label_thresholds: bool = False
    threshold_objective: Literal["micro", "macro", "samples", "precision"] | None = None
    threshold_beta: float = 1.0
    threshold_precision: float = 0.9
    threshold_shrinkage: float = 2.0
    license: str | None = None
    save_predictions: bool = False
    ablations: bool = True
    keep_checkpoints: bool = False
    cache_features: bool = False
    cached_views: int = 4
    feature_cache_dir: str | None = None

    def __post_init__(self):
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.save_steps  # transformers would take logging_steps
        self._check()
        super().__post_init__()
        installed = get_available_reporting_integrations()
        # There is no check of flyte in transformers.
        if missing := set(filter(None, self.report_to)) - {"none", "all", "flyte", *installed}:
            known = f"installed are: {', '.join(installed) or 'none'}"
            raise ValueError(f"report_to is {', '.join(sorted(missing))}, which transformers does not find; {known}")
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses persistent workers without workers

    def _check(self) -> None:
        """Raise an error now for what would fail only after an hour of training, or would be ignored."""
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub would publish a pickle and unfinished checkpoints; leave it out, and after training "
                f"run: hf-mmclf push {self.output_dir or 'OUTPUT'} {self.hub_model_id or 'user/name'}"
            )
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"license is {self.license!r}; expected an identifier of the Hub such as mit, apache-2.0, cc-by-4.0, "
                "or 'other' for a license that the Hub does not list"
            )
        if self.threshold_shrinkage < 0 and self.threshold_shrinkage != -1:
            raise ValueError(
                f"threshold_shrinkage is {self.threshold_shrinkage}; expected at least 0, or -1 for cross-validation"
            )
        if self.cached_views < 1:
            raise ValueError(f"cached_views is {self.cached_views}; expected at least 1")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be off: the transforms read columns that the model does not")
        aims_at_precision = self.threshold_objective == "precision"
        rules = [
            (self.cache_features, ["cached_views", "feature_cache_dir"], "--cache_features is not given"),
            (self.positive_weight_power > 0, ["positive_weight_cap"], "--positive_weight_power is 0"),
            (self.label_thresholds, ["threshold_shrinkage"], "--label_thresholds is not given"),
            (aims_at_precision, ["threshold_precision"], "--threshold_objective is not precision"),
            (not aims_at_precision, ["threshold_beta"], "--threshold_objective precision has no beta"),
            (False, ["do_predict", "prediction_loss_only"], "validation and test rows are always scored and reported"),
            (False, ["label_names"], "the labels are those of the table"),
            (False, OF_UPLOADS, "training uploads nothing; run hf-mmclf push after it"),
        ]
        refuse_idle(changed_fields(self), rules)

    @property
    def counts_labels(self) -> bool:
        """`bool`: Whether the loss needs the frequencies of the labels."""
        return self.positive_weight_power > 0 or self.loss == "distribution_balanced"


Arguments = tuple[ModelArguments, DataArguments, AugmentationArguments, MMClfTrainingArguments]
