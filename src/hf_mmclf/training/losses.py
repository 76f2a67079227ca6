"""Multi-label losses by name. Targets are 1, 0, or -1 for unknown; unknown labels do not contribute to any loss."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from timm.loss import (
    AsymmetricLossMultiLabel,
    DistributionBalancedLoss,
    PolyBinaryCrossEntropy,
    TwoWayLoss,
    ZlprLoss,
)
from torch import nn
from torchvision.ops import sigmoid_focal_loss

__all__ = ["LOSSES", "MultiLabelLoss"]

# Losses of single decisions. They return (N, L) values, whose mean over the known labels is the loss.
DECISIONS: Mapping[str, Callable[[], Callable]] = MappingProxyType(
    {
        "bce": partial(nn.BCEWithLogitsLoss, reduction="none"),
        "focal": lambda: partial(sigmoid_focal_loss, alpha=-1, gamma=2),  # Lin et al. 2017, without its weights
        "asymmetric": partial(AsymmetricLossMultiLabel, reduction="none"),  # Ridnik et al. 2021
        "poly": partial(PolyBinaryCrossEntropy, reduction="none"),  # Leng et al. 2022
        "distribution_balanced": partial(DistributionBalancedLoss, reduction="none"),  # Wu et al. 2020
    }
)
# Losses that compare the labels of a row with each other: Kobayashi 2023 and Su et al. 2022.
RANKINGS: Mapping[str, Callable[[], Callable]] = MappingProxyType({"two_way": TwoWayLoss, "zlpr": ZlprLoss})
LOSSES = (*DECISIONS, *RANKINGS)


class MultiLabelLoss(nn.Module):
    """
    Loss of logits `(N, L)` for targets `(N, L)`, computed in fp32.

    Args:
        name (`str`, *optional*, defaults to `"bce"`):
            `"bce"`, `"focal"`, `"asymmetric"`, `"poly"` and `"distribution_balanced"` are means over the known labels;
            `"two_way"` and `"zlpr"` compare the labels of a row with each other. All of them are those of timm and
            torchvision with the constants of their papers.
        positives (`torch.Tensor` of shape `(L,)`, *optional*):
            Number of training rows that have each label. Needed for weights and for `"distribution_balanced"`.
        rows (`int` or `torch.Tensor` of shape `(L,)`, *optional*):
            Number of training rows for which each label is known. Needed where `positives` is.
        power (`float`, *optional*, defaults to 0.0):
            The positives of a label have the weight `(negatives / positives) ** power`. With 0 the weight is 1; with 1
            the positives weigh as much in total as the negatives.
        cap (`float`, *optional*, defaults to 10.0):
            Upper limit of these weights.
        smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing towards 0.5: a target of 1 becomes `1 - smoothing / 2`.

    Raises:
        `ValueError`: If the name is unknown, if the loss does not support weights or smoothing, or if the counts for
            the weights are missing.
    """

    def __init__(
        self,
        name: str = "bce",
        positives: torch.Tensor | None = None,
        rows: int | torch.Tensor | None = None,
        power: float = 0.0,
        cap: float = 10.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
        if name in RANKINGS and (power or smoothing):
            raise ValueError(
                f"the loss {name!r} compares labels with each other and supports neither positive weights nor label "
                f"smoothing; leave them out, or use one of {', '.join(DECISIONS)}"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"label smoothing is {smoothing}; expected at least 0 and below 1")
        if power < 0 or cap < 1:
            raise ValueError(f"positive weights have the power {power} and the cap {cap}; expected >= 0 and >= 1")
        options, weights = {}, None
        if power or name == "distribution_balanced":
            if positives is None or rows is None:
                raise ValueError(f"the loss {name!r} with these weights needs `positives` and `rows`")
            rows = torch.as_tensor(rows).expand_as(positives)
            if power:
                negatives = (rows - positives).clamp(min=1)
                weights = ((negatives / positives.clamp(min=1)) ** power).clamp(max=cap)
            if name == "distribution_balanced":  # it has one number of rows for all labels
                most = int(rows.max())
                options = {"class_counts": positives / rows.clamp(min=1) * most, "num_samples": most}
        self.by_decision, self.smoothing = name in DECISIONS, smoothing
        self.loss = {**DECISIONS, **RANKINGS}[name](**options)
        self.register_buffer("positive_weights", weights)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss, a scalar, of logits and labels `(N, L)`. Labels are 1, 0, or -1 for unknown."""
        logits, labels = logits.float(), labels.float()
        known = labels >= 0
        if not self.by_decision:  # a very low logit of an unknown label has no gradient
            return self.loss(torch.where(known, logits, -1e4), labels)
        targets = labels.clamp(min=0) * (1 - self.smoothing) + self.smoothing / 2
        losses = self.loss(logits, targets)
        if self.positive_weights is not None:
            losses = losses * torch.where(labels > 0, self.positive_weights, 1)
        return (losses * known).sum() / known.sum().clamp(min=1)
