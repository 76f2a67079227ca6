"""The model: two backbones, a fusion and a classifier. Either backbone may be absent."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

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
    """Puts one vector, learned or zero, in the place of the tokens of rows without any: (B, N, D), (B, N) -> the same.

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
        return torch.where(present.unsqueeze(-1), tokens, vector), mask | ~present

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


def projection(config: MMClfConfig, width: int) -> nn.Module:
    """The way of one modality's vector into the common width."""
    linear = nn.Linear(width, config.width)
    if not config.projection_norm:
        return linear
    return nn.Sequential(linear, nn.BatchNorm1d(config.width), nn.ReLU(), nn.Dropout(config.dropout))


def through(backbone: nn.Module, boundary: str) -> Iterator[nn.Module]:
    """Yields what a backbone registers up to the end of the sub-module `boundary`.

    timm and transformers register in the order of execution, so this is what runs before the cut. A container of
    `boundary` comes too, since parameters of its own (position embeddings, say) are used before its children; so
    only look at each yielded module itself, not at its children.
    """
    modules = list(backbone.named_modules())
    last = max(i for i, (name, _) in enumerate(modules) if name == boundary or name.startswith(f"{boundary}."))
    yield from (module for _, module in modules[: last + 1])


def image_boundary(backbone: nn.Module, unfrozen: int) -> str:
    """Name of the last frozen sub-module when the last `unfrozen` stages (of timm's `feature_info`) train."""
    ends = [info["module"] for info in backbone.feature_info]
    if unfrozen >= len(ends):
        name = type(backbone).__name__
        raise ValueError(
            f"unfrozen_image_stages is {unfrozen}, but {name} has {len(ends)} stages with the stem; "
            f"give 0 to {len(ends) - 1}, or None to train all"
        )
    return ends[-unfrozen - 1]


