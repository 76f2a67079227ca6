"""How good the presets and the ways to fit thresholds are, over several seeds.

    python benchmarks/quality.py WHAT [--seeds 3] [--presets NAME ...] [--output table.md]

WHAT is one of

    captions    text only, on real texts (`../shared/data/captions`, skipped if that does not exist): TF-IDF with
                logistic regression and the text presets with random weights, split 80/10/10 by the seed
    fusion      the embedded data set: each modality alone, every fusion of the poster, and ours; all with the same
                backbones with random weights and for the same number of epochs
    competition real rows with their images (`../shared/data/competition`, skipped if that does not exist) and
                pretrained backbones (`--weights`, the folder of `../shared/tools/pretrained_weights.py`): logistic
                regressions on frozen features, their stack, and the presets, split 80/10/10 by the seed
    thresholds  how much of a threshold's F1 is left on other rows: plain search by label, shrunk, global
    all         each of these

Thresholds are fitted on validation rows. All figures are of test rows: mean, lowest and highest over the seeds.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from modalities import possible_f1
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_mmclf import (
    DataArguments,
    MMClfConfig,
    Predictor,
    best_threshold,
    demo_dataset,
    label_thresholds,
    parse_arguments,
    train,
)
from hf_mmclf.data.prepare import prepare_data
from hf_mmclf.data.tables import read_table
from hf_mmclf.evaluation.report import format_table
from hf_mmclf.model.fusion_mmclf import masked_mean
from hf_mmclf.training.inputs import prepare_inputs

CAPTIONS = Path(__file__).parents[2] / "shared" / "data" / "captions" / "train.csv"
COMPETITION = CAPTIONS.parents[1] / "competition"
TEXT_PRESETS = ("captions", "bert-tiny")
# The fusions of the poster's twelve multimodal systems. They are five, because backbones and freezing are equal here.
POSTER = {
    name: f"{flags} --image_tokens pooled"
    for name, flags in {
        "densitybert, bensity": "--fusion self",
        "modensitybert, warmdbert, warmerdbert, warmerdbert-extended": "--fusion self --fusion_norm",
        "wwdbert": "--fusion self --fusion_norm --projection_norm --dropout 0.5",
        "cdbert-text, censity-text": "--fusion cross_text",
        "cdbert-image, censity-image, rest": "--fusion cross_image",
    }.items()
}
OURS = {"`demo`": "", "`demo`, modality dropout": "--modality_dropout 0.2"}
ALONE = {"image": "demo-image", "text": "demo-text"}

Scored = tuple[np.ndarray, np.ndarray]  # scores and multi-hot labels, (N, L) both


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def micro(scored: Scored, thresholds: Any) -> float:
    return f1_score(scored[1], scored[0] >= thresholds, average="micro", zero_division=0)


def macro(scored: Scored, thresholds: Any) -> float:
    return f1_score(scored[1], scored[0] >= thresholds, average="macro", zero_division=0)


def trained(flags: list[str], data: DataArguments, changes: tuple[Callable[[Dataset], Dataset], ...] = ()) -> dict:
    """Train a model with these flags, then score validation rows, test rows and changed test rows."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        folder = train(*parse_arguments([*flags, "--output_dir", f"{scratch}/model", "--disable_tqdm", "true"]))
        minutes = (time.perf_counter() - began) / 60
        predictor = Predictor.load(folder)
        config = predictor.model.config
        found = prepare_data(data, config.has_image, config.has_text).splits
        megabytes = (folder / "model.safetensors").stat().st_size / 2**20

        def scored(rows: Dataset) -> Scored:
            return predictor.scores(rows, Path(data.image_dir or ".")), np.array(rows["labels"])

        result = {"minutes": minutes, "megabytes": megabytes, "config": config}
        result |= {name: scored(found[name]) for name in ("validation", "test")}
        return result | {"changed": [scored(change(found["test"])) for change in changes]}


