"""The model's configuration: architecture, frozen parts, labels and decision thresholds.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

from dataclasses import field
from typing import Any, Literal

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Fields that belong to the labels of a trained model.
OF_LABELS = ("id2label", "label2id", "label_ids", "threshold", "label_thresholds", "missing_thresholds", "min_labels")


def best_labels(scores: np.ndarray, count: int) -> np.ndarray:
    """
    Find the labels with the highest scores of each row; among equal scores the first ones.

    Args:
        scores (`np.ndarray` of shape `(num_labels,)` or `(rows, num_labels)`): Probabilities.
        count (`int`): The number of labels of a row.

    Returns:
        `np.ndarray`: Bool, of the shape of `scores`.
    """
    found = np.zeros(np.shape(scores), dtype=bool)
    order = np.argsort(-np.asarray(scores), axis=-1, kind="stable")
    np.put_along_axis(found, order[..., :count], True, axis=-1)
    return found


def option(default: Any) -> Any:
    """Return a configuration field that is a command-line flag too; its help is its entry in the docstring below."""
    return field(default=default, metadata={"flag": True})


@strict
class MMClfConfig(PreTrainedConfig):
    r"""
    Configuration of [`MMClfForImageTextClassification`]. At least one of the two backbones must be given.

    Args:
        image_backbone (`str`, *optional*):
            Name of a timm architecture, with the tag of its weights if that matters (`"densenet121.tv_in1k"`).
            `None` means a model without images.
        image_backbone_args (`dict`, *optional*):
            Other arguments of `timm.create_model`, such as `{"growth_rate": 12}`.
        image_weights (`str`, *optional*):
            Initial weights of the image backbone, as a record: `"scratch"`, a Hub name or a file name.
        text_backbone (`str`, *optional*):
            Hub name of the pretrained text encoder that fits `text_config`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a transformers encoder. `None` means a model without texts.
        text_weights (`str`, *optional*):
            Initial weights of the text backbone, as a record.
        text_pooling (`str`, *optional*, defaults to `"pooler"`):
            Pooling of a model without images: `"pooler"` (the encoder's pooler) or `"mean"` (mean of the tokens).
        fusion (`str`, *optional*, defaults to `"self"`):
            Fusion of image and text. self: each attends to itself; cross_text: text tokens attend to the image;
            cross_image: image tokens attend to the text; concat: no attention; label_queries: one learned query for
            each label attends to all tokens.
        fusion_layers (`int`, *optional*, defaults to 1):
            Number of decoder layers of label_queries.
        fusion_heads (`int`, *optional*, defaults to 4):
            Number of attention heads of label_queries; must divide the width.
        fusion_norm (`bool`, *optional*, defaults to `False`):
            Scale tokens by a learned vector and apply LayerNorm after attention.
        projection_norm (`bool`, *optional*, defaults to `False`):
            Apply BatchNorm, ReLU and dropout after the projection of each modality.
        image_tokens (`str`, *optional*, defaults to `"pooled"`):
            Image tokens for the fusion. pooled: one pooled vector; spatial: the cells of the last feature map;
            stages: the same cells with the features of all finer stages (hypercolumns); mean_max: one vector with the
            mean and the maximum of the last feature map.
        width (`int`, *optional*, defaults to 512):
            Size of the vector to which each modality is projected before the classifier.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability: in the projections if they have a norm, otherwise before the classifier.
        modality_classifiers (`bool`, *optional*, defaults to `False`):
            Add a linear classifier for the image and one for the text, each with a loss of its own. The logits of a
            row are the sum of theirs and the fusion's; without one modality, those of the other one alone. All read
            standardised features, and training starts their biases at the frequencies of the labels.
        feature_dropout (`float`, *optional*, defaults to 0.0):
            Probability that an image feature of a row is dropped out in training, the same ones in all tokens; 0.625
            of it is that of a text feature. If it is above 0, features are standardised before, and training starts
            the biases at the frequencies of the labels.
        learned_missing (`bool`, *optional*, defaults to `False`):
            Represent a missing image or text by a learned vector instead of zeros. Training turns this on if a
            training row lacks one of them.
        modality_dropout (`float`, *optional*, defaults to 0.0):
            Probability that a training row loses its image or its text. Learned vectors then represent them.
        unfrozen_image_stages (`int`, *optional*):
            Train only the last n stages of the image backbone. 0 freezes all of it, `None` (-1 as a flag) trains all.
        unfrozen_text_layers (`int`, *optional*):
            Train only the last n layers of the text backbone. 0 freezes all of it, `None` (-1 as a flag) trains all.
        threshold (`float`, *optional*, defaults to 0.5):
            A label is predicted if its score (the sigmoid of its logit) is at least this.
        label_thresholds (`dict[str, float]`, *optional*):
            Thresholds by label name, which take precedence over `threshold`.
        missing_thresholds (`dict[str, float]`, *optional*):
            Thresholds of models with both backbones for rows without an image (key `"image"`) or without a text (key
            `"text"`). Scores are lower without a modality, and so is the F1-optimal threshold, which is half the best
            F1 (Lipton et al. 2014, "Optimal Thresholding of Classifiers to Maximize F1 Measure").
        min_labels (`int`, *optional*, defaults to 0):
            The number of labels that each row gets at least: those with its highest scores, whatever their thresholds.
            Training sets it to 1 if every training row has a label.
        label_ids (`list[str]`, *optional*):
            The labels as written in the data, if that differs from their names in `id2label`.

    Example:

        >>> from hf_mmclf import MMClfConfig

        >>> labels = {0: "cat", 1: "dog"}
        >>> config = MMClfConfig(image_backbone="resnet18", id2label=labels, label_thresholds={"dog": 0.3})
        >>> config.thresholds
        [0.5, 0.3]
        >>> config.decide([0.5, 0.2]).tolist()
        [True, False]
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
    fusion: Literal["self", "cross_text", "cross_image", "concat", "label_queries"] = option("self")
    fusion_layers: int = option(1)
    fusion_heads: int = option(4)
    fusion_norm: bool = option(False)
    projection_norm: bool = option(False)
    image_tokens: Literal["pooled", "spatial", "stages", "mean_max"] = option("pooled")
    width: int = option(512)
    dropout: float | int = option(0.0)
    modality_classifiers: bool = option(False)
    feature_dropout: float | int = option(0.0)
    learned_missing: bool = option(False)
    modality_dropout: float | int = option(0.0)
    unfrozen_image_stages: int | None = option(None)
    unfrozen_text_layers: int | None = option(None)
    min_labels: int = option(0)
    threshold: float | int = 0.5
    label_thresholds: dict[str, float | int] | None = None
    missing_thresholds: dict[str, float | int] | None = None
    label_ids: list[str] | None = None
    problem_type: str | None = "multi_label_classification"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.label2id = {name: i for i, name in self.id2label.items()}  # derived, whatever was given

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "MMClfConfig":
        """
        Create a configuration from a dictionary.

        Args:
            config_dict (`dict`): The content of `config.json`.
            kwargs: Fields that win over it. Labels other than those of the dictionary drop its thresholds and label
                ids, which belong to its own labels.
        """
        saved, count = config_dict.get("id2label") or {}, kwargs.get("num_labels")
        given = kwargs.get("id2label") or (count and count != len(saved) and {i: f"LABEL_{i}" for i in range(count)})
        if saved and given and {int(i): name for i, name in given.items()} != {int(i): n for i, n in saved.items()}:
            logger.warning("Other labels than those of the saved model: its thresholds and label ids are left out.")
            config_dict = {name: value for name, value in config_dict.items() if name not in OF_LABELS}
            config_dict |= {"id2label": given, "label_ids": list(given.values())}
            kwargs = {
                name: value for name, value in kwargs.items() if name not in ("id2label", "label2id", "num_labels")
            }
        return super().from_dict(config_dict, **kwargs)

    def validate_numbers(self):
        """Raise `ValueError` if a number of the architecture is out of range."""
        for name in ("unfrozen_image_stages", "unfrozen_text_layers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; expected None (train all), 0 (freeze all) or more")
        for name in ("width", "fusion_layers", "fusion_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.min_labels < 0:
            raise ValueError(f"min_labels is {self.min_labels}; expected at least 0")
        if self.fusion == "label_queries" and self.width % self.fusion_heads:
            raise ValueError(f"width is {self.width}; expected a multiple of fusion_heads, {self.fusion_heads}")
        for name in ("dropout", "feature_dropout", "modality_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a probability in [0, 1)")

    def validate_labels(self):
        """
        Raise `ValueError` if `id2label` has gaps or duplicate names, or a threshold is out of range or for an unknown
        label.
        """
        names = list(self.id2label.values())
        if sorted(self.id2label) != list(range(len(names))):
            raise ValueError(f"id2label has the keys {sorted(self.id2label)}; expected 0 to {len(names) - 1}")
        if len(set(names)) != len(names):
            raise ValueError(f"id2label has duplicate names: {names}")
        if self.label_ids is not None and not len(set(self.label_ids)) == len(self.label_ids) == len(names):
            raise ValueError(
                f"label_ids has {len(self.label_ids)} entries; expected {len(names)} different ones, one for each "
                f"label: {self.label_ids}"
            )
        unknown = [name for name in self.label_thresholds or {} if name not in names]
        if unknown:
            raise ValueError(f"label_thresholds has unknown labels {unknown}; expected some of {names}")
        if unknown := sorted(set(self.missing_thresholds or {}) - {"image", "text"}):
            raise ValueError(f"missing_thresholds has the keys {unknown}; expected image and text, or one of them")
        values = [("threshold", self.threshold), *(self.label_thresholds or {}).items()]
        for name, value in [*values, *(self.missing_thresholds or {}).items()]:
            if not 0 <= value <= 1:
                raise ValueError(f"threshold of {name!r} is {value}; expected a probability in [0, 1]")

    @property
    def has_image(self) -> bool:
        """`bool`: Whether the model has an image backbone."""
        return self.image_backbone is not None

    @property
    def has_text(self) -> bool:
        """`bool`: Whether the model has a text backbone."""
        return self.text_config is not None

    @property
    def one_modality_task(self) -> str | None:
        """`str`: The task of transformers and the Hub for which the model works; they have none for two modalities."""
        if self.has_image and self.has_text:
            return None
        return "image-classification" if self.has_image else "text-classification"

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

        The `min_labels` best labels of a row are predicted in any case.

        Args:
            scores (`np.ndarray` of shape `(num_labels,)` or `(rows, num_labels)`): Probabilities.
            has_image, has_text (`bool` or `np.ndarray` of shape `(rows,)`, *optional*, defaults to `True`):
                As for [`~MMClfConfig.thresholds_for`].
            thresholds (`np.ndarray` of shape `(num_labels,)`, *optional*):
                Thresholds that replace those of the configuration, except where they are NaN.

        Returns:
            `np.ndarray`: Bool, of the shape of `scores`.
        """
        return np.asarray(scores, dtype=np.float64) >= self.cuts(scores, has_image, has_text, thresholds)

    def cuts(
        self,
        scores: np.ndarray,
        has_image: bool | np.ndarray = True,
        has_text: bool | np.ndarray = True,
        thresholds: np.ndarray | float | None = None,
    ) -> np.ndarray:
        """
        Return the threshold of each score: 0 for the `min_labels` best ones of a row.

        Args:
            scores, has_image, has_text, thresholds: As for [`~MMClfConfig.decide`].

        Returns:
            `np.ndarray`: Float64, of the shape of `scores`.
        """
        own = self.thresholds_for(has_image, has_text)
        if thresholds is not None:
            own = np.where(np.isnan(thresholds), own, thresholds)
        return np.where(best_labels(scores, self.min_labels), 0.0, own)


__all__ = ["MMClfConfig"]
