"""The configuration: every architectural choice, what is frozen, and the thresholds that turn scores into labels."""

from typing import Any, Literal

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class MMClfConfig(PreTrainedConfig):
    r"""
    Configuration of [`MMClfForImageTextClassification`]. Either backbone may be absent; at least one must be there.

    Args:
        image_backbone (`str`, *optional*):
            Name of a timm architecture, with the tag of its weights where it matters (`"densenet121.tv_in1k"`).
            `None` means a model without pictures.
        image_backbone_args (`dict`, *optional*):
            Further arguments of `timm.create_model`, such as `{"growth_rate": 12}`.
        image_weights (`str`, *optional*):
            What the image backbone started from, for the record: `"scratch"`, a Hub name or a file's name.
        text_backbone (`str`, *optional*):
            Hub name of the pretrained text encoder that fits `text_config`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of any transformers encoder. `None` means a model without captions.
        text_weights (`str`, *optional*):
            What the text backbone started from, for the record.
        text_pooling (`str`, *optional*, defaults to `"pooler"`):
            Only for models without pictures: `"pooler"` (the encoder's own, BERT's first token) or `"mean"` (masked).
        fusion (`str`, *optional*, defaults to `"self"`):
            How the two modalities meet. `"self"`: each attends to itself; `"cross_text"`: text queries over image
            tokens; `"cross_image"`: image queries over text tokens; `"concat"`: no attention. `"label_queries"`: one
            learned query for each label attends to the tokens of both and to what the text finds in the picture, or
            to the tokens of the one modality that there is.
        fusion_layers, fusion_heads (`int`, *optional*, default to 1 and 4):
            Only for `"label_queries"`: decoder layers, and heads of all its attention.
        fusion_norm (`bool`, *optional*, defaults to `False`):
            Whether attended tokens are scaled by a learned vector and layer-normalised before their mean.
        image_tokens (`str`, *optional*, defaults to `"pooled"`):
            `"pooled"`: the pooled vector is the only token; `"spatial"`: each cell of the last feature map is one;
            `"stages"`: each of these cells with what the last map of every finer resolution has there.
        width (`int`, *optional*, defaults to 512):
            Size to which each modality is projected before the classifier.
        projection_norm (`bool`, *optional*, defaults to `False`):
            Whether BatchNorm, ReLU and dropout follow each projection.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability: after ReLU with `projection_norm`, else right before the classifier.
        learned_missing (`bool`, *optional*, defaults to `False`):
            Whether a learned vector stands in for an absent picture or caption. Without it a zero vector does.
        modality_dropout (`float`, *optional*, defaults to 0.0):
            Probability that a training row loses its picture or its caption, so that the model learns to do without;
            learned vectors stand in for them.
        unfrozen_image_stages (`int`, *optional*):
            Train only the last n stages of the image backbone. 0 freezes it; `None` trains all of it.
        unfrozen_text_layers (`int`, *optional*):
            Train only the last n layers of the text backbone. 0 freezes it; `None` trains all of it.
        threshold (`float`, *optional*, defaults to 0.5):
            A label is predicted when its score (sigmoid of its logit) is at least this.
        label_thresholds (`dict[str, float]`, *optional*):
            Thresholds by label name that win over `threshold`.
        missing_thresholds (`dict[str, float]`, *optional*):
            One threshold for all labels of a row without a picture (key `"image"`), one without a caption (`"text"`),
            in models that read both.
            Who sees less is less sure, and the threshold of the best F1 is half that F1 (Lipton et al. 2014).
        label_ids (`list[str]`, *optional*):
            How the labels are written in the data, where that differs from their names in `id2label`.
    """

    model_type = "mmclf"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)}

    image_backbone: str | None = None
    image_backbone_args: dict[str, Any] | None = None
    image_weights: str | None = None
    text_backbone: str | None = None
    text_config: PreTrainedConfig | dict | None = None
    text_weights: str | None = None
    text_pooling: Literal["pooler", "mean"] = "pooler"
    fusion: Literal["self", "cross_text", "cross_image", "concat", "label_queries"] = "self"
    fusion_norm: bool = False
    fusion_layers: int = 1
    fusion_heads: int = 4
    image_tokens: Literal["pooled", "spatial", "stages"] = "pooled"
    width: int = 512
    projection_norm: bool = False
    dropout: float | int = 0.0
    learned_missing: bool = False
    modality_dropout: float | int = 0.0
    unfrozen_image_stages: int | None = None
    unfrozen_text_layers: int | None = None
    threshold: float | int = 0.5
    label_thresholds: dict[str, float | int] | None = None
    missing_thresholds: dict[str, float | int] | None = None
    label_ids: list[str] | None = None
    problem_type: str | None = "multi_label_classification"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.label2id = {name: i for i, name in self.id2label.items()}  # one truth, whatever was given

    def validate_numbers(self):
        """Raises `ValueError` for numbers out of range."""
        for name in ("unfrozen_image_stages", "unfrozen_text_layers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; expected None (train all), 0 (train none) or more")
        for name in ("width", "fusion_layers", "fusion_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.fusion == "label_queries" and self.width % self.fusion_heads:
            raise ValueError(f"width is {self.width}; expected a multiple of fusion_heads, {self.fusion_heads}")
        for name in ("dropout", "modality_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a probability in [0, 1)")

    def validate_labels(self):
        """Raises `ValueError` for labels misnumbered or named twice, and thresholds out of range or of none."""
        names = list(self.id2label.values())
        if sorted(self.id2label) != list(range(len(names))):
            raise ValueError(f"id2label has the keys {sorted(self.id2label)}; expected 0 to {len(names) - 1}")
        if len(set(names)) != len(names):
            raise ValueError(f"id2label gives two labels one name: {names}")
        if self.label_ids is not None and len(self.label_ids) != len(names):
            raise ValueError(f"label_ids has {len(self.label_ids)} entries; expected {len(names)}, one for each label")
        unknown = [name for name in self.label_thresholds or {} if name not in names]
        if unknown:
            raise ValueError(f"label_thresholds names unknown labels {unknown}; expected some of {names}")
        if unknown := sorted(set(self.missing_thresholds or {}) - {"image", "text"}):
            raise ValueError(f"missing_thresholds has the keys {unknown}; expected image and text, or one of them")
        values = [("threshold", self.threshold), *(self.label_thresholds or {}).items()]
        for name, value in [*values, *(self.missing_thresholds or {}).items()]:
            if not 0 <= value <= 1:
                raise ValueError(f"threshold of {name!r} is {value}; expected a probability in [0, 1]")

    @property
    def has_image(self) -> bool:
        """`bool`: Whether the model looks at pictures."""
        return self.image_backbone is not None

    @property
    def has_text(self) -> bool:
        """`bool`: Whether the model reads captions."""
        return self.text_config is not None

    @property
    def label_names(self) -> list[str]:
        """`list[str]`: The names of the labels in the order of the logits."""
        return [self.id2label[i] for i in range(self.num_labels)]

    @property
    def thresholds(self) -> list[float]:
        """`list[float]`: One threshold for each label, in the order of the logits, for rows with all modalities."""
        own = self.label_thresholds or {}
        return [float(own.get(name, self.threshold)) for name in self.label_names]

    def thresholds_for(self, has_image: bool | np.ndarray = True, has_text: bool | np.ndarray = True) -> np.ndarray:
        """
        Return the thresholds of rows with or without an image or a text.

        Args:
            has_image, has_text (`bool` or `np.ndarray` of shape `(rows,)`, *optional*, defaults to `True`):
                Whether the row, or each of several rows, has an image and a text.

        Returns:
            `np.ndarray` of shape `(num_labels,)` or, for several rows, `(rows, num_labels)`: Float64, in the order of
            the logits.
        """
        thresholds = np.array(self.thresholds)
        if self.missing_thresholds and self.has_image and self.has_text:
            for name, present in (("text", has_text), ("image", has_image)):
                own = self.missing_thresholds.get(name, thresholds)
                thresholds = np.where(np.asarray(present, dtype=bool)[..., None], thresholds, own)
        return thresholds

    def decide(
        self,
        scores: np.ndarray,
        has_image: bool | np.ndarray = True,
        has_text: bool | np.ndarray = True,
        thresholds: np.ndarray | None = None,
    ) -> np.ndarray:
        """
        Decide which labels are predicted: those whose score is at least their threshold, compared in float64.

        Args:
            scores (`np.ndarray` of shape `(num_labels,)` or `(rows, num_labels)`): Probabilities.
            has_image, has_text (`bool` or `np.ndarray` of shape `(rows,)`, *optional*, defaults to `True`):
                As for [`~MMClfConfig.thresholds_for`].
            thresholds (`np.ndarray` of shape `(num_labels,)`, *optional*):
                Thresholds that replace those of the configuration, except where they are NaN.

        Returns:
            `np.ndarray`: Bool, of the shape of `scores`.
        """
        own = self.thresholds_for(has_image, has_text)
        if thresholds is not None:
            own = np.where(np.isnan(thresholds), own, thresholds)
        return np.asarray(scores, dtype=np.float64) >= own


__all__ = ["MMClfConfig"]
