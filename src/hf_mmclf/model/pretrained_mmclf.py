"""The base class of the model: initial and pretrained weights, frozen parts, activation checkpointing.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init

from .backbones_mmclf import (
    create_image_backbone,
    freeze,
    is_pooled,
    load_image_weights,
    load_text_weights,
    longest_text,
    pooling_modules,
    token_kind,
)
from .configuration_mmclf import MMClfConfig
from .fusion_mmclf import LabelClassifier, LabelQueries, MissingModality, PreScaledLayerNorm

# The classes with which the pipelines of transformers for one modality load their models.
PIPELINE_MODELS = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
}
BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm


class MMClfPreTrainedModel(PreTrainedModel):
    """A model with an `image_model`, a `text_model` or both, of which parts may be frozen."""

    config_class = MMClfConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it by the accumulation steps
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _frozen: list[nn.Module]  # set by the subclass
    _timm_modules: frozenset[int] = frozenset()  # ids of the image backbone's modules
    _on_meta: bool = False  # whether the image backbone was created without values, as from_pretrained does

    def _init_weights(self, module: nn.Module):
        if id(module) in self._timm_modules:
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()  # tables of positions, which no file holds
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, PreScaledLayerNorm):
            init.ones_(module.scale)
        elif isinstance(module, MissingModality) and module.vector is not None:
            init.normal_(module.vector, std=0.02)
        elif isinstance(module, LabelQueries):
            init.normal_(module.queries)
        elif isinstance(module, LabelClassifier):
            init.normal_(module.weight, std=self.config.width**-0.5)
            init.zeros_(module.bias)

    @torch.no_grad()
    def initialize_weights(self):
        """Initialise what a checkpoint lacks; in the image backbone with the values of a new timm model."""
        super().initialize_weights()
        if self._on_meta:  # otherwise timm has initialised its model already
            own = self.image_model.state_dict(keep_vars=True)
            if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in own.values()):
                new = create_image_backbone(self.config).state_dict()
                for name, tensor in own.items():
                    init.copy_(tensor, new[name])  # leaves loaded tensors as they are

    @classmethod
    def from_backbones(
        cls, config: MMClfConfig, image_weights: str | None = "hub", text_weights: str | None = "hub"
    ) -> "MMClfPreTrainedModel":
        r"""
        Create a model with pretrained backbones; its other weights are random.

        Args:
            config ([`MMClfConfig`]):
                The architecture. Its `image_weights` and `text_weights` are set to the names of the loaded weights.
            image_weights (`str`, *optional*, defaults to `"hub"`):
                `"hub"` for the weights that timm knows under `config.image_backbone`; the path of a weights file
                (`.safetensors`, `.bin`, `.pth`) or of a folder with one, as timm or this class saves it; `None` for
                random ones.
            text_weights (`str`, *optional*, defaults to `"hub"`):
                `"hub"` for `config.text_backbone`; a local folder of `save_pretrained`, also of this class; `None`
                for random ones.

        Raises:
            `OSError`, `ValueError`: if weights are not there or do not fit the architecture.
        """
        config.image_weights = config.text_weights = None
        model = cls(config)
        if config.has_image:
            config.image_weights = load_image_weights(model.image_model, config, image_weights)
        if config.has_text:
            config.text_weights = load_text_weights(model.text_model, config.text_backbone, text_weights)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        Save the model, so that the pipeline of transformers for a model with one modality loads it too.

        Args:
            args, kwargs: Those of `PreTrainedModel.save_pretrained`.
        """
        if (task := self.config.one_modality_task) and self._auto_class is not None:
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = known | {PIPELINE_MODELS[task]: f"modeling_mmclf.{type(self).__name__}"}
        super().save_pretrained(*args, **kwargs)

    def train(self, mode: bool = True) -> "MMClfPreTrainedModel":
        """
        Set training or evaluation mode as `nn.Module.train` does, but keep frozen parts in evaluation mode.

        So do BatchNorm layers whose parameters were frozen later, as peft does: an adapter has no statistics of them.
        """
        super().train(mode)
        for module in self._frozen:
            module.training = False  # not module.eval(): a container may have children that train
        for module in self.modules():
            if isinstance(module, BATCH_NORMS) and module.affine and not module.weight.requires_grad:
                module.training = False
        if not mode:
            self._settle_parameters()  # from_pretrained replaces parameters and calls eval() at its end
        return self

    def _settle_parameters(self) -> None:
        """Freeze parameters, and give those of convolutions the memory layout in which they are fastest."""
        freeze(self._frozen)
        if self.config.has_text and not is_pooled(self.config) and hasattr(self.text_model, "head"):
            self.text_model.head.requires_grad_(False)  # SigLIP's pooler
        if self.config.has_image:
            self.image_model.to(memory_format=torch.channels_last)
            if token_kind(self.config) != "pooled":
                for module in pooling_modules(self.image_model):
                    module.requires_grad_(False)  # DistributedDataParallel does not allow unused parameters

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names, parameters and buffers of the frozen parts."""
        frozen = set(map(id, self._frozen))
        for name, module in self.named_modules():
            if id(module) in frozen:
                yield from module.named_parameters(name, recurse=False)
                yield from module.named_buffers(name, recurse=False)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """
        Compute the activations of the backbones again in the backward pass instead of keeping them.

        Args:
            args, kwargs: Those of `PreTrainedModel`, which the text backbone follows. timm has none.

        Raises:
            `ValueError`: if timm has no activation checkpointing for the image backbone.
        """
        if self.config.has_image:
            try:
                self.image_model.set_grad_checkpointing(True)
            except (AttributeError, AssertionError):
                raise ValueError(f"{self.config.image_backbone} has no activation checkpointing in timm") from None
        super().activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep the activations of the backbones again."""
        if self.config.has_image and self.gradient_checkpointing:
            self.image_model.set_grad_checkpointing(False)
        super().activation_checkpointing_disable()

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the embeddings of the text backbone, which resizing, NEFTune and adapters need, if there is one."""
        return self.text_model.get_input_embeddings() if self.config.has_text else None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """
        Replace the embeddings of the text backbone.

        Args:
            value (`nn.Module`): The new embeddings.

        Raises:
            `NotImplementedError`: if there is no text backbone.
        """
        if not self.config.has_text:
            raise NotImplementedError("this model has no text backbone, and so no embeddings of tokens to replace")
        self.text_model.set_input_embeddings(value)

    @property
    def max_tokens(self) -> int:
        """`int`: The largest number of tokens that the text backbone can read."""
        return longest_text(self.text_model)

    def limit_text(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> None:
        """
        Make a tokenizer truncate texts to what the text backbone can read. The limit is saved with the tokenizer.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which is changed in place.
            max_tokens (`int`, *optional*): A lower limit. Defaults to the tokenizer's own.
        """
        tokenizer.model_max_length = min(max_tokens or tokenizer.model_max_length, self.max_tokens)