def tf_idf(data: DataArguments) -> dict:
    """Train the baseline of the text models: a linear model on words and pairs of words."""
    began = time.perf_counter()
    splits = prepare_data(data, uses_image=False).splits
    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2)
    classifier = OneVsRestClassifier(LogisticRegression(C=10, max_iter=1000))
    classifier.fit(vectors.fit_transform(splits["train"]["text"][:]), np.array(splits["train"]["labels"]))
    result: dict[str, Any] = {"megabytes": None}
    for name in ("validation", "test"):
        scores = classifier.predict_proba(vectors.transform(splits[name]["text"][:]))
        result[name] = scores, np.array(splits[name]["labels"])
    return result | {"minutes": (time.perf_counter() - began) / 60}


def captions(options: argparse.Namespace) -> list[dict]:
    if not CAPTIONS.is_file():
        print(f"captions: skipped, {CAPTIONS.parent.name}/{CAPTIONS.name} does not exist")
        return []
    presets = options.presets or TEXT_PRESETS
    runs: dict[str, list[dict]] = {name: [] for name in ("TF-IDF, logistic regression", *presets)}
    for seed in range(options.seeds):
        data = DataArguments(data=str(CAPTIONS), split_seed=seed)
        runs["TF-IDF, logistic regression"].append(tf_idf(data))
        for preset in presets:
            flags = ["--preset", preset, "--from_scratch", "--data", str(CAPTIONS), "--split_seed", str(seed)]
            runs[preset].append(trained([*flags, "--seed", str(seed)], data))
    lines = []
    for name, results in runs.items():
        cuts = [best_threshold(*run["validation"]) for run in results]
        own = [label_thresholds(*run["validation"]) for run in results]
        line = {
            "model": name,
            "micro-F1": spread([micro(run["test"], cut) for run, cut in zip(results, cuts, strict=True)]),
        }
        line["macro-F1 at 0.5"] = spread([macro(run["test"], 0.5) for run in results])
        line["macro-F1, one threshold"] = spread(
            [macro(run["test"], cut) for run, cut in zip(results, cuts, strict=True)]
        )
        line["macro-F1, by label"] = spread([macro(run["test"], cut) for run, cut in zip(results, own, strict=True)])
        line["gain by label"] = spread(
            [macro(r["test"], cut) - macro(r["test"], 0.5) for r, cut in zip(results, own, strict=True)]
        )
        line["MB"] = results[0]["megabytes"]
        lines.append(line | {"minutes": statistics.mean(run["minutes"] for run in results)})
    return lines


# Models of [`competition`]: flags beside those of the backbones, and whether rows without images are added. `TEXTS` is
# the folder of a model of these rows alone, trained by examples/configs/texts.yaml and kept beside the weights.
TEXTS = "{weights}/texts"
RECIPES = {
    "late-lite": ("--preset late-lite", False),
    "late-lite, texts without images too": ("--preset late-lite", True),
    "late-lite, text backbone trained on texts without images": (f"--preset late-lite --text_backbone {TEXTS}", False),
    "late-lite, fusion of modensitybert": ("--preset late-lite --fusion self --fusion_norm", False),
    "late-lite, fusion of densitybert": ("--preset late-lite --fusion self", False),
    "late-lite, fusion of cdbert-text": ("--preset late-lite --fusion cross_text", False),
    "late-lite, fusion of cdbert-image": ("--preset late-lite --fusion cross_image", False),
    "querybert": ("--preset querybert --num_train_epochs 8", False),
}


