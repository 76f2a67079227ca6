"""The image and text backbones: construction, tokens, frozen parts, activation checkpointing, pretrained weights.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging

from .configuration_mmclf import MMClfConfig

# Both backbones


def modules_up_to(backbone: nn.Module, boundary: str) -> Iterator[nn.Module]:
    """Yield the modules that a backbone registers up to the end of the sub-module `boundary`.

    timm and transformers register modules in the order of execution. A container of `boundary` is yielded too, since
    its own parameters (position embeddings, for example) are used before its children. So only the yielded module
    itself is before the boundary, not necessarily all of its children.
    """
    modules = list(backbone.named_modules())
    last = max(i for i, (name, _) in enumerate(modules) if name == boundary or name.startswith(f"{boundary}."))
    yield from (module for _, module in modules[: last + 1])


def freeze(modules: list[nn.Module]) -> None:
    """Turn off the gradients of the modules' own parameters, not those of their children."""
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Apply a function that treats rows alone; on a CPU to four rows at a time, whose activations fit its caches."""
    if images.device.type != "cpu" or len(images) <= 4:
        return function(images)
    return torch.cat([function(chunk) for chunk in images.split(4)])


# The image backbone


def create_image_backbone(config: MMClfConfig, pretrained: bool = False) -> nn.Module:
    """Create the timm model of a configuration without its classifier, with random or with timm's weights."""
    args = config.image_backbone_args or {}
    return timm.create_model(config.image_backbone, pretrained=pretrained, num_classes=0, **args)


def token_kind(config: MMClfConfig) -> str:
    """Return the kind of image tokens that a model uses: pooled ones where nothing attends to them."""
    return config.image_tokens if config.has_text or config.fusion == "label_queries" else "pooled"


def finer_stages(backbone: nn.Module) -> dict[int, int]:
    """Return index and width of the last stage of each resolution above that of the last feature map."""
    found = {info["reduction"]: (i, info["num_chs"]) for i, info in enumerate(backbone.feature_info)}
    del found[backbone.feature_info[-1]["reduction"]]
    return dict(found.values())


def image_width(backbone: nn.Module, kind: str) -> int:
    """Return the width of the tokens of [`image_tokens`]."""
    if kind == "pooled":
        return backbone.head_hidden_size
    if kind == "mean_max":
        return 2 * backbone.num_features
    return backbone.num_features + (sum(finer_stages(backbone).values()) if kind == "stages" else 0)


def image_tokens(backbone: nn.Module, pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
    """
    Compute image tokens: one pooled vector, the cells of the last feature map, or hypercolumns.

    Args:
        backbone (`nn.Module`): A timm model without a classifier.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Preprocessed images.
        kind (`str`): `image_tokens` of [`MMClfConfig`]. `"stages"` are the hypercolumns of Hariharan et al. 2015,
            "Hypercolumns for Object Segmentation and Fine-grained Localization", on the grid of the last feature map.
            The first stages still know details that the last one has dropped, such as colours. `"mean_max"` is one
            token, because the maximum keeps small objects that the mean hides.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, width)`.

    Raises:
        `ValueError`: if `kind` is `"stages"` and a backbone with several resolutions ends in a sequence of tokens.
    """
    stages = list(finer_stages(backbone)) if kind == "stages" else []
    if stages:
        features, maps = backbone.forward_intermediates(pixel_values, indices=stages)
    else:
        features, maps = backbone.forward_features(pixel_values), []
    if kind == "pooled":
        return backbone.forward_head(features, pre_logits=True).unsqueeze(1)
    if features.ndim != 4:
        if stages:
            raise ValueError(
                f"image_tokens is 'stages', but {type(backbone).__name__} ends in no feature map; give 'spatial'"
            )
        features = features[:, getattr(backbone, "num_prefix_tokens", 0) :]
        return torch.cat([features.mean(1), features.amax(1)], 1).unsqueeze(1) if kind == "mean_max" else features
    # timm's CNNs return NCHW, its hierarchical transformers NHWC
    features = features if features.shape[1] == backbone.num_features else features.permute(0, 3, 1, 2)
    if kind == "mean_max":
        return torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1).unsqueeze(1)
    maps = [F.adaptive_avg_pool2d(finer, features.shape[2:]) for finer in maps]
    return torch.cat([features, *maps], 1).flatten(2).transpose(1, 2)


def classifier_names(backbone: nn.Module) -> list[str]:
    """Return the names of a timm model's classifiers."""
    names = backbone.pretrained_cfg.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def pooling_modules(backbone: nn.Module) -> list[nn.Module]:
    """Return the modules of a timm model after its last feature map, such as the norm of its head."""
    names = [name.split(".")[0] for name in classifier_names(backbone)]
    found = [getattr(backbone, name, None) for name in (*names, "fc_norm", "attn_pool")]
    return [module for module in found if isinstance(module, nn.Module)]


