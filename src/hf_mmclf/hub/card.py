"""The card: README.md of a finished folder with metadata for the Hub, rendered from what the folder records."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.report import ablation_rows, format_table, group_rows
from ..model.configuration_mmclf import MMClfConfig
from ..presets import PRESETS
from .card_tables import (
    AT,
    FIGURE_NAMES,
    WITHOUT_THRESHOLD,
    average_rows,
    escape,
    label_rows,
    threshold_rows,
)
from .plots import PLOTS

EMBEDDED = "the embedded data set"
# What the card calls the model until it is pushed and has a name on the Hub.
PLACEHOLDER = "your-name/your-model"
TEMPLATE = Path(__file__).with_name("card_template.md")

WEAK_F1, FEW_ROWS, NAMED_LABELS = 0.5, 10, 20


def write_card(folder: str | Path) -> Path:
    """Writes the card of [`render_card`] to README.md in the folder, over what is there; returns its path."""
    path = Path(folder) / "README.md"
    render_card(folder).save(path)
    return path


def render_card(folder: str | Path) -> ModelCard:
    r"""
    The card of a finished folder.

    Args:
        folder (`str` or `Path`):
            Has `config.json`. Of `metrics.json`, `training.json` and the files of `PLOTS`, as training writes them,
            the card has what is there.

    Returns:
        `ModelCard`: With the figures of every split as `eval_results`. `PLACEHOLDER` stands where the model's name on
        the Hub belongs.

    Raises:
        `FileNotFoundError`: no configuration there.
    """
    folder = Path(folder)
    config = MMClfConfig.from_json_file(folder / "config.json")
    metrics, training = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        for name in ("metrics.json", "training.json")
    )
    reports = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    split, reported = list(reports.items())[-1] if reports else (None, None)
    labels = label_rows(reported["per_label"]) if reports else threshold_rows(config)
    card = ModelCard.from_template(
        _metadata(config, reports, training),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        config=config,
        training=training,
        given=_given(config),
        name=PLACEHOLDER,
        split=split,
        reported=reported,
        title=_title(config, training),
        data=escape(" + ".join(training.get("data", []))),
        parts=_parts(config, training),
        averages=format_table(average_rows(reports), markdown=True) if reports else None,
        labels=format_table(labels, markdown=True),
        groups=format_table(group_rows(reported or {}), markdown=True),
        ablations=format_table(ablation_rows(reported or {}), markdown=True),
        recipe=format_table(_recipe_rows(config, training), markdown=True) if training else None,
        limits=_limits(config, reports, training),
        plots={file: title for file, title in PLOTS.items() if (folder / file).is_file()},
        poster=_from_poster(training),
        threshold_aim=_threshold_aim(training),
        **_example(config),
    )
    card.text = f"{card.text.rstrip()}\n"
    return card


def _metadata(config: MMClfConfig, reports: Mapping[str, Any], training: Mapping[str, Any]) -> ModelCardData:
    tags = ["image-text-classification", "multi-label-classification", "hf_mmclf"]
    task = "image-classification" if config.has_image else "text-classification"  # what the Hub knows
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[*tags, *(["timm"] if config.has_image else []), *([training["preset"]] if training else [])],
        license=training.get("license", "unknown"),
        language="en" if config.has_text and _is_demo(training) else None,
        datasets=training.get("datasets") or None,
        base_model=training.get("base_models") or None,
        metrics=["f1", "precision", "recall"] if reports else None,
        model_name=_title(config, training) if reports else None,
        eval_results=list(_eval_results(task, reports, training)) or None,
    )


def _eval_results(task: str, reports: Mapping[str, Any], training: Mapping[str, Any]) -> Iterable[EvalResult]:
    name = " + ".join(training.get("data", ["unnamed rows"]))
    # the Hub takes a name such as user/data or data; others are made into one
    kind = next(iter(training.get("datasets", [])), None) or re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-")
    for split, report in reports.items():
        for at, at_name in AT.items():
            for figure, value in report[at].items():
                if figure in WITHOUT_THRESHOLD and at != "fitted":
                    continue
                yield EvalResult(
                    task_type=task,
                    task_name="Multi-label classification",
                    dataset_type=kind or "local",
                    dataset_name=name,
                    dataset_split=split,
                    metric_type=figure,
                    metric_name=FIGURE_NAMES.get(figure, figure)
                    + ("" if figure in WITHOUT_THRESHOLD else f", {at_name}"),
                    metric_value=round(value, 4),
                )


def _title(config: MMClfConfig, training: Mapping[str, Any]) -> str:
    return training.get("preset", config.model_type)


def _given(config: MMClfConfig) -> str:
    """What a row is."""
    if config.has_image and config.has_text:
        return "a picture with its caption"
    return "a picture" if config.has_image else "a text"


def _example(config: MMClfConfig) -> dict[str, str]:
    """A row in Python, as the three ways of use take it."""
    row = {"image": "picture.jpg"} if config.has_image else {}
    row |= {"text": "a dog on a bench"} if config.has_text else {}
    keywords = ", ".join(f'{name}="{value}"' for name, value in row.items())
    record = ", ".join(f'"{name}": "{value}"' for name, value in row.items())
    return {"record": f"{{{record}}}", "keywords": keywords, "inputs": keywords.replace("image=", "images=")}


def _parts(config: MMClfConfig, training: Mapping[str, Any]) -> list[str]:
    """The model's parts in words."""
    parts: list[list[str | None]] = []
    if config.has_image:
        options = ", ".join(f"{name}={value!r}" for name, value in (config.image_backbone_args or {}).items())
        parts.append(
            [f"**Image backbone**: timm's `{config.image_backbone}`{f' with `{options}`' if options else ''}."]
        )
        if training:
            side = training["recipe"]["image_size"]
            parts[-1].append(f"{training['parameters']['image_model']:,} parameters.")
            parts[-1].append(f"Pictures have {side} x {side} pixels: the long edge is brought to it, the rest padded.")
        parts[-1] += [_start(config.image_weights), _frozen(config.unfrozen_image_stages, "stage")]
    if config.has_text:
        kind, layers, width = (
            getattr(config.text_config, name) for name in ("model_type", "num_hidden_layers", "hidden_size")
        )
        parts.append([f"**Text backbone**: a `{kind}` encoder, {layers} layers of {width} units."])
        if training:
            parts[-1].append(f"{training['parameters']['text_model']:,} parameters.")
            parts[-1].append(f"Captions have up to {training['recipe']['max_tokens']} tokens, the rest is cut.")
            parts[-1].append(f"Tokenizer: {escape(training['tokenizer'])}.")
        parts[-1] += [_start(config.text_weights), _frozen(config.unfrozen_text_layers, "layer")]
    if config.has_image and config.has_text:
        image_tokens = {
            "pooled": "one pooled vector",
            "spatial": "each cell of the last feature map",
            "stages": "each cell of the last feature map with what all finer maps have there",
        }
        attention = {
            "self": "single-head attention of each modality to itself",
            "cross_text": "single-head attention in which the caption's tokens ask and the picture's answer",
            "cross_image": "single-head attention in which the picture's tokens ask and the caption's answer",
            "concat": "no attention",
            "label_queries": "one learned query for each label attends to the tokens of both and to what the "
            f"caption's find in the picture, through {config.fusion_layers} decoder "
            f"layer{'s' if config.fusion_layers > 1 else ''} of width {config.width} with {config.fusion_heads} heads",
        }
        norm = "The tokens are scaled by a learned vector and layer-normalised." if config.fusion_norm else None
        after = ", with BatchNorm and ReLU," if config.projection_norm else ""
        parts.append(
            [
                f"**Fusion** `{config.fusion}`: {attention[config.fusion]}.",
                f"The picture's tokens are {image_tokens[config.image_tokens]}.",
                norm,
                f"Each modality's mean is projected to {config.width} numbers{after} and both are joined."
                if config.fusion != "label_queries"
                else None,
                f"In training a row lost its picture or its caption with probability {config.modality_dropout:g}."
                if config.modality_dropout
                else None,
            ]
        )
    elif config.has_text:
        pooling = {"pooler": "the encoder's pooler", "mean": "the mean over its tokens"}[config.text_pooling]
        parts.append([f"**Pooling**: {pooling}."])
    dropout = f"dropout {config.dropout:g} and " if config.dropout else ""
    parts.append(
        [
            f"**Classifier**: {dropout}one linear layer with {config.num_labels} outputs.",
            "A label's score is the sigmoid of its output; it is given where that is at least the label's threshold.",
        ]
    )
    return [" ".join(filter(None, sentences)) for sentences in parts]


