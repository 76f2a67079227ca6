import io
import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_mmclf import MMClfConfig, MMClfImageProcessor, MMClfProcessor
from hf_mmclf.export import onnx_predict
from hf_mmclf.export.onnx import image_record, tokenizer_record
from hf_mmclf.export.onnx_predict import OnnxClassifier, sigmoid, to_rgb
from hf_mmclf.model import image_processing_mmclf
from hf_mmclf.model.pipeline_mmclf import scores_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["a", "dog", "##s", "cafe", "über", "狗", "e\u0301", "##ß", "😀", ".", "!", "$", "-", *LETTERS]
WORDS += [f"##{letter}" for letter in LETTERS]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)])}
MAX_TOKENS = 24
SIZE, MEAN, STD = 8, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
ODD_TEXTS = [
    "a dog on a bench",
    "Café NAÏVE Über — «déjà vu»!",
    "狗和猫 straße İstanbul ΣΣ ﬁ ǆ",
    "a [SEP] dog [sep] [MASK].",
]
ODD_TEXTS += [
    "👩\u200d👩\u200d👧 dog 👍🏽 a\u00adb",
    "\u200b\x00a\tdog\u00a0\ufffd\x85dog\r\n",
    "a" * 150,
    "dogs " * 60,
    "",
    " \n",
    None,
]


def bert() -> BertTokenizer:
    return BertTokenizer(vocab=VOCABULARY, model_max_length=MAX_TOKENS)


