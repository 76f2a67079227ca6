"""From arguments to a model: configuration, backbones, preprocessing."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..model.configuration_mmclf import MMClfConfig
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..presets import config_from_preset
from .arguments import ModelArguments


def build_config(args: ModelArguments) -> MMClfConfig:
    """The preset's configuration with what the arguments change; labels and vocabulary are still open."""
    if args.preset is None:
        raise ValueError("ModelArguments.preset is None; name a preset, or let parse_arguments choose one")
    names = ("fusion", "fusion_layers", "fusion_heads", "fusion_norm", "projection_norm", "image_tokens", "width")
    names += ("dropout", "learned_missing", "modality_dropout")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("unfrozen_image_stages", "unfrozen_text_layers"):
        if getattr(args, name) is not None:
            changes[name] = None if getattr(args, name) == -1 else getattr(args, name)
    if args.image_backbone is not None:
        changes |= {"image_backbone": None if args.image_backbone == "none" else args.image_backbone}
        changes |= {"image_backbone_args": None}
    if args.text_backbone == "none":
        changes |= {"text_backbone": None, "text_config": None}
    elif args.text_backbone is not None:
        changes |= {"text_backbone": Path(args.text_backbone).name}
        changes |= {"text_config": _read_text_config(args.text_backbone)}
        if not Path(args.text_backbone).is_dir():
            changes["text_backbone"] = args.text_backbone
    return config_from_preset(args.preset, **changes)


def _read_text_config(source: str) -> dict[str, Any]:
    """The configuration of a text encoder on the Hub or in a folder."""
    try:
        return AutoConfig.from_pretrained(source).to_dict()
    except ValueError:  # no model_type: TinyBERT, BERT-tiny and other BERTs are older than it
        values, _ = PreTrainedConfig.get_config_dict(source)
        if "model_type" in values or "type_vocab_size" not in values:
            raise
        return BertConfig(**values).to_dict()  # if it is none, its weights will not fit, which is an error


def build_model(
    config: MMClfConfig, args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None
) -> MMClfForImageTextClassification:
    """The model, its backbones loaded as the arguments say."""
    image_weights, text_weights = (None, None) if args.from_scratch else (args.image_weights, args.text_weights)
    if text_weights == "hub" and args.text_backbone and Path(args.text_backbone).is_dir():
        text_weights = args.text_backbone
    if config.has_text:
        if text_weights is None:
            config.text_config.vocab_size = len(tokenizer)
            config.text_config.pad_token_id = tokenizer.pad_token_id
        elif len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer):,} tokens, the pretrained text backbone "
                f"{config.text_config.vocab_size:,}; use the backbone's own tokenizer, or --from_scratch"
            )
    return MMClfForImageTextClassification.from_backbones(config, image_weights, text_weights)


def build_image_processor(model: MMClfForImageTextClassification, size: int | None = None) -> MMClfImageProcessor:
    """Size (unless given), mean and deviation as timm knows them for the image backbone."""
    known = model.image_model.pretrained_cfg
    return MMClfImageProcessor(
        size=size or known["input_size"][-1], image_mean=list(known["mean"]), image_std=list(known["std"])
    )
