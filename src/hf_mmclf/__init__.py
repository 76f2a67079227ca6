"""Several labels for every picture with a caption: models, data, training, evaluation."""

import logging
import os
import sys
from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .model.configuration_mmclf import MMClfConfig
from .model.image_processing_mmclf import MMClfImageProcessor
from .model.modeling_mmclf import MMClfForImageTextClassification
from .model.pipeline_mmclf import TASK, ImageTextClassificationPipeline, pipeline
from .model.processing_mmclf import MMClfProcessor

# transformers registers classes, not names, so these are imported; the rest is when it is first asked for.
_LAZY = {
    "PRESETS": "presets",
    "DataArguments": "data.prepare",
    "FinishedModel": "inference.predictor",
    "Predictor": "inference.predictor",
    "ModelArguments": "training.arguments",
    "AugmentationArguments": "data.augmentation",
    "MMClfTrainer": "training.trainer",
    "MMClfTrainingArguments": "training.arguments",
    "MultiLabelLoss": "training.losses",
    "MultiLabelMetric": "evaluation.evaluate_metric",
    "best_threshold": "evaluation.thresholds",
    "build_trainer": "training.train",
    "compare": "inference.comparison",
    "config_from_preset": "presets",
    "demo_dataset": "data.demo",
    "explain": "inference.explanation",
    "export_onnx": "export.onnx",
    "label_thresholds": "evaluation.thresholds",
    "parse_arguments": "training.arguments",
    "push_to_hub": "hub.push",
    "save_for_hub": "hub.push",
    "train": "training.train",
}

__all__ = [
    "ImageTextClassificationPipeline",
    "MMClfConfig",
    "MMClfForImageTextClassification",
    "MMClfImageProcessor",
    "MMClfProcessor",
    "pipeline",
    *_LAZY,
]

AutoConfig.register(MMClfConfig.model_type, MMClfConfig)
AutoModel.register(MMClfConfig, MMClfForImageTextClassification)
AutoImageProcessor.register(MMClfConfig, image_processor_classes={"torchvision": MMClfImageProcessor})
AutoProcessor.register(MMClfConfig, MMClfProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, ImageTextClassificationPipeline, pt_model=AutoModel)

# From now on save_pretrained writes their code, too, and where it is: so they load where this package is not.
MMClfConfig.register_for_auto_class()
MMClfForImageTextClassification.register_for_auto_class("AutoModel")
MMClfImageProcessor.register_for_auto_class()


class _StandardError(logging.StreamHandler):
    """Write notices of the main process to the current `sys.stderr`, which notebooks and tests replace."""

    def __init__(self):
        super().__init__()
        self.addFilter(lambda record: os.environ.get("RANK", "0") == "0")

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value):
        pass


_logger = logging.getLogger(__name__)
if not _logger.handlers:
    _logger.addHandler(_StandardError())
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
