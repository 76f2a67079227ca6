"""Image and text multi-label classification: models, data, training and evaluation."""

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .model.configuration_mmclf import MMClfConfig
from .model.image_processing_mmclf import MMClfImageProcessor
from .model.modeling_mmclf import MMClfForImageTextClassification
from .model.pipeline_mmclf import TASK, ImageTextClassificationPipeline, pipeline
from .model.processing_mmclf import MMClfProcessor

if TYPE_CHECKING:  # the names of _LAZY, for editors and type checkers
    from .data.arguments import DataArguments as DataArguments
    from .data.augmentation import AugmentationArguments as AugmentationArguments
    from .data.demo import demo_dataset as demo_dataset
    from .evaluation.evaluate_metric import MultiLabelMetric as MultiLabelMetric
    from .evaluation.thresholds import best_threshold as best_threshold
    from .evaluation.thresholds import label_thresholds as label_thresholds
    from .export.onnx import export_onnx as export_onnx
    from .hub.push import push_to_hub as push_to_hub
    from .hub.push import save_for_hub as save_for_hub
    from .inference.comparison import compare as compare
    from .inference.explanation import explain as explain
    from .inference.predictor import FinishedModel as FinishedModel
    from .inference.predictor import Predictor as Predictor
    from .presets import PRESETS as PRESETS
    from .presets import config_from_preset as config_from_preset
    from .training.arguments import MMClfTrainingArguments as MMClfTrainingArguments
    from .training.arguments import ModelArguments as ModelArguments
    from .training.losses import MultiLabelLoss as MultiLabelLoss
    from .training.parser import parse_arguments as parse_arguments
    from .training.train import build_trainer as build_trainer
    from .training.train import train as train
    from .training.trainer import MMClfTrainer as MMClfTrainer

# Modules of the public names that are imported at first use. The classes above are registered with transformers, so
# they are imported at once.
_LAZY = {
    "PRESETS": "presets",
    "AugmentationArguments": "data.augmentation",
    "DataArguments": "data.arguments",
    "FinishedModel": "inference.predictor",
    "MMClfTrainer": "training.trainer",
    "MMClfTrainingArguments": "training.arguments",
    "ModelArguments": "training.arguments",
    "MultiLabelLoss": "training.losses",
    "MultiLabelMetric": "evaluation.evaluate_metric",
    "Predictor": "inference.predictor",
    "best_threshold": "evaluation.thresholds",
    "build_trainer": "training.train",
    "compare": "inference.comparison",
    "config_from_preset": "presets",
    "demo_dataset": "data.demo",
    "explain": "inference.explanation",
    "export_onnx": "export.onnx",
    "label_thresholds": "evaluation.thresholds",
    "parse_arguments": "training.parser",
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
for _auto_class in (AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification):
    _auto_class.register(MMClfConfig, MMClfForImageTextClassification)
AutoImageProcessor.register(MMClfConfig, image_processor_classes={"torchvision": MMClfImageProcessor})
AutoProcessor.register(MMClfConfig, MMClfProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, ImageTextClassificationPipeline, pt_model=AutoModel)

# From now on save_pretrained copies the code of these classes, so that a folder loads without this package too.
MMClfConfig.register_for_auto_class()
MMClfForImageTextClassification.register_for_auto_class("AutoModel")
MMClfImageProcessor.register_for_auto_class()
MMClfProcessor.register_for_auto_class()


class _MainProcessHandler(logging.Handler):
    """Write the notices of the main process to the current `sys.stderr`, which notebooks and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            from .evaluation.report import printable

            print(printable(self.format(record)), file=sys.stderr)


_logger = logging.getLogger(__name__)
if not _logger.handlers:
    _logger.addHandler(_MainProcessHandler())
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