def byte_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer of another kind, that truncates on the left and has no special tokens around a text."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<pad>", *sorted(letters), "do", "dog"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("d", "o"), ("do", "g")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    options = dict(pad_token="<pad>", model_max_length=MAX_TOKENS, truncation_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def test_the_sigmoid_has_the_bits_of_the_model_s_scores():
    """Torch computes its own in other blocks, for each value alone and for every other value of a table."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    extremes = np.array([0, -0.0, 17, 18, 88.7, 89, -88, -104, -745, 1e-45, 3e38, -3e38, np.inf, -np.inf], np.float32)
    values = np.concatenate([extremes, bits[np.isfinite(bits)], rng.normal(0, 5, 400_000).astype(np.float32)])
    expected = sigmoid(values)
    assert expected.dtype == np.float32
    assert np.array_equal(scores_of(values), expected)
    assert np.array_equal(scores_of(torch.from_numpy(values)[::2]), expected[::2])
    assert [scores_of(value).item() for value in values[:2000]] == expected[:2000].tolist()


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, None])
def test_a_file_that_is_no_whole_model_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    reason = "no such file" if content is None else "cannot be loaded; export the model again"
    with pytest.raises(ValueError, match=f"model.onnx:? {reason}"):
        OnnxClassifier(tmp_path / "model.onnx")


@pytest.mark.parametrize("make", [bert, byte_pairs])
def test_inputs_equal_those_of_the_processor_for_odd_texts(make, write_stub):
    tokenizer = make()
    processor = MMClfProcessor(MMClfImageProcessor(size=SIZE), tokenizer)
    image = Image.new("RGB", (SIZE, SIZE))
    classifier = OnnxClassifier(write_stub(tokenizer=tokenizer))
    expected = processor(images=[image] * len(ODD_TEXTS), text=ODD_TEXTS, return_tensors="np")
    found = classifier.inputs([image] * len(ODD_TEXTS), ODD_TEXTS)
    assert found["text_mask"].tolist() == expected["text_mask"].tolist() == [True] * 8 + [False] * 3
    for name in ("input_ids", "attention_mask"):  # the model ignores the tokens of a missing text
        np.testing.assert_array_equal(found[name][:8], expected[name][:8], name)
    assert found["attention_mask"].sum(1).max() == MAX_TOKENS  # long texts are truncated


def images() -> dict[str, Image.Image]:
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (37, 50, 4), dtype=np.uint8)
    color = Image.fromarray(noise[..., :3])
    deep = draw.integers(0, 65536, (20, 30), dtype=np.uint16)
    turned = color.copy()
    turned.getexif()[0x0112] = 6
    palette = color.convert("P")
    palette.info["transparency"] = 3
    small = (deep % 256).astype(np.int32)
    floats = (deep / 65535 - 0.1).astype(np.float32)
    floats[5, 5] = np.nan
    return {
        "color": color,
        "turned": turned,
        "transparent": Image.fromarray(noise),
        "grey and transparent": Image.fromarray(noise[..., 2:]),
        "grey": Image.fromarray(noise[..., 0]),
        "black and white": color.convert("1"),
        "palette": palette,
        "print": color.convert("CMYK"),
        "16 bits": Image.fromarray(deep),
        "32 bits": Image.fromarray(deep.astype(np.int32) * 70000),
        "32 bits, 255 is white": Image.fromarray(small - 40),
        "floats": Image.fromarray(floats),
        "thin": color.resize((90, 1)),
        "large": color.resize((301, 411)),
    }


# The first logit is the mean of the pixels, or 9 without an image; the second one is the sum of the token ids.
GRAPH = """<ir_version: 9, opset_import: ["" : 17]>
stub (float[batch, 3, 8, 8] pixel_values, bool[batch] image_mask,
      int64[batch, tokens] input_ids, int64[batch, tokens] attention_mask, bool[batch] text_mask)
  => (float[batch, 2] logits) <float nine = {9.0}, int64[1] one = {1}> {
    mean = ReduceMean <axes = [1, 2, 3], keepdims = 0> (pixel_values)
    bright = Where (image_mask, mean, nine)
    ids = Mul (input_ids, attention_mask)
    sum = ReduceSum <keepdims = 0> (ids, one)
    float_sum = Cast <to = 1> (sum)
    has_text = Cast <to = 1> (text_mask)
    wordy = Mul (float_sum, has_text)
    bright_column = Unsqueeze (bright, one)
    wordy_column = Unsqueeze (wordy, one)
    logits = Concat <axis = 1> (bright_column, wordy_column)
}"""


@pytest.fixture(scope="module")
def write_stub(tmp_path_factory):
    """Writes a model with the graph above: from a tokenizer and thresholds to its file."""

    def write(tokenizer=None, thresholds=(0.4, 0.9), **record):
        record = {"labels": ["bright", "wordy"], "thresholds": thresholds, "missing_thresholds": None, **record}
        record["image"] = image_record(MMClfImageProcessor(size=SIZE, image_mean=MEAN, image_std=STD))
        record["tokenizer"] = tokenizer_record(tokenizer or bert())
        model = onnx.parser.parse_model(GRAPH)
        onnx.helper.set_model_props(model, {"hf_mmclf": json.dumps(record)})
        path = tmp_path_factory.mktemp("stub") / "model.onnx"
        onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="module")
def stub_file(write_stub):
    return write_stub(missing_thresholds={"image": 1.0})


@pytest.fixture(scope="module")
def stub(stub_file):
    return OnnxClassifier(stub_file)


@pytest.mark.parametrize("name", images())
def test_images_are_preprocessed_as_by_the_image_processor(name, stub):
    image = images()[name]
    expected = image_processing_mmclf.to_rgb(image)
    assert to_rgb(image).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(expected))
    processor = MMClfImageProcessor(size=SIZE, image_mean=MEAN, image_std=STD)
    found = stub.inputs(image, "a dog")["pixel_values"]
    assert found.dtype == np.float32
    # torchvision's resize and Pillow's round differently
    expected = processor(image, return_tensors="np")["pixel_values"]
    levels = np.abs(found - expected) * np.reshape(STD, (3, 1, 1)) * 255
    assert levels.max() < 2.1
    assert (levels > 0.5).mean() < 0.05


def test_rows_with_a_missing_image_or_text(stub):
    white = Image.new("RGB", (8, 8), "white")
    logits = stub.logits([white, None, white], ["a dog", "a", " \n"])
    light = np.mean((1 - np.array(MEAN)) / STD)
    ids = [sum(VOCABULARY[word] for word in ("[CLS]", *words, "[SEP]")) for words in (["a", "dog"], ["a"])]
    np.testing.assert_allclose(logits, [[light, ids[0]], [9, ids[1]], [light, 0]], rtol=1e-6)
    np.testing.assert_array_equal(stub.logits([white, None, white], ["a dog", "a", None], batch_size=1), logits)
    np.testing.assert_array_equal(stub.logits(text=["a dog", "a"])[:, 1], ids)
    np.testing.assert_array_equal(stub.logits(images=white), logits[2:])
    assert stub.logits([], []).shape == (0, 2)


def test_labels_are_sorted_by_score(stub):
    black, white = (Image.new("RGB", (8, 8), color) for color in ("black", "white"))
    found = stub.labels([white, black, white], ["a dog", "a", None])
    assert [[label for label, _ in row] for row in found] == [["wordy", "bright"], ["wordy"], ["bright"]]
    score = 1 / (1 + np.exp(-stub.logits(white)[0, 0]))
    assert found[2] == [("bright", pytest.approx(score, rel=1e-6))]


@pytest.mark.parametrize("missing", [False, True])
def test_a_score_equal_to_its_threshold_is_predicted(missing, stub, write_stub):
    score = float(stub(text="a dog")[0, 0])
    config = MMClfConfig(text_config={"model_type": "bert"}, image_backbone="test_resnet", num_labels=2)
    for threshold, expected in ((score, ["bright"]), (np.nextafter(score, 1), [])):
        record = {"missing_thresholds": {"image": threshold}} if missing else {"thresholds": [threshold, 1.1]}
        classifier = OnnxClassifier(write_stub(**record))
        names = [name for name, _ in classifier.labels(text="a dog")[0]]
        assert [name for name in names if name == "bright"] == expected
        config.threshold = threshold
        assert config.decide(classifier(text="a dog"))[0, 0] == bool(expected)


def test_thresholds_of_rows_with_a_missing_image(stub):
    white = Image.new("RGB", (8, 8), "white")
    expected = [[0.4, 0.9], [1, 1], [0.4, 0.9]]  # this model has no threshold for rows without a text
    np.testing.assert_array_equal(stub.thresholds([white, None, white], ["a dog", "a dog", " "]), expected)
    assert stub.thresholds([], []).shape == (0, 2)
    assert [len(row) for row in stub.labels([white, None], ["a dog", "a dog"])] == [2, 0]


def test_images_can_be_files_or_paths(stub, tmp_path):
    image = images()["color"]
    file = io.BytesIO()
    image.save(file, "png")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    expected = stub.logits(image)
    for source in (file, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(stub.logits([source]), expected)


def test_errors_name_the_row(stub, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"row 1: cannot read the image .*bad\.jpg"):
        stub.logits([images()["color"], tmp_path / "bad.jpg"])
    with pytest.raises(ValueError, match="row 1 has neither an image nor a text"):
        stub.logits([None, None], ["a dog", ""])
    with pytest.raises(ValueError, match="got 2 images and 1 texts"):
        stub.logits([None, None], ["a dog"])
    with pytest.raises(ValueError, match="got neither images nor text"):
        stub.logits()


def test_files_of_other_programs_are_refused(tmp_path):
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="other.onnx: no metadata of hf_mmclf"):
        OnnxClassifier(tmp_path / "other.onnx")


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_a_missing_package_is_one_clear_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    line = f"{package}.*; run `pip install onnxruntime numpy pillow tokenizers`"
    with pytest.raises(SystemExit, match=line) as caught:
        runpy.run_path(onnx_predict.__file__, run_name="__main__")
    assert "\n" not in caught.value.code
    with pytest.raises(ImportError, match=line):
        runpy.run_path(onnx_predict.__file__)


def test_command(stub_file, tmp_path):
    shutil.copy(onnx_predict.__file__, stub_file.parent / "predict.py")
    Image.new("RGB", (8, 8), "black").save(tmp_path / "black.png")

    def run(*arguments):
        command = [sys.executable, stub_file.parent / "predict.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("--image", "black.png", "--text", "a dog").stdout == "black.png: wordy 1.00\n"
    assert run("--image", "black.png").stdout == "black.png: no label\n"
    failed = run("--image", "white.png")
    assert failed.returncode == 2
    assert "row 0: cannot read the image white.png" in failed.stderr.splitlines()[-1]