def competition(options: argparse.Namespace) -> list[dict]:
    """Compare logistic regressions on frozen features, their stack, and presets on the competition's own rows."""
    if not COMPETITION.is_dir() or options.weights is None:
        print("competition: skipped; it needs ../shared/data/competition and --weights")
        return []
    image, text = options.weights / "tf_efficientnet_lite0", options.weights / "all-MiniLM-L6-v2"
    backbones = f"--image_backbone tf_efficientnet_lite0 --image_weights {image} --text_backbone {text}".split()
    chosen = {name: recipe for name, recipe in RECIPES.items() if options.presets is None or name in options.presets}
    table, images = COMPETITION / "train.csv", COMPETITION / "data"
    common = dict(image_dir=str(images), label_names_file=str(COMPETITION.parent / "labels.json"))
    features = frozen_features([*backbones, "--preset", "late-lite"], DataArguments(data=str(table), **common))
    runs: dict[str, list[dict]] = {}
    if (
        any(TEXTS in flags for flags, _ in chosen.values())
        and not (options.weights / "texts" / "config.json").is_file()
    ):
        train_texts(options.weights / "texts", [*backbones, "--label_names_file", common["label_names_file"]])
    for seed in range(options.seeds):
        splits = prepare_data(DataArguments(data=str(table), split_seed=seed, **common)).splits
        if options.rows:
            splits["train"] = splits["train"].shuffle(seed).take(options.rows)
        for name, scored in logistic_regressions(splits, features).items():
            runs.setdefault(name, []).append(scored)
        for name, (flags, has_more) in chosen.items():
            with tempfile.TemporaryDirectory() as scratch:
                write_splits(splits, Path(scratch), has_more)
                data = DataArguments(data=scratch, **common)
                given = ["--data", scratch, "--image_dir", common["image_dir"], "--label_names_file"]
                given += [common["label_names_file"], "--seed", str(seed), "--no_ablations", *backbones]
                given += [flag.format(weights=options.weights) for flag in flags.split()]
                runs.setdefault(name, []).append(trained(given, data, (without("text"), without("image"))))
                print(format_table(competition_lines({name: runs[name][-1:]}), markdown=True), flush=True)
    return competition_lines(runs)


