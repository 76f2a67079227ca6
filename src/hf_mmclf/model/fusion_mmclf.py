"""The fusion of image and text tokens: attention, replacements of missing modalities, projections, label queries.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_mmclf import MMClfConfig


class Attention(nn.Module):
    """Scaled dot-product attention without an output projection.

    Args:
        query_width (`int`): Size of the query tokens.
        key_width (`int`): Size of the key and value tokens.
        width (`int`): Size of queries, keys and values, and so of the result.
        heads (`int`, *optional*, defaults to 1): Number of heads, a divisor of `width`.
    """

    def __init__(self, query_width: int, key_width: int, width: int, heads: int = 1):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(query_width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        """
        Attend from query tokens to key tokens.

        Args:
            queries (`torch.Tensor` of shape `(batch, queries, query_width)`): The query tokens.
            keys (`torch.Tensor` of shape `(batch, keys, key_width)`): The key and value tokens.
            key_mask (`torch.Tensor` of shape `(batch, keys)`): Which key tokens count.

        Returns:
            `torch.Tensor` of shape `(batch, queries, width)`.
        """
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, width / heads)
            for x in (self.query(queries), self.key(keys), self.value(keys))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask[:, None, None])
        return attended.transpose(1, 2).flatten(2)  # (B, Nq, width)


class PreScaledLayerNorm(nn.Module):
    """Multiply tokens by a learned vector, then apply LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens * self.scale)


