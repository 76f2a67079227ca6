"""Losses for several labels a row, by name. Thresholds are fitted afterwards, whatever the loss.

Targets are 1, 0, or -1 where nobody knows; what is unknown has no part in any of them.
"""

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

# A loss for each decision, (N, L) as the logits and targets are: their mean over what is known is the loss.
DECISIONS: Mapping[str, Callable[[], Callable]] = MappingProxyType(
    {
        "bce": partial(nn.BCEWithLogitsLoss, reduction="none"),
        "focal": lambda: partial(
            sigmoid_focal_loss, alpha=-1, gamma=2
        ),  # Lin et al. 2017; weights are the option below
        "asymmetric": partial(AsymmetricLossMultiLabel, reduction="none"),  # Ridnik et al. 2021
        "poly": partial(PolyBinaryCrossEntropy, reduction="none"),  # Leng et al. 2022
        "distribution_balanced": partial(DistributionBalancedLoss, reduction="none"),  # Wu et al. 2020
    }
)
# Losses that compare the labels of a row with each other: Kobayashi 2023, Su et al. 2022.
RANKINGS: Mapping[str, Callable[[], Callable]] = MappingProxyType({"two_way": TwoWayLoss, "zlpr": ZlprLoss})
LOSSES = (*DECISIONS, *RANKINGS)


class MultiLabelLoss(nn.Module):
    """
    The loss of logits `(N, L)` for targets `(N, L)`, computed in fp32 whatever the logits are.

    Args:
        name (`str`, *optional*, defaults to `"bce"`):
            `"bce"`, `"focal"`, `"asymmetric"`, `"poly"`, `"distribution_balanced"`: the mean over known decisions;
            `"two_way"`, `"zlpr"`: comparisons of the labels of a row. All as timm and torchvision have them, with the
            constants of their papers.
        positives (`torch.Tensor` of shape `(L,)`, *optional*):
            Training rows that have each label; needed for weights and by `"distribution_balanced"`.
        rows (`int`, *optional*):
            Training rows.
        power (`float`, *optional*, defaults to 0.0):
            A label's positives weigh `(negatives / positives) ** power`; 0: 1, 0.5: a square root, 1: as much in all
            as its negatives.
        cap (`float`, *optional*, defaults to 10.0):
            The largest such weight.
        smoothing (`float`, *optional*, defaults to 0.0):
            Targets are drawn towards 0.5: 1 becomes `1 - smoothing / 2`.

    Raises:
        `ValueError`: an unknown name; weights or smoothing for a loss that cannot have them; weights without counts.
    """

    def __init__(
        self,
        name: str = "bce",
        positives: torch.Tensor | None = None,
        rows: int | None = None,
        power: float = 0.0,
        cap: float = 10.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
        if name in RANKINGS and (power or smoothing):
            raise ValueError(
                f"the loss {name!r} compares labels with each other, so it takes neither positive weights nor label "
                f"smoothing; leave them out, or use one of {', '.join(DECISIONS)}"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"label smoothing is {smoothing}; expected at least 0 and below 1")
        if power < 0 or cap < 1:
            raise ValueError(f"positive weights have the power {power} and the cap {cap}; expected >= 0 and >= 1")
        counted = {"class_counts": positives, "num_samples": rows} if name == "distribution_balanced" else {}
        if (power or counted) and (positives is None or not rows):
            raise ValueError(f"the loss {name!r} with these weights needs `positives` and `rows` of the training rows")
        self.by_decision, self.smoothing = name in DECISIONS, smoothing
        self.loss = {**DECISIONS, **RANKINGS}[name](**counted)
        weights = ((rows - positives) / positives.clamp(min=1)) ** power if power else None
        self.register_buffer("positive_weights", None if weights is None else weights.clamp(max=cap))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, labels = logits.float(), labels.float()
        known = labels >= 0
        if not self.by_decision:  # an unknown label becomes one that is surely absent, which has no gradient
            return self.loss(torch.where(known, logits, -1e4), labels)
        targets = labels.clamp(min=0) * (1 - self.smoothing) + self.smoothing / 2
        losses = self.loss(logits, targets)
        if self.positive_weights is not None:
            losses = losses * torch.where(labels > 0, self.positive_weights, 1)
        return (losses * known).sum() / known.sum().clamp(min=1)
