"""Handler of the Hub's Inference Endpoints: JSON with images in base64 and texts to labels with scores.

This file is written into the folder of each model. It needs transformers, timm, torch and torchvision alone.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from transformers import pipeline

PARAMETERS = ("threshold", "top_k", "return_all_scores")
BATCH_SIZE = 16


class EndpointHandler:
    """
    Answer requests with the labels of a model.

    Args:
        path (`str`): The folder of the model, whose code runs.
    """

    def __init__(self, path: str = "."):
        self.pipe = pipeline("image-text-classification", model=path, trust_remote_code=True)

    def __call__(self, data: Mapping[str, Any]) -> list[Any]:
        """
        Predict the labels of one row or of a list of rows.

        Args:
            data (`Mapping`):
                `inputs`: a row `{"image": ..., "text": ...}`, of which one may be missing, or a list of rows. An image
                is an encoded file (PNG, JPEG, ...) in base64, with or without `data:image/png;base64,`. `parameters`,
                optional: `threshold`, `top_k` and `return_all_scores` of the pipeline.

        Returns:
            `list[dict]` for a row: `{"label": str, "score": float}`, most likely first. A list of these for a list.

        Raises:
            `ValueError`: if the request has another form, or an image cannot be read. URLs are not fetched.
        """
        if unknown := sorted(set(data) - {"inputs", "parameters"}):
            raise ValueError(f"got the keys {unknown}; expected inputs and parameters")
        rows, parameters = data.get("inputs"), data.get("parameters") or {}
        if unknown := sorted(set(parameters) - set(PARAMETERS)):
            raise ValueError(f"got the parameters {unknown}; expected some of {', '.join(PARAMETERS)}")
        if isinstance(rows, Mapping):
            return self.pipe(_decoded(rows), **parameters)
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ValueError('inputs: expected {"image": ..., "text": ...} or a list of these')
        return self.pipe([_decoded(row) for row in rows], batch_size=BATCH_SIZE, **parameters)


def _decoded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its image as bytes."""
    image = row.get("image")
    if image is None:
        return dict(row)
    try:
        content = base64.b64decode(image.rpartition(";base64,")[2], validate=True)
    except (AttributeError, binascii.Error):
        raise ValueError("image: expected an image file in base64; URLs and paths are not read") from None
    return {**row, "image": content}