def frozen_features(flags: list[str], data: DataArguments) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the mean image token and the mean text token of each row of a table, by the name of the row."""
    given = ["--data", data.data, "--image_dir", data.image_dir, "--label_names_file", data.label_names_file]
    inputs = prepare_inputs(*parse_arguments([*flags, *given]))
    rows = concatenate_datasets(list(inputs.prepared.splits.values()))
    loader = DataLoader(inputs.preprocessing.dataset(rows), 64, collate_fn=inputs.preprocessing.collator)
    model, vectors = inputs.model.eval(), []
    with torch.inference_mode():
        for batch in tqdm(loader, desc="frozen features"):
            image = masked_mean(*model.encode_image(batch["pixel_values"]))
            text = masked_mean(*model.encode_text(batch["input_ids"], batch["attention_mask"]))
            vectors += zip(image.numpy(), text.numpy(), strict=True)
    return dict(zip(rows["where"][:], vectors, strict=True))


def logistic_regressions(
    splits: Mapping[str, Dataset], features: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict]:
    """Fit one logistic regression for each label on the images, on the texts, and on out-of-fold logits of both."""
    labels = {name: np.array(rows["labels"]) for name, rows in splits.items()}
    logits: dict[str, dict[str, np.ndarray]] = {}
    for index, (name, strength) in enumerate({"images": 0.001, "texts": 0.01}.items()):  # of C, tried on other seeds
        rows = {
            split: np.array([features[where][index] for where in table["where"]]) for split, table in splits.items()
        }
        one = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
        model = OneVsRestClassifier(one)
        out_of_fold = cross_val_predict(model, rows["train"], labels["train"], cv=5, method="decision_function")
        model.fit(rows["train"], labels["train"])
        logits[name] = {"train": out_of_fold} | {
            split: model.decision_function(rows[split]) for split in ("validation", "test")
        }
    both = {split: np.concatenate([logits[name][split] for name in logits], 1) for split in splits}
    stack = OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000)).fit(both["train"], labels["train"])
    stacked = {split: stack.decision_function(both[split]) for split in ("validation", "test")}
    own = {split: np.zeros_like(scores) for split, scores in stacked.items()}
    for label in range(labels["train"].shape[1]):
        pair = [label, label + labels["train"].shape[1]]
        single = LogisticRegression().fit(both["train"][:, pair], labels["train"][:, label])
        for split in own:
            own[split][:, label] = single.decision_function(both[split][:, pair])
    found = {"logistic regression, images": logits["images"], "logistic regression, texts": logits["texts"]}
    found |= {"stack of both, all logits": stacked, "stack of both, own logits of each label": own}
    return {
        name: {split: (expit(scores[split]), labels[split]) for split in ("validation", "test")}
        for name, scores in found.items()
    }


def train_texts(folder: Path, flags: list[str]) -> None:
    """Train a text backbone on the texts of the competition whose images are not here."""
    config = Path(__file__).parents[1] / "examples" / "configs" / "texts.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(scratch, "texts.csv"), [("", row["Labels"], row["Caption"]) for row in other_texts()])
        given = ["--config", str(config), *flags, "--image_backbone", "none", "--data", f"{scratch}/texts.csv"]
        train(*parse_arguments([*given, "--output_dir", str(folder), "--no_ablations"]))


def other_texts() -> list[dict]:
    """Return the rows of the competition whose images are not here."""
    known = {row["ImageID"] for row in read_table(COMPETITION / "train.csv")}
    return [row for row in read_table(CAPTIONS) if row["ImageID"] not in known]


def write_splits(splits: Mapping[str, Dataset], folder: Path, has_more: bool) -> None:
    """Write splits of the competition as tables, with its other texts as training rows without images if asked."""
    rows = {row["ImageID"]: row for row in read_table(COMPETITION / "train.csv")}
    for name, table in splits.items():
        lines = [(image, rows[image]["Labels"], rows[image]["Caption"]) for image in table["image"]]
        if name == "train" and has_more:
            lines += [("", row["Labels"], row["Caption"]) for row in other_texts()]
        write_table(folder / f"{name}.csv", lines)


def write_table(path: Path, lines: list[tuple[str, str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "labels", "text"])
        writer.writerows(lines)


def competition_lines(runs: Mapping[str, list[dict]]) -> list[dict]:
    """Return the table of [`competition`]: F1 with at least one label for each row, at the threshold of validation."""

    def figures(run: dict, scored: Scored, **present: bool) -> tuple[float, float]:
        if "config" in run:
            predicted = run["config"].decide(scored[0], **present)
        else:
            threshold = best_threshold(*run["validation"], min_labels=1)
            predicted = MMClfConfig(num_labels=scored[0].shape[1], min_labels=1, threshold=threshold).decide(scored[0])
        return tuple(f1_score(scored[1], predicted, average=kind, zero_division=0) for kind in ("micro", "samples"))

    lines = []
    for name, results in runs.items():
        line = {"model": name}
        columns = {"": [figures(run, run["test"]) for run in results]}
        if "changed" in results[0]:
            columns["images only: "] = [figures(run, run["changed"][0], has_text=False) for run in results]
            columns["texts only: "] = [figures(run, run["changed"][1], has_image=False) for run in results]
        for title in ("", "images only: ", "texts only: "):
            pairs = columns.get(title)
            for index, kind in enumerate(("micro-F1", "samples-F1")):
                line[f"{title}{kind}"] = spread([pair[index] for pair in pairs]) if pairs else None
        minutes = [run["minutes"] for run in results if "minutes" in run]
        lines.append(line | {"minutes": statistics.mean(minutes) if minutes else None})
    return lines


def without(modality: str) -> Callable[[Dataset], Dataset]:
    def change(rows: Dataset) -> Dataset:
        return rows.map(lambda row: {modality: None}, load_from_cache_file=False)

    return change


def fusion(options: argparse.Namespace) -> list[dict]:
    models = {preset: f"--preset {preset}" for preset in ALONE.values()}
    models |= {name: f"--preset demo {flags}" for name, flags in {**POSTER, **OURS}.items()}
    runs = {
        name: [fused(name, flags, seed) for seed in range(options.seeds)]
        for name, flags in tqdm(models.items(), desc="models")
    }
    return fusion_lines(runs)


def fused(name: str, flags: str, seed: int) -> dict:
    changes = () if name in ALONE.values() else (without("text"), without("image"))
    return trained([*flags.split(), "--no_ablations", "--seed", str(seed)], DataArguments(), changes)


def fusion_lines(runs: dict[str, list[dict]]) -> list[dict]:
    """Return the table of [`fusion`]. Models with both modalities are also scored on images and on texts alone."""
    test = demo_dataset()["test"]

    def values(name: str, what: Callable[[dict], Scored], **present: bool) -> list[float]:
        return [micro(what(run), run["config"].thresholds_for(**present)) for run in runs[name]]

    alone = {name: statistics.mean(values(preset, lambda run: run["test"])) for name, preset in ALONE.items()}
    best = max(alone.values())
    lines = []
    for name, results in runs.items():
        read = next((modality for modality, preset in ALONE.items() if preset == name), "both")
        reached = values(name, lambda run: run["test"])
        line = {"model": name, "micro-F1": spread(reached), "possible": possible_f1(test, read)}
        gap = (statistics.mean(reached) - best) / (possible_f1(test, "both") - best)
        line["of the gap"] = f"{gap:.0%}" if read == "both" else None
        need_both = [
            f1_score(run["test"][1], run["test"][0] >= run["config"].threshold, average=None)[-3:].mean()
            for run in results
        ]
        line["labels that need both"] = spread(need_both)
        for index, modality in enumerate(ALONE):
            missing = {f"has_{other}": False for other in ALONE if other != modality}
            only = values(name, lambda run, i=index: run["changed"][i], **missing) if read == "both" else None
            line[f"{modality} only"] = spread(only) if only else None
            line[f"against {ALONE[modality]}"] = statistics.mean(only) - alone[modality] if only else None
        line["MB"] = results[0]["megabytes"]
        lines.append(line | {"minutes": statistics.mean(run["minutes"] for run in results)})
    return lines


def thresholds(options: argparse.Namespace) -> list[dict]:
    """Fit thresholds on 500 rows, 200 times: macro-F1 of rare labels (below 5 %) on them and on all other rows."""
    data = DataArguments(data=str(CAPTIONS)) if CAPTIONS.is_file() else DataArguments(demo_rows=10_000)
    runs = tf_idf(data)
    scores, references = (np.concatenate(parts) for parts in zip(runs["validation"], runs["test"], strict=True))
    rare = references.mean(0) < 0.05
    ways: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
        "by label, plain search": lambda s, r: label_thresholds(s, r, shrinkage=0),
        "by label, shrunk": label_thresholds,
        "by label, shrinkage cross-validated": lambda s, r: label_thresholds(s, r, shrinkage=None),
        "one for all labels": best_threshold,
        "0.5": lambda s, r: 0.5,
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    draw = np.random.default_rng(0)
    for _ in range(200):
        order = draw.permutation(len(scores))
        fit, rest = order[:500], order[500:]
        for way, search in ways.items():
            cut = np.broadcast_to(search(scores[fit], references[fit]), len(rare))[rare]
            found[way].append(
                tuple(macro((scores[rows][:, rare], references[rows][:, rare]), cut) for rows in (fit, rest))
            )
    lines = []
    for way, pairs in found.items():
        fitted, other = np.array(pairs).T
        low, high = np.percentile(fitted - other, [2.5, 97.5])
        line = {"thresholds": way, "rows they were fitted on": fitted.mean(), "other rows": other.mean()}
        lines.append(line | {"optimism": f"{(fitted - other).mean():.3f} ({low:.3f}–{high:.3f})"})
    return lines


BENCHMARKS = {"captions": captions, "fusion": fusion, "competition": competition, "thresholds": thresholds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*BENCHMARKS, "all"], help="What to measure.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of runs of each model (default: %(default)s).")
    parser.add_argument("--presets", nargs="+", help="Text presets, or models of competition, to measure.")
    parser.add_argument("--weights", type=Path, help="Folder with pretrained backbones, for competition.")
    parser.add_argument("--rows", type=int, help="Number of training rows of competition (default: all).")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to.")
    options = parser.parse_args()
    texts = []
    for what in BENCHMARKS if options.what == "all" else [options.what]:
        lines = BENCHMARKS[what](options)
        if lines:
            texts.append(f"## {what}\n\n{format_table(lines, markdown=True)}\n")
            print(f"\n{texts[-1]}")
    if options.output:
        options.output.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