def _start(weights: str | None) -> str | None:
    if weights is None:
        return None
    return "Started from random weights." if weights == "scratch" else f"Started from `{weights}`."


def _frozen(unfrozen: int | None, unit: str) -> str:
    if unfrozen is None:
        return "All of it was trained."
    if unfrozen == 0:
        return "It stayed frozen."
    return f"Its last {f'{unfrozen} {unit}s were' if unfrozen > 1 else f'{unit} was'} trained, the rest stayed frozen."


def _recipe_rows(config: MMClfConfig, training: Mapping[str, Any]) -> list[dict[str, str]]:
    recipe, best = training["recipe"], training["best_checkpoint"]
    rate, backbone_rate = recipe["learning_rate"], recipe["backbone_learning_rate"]
    warmup = recipe["warmup_steps"]
    length = f"{training['epochs']:.4g}"
    if recipe["max_steps"] is not None:
        length += f" (at most {recipe['max_steps']:,} steps)"
    elif training["epochs"] < recipe["epochs"]:
        length += f" of {recipe['epochs']:g}, stopped early"
    took = [f"{entry['train_runtime'] / 60:,.1f} minutes" for entry in training["history"] if "train_runtime" in entry]
    rows = {
        "preset": f"`{training['preset']}`",
        "training rows": f"{training['rows']['train']:,}" if "train" in training["rows"] else "streamed",
        "splits": escape(training["splits"]),
        "loss": _loss(recipe),
        "epochs": length,
        "checkpoint": f"best validation {best['by']}, {best['score']:.4f}" if best else "the last",
        "batch size": f"{recipe['batch_size']:,}",
        "optimizer": f"`{recipe['optimizer']}`, gradient norm at most {recipe['max_gradient_norm']:g}",
        "learning rate": f"{rate:g}" + (f", of the backbones {backbone_rate:g}" if backbone_rate is not None else ""),
        "weight decay": f"{recipe['weight_decay']:g}, none on one-dimensional parameters",
        "schedule": f"{recipe['schedule']}, warm-up over "
        + (f"{warmup:.0%} of the steps" if warmup < 1 else f"{warmup:,.0f} steps"),
        "augmentation": _augmentation(config, recipe["augmentation"]),
        "precision": recipe["precision"],
        "seed": str(recipe["seed"]),
        "machine": ", ".join([training["speed"]["machine"], *([] if training["resumed"] else took)]),
        "software": ", ".join(f"{escape(name)} {number}" for name, number in training["versions"].items()),
    }
    return [{"setting": name, "value": value} for name, value in rows.items()]


