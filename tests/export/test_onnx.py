import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from support.tiny_folder import write_folder, write_table

import hf_mmclf
from hf_mmclf import DataArguments, Predictor, demo_dataset
from hf_mmclf.data.demo import DEMO_LABELS
from hf_mmclf.export import onnx as export
from hf_mmclf.export.onnx import export_onnx
from hf_mmclf.export.onnx_predict import OnnxClassifier


def load(folder, kind="both", **fields):
    predictor = Predictor.load(write_folder(folder, kind, **fields))
    prepared = predictor.prepare(DataArguments(data=str(write_table(folder))))
    return predictor, prepared.splits["train"], prepared.folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of both modalities with its two ONNX files: the predictor, the rows and the report."""
    torch.manual_seed(0)
    fields = dict(fusion="label_queries", image_tokens="stages", learned_missing=True, modality_dropout=0.2)
    fields |= dict(threshold=0.45, label_thresholds={"dog": 0.3}, missing_thresholds={"image": 0.2, "text": 0.6})
    fields |= dict(min_labels=1, modality_classifiers=True)
    predictor, rows, folder = load(tmp_path_factory.mktemp("both"), **fields)
    classifier = predictor.model.classifier
    with torch.no_grad():  # scores around 0.5
        classifier.weight.div_(2)
        classifier.bias.sub_(torch.tensor(predictor.predict(rows, folder).predictions.mean(0)))
    predictor.model.save_pretrained(predictor.folder)
    return predictor, rows, export_onnx(predictor, quantize=True, rows=rows, folder=folder)


def test_report_has_size_difference_labels_and_f1(exported):
    predictor, rows, report = exported
    assert list(report) == ["model.onnx", "model_int8.onnx"]
    single, int8 = report.values()
    for name, figures in report.items():
        assert figures["megabytes"] == (predictor.folder / "onnx" / name).stat().st_size / 1e6
        assert figures["labels_compared"] == 3 * (4 + 7)  # labels * (single rows + rows of a batch)
    assert single["largest_logit_difference"] < 1e-4 < int8["largest_logit_difference"]
    assert single["labels_changed"] == 0 and int8["labels_changed"] <= 3
    assert int8["megabytes"] < single["megabytes"] / 3
    assert single["f1"] == predictor.evaluate(rows, predictor.folder)["fitted"]["f1"]
    assert int8["f1_lost"] == single["f1"] - int8["f1"]


def test_files_have_metadata_and_no_paths_of_this_machine(exported):
    folder = exported[0].folder / "onnx"
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "model_int8.onnx", "predict.py"]
    for name in ("model.onnx", "model_int8.onnx"):
        model = onnx.load(folder / name)
        onnx.checker.check_model(model, full_check=True)
        record = json.loads({entry.key: entry.value for entry in model.metadata_props}["hf_mmclf"])
        assert record["labels"] == ["person", "traffic light", "dog"]
        assert record["label_ids"] == ["1", "3", "10"]
        assert record["thresholds"] == [0.45, 0.45, 0.3]
        assert record["missing_thresholds"] == {"image": 0.2, "text": 0.6} and record["min_labels"] == 1
        assert record["image"]["size"] == 32
        assert record["tokenizer"]["truncation"]["max_length"] == 16
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in [*model.graph.input, *model.graph.output]
        }
        assert shapes == {
            "pixel_values": ["batch", 3, 32, 32],
            **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ["batch", "tokens"]),
            **dict.fromkeys(("image_mask", "text_mask"), ["batch"]),
            "logits": ["batch", 3],
        }
        content = (folder / name).read_bytes()
        assert not any(part in content for part in (b".py", b"site-packages", str(exported[0].folder).encode()))


TEXTS = ["a man on a dog", "Crème brûlée — «déjà vu»!", "👩\u200d👩\u200d👧 dog 👍🏽", "a" * 150 + " dog", "", None]
TEXTS += ["一只狗 on a man", "dogs and a man and a dog " * 9, "a [SEP] dog", "MÀN\u200b\tno\u00a0dog"]

ALONE = """
import json, runpy, sys
for name in ("torch", "torchvision", "transformers", "timm", "datasets", "onnx", "hf_mmclf"):
    sys.modules[name] = None
