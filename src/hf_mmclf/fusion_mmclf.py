"""How pictures and captions meet: attention between their tokens, stand-ins for absent ones, projections.

Pushed to the Hub as code, so it imports third-party packages only and stands alone.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_mmclf import MMClfConfig


class Attention(nn.Module):
    """Single-head scaled dot-product attention without an output projection.

    Args:
        query_width (`int`): Size of the tokens that ask.
        key_width (`int`): Size of the tokens that are attended to.
        width (`int`): Size of queries, keys and values, and so of the result.
    """

    def __init__(self, query_width: int, key_width: int, width: int):
        super().__init__()
        self.query = nn.Linear(query_width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        # a dimension of one head: fused kernels and the ONNX exporter take nothing else
        query, key, value = (x[:, None] for x in (self.query(queries), self.key(keys), self.value(keys)))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask[:, None, None])
        return attended.squeeze(1)  # (B, Nq, width)


class ScaleNorm(nn.Module):
    """Tokens times a learned vector, then LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens * self.scale)


class StandIn(nn.Module):
    """One token, learned or zero, for rows without any: (B, N, D), (B, N) -> the same.

    Args:
        width (`int`): Size of the tokens.
        learned (`bool`): Whether the vector is a parameter.
    """

    def __init__(self, width: int, learned: bool):
        super().__init__()
        self.width = width
        self.vector = nn.Parameter(torch.zeros(width)) if learned else None

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # where(), not multiplication: whatever stands in the absent rows (even NaN) is dropped, with its gradient
        present = mask.any(1, keepdim=True)
        vector = tokens.new_zeros(self.width) if self.vector is None else self.vector.to(tokens.dtype)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        return torch.where(present.unsqueeze(-1), tokens, vector), mask | (~present & first)

    def blank(self, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One absent token for each row of the other modality's tokens."""
        return other.new_zeros(len(other), 1, self.width), other.new_zeros(len(other), 1, dtype=torch.bool)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens where `mask` is true: (B, N, D), (B, N) -> (B, D)."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class Fusion(nn.Module):
    """Image and text tokens in, one vector for each modality out; the kinds are described in [`MMClfConfig`]."""

    def __init__(self, config: MMClfConfig, image_width: int, text_width: int):
        super().__init__()
        self.kind = config.fusion
        widths = {  # of the tokens that ask and of those that answer, for the image-side vector
            "self": (image_width, image_width),
            "cross_text": (text_width, image_width),
            "cross_image": (image_width, text_width),
        }.get(self.kind)
        self.image_attention = Attention(*widths, image_width) if widths else None
        self.text_attention = Attention(text_width, text_width, text_width) if self.kind == "self" else None
        self.image_norm = ScaleNorm(image_width) if config.fusion_norm else None
        self.text_norm = ScaleNorm(text_width) if config.fusion_norm else None

    def forward(
        self, image: torch.Tensor, image_mask: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = image_mask  # of the tokens that end up on the image side
        if self.kind == "cross_text":
            image, mask = self.image_attention(text, image, image_mask), text_mask
        elif self.kind == "cross_image":
            image = self.image_attention(image, text, text_mask)
        elif self.kind == "self":
            image = self.image_attention(image, image, image_mask)
            text = self.text_attention(text, text, text_mask)
        if self.image_norm is not None:
            image, text = self.image_norm(image), self.text_norm(text)
        return masked_mean(image, mask), masked_mean(text, text_mask)


class LabelQueries(nn.Module):
    """One learned query for each label, which attends to the tokens of all modalities: (B, N, D), (B, N) of each in,
    one vector for each label out, (B, L, width).

    Liu et al. 2021, "Query2Label: A Simple Transformer Way to Multi-Label Classification", with captions among what is
    asked. Where there are both, the caption's tokens have looked at the picture before (as in Li et al. 2021, "Align
    before Fuse"): "the red one" is what is red there by the time that a label asks.

    Args:
        config ([`MMClfConfig`]): Number of labels, width, layers, heads, dropout.
        widths (`list[int]`): Size of the tokens of each modality.
    """

    def __init__(self, config: MMClfConfig, widths: list[int]):
        super().__init__()
        width = config.width
        self.projections = nn.ModuleList(nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width)) for size in widths)
        self.queries = nn.Parameter(torch.randn(config.num_labels, width))
        layer = nn.TransformerDecoderLayer(
            width, config.fusion_heads, 2 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.reader = nn.TransformerDecoder(layer, config.fusion_layers) if len(widths) > 1 else None
        self.decoder = nn.TransformerDecoder(layer, config.fusion_layers, nn.LayerNorm(width))

    def forward(self, *modalities: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        memory = [project(tokens) for project, (tokens, _) in zip(self.projections, modalities, strict=True)]
        # attention to nothing would be NaN
        absent = [~mask & mask.any(1, keepdim=True) for _, mask in modalities]
        if self.reader is not None:
            image, text = memory
            memory[1] = self.reader(text, image, tgt_key_padding_mask=absent[1], memory_key_padding_mask=absent[0])
        memory = torch.cat(memory, 1)
        queries = self.queries.expand(memory.shape[0], -1, -1)  # not len(): an export would keep it
        return self.decoder(queries, memory, memory_key_padding_mask=torch.cat(absent, 1))


class LabelClassifier(nn.Module):
    """A linear classifier of its own for each label's vector: (B, L, D) -> (B, L)."""

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, width))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors * self.weight).sum(-1) + self.bias


def projection(config: MMClfConfig, width: int) -> nn.Module:
    """The way of one modality's vector into the common width."""
    linear = nn.Linear(width, config.width)
    if not config.projection_norm:
        return linear
    return nn.Sequential(linear, nn.BatchNorm1d(config.width), nn.ReLU(), nn.Dropout(config.dropout))
