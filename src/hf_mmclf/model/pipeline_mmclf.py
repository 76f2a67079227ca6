"""Labels for pictures and captions in one call: the pipeline "image-text-classification".

Pushed to the Hub as code, so it imports third-party packages only and stands alone.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset

__all__ = ["TASK", "ImageTextClassificationPipeline", "pipeline"]

TASK = "image-text-classification"


class Records(Dataset):
    """Rows by number, as dictionaries with `image`, `text` and `index`; read when they are asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_record(index, self.rows[index])


class Columns(Sequence):
    """Columns of the same length as rows."""

    def __init__(self, **columns: Sequence | None):
        given = {name: column for name, column in columns.items() if column is not None}
        self.columns = {name: getattr(column, "iloc", column) for name, column in given.items()}  # pandas: by place
        lengths = {name: len(column) for name, column in given.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different lengths: {lengths}; expected one caption for each picture")

        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def as_record(index: int, row: Any) -> dict[str, Any]:
    """One row in the form that `preprocess` takes; `ValueError` for what is no row."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f'record {index}: got {type(row).__name__}; expected {{"image": ..., "text": ...}}, or the keyword form '
            "pipe(image=..., text=...)"
        )
    if unknown := sorted(set(row) - {"image", "text"}):
        raise ValueError(f"record {index}: got the keys {unknown}; expected image and text, or one of them")
    return {"index": index, "image": row.get("image"), "text": row.get("text")}


def is_one(value: Any) -> bool:
    """Whether this is one picture or caption, not a column of them."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim < 4
    return isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not hasattr(value, "__len__")


class ImageTextClassificationPipeline(transformers.Pipeline):
    r"""
    Labels for pictures, captions, or pairs of them.

    ```python
    pipe({"image": "dog.jpg", "text": "a dog on a bench"})  # or pipe(image="dog.jpg", text="a dog on a bench")
    # [{'label': 'dog', 'score': 0.97}, {'label': 'bench', 'score': 0.61}]
    pipe([{"image": "dog.jpg"}, {"text": "a bench"}], batch_size=16)  # a list of such lists
    pipe(image=rows["image"], text=rows["text"], batch_size=16)  # columns, such as those of a `datasets` table
    ```

    A picture is a path, a URL, a PIL image, encoded bytes or an array. Either may be missing (`None`, no key, or a
    blank caption) if the model has both. A generator gives a generator.
    """

    _load_processor = True
    _load_image_processor = False
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()
        if self.processor.tokenizer is not None:  # which may not know how many positions the model has
            known = self.processor.tokenizer.model_max_length
            self.processor.tokenizer.model_max_length = min(known, self.model.max_tokens)

    def __call__(
        self, inputs: Any = None, *, image: Any = None, text: Any = None, **kwargs
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator[list[dict[str, Any]]]:
        r"""
        Args:
            inputs (`dict`, list of `dict`, generator of `dict` or `datasets.Dataset`, *optional*):
                Rows with the keys `image` and `text`, or one of them.
            image, text (*optional*):
                A picture and a caption, or a column of each, in place of `inputs`.
            threshold (`float`, `dict[str, float]` or `list[float]`, *optional*):
                In place of the model's own thresholds: for all labels, for those named, or for each in order.
            top_k (`int`, *optional*):
                At most so many labels. Without `threshold`, the most likely ones whatever the model's thresholds.
            return_all_scores (`bool`, *optional*, defaults to `False`):
                All labels, whatever their scores.
            batch_size (`int`, *optional*, defaults to 1):
                Rows in one forward pass.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that load and transform pictures.

        Returns:
            `list[dict]` for one row: `{"label": str, "score": float}`, most likely first. A list of these for a list
            or columns, a generator of them for a generator.

        Raises:
            `ValueError`: a row that is no row, has neither picture nor caption, or a picture that cannot be read; the
            row is named by its index.
        """
        if (inputs is None) == (image is None and text is None):
            raise ValueError("expected records, or pipe(image=..., text=...): one of these forms, and not both")
        if inputs is None:
            columns = [value for value in (image, text) if value is not None]
            single = [is_one(value) for value in columns]
            if any(single) and not all(single):
                raise ValueError("image and text are one column and one single value; expected two of the same kind")
            if all(single):
                inputs = {name: value for name, value in (("image", image), ("text", text)) if value is not None}
            else:
                inputs = Columns(image=image, text=text)
        if hasattr(inputs, "iloc"):  # a table of pandas
            inputs = Columns(**{str(name): inputs[name] for name in inputs.columns})
        if isinstance(inputs, Mapping):
            return super().__call__(as_record(0, inputs), **kwargs)
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable | Sequence | Dataset):
            as_record(0, inputs)  # says what is expected
        if not hasattr(inputs, "__len__"):
            return super().__call__((as_record(index, row) for index, row in enumerate(inputs)), **kwargs)
        return list(super().__call__(Records(inputs), **kwargs)) if len(inputs) else []

    def _sanitize_parameters(
        self,
        threshold: float | Mapping[str, float] | Sequence[float] | None = None,
        top_k: int | None = None,
        return_all_scores: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        options: dict[str, Any] = {}
        if threshold is not None:
            options["thresholds"] = self._thresholds(threshold)
        if top_k is not None:
            if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
                raise ValueError(f"top_k is {top_k!r}; expected a whole number of at least 1")
            options["top_k"] = top_k
        if return_all_scores is not None:
            options["return_all_scores"] = return_all_scores
        return {}, {}, options

    def _thresholds(self, given: float | Mapping[str, float] | Sequence[float]) -> np.ndarray:
        """One threshold for each label, NaN where the model's own holds."""
        config = self.model.config
        values = np.asarray(list(given.values()) if isinstance(given, Mapping) else given, dtype=np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"threshold is {given!r}; expected probabilities in [0, 1]")
        if isinstance(given, Mapping):
            if unknown := sorted(set(given) - set(config.label2id)):
                raise ValueError(f"threshold names unknown labels {unknown}; expected some of {list(config.label2id)}")
            thresholds = np.full(config.num_labels, np.nan)  # the model's own, which depends on the row
            thresholds[[config.label2id[name] for name in given]] = values
        else:
            thresholds = values
            if thresholds.shape not in ((), (config.num_labels,)):
                raise ValueError(
                    f"threshold has the shape {thresholds.shape}; expected a number, a dictionary by label name, or "
                    f"{config.num_labels} numbers, one for each label in their order"
                )
        return np.broadcast_to(thresholds, config.num_labels)

    def preprocess(self, input_: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A record to the model's inputs, with a batch of one; what the row lacks is masked."""
        index, image, text = input_["index"], input_["image"], input_["text"]
        if isinstance(image, Mapping) and image.get("bytes") is None and not image.get("path"):
            image = None  # a cell of a `datasets` table without a picture
        if text is not None and not isinstance(text, str):
            raise ValueError(f"record {index}: the text is {type(text).__name__}; expected a string")
        if image is None and not (text or "").strip():
            raise ValueError(f"record {index} has neither a picture nor a caption; expected at least one of them")
        if image is not None:
            try:
                image = self.processor.image_processor.fetch_images(image) if self.processor.image_processor else image
            except Exception as error:  # Pillow's decoders raise nearly everything
                raise ValueError(f"record {index}: cannot read the picture {_name(image)}: {error}") from error
        given = {}  # of what the model has, also what is absent; of what it does not have, the processor complains
        if image is not None or self.processor.image_processor is not None:
            given["images"] = [image]
        if text is not None or self.processor.tokenizer is not None:
            given["text"] = [text]
        try:
            return dict(self.processor(**given))
        except ValueError as error:
            raise ValueError(f"record {index}: {error}") from error

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs, present = dict(model_inputs), {}
        for part, mask, names in (
            ("image", "image_mask", ("pixel_values",)),
            ("text", "text_mask", ("input_ids", "attention_mask", "token_type_ids")),
        ):
            if mask in inputs:
                present[part] = inputs[mask]
            if mask in inputs and not inputs[mask].any():  # a backbone need not run for nothing
                for name in (mask, *names):
                    inputs.pop(name, None)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return {"logits": self.model(**inputs).logits, **present}

    def postprocess(
        self,
        model_outputs: dict[str, torch.Tensor],
        thresholds: np.ndarray | None = None,
        top_k: int | None = None,
        return_all_scores: bool = False,
    ) -> list[dict[str, Any]]:
        """Labels with their scores, most likely first."""
        config = self.model.config
        scores = model_outputs["logits"][0].float().sigmoid().numpy()
        present = [bool(model_outputs.get(part, [True])[0]) for part in ("image", "text")]
        if return_all_scores or (thresholds is None and top_k is not None):
            hits = np.full(len(scores), True)
        else:
            hits = config.decide(scores, *present, thresholds=thresholds)
        order = [i for i in np.argsort(-scores, kind="stable") if hits[i]]
        return [{"label": config.id2label[int(i)], "score": float(scores[i])} for i in order[:top_k]]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes what `AutoModel`, `AutoProcessor` and `pipeline` load again, here or without this package."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        code = Path(__file__)  # transformers leaves it out where the class has been loaded from a folder
        if code.resolve() != Path(save_directory, code.name).resolve():
            shutil.copyfile(code, Path(save_directory, code.name))


def _name(image: Any) -> str:
    if isinstance(image, Mapping):
        image = image.get("path") or "in the table"
    return str(image) if isinstance(image, str | os.PathLike) else f"({type(image).__name__})"


def pipeline(model: Any, **options: Any) -> ImageTextClassificationPipeline:
    r"""
    `transformers.pipeline` for this task with the class already named: nothing of the folder is executed, so no
    `trust_remote_code` is asked for, which `transformers.pipeline` does wherever a folder names a pipeline of its own.

    Args:
        model (`str`, `Path` or [`MMClfForImageTextClassification`]):
            A folder, a name on the Hub, or a model (then with `processor=`).
        options:
            The other arguments of `transformers.pipeline`, and those of [`ImageTextClassificationPipeline`]'s call.
    """
    return transformers.pipeline(TASK, model=model, pipeline_class=ImageTextClassificationPipeline, **options)
