"""A finished model as one ONNX file that carries labels and preprocessing, compared with the model it came from."""

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
from torchvision.transforms.v2.functional import to_pil_image

from ..data.collator import is_absent, open_image
from ..data.demo import DEMO_LABELS
from ..data.prepare import DataArguments, presence, references_of
from ..evaluation.metrics import multi_label_metrics
from ..evaluation.report import format_table, scores_of
from ..inference.predictor import Predictor

if TYPE_CHECKING:
    from .onnx_predict import OnnxClassifier

TOLERANCE = 1e-3  # of logits; no score moves by more than a quarter of it
SAMPLE = 32  # rows that are compared, apart from those made of them
MODEL, MODEL_INT8, RUNNER = "model.onnx", "model_int8.onnx", "predict.py"

Batch = dict[str, list]  # "images" and "text", or the one that the model has; None for what a row lacks


def export_onnx(
    finished: Predictor | str | Path,
    output: str | Path | None = None,
    quantize: bool = False,
    rows: Dataset | None = None,
    folder: Path | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    r"""
    Writes `model.onnx`, and `predict.py` that runs it with onnxruntime, numpy and Pillow alone.

    The inputs are those of the model's `forward`, without the masks if it has one backbone only; the number of rows
    and of tokens is free. The output is `logits`. What else a prediction takes (labels, thresholds, preprocessing,
    tokenizer) is in the file's metadata, as JSON under `hf_mmclf`. A model of more than 2 GB has its weights next to
    it, in `model.onnx.data`.

    On a sample with mixed caption lengths, single rows and several, and rows that lack their picture or caption, the
    logits are compared with the model's. The report is printed, too.

    Args:
        finished ([`Predictor`], `str` or `Path`):
            A finished model, or its folder. It is moved to the CPU, in single precision.
        output (`str` or `Path`, *optional*, defaults to `onnx` in the model's folder):
            Folder to write to. Files of an earlier export are replaced once the new ones are whole and compared.
        quantize (`bool`, *optional*, defaults to `False`):
            Write `model_int8.onnx`, too: matrix products and embeddings by onnxruntime's dynamic quantisation, where
            the scale of activations is that of the batch; weights of convolutions stored as int8, one scale a channel,
            and computed with as floats, which is faster than onnxruntime's integer convolution.
        rows (`Dataset`, *optional*):
            Rows to compare with, as of [`PreparedData`]; with labels, they also tell the F1 that int8 loses. By
            default rows of the embedded data set: its test split for a model with its labels.
        folder (`Path`, *optional*):
            What picture names in `rows` are relative to.
        tolerance (`float`, *optional*, defaults to 1e-3):
            Largest difference of a logit between `model.onnx` and the model.

    Returns:
        `dict`: For each `.onnx` file `megabytes` (of 10^6 bytes), `largest_logit_difference`, and `labels_compared`
        and `labels_changed` (by the thresholds, from the sample's pictures and captions to labels with `predict.py`);
        with labels in `rows` and `quantize` also `f1` (micro, of all rows), and for int8 `f1_lost`.

    Raises:
        `ImportError`: onnx, onnxscript or onnxruntime is missing.
        `ValueError`: preprocessing that cannot be recorded, logits beyond `tolerance`, or captions that `predict.py`
            splits otherwise; nothing is written.
    """
    _check_installed()
    from .onnx_predict import OnnxClassifier

    if not isinstance(finished, Predictor):
        finished = Predictor.load(finished)
    finished.model.to("cpu", torch.float32).eval()
    output = Path(output or finished.folder / "onnx")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; expected a folder to write {MODEL} to")
    if rows is None:
        rows, folder = _embedded_rows(finished, labelled=quantize)
    sample = _sample(finished, rows, folder)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        files = [Path(scratch, MODEL)]
        _write(finished, files[0], sample[-1])
        if quantize:
            files.append(Path(scratch, MODEL_INT8))
            _write_int8(*files)
        figures = {}
        for file in files:
            classifier = OnnxClassifier(file)
            sizes = [part.stat().st_size for part in Path(scratch).glob(f"{file.name}*")]
            figures[file.name] = {"megabytes": sum(sizes) / 1e6, **_compare(finished, classifier, sample)}
            if file.name == MODEL and figures[MODEL]["largest_logit_difference"] > tolerance:
                difference = figures[MODEL]["largest_logit_difference"]
                raise ValueError(
                    f"logits of {MODEL} are off by up to {difference:.2g}, more than the tolerance of {tolerance:g}; "
                    "nothing was written"
                )
            if quantize and "labels" in rows.column_names:
                figures[file.name]["f1"] = _f1(finished, classifier, rows, folder)
        if "f1" in figures.get(MODEL_INT8, ()):
            figures[MODEL_INT8]["f1_lost"] = figures[MODEL]["f1"] - figures[MODEL_INT8]["f1"]
        shutil.copyfile(Path(__file__).with_name("onnx_predict.py"), Path(scratch, RUNNER))
        output.mkdir(exist_ok=True)
        for name in (MODEL, f"{MODEL}.data", MODEL_INT8):
            Path(output, name).unlink(missing_ok=True)
        for file in Path(scratch).iterdir():
            file.replace(output / file.name)
    print(report_table(figures))
    return figures


def report_table(figures: dict[str, dict[str, Any]]) -> str:
    """Plain text of what [`export_onnx`] returns."""
    rows = []
    for file, found in figures.items():
        row = {"file": file, "MB": f"{found['megabytes']:.2f}"}
        row["largest logit difference"] = f"{found['largest_logit_difference']:.1e}"
        row["labels changed"] = f"{found['labels_changed']} of {found['labels_compared']}"
        if "f1" in figures[MODEL]:
            row |= {"F1": found["f1"], "F1 lost": found.get("f1_lost")}
        rows.append(row)
    return format_table(rows)


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {', '.join(missing)}; run `pip install 'hf_mmclf[onnx]'`")


def _write(finished: Predictor, path: Path, batch: Batch) -> None:
    """Traces the model with two rows of `batch`, and writes it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    config, record = finished.model.config, _record(finished)
    two = {name: (values * 2)[:2] for name, values in batch.items()}  # a dimension of one would stay one
    inputs = dict(_inputs(finished, two))
    if not (config.has_image and config.has_text):
        inputs = {name: value for name, value in inputs.items() if name not in ("image_mask", "text_mask")}
    longest = getattr(finished.processor.tokenizer, "model_max_length", None)
    count, length = torch.export.Dim("batch"), torch.export.Dim("tokens", max=longest)
    shapes = {name: {0: count, 1: length} if value.ndim == 2 else {0: count} for name, value in inputs.items()}
    # Not transformers.exporters: it makes the same graph by way of this very function, but takes twice as long, frees
    # the size of pictures as well, and replaces internals of torch for models that generate.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # said of every axis that inputs share
        program = torch.onnx.export(
            finished.model,
            kwargs=inputs,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with the paths of this machine
    program.model.metadata_props["hf_mmclf"] = json.dumps(record, ensure_ascii=False)
    program.save(path)


def _record(finished: Predictor) -> dict[str, Any]:
    """What a prediction takes apart from the weights; [`OnnxClassifier`] reads it."""
    config, names = finished.model.config, finished.model.config.label_names
    record = {"labels": names, "label_ids": config.label_ids or names, "thresholds": config.thresholds}
    record["missing_thresholds"] = config.missing_thresholds if config.has_image and config.has_text else None
    image, tokenizer = finished.processor.image_processor, finished.processor.tokenizer
    record |= {"image": None, "tokenizer": None}
    if image is not None:
        if not (image.do_resize and image.do_center_crop):
            raise ValueError("cannot export an image processor whose do_resize or do_center_crop is off")
        record["image"] = {
            "size": image.size["longest_edge"],
            "resample": int(image.resample),
            "scale": image.rescale_factor if image.do_rescale else 1.0,
            "mean": list(image.image_mean) if image.do_normalize else [0.0] * 3,
            "std": list(image.image_std) if image.do_normalize else [1.0] * 3,
        }
    if tokenizer is not None:
        if not tokenizer.is_fast:
            raise ValueError(f"cannot export a {type(tokenizer).__name__}, which has no tokenizer.json")
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copy.enable_truncation(finished.processor.tokenizer.model_max_length, direction=tokenizer.truncation_side)
        copy.enable_padding(
            direction=tokenizer.padding_side,
            pad_id=tokenizer.pad_token_id,
            pad_type_id=tokenizer.pad_token_type_id,
            pad_token=tokenizer.pad_token,
        )
        record["tokenizer"] = json.loads(copy.to_str())
    return record


def _write_int8(source: Path, target: Path) -> None:
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    # unsigned weights: signed ones overflow on processors without the newer integer instructions
    kinds = ["MatMul", "Gemm", "Gather"]
    model = onnx.load(source)
    del model.graph.value_info[:]  # shapes of weights that onnxruntime 1.23 transposes, and then stumbles over
    onnx.save(model, target)
    quant_pre_process(target, target, skip_optimization=True, skip_symbolic_shape=True)  # else it warns
    quantize_dynamic(target, target, kinds, per_channel=True, weight_type=QuantType.QUInt8)
    model = onnx.load(target)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for name in convolutions & set(weights):  # not those that are computed, as by weight standardisation
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


def _embedded_rows(finished: Predictor, labelled: bool) -> tuple[Dataset, Path]:
    """Rows of the embedded data set; its test rows, with labels, if those are the model's and are asked for."""
    labelled &= set(finished.model.config.label_ids or finished.model.config.label_names) == set(DEMO_LABELS)
    prepared = finished.prepare(DataArguments() if labelled else DataArguments(demo_rows=SAMPLE), labelled)
    return prepared.splits["test" if labelled else "train"], prepared.folder


def _batches(finished: Predictor, rows: Dataset, folder: Path | None, size: int) -> Iterator[Batch]:
    """Pictures and captions of all rows."""
    config = finished.model.config
    for part in rows.iter(size):
        batch = {}
        if config.has_image:
            batch["images"] = [
                None if is_absent(cell) else to_pil_image(open_image(cell, Path(folder or "."), where))
                for cell, where in zip(part["image"], part["where"], strict=True)
            ]
        if config.has_text:
            batch["text"] = list(part["text"])
        yield batch


def _sample(finished: Predictor, rows: Dataset, folder: Path | None) -> list[Batch]:
    """Single rows, among them odd ones, and then many in one batch."""
    if not len(rows):
        raise ValueError(f"no rows to compare {MODEL} with; give some, or none for those of the embedded data set")
    many = next(_batches(finished, rows.select(range(min(SAMPLE, len(rows)))), folder, SAMPLE))
    first = {name: values[:1] for name, values in many.items()}
    single, lacking = [first], []
    if "text" in many:
        captions = [text for text in many["text"] if text is not None] or ["a picture"]
        most = min(finished.processor.tokenizer.model_max_length, 1000)  # some encoders know no limit
        words = " ".join(captions).split()
        single.append({**first, "text": [" ".join((words * most)[:most])]})  # with the special tokens, too long
        if "images" in many:
            lacking = [{"images": [None], "text": captions[:1]}]
            lacking += [{"images": [image], "text": [None]} for image in many["images"] if image is not None][:1]
    many = {name: values + [row[name][0] for row in lacking] for name, values in many.items()}
    return [*single, *lacking, many]


def _inputs(finished: Predictor, batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as the model takes it."""
    return finished.processor(**batch)


def _compare(finished: Predictor, classifier: "OnnxClassifier", sample: list[Batch]) -> dict[str, Any]:
    """Logits of the same inputs, and labels of the same pictures and captions."""
    difference, changed, compared = 0.0, 0, 0
    for batch in sample:
        inputs = _inputs(finished, batch)
        with torch.inference_mode():
            expected = finished.model(**inputs).logits.numpy()
        own = classifier.inputs(**batch)
        if any(not np.array_equal(own[name], inputs[name]) for name in own if name != "pixel_values"):
            raise ValueError(f"{RUNNER} splits captions otherwise than the tokenizer, one of {batch['text'][:3]}")
        found = classifier.session.run(["logits"], {name: inputs[name].numpy() for name in own})[0]
        difference = max(difference, float(np.abs(found - expected).max()))
        hits, expected_hits = (
            scores.astype(np.float64) >= classifier.thresholds(**batch)
            for scores in (classifier(**batch), scores_of(expected))
        )
        changed += int((hits != expected_hits).sum())
        compared += hits.size
    return {"largest_logit_difference": difference, "labels_compared": compared, "labels_changed": changed}


def _f1(finished: Predictor, classifier: "OnnxClassifier", rows: Dataset, folder: Path | None) -> float:
    """Micro-F1 at the model's thresholds."""
    scores = np.concatenate([classifier(**batch) for batch in _batches(finished, rows, folder, 64)])
    thresholds = finished.model.config.thresholds_for(*presence(rows))
    return multi_label_metrics(scores, references_of(rows), thresholds)["f1"]
