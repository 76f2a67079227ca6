"""The card: the README.md of an output folder, with metadata for the Hub, rendered from the files of the folder."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.report import SHOWN_LABELS, ablation_rows, format_table, group_rows
from ..model.configuration_mmclf import MMClfConfig
from .card_tables import (
    AT,
    FIGURE_NAMES,
    WITHOUT_THRESHOLD,
    average_rows,
    configuration_rows,
    escape,
    label_rows,
    recipe_rows,
    threshold_rows,
)
from .plots import PLOTS

EMBEDDED = "the embedded data set"
# The name of the model in the card until it is pushed and has a name on the Hub.
PLACEHOLDER = "your-name/your-model"
TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(folder: str | Path) -> Path:
    """Write the card of [`render_card`] to README.md in the folder, over an older one, and return its path."""
    path = Path(folder) / "README.md"
    render_card(folder).save(path)
    return path


def render_card(folder: str | Path) -> ModelCard:
    r"""
    Render the card of an output folder.

    Args:
        folder (`str` or `Path`):
            A folder with `config.json`. `metrics.json`, `training.json` and the plots of `PLOTS`, as training writes
            them, are shown if they are there.

    Returns:
        `ModelCard`: The card, with the figures of every split as `eval_results`. `PLACEHOLDER` stands where the
        name of the model on the Hub belongs.

    Raises:
        `FileNotFoundError`: If the folder has no `config.json`.
    """
    folder = Path(folder)
    config = MMClfConfig.from_json_file(folder / "config.json")
    metrics, training = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        for name in ("metrics.json", "training.json")
    )
    reports = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    split, report = list(reports.items())[-1] if reports else (None, {})
    tables = {
        "configuration": configuration_rows(config),
        "recipe": recipe_rows(training),
        "averages": average_rows(reports),
        "labels": label_rows(report["per_label"]) if report else threshold_rows(config),
        "groups": group_rows(report),
        "ablations": ablation_rows(report),
    }
    card = ModelCard.from_template(
        _metadata(config, reports, training),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        config=config,
        name=PLACEHOLDER,
        title=training.get("preset", config.model_type),
        split=split,
        report=report,
        more_labels=max(0, config.num_labels - SHOWN_LABELS),
        data=escape(" + ".join(training.get("data", []))),
        is_demo=training.get("data") == [EMBEDDED],
        base_models=training.get("base_models"),
        parameters=training.get("parameters"),
        megabytes=training.get("megabytes"),
        speed=training.get("speed"),
        warnings=[escape(warning) for warning in report.get("warnings", ())],
        plots={file: title for file, title in PLOTS.items() if (folder / file).is_file()},
        **{name: format_table(rows, markdown=True) for name, rows in tables.items()},
        **_example(config),
    )
    card.text = f"{card.text.rstrip()}\n"
    return card


def _metadata(config: MMClfConfig, reports: Mapping[str, Any], training: Mapping[str, Any]) -> ModelCardData:
    tags = ["image-text-classification", "multi-label-classification", "hf_mmclf"]
    tags += ["timm"] if config.has_image else []
    tags += [training["preset"]] if "preset" in training else []
    # The task of the results must be one that the Hub knows, also for image and text, of which it knows none.
    task = "image-classification" if config.has_image else "text-classification"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=config.one_modality_task,
        tags=tags,
        license=training.get("license", "unknown"),
        language="en" if config.has_text and training.get("data") == [EMBEDDED] else None,
        datasets=training.get("datasets") or None,
        base_model=training.get("base_models") or None,
        metrics=["f1", "precision", "recall"] if reports else None,
        model_name=training.get("preset", config.model_type) if reports else None,
        eval_results=list(_eval_results(task, reports, training)) or None,
    )


def _eval_results(task: str, reports: Mapping[str, Any], training: Mapping[str, Any]) -> Iterable[EvalResult]:
    name = " + ".join(training.get("data", ["unnamed rows"]))
    # the Hub accepts identifiers such as user/data or data only
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


def _example(config: MMClfConfig) -> dict[str, str]:
    """Write one row in Python, as each of the three snippets of the card takes it."""
    row = {"image": "image.jpg"} if config.has_image else {}
    row |= {"text": "a dog on a bench"} if config.has_text else {}
    keywords = ", ".join(f'{name}="{value}"' for name, value in row.items())
    return {"record": json.dumps(row), "keywords": keywords, "inputs": keywords.replace("image=", "images=")}
