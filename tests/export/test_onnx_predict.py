import io
import json
import random
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import onnx
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import BertTokenizer

from hf_mmclf import MMClfImageProcessor
from hf_mmclf.export import onnx_predict
from hf_mmclf.export.onnx_predict import OnnxClassifier, WordPiece, is_wordpiece, load_tokenizer, to_rgb
from hf_mmclf.model import image_processing_mmclf

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = "a dog dogs on the bench cafe naive un ##want ##ed running ##s über İ 狗 猫 ж ##ж и ##и σ ##ς ##σ ß ##ß é ##é"
WORDS = [*WORDS.split(), "e\u0301", "😀", "Dog", "É", *LETTERS, *(f"##{letter}" for letter in LETTERS[:16])]
WORDS += "0123456789.,!?'-#@$%&()[]"
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)])}
PIECES = "Café NAÏVE Über unwanted ΣΣ İstanbul straße 狗和猫 ﬁ ǆ don't [SEP] [sep] [MASK]. #hash $5 `x`"
PIECES = [*PIECES.split(), *VOCABULARY, "a" * 100, "a" * 101, "👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "a\u00adb"]
SPACES = [*" \t\n\r\u00a0\u2003\u3000\u200b\x00\ufffd\x0b\x1c\x85", "", "", "  ", "\r\n"]
# `tokenizers` has the tables of Unicode 8; what was assigned in 3.2 has kept its category since, but for these
KNOWN = [chr(code) for code in range(0x20, 0x30000) if not 0xD800 <= code <= 0xDFFF]
KNOWN = [c for c in KNOWN if unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c)]


def spec_of(tokenizer: Tokenizer, max_tokens: int = 24) -> dict:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(max_tokens)
    copy.enable_padding(pad_id=0, pad_token="[PAD]")
    return json.loads(copy.to_str())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": False, "tokenize_chinese_chars": False},
    ],
)
def test_tokenizer_equals_that_of_transformers_on_random_texts(options):
    tokenizer = BertTokenizer(vocab=VOCABULARY, **options)
    own = load_tokenizer(spec_of(tokenizer.backend_tokenizer))
    assert isinstance(own, WordPiece)
    draw = random.Random(0)
    unknown = 0
    for _ in range(150):
        texts = []
        for _ in range(draw.randint(1, 4)):
            pieces = draw.choices(PIECES, k=draw.randint(0, 12)) + draw.choices(KNOWN, k=draw.randint(0, 4))
            draw.shuffle(pieces)
            texts.append("".join(piece + draw.choice(SPACES) for piece in pieces))
        expected = tokenizer(texts, padding=True, truncation=True, max_length=24)
        found = own.encode_batch(texts)
        for field, name in (("ids", "input_ids"), ("attention_mask",) * 2, ("type_ids", "token_type_ids")):
            assert [getattr(row, field) for row in found] == expected[name], texts
        unknown += sum(row.ids.count(1) / sum(row.attention_mask) for row in found) / len(found)
    assert unknown < 75  # the comparison is not one of unknown words only


def test_other_tokenizers_need_the_package_tokenizers(monkeypatch):
    tokenizer = Tokenizer(BPE({"d": 0, "o": 1, "g": 2, "do": 3, "[PAD]": 4}, [("d", "o")]))
    spec = spec_of(tokenizer)
    assert not is_wordpiece(spec)
    assert load_tokenizer(spec).encode_batch(["dog"])[0].ids == [3, 2]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="split by BPE.*pip install tokenizers"):
        load_tokenizer(spec)


@pytest.mark.parametrize("change", ["left", "added"])
def test_word_pieces_with_options_of_their_own_are_left_to_tokenizers(change):
    tokenizer = BertTokenizer(vocab=VOCABULARY)
    spec = spec_of(tokenizer.backend_tokenizer)
    assert is_wordpiece(spec)
    if change == "left":
        spec["padding"]["direction"] = "Left"
    else:
        spec["added_tokens"][-1]["lstrip"] = True
    assert not is_wordpiece(spec)
    assert load_tokenizer(spec).encode_batch(["a dog"])[0].ids == tokenizer("a dog")["input_ids"]


def pictures() -> dict[str, Image.Image]:
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