def frozen_image_modules(backbone: nn.Module, unfrozen: int | None) -> list[nn.Module]:
    """
    Return the frozen modules if only the last stages train.

    Args:
        backbone (`nn.Module`): A timm model, whose `feature_info` lists its stages.
        unfrozen (`int`, *optional*): The number of stages that train; `None` means all.

    Raises:
        `ValueError`: if the backbone has too few stages.
    """
    if not unfrozen:
        return [] if unfrozen is None else list(backbone.modules())
    ends = [info["module"] for info in backbone.feature_info]
    if unfrozen >= len(ends):
        name = type(backbone).__name__
        raise ValueError(
            f"unfrozen_image_stages is {unfrozen}, but {name} has {len(ends)} stages with the stem; "
            f"give 0 to {len(ends) - 1}, or None to train all"
        )
    return list(modules_up_to(backbone, ends[-unfrozen - 1]))


def keep_statistics_in_backward(backbone: nn.Module, tokens: torch.Tensor) -> None:
    """Make the backward pass of `tokens` keep the running statistics of the backbone's BatchNorm layers.

    Activation checkpointing computes blocks again in the backward pass, which would update the statistics a second
    time with the same batch. The hook on `tokens` is called before that, the hook on the parameters after it.
    """

    def save(_: torch.Tensor) -> None:
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) and m.training]
        saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

        def restore(_: list) -> None:
            handle.remove()
            for buffer, value in saved:
                buffer.data.copy_(value)  # not buffer.copy_, which forbids a second backward pass

        handle = register_multi_grad_hook([p for p in backbone.parameters() if p.requires_grad], restore)

    tokens.register_hook(save)


@contextmanager
def _one_line_errors(source: str, target: str) -> Iterator[None]:
    """Raise `ValueError` in one line, in place of the errors of torch for weights that it cannot load."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source} cannot be loaded into {target!r}: {reason}") from error


def load_image_weights(backbone: nn.Module, config: MMClfConfig, weights: str | None) -> str:
    """
    Load pretrained weights into an image backbone and return their name, as a record.

    Args:
        backbone (`nn.Module`): The model of [`create_image_backbone`].
        config ([`MMClfConfig`]): Its configuration.
        weights (`str`, *optional*): See `from_backbones` of the model.

    Raises:
        `FileNotFoundError`: if there is no such file or folder.
        `ValueError`: if the weights do not fit the architecture.
    """
    if weights is None:
        return "scratch"
    if weights == "hub":
        with _one_line_errors(config.image_backbone, config.image_backbone):
            backbone.load_state_dict(create_image_backbone(config, pretrained=True).state_dict())
        return config.image_backbone
    path = Path(weights)
    candidates = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if not found:
        raise FileNotFoundError(
            f"image weights {weights!r}: no such file, nor a folder with model.safetensors or pytorch_model.bin; "
            "give one of these, or 'hub', or None"
        )
    # Not strict, since the file has a classifier too. Other differences are errors below.
    with _one_line_errors(found[0].name, config.image_backbone):
        if own := _image_tensors(found[0]):  # of a model of this package
            keys = backbone.load_state_dict(own, strict=False)
        else:
            keys = timm.models.load_checkpoint(backbone, str(found[0]), strict=False)
    heads = tuple(f"{name}." for name in classifier_names(backbone))
    surplus = [key for key in keys.unexpected_keys if not key.startswith(heads)]
    if keys.missing_keys or surplus:
        raise ValueError(
            f"{found[0].name} does not fit {config.image_backbone!r}: "
            f"{len(keys.missing_keys)} tensors of the model are not in the file {keys.missing_keys[:3]}, "
            f"{len(surplus)} tensors of the file are not in the model {surplus[:3]}"
        )
    return path.name


def _image_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the image backbone in a file of weights of this package; none of another file."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as weights:
        names = [name for name in weights.keys() if name.startswith("image_model.")]  # noqa: SIM118
        return {name.removeprefix("image_model."): weights.get_tensor(name) for name in names}


# The text backbone


def is_pooled(config: MMClfConfig) -> bool:
    """Return whether a model uses the text encoder's own pooled vector instead of its tokens."""
    return config.text_pooling == "pooler" and not (config.has_image or config.fusion == "label_queries")


