"""What a fusion sees of a picture: one vector, the cells of the last feature map, or those of all stages.

Pushed to the Hub as code, so it imports third-party packages only and stands alone.
"""

import torch
from torch import nn
from torch.nn import functional as F


def finer_stages(backbone: nn.Module) -> dict[int, int]:
    """Of timm's `feature_info`, the last stage of each resolution above the last map's: its index and width."""
    found = {info["reduction"]: (i, info["num_chs"]) for i, info in enumerate(backbone.feature_info)}
    del found[backbone.feature_info[-1]["reduction"]]
    return dict(found.values())


def image_width(backbone: nn.Module, kind: str) -> int:
    """The width of the tokens that [`image_tokens`] makes."""
    if kind == "pooled":
        return backbone.head_hidden_size
    return backbone.num_features + (sum(finer_stages(backbone).values()) if kind == "stages" else 0)


def image_tokens(backbone: nn.Module, pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
    """
    The tokens (B, N, D) of pictures (B, 3, H, W).

    Args:
        backbone (`nn.Module`): A timm model without a classifier.
        pixel_values (`torch.Tensor`): Pictures, or the states from which `backbone` goes on.
        kind (`str`): `image_tokens` of [`MMClfConfig`]. `"stages"` are the hypercolumns of Hariharan et al. 2015,
            "Hypercolumns for Object Segmentation and Fine-grained Localization", on the grid of the last map: the
            first stages still know what the last one has no use for, colours say.

    Raises:
        `ValueError`: `"stages"` of a backbone with several resolutions that ends in a row of tokens.
    """
    stages = list(finer_stages(backbone)) if kind == "stages" else []
    if stages:
        features, maps = backbone.forward_intermediates(pixel_values, indices=stages)
    else:
        features, maps = backbone.forward_features(pixel_values), []
    if kind == "pooled":
        return backbone.forward_head(features, pre_logits=True).unsqueeze(1)
    if features.ndim != 4:
        if stages:
            raise ValueError(
                f"image_tokens is 'stages', but {type(backbone).__name__} ends in no feature map; give 'spatial'"
            )
        return features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    # timm's CNNs give NCHW, its hierarchical transformers NHWC
    features = features if features.shape[1] == backbone.num_features else features.permute(0, 3, 1, 2)
    maps = [F.adaptive_avg_pool2d(finer, features.shape[2:]) for finer in maps]
    return torch.cat([features, *maps], 1).flatten(2).transpose(1, 2)