def _loss(recipe: Mapping[str, Any]) -> str:
    power, cap = recipe["positive_weights"]
    words = [{"bce": "binary cross-entropy, mean over labels"}.get(recipe["loss"], f"`{recipe['loss']}`")]
    words += (
        [f"positives weighed by (negatives / positives) to the power of {power:g}, at most {cap:g}"] if power else []
    )
    words += [f"label smoothing {recipe['label_smoothing']:g}"] if recipe["label_smoothing"] else []
    return ", ".join(words)


def _threshold_aim(training: Mapping[str, Any]) -> str:
    """What the global threshold is best at, on the validation rows."""
    recipe = training.get("recipe", {})
    objective, beta = recipe.get("threshold_objective", "micro"), recipe.get("threshold_beta", 1.0)
    if objective == "precision":
        return f"has the largest recall with a precision of at least {recipe['threshold_precision']:g}"
    return f"maximises {objective}-F{beta:g}"


def _augmentation(config: MMClfConfig, values: Mapping[str, float]) -> str:
    image = {
        "crop_scale": "crops of at least {:.0%} of the area",
        "flip": "mirrored with probability {:g}",
        "vertical_flip": "upside down with probability {:g}",
        "rotation": "turned by up to {:g} degrees",
        "color_jitter": "colours changed by up to {:.0%}",
    }
    text = {
        "swap_words": "words swapped with probability {:g}",
        "drop_words": "words left out with probability {:g}",
    }
    words = {**(image if config.has_image else {}), **(text if config.has_text else {})}
    return "; ".join(form.format(values[name]) for name, form in words.items() if values.get(name)) or "none"


