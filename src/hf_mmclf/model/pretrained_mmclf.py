"""The base class of the model: initial and pretrained weights, frozen parts, activation checkpointing.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init

from .backbones_mmclf import freeze, load_image_weights, load_text_weights, longest_text, pooling_modules, token_kind
from .configuration_mmclf import MMClfConfig
from .fusion_mmclf import LabelClassifier, LabelQueries, MissingModality, PreScaledLayerNorm


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
    _initialized_by_timm: frozenset[int] = frozenset()  # ids of modules

    def _init_weights(self, module: nn.Module):
        if id(module) in self._initialized_by_timm:
            return  # transformers would draw every convolution from N(0, 0.02)
        if type(module).__module__.startswith("timm."):  # has own parameters that transformers does not know
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight)
        elif isinstance(module, PreScaledLayerNorm):
            init.ones_(module.scale)
        elif isinstance(module, MissingModality) and module.vector is not None:
            init.normal_(module.vector, std=0.02)
        elif isinstance(module, LabelQueries):
            init.normal_(module.queries)
        elif isinstance(module, LabelClassifier):
            init.normal_(module.weight, std=self.config.width**-0.5)
            init.zeros_(module.bias)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # timm's tables of positions, which no file holds

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
                (`.safetensors`, `.bin`, `.pth`) or of a folder with one, as timm saves it; `None` for random ones.
            text_weights (`str`, *optional*, defaults to `"hub"`):
                `"hub"` for `config.text_backbone`; a local folder of `save_pretrained`; `None` for random ones.

        Raises:
            `OSError`, `RuntimeError`: if weights are not there or do not fit the architecture.
        """
        config.image_weights = config.text_weights = None
        model = cls(config)
        if config.has_image:
            config.image_weights = load_image_weights(model.image_model, config, image_weights)
        if config.has_text:
            config.text_weights = load_text_weights(model.text_model, config.text_backbone, text_weights)
        return model

    def train(self, mode: bool = True) -> "MMClfPreTrainedModel":
        """Set training or evaluation mode as `nn.Module.train` does, but keep frozen parts in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False  # not module.eval(): a container may have children that train
        if not mode:
            self._settle_parameters()  # from_pretrained replaces parameters and calls eval() at its end
        return self

    def _settle_parameters(self) -> None:
        """Freeze parameters, and give those of convolutions the memory layout in which they are fastest."""
        freeze(self._frozen)
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
