"""Labels for pictures and captions from an exported `model.onnx`, with onnxruntime, numpy and Pillow alone.

    python predict.py --image dog.jpg --text "a dog on a bench"

From Python:

    classifier = OnnxClassifier("model.onnx")
    classifier.labels(["dog.jpg"], ["a dog on a bench"])  # [[("dog", 0.97), ("bench", 0.61)]]

`hf-mmclf export` copies this file next to the model as `predict.py`, so it imports nothing of the package. Labels,
thresholds, preprocessing and vocabulary are read from the model's own metadata.
"""

import argparse
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class OnnxClassifier:
    r"""
    An exported model with its preprocessing.

    Rows are given as pictures and captions: lists of the same length, or a single one of each. A picture is a path, a
    binary file or a PIL image. Either may be absent (`None`, or a blank caption) if the model has both.

    Args:
        path (`str` or `Path`): The `.onnx` file.
        providers (`Sequence[str]`, *optional*, defaults to the CPU): Where onnxruntime runs it.

    Raises:
        `ValueError`: a file that `hf-mmclf export` did not write.
        `ImportError`: a tokenizer other than BERT's word pieces, without the package `tokenizers`.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)):
        options = onnxruntime.SessionOptions()
        # convolutions stored as int8 become floats once, on loading, not in every run
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "hf_mmclf" not in metadata:
            raise ValueError(f"{path}: no metadata of hf_mmclf; expected a model that `hf-mmclf export` wrote")
        record = json.loads(metadata["hf_mmclf"])
        self.names, self.own_thresholds = record["labels"], np.array(record["thresholds"])
        self.missing_thresholds = record.get("missing_thresholds") or {}
        self.image = record["image"]
        self.tokenizer = load_tokenizer(record["tokenizer"]) if record["tokenizer"] else None

    def __call__(self, images: Any = None, text: Any = None, batch_size: int = 16) -> np.ndarray:
        """Scores in [0, 1], float32 of shape (rows, labels); the arguments are those of `logits`."""
        return np.exp(-np.logaddexp(0, -self.logits(images, text, batch_size)))

    def labels(self, images: Any = None, text: Any = None, batch_size: int = 16) -> list[list[tuple[str, float]]]:
        """Of each row the predicted labels with their scores, most likely first; arguments as of `logits`."""
        rows = []
        for scores, thresholds in zip(self(images, text, batch_size), self.thresholds(images, text), strict=True):
            hits = scores.astype(np.float64) >= thresholds
            order = [i for i in np.argsort(-scores, kind="stable") if hits[i]]
            rows.append([(self.names[i], float(scores[i])) for i in order])
        return rows

    def thresholds(self, images: Any = None, text: Any = None) -> np.ndarray:
        """The model's own, of shape (rows, labels): rows that lack something may have others."""
        found = []
        for image, caption in zip(*self._rows(images, text), strict=True):
            absent = [name for name, cell in (("image", image), ("text", caption)) if cell is None]
            missing = [self.missing_thresholds[name] for name in absent if name in self.missing_thresholds]
            found.append(np.broadcast_to(missing[0], len(self.names)) if missing else self.own_thresholds)
        return np.array(found).reshape(-1, len(self.names))

    def logits(self, images: Any = None, text: Any = None, batch_size: int = 16) -> np.ndarray:
        r"""
        Args:
            images, text (*optional*): Pictures and captions; see the class.
            batch_size (`int`, *optional*, defaults to 16): Rows in one run of the model.

        Returns:
            `np.ndarray`: Float32, of shape (rows, labels).

        Raises:
            `ValueError`: a row with neither picture nor caption, a picture that cannot be read (the row is named), or
            an input that the model does not have.
        """
        images, texts = self._rows(images, text)
        batches = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        found = [self.session.run(["logits"], self._inputs(images, texts, batch))[0] for batch in batches]
        return np.concatenate(found) if found else np.zeros((0, len(self.names)), np.float32)

    def inputs(self, images: Any = None, text: Any = None) -> dict[str, np.ndarray]:
        """What the model is given for these rows, by name; the arguments are those of `logits`."""
        return self._inputs(*self._rows(images, text), slice(None))

    def _rows(self, images: Any, texts: Any) -> tuple[list, list]:
        """Both as lists of one length, with `None` for what is absent."""
        for name, given, known in (("pictures", images, self.image), ("captions", texts, self.tokenizer)):
            if given is not None and known is None:
                raise ValueError(f"got {name}, but this model takes none")
        lists = [list(rows) if isinstance(rows, list | tuple) else [rows] for rows in (images, texts)]
        lengths = [len(rows) for rows, given in zip(lists, (images, texts), strict=True) if given is not None]
        if not lengths or len(set(lengths)) > 1:
            raise ValueError(f"{' and '.join(map(str, lengths)) or 'no'} pictures and captions; expected one for each")
        images, texts = (rows if len(rows) == lengths[0] else rows * lengths[0] for rows in lists)
        texts = [text if text is not None and text.strip() else None for text in texts]
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            if image is None and text is None:
                raise ValueError(f"row {row} has neither a picture nor a caption; expected at least one of them")
        return images, texts

    def _inputs(self, images: list, texts: list, batch: slice) -> dict[str, np.ndarray]:
        values = {}
        if self.image is not None:
            pictures = [self._pixels(row, image) for row, image in list(enumerate(images))[batch]]
            values = {"pixel_values": np.stack(pictures)}
            values["image_mask"] = np.array([image is not None for image in images[batch]])
        if self.tokenizer is not None:
            encodings = self.tokenizer.encode_batch([text or "" for text in texts[batch]])
            values["input_ids"] = np.array([encoding.ids for encoding in encodings], np.int64)
            values["attention_mask"] = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            values["token_type_ids"] = np.array([encoding.type_ids for encoding in encodings], np.int64)
            values["text_mask"] = np.array([text is not None for text in texts[batch]])
        return {given.name: values[given.name] for given in self.session.get_inputs()}

    def _pixels(self, row: int, image: Any) -> np.ndarray:
        """A picture as the model takes it, (3, size, size): the whole of it in the middle of a black square."""
        size = self.image["size"]
        if image is None:
            return np.zeros((3, size, size), np.float32)
        try:
            with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
                picture = to_rgb(opened)
        except Exception as error:  # Pillow's decoders raise nearly everything
            raise ValueError(f"row {row}: cannot read the picture {image}: {error}") from error
        width, height = (max(1, round(edge * size / max(picture.size))) for edge in picture.size)
        square = Image.new("RGB", (size, size))
        resized = picture.resize((width, height), self.image["resample"])
        square.paste(resized, ((size - width) // 2, (size - height) // 2))
        values = np.asarray(square, np.float32) * self.image["scale"]
        values = (values - self.image["mean"]) / self.image["std"]
        return values.transpose(2, 0, 1).astype(np.float32)


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image, as `hf_mmclf.image_processing_mmclf.to_rgb` makes it."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits: scaled, not clipped
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
        peak = values.max()
        white = next((white for white in whites if peak <= white), peak)
        image = Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_tokenizer(spec: Mapping[str, Any]) -> Any:
    """The tokenizer of a `tokenizer.json`: our own for BERT's word pieces, else that of the package `tokenizers`."""
    if is_wordpiece(spec):
        return WordPiece(spec)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError(
            f"the captions of this model are split by {spec['model']['type']}, not by BERT's word pieces; "
            "run `pip install tokenizers`"
        ) from None
    return Tokenizer.from_str(json.dumps(spec))


def is_wordpiece(spec: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is of the kind that `WordPiece` implements."""
    parts = [(spec[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model", "post_processor")]
    sides = {spec["truncation"]["direction"], spec["padding"]["direction"]}
    kinds = ("lstrip", "rstrip", "single_word", "normalized")
    plain = not any(token[kind] for token in spec["added_tokens"] for kind in kinds)
    bert = parts == ["BertNormalizer", "BertPreTokenizer", "WordPiece", "TemplateProcessing"]
    return bert and spec["normalizer"]["clean_text"] and sides == {"Right"} and plain


class Encoding(NamedTuple):
    """One caption as `tokenizers` would give it."""

    ids: list[int]
    attention_mask: list[int]
    type_ids: list[int]


class WordPiece:
    """BERT's tokenizer in plain Python, from a `tokenizer.json` with truncation and padding.

    Source: the normalizer, pre-tokenizer and model of these names in the package `tokenizers`, whose tables of
    characters are Unicode's of 2015: marks and punctuation of scripts that came later may be split otherwise.
    """

    def __init__(self, spec: Mapping[str, Any]):
        self.normalizer, self.model = spec["normalizer"], spec["model"]
        self.vocabulary, self.unknown = self.model["vocab"], self.model["vocab"][self.model["unk_token"]]
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.in_text = re.compile("({})".format("|".join(map(re.escape, self.special)) or "(?!)"))
        template, known = spec["post_processor"]["single"], spec["post_processor"]["special_tokens"]
        place = next(i for i, piece in enumerate(template) if "Sequence" in piece)
        self.before, self.after = (
            [token for piece in pieces for token in known[piece["SpecialToken"]["id"]]["ids"]]
            for pieces in (template[:place], template[place + 1 :])
        )
        self.room = spec["truncation"]["max_length"] - len(self.before) - len(self.after)
        self.padding = spec["padding"]["pad_id"]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Captions cut to the model's length and padded to the longest."""
        rows = [self.before + list(islice(self._tokens(text), self.room)) + self.after for text in texts]
        longest = max(map(len, rows))
        return [
            Encoding(
                ids=row + [self.padding] * (longest - len(row)),
                attention_mask=[1] * len(row) + [0] * (longest - len(row)),
                type_ids=[0] * longest,
            )
            for row in rows
        ]

    def _tokens(self, text: str) -> Iterator[int]:
        for part in self.in_text.split(text):
            if part in self.special:
                yield self.special[part]
                continue
            for word in self._words(part):
                yield from self._pieces(word)

    def _words(self, text: str) -> list[str]:
        """Runs of anything but white space; each punctuation mark is one of its own."""
        text = "".join(map(_clean, text))
        if self.normalizer["handle_chinese_chars"]:
            text = "".join(f" {character} " if _is_chinese(character) else character for character in text)
        lowercase, strip = self.normalizer["lowercase"], self.normalizer["strip_accents"]
        if lowercase if strip is None else strip:
            text = unicodedata.normalize("NFD", text)
            text = "".join(character for character in text if unicodedata.category(character) != "Mn")
        if lowercase:
            text = "".join(map(str.lower, text))  # one by one: a final sigma stays what it is elsewhere
        text = "".join(f" {character} " if _is_punctuation(character) else character for character in text)
        return text.split()

    def _pieces(self, word: str) -> list[int]:
        """The longest pieces of the vocabulary from the left, or the unknown token for all of the word."""
        pieces, start = [], 0
        if len(word) > self.model["max_input_chars_per_word"]:
            return [self.unknown]
        while start < len(word):
            prefix = self.model["continuing_subword_prefix"] if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.vocabulary), None)
            if end is None:
                return [self.unknown]
            pieces.append(self.vocabulary[prefix + word[start:end]])
            start = end
        return pieces


def _clean(character: str) -> str:
    if character in "\t\n\r":
        return " "
    return "" if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co") else character


# "CJK Unified Ideographs" and their extensions, as in `tokenizers`
_CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F))
_CHINESE += ((0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def _is_chinese(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CHINESE)


def _is_punctuation(character: str) -> bool:
    ascii_symbol = character in "$+<=>^`|~"  # which Unicode calls symbols
    return ascii_symbol or unicodedata.category(character).startswith("P")


def main() -> None:
    """The command of the first line above."""
    parser = argparse.ArgumentParser(description="Labels for pictures and captions, by the model's own thresholds.")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="Pictures.")
    parser.add_argument("--text", nargs="+", metavar="CAPTION", help="Captions, one for each picture or on their own.")
    parser.add_argument("--model", default=Path(__file__).with_name("model.onnx"), help="Default: %(default)s.")
    options = parser.parse_args()
    names = options.image or options.text
    if not names:
        parser.error("give --image, --text or both")
    try:
        rows = OnnxClassifier(options.model).labels(options.image, options.text)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    for name, labels in zip(names, rows, strict=True):
        print(f"{name}: " + (", ".join(f"{label} {score:.2f}" for label, score in labels) or "no label"))


if __name__ == "__main__":
    main()