class MissingModality(nn.Module):
    """Replace the tokens of rows with a missing modality by one learned or zero vector: (B, N, D), (B, N) -> the same.

    Args:
        width (`int`): Size of the tokens.
        learned (`bool`): Whether the vector is a parameter.
    """

    def __init__(self, width: int, learned: bool):
        super().__init__()
        self.width = width
        self.vector = nn.Parameter(torch.zeros(width)) if learned else None

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # where(), not multiplication, which would keep NaN of missing inputs in values and gradients
        present = mask.any(1, keepdim=True)
        vector = tokens.new_zeros(self.width) if self.vector is None else self.vector.to(tokens.dtype)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        return torch.where(present.unsqueeze(-1), tokens, vector), mask | (~present & first)

    def blank(self, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one masked token for each row of the other modality's tokens."""
        return other.new_zeros(len(other), 1, self.width), other.new_zeros(len(other), 1, dtype=torch.bool)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens where `mask` is true: (B, N, D), (B, N) -> (B, D)."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class Fusion(nn.Module):
    """Fuse image and text tokens into one vector for each modality. [`MMClfConfig`] describes the kinds of fusion."""

    def __init__(self, config: MMClfConfig, image_width: int, text_width: int):
        super().__init__()
        self.kind = config.fusion
        widths = {  # of the query tokens and of the key tokens of the attention on the image side
            "self": (image_width, image_width),
            "cross_text": (text_width, image_width),
            "cross_image": (image_width, text_width),
        }.get(self.kind)
        self.image_attention = Attention(*widths, image_width) if widths else None
        self.text_attention = Attention(text_width, text_width, text_width) if self.kind == "self" else None
        self.image_norm = PreScaledLayerNorm(image_width) if config.fusion_norm else None
        self.text_norm = PreScaledLayerNorm(text_width) if config.fusion_norm else None

    def forward(
        self, image: torch.Tensor, image_mask: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fuse the tokens of both modalities.

        Args:
            image, text (`torch.Tensor` of shape `(batch, tokens, width)`): Image tokens and text tokens.
            image_mask, text_mask (`torch.Tensor` of shape `(batch, tokens)`): Which tokens count.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: One vector for each modality, `(batch, width)`.
        """
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
    """
    A decoder with one learned query for each label, which attends to the tokens of all modalities.

    The input is one pair of tokens (B, N, D) and mask (B, N) for each modality; the output is one vector for each
    label, (B, L, width). The method is Query2Label (Liu et al. 2021, "Query2Label: A Simple Transformer Way to
    Multi-Label Classification") with texts in addition to images. With both modalities, attention from the text tokens
    to the image tokens gives a third set of tokens: the words "the red one" then carry the features of the red object.
    The means of the text tokens and of these tokens bypass the decoder and are added to the vector of each label.
    Deeper variants memorised a few thousand rows before they learned the meaning of the words.

    Args:
        config ([`MMClfConfig`]): Number of labels, width, layers, heads, dropout.
        widths (`list[int]`): Size of the tokens of each modality, images first.
    """

    def __init__(self, config: MMClfConfig, widths: list[int]):
        super().__init__()
        width = config.width
        self.grounding = Attention(widths[1], widths[0], width, config.fusion_heads) if len(widths) > 1 else None
        widths = widths if self.grounding is None else [*widths, width]
        self.projections = nn.ModuleList(nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width)) for size in widths)
        self.means = nn.ModuleList(nn.Linear(size, width) for size in widths[-2:])
        self.queries = nn.Parameter(torch.randn(config.num_labels, width))
        layer = nn.TransformerDecoderLayer(
            width, config.fusion_heads, 2 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.fusion_layers, nn.LayerNorm(width))

    def forward(self, *modalities: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if self.grounding is not None:
            (image, image_mask), (text, text_mask) = modalities
            modalities = (*modalities, (self.grounding(text, image, image_mask), text_mask))
        memory = [project(tokens) for project, (tokens, _) in zip(self.projections, modalities, strict=True)]
        means = [project(masked_mean(*tokens)) for project, tokens in zip(self.means, modalities[-2:], strict=True)]
        # A row without any token to attend to would give NaN.
        padding = torch.cat([~mask & mask.any(1, keepdim=True) for _, mask in modalities], 1)
        queries = self.queries.expand(memory[0].shape[0], -1, -1)  # not len(), which an export would make a constant
        return self.decoder(queries, torch.cat(memory, 1), memory_key_padding_mask=padding) + sum(means).unsqueeze(1)


class LabelClassifier(nn.Module):
    """One linear classifier for the vector of each label: (B, L, D) -> (B, L)."""

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, width))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors * self.weight).sum(-1) + self.bias


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d that normalises a training batch of a single row by the running statistics, not by its variance."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.training and len(vectors) == 1:
            return F.batch_norm(vectors, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(vectors)


class FeatureNorm(nn.Module):
    """
    Standardise the features of tokens and, in training, drop out the same ones in all tokens of a row.

    The scales of backbones differ, and frozen backbones have many more features than a few thousand rows can tell
    apart. A standardised feature that is dropped out is replaced by its mean, 0.

    As in BatchNorm, the statistics are those of the batch in training, and moving averages of them in evaluation; a
    batch with one row is standardised by the moving averages. Unlike in BatchNorm, only tokens that count are counted.

    Args:
        width (`int`): Size of the tokens.
        dropout (`float`): Probability that a feature of a row is dropped out.
    """

    momentum = 0.1
    eps = 1e-5

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout1d(dropout)
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Standardise tokens.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, width)`): The tokens.
            mask (`torch.Tensor` of shape `(batch, tokens)`): Which tokens count.

        Returns:
            `torch.Tensor` of the shape and type of `tokens`: Zeros where a token does not count.
        """
        counts = mask.unsqueeze(-1)
        values = torch.where(counts, tokens, 0).float()  # not multiplication: zero times NaN is NaN
        mean, variance = self.running_mean.float(), self.running_var.float()
        if self.training:
            count = counts.sum().clamp(min=1)
            own = values.sum((0, 1)) / count
            spread = torch.where(counts, (values - own).square(), 0).sum((0, 1)) / count
            several = mask.any(1).sum() > 1  # one row has no spread
            mean, variance = torch.where(several, own, mean), torch.where(several, spread, variance)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.detach().to(self.running_var.dtype), self.momentum)
        standard = torch.where(counts, (values - mean) * (variance + self.eps).rsqrt(), 0)
        return self.dropout(standard.transpose(1, 2)).transpose(1, 2).to(tokens.dtype)


def feature_norms(config: MMClfConfig, widths: dict[str, int]) -> nn.ModuleDict | None:
    """Return a [`FeatureNorm`] for each modality, given the size of its tokens, if the configuration asks for them."""
    if not (config.feature_dropout or (config.modality_classifiers and len(widths) == 2)):
        return None
    rates = {"image": config.feature_dropout, "text": 0.625 * config.feature_dropout}  # texts have fewer features
    return nn.ModuleDict({name: FeatureNorm(size, rates[name]) for name, size in widths.items()})


class ModalityClassifiers(nn.Module):
    """
    A linear classifier for the image and one for the text, each trained by a loss of its own (late fusion).

    A modality that is easier to learn keeps the other one from being learned (Wang et al. 2020, "What Makes Training
    Multi-Modal Classification Networks Hard?"). With a loss of its own each one stands on its own.

    Args:
        num_labels (`int`): Number of labels.
        image_width, text_width (`int`): Size of the image tokens and of the text tokens.
    """

    def __init__(self, num_labels: int, image_width: int, text_width: int):
        super().__init__()
        self.image = nn.Linear(image_width, num_labels)
        self.text = nn.Linear(text_width, num_labels)

    def forward(
        self, image: tuple[torch.Tensor, torch.Tensor] | None, text: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the logits of each modality from the means of its tokens.

        Args:
            image, text (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Tokens `(batch, tokens, width)` and their
                masks; `None` if all rows lack the modality.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Logits `(batch, 2, labels)`, images first, and which rows have the
            modality, `(batch, 2)`. The logits of rows that lack it are 0.
        """
        logits, present = [], []
        for tokens, other, classifier in ((image, text, self.image), (text, image, self.text)):
            if tokens is None:
                tokens = (
                    other[0].new_zeros(len(other[0]), 1, classifier.in_features),
                    torch.zeros_like(other[1][:, :1]),
                )
            present.append(tokens[1].any(1))
            logits.append(torch.where(present[-1][:, None], classifier(masked_mean(*tokens)), 0))
        return torch.stack(logits, 1), torch.stack(present, 1)


def with_losses_alone(
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    modality_logits: torch.Tensor | None,
    labels: torch.Tensor,
) -> torch.Tensor:
    """
    Compute the loss of logits and, if a modality has logits of its own, add the losses of these.

    Args:
        criterion (`Callable`): Computes a loss from logits and labels, of which -1 is unknown.
        logits (`torch.Tensor` of shape `(batch, labels)`): The logits.
        modality_logits (`torch.Tensor` of shape `(batch, 2, labels)`, *optional*): Logits of each modality, NaN where
            a row lacks it.
        labels (`torch.Tensor` of shape `(batch, labels)`): Multi-hot targets, -1 if unknown.
    """
    if modality_logits is None:
        return criterion(logits, labels)
    absent = modality_logits.isnan()
    # A row that lacks a modality has the loss of the other one already.
    loss = criterion(logits, labels.masked_fill(absent.any(1), -1))
    for own, lacks in zip(modality_logits.unbind(1), absent.unbind(1), strict=True):
        loss = loss + criterion(own.nan_to_num(), labels.masked_fill(lacks, -1))
    return loss


def projection(config: MMClfConfig, width: int) -> nn.Module:
    """Return the projection of the vector of one modality to the common width."""
    linear = nn.Linear(width, config.width)
    if not config.projection_norm:
        return linear
    return nn.Sequential(linear, RowBatchNorm(config.width), nn.ReLU(), nn.Dropout(config.dropout))