def text_encoder(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """
    Return the class of the text encoder of a configuration, such as `BertModel` or `CLIPTextModel`.

    Raises:
        `ValueError`: if the configuration is that of another kind of model.
    """
    name, kind = type(config).__name__, config.model_type
    encoder = getattr(transformers, name.replace("Config", "Model"), None)
    if not name.endswith("TextConfig") and type(config) in MODEL_MAPPING:
        encoder = MODEL_MAPPING[type(config)]
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    for reason, applies in {
        "it has a decoder": getattr(config, "is_encoder_decoder", False),
        "it generates text": generates and kind != "xlnet",
        "it has no vocabulary": getattr(config, "vocab_size", None) is None,
        "it reads other things than text": hasattr(config, "vision_config") or hasattr(config, "audio_config"),
        "transformers has no text model for it": encoder is None,
    }.items():
        if applies:
            raise ValueError(f"a {kind} model cannot be the text backbone: {reason}; expected an encoder such as BERT")
    return encoder


def create_text_backbone(config: MMClfConfig) -> PreTrainedModel:
    """Create the text encoder of a configuration with random weights.

    Raises:
        `ValueError`: if the configuration is not that of a text encoder, or if the encoder has no pooler, and the
            configuration asks for it.
    """
    encoder = text_encoder(config.text_config)
    pooled = is_pooled(config)
    if "add_pooling_layer" in inspect.signature(encoder).parameters:
        # DistributedDataParallel does not allow the parameters of an unused pooler
        return encoder(config.text_config, add_pooling_layer=pooled)
    if pooled:
        raise ValueError(f'{encoder.__name__} has no pooler: set text_pooling to "mean"')
    return encoder(config.text_config)


def text_tokens(
    backbone: PreTrainedModel, pooled: bool, attention_mask: torch.Tensor, **inputs
) -> tuple[torch.Tensor, ModelOutput]:
    """
    Compute text tokens: the last hidden states, or one pooled vector.

    Args:
        backbone (`PreTrainedModel`): A text encoder.
        pooled (`bool`): Whether to return the pooler's vector.
        attention_mask (`torch.Tensor` of shape `(batch, length)`): The mask of the tokens.
        inputs: The other inputs of the encoder.

    Returns:
        `tuple[torch.Tensor, ModelOutput]`: The tokens, of shape `(batch, tokens, width)`, and all outputs.
    """
    # attention to no token divides by zero; the result for such a row is masked later
    attention_mask = torch.where(attention_mask.any(1, keepdim=True), attention_mask, 1)
    encoded = backbone(attention_mask=attention_mask, return_dict=True, **inputs)
    return encoded.pooler_output.unsqueeze(1) if pooled else encoded.last_hidden_state, encoded


def longest_text(backbone: PreTrainedModel) -> int:
    """Return the largest number of tokens that a text encoder can read."""
    positions = getattr(backbone.config, "max_position_embeddings", None)
    for module in backbone.modules():  # RoBERTa and its relatives number positions after that of the padding
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx:
            return positions - module.padding_idx - 1
    return positions or 2**31 - 1


def frozen_text_modules(backbone: PreTrainedModel, unfrozen: int | None) -> list[nn.Module]:
    """
    Return the frozen modules if only the last layers train.

    Args:
        backbone (`PreTrainedModel`): A text encoder with a list of layers.
        unfrozen (`int`, *optional*): The number of layers that train; `None` means all.

    Raises:
        `ValueError`: if the encoder has too few layers, or no list of them.
    """
    if not unfrozen:
        return [] if unfrozen is None else list(backbone.modules())
    count = backbone.config.num_hidden_layers
    kind = type(backbone).__name__
    lists = [name for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{kind} has no list of {count} layers; give unfrozen_text_layers 0 or None")
    if unfrozen >= count:
        raise ValueError(
            f"unfrozen_text_layers is {unfrozen}, but {kind} has {count} layers; give 0 to {count - 1}, or None"
        )
    return list(modules_up_to(backbone, f"{lists[0]}.{count - unfrozen - 1}"))


def load_text_weights(backbone: PreTrainedModel, name: str | None, weights: str | None) -> str:
    """
    Load pretrained weights into a text backbone and return their name, as a record.

    Args:
        backbone (`PreTrainedModel`): A text encoder.
        name (`str`, *optional*): Its name on the Hub.
        weights (`str`, *optional*): See `from_backbones` of the model.

    Raises:
        `ValueError`: if the weights are those of the Hub, but `name` is `None`, or if they do not fit the
            architecture.
        `OSError`: if there is no such folder, or its weights are not safe to read.
    """
    if weights is None:
        return "scratch"
    source = name if weights == "hub" else weights
    if source is None:
        raise ValueError("text weights are 'hub', but config.text_backbone names no repository; name one")
    if weights != "hub" and not Path(weights).is_dir():
        raise FileNotFoundError(f"text weights {weights!r}: no such folder; give one, or 'hub', or None")
    # A configuration on the Hub may be older than its model class (TinyBERT's has no model_type), so use our own.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the other tower of CLIP would be listed tensor by tensor
    try:
        has_config = not Path(source).is_dir() or Path(source, "config.json").is_file()
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type") if has_config else None
        names = {r"^text_model\.": ""} if kind == MMClfConfig.model_type else None
        options = dict(config=backbone.config, key_mapping=names, output_loading_info=True)
        with _one_line_errors(source, "text_config"):
            donor, info = type(backbone).from_pretrained(source, **options)
    except pickle.UnpicklingError as error:  # raised by torch's weights-only loader
        raise OSError(
            f"text weights {source!r}: its file is not a pickle of tensors alone, and reading anything else could run "
            "any code; name a checkpoint in safetensors"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    wanted = backbone.state_dict()
    missing = sorted(set(info["missing_keys"]) & set(wanted))
    if missing:
        raise ValueError(
            f"{source!r} does not fit text_config: {len(missing)} tensors are not in it ({', '.join(missing[:3])})"
        )
    backbone.load_state_dict({name: donor.state_dict()[name] for name in wanted})
    return source if weights == "hub" else Path(weights).name
