"""Predict labels of images and texts with an exported `model.onnx`.

    python predict.py --image dog.jpg --text "a dog on a bench"

From Python:

    classifier = OnnxClassifier("model.onnx")
    classifier.labels(["dog.jpg"], ["a dog on a bench"])  # [[("dog", 0.97), ("bench", 0.61)]]

`hf-mmclf export` copies this file next to the model as `predict.py`. It needs onnxruntime, numpy, Pillow and
tokenizers, and nothing of the package `hf_mmclf`. The model's metadata holds its labels, thresholds, preprocessing and
tokenizer.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps
    from tokenizers import Tokenizer
except ImportError as error:
    message = f"{error}; run `pip install onnxruntime numpy pillow tokenizers`"
    if __name__ == "__main__":
        raise SystemExit(message) from None
    raise ImportError(message) from error


class OnnxClassifier:
    r"""
    An exported model with its preprocessing.

    Every method takes rows as `images` and `text`: two lists of the same length, or a single image and a single text.
    An image is a path, a binary file or a PIL image. With a model that has both backbones, either of the two can be
    left out, and single rows can have `None` or a blank text.

    Args:
        path (`str` or `Path`): The `.onnx` file.
        providers (`Sequence[str]`, *optional*, defaults to `("CPUExecutionProvider",)`):
            Execution providers of onnxruntime.

    Raises:
        `ValueError`: If the file cannot be loaded, or if `hf-mmclf export` did not write it.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; not each node that cannot be computed in advance
        # Convert int8 weights of convolutions to floats once, when the model loads, and not in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has classes of its own
            raise ValueError(f"{path} cannot be loaded; export the model again: {str(error).strip()}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "hf_mmclf" not in metadata:
            raise ValueError(f"{path}: no metadata of hf_mmclf; expected a model that `hf-mmclf export` wrote")
        record = json.loads(metadata["hf_mmclf"])
        self.names, self.own_thresholds = record["labels"], np.array(record["thresholds"])
        self.missing_thresholds = record.get("missing_thresholds") or {}
        self.min_labels = record.get("min_labels", 0)
        self.image = record["image"]
        self.tokenizer = Tokenizer.from_str(json.dumps(record["tokenizer"])) if record["tokenizer"] else None

    def __call__(self, images: Any = None, text: Any = None, batch_size: int = 16) -> np.ndarray:
        """Compute scores in [0, 1], float32 of shape `(rows, labels)`. The arguments are those of `logits`."""
        return sigmoid(self.logits(images, text, batch_size))

    def labels(self, images: Any = None, text: Any = None, batch_size: int = 16) -> list[list[tuple[str, float]]]:
        """
        Predict the labels whose score is at least their threshold, and the `min_labels` best labels of each row.

        Args:
            images, text, batch_size: The arguments of `logits`.

        Returns:
            `list[list[tuple[str, float]]]`: For each row the names of its labels with their scores, highest first.
        """
        scores = self(images, text, batch_size)
        hits = scores.astype(np.float64) >= self.thresholds(images, text)
        order = np.argsort(-scores, axis=1, kind="stable")
        np.put_along_axis(hits, order[:, : self.min_labels], True, axis=1)
        return [
            [(self.names[i], float(row[i])) for i in ranks if hit[i]]
            for row, hit, ranks in zip(scores, hits, order, strict=True)
        ]

    def thresholds(self, images: Any = None, text: Any = None) -> np.ndarray:
        """Return the thresholds of rows, of shape `(rows, labels)`. A missing image or text can change them."""
        images, texts = self._rows(images, text)
        found = np.tile(self.own_thresholds, (len(images), 1))
        for name, cells in (("image", images), ("text", texts)):
            if name in self.missing_thresholds:
                found[[cell is None for cell in cells]] = self.missing_thresholds[name]
        return found

    def logits(self, images: Any = None, text: Any = None, batch_size: int = 16) -> np.ndarray:
        r"""
        Compute the logits of rows.

        Args:
            images, text (*optional*): Images and texts; see the class.
            batch_size (`int`, *optional*, defaults to 16): Number of rows in one run of the model.

        Returns:
            `np.ndarray` of shape `(rows, labels)`: Float32.

        Raises:
            `ValueError`: If a row has neither an image nor a text, an image cannot be read (the message names its
                row), or the model does not have an input that is given.
        """
        images, texts = self._rows(images, text)
        batches = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        found = [self.session.run(["logits"], self._inputs(images, texts, batch))[0] for batch in batches]
        return np.concatenate(found) if found else np.zeros((0, len(self.names)), np.float32)

    def inputs(self, images: Any = None, text: Any = None) -> dict[str, np.ndarray]:
        """Return the inputs of the ONNX model for all rows in one batch, by name."""
        return self._inputs(*self._rows(images, text), slice(None))

    def _rows(self, images: Any, texts: Any) -> tuple[list, list]:
        """Return images and texts as lists of the same length, with `None` for what a row does not have."""
        images, texts = _as_list(images), _as_list(texts)
        for name, rows, part in (("images", images, self.image), ("text", texts, self.tokenizer)):
            if rows is not None and part is None:
                raise ValueError(f"got {name}, but this model takes none")
        if images is None and texts is None:
            raise ValueError("got neither images nor text; expected at least one of them")
        images = [None] * len(texts) if images is None else images
        texts = [None] * len(images) if texts is None else [text if text and text.strip() else None for text in texts]
        if len(images) != len(texts):
            raise ValueError(f"got {len(images)} images and {len(texts)} texts; expected the same number of both")
        for row, cells in enumerate(zip(images, texts, strict=True)):
            if cells == (None, None):
                raise ValueError(f"row {row} has neither an image nor a text; expected at least one of them")
        return images, texts

    def _inputs(self, images: list, texts: list, batch: slice) -> dict[str, np.ndarray]:
        values = {}
        if self.image is not None:
            pixels = [self._pixels(row, image) for row, image in list(enumerate(images))[batch]]
            values["pixel_values"] = np.stack(pixels)
            values["image_mask"] = np.array([image is not None for image in images[batch]])
        if self.tokenizer is not None:
            encodings = self.tokenizer.encode_batch([text or "" for text in texts[batch]])
            values["input_ids"] = np.array([encoding.ids for encoding in encodings], np.int64)
            values["attention_mask"] = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            values["token_type_ids"] = np.array([encoding.type_ids for encoding in encodings], np.int64)
            values["text_mask"] = np.array([text is not None for text in texts[batch]])
        return {given.name: values[given.name] for given in self.session.get_inputs()}

    def _pixels(self, row: int, image: Any) -> np.ndarray:
        """Resize the image to fit a black square, centre it there and normalise it: `(3, size, size)`."""
        size = self.image["size"]
        if image is None:
            return np.zeros((3, size, size), np.float32)
        try:
            with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
                upright = to_rgb(opened)
        except Exception as error:  # Pillow's decoders raise nearly everything
            raise ValueError(f"row {row}: cannot read the image {image}: {error}") from error
        width, height = (max(1, round(edge * size / max(upright.size))) for edge in upright.size)
        square = Image.new("RGB", (size, size))
        resized = upright.resize((width, height), self.image["resample"])
        square.paste(resized, ((size - width) // 2, (size - height) // 2))
        values = np.asarray(square, np.float32) * self.image["scale"]
        values = (values - self.image["mean"]) / self.image["std"]
        return values.transpose(2, 0, 1).astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Convert logits to scores, float32, with the bits of the model's own scores: both are computed in float64."""
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def _as_list(rows: Any) -> list | None:
    if rows is None:
        return None
    return list(rows) if isinstance(rows, list | tuple) else [rows]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to upright 8-bit RGB, in the same way as the image processor of `hf_mmclf`."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits a channel: scale the values, Pillow would clip them
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
        peak = values.max()
        white = next((white for white in whites if peak <= white), peak)
        image = Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def main() -> None:
    """Run the command in the first lines of this file."""
    parser = argparse.ArgumentParser(description="Predict labels of images and texts, at the model's own thresholds.")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="Image files.")
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="Texts, one for each image or without images.")
    parser.add_argument("--model", default=Path(__file__).with_name("model.onnx"), help="Default: %(default)s.")
    options = parser.parse_args()
    names = options.image or options.text
    if not names:
        parser.error("give --image, --text or both")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a label
    try:
        rows = OnnxClassifier(options.model).labels(options.image, options.text)
    except ValueError as error:
        parser.error(str(error))
    for name, labels in zip(names, rows, strict=True):
        print(
            f"{' '.join(name.split())}: "
            + (", ".join(f"{label} {score:.2f}" for label, score in labels) or "no label")
        )


if __name__ == "__main__":
    main()
