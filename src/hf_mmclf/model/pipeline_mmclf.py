"""The pipeline "image-text-classification": labels of images and texts in one call.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
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
from transformers import AutoModel, AutoProcessor

from .configuration_mmclf import MMClfConfig
from .processing_mmclf import is_missing_image, is_missing_text, is_one, scores_of

__all__ = ["TASK", "ImageTextClassificationPipeline", "pipeline", "scores_of"]

TASK = "image-text-classification"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


class Records(Dataset):
    """A dataset of records with `image`, `text` and `index`. Rows are read when they are asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_record(index, self.rows[index])


class Columns(Sequence):
    """Columns of equal length, read row by row."""

    def __init__(self, **columns: Sequence):
        # pandas reads by position through `iloc`
        self.columns = {name: getattr(column, "iloc", column) for name, column in columns.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different lengths: {lengths}; expected one text for each image")
        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def as_record(index: int, row: Any) -> dict[str, Any]:
    """Return a row as a record for `preprocess`; raise `ValueError` if it is not a row."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f'record {index}: got {type(row).__name__}; expected {{"image": ..., "text": ...}}, or the keyword form '
            "pipe(image=..., text=...)"
        )
    if unknown := sorted(set(row) - {"image", "text"}):
        raise ValueError(f"record {index}: got the keys {unknown}; expected image and text, or one of them")
    return {"index": index, "image": row.get("image"), "text": row.get("text")}


class ImageTextClassificationPipeline(transformers.Pipeline):
    r"""
    Predict labels from images, texts, or pairs of them.

    An image is a path, a URL, a PIL image, encoded bytes or an array. A row may lack its image or its text (`None`, no
    key, or a blank text) if the model has both backbones.

    Args:
        args, kwargs: Those of `transformers.Pipeline`, and those of the call, which become its defaults.

    Example:

        >>> from PIL import Image
        >>> import hf_mmclf

        >>> config = hf_mmclf.MMClfConfig(image_backbone="test_resnet", id2label={0: "cat", 1: "dog"})
        >>> model = hf_mmclf.MMClfForImageTextClassification(config)
        >>> processor = hf_mmclf.MMClfProcessor(hf_mmclf.MMClfImageProcessor(size=64))
        >>> pipe = hf_mmclf.pipeline(model, processor=processor)
        >>> image = Image.new("RGB", (40, 30), "red")
        >>> sorted(row["label"] for row in pipe(image=image, return_all_scores=True))
        ['cat', 'dog']
        >>> len(pipe([{"image": image}, {"image": image}], top_k=1, batch_size=2))
        2
    """

    _load_processor = True
    _load_image_processor = False
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()
        if self.processor.tokenizer is not None:  # it may not know how many positions the model has
            self.model.limit_text(self.processor.tokenizer)

    def __call__(
        self, inputs: Any = None, text: Any = None, *, image: Any = None, images: Any = None, **kwargs
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator[list[dict[str, Any]]]:
        r"""
        Predict the labels of one row or of several.

        Args:
            inputs (`dict`, list of `dict`, generator of `dict` or `datasets.Dataset`, *optional*):
                Rows with the keys `image` and `text`, or one of them. With `text`, this is `image`.
            image, text (*optional*):
                One image and one text, or a column of each, instead of rows. `images` is another name of `image`.
            threshold (`float`, `dict[str, float]` or `list[float]`, *optional*):
                Thresholds that replace the model's own: one for all labels, by label name, or one for each label.
            top_k (`int`, *optional*):
                The largest number of labels. Without `threshold`, the model's thresholds are not used then.
            return_all_scores (`bool`, *optional*, defaults to `False`):
                Whether to return all labels with their scores.
            batch_size (`int`, *optional*, defaults to 1):
                The number of rows in one forward pass.
            num_workers (`int`, *optional*, defaults to 0):
                The number of processes that load and transform images.

        Returns:
            `list[dict]` for one row: `{"label": str, "score": float}`, most likely first. A list of these for a list
            or columns, a generator of them for a generator.

        Raises:
            `ValueError`: if a row has no image and no text, has other keys, or its image cannot be read. The message
            names the row by its index.
        """
        inputs = self._as_inputs(inputs, text, *(value for value in (image, images) if value is not None))
        if hasattr(inputs, "iloc"):  # a table of pandas
            inputs = Columns(**{str(name): inputs[name] for name in inputs.columns})
        if isinstance(inputs, Mapping):
            return super().__call__(as_record(0, inputs), **kwargs)
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable | Sequence | Dataset):
            as_record(0, inputs)  # raises an error that says what is expected
        if not hasattr(inputs, "__len__"):
            return super().__call__((as_record(index, row) for index, row in enumerate(inputs)), **kwargs)
        return list(super().__call__(Records(inputs), **kwargs)) if len(inputs) else []

    @staticmethod
    def _as_inputs(inputs: Any, text: Any, *images: Any) -> Any:
        """Return the records of a call; of its other forms, one row or columns."""
        if text is not None and inputs is not None:
            images, inputs = (inputs, *images), None
        if (inputs is None) == (text is None and not images) or len(images) > 1:
            raise ValueError("expected records, or pipe(image=..., text=...): one of these forms, and not both")
        if inputs is not None:
            return inputs
        given = {"image": next(iter(images), None), "text": text}
        given = {name: value for name, value in given.items() if value is not None}
        single = {is_one(value) for value in given.values()}
        if len(single) == 2:
            raise ValueError("image and text are one column and one single value; expected two of the same kind")
        return given if True in single else Columns(**given)

    def embed(
        self, inputs: Any = None, text: Any = None, *, image: Any = None, images: Any = None, batch_size: int = 1
    ) -> np.ndarray:
        """
        Compute the fused vector of one row, of shape `(size,)`, or of several, `(rows, size)`, in float32.

        Args:
            inputs, text, image, images, batch_size: As for the call, which also says what is raised.
        """
        rows = dict(image=image, images=images, batch_size=batch_size)
        found = self(inputs, text, **rows, return_embeddings=True)
        return found if isinstance(found, np.ndarray) else np.array(list(found))

    def _sanitize_parameters(
        self,
        threshold: float | Mapping[str, float] | Sequence[float] | None = None,
        top_k: int | None = None,
        return_all_scores: bool | None = None,
        return_embeddings: bool = False,
    ) -> tuple[dict, dict, dict]:
        if return_embeddings:
            return {}, {"output_embeddings": True}, {}
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
        """Return one threshold for each label, NaN where the model's own applies."""
        config = self.model.config
        values = np.asarray(list(given.values()) if isinstance(given, Mapping) else given, dtype=np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"threshold is {given!r}; expected probabilities in [0, 1]")
        if isinstance(given, Mapping):
            if unknown := sorted(set(given) - set(config.label2id)):
                raise ValueError(f"threshold has unknown labels {unknown}; expected some of {list(config.label2id)}")
            thresholds = np.full(config.num_labels, np.nan)
            thresholds[[config.label2id[name] for name in given]] = values
        else:
            thresholds = values
            if thresholds.shape not in ((), (config.num_labels,)):
                raise ValueError(
                    f"threshold has the shape {thresholds.shape}; expected a number, a dictionary by label name, or "
                    f"{config.num_labels} numbers, one for each label"
                )
        return np.broadcast_to(thresholds, config.num_labels)

    def preprocess(self, input_: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Turn a record into model inputs: a batch of one row, in which a missing modality is masked.

        Raises:
            `ValueError`: if the row has no image and no text, or one that cannot be read.
        """
        index, image, text = input_["index"], input_["image"], input_["text"]
        text = None if is_missing_text(text) else text
        if text is not None and not isinstance(text, str):
            raise ValueError(f"record {index}: the text is {type(text).__name__}; expected a string")
        image = None if is_missing_image(image) else image
        if image is None and text is None:
            raise ValueError(f"record {index} has neither an image nor a text; expected at least one of them")
        parts = {"images": (image, self.processor.image_processor), "text": (text, self.processor.tokenizer)}
        # a missing modality is given too, if the model has it; the processor refuses one that it has not
        given = {name: [value] for name, (value, part) in parts.items() if value is not None or part is not None}
        try:
            if image is not None and self.processor.image_processor is not None:
                given["images"] = [self._read(image)]
            return dict(self.processor(**given))
        except ValueError as error:
            raise ValueError(f"record {index}: {error}") from error

    def _read(self, image: Any) -> Any:
        try:
            return self.processor.image_processor.fetch_images(image)
        except Exception as error:  # Pillow's decoders raise nearly everything
            raise ValueError(f"cannot read the image {_name(image)}: {error}") from error

    def _forward(
        self, model_inputs: dict[str, torch.Tensor], output_embeddings: bool = False
    ) -> dict[str, torch.Tensor]:
        inputs, present = dict(model_inputs), {}
        for part, mask, names in (
            ("image", "image_mask", ("pixel_values",)),
            ("text", "text_mask", ("input_ids", "attention_mask", "token_type_ids")),
        ):
            if mask in inputs:
                present[part] = inputs[mask]
            if mask in inputs and not inputs[mask].any():  # no backbone runs for rows that all lack its input
                for name in (mask, *names):
                    inputs.pop(name, None)
        output = self.model(**inputs, output_embeddings=output_embeddings)
        return {"embeddings": output.embeddings} if output_embeddings else {"logits": output.logits, **present}

    def postprocess(
        self,
        model_outputs: dict[str, torch.Tensor],
        thresholds: np.ndarray | None = None,
        top_k: int | None = None,
        return_all_scores: bool = False,
    ) -> list[dict[str, Any]] | np.ndarray:
        """
        Turn the logits of one row into labels with their scores, most likely first, or return its fused vector.

        Args:
            model_outputs (`dict[str, torch.Tensor]`):
                `logits`, and whether the row has an `image` and a `text`; or `embeddings`.
            thresholds (`np.ndarray` of shape `(num_labels,)`, *optional*):
                Thresholds that replace the model's own, except where they are NaN.
            top_k, return_all_scores: As for the call.
        """
        if "embeddings" in model_outputs:
            return model_outputs["embeddings"][0].float().numpy()
        config = self.model.config
        scores = scores_of(model_outputs["logits"][0])
        if np.isnan(scores).any():
            raise ValueError("the scores are NaN; the weights are damaged, or the training diverged")
        present = [bool(model_outputs.get(part, [True])[0]) for part in ("image", "text")]
        if return_all_scores or (thresholds is None and top_k is not None):
            hits = np.full(len(scores), True)
        else:
            hits = config.decide(scores, *present, thresholds=thresholds)
        order = [i for i in np.argsort(-scores, kind="stable") if hits[i]]
        return [{"label": config.id2label[int(i)], "score": float(scores[i])} for i in order[:top_k]]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Save model, processor and code, for `AutoModel`, `AutoProcessor` and `pipeline` with or without this package.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            kwargs: The other arguments of `Pipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        code = Path(__file__)  # transformers leaves it out if the class comes from a folder
        if code.resolve() != Path(save_directory, code.name).resolve():
            shutil.copyfile(code, Path(save_directory, code.name))


def _name(image: Any) -> str:
    if isinstance(image, Mapping):
        image = image.get("path") or "in the table"
    return str(image) if isinstance(image, str | os.PathLike) else f"({type(image).__name__})"


def load_model(source: str | os.PathLike, trust_remote_code: bool = False, **options: Any) -> tuple[Any, Any]:
    """
    Load a model and its processor. No code of the source runs, and nobody is asked, unless `trust_remote_code` is set.

    Args:
        source (`str` or `os.PathLike`): A folder, or a name on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code of the source may run.
        options: The other arguments of `from_pretrained`.

    Returns:
        `tuple`: The model, in evaluation mode, and its processor.

    Raises:
        `ValueError`: if the source holds another kind of model, tensors are missing or surplus, or a file is damaged.
        `OSError`: if a file is not there.
    """
    source, hub = os.fspath(source), {name: options[name] for name in HUB_OPTIONS if name in options}
    try:
        kind = MMClfConfig.get_config_dict(source, **hub)[0].get("model_type")
        if kind != MMClfConfig.model_type:
            raise ValueError(f"a {kind} model; expected one that `hf-mmclf train` wrote")
        options = {"trust_remote_code": trust_remote_code, **options}
        model, info = AutoModel.from_pretrained(source, output_loading_info=True, **options)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # each format has errors of its own
        raise ValueError(f"{source}: cannot be loaded: {' '.join(str(error).split())}") from error
    _check_parts(source, model.config, processor, hub)
    for kind, names in (("missing", info["missing_keys"]), ("not of this model", info["unexpected_keys"])):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{source}: {len(names)} tensors of the weights are {kind}: {shown}")
    return model, processor


def _check_parts(source: str, config: MMClfConfig, processor: Any, hub: Mapping[str, Any]) -> None:
    """Raise `ValueError` if image processor or tokenizer are missing, or those of another model."""
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    if config.has_image and (
        image_processor is None or "size" not in type(image_processor).get_image_processor_dict(source, **hub)[0]
    ):  # transformers takes defaults for what is not there
        raise ValueError(f"{source}: no settings in preprocessor_config.json; copy or download the folder again")
    if config.has_text and (tokenizer is None or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)):
        raise ValueError(f"{source}: no tokenizer.json or tokenizer_config.json; copy or download the folder again")
    vocab_size = config.text_config.vocab_size if config.has_text else 0
    # A vocabulary may be a little larger than its tokenizer, for example a multiple of 64.
    if config.has_text and not 0.9 * vocab_size - 64 <= len(tokenizer) <= vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the text backbone {vocab_size}; "
            "its files are those of another model"
        )


def pipeline(
    model: Any, trust_remote_code: bool = False, allow_urls: bool = True, **options: Any
) -> ImageTextClassificationPipeline:
    r"""
    Create the pipeline of a model.

    Args:
        model (`str`, `Path` or [`MMClfForImageTextClassification`]):
            A folder, a name on the Hub, or a model (then with `processor=`).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of the folder may run. This package has the code of its own models.
        allow_urls (`bool`, *optional*, defaults to `True`):
            Whether an image may be a URL. An endpoint that strangers call should refuse URLs.
        options:
            The other arguments of `transformers.pipeline`, and those of [`ImageTextClassificationPipeline`]'s call.

    Raises:
        `ValueError`, `OSError`: As for [`load_model`].
    """
    if isinstance(model, str | os.PathLike):
        given = {name: options.pop(name) for name in (*HUB_OPTIONS, "dtype", "device_map") if name in options}
        given |= options.pop("model_kwargs", None) or {}
        model, processor = load_model(model, trust_remote_code, **given)
        options.setdefault("processor", processor)
    pipe = transformers.pipeline(TASK, model=model, pipeline_class=ImageTextClassificationPipeline, **options)
    if not allow_urls and pipe.processor.image_processor is not None:
        pipe.processor.image_processor.allow_urls = False
    return pipe
