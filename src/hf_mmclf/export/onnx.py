"""Export to one ONNX file with labels, thresholds and preprocessing, compared with the original model."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from torchvision.transforms.v2.functional import to_pil_image
from transformers import PreTrainedTokenizerBase

from ..data.arguments import DataArguments
from ..data.demo import DEMO_LABELS
from ..data.images import open_image
from ..evaluation.report import format_table, scores_of
from ..inference.predictor import Predictor
from ..inference.quiet import without_message
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.processing_mmclf import is_missing_image

if TYPE_CHECKING:
    from .onnx_predict import OnnxClassifier

TOLERANCE = 1e-3  # of logits; scores differ by at most a quarter of it
SAMPLE = 32  # table rows to compare; a few more are made from them
MODEL, MODEL_INT8, RUNNER = "model.onnx", "model_int8.onnx", "predict.py"
WRITTEN = (MODEL, f"{MODEL}.data", MODEL_INT8, RUNNER)

Batch = dict[str, list]  # the processor's arguments `images` and `text`, or the one that the model has


def export_onnx(
    predictor: Predictor | str | Path,
    output: str | Path | None = None,
    quantize: bool = False,
    rows: Dataset | None = None,
    folder: Path | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    r"""
    Write `model.onnx`, and `predict.py` that runs it with onnxruntime, numpy, Pillow and tokenizers.

    The inputs are those of the model's `forward`, without the masks if the model has one backbone only. The number of
    rows and of tokens is free. The output is `logits`. The file's metadata holds labels, thresholds, preprocessing and
    tokenizer as JSON under `hf_mmclf`. The weights of a model of more than 2 GB are next to it in `model.onnx.data`.

    The logits are compared with those of the original model, on single rows and on a batch, with texts of several
    lengths and with missing images and texts. The comparison is printed.

    Args:
        predictor ([`Predictor`], `str` or `Path`):
            The model to export, or its folder. It is moved to the CPU, in single precision.
        output (`str` or `Path`, *optional*, defaults to `onnx` in the model's folder):
            Folder to write to.
        quantize (`bool`, *optional*, defaults to `False`):
            Also write `model_int8.onnx`. Matrix products and embeddings use onnxruntime's dynamic quantization, where
            each batch has its own scale of activations. Weights of convolutions are stored as int8 with one scale for
            each channel, and computed as floats, which is faster than onnxruntime's integer convolution.
        rows (`Dataset`, *optional*):
            Rows to compare on, with the columns of [`PreparedData`]. With `quantize` and with labels, they also give
            the F1 of both files. Defaults to rows of the embedded data set: to its test split if the model has its
            labels.
        folder (`Path`, *optional*, defaults to the current one):
            The folder to which image names in `rows` are relative.
        tolerance (`float`, *optional*, defaults to 1e-3):
            Largest difference between a logit of `model.onnx` and of the original model.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace files of the same names in `output`, after the comparison has passed.

    Returns:
        `dict[str, dict]`: For each `.onnx` file `megabytes` (of 10^6 bytes), `largest_logit_difference`,
        `labels_compared` and `labels_changed` (predictions of `predict.py` from images and texts); if F1 is computed,
        also `f1` (micro, of all rows), and for int8 `f1_lost`.

    Raises:
        `ImportError`: If onnx, onnxscript or onnxruntime is not installed.
        `NotADirectoryError`: If `output` is a file.
        `FileExistsError`: If `output` has files of the same names, and `overwrite` is not set.
        `ValueError`: If there are no rows, the preprocessing cannot be exported, a logit differs by more than
            `tolerance`, or `predict.py` tokenizes texts differently. Nothing is written then.
    """
    _check_installed()
    from .onnx_predict import OnnxClassifier

    if not isinstance(predictor, Predictor):
        predictor = Predictor.load(predictor)
    predictor.model.to("cpu", torch.float32).eval()
    output = Path(output or predictor.folder / "onnx")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; expected a folder to write {MODEL} to")
    if (there := [name for name in WRITTEN if (output / name).exists()]) and not overwrite:
        raise FileExistsError(f"{output} has {', '.join(there)} already; give another --output, or --overwrite")
    if rows is None:
        rows, folder = _embedded_rows(predictor, labelled=quantize)
    sample = _sample(predictor, rows, folder)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        stage = Path(scratch)
        _write(predictor, stage / MODEL, sample[-1])
        classifiers = {MODEL: OnnxClassifier(stage / MODEL)}
        figures = {MODEL: _compare(predictor, classifiers[MODEL], sample)}
        if (difference := figures[MODEL]["largest_logit_difference"]) > tolerance:
            raise ValueError(
                f"logits of {MODEL} differ by up to {difference:.2g}, more than the tolerance of {tolerance:g}; "
                "nothing was written"
            )
        if quantize:
            _write_int8(stage / MODEL, stage / MODEL_INT8)
            classifiers[MODEL_INT8] = OnnxClassifier(stage / MODEL_INT8)
            figures[MODEL_INT8] = _compare(predictor, classifiers[MODEL_INT8], sample)
            if "labels" in rows.column_names:
                for name, classifier in classifiers.items():
                    figures[name]["f1"] = _f1(predictor, classifier, rows, folder)
                figures[MODEL_INT8]["f1_lost"] = figures[MODEL]["f1"] - figures[MODEL_INT8]["f1"]
        for name in figures:
            figures[name]["megabytes"] = sum(file.stat().st_size for file in stage.glob(f"{name}*")) / 1e6
        shutil.copyfile(Path(__file__).with_name("onnx_predict.py"), stage / RUNNER)
        _replace_files(stage, output)
    print(format_table(report_rows(figures)))
    return figures


def report_rows(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the result of [`export_onnx`] as rows of a table, one for each file."""
    rows = []
    for file, found in figures.items():
        row = {"file": file, "MB": f"{found['megabytes']:.2f}"}
        row["largest logit difference"] = f"{found['largest_logit_difference']:.1e}"
        row["labels changed"] = f"{found['labels_changed']} of {found['labels_compared']}"
        if "f1" in found:
            row |= {"F1": found["f1"], "F1 lost": found.get("f1_lost")}
        rows.append(row)
    return rows


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {', '.join(missing)}; run `pip install 'hf_mmclf[onnx]'`")


def _replace_files(stage: Path, output: Path) -> None:
    """Move the files to the output folder, in place of those of an earlier export."""
    output.mkdir(exist_ok=True)
    for name in WRITTEN:
        Path(output, name).unlink(missing_ok=True)
    for file in stage.iterdir():
        file.replace(output / file.name)


def _write(predictor: Predictor, path: Path, batch: Batch) -> None:
    """Trace the model with two rows of `batch` and write the graph."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    config, record = predictor.model.config, _record(predictor)
    two_rows = {name: (values * 2)[:2] for name, values in batch.items()}  # torch fixes a dimension of size one
    inputs = dict(predictor.processor(**two_rows))
    if not (config.has_image and config.has_text):
        inputs = {name: value for name, value in inputs.items() if name not in ("image_mask", "text_mask")}
    longest = getattr(predictor.processor.tokenizer, "model_max_length", None)
    count, length = torch.export.Dim("batch"), torch.export.Dim("tokens", max=longest)
    shapes = {name: {0: count, 1: length} if value.ndim == 2 else {0: count} for name, value in inputs.items()}
    # transformers.exporters calls the same function for the same graph, but takes twice as long, makes the image size
    # dynamic as well, and replaces internals of torch for generative models.
    folding = without_message("onnxscript.optimizer._constant_folding", "Skipping constant folding")
    with warnings.catch_warnings(), folding:
        warnings.filterwarnings("ignore", message="# The axis name")  # one warning for each axis that inputs share
        program = torch.onnx.export(
            predictor.model,
            kwargs=inputs,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(program.model)  # stack traces contain paths of this machine
    program.model.metadata_props["hf_mmclf"] = json.dumps(record, ensure_ascii=False)
    program.save(path)


def _record(predictor: Predictor) -> dict[str, Any]:
    """Return everything a prediction needs besides the graph; [`OnnxClassifier`] reads it."""
    config, processor = predictor.model.config, predictor.processor
    return {
        "labels": config.label_names,
        "label_ids": config.label_ids or config.label_names,
        "thresholds": config.thresholds,
        "min_labels": config.min_labels,
        "missing_thresholds": config.missing_thresholds if config.has_image and config.has_text else None,
        "image": image_record(processor.image_processor) if config.has_image else None,
        "tokenizer": tokenizer_record(processor.tokenizer) if config.has_text else None,
    }


def image_record(processor: MMClfImageProcessor) -> dict[str, Any]:
    """
    Return the settings of an image processor.

    Raises:
        `ValueError`: if the processor does not fit images into a square.
    """
    if not (processor.do_resize and processor.do_center_crop):
        raise ValueError("cannot export an image processor whose do_resize or do_center_crop is off")
    return {
        "size": processor.size["longest_edge"],
        "resample": int(processor.resample),
        "scale": processor.rescale_factor if processor.do_rescale else 1.0,
        "mean": list(processor.image_mean) if processor.do_normalize else [0.0] * 3,
        "std": list(processor.image_std) if processor.do_normalize else [1.0] * 3,
    }


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Return `tokenizer.json` with the processor's truncation and padding.

    Raises:
        `ValueError`: if the tokenizer is a slow one, which has no such file.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"cannot export a {type(tokenizer).__name__}, which has no tokenizer.json")
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    copy.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    return json.loads(copy.to_str())


def _write_int8(source: Path, target: Path) -> None:
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    kinds = ["MatMul", "Gemm", "Gather"]
    model = onnx.load(source)
    del model.graph.value_info[:]  # onnxruntime 1.23 fails on the shapes of weights that it transposes
    onnx.save(model, target)
    quant_pre_process(target, target, skip_optimization=True, skip_symbolic_shape=True)  # avoids a warning
    # unsigned weights: signed ones overflow on processors without the newer integer instructions
    quantize_dynamic(target, target, kinds, per_channel=True, weight_type=QuantType.QUInt8)
    model = onnx.load(target)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for name in convolutions & set(weights):  # not the weights that the graph computes (weight standardization)
        values = numpy_helper.to_array(weights[name])
        scale = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True) / 127
        scale = np.where(scale == 0, 1, scale).astype(np.float32)
        integers = np.round(values / scale).astype(np.int8)
        parts = [
            numpy_helper.from_array(integers, f"{name}_int8"),
            numpy_helper.from_array(scale.ravel(), f"{name}_scale"),
        ]
        model.graph.initializer.remove(weights[name])
        model.graph.initializer.extend(parts)
        node = onnx.helper.make_node("DequantizeLinear", [part.name for part in parts], [name], axis=0)
        model.graph.node.insert(0, node)
    onnx.save(model, target)


def _embedded_rows(predictor: Predictor, labelled: bool) -> tuple[Dataset, Path]:
    """Return rows of the embedded data set: labelled test rows if asked for and if the model has their labels."""
    config = predictor.model.config
    labelled = labelled and set(config.label_ids or config.label_names) == set(DEMO_LABELS)
    prepared = predictor.prepare(DataArguments() if labelled else DataArguments(demo_rows=SAMPLE), labelled)
    return prepared.splits["test" if labelled else "train"], prepared.folder


def _batches(predictor: Predictor, rows: Dataset, folder: Path | None, size: int) -> Iterator[Batch]:
    """Read rows in batches: images as PIL images, and texts."""
    config = predictor.model.config
    for part in rows.iter(size):
        batch = {}
        if config.has_image:
            batch["images"] = [
                None if is_missing_image(cell) else to_pil_image(open_image(cell, Path(folder or "."), where))
                for cell, where in zip(part["image"], part["where"], strict=True)
            ]
        if config.has_text:
            batch["text"] = list(part["text"])
        yield batch


def _sample(predictor: Predictor, rows: Dataset, folder: Path | None) -> list[Batch]:
    """Return batches to compare: single rows, some with a missing image or text or a long text, then a large batch."""
    if not len(rows):
        raise ValueError(f"no rows to compare {MODEL} on; give some, or leave rows out for the embedded data set")
    many = next(_batches(predictor, rows.select(range(min(SAMPLE, len(rows)))), folder, SAMPLE))
    first = {name: values[:1] for name, values in many.items()}
    single, missing = [first], []
    if "text" in many:
        texts = [text for text in many["text"] if text is not None] or ["a text"]
        limit = min(predictor.processor.tokenizer.model_max_length, 1000)  # some encoders have no limit
        words = " ".join(texts).split()
        single.append({**first, "text": [" ".join((words * limit)[:limit])]})  # too long with the special tokens
        if "images" in many:
            missing = [{"images": [None], "text": texts[:1]}]
            missing += [{"images": [image], "text": [None]} for image in many["images"] if image is not None][:1]
    many = {name: values + [row[name][0] for row in missing] for name, values in many.items()}
    return [*single, *missing, many]


def _compare(predictor: Predictor, classifier: "OnnxClassifier", sample: list[Batch]) -> dict[str, Any]:
    """Compare the logits of equal inputs, and the labels that are predicted from equal images and texts."""
    config, difference, changed, compared = predictor.model.config, 0.0, 0, 0
    for batch in sample:
        inputs, own = predictor.processor(**batch), classifier.inputs(**batch)
        if any(not np.array_equal(own[name], inputs[name]) for name in own if name != "pixel_values"):
            raise ValueError(f"{RUNNER} and the model tokenize texts differently, such as {batch['text'][:3]}")
        with torch.inference_mode():
            expected = predictor.model(**inputs).logits.numpy()
        found = classifier.session.run(["logits"], {name: inputs[name].numpy() for name in own})[0]
        difference = max(difference, float(np.abs(found - expected).max()))
        masks = inputs.get("image_mask", True), inputs.get("text_mask", True)
        hits = config.decide(scores_of(expected), *masks)
        for hit, labels in zip(hits, classifier.labels(**batch), strict=True):
            names = {config.label_names[i] for i in np.flatnonzero(hit)}
            changed += len(names ^ {name for name, _ in labels})
        compared += hits.size
    return {"largest_logit_difference": difference, "labels_compared": compared, "labels_changed": changed}


def _f1(predictor: Predictor, classifier: "OnnxClassifier", rows: Dataset, folder: Path | None) -> float:
    """Compute the micro-F1 at the model's thresholds."""
    scores = np.concatenate([classifier(**batch) for batch in _batches(predictor, rows, folder, 64)])
    return predictor.report(rows, scores)["fitted"]["f1"]
