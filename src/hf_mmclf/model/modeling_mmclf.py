"""The model: two backbones, a fusion and a classifier. One of the backbones may be missing.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from .backbones_mmclf import (
    create_image_backbone,
    create_text_backbone,
    frozen_image_modules,
    frozen_text_modules,
    image_tokens,
    image_width,
    in_chunks,
    is_pooled,
    keep_statistics_in_backward,
    text_tokens,
    token_kind,
)
from .configuration_mmclf import MMClfConfig
from .fusion_mmclf import (
    Fusion,
    LabelClassifier,
    LabelQueries,
    MissingModality,
    ModalityClassifiers,
    feature_norms,
    masked_mean,
    projection,
    with_losses_alone,
)
from .pretrained_mmclf import MMClfPreTrainedModel

Tokens = tuple[torch.Tensor, torch.Tensor]  # (batch, tokens, width) and their mask (batch, tokens)


@dataclass
class MMClfOutput(SequenceClassifierOutput):
    """
    Output of [`MMClfForImageTextClassification`].

    Args:
        loss, logits, hidden_states, attentions: As for `SequenceClassifierOutput`.
        modality_logits (`torch.FloatTensor` of shape `(batch, 2, num_labels)`, *optional*):
            The logits of image and text alone, NaN where a row lacks the modality. Only a model with
            `modality_classifiers` has them, and only in training mode.
        embeddings (`torch.FloatTensor` of shape `(batch, size)`, *optional*):
            The fused vectors, which the classifier reads; with label queries, their mean over the labels.
    """

    modality_logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None


class MMClfForImageTextClassification(MMClfPreTrainedModel):
    r"""
    Multi-label classification of images with texts.

    `MMClfForImageTextClassification(config)` has random weights, [`~MMClfForImageTextClassification.from_backbones`]
    loads pretrained backbones. Frozen parts (see `unfrozen_image_stages` and `unfrozen_text_layers` of
    [`MMClfConfig`]) have no gradients, keep no activations, and stay in evaluation mode also after `.train()`.

    Args:
        config ([`MMClfConfig`]): The architecture.

    Raises:
        `ValueError`: if the configuration has no backbone, or its options do not fit the backbones.

    Example:

        >>> import torch
        >>> from hf_mmclf import MMClfConfig, MMClfForImageTextClassification

        >>> config = MMClfConfig(image_backbone="test_resnet", id2label={0: "cat", 1: "dog"})
        >>> model = MMClfForImageTextClassification(config).eval()
        >>> with torch.no_grad():
        ...     scores = model(pixel_values=torch.zeros(4, 3, 64, 64)).logits.sigmoid()
        >>> config.decide(scores.numpy()).shape
        (4, 2)
    """

    def __init__(self, config: MMClfConfig):
        super().__init__(config)
        if not (config.has_image or config.has_text):
            raise ValueError("the config has neither image_backbone nor text_config; expected at least one of them")
        self.gradient_checkpointing = False
        widths, frozen = {}, []
        if config.has_image:
            self.image_model = create_image_backbone(config)
            self._timm_modules = frozenset(map(id, self.image_model.modules()))
            self._on_meta = next(self.image_model.parameters()).device.type == "meta"
            widths["image"] = image_width(self.image_model, token_kind(config))
            frozen += frozen_image_modules(self.image_model, config.unfrozen_image_stages)
        if config.has_text:
            self.text_model = create_text_backbone(config)
            widths["text"] = config.text_config.hidden_size
            frozen += frozen_text_modules(self.text_model, config.unfrozen_text_layers)
        self._frozen = frozen
        self.main_input_name = "pixel_values" if config.has_image else "input_ids"
        both = len(widths) == 2
        self.feature_norms = feature_norms(config, widths)
        self.modality_classifiers = None
        if both:
            if config.modality_classifiers:
                self.modality_classifiers = ModalityClassifiers(config.num_labels, widths["image"], widths["text"])
            learned = config.learned_missing or config.modality_dropout > 0
            self.missing_image = MissingModality(widths["image"], learned)
            self.missing_text = MissingModality(widths["text"], learned)
        self.dropout = nn.Dropout(0.0 if both and config.projection_norm else config.dropout)
        if config.fusion == "label_queries":
            self.fusion = LabelQueries(config, list(widths.values()))
            self.classifier = LabelClassifier(config.width, config.num_labels)
        elif both:
            self.fusion = Fusion(config, widths["image"], widths["text"])
            self.image_projection = projection(config, widths["image"])
            self.text_projection = projection(config, widths["text"])
            self.classifier = nn.Linear(2 * config.width, config.num_labels)
        else:
            self.classifier = nn.Linear(*widths.values(), config.num_labels)
        self.post_init()
        self._settle_parameters()
        self.train(self.training)

    @can_return_tuple
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
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_embeddings: bool = False,
    ) -> MMClfOutput | tuple:
        r"""
        Compute the logits of a batch, and its loss if labels are given.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`, *optional*):
                Preprocessed images, which are cast to the model's dtype.
            input_ids, attention_mask, token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Tokenized texts.
            image_mask, text_mask (`torch.BoolTensor` of shape `(batch,)`, *optional*):
                Whether a row has an image and a text. By default all rows have what is given and lack what is not.
                The input of a missing modality has no effect. A row without tokens has no text.
            labels (`torch.FloatTensor` of shape `(batch, num_labels)`, *optional*):
                Multi-hot targets, -1 if unknown. The loss is the mean binary cross-entropy of the known ones in fp32.
            image_features, text_features (`torch.FloatTensor` of shape `(batch, tokens, width)`, *optional*):
                Frozen features, which replace `pixel_values` and `input_ids`. `attention_mask` is then their mask.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, width)`, *optional*):
                Embeddings of the tokens, which replace `input_ids`.
            output_hidden_states, output_attentions (`bool`, *optional*):
                Whether to return the hidden states and attentions of the text backbone. Default to those of `config`.
            output_embeddings (`bool`, *optional*, defaults to `False`): Whether to return the fused vectors.
            return_dict (`bool`, *optional*, defaults to `config.return_dict`):
                Whether to return an output object instead of a tuple.

        Returns:
            [`MMClfOutput`] with `logits` of shape `(batch, num_labels)`; scores are their sigmoids.

        Raises:
            `ValueError`: if no modality is given, or one that the model does not have, or if the hidden states of a
            model without texts are asked for.
        """
        image_features, text_features = (x if x is None else x.to(self.dtype) for x in (image_features, text_features))
        pixels = pixel_values if image_features is None else image_features
        tokens = next((x for x in (text_features, inputs_embeds, input_ids) if x is not None), None)
        outputs = self._outputs(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        self._check_inputs(pixels, tokens)
        if self.training and self.config.modality_dropout and pixels is not None and tokens is not None:
            image_mask, text_mask = self._drop_modalities(tokens, image_mask, text_mask)
        image = text = encoded = None
        if pixels is not None:
            image = self.encode_image(pixel_values, image_mask, image_features)
        if tokens is not None:
            if attention_mask is None:
                attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            if text_features is None:
                inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
                text_features, encoded = self._run_text(attention_mask, **inputs, **outputs)
            text = self.encode_text(attention_mask=attention_mask, text_mask=text_mask, features=text_features)
        logits, alone, embeddings = self._classify(image, text)
        return MMClfOutput(
            loss=None if labels is None else with_losses_alone(self._loss, logits, alone, labels),
            logits=logits,
            hidden_states=getattr(encoded, "hidden_states", None),
            attentions=getattr(encoded, "attentions", None),
            modality_logits=alone,
            embeddings=embeddings if output_embeddings else None,
        )

    def _outputs(self, **asked: bool | None) -> dict[str, Any]:
        """Return which outputs of the text backbone are wanted: those asked for, otherwise those of the config."""
        asked = {name: getattr(self.config, name) or None if value is None else value for name, value in asked.items()}
        if any(asked.values()) and not self.config.has_text:
            raise ValueError(f"got {asked}, but only text backbones have hidden states and attentions to return")
        return asked

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        known = labels >= 0
        targets = labels.float().clamp(min=0)
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets, weight=known.float(), reduction="sum")
        return losses / known.sum().clamp(min=1)

    def encode_image(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> Tokens:
        """
        Compute image tokens and their mask, which is false for missing images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*): Preprocessed images.
            image_mask (`torch.Tensor` of shape `(batch,)`, *optional*): Whether a row has an image; defaults to all.
            features (`torch.Tensor` of shape `(batch, tokens, width)`, *optional*):
                Features of [`~MMClfForImageTextClassification.frozen_image_features`], which replace the images.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of shapes `(batch, tokens, width)` and `(batch, tokens)`.
        """
        if features is None:
            if image_mask is not None:  # zero times NaN is NaN: no gradient must see the pixels of missing images
                pixel_values = torch.where(image_mask.bool()[:, None, None, None], pixel_values, 0)
            features = self._encode_pixels(pixel_values.to(self.dtype))
        mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        return features, mask if image_mask is None else mask & image_mask.bool()[:, None]

    def _encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        run = partial(image_tokens, self.image_model, kind=token_kind(self.config))
        frozen = self.config.unfrozen_image_stages == 0 and not pixel_values.requires_grad
        evaluated = not (self.training or torch.is_grad_enabled())
        if (frozen or evaluated) and not torch.compiler.is_compiling():
            return in_chunks(run, pixel_values)
        tokens = run(pixel_values)
        if self.gradient_checkpointing and self.training and tokens.requires_grad:
            keep_statistics_in_backward(self.image_model, tokens)
        return tokens

    def encode_text(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> Tokens:
        """
        Compute text tokens and their mask, which is false for padding and for missing texts.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(batch, length)`, *optional*):
                Tokenized texts.
            text_mask (`torch.Tensor` of shape `(batch,)`, *optional*): Whether a row has a text; defaults to all.
            features (`torch.Tensor` of shape `(batch, tokens, width)`, *optional*):
                Features of [`~MMClfForImageTextClassification.frozen_text_features`], which replace `input_ids`.
                `attention_mask` is that of the texts.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of shapes `(batch, tokens, width)` and `(batch, tokens)`. A model that
            uses the pooler's vector has one token.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if features is None:
            features, _ = self._run_text(mask, input_ids=input_ids, token_type_ids=token_type_ids)
        mask = mask.bool()
        if is_pooled(self.config):
            mask = mask.any(1, keepdim=True)
        return features, mask if text_mask is None else mask & text_mask.bool()[:, None]

    def _run_text(self, attention_mask: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
        given = {name: value for name, value in inputs.items() if value is not None}
        return text_tokens(self.text_model, is_pooled(self.config), attention_mask, **given)

    def classify(self, image: Tokens | None = None, text: Tokens | None = None) -> torch.Tensor:
        """
        Compute logits from tokens and their masks.

        Args:
            image (`tuple[torch.Tensor, torch.Tensor]`, *optional*): As `encode_image` returns them; `None` if all rows
                lack an image.
            text (`tuple[torch.Tensor, torch.Tensor]`, *optional*): As `encode_text` returns them; `None` if all rows
                lack a text.

        Returns:
            `torch.Tensor` of shape `(batch, num_labels)`.
        """
        return self._classify(image, text)[0]

    def _classify(
        self, image: Tokens | None, text: Tokens | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the logits, in training those of each modality too, and the fused vectors."""
        both = self.config.has_image and self.config.has_text
        if self.feature_norms is not None:
            image = None if image is None else (self.feature_norms["image"](*image), image[1])
            text = None if text is None else (self.feature_norms["text"](*text), text[1])
        own = None if self.modality_classifiers is None else self.modality_classifiers(image, text)
        if both:
            image = self.missing_image.blank(text[0]) if image is None else image
            text = self.missing_text.blank(image[0]) if text is None else text
            image, text = self.missing_image(*image), self.missing_text(*text)
        modalities = [tokens for tokens in (image, text) if tokens is not None]
        if self.config.fusion == "label_queries":
            features = self.fusion(*modalities)
        elif both:
            image_vector, text_vector = self.fusion(*image, *text)
            features = torch.cat([self.image_projection(image_vector), self.text_projection(text_vector)], dim=-1)
        else:
            features = masked_mean(*modalities[0])
        logits = self.classifier(self.dropout(features))
        embeddings = features.mean(1) if self.config.fusion == "label_queries" else features
        if own is None:
            return logits, None, embeddings
        alone, present = own
        logits = torch.where(present.all(1, keepdim=True), logits, 0) + alone.sum(1)
        return logits, torch.where(present.unsqueeze(-1), alone, torch.nan) if self.training else None, embeddings

    def _check_inputs(self, pixels: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        config = self.config
        if pixels is not None and not config.has_image:
            raise ValueError("got pixel_values, but this model has no image backbone")
        if tokens is not None and not config.has_text:
            raise ValueError("got input_ids, but this model has no text backbone")
        if pixels is None and tokens is None:
            names = ["pixel_values"] * config.has_image + ["input_ids"] * config.has_text
            raise ValueError(f"expected {' or '.join(names)}, got neither")

    def _drop_modalities(
        self, like: torch.Tensor, image_mask: torch.Tensor | None, text_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masks (batch,) without some images and texts, but never without the only modality of a row."""
        image_mask, text_mask = (
            torch.ones(len(like), dtype=torch.bool, device=like.device) if mask is None else mask.bool()
            for mask in (image_mask, text_mask)
        )
        draw = torch.rand(len(like), device=like.device)
        whole, half = image_mask & text_mask, self.config.modality_dropout / 2
        return image_mask & ~(whole & (draw < half)), text_mask & ~(whole & (draw >= 1 - half))

    @torch.no_grad()
    def frozen_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """Return the tokens of images (batch, 3, height, width) if the whole backbone is frozen, else `None`."""
        return self.encode_image(pixel_values)[0] if self.config.unfrozen_image_stages == 0 else None

    @torch.no_grad()
    def frozen_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """
        Compute the tokens of texts if all of the backbone is frozen, else return `None`.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(batch, length)`): Tokenized texts.
        """
        if self.config.unfrozen_text_layers != 0:
            return None
        return self.encode_text(input_ids, attention_mask, token_type_ids)[0]

    @torch.no_grad()
    def init_biases(self, frequencies: torch.Tensor) -> None:
        """
        Set the biases so that the first scores are the frequencies of the labels, between 0.001 and 0.999 (Lin et al.
        2017, "Focal Loss for Dense Object Detection"). At the rates of heads, AdamW takes thousands of steps from 0 to
        the logits of rare labels.

        Args:
            frequencies (`torch.Tensor` of shape `(num_labels,)`): Share of the training rows with each label.
        """
        logits = frequencies.clamp(1e-3, 1 - 1e-3).logit()
        alone = list(self.modality_classifiers.children()) if self.modality_classifiers else []
        for classifier in alone:
            classifier.bias.copy_(logits)
        self.classifier.bias.copy_(logits * (1 - len(alone)))  # the logits of all classifiers are summed

    @torch.no_grad()
    def calibrate(self, temperature: float) -> None:
        """Divide the parameters of all classifiers, and so all logits, by a temperature."""
        for classifier in filter(None, (self.classifier, self.modality_classifiers)):
            for parameter in classifier.parameters():
                parameter.div_(temperature)


__all__ = ["MMClfForImageTextClassification", "MMClfOutput"]
