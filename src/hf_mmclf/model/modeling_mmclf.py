"""The model: two backbones, a fusion and a classifier. Either backbone may be absent."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_mmclf import MMClfConfig
from .freezing_mmclf import cut, frozen_image_modules, frozen_text_modules, pooling_modules
from .fusion_mmclf import Fusion, LabelClassifier, LabelQueries, ScaleNorm, StandIn, masked_mean, projection
from .tokens_mmclf import image_tokens, image_width
from .weights_mmclf import load_image_weights, load_text_weights


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor) -> torch.Tensor:
    """`function` of a batch of which autograd records nothing; on a CPU four rows at a time, which its caches hold."""
    if pictures.device.type != "cpu" or len(pictures) <= 4:
        return function(pictures)
    return torch.cat([function(chunk) for chunk in pictures.split(4)])


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
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MMClfConfig):
        super().__init__(config)
        if not (config.has_image or config.has_text):
            raise ValueError("the config has neither image_backbone nor text_config; expected at least one of them")
        self._timm_made = frozenset()
        self._frozen = {"image": [], "text": []}
        self._halves = {}  # of each backbone, once asked for: before the cut and after it
        self._recomputing = False
        both = config.has_image and config.has_text

        if config.has_image:
            args = config.image_backbone_args or {}
            self.image_model = timm.create_model(config.image_backbone, num_classes=0, **args)
            picture_width = image_width(self.image_model, self._token_kind)
            if next(self.image_model.parameters()).device.type != "meta":
                self._timm_made = frozenset(map(id, self.image_model.modules()))
            self._frozen["image"] = frozen_image_modules(self.image_model, config.unfrozen_image_stages)
        if config.has_text:
            text_class = MODEL_MAPPING[type(config.text_config)]
            pools = "add_pooling_layer" in inspect.signature(text_class).parameters
            wants_pooler = self._text_is_pooled
            if wants_pooler and not pools:
                raise ValueError(f'{text_class.__name__} has no pooler: set text_pooling to "mean"')
            # an unused pooler would make DDP search for parameters without a gradient
            self.text_model = text_class(config.text_config, **({"add_pooling_layer": wants_pooler} if pools else {}))
            text_width = config.text_config.hidden_size
            self._frozen["text"] = frozen_text_modules(self.text_model, config.unfrozen_text_layers)

        queries = config.fusion == "label_queries"
        if both:
            learned = config.learned_missing or config.modality_dropout > 0
            self.missing_image, self.missing_text = StandIn(picture_width, learned), StandIn(text_width, learned)
        if queries:
            widths = ([picture_width] if config.has_image else []) + ([text_width] if config.has_text else [])
            self.fusion = LabelQueries(config, widths)
        elif both:
            self.fusion = Fusion(config, picture_width, text_width)
            self.image_projection = projection(config, picture_width)
            self.text_projection = projection(config, text_width)
            classifier_width = 2 * config.width
        else:
            classifier_width = picture_width if config.has_image else text_width
        self.dropout = nn.Dropout(0.0 if both and config.projection_norm else config.dropout)
        if queries:
            self.classifier = LabelClassifier(config.width, config.num_labels)
        else:
            self.classifier = nn.Linear(classifier_width, config.num_labels)
        self.post_init()
        self._settle_parameters()
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
        elif isinstance(module, LabelQueries):
            init.normal_(module.queries)
        elif isinstance(module, LabelClassifier):
            init.normal_(module.weight, std=self.config.width**-0.5)
            init.zeros_(module.bias)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # timm's tables of positions: not in a file, garbage after loading

    def train(self, mode: bool = True) -> "MMClfForImageTextClassification":
        """Like `nn.Module.train`, but frozen parts stay in evaluation mode.

        `.eval()` also settles gradients and layout again, which `from_pretrained` forgets where it replaces
        parameters: it ends with `.eval()`.
        """
        super().train(mode)
        for module in (*self._frozen["image"], *self._frozen["text"]):
            module.training = False  # not module.eval(): a container may have parts that train
        if not mode:
            self._settle_parameters()
        return self

    def _settle_parameters(self) -> None:
        """Frozen parameters ask for no gradient; those of convolutions get the layout in which they are fastest."""
        if self.config.has_image and not all(
            parameter.is_contiguous(memory_format=torch.channels_last)
            for parameter in self.image_model.parameters()
            if parameter.ndim == 4
        ):
            self.image_model.to(memory_format=torch.channels_last)
        for module in (*self._frozen["image"], *self._frozen["text"]):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if self.config.has_image and self._token_kind != "pooled":
            for module in pooling_modules(self.image_model):  # DDP takes no parameter that nothing uses
                module.requires_grad_(False)

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers of the frozen parts, by name."""
        frozen = {id(module) for modules in self._frozen.values() for module in modules}
        for name, module in self.named_modules():
            if id(module) in frozen:
                yield from module.named_parameters(name, recurse=False)
                yield from module.named_buffers(name, recurse=False)

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
            config.image_weights = load_image_weights(
                model.image_model, config.image_backbone, config.image_backbone_args or {}, image_weights
            )
        if config.has_text:
            config.text_weights = load_text_weights(model.text_model, config.text_backbone, text_weights)
        return model

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Computes activations of the backbones again when they are needed, instead of keeping them.

        The image backbone does so as timm provides for; running statistics still see each batch once. The arguments
        are those of `PreTrainedModel` and go to the text backbone.

        Raises:
            `ValueError`: the image backbone cannot do that.
        """
        if self.config.has_text:
            super().activation_checkpointing_enable(*args, **kwargs)
        if not self.config.has_image:
            return
        try:
            self.image_model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):  # which is how timm declines
            raise ValueError(f"{self.config.image_backbone} has no activation checkpointing in timm") from None

        def once(module: nn.Module, _: tuple, momentum: float | None) -> None:
            module.momentum = 0.0 if self._recomputing else momentum
            if self._recomputing and module.training:
                module.num_batches_tracked -= 1

        for module in self.image_model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.register_forward_pre_hook(partial(once, momentum=module.momentum))

    @property
    def _token_kind(self) -> str:
        config = self.config
        return config.image_tokens if config.has_text or config.fusion == "label_queries" else "pooled"

    def _image_tokens(self, backbone: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        return image_tokens(backbone, pixel_values, self._token_kind)

    def _image_halves(self, example: torch.Tensor) -> tuple[nn.Module, nn.Module] | None:
        if self._token_kind == "stages":
            return None  # the second half would lack the maps of the first
        if "image" not in self._halves:
            self._halves["image"] = cut(
                self.image_model,
                self._frozen["image"],
                lambda backbone: backbone.forward_features(example),
                lambda backbone, states: backbone.forward_features(states),
            )
        return self._halves["image"]

    @torch.no_grad()
    def frozen_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """What the frozen part of the image backbone makes of pictures (B, 3, H, W); `forward` can go on from there.

        The tokens (B, N, D) where all of it is frozen, else the activations at the cut; `None` where nothing is
        frozen, the architecture cannot be cut, or part of it trains and tokens are of all stages.
        """
        if self.config.unfrozen_image_stages == 0:
            return in_chunks(partial(self._image_tokens, self.image_model), pixel_values)
        halves = self._image_halves(pixel_values[:1])
        return in_chunks(halves[0].forward_features, pixel_values) if halves else None

    def encode_image(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image backbone's tokens and their mask, false for absent pictures: (B, 3, H, W) -> (B, N, D), (B, N).

        `features` of `frozen_image_features` can stand for the pictures.
        """
        self._recomputing = False
        backbone = self.image_model
        if features is None:
            if image_mask is not None:  # zero times NaN is NaN: the weights' gradients must not see absent pictures
                pixel_values = torch.where(image_mask.bool()[:, None, None, None], pixel_values, 0)
            by_parts = pixel_values.device.type == "cpu" and not (
                torch.compiler.is_compiling() or pixel_values.requires_grad
            )
            features = self.frozen_image_features(pixel_values) if by_parts else None
        if features is None:
            run = partial(self._image_tokens, backbone)
            chunked = by_parts and not (self.training or torch.is_grad_enabled())
            tokens = in_chunks(run, pixel_values) if chunked else run(pixel_values)
        elif self.config.unfrozen_image_stages == 0:
            tokens = features
        else:
            tokens = self._image_tokens(self._halves["image"][1], features)
        self._recomputing = True  # what normalisation sees from now on, in the backward pass, it has seen before
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return tokens, mask if image_mask is None else mask & image_mask.bool()[:, None]

    def _text_tokens(self, backbone: nn.Module, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        # a row without any token would make attention divide by zero; its result is masked
        attention_mask = torch.where(attention_mask.any(1, keepdim=True), attention_mask, 1)
        encoded = backbone(attention_mask=attention_mask, return_dict=True, **inputs)
        return encoded.pooler_output.unsqueeze(1) if self._text_is_pooled else encoded.last_hidden_state

    @property
    def _text_is_pooled(self) -> bool:
        config = self.config
        return config.text_pooling == "pooler" and not (config.has_image or config.fusion == "label_queries")

    @torch.no_grad()
    def frozen_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """What the frozen part of the text backbone makes of captions (B, T); `forward` can go on from there.

        The tokens (B, N, D) where all of it is frozen, else the activations (B, T, D) at the cut; `None` where nothing
        is frozen or the architecture cannot be cut.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self.config.unfrozen_text_layers == 0:
            return self._text_tokens(self.text_model, **given)
        if "text" not in self._halves:
            self._halves["text"] = cut(
                self.text_model,
                self._frozen["text"],
                lambda backbone: backbone(**given).last_hidden_state,
                lambda backbone, states: (
                    backbone(inputs_embeds=states, attention_mask=attention_mask).last_hidden_state
                ),
            )
        halves = self._halves["text"]
        return halves[0](**given).last_hidden_state if halves else None

    def encode_text(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The text backbone's tokens and their mask, false for absent captions: (B, T) -> (B, N, D), (B, N).

        A model that classifies the pooler's vector has this one token. `features` of `frozen_text_features` can stand
        for the captions, with the mask of those.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if features is None:
            extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            tokens = self._text_tokens(self.text_model, mask, input_ids=input_ids, **extra)
        elif self.config.unfrozen_text_layers == 0:
            tokens = features
        else:
            tokens = self._text_tokens(self._halves["text"][1], mask, inputs_embeds=features)
        mask = mask.bool()
        if self._text_is_pooled:
            mask = mask.any(1, keepdim=True)
        return tokens, mask if text_mask is None else mask & text_mask.bool()[:, None]

    def _drop_modalities(
        self, like: torch.Tensor, image_mask: torch.Tensor | None, text_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks (B,) with some rows' picture or caption gone, never what is the last thing of a row."""
        image_mask, text_mask = (
            torch.ones(len(like), dtype=torch.bool, device=like.device) if mask is None else mask.bool()
            for mask in (image_mask, text_mask)
        )
        draw = torch.rand(len(like), device=like.device)
        whole, half = image_mask & text_mask, self.config.modality_dropout / 2
        return image_mask & ~(whole & (draw < half)), text_mask & ~(whole & (draw >= 1 - half))

    @torch.no_grad()
    def calibrate(self, temperature: float) -> None:
        """Divides all logits by a temperature from now on: the classifier takes it in, so that it is saved with it."""
        for parameter in self.classifier.parameters():
            parameter.div_(temperature)

    def classify(
        self,
        image: tuple[torch.Tensor, torch.Tensor] | None = None,
        text: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits (B, L) of what `image_features` and `text_features` return; either may be `None` for all rows."""
        both = self.config.has_image and self.config.has_text
        if both:
            image = self.missing_image.blank(text[0]) if image is None else image
            text = self.missing_text.blank(image[0]) if text is None else text
            image, text = self.missing_image(*image), self.missing_text(*text)
        tokens = [modality for modality in (image, text) if modality is not None]
        if self.config.fusion == "label_queries":
            features = self.fusion(*tokens)
        elif both:
            image_vector, text_vector = self.fusion(*image, *text)
            features = [self.image_projection(image_vector), self.text_projection(text_vector)]
            features = torch.cat(features, dim=-1)
        else:
            features = masked_mean(*tokens[0])
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
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
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
                Multi-hot targets, -1 where nobody knows. With them the output has the loss: the mean binary
                cross-entropy of what is known, in fp32. (`MMClfTrainer` has others.)
            image_features, text_features (`torch.FloatTensor`, *optional*):
                What the methods of these names give, in place of `pixel_values` and of `input_ids`; `attention_mask`
                is then that of the features.

        Returns:
            `SequenceClassifierOutput` with `logits` of shape `(batch, num_labels)`; scores are their sigmoids.

        Raises:
            `ValueError`: neither modality is given, or one that the model does not have.
        """
        config = self.config
        image_features, text_features = (x if x is None else x.to(self.dtype) for x in (image_features, text_features))
        has_image = pixel_values is not None or image_features is not None
        has_text = input_ids is not None or text_features is not None
        if has_image and not config.has_image:
            raise ValueError("got pixel_values, but this model has no image backbone")
        if has_text and not config.has_text:
            raise ValueError("got input_ids, but this model has no text backbone")
        if not (has_image or has_text):
            names = ["pixel_values"] * config.has_image + ["input_ids"] * config.has_text
            raise ValueError(f"expected {' or '.join(names)}, got neither")

        if self.training and config.modality_dropout and has_image and has_text:
            image_mask, text_mask = self._drop_modalities(
                input_ids if text_features is None else text_features, image_mask, text_mask
            )
        image = text = None
        if has_image:
            image = self.encode_image(pixel_values, image_mask, image_features)
        if has_text:
            text = self.encode_text(input_ids, attention_mask, token_type_ids, text_mask, text_features)
        logits = self.classify(image, text)
        loss = None
        if labels is not None:
            known = labels >= 0
            targets = labels.float().clamp(min=0)
            losses = F.binary_cross_entropy_with_logits(logits.float(), targets, weight=known.float(), reduction="sum")
            loss = losses / known.sum().clamp(min=1)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


__all__ = ["MMClfForImageTextClassification"]