def text_boundary(backbone: PreTrainedModel, unfrozen: int) -> str:
    """Name of the last frozen sub-module when the last `unfrozen` layers train."""
    count = backbone.config.num_hidden_layers
    kind = type(backbone).__name__
    lists = [name for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{kind} has no list of {count} layers; give unfrozen_text_layers 0 or None")
    if unfrozen >= count:
        raise ValueError(
            f"unfrozen_text_layers is {unfrozen}, but {kind} has {count} layers; give 0 to {count - 1}, or None"
        )
    return f"{lists[0]}.{count - unfrozen - 1}"


class MMClfForImageTextClassification(PreTrainedModel):
    r"""
    Any subset of labels for a picture with a caption.

    Frozen parts (see `unfrozen_image_stages` and `unfrozen_text_layers` of [`MMClfConfig`]) have no gradient, stay in
    evaluation mode also after `.train()`, and keep no activations: nothing before the cut requires a gradient, so
    autograd records nothing there.

    `MMClfForImageTextClassification(config)` has random weights; `from_backbones` loads pretrained ones.
    """

    config_class = MMClfConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it by the accumulation steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MMClfConfig):
        super().__init__(config)
        if not (config.has_image or config.has_text):
            raise ValueError("the config has neither image_backbone nor text_config; expected at least one of them")
        self._timm_made = frozenset()
        self._frozen = []
        both = config.has_image and config.has_text

        if config.has_image:
            args = config.image_backbone_args or {}
            self.image_model = timm.create_model(config.image_backbone, num_classes=0, **args)
            pooled = config.image_tokens == "pooled" or not both
            image_width = self.image_model.head_hidden_size if pooled else self.image_model.num_features
            if next(self.image_model.parameters()).device.type != "meta":
                self._timm_made = frozenset(map(id, self.image_model.modules()))
            if config.unfrozen_image_stages == 0:
                self._frozen += self.image_model.modules()
            elif config.unfrozen_image_stages is not None:
                boundary = image_boundary(self.image_model, config.unfrozen_image_stages)
                self._frozen += through(self.image_model, boundary)
        if config.has_text:
            text_class = MODEL_MAPPING[type(config.text_config)]
            pools = "add_pooling_layer" in inspect.signature(text_class).parameters
            wants_pooler = not both and config.text_pooling == "pooler"
            if wants_pooler and not pools:
                raise ValueError(f'{text_class.__name__} has no pooler: set text_pooling to "mean"')
            # an unused pooler would make DDP search for parameters without a gradient
            self.text_model = text_class(config.text_config, **({"add_pooling_layer": wants_pooler} if pools else {}))
            text_width = config.text_config.hidden_size
            if config.unfrozen_text_layers == 0:
                self._frozen += self.text_model.modules()
            elif config.unfrozen_text_layers is not None:
                self._frozen += through(self.text_model, text_boundary(self.text_model, config.unfrozen_text_layers))

        if both:
            self.missing_image = StandIn(image_width, config.learned_missing)
            self.missing_text = StandIn(text_width, config.learned_missing)
            self.fusion = Fusion(config, image_width, text_width)
            self.image_projection = projection(config, image_width)
            self.text_projection = projection(config, text_width)
            classifier_width = 2 * config.width
        else:
            classifier_width = image_width if config.has_image else text_width
        self.dropout = nn.Dropout(0.0 if both and config.projection_norm else config.dropout)
        self.classifier = nn.Linear(classifier_width, config.num_labels)
        self.post_init()
        self.train(self.training)

    def _init_weights(self, module: nn.Module):
        if id(module) in self._timm_made:
            return  # timm's own initialisation stands: transformers' would draw every convolution from N(0, 0.02)
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight)
        elif isinstance(module, ScaleNorm):
            init.ones_(module.scale)
        elif isinstance(module, StandIn) and module.vector is not None:
            init.normal_(module.vector, std=0.02)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # timm's tables of positions: not in a file, garbage after loading

    def train(self, mode: bool = True) -> "MMClfForImageTextClassification":
        """Like `nn.Module.train`, but frozen parts stay in evaluation mode and without gradients.

        `from_pretrained` replaces parameters, forgets `requires_grad` and the layout; it ends with `.eval()`, which
        comes here.
        """
        super().train(mode)
        if self.config.has_image and not all(
            parameter.is_contiguous(memory_format=torch.channels_last)
            for parameter in self.image_model.parameters()
            if parameter.ndim == 4
        ):
            self.image_model.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
        for module in self._frozen:
            # attributes of the module itself: a container of frozen and trained parts must not switch its children
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        return self

    @property
    def max_tokens(self) -> int:
        """`int`: Tokens of the longest caption that the text backbone can read."""
        positions = getattr(self.config.text_config, "max_position_embeddings", None)
        for module in self.text_model.modules():  # RoBERTa and its kin number positions from behind the padding's
            if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx:
                return positions - module.padding_idx - 1
        return positions or 2**31 - 1

    @classmethod
    def from_backbones(
        cls, config: MMClfConfig, image_weights: str | None = "hub", text_weights: str | None = "hub"
    ) -> "MMClfForImageTextClassification":
        r"""
        A model with pretrained backbones and a random rest.

        Args:
            config ([`MMClfConfig`]):
                The architecture. `image_weights` and `text_weights` of it are set to what was loaded.
            image_weights (`str`, *optional*, defaults to `"hub"`):
                `"hub"` for the weights that timm knows under `config.image_backbone`; the path of a weights file
                (`.safetensors`, `.bin`, `.pth`) or of a folder with one, as timm saves it; `None` for random ones.
            text_weights (`str`, *optional*, defaults to `"hub"`):
                `"hub"` for `config.text_backbone`; a local folder as `save_pretrained` writes it; `None` for random.

        Raises:
            `OSError`, `RuntimeError`: weights that are not there, or that do not fit the architecture.
        """
        config.image_weights = config.text_weights = None
        model = cls(config)
        if config.has_image:
            config.image_weights = model._load_image_backbone(image_weights)
        if config.has_text:
            config.text_weights = model._load_text_backbone(text_weights)
        return model

    def _load_image_backbone(self, weights: str | None) -> str:
        name, args = self.config.image_backbone, self.config.image_backbone_args or {}
        if weights is None:
            return "scratch"
        if weights == "hub":
            donor = timm.create_model(name, pretrained=True, num_classes=0, **args)
            self.image_model.load_state_dict(donor.state_dict())
            return name
        path = Path(weights)
        candidates = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise FileNotFoundError(
                f"image weights {weights!r}: no such file, nor a folder with model.safetensors or pytorch_model.bin; "
                "give one of these, or 'hub', or None"
            )
        # not strict, since the checkpoint has a classifier of its own; what else does not match is looked at here
        keys = timm.models.load_checkpoint(self.image_model, str(found[0]), strict=False)
        heads = self.image_model.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        surplus = [key for key in keys.unexpected_keys if not key.startswith(tuple(f"{head}." for head in heads))]
        if keys.missing_keys or surplus:
            raise RuntimeError(
                f"{found[0].name} does not fit {name!r}: "
                f"{len(keys.missing_keys)} tensors of the model are not in the file {keys.missing_keys[:3]}, "
                f"{len(surplus)} tensors of the file are not in the model {surplus[:3]}"
            )
        return path.name

    def _load_text_backbone(self, weights: str | None) -> str:
        if weights is None:
            return "scratch"
        source = self.config.text_backbone if weights == "hub" else weights
        if source is None:
            raise ValueError("text weights are 'hub', but config.text_backbone names no repository; name one")
        if weights != "hub" and not Path(weights).is_dir():
            raise FileNotFoundError(f"text weights {weights!r}: no such folder; give one, or 'hub', or None")
        text_class = type(self.text_model)
        # the Hub's config may be older than its model (TinyBERT's has no model_type): ours says what is built
        donor, info = text_class.from_pretrained(source, config=self.config.text_config, output_loading_info=True)
        wanted = self.text_model.state_dict()
        missing = sorted(set(info["missing_keys"]) & set(wanted))
        if missing:
            raise RuntimeError(
                f"{source!r} does not fit text_config: {len(missing)} tensors are not in it ({', '.join(missing[:3])})"
            )
        self.text_model.load_state_dict({name: donor.state_dict()[name] for name in wanted})
        return source if weights == "hub" else Path(weights).name

    def image_features(
        self, pixel_values: torch.Tensor, image_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image backbone's tokens and their mask, false for absent pictures: (B, 3, H, W) -> (B, N, D), (B, N)."""
        if image_mask is not None:  # zero times NaN is NaN: the weights' gradients must not see absent pictures
            pixel_values = torch.where(image_mask.bool()[:, None, None, None], pixel_values, 0)
        features = self.image_model.forward_features(pixel_values)
        if self.config.image_tokens == "pooled" or not self.config.has_text:
            tokens = self.image_model.forward_head(features, pre_logits=True).unsqueeze(1)
        elif features.ndim == 4:  # timm's CNNs give NCHW, its hierarchical transformers NHWC
            channels_last = features.shape[1] != self.image_model.num_features
            tokens = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        else:
            tokens = features[:, getattr(self.image_model, "num_prefix_tokens", 0) :]
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return tokens, mask if image_mask is None else mask & image_mask.bool()[:, None]

    def text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The text backbone's tokens and their mask, false for absent captions: (B, T) -> (B, N, D), (B, N).

        A model that classifies the pooler's vector has this one token.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # a row without any token would make attention divide by zero; its result is masked
        attention_mask = torch.where(mask.any(1, keepdim=True), mask, 1)
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        encoded = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)
        tokens, mask = encoded.last_hidden_state, mask.bool()
        if not self.config.has_image and self.config.text_pooling == "pooler":
            tokens, mask = encoded.pooler_output.unsqueeze(1), mask.any(1, keepdim=True)
        return tokens, mask if text_mask is None else mask & text_mask.bool()[:, None]

    def classify(
        self,
        image: tuple[torch.Tensor, torch.Tensor] | None = None,
        text: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits (B, L) of what `image_features` and `text_features` return; either may be `None` for all rows."""
        if not (self.config.has_image and self.config.has_text):
            features = masked_mean(*(text if image is None else image))
        else:
            image = self.missing_image.blank(text[0]) if image is None else image
            text = self.missing_text.blank(image[0]) if text is None else text
            image_vector, text_vector = self.fusion(*self.missing_image(*image), *self.missing_text(*text))
            features = [self.image_projection(image_vector), self.text_projection(text_vector)]
            features = torch.cat(features, dim=-1)
        return self.classifier(self.dropout(features))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
                Preprocessed pictures.
            input_ids, attention_mask, token_type_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Tokenized captions.
            image_mask, text_mask (`torch.BoolTensor` of shape `(batch,)`, *optional*):
                Whether a row has a picture, a caption. Defaults to all where the input is given, to none where not.
                What stands in the input of an absent one does not matter. A row without any token has no caption.
            labels (`torch.FloatTensor` of shape `(batch, num_labels)`, *optional*):
                Multi-hot targets. With them the output has the loss: the mean binary cross-entropy, in fp32.

        Returns:
            `SequenceClassifierOutput` with `logits` of shape `(batch, num_labels)`; scores are their sigmoids.

        Raises:
            `ValueError`: neither modality is given, or one that the model does not have.
        """
        config = self.config
        if pixel_values is not None and not config.has_image:
            raise ValueError("got pixel_values, but this model has no image backbone")
        if input_ids is not None and not config.has_text:
            raise ValueError("got input_ids, but this model has no text backbone")
        given = [value for value in (pixel_values, input_ids) if value is not None]
        if not given:
            names = ["pixel_values"] * config.has_image + ["input_ids"] * config.has_text
            raise ValueError(f"expected {' or '.join(names)}, got neither")

        image = None if pixel_values is None else self.image_features(pixel_values, image_mask)
        text = None
        if input_ids is not None:
            text = self.text_features(input_ids, attention_mask, token_type_ids, text_mask)
        logits = self.classify(image, text)
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


__all__ = ["MMClfForImageTextClassification"]
