"""The tables of the card: what `config.json`, `metrics.json` and `training.json` hold, as rows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.report import SHOWN_LABELS, shown_labels
from ..model.configuration_mmclf import MMClfConfig

# Names of the figures of metrics.json, in the order of the card.
FIGURE_NAMES = {
    "f1": "F1, micro",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "f1_samples": "F1, samples",
    "precision": "precision, micro",
    "precision_macro": "precision, macro",
    "recall": "recall, micro",
    "recall_macro": "recall, macro",
    "map": "mean average precision",
    "ece": "expected calibration error",
    "no_label_rate": "share of rows without a predicted label",
}
AT = {"at_0.5": "at 0.5", "fitted": "at the fitted threshold"}  # keys of metrics.json
WITHOUT_THRESHOLD = ("map", "ece")  # figures that do not depend on a threshold

# Columns of the table of labels, and their keys in metrics.json.
LABEL_COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "F1 at 0.5": "f1_at_0.5",
    "average precision": "average_precision",
    "support": "support",
    "threshold": "threshold",
}

# Options that the card shows even at their defaults, by the modalities that the model has: (image, text).
ALWAYS_SHOWN = {(True, True): ("fusion", "image_tokens", "width"), (False, True): ("text_pooling",)}
SHOWN_WITH_LABELS = ("label_ids", "label_thresholds")


def escape(text: object) -> str:
    """Write any text, such as the name of a label, as one line of Markdown that shows it unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#!])", r"\\\1", " ".join(str(text).split()))


def in_words(value: Any) -> str:
    """Write a value of a JSON file as one line of Markdown."""
    if isinstance(value, Mapping):
        return "; ".join(f"{escape(name)}: {in_words(entry)}" for name, entry in value.items() if entry is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else escape(value) or "empty"


def configuration_rows(config: MMClfConfig) -> list[dict[str, str]]:
    """Return the options of the configuration that differ from their defaults, and those that every model needs."""
    always = ALWAYS_SHOWN.get((config.has_image, config.has_text), ())
    values = {}
    for name in MMClfConfig.__annotations__:
        value = getattr(config, name)
        if (name in always or value != getattr(MMClfConfig, name)) and name not in SHOWN_WITH_LABELS:
            values[name] = value
    if config.has_text:
        text = config.text_config
        size = f"{text.num_hidden_layers} layers of {text.hidden_size} units"
        values["text_config"] = f"{text.model_type}, {size}, {text.vocab_size:,} tokens"
    return _named_rows("option", values)


def recipe_rows(training: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what `training.json` records of a run; entries that an older version did not write are left out."""
    missing = training.get("missing", {}).get("train", {})
    seconds = [entry["train_runtime"] for entry in training.get("history", ()) if "train_runtime" in entry]
    values = {
        "preset": training.get("preset"),
        "started from the model": training.get("started_from"),
        "data": training.get("data"),
        "splits": training.get("splits"),
        "rows": training.get("rows") or None,
        "training rows without an image": missing.get("image") or missing.get("picture") or None,
        "training rows without a text": missing.get("text") or missing.get("caption") or None,
        "images that could not be read": len(training.get("bad_images", ())) or None,
        "tokenizer": training.get("tokenizer"),
        "parameters": training.get("parameters"),
        **{name.replace("_", " "): value for name, value in training.get("recipe", {}).items()},
        "epochs trained": training.get("epochs"),
        "best checkpoint": training.get("best_checkpoint"),
        "temperature": training.get("temperature"),
        "processes": training.get("processes"),
        "machine": training.get("speed", {}).get("machine"),
        # a resumed run knows the minutes of its last part only
        "minutes": round(seconds[-1] / 60, 1) if seconds and not training.get("resumed") else None,
        "versions": training.get("versions"),
    }
    return _named_rows("setting", values)


def _named_rows(title: str, values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{title: escape(name), "value": in_words(value)} for name, value in values.items() if value is not None]


def average_rows(reports: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the averages of all splits side by side, with intervals where they were recorded."""
    return [
        {
            "": title,
            **{
                f"{split}, {at_name}": _with_interval(report, at, figure)
                for split, report in reports.items()
                for at, at_name in AT.items()
            },
        }
        for figure, title in FIGURE_NAMES.items()
        if all(figure in report[at] for report in reports.values() for at in AT)  # older runs recorded fewer
    ]


def _with_interval(report: Mapping[str, Any], at: str, figure: str) -> float | str:
    interval = report.get("intervals", {}).get(figure) if at == "fitted" else None
    value = report[at][figure]
    return value if interval is None else "{:.3f} ({:.3f}–{:.3f})".format(value, *interval)


def label_rows(per_label: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of the labels that have the most rows, as on the screen."""
    return [
        {"label": escape(row["label"])} | {title: row.get(key) for title, key in LABEL_COLUMNS.items()}
        for row in shown_labels(per_label)
    ]


def threshold_rows(config: MMClfConfig) -> list[dict[str, Any]]:
    """Return the first labels and their thresholds, for a model that came without figures."""
    pairs = list(zip(config.label_names, config.thresholds, strict=True))[:SHOWN_LABELS]
    return [{"label": escape(name), "threshold": threshold} for name, threshold in pairs]
