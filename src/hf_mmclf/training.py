"""The main job: rows in, one folder with a trained model and its thresholds out."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model
from torch import nn
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .ablation import ablation_figures
from .arguments import AugmentationArguments, MMClfTrainingArguments, ModelArguments
from .augmentation import ImageAugmentation, TextAugmentation
from .batches import Collator, EvaluationImageTransform, RowTransform
from .configuration_mmclf import MMClfConfig
from .data import DataArguments, picture_paths, prepare_data
from .evaluation import ComputeMetrics, report, report_text, scores_of
from .feature_cache import FeatureCache
from .finished import save_model, whole_folder
from .image_processing_mmclf import MMClfImageProcessor
from .metrics import best_threshold, label_thresholds
from .modeling_mmclf import MMClfForImageTextClassification
from .presets import config_from_preset
from .processing_mmclf import MMClfProcessor
from .records import machine_name, run_record, write_records
from .streaming import StreamCollator, open_stream
from .tokenization import load_tokenizer

CHECKPOINTS = "checkpoints"


class MMClfTrainer(Trainer):
    """`Trainer` with learning rates by part and no weight decay on one-dimensional parameters.

    `train_collator` makes batches of training rows where these are another kind than those to evaluate on.
    """

    args: MMClfTrainingArguments
    train_collator: Callable | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over [`parameter_groups`]."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args), **options)
        return self.optimizer

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Leaves out a last batch of a single row where BatchNorm could not work on it; evaluation keeps all rows."""
        given = self.args.dataloader_drop_last, self.data_collator
        if not isinstance(self.train_dataset, IterableDataset):  # which has no last batch
            lonely = len(self.train_dataset) % self.args.train_batch_size == 1 < len(self.train_dataset)
            if lonely and any(isinstance(module, nn.BatchNorm1d) for module in self.model.modules()):
                self.args.dataloader_drop_last = True
        self.data_collator = self.train_collator or self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last, self.data_collator = given


def parameter_groups(model: nn.Module, args: MMClfTrainingArguments) -> list[dict[str, Any]]:
    """
    Trained parameters by learning rate and weight decay.

    Decay by dimension, not by name: names miss normalisation layers such as DenseNet's `norm5`.
    """
    backbone_rate = args.learning_rate if args.backbone_learning_rate is None else args.backbone_learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.removeprefix("module.").startswith(("image_model.", "text_model."))
        rate = backbone_rate if in_backbone else args.learning_rate
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def build_config(args: ModelArguments) -> MMClfConfig:
    """The preset's configuration with what the arguments change; labels and vocabulary are still open."""
    if args.preset is None:
        raise ValueError("ModelArguments.preset is None; name a preset, or let parse_arguments choose one")
    names = ("fusion", "image_tokens", "width", "dropout", "learned_missing")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("unfrozen_image_stages", "unfrozen_text_layers"):
        if getattr(args, name) is not None:
            changes[name] = None if getattr(args, name) == -1 else getattr(args, name)
    if args.image_backbone is not None:
        changes |= {"image_backbone": None if args.image_backbone == "none" else args.image_backbone}
        changes |= {"image_backbone_args": None}
    if args.text_backbone == "none":
        changes |= {"text_backbone": None, "text_config": None}
    elif args.text_backbone is not None:
        text_config = AutoConfig.from_pretrained(args.text_backbone).to_dict()
        changes |= {"text_backbone": Path(args.text_backbone).name, "text_config": text_config}
        if not Path(args.text_backbone).is_dir():
            changes["text_backbone"] = args.text_backbone
    return config_from_preset(args.preset, **changes)


def build_model(
    config: MMClfConfig, args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None
) -> MMClfForImageTextClassification:
    """The model, its backbones loaded as the arguments say."""
    image_weights, text_weights = (None, None) if args.from_scratch else (args.image_weights, args.text_weights)
    if text_weights == "hub" and args.text_backbone and Path(args.text_backbone).is_dir():
        text_weights = args.text_backbone
    if config.has_text:
        if text_weights is None:
            config.text_config.vocab_size = len(tokenizer)
            config.text_config.pad_token_id = tokenizer.pad_token_id
        elif len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer):,} tokens, the pretrained text backbone "
                f"{config.text_config.vocab_size:,}; use the backbone's own tokenizer, or --from_scratch"
            )
    return MMClfForImageTextClassification.from_backbones(config, image_weights, text_weights)


def build_image_processor(model: MMClfForImageTextClassification, size: int | None = None) -> MMClfImageProcessor:
    """Size (unless given), mean and deviation as timm knows them for the image backbone."""
    known = model.image_model.pretrained_cfg
    return MMClfImageProcessor(
        size=size or known["input_size"][-1], image_mean=list(known["mean"]), image_std=list(known["std"])
    )


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
) -> Path:
    """
    Trains, fits the thresholds on the validation rows, reports on validation and test rows, and writes the folder.

    Returns:
        `Path`: The output folder: model, image processor, tokenizer, `metrics.json`, `training.json`, `splits.csv`,
        and the card (`README.md`) with its plots.

    Raises:
        `FileExistsError`: the output folder is in use already.
    """
    config = build_config(model_args)
    output, resume = _claim_output(model_args, args)
    set_seed(args.seed)
    main = args.process_index == 0
    say = print if main else _be_silent
    stream = None
    if data_args.streaming:
        _check_streaming(args)
        args.accelerator_config.dispatch_batches = False  # each process decodes its own pictures
        stream, prepared = open_stream(data_args, config.has_image, config.has_text, args.seed)
    else:
        prepared = prepare_data(data_args, config.has_image, config.has_text)
    train_rows = stream.head if stream else prepared.splits["train"]
    say(f"Rows: {', '.join(f'{name} {len(split):,}' for name, split in prepared.splits.items())}")
    say(f"  splits: {prepared.split_source}; labels: {', '.join(prepared.labels.names)}")
    if prepared.bad_images:
        say(f"  {len(prepared.bad_images):,} pictures cannot be read")
    for where, reason in prepared.bad_images:
        say(f"  picture {'left out' if data_args.bad_images == 'skip' else 'taken as absent'}: {where}: {reason}")

    args.distributed_state.wait_for_everyone()  # until all have looked at the output folder, nobody writes
    if main:  # only now: a mistake above leaves nothing behind
        if resume is None:
            _remove_traces(Path(args.output_dir))  # of a start that failed before its first checkpoint
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    args.distributed_state.wait_for_everyone()
    tokenizer, tokenizer_source = None, None
    if config.has_text:
        with args.main_process_first(local=False, desc="tokenizer"):  # trained once for all processes and machines
            tokenizer, tokenizer_source = _tokenizer(model_args, config, train_rows, Path(args.output_dir), resume)
    config.id2label = dict(enumerate(prepared.labels.names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.label_ids = list(prepared.labels.ids)
    missing = _settle_missing(config, {"train": train_rows, **prepared.splits}, say)
    model = build_model(config, model_args, tokenizer)
    if tokenizer is not None:
        tokenizer.model_max_length = min(model_args.max_tokens, model.max_tokens)  # saved with it
    for part, weights in (("image", config.image_weights), ("text", config.text_weights)):
        if weights:
            say(f"{part} backbone: {'random weights' if weights == 'scratch' else f'pretrained, {weights}'}")
    if tokenizer is not None:
        say(f"tokenizer: {tokenizer_source}")
    trained = model.num_parameters(only_trainable=True)
    say(f"parameters: {model.num_parameters():,}, of which {trained:,} train")

    processor, size = None, None
    if config.has_image:
        processor = build_image_processor(model, model_args.image_size)
        size = processor.size["longest_edge"]
    collator = Collator(tokenizer, getattr(tokenizer, "model_max_length", 0), size)
    evaluation = RowTransform(prepared.folder, processor and EvaluationImageTransform(processor))
    training = RowTransform(prepared.folder, *_augmentations(augmentation, processor))
    datasets = {
        "train_dataset": stream.rows if stream else train_rows.with_transform(training),
        "eval_dataset": prepared.splits["validation"].with_transform(evaluation),
        "data_collator": collator,
    }
    if args.cache_features:
        if resume is not None:  # Trainer loads it too, but only when training begins
            load_model(model, Path(resume) / "model.safetensors", strict=False)
        recipe = dataclasses.asdict(augmentation) | {"image_processor": processor and processor.to_dict()}
        cache = FeatureCache(model, collator, args, recipe)
        views = args.cached_views if any(dataclasses.astuple(augmentation)) else 1
        wanted = {"train": (train_rows, training, views), "validation": (prepared.splits["validation"], evaluation, 1)}
        cached = cache.compute(wanted, say)
        datasets = {
            "train_dataset": cached["train"],
            "eval_dataset": cached["validation"],
            "data_collator": cache.cached_collator,
        }
    trainer = MMClfTrainer(model=model, args=args, compute_metrics=ComputeMetrics(), **datasets)
    if stream:
        seen = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json")).global_step if resume else 0
        skipped = seen * args.gradient_accumulation_steps
        trainer.train_collator = StreamCollator(stream, training, collator, skipped)
    if args.early_stopping_patience and args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    elif args.early_stopping_patience:
        say("No early stopping: it needs load_best_model_at_end, which is off")
    trainer.train(resume_from_checkpoint=resume)

    trainer.data_collator = collator  # reports are of rows as users will give them
    reports, outcomes, speed = {}, {}, {}
    for name in ("validation", "test"):
        rows = prepared.splits.get(name)
        if rows is None or "labels" not in rows.column_names:
            say(f"No labelled {name} rows: nothing to report on them")
            continue
        result = trainer.predict(rows.with_transform(evaluation), metric_key_prefix=name)
        scores = scores_of(result.predictions)
        outcomes[name] = scores, result.label_ids
        speed = {"split": name, "rows_per_second": result.metrics.get(f"{name}_samples_per_second")}
        if name == "validation":  # test labels never choose anything
            _fit_thresholds(config, scores, result.label_ids, args.label_thresholds)
        reports[name] = report(scores, result.label_ids, config, rows["text"][:] if config.has_text else None)
    if args.ablations and reports and config.has_image and config.has_text:
        name, (_, references) = list(outcomes.items())[-1]
        rows = prepared.splits[name]
        reports[name]["ablations"] = ablation_figures(
            lambda change: scores_of(trainer.predict(rows.with_transform(change(evaluation))).predictions),
            rows,
            references,
            config,
        )
    if main:
        record = run_record((model_args, data_args, augmentation, args), trainer, prepared)
        record |= {"tokenizer": tokenizer_source, "missing": missing, "resumed": resume is not None}
        record["recipe"] |= {"image_size": size, "max_tokens": getattr(tokenizer, "model_max_length", None)}
        record["speed"] = {**speed, "batch_size": args.eval_batch_size, "machine": machine_name(args)}
        with whole_folder(output, Path(args.output_dir) / "finished") as stage:
            save_model(model, MMClfProcessor(processor, tokenizer), stage)
            write_records(stage, config, prepared, reports, outcomes, record, args.save_predictions)
        if not args.keep_checkpoints:
            _remove_traces(Path(args.output_dir))
        print(f"\n{report_text(reports)}\n\nThreshold: {config.threshold:.4f}, fitted on the validation rows")
        print(f"Output folder: {output}\nLoad it with:")
        print(f'  import hf_mmclf; from transformers import AutoModel; model = AutoModel.from_pretrained("{output}")')
    trainer.accelerator.wait_for_everyone()
    return output


def _check_streaming(args: MMClfTrainingArguments) -> None:
    """Nobody knows how many rows a stream has."""
    if args.max_steps <= 0:
        raise ValueError("--streaming has no epochs; give --max_steps")
    if "epoch" in (args.eval_strategy, args.save_strategy):
        raise ValueError("--streaming has no epochs; give --eval_strategy steps and --save_strategy steps")
    if args.cache_features:
        raise ValueError("--cache_features keeps something of each row on the disk, which --streaming avoids; choose")


def _be_silent(*_: Any) -> None:
    pass


def _claim_output(model_args: ModelArguments, args: MMClfTrainingArguments) -> tuple[Path, str | None]:
    """The output folder, and the checkpoint to go on from. Moves Trainer's own files to a sub-folder of it."""
    resuming = args.resume_from_checkpoint not in (None, "false", "False", False)
    output = Path(args.output_dir)
    if args.output_dir == "trainer_output":  # transformers' default: nobody chose a folder
        if resuming:
            raise ValueError("--resume_from_checkpoint needs the --output_dir of the run to go on with")
        chosen = [None]
        if args.process_index == 0:
            output, number = Path("outputs") / model_args.preset, 2
            while output.exists():
                output, number = Path("outputs") / f"{model_args.preset}-{number}", number + 1
            chosen = [str(output)]
        output = Path(broadcast_object_list(chosen)[0] if args.world_size > 1 else chosen[0])
    elif not resuming and _is_used(output):
        raise FileExistsError(
            f"{output} is not empty; give another --output_dir, or --resume_from_checkpoint true to go on there"
        )
    args.output_dir = str(output / CHECKPOINTS)
    if not resuming:
        return output, None
    checkpoint = args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"no checkpoint to go on from: {checkpoint or args.output_dir}")
    return output, checkpoint


def _is_used(output: Path) -> bool:
    """Whether a folder holds a model, a checkpoint or anything else but the traces of a start that failed."""
    if not output.exists():
        return False
    return any(entry.name != CHECKPOINTS for entry in output.iterdir()) or any(
        (output / CHECKPOINTS).glob("checkpoint-*")
    )


def _remove_traces(checkpoints: Path) -> None:
    """Removes what a run leaves in its folder of checkpoints, but not what others put there (logs, say)."""
    for pattern in ("checkpoint-*", "tokenizer*", "finished"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def _tokenizer(
    args: ModelArguments, config: MMClfConfig, rows: Dataset, folder: Path, resume: str | None
) -> tuple[PreTrainedTokenizerBase, str]:
    if args.tokenizer == "train" and not args.from_scratch:
        raise ValueError(
            "--tokenizer train gives every word piece a new number, which pretrained text weights do not know; add "
            "--from_scratch, or leave --tokenizer out for the backbone's own"
        )
    source = args.tokenizer or ("train" if args.from_scratch else args.text_backbone or config.text_backbone)
    saved, note = folder / "tokenizer", folder / "tokenizer.txt"
    if source == "train" and note.exists():  # by the main process, or by the run that is resumed
        return load_tokenizer(str(saved))[0], note.read_text(encoding="utf-8")
    tokenizer, description = load_tokenizer(source, filter(None, rows["text"][:]), args.vocab_size)
    if source == "train":
        tokenizer.save_pretrained(saved)
        note.write_text(description, encoding="utf-8")
    return tokenizer, description


def _settle_missing(config: MMClfConfig, splits: Mapping[str, Dataset], say: Any) -> dict[str, dict[str, int]]:
    """Says how many rows lack a picture or caption, and lets the model learn stand-ins if training rows do."""
    missing = {}
    for name, split in splits.items() if config.has_image and config.has_text else ():
        cells = {"picture": picture_paths(split), "caption": split["text"][:]}
        counts = missing[name] = {kind: sum(cell is None for cell in column) for kind, column in cells.items()}
        if any(counts.values()):
            say(f"  {name}: {counts['picture']:,} rows without a picture, {counts['caption']:,} without a caption")
            if name == "train" and not config.learned_missing:
                config.learned_missing = True
                say("  learned vectors stand in for them (learned_missing)")
    return missing


def _augmentations(args: AugmentationArguments, processor: MMClfImageProcessor | None) -> tuple[Any, Any]:
    image = processor and ImageAugmentation.from_processor(
        processor,
        crop_scale=args.crop_scale,
        flip=args.flip,
        vertical_flip=args.vertical_flip,
        rotation=args.rotation,
        color_jitter=args.color_jitter,
    )
    return image, TextAugmentation(args.swap_words) if args.swap_words else None


def _fit_thresholds(config: MMClfConfig, scores: Any, references: Any, per_label: bool) -> None:
    config.threshold = float(best_threshold(scores, references))
    config.label_thresholds = None
    if per_label:
        fitted = label_thresholds(scores, references)
        config.label_thresholds = {name: float(t) for name, t in zip(config.id2label.values(), fitted, strict=True)}
