"""Pretrained weights for backbones that have been built: from the Hub, a folder or a file.

Pushed to the Hub as code, so it imports third-party packages only and stands alone.
"""

import pickle
from pathlib import Path
from typing import Any

import timm
from torch import nn
from transformers import PreTrainedModel


def load_image_weights(backbone: nn.Module, name: str, args: dict[str, Any], weights: str | None) -> str:
    """
    Loads weights into an image backbone and returns what they are, for the record.

    Args:
        backbone (`nn.Module`): What timm makes of `name` and `args`, without a classifier.
        weights (`str`, *optional*): See `from_backbones` of the model.
    """
    if weights is None:
        return "scratch"
    if weights == "hub":
        donor = timm.create_model(name, pretrained=True, num_classes=0, **args)
        backbone.load_state_dict(donor.state_dict())
        return name
    path = Path(weights)
    candidates = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if not found:
        raise FileNotFoundError(
            f"image weights {weights!r}: no such file, nor a folder with model.safetensors or pytorch_model.bin; "
            "give one of these, or 'hub', or None"
        )
    # not strict, since the checkpoint has a classifier of its own; what else does not match is looked at here
    keys = timm.models.load_checkpoint(backbone, str(found[0]), strict=False)
    heads = backbone.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    surplus = [key for key in keys.unexpected_keys if not key.startswith(tuple(f"{head}." for head in heads))]
    if keys.missing_keys or surplus:
        raise RuntimeError(
            f"{found[0].name} does not fit {name!r}: "
            f"{len(keys.missing_keys)} tensors of the model are not in the file {keys.missing_keys[:3]}, "
            f"{len(surplus)} tensors of the file are not in the model {surplus[:3]}"
        )
    return path.name


def load_text_weights(backbone: PreTrainedModel, name: str | None, weights: str | None) -> str:
    """
    Loads weights into a text backbone and returns what they are, for the record.

    Args:
        backbone (`PreTrainedModel`): An encoder.
        name (`str`, *optional*): Its name on the Hub.
        weights (`str`, *optional*): See `from_backbones` of the model.
    """
    if weights is None:
        return "scratch"
    source = name if weights == "hub" else weights
    if source is None:
        raise ValueError("text weights are 'hub', but config.text_backbone names no repository; name one")
    if weights != "hub" and not Path(weights).is_dir():
        raise FileNotFoundError(f"text weights {weights!r}: no such folder; give one, or 'hub', or None")
    # the Hub's config may be older than its model (TinyBERT's has no model_type): ours says what is built
    try:
        donor, info = type(backbone).from_pretrained(source, config=backbone.config, output_loading_info=True)
    except pickle.UnpicklingError as error:  # of torch's weights-only loader
        raise OSError(
            f"text weights {source!r}: its file is not a pickle of tensors alone, and anything else is not read, "
            "since that could run any code; name a checkpoint in safetensors"
        ) from error
    wanted = backbone.state_dict()
    missing = sorted(set(info["missing_keys"]) & set(wanted))
    if missing:
        raise RuntimeError(
            f"{source!r} does not fit text_config: {len(missing)} tensors are not in it ({', '.join(missing[:3])})"
        )
    backbone.load_state_dict({name: donor.state_dict()[name] for name in wanted})
    return source if weights == "hub" else Path(weights).name