classifier = runpy.run_path(sys.argv[1])["OnnxClassifier"](sys.argv[2])
rows = json.load(open(sys.argv[3]))
print(json.dumps([classifier(*rows).tolist(), classifier.labels(*rows)]))
"""


def test_predict_py_alone_equals_the_pipeline(exported, tmp_path):
    """From images and texts to labels, in a process that can import neither torch nor transformers."""
    predictor, draw = exported[0], np.random.default_rng(0)
    images = []
    for row in range(len(TEXTS)):
        height, width = draw.integers(5, 90, 2)
        noise = draw.integers(0, 256, (height // 5 + 1, width // 5 + 1, 4), dtype=np.uint8)
        image = Image.fromarray(noise, "RGBA").resize((int(width), int(height)))
        image = (image, image.convert("L"), image.convert("P"))[row % 3]
        exif = Image.Exif()
        exif[0x0112] = 1 + row % 8
        image.save(tmp_path / f"{row}.png", exif=exif)
        images.append(str(tmp_path / f"{row}.png"))
    images[0] = images[2] = None
    (tmp_path / "rows.json").write_text(json.dumps([images, TEXTS]))
    arguments = [predictor.folder / "onnx" / "predict.py", predictor.folder / "onnx" / "model.onnx", "rows.json"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    scores, labels = json.loads(done.stdout)

    pipe = hf_mmclf.pipeline(predictor.folder, device="cpu")
    columns = dict(image=images, text=TEXTS)
    expected = pipe(**columns, return_all_scores=True)
    names = ["person", "traffic light", "dog"]
    by_name = [{entry["label"]: entry["score"] for entry in row} for row in expected]
    expected_scores = np.array([[row[name] for name in names] for row in by_name])
    assert np.ptp(expected_scores, axis=0).min() > 0.1  # rows differ
    np.testing.assert_allclose(scores, expected_scores, atol=0.01)  # resizing rounds differently
    assert [[label for label, _ in row] for row in labels] == [
        [entry["label"] for entry in row] for row in pipe(**columns)
    ]


def test_a_wrong_file_is_found_and_not_written(exported, tmp_path, monkeypatch):
    predictor, rows, _ = exported
    copy, file = Predictor.load(predictor.folder), predictor.folder / "onnx" / "model.onnx"
    monkeypatch.setattr(export, "_write", lambda predictor, path, batch: shutil.copy(file, path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_int8.onnx").write_text("from an earlier export")
    with torch.no_grad():
        copy.model.classifier.bias += 0.01
    with pytest.raises(ValueError, match=r"differ by up to 0\.01, more than the tolerance of 0\.001"):
        export_onnx(copy, tmp_path / "out", rows=rows, folder=predictor.folder, overwrite=True)
    copy.processor.tokenizer.model_max_length -= 1
    with pytest.raises(ValueError, match=r"predict\.py and the model tokenize texts differently, .*'a dog a man on a"):
        export_onnx(copy, tmp_path / "out", rows=rows, folder=predictor.folder, tolerance=1, overwrite=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "model_int8.onnx"]


def test_text_model(tmp_path, capsys):
    predictor, *_ = load(tmp_path, "text")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_int8.onnx").write_text("from an earlier export")
    with pytest.raises(FileExistsError, match="onnx has model_int8.onnx already; give another --output, or"):
        export_onnx(predictor.folder)
    report = export_onnx(predictor.folder, overwrite=True)  # on texts of the embedded data set
    assert report["model.onnx"]["largest_logit_difference"] < 1e-4
    assert "f1" not in report["model.onnx"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("model.onnx ")
    assert sorted(file.name for file in (tmp_path / "onnx").iterdir()) == ["model.onnx", "predict.py"]
    classifier = OnnxClassifier(tmp_path / "onnx" / "model.onnx")
    names = {given.name for given in classifier.session.get_inputs()}
    assert names == {"input_ids", "attention_mask", "token_type_ids"}
    expected = hf_mmclf.pipeline(tmp_path, device="cpu")(text="a dog", return_all_scores=True)
    assert classifier(text="a dog").max() == pytest.approx(expected[0]["score"], abs=1e-5)
    with pytest.raises(ValueError, match="got images, but this model takes none"):
        classifier([Image.new("RGB", (9, 9))])


def test_image_model(tmp_path):
    predictor, rows, folder = load(tmp_path, "image")
    report = export_onnx(
        predictor, tmp_path / "out", rows=rows.select([0]), folder=folder
    )  # one row does not fix the size of batches
    assert report["model.onnx"]["largest_logit_difference"] < 1e-4
    classifier = OnnxClassifier(tmp_path / "out" / "model.onnx")
    assert [given.name for given in classifier.session.get_inputs()] == ["pixel_values"]
    names = [folder / name for name in rows["image"]]
    np.testing.assert_allclose(classifier(names), predictor.scores(rows, folder), atol=0.01)


class Classify(torch.nn.Module):
    """Everything behind the backbones, of several models at once, with tensors as arguments."""

    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, image, image_mask, text, text_mask):
        return torch.stack([model.classify((image, image_mask), (text, text_mask)) for model in self.models])


@pytest.mark.filterwarnings("ignore:# The axis name")
def test_every_other_fusion_exports_with_any_number_of_rows_and_tokens(tiny_model):
    options = dict(fusion_norm=True, projection_norm=True, learned_missing=True)
    models = [tiny_model(fusion=fusion, **options) for fusion in ("self", "cross_text", "cross_image", "concat")]
    classify = Classify(models).eval()

    def batch(rows, length, cells=4):
        image = torch.randn(rows, cells, models[0].missing_image.width)
        text = torch.randn(rows, length, models[0].missing_text.width)
        image_mask = (torch.arange(rows) != 1)[:, None].expand(rows, cells)
        text_mask = torch.arange(length) < torch.arange(rows, 0, -1)[:, None] - 1  # the last row has no text
        return dict(image=image, image_mask=image_mask, text=text, text_mask=text_mask)

    rows, length = torch.export.Dim("batch"), torch.export.Dim("tokens", max=32)
    shapes = {name: {0: rows, 1: length} if "text" in name else {0: rows} for name in batch(2, 3)}
    program = torch.onnx.export(
        classify, kwargs=batch(2, 3), dynamic_shapes=shapes, dynamo=True, verbose=False, optimize=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for inputs in (batch(3, 7), batch(1, 1), batch(5, 2)):
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        np.testing.assert_allclose(found, classify(**inputs).detach(), atol=1e-5)


def test_embedded_rows_have_labels_for_a_model_that_has_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mmclf.data.prepare.demo_dataset", lambda rows: demo_dataset(20))
    predictor = Predictor.load(write_folder(tmp_path, "image"))
    assert "labels" not in export._embedded_rows(predictor, labelled=True)[0].column_names
    predictor.model.config.label_ids = None
    predictor.model.config.id2label = dict(enumerate(sorted(DEMO_LABELS)))
    rows, _ = export._embedded_rows(predictor, labelled=True)
    assert np.array(rows["labels"]).shape == (2, 12)
    assert "labels" not in export._embedded_rows(predictor, labelled=False)[0].column_names


def test_errors_come_before_anything_is_written(tmp_path, monkeypatch):
    predictor, rows, folder = load(tmp_path, "image")
    with pytest.raises(ValueError, match=r"no rows to compare model\.onnx on"):
        export_onnx(predictor, rows=rows.select([]), folder=folder)
    with pytest.raises(NotADirectoryError, match=r"train\.csv is a file"):
        export_onnx(predictor, tmp_path / "train.csv")
    predictor.processor.image_processor.do_resize = False
    with pytest.raises(ValueError, match="do_resize or do_center_crop is off"):
        export_onnx(predictor, rows=rows, folder=folder)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnx") else name)
    with pytest.raises(ImportError, match="needs onnx, onnxscript, onnxruntime; run `pip install"):
        export_onnx(tmp_path / "nowhere")
    assert not (tmp_path / "onnx").exists()
