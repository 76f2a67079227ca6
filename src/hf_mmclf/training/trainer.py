"""`Trainer` with a criterion, separate learning rates for the backbones, and a collator for training rows."""

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import convert_bytes
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from ..inference.folders import follow_umask
from ..inference.quiet import no_progress_bars, without_message
from ..model.fusion_mmclf import with_losses_alone
from .arguments import MMClfTrainingArguments
from .losses import MultiLabelLoss
from .progress import EvaluationLines, StepBar

BACKBONES = ("image_model", "text_model")


class MMClfTrainer(Trainer):
    """
    `Trainer` with a criterion and a learning rate of the backbones. One-dimensional parameters have no weight decay.

    Args:
        args, kwargs (`Any`):
            The arguments of `Trainer`, all of which are honoured.
        criterion (`nn.Module`, *optional*):
            Computes the loss, a mean over the batch, from logits and labels. Defaults to binary cross-entropy. A
            `compute_loss_func` takes precedence over it.
        train_data_collator (`Callable`, *optional*):
            Makes batches of training rows. Defaults to `data_collator`.

    Raises:
        `ValueError`: If `backbone_learning_rate` is set, but the optimizer was given or has no groups of parameters;
            if `neftune_noise_alpha` is set, but the model has no text backbone.
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
            # Trainer warns that its own loss cannot smooth multi-label targets; the criterion can.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
            super().__init__(*args, **kwargs)
        # Both print every log as a dictionary.
        if not self.pop_callback(PrinterCallback) and self.pop_callback(ProgressCallback):
            self.add_callback(StepBar)
        self.add_callback(EvaluationLines)
        if self.optimizer is not None and self.args.backbone_learning_rate is not None:
            raise ValueError("the optimizer is given, so backbone_learning_rate would be ignored; set it to None")
        if self.args.neftune_noise_alpha is not None and self.model.get_input_embeddings() is None:
            raise ValueError("neftune_noise_alpha is set, but the model has no text backbone to add noise to")
        self.criterion = (MultiLabelLoss() if criterion is None else criterion).to(self.args.device)
        self.train_data_collator = train_data_collator

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        Compute the `criterion` of the model's logits instead of the model's own loss.

        Args:
            model (`nn.Module`):
                The model, maybe wrapped.
            inputs (`dict[str, torch.Tensor]`):
                A batch with `labels`.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the outputs of the model too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Used by a `compute_loss_func` only.
        """
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = with_losses_alone(self.criterion, outputs["logits"], outputs.get("modality_logits"), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of all parameters with several dimensions. Name patterns miss norms such as `norm5`."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        Create the optimizer of `Trainer`, then give the parameters of the backbones their own learning rate.

        Raises:
            `ValueError`: if the optimizer has no parameter groups that could have it.
        """
        rate = self.args.backbone_learning_rate
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        parts = [getattr(model, name) for name in BACKBONES if hasattr(model, name)]
        backbones = {parameter for part in parts for parameter in part.parameters() if parameter.requires_grad}
        for group in list(optimizer.param_groups):
            inside = [parameter for parameter in group["params"] if parameter in backbones]
            rest = [parameter for parameter in group["params"] if parameter not in backbones]
            backbones.difference_update(inside)
            if not rest:
                group["lr"] = rate
            elif inside:
                group["params"] = rest
                optimizer.add_param_group({**group, "params": inside, "lr": rate})
        if backbones:
            raise ValueError(
                f"{type(optimizer).__name__} has no groups of parameters, so backbone_learning_rate would be ignored; "
                "set it to None, or choose another optimizer"
            )
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer` does, without a progress bar, and readable by others if the folder is."""
        with no_progress_bars():
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            follow_umask(output_dir or self.args.output_dir)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, without a warning about checkpoints that are written within one second."""
        with without_message("transformers.trainer_utils", "mtime may not be reliable"):
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Create the loader of training rows, with `train_data_collator` if there is one."""
        collator = self.data_collator
        self.data_collator = self.train_data_collator or collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # what writers raise if the disk is full
            folder, reason = self.args.output_dir, str(error).splitlines()[0]
            free = convert_bytes(shutil.disk_usage(folder).free)
            raise OSError(
                f"checkpoint-{self.state.global_step} cannot be saved in {folder}, which has {free} left: {reason}; "
                "free space, then --resume_from_checkpoint true goes on from the last whole checkpoint"
            ) from error