def _limits(config: MMClfConfig, reports: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    """What the model is not good for, or not known to be."""
    limits = []
    if _is_demo(training):
        limits.append(
            "It was trained on pictures and notes made by code to show how this package works. It is no use on others."
        )
    elif config.has_text:
        limits.append(
            "It reads captions in the language and the manner of its training captions; others are untested."
        )
    limits += _limits_of_figures(reports) if reports else ["No figures came with it: measure it on rows of your own."]
    if config.has_image and config.has_text:
        ablated = any("ablations" in report for report in reports.values())
        limits.append(_missing(config, training, ablated))
    if training.get("bad_images"):
        limits.append(f"{len(training['bad_images']):,} pictures could not be read and were not used.")
    if training.get("base_models"):
        models = ", ".join(f"`{name}`" for name in training["base_models"])
        limits.append(f"It inherits the biases of the data that {models} were trained on.")
    return limits


def _limits_of_figures(reports: Mapping[str, Any]) -> list[str]:
    """What the figures say about what they do not promise."""
    limits = []
    split, report = list(reports.items())[-1]
    rows, figures, labels = report["rows"], report["fitted"], report["per_label"]
    validation = reports.get("validation")
    if split == "test" and validation is None:
        limits.append("The threshold was fitted on other rows than the test rows, of which these figures are.")
    elif split == "test":
        limits.append(
            f"The threshold was fitted, and the checkpoint chosen, on the {validation['rows']:,} validation rows "
            f"(micro-F1 {validation['fitted']['f1']:.3f} there, {figures['f1']:.3f} on the test rows). Data with "
            "other label frequencies need another threshold."
        )
    else:
        limits.append(
            "All figures are of the validation rows, on which the threshold was fitted and the checkpoint chosen. "
            "Expect less on new rows."
        )
    limits += [f"On the {split} rows: {escape(warning)}" for warning in report.get("warnings", ())]
    absent = [row["label"] for row in labels if row["support"] == 0]
    rare = [row["label"] for row in labels if 0 < row["support"] < FEW_ROWS]
    weak = [row["label"] for row in labels if row["support"] and row["f1"] < WEAK_F1]
    if absent:
        limits.append(f"No {split} row has {_listed(absent)}: nothing is known of the quality there.")
    if rare:
        limits.append(
            f"Fewer than {FEW_ROWS} of the {rows:,} {split} rows have {_listed(rare)}: the figures there say little."
        )
    if weak:
        limits.append(f"F1 is below {WEAK_F1} for {_listed(weak)}.")
    rarest, commonest = (pick(labels, key=lambda row: row["support"]) for pick in (min, max))
    limits.append(
        f"Labels are not equally frequent: {escape(commonest['label'])} is on {commonest['support'] / rows:.1%} of "
        f"the {split} rows, {escape(rarest['label'])} on {rarest['support'] / rows:.1%}. Micro averages, for which "
        f"the threshold is fitted, follow the frequent ones: micro-F1 is {figures['f1']:.3f}, macro-F1 "
        f"{figures['f1_macro']:.3f}. What the training rows rarely have is rarely predicted, be it there or not."
    )
    limits.append("One run with one seed: another seed would move all figures a little, those of rare labels more.")
    if "intervals" in report:
        limits[-1] += " The intervals do not cover that, only other rows."
    return limits


def _missing(config: MMClfConfig, training: Mapping[str, Any], ablated: bool) -> str:
    """How much it knows of rows without a picture or caption; `ablated`: the card has figures of such rows."""
    if not training:
        return "It takes rows without a picture or without a caption; whether it has learned to is not recorded."
    counts, total = training["missing"]["train"], training["rows"].get("train")
    if not any(counts.values()):
        vector = "learned vector, which no training row has taught," if config.learned_missing else "zero vector"
        known = "; what it gives is in the table above" if ablated else ", so such rows are untested"
        return (
            f"It takes rows without a picture or without a caption, a {vector} in its place; but all "
            f"{'training rows' if total else 'rows at the head of the stream'} had both{known}."
        )
    known = "What that gives is in the table above." if ablated else "Figures of such rows alone were not measured."
    return (
        f"{counts['picture']:,} of the {f'{total:,} training rows' if total else 'first rows'} had no picture, "
        f"{counts['caption']:,} no caption; a {'learned' if config.learned_missing else 'zero'} vector stands in. "
        + known
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_LABELS} more" if len(names) > NAMED_LABELS else ""
    return ", ".join(map(escape, names[:NAMED_LABELS])) + more


def _is_demo(training: Mapping[str, Any]) -> bool:
    return training.get("data") == [EMBEDDED]


def _from_poster(training: Mapping[str, Any]) -> bool:
    name = training.get("preset")
    return name in PRESETS and PRESETS[name].poster is not None
