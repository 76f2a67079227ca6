"""`Trainer` as this package trains: by a criterion, with learning rates by part."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers import Trainer

from .arguments import MMClfTrainingArguments
from .losses import MultiLabelLoss


class MMClfTrainer(Trainer):
    """`Trainer` with learning rates by part and no weight decay on one-dimensional parameters.

    `criterion` is the loss of logits and labels, a mean over the batch. `train_collator` makes batches of training
    rows where these are another kind than those to evaluate on.
    """

    args: MMClfTrainingArguments
    criterion: nn.Module = MultiLabelLoss()
    train_collator: Callable | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():  # it would be Trainer's own loss that cannot smooth; the criterion can
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
            super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The `criterion` of the model's logits, in place of the model's own loss."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.criterion(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over [`parameter_groups`]."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args), **options)
        return self.optimizer

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Leaves out a last batch of a single row where BatchNorm could not work on it; evaluation keeps all rows."""
        given = self.args.dataloader_drop_last, self.data_collator
        if not isinstance(self.train_dataset, IterableDataset):  # which has no last batch
            lonely = len(self.train_dataset) % self.args.train_batch_size == 1 < len(self.train_dataset)
            if lonely and any(isinstance(module, nn.BatchNorm1d) for module in self.model.modules()):
                self.args.dataloader_drop_last = True
        self.data_collator = self.train_collator or self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last, self.data_collator = given


def parameter_groups(model: nn.Module, args: MMClfTrainingArguments) -> list[dict[str, Any]]:
    """
    Trained parameters by learning rate and weight decay.

    Decay by dimension, not by name: names miss normalisation layers such as DenseNet's `norm5`.
    """
    backbone_rate = args.learning_rate if args.backbone_learning_rate is None else args.backbone_learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.removeprefix("module.").startswith(("image_model.", "text_model."))
        rate = backbone_rate if in_backbone else args.learning_rate
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
