"""Several labels for every picture with a caption: models, data, training, evaluation."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mmclf import MMClfConfig
from .image_processing_mmclf import MMClfImageProcessor
from .modeling_mmclf import MMClfForImageTextClassification
from .pipeline_mmclf import TASK, ImageTextClassificationPipeline, pipeline
from .processing_mmclf import MMClfProcessor

# transformers registers classes, not names, so these are imported; the rest is when it is first asked for.
_LAZY = {
    "PRESETS": "presets",
    "DataArguments": "data",
    "FinishedModel": "finished",
    "ModelArguments": "arguments",
    "AugmentationArguments": "arguments",
    "MMClfTrainer": "trainer",
    "MMClfTrainingArguments": "arguments",
    "MultiLabelLoss": "losses",
    "MultiLabelMetric": "metrics",
    "best_threshold": "thresholds",
    "build_trainer": "training",
    "compare": "comparison",
    "config_from_preset": "presets",
    "demo_dataset": "demo",
    "explain": "explanation",
    "export_onnx": "export",
    "label_thresholds": "thresholds",
    "parse_arguments": "arguments",
    "push_to_hub": "hub",
    "save_for_hub": "finished",
    "train": "training",
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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