@pytest.mark.parametrize("name", pictures())
def test_pictures_are_prepared_as_by_the_image_processor(name, stub):
    picture = pictures()[name]
    expected = image_processing_mmclf.to_rgb(picture)
    assert to_rgb(picture).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), np.asarray(expected))
    processor = MMClfImageProcessor(size=8, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    found = stub.inputs(picture, "a dog")["pixel_values"]
    assert found.dtype == np.float32
    # torchvision's resize and Pillow's round differently
    expected = processor(picture, return_tensors="np")["pixel_values"]
    levels = np.abs(found - expected) * [[[0.2]], [[0.3]], [[0.4]]] * 255
    assert levels.max() < 2.1
    assert (levels > 0.5).mean() < 0.05


# Its first logit is the mean of the pixels, 9 without a picture; its second one the sum of the token ids.
GRAPH = """<ir_version: 9, opset_import: ["" : 17]>
stub (float[batch, 3, 8, 8] pixel_values, bool[batch] image_mask,
      int64[batch, tokens] input_ids, int64[batch, tokens] attention_mask, bool[batch] text_mask)
  => (float[batch, 2] logits) <float nine = {9.0}, int64[1] one = {1}> {
    mean = ReduceMean <axes = [1, 2, 3], keepdims = 0> (pixel_values)
    seen = Where (image_mask, mean, nine)
    given = Mul (input_ids, attention_mask)
    sum = ReduceSum <keepdims = 0> (given, one)
    read = Cast <to = 1> (sum)
    masked = Cast <to = 1> (text_mask)
    text = Mul (read, masked)
    seen_column = Unsqueeze (seen, one)
    text_column = Unsqueeze (text, one)
    logits = Concat <axis = 1> (seen_column, text_column)
}"""


@pytest.fixture(scope="module")
def stub_file(tmp_path_factory):
    record = {"labels": ["bright", "wordy"], "label_ids": ["1", "2"], "thresholds": [0.4, 0.9]}
    record["missing_thresholds"] = {"image": 1.0}
    record["image"] = {"size": 8, "resample": 3, "scale": 1 / 255, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    record["tokenizer"] = spec_of(BertTokenizer(vocab=VOCABULARY).backend_tokenizer)
    model = onnx.parser.parse_model(GRAPH)
    onnx.helper.set_model_props(model, {"hf_mmclf": json.dumps(record)})
    path = tmp_path_factory.mktemp("stub") / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def stub(stub_file):
    return OnnxClassifier(stub_file)


def test_rows_may_lack_a_picture_or_a_caption(stub):
    white = Image.new("RGB", (8, 8), "white")
    logits = stub.logits([white, None, white], ["a dog", "a", " \n"])
    light = np.mean((1 - np.array([0.5, 0.4, 0.3])) / [0.2, 0.3, 0.4])
    ids = [sum(VOCABULARY[word] for word in ("[CLS]", *words, "[SEP]")) for words in (["a", "dog"], ["a"])]
    np.testing.assert_allclose(logits, [[light, ids[0]], [9, ids[1]], [light, 0]], rtol=1e-6)
    np.testing.assert_array_equal(stub.logits([white, None, white], ["a dog", "a", None], batch_size=1), logits)
    np.testing.assert_array_equal(stub.logits(text=["a dog", "a"])[:, 1], ids)
    np.testing.assert_array_equal(stub.logits(images=white), logits[2:])
    assert stub.logits([], []).shape == (0, 2)


def test_labels_reach_their_own_thresholds_and_the_most_likely_comes_first(stub):
    black, white = (Image.new("RGB", (8, 8), color) for color in ("black", "white"))
    found = stub.labels([white, black, white], ["a dog", "a", None])
    assert [[label for label, _ in row] for row in found] == [["wordy", "bright"], ["wordy"], ["bright"]]
    score = 1 / (1 + np.exp(-stub.logits(white)[0, 0]))
    assert found[2] == [("bright", pytest.approx(score, rel=1e-6))]


def test_rows_that_lack_something_have_their_own_thresholds(stub):
    white = Image.new("RGB", (8, 8), "white")
    expected = [[0.4, 0.9], [1, 1], [0.4, 0.9]]  # for rows without a caption none was fitted
    np.testing.assert_array_equal(stub.thresholds([white, None, white], ["a dog", "a dog", " "]), expected)
    assert stub.thresholds([], []).shape == (0, 2)
    assert [len(row) for row in stub.labels([white, None], ["a dog", "a dog"])] == [2, 0]


def test_pictures_are_files_or_paths_too(stub, tmp_path):
    picture = pictures()["color"]
    file = io.BytesIO()
    picture.save(file, "png")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    expected = stub.logits(picture)
    for source in (file, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(stub.logits([source]), expected)


def test_bad_rows_are_named(stub, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"row 1: cannot read the picture .*bad\.jpg"):
        stub.logits([pictures()["color"], tmp_path / "bad.jpg"])
    with pytest.raises(ValueError, match="row 1 has neither a picture nor a caption"):
        stub.logits([None, None], ["a dog", ""])
    with pytest.raises(ValueError, match="2 and 1 pictures and captions"):
        stub.logits([None, None], ["a dog"])
    with pytest.raises(ValueError, match="no pictures and captions"):
        stub.logits()


def test_files_of_other_programs_are_refused(tmp_path):
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="other.onnx: no metadata of hf_mmclf"):
        OnnxClassifier(tmp_path / "other.onnx")


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
    assert "row 0: cannot read the picture white.png" in failed.stderr.splitlines()[-1]
