"""`Trainer` with a criterion, learning rates by part and a collator of its own for training rows."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from .arguments import MMClfTrainingArguments
from .losses import MultiLabelLoss

BACKBONES = ("image_model", "text_model")


class MMClfTrainer(Trainer):
    """
    `Trainer` with a criterion and learning rates by part, and without weight decay on one-dimensional parameters.

    Args:
        args, kwargs:
            The arguments of `Trainer`; all of them are honoured.
        criterion (`nn.Module`, *optional*):
            Computes the loss, a mean over the batch, from logits and labels. Defaults to binary cross-entropy.
            A `compute_loss_func` wins over it.
        train_data_collator (`Callable`, *optional*):
            Makes batches of training rows where these differ from the rows to evaluate. Defaults to `data_collator`.
    """

    args: MMClfTrainingArguments

    def __init__(
        self,
        *args: Any,
        criterion: nn.Module | None = None,
        train_data_collator: Callable | None = None,
        **kwargs: Any,
    ):
        with warnings.catch_warnings():
            # Trainer warns about its own loss, which cannot smooth labels; the criterion can.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
            super().__init__(*args, **kwargs)
        self.criterion = (MultiLabelLoss() if criterion is None else criterion).to(self.args.device)
        self.train_data_collator = train_data_collator

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the `criterion` of the model's logits, in place of the model's own loss."""
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.criterion(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of all parameters with several dimensions. Name patterns miss norms such as `norm5`."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of `Trainer`, then give the parameters of the backbones their own learning rate."""
        if self.optimizer is not None or self.args.backbone_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        parts = [getattr(self.accelerator.unwrap_model(model), name, None) for name in BACKBONES]
        in_backbone = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
        for group in list(optimizer.param_groups):
            backbone = [parameter for parameter in group["params"] if id(parameter) in in_backbone]
            rest = [parameter for parameter in group["params"] if id(parameter) not in in_backbone]
            if not rest:
                group["lr"] = self.args.backbone_learning_rate
            elif backbone:
                group["params"] = rest
                optimizer.add_param_group({**group, "params": backbone, "lr": self.args.backbone_learning_rate})
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Create the loader of training rows, with `train_data_collator` where there is one."""
        collator = self.data_collator
        self.data_collator = self.train_data_collator or collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator
