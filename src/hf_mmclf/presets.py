"""The presets as rows of data: the eighteen systems of the poster, and our own.

The poster is "Image-Text Multi-label Classification" (COMP5329, assignment 2, 2023). The architectures of the eighteen
systems are those of the poster. The recipes are ours, because that of the poster (AdamW at 1e-5 for every part)
under-trains.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .evaluation.report import format_table
from .model.configuration_mmclf import MMClfConfig


@dataclasses.dataclass(frozen=True)
class Poster:
    """
    The figures of the poster for a system, with 18 labels.

    Args:
        parameters (`int`): Number of parameters.
        megabytes (`float`): Size of the saved model in MB of 2^20 bytes.
        threshold (`float`): Threshold of all labels.
        f1_train, f1_validation (`float`): Micro-F1 on 27,000 training rows and 3,000 validation rows.
        epochs (`int`): Epochs of the training.
    """

    parameters: int
    megabytes: float
    threshold: float
    f1_train: float
    f1_validation: float
    epochs: int


@dataclasses.dataclass(frozen=True)
class Preset:
    """
    One preset.

    Args:
        config (`Mapping`): Fields of [`MMClfConfig`].
        recipe (`Mapping`): Training arguments that suit the architecture. Flags win over them.
        poster ([`Poster`], *optional*): The figures of the poster. `None` for our own presets.
    """

    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    poster: Poster | None = None


def _bert(hidden: int, layers: int, heads: int, intermediate: int, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        dict(
            model_type="bert",
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            **more,
        )
    )


TINYBERT = dict(text_backbone="huawei-noah/TinyBERT_General_4L_312D", text_config=_bert(312, 4, 12, 1200))
BERT_TINY = dict(text_backbone="prajjwal1/bert-tiny", text_config=_bert(128, 2, 2, 512))
# .tv_in1k are the weights of torchvision, as in the time of the poster; the untagged defaults of timm differ
DENSITY = dict(image_backbone="densenet121.tv_in1k", **TINYBERT)
CENSITY = dict(image_backbone="densenet169.tv_in1k", **BERT_TINY)
REST = dict(image_backbone="resnet34.tv_in1k", **BERT_TINY)
FROZEN = dict(unfrozen_image_stages=0, unfrozen_text_layers=0)
WARM = dict(unfrozen_image_stages=1, unfrozen_text_layers=1)
WARMER = dict(unfrozen_image_stages=2, unfrozen_text_layers=2)
NORMED = dict(fusion="self", fusion_norm=True)
WIDE = dict(width=896, projection_norm=True, dropout=0.5)

# One query for each label attends to image cells of all resolutions, to text tokens, and to text-over-image attention.
_QUERIES = dict(fusion="label_queries", fusion_heads=8, image_tokens="stages")

# A classifier for each modality and one over both, on the features of frozen backbones.
_LATE = dict(fusion="concat", image_tokens="mean_max", width=48, dropout=0.5)
_LATE |= dict(modality_classifiers=True, feature_dropout=0.8, **FROZEN)

# The recipe for pretrained backbones: a low learning rate for them, a higher one for the new layers.
_FINE_TUNE = dict(
    learning_rate=1e-3,
    backbone_learning_rate=1e-4,
    weight_decay=0.01,
    warmup_steps=0.05,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=32,
    per_device_eval_batch_size=64,
    num_train_epochs=15,
    early_stopping_patience=4,
)
# A text model from random weights needs a learning rate too high for pretrained ones, and it overfits early.
_CAPTIONS = _FINE_TUNE | dict(
    learning_rate=1e-3,
    backbone_learning_rate=1e-3,
    per_device_train_batch_size=64,
    per_device_eval_batch_size=256,
    num_train_epochs=4,
    from_scratch=True,
    tokenizer="train",
    swap_words=0.0,
    drop_words=0.1,
)
_TEXT = _FINE_TUNE | dict(learning_rate=5e-4, backbone_learning_rate=5e-4, num_train_epochs=6)
_DEMO = _FINE_TUNE | dict(
    learning_rate=2e-3,
    backbone_learning_rate=2e-3,
    num_train_epochs=15,
    early_stopping_patience=8,  # the link between words and image cells is learned late and suddenly
    from_scratch=True,
    tokenizer="train",
    vocab_size=1000,
    image_size=64,
    rotation=0.0,
    flip=0.5,
    color_jitter=0.0,
    crop_scale=0.8,
)

# A DenseNet of 0.16 M parameters with a 4 x 4 last feature map at 64 px, and a BERT of 0.25 M parameters.
_DEMO_IMAGE = dict(
    image_backbone="densenet121",
    image_backbone_args=dict(growth_rate=16, block_config=(3, 4, 4), stem_type=""),
)
_DEMO_TEXT = dict(text_config=_bert(96, 2, 4, 192, vocab_size=1000, max_position_embeddings=64))


# Frozen features are cached without augmentation, so training takes a minute after them. Many epochs, a strong weight
# decay and a strong dropout suit a few thousand rows.
_HEADS = dict(
    learning_rate=2e-3,
    weight_decay=0.05,
    warmup_steps=0.05,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=128,
    per_device_eval_batch_size=128,
    num_train_epochs=40,
    load_best_model_at_end=False,  # the last weights: one of 40 epochs looks best on a few hundred rows by chance
    save_strategy="no",  # it starts again from the cached features
    cache_features=True,
    **dict.fromkeys(("crop_scale", "flip", "rotation", "color_jitter", "swap_words"), 0.0),
)
_MINILM = dict(text_backbone="sentence-transformers/all-MiniLM-L6-v2", text_config=_bert(384, 6, 12, 1536))
_TINYCLIP = dict(
    image_backbone="vit_xsmall_patch16_clip_224.tinyclip_yfcc15m",
    text_backbone="wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
    text_config=dict(
        model_type="clip_text_model",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        vocab_size=49408,
        max_position_embeddings=77,
    ),
)

# Configuration of each system of the poster, and its figures in the order of [`Poster`].
_POSTER: Mapping[str, tuple[dict[str, Any], tuple]] = {
    # An image backbone alone, trained whole, with one linear layer on the pooled vector.
    "resnet18": (dict(image_backbone="resnet18.tv_in1k"), (11_185_746, 42.74, 0.5, 0.6712, 0.6612, 20)),
    "resnet34": (dict(image_backbone="resnet34.tv_in1k"), (21_293_906, 81.36, 0.5, 0.6406, 0.6304, 20)),
    "densenet201": (dict(image_backbone="densenet201.tv_in1k"), (18_127_506, 70.45, 0.5, 0.6728, 0.6594, 20)),
    "resnet50": (dict(image_backbone="resnet50.tv_in1k"), (23_544_914, 90.12, 0.5, 0.7283, 0.7260, 50)),
    # A text backbone alone, trained whole, with one linear layer on the pooler's vector.
    "tinybert": (dict(**TINYBERT, dropout=0.1), (14_355_882, 54.79, 0.5, 0.5955, 0.5975, 50)),
    "bert-tiny": (dict(**BERT_TINY, dropout=0.1), (4_388_242, 16.76, 0.635, 0.5960, 0.5989, 50)),
    # DenseNet-121 and TinyBERT.
    "densitybert": (dict(**DENSITY, **FROZEN, fusion="self"), (25_351_722, 97.71, 0.35, 0.8173, 0.8173, 50)),
    "modensitybert": (dict(**DENSITY, **FROZEN, **NORMED), (25_355_730, 97.72, 0.38, 0.8622, 0.8179, 50)),
    "cdbert-text": (dict(**DENSITY, **FROZEN, fusion="cross_text"), (24_329_666, 93.81, 0.29, 0.7599, 0.7564, 50)),
    "cdbert-image": (dict(**DENSITY, **FROZEN, fusion="cross_image"), (23_600_578, 91.02, 0.461, 0.8026, 0.7985, 50)),
    "warmdbert": (dict(**DENSITY, **WARM, **NORMED), (25_355_730, 97.72, 0.38, 0.8505, 0.8310, 50)),
    "warmerdbert": (dict(**DENSITY, **WARMER, **NORMED), (25_355_730, 97.72, 0.39, 0.8567, 0.8345, 50)),
    "warmerdbert-extended": (dict(**DENSITY, **WARMER, **NORMED), (25_355_730, 97.72, 0.42, 0.8698, 0.8485, 100)),
    "wwdbert": (dict(**DENSITY, **WARMER, **NORMED, **WIDE), (25_886_930, 99.77, 0.40, 0.8700, 0.8464, 100)),
    # DenseNet-169 or ResNet-34, and BERT-tiny.
    "bensity": (dict(**CENSITY, **FROZEN, fusion="self"), (26_152_082, 100.83, 0.33, 0.7980, 0.7980, 50)),
    "censity-text": (dict(**CENSITY, **FROZEN, fusion="cross_text"), (23_546_642, 90.89, 0.33, 0.7905, 0.7901, 50)),
    "censity-image": (dict(**CENSITY, **FROZEN, fusion="cross_image"), (20_990_738, 81.14, 0.38, 0.7869, 0.7801, 50)),
    "rest": (dict(**REST, **FROZEN, fusion="cross_image"), (26_395_986, 100.92, 0.38, 0.7836, 0.7766, 50)),
}
_LONG = _FINE_TUNE | dict(num_train_epochs=30)
_RECIPES = {"tinybert": _TEXT, "bert-tiny": _TEXT, "warmerdbert-extended": _LONG, "wwdbert": _LONG}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        name: Preset(config | {"threshold": figures[2]}, _RECIPES.get(name, _FINE_TUNE), Poster(*figures))
        for name, (config, figures) in _POSTER.items()
    }
    | {
        # Ours: pretrained backbones below 100 MB, trained whole, with one query for each label.
        "querybert": Preset(
            dict(
                image_backbone="convnext_pico.d1_in1k",
                text_backbone="microsoft/xtremedistil-l6-h256-uncased",
                text_config=_bert(256, 6, 8, 1024),
                **_QUERIES,
                width=256,
                dropout=0.1,
                modality_dropout=0.2,
            ),
            _FINE_TUNE,
        ),
        # Ours: frozen pretrained backbones below 100 MB with a late fusion, for a few thousand rows.
        "late-lite": Preset(dict(image_backbone="tf_efficientnet_lite0.in1k", **_MINILM, **_LATE), _HEADS),
        "late-b4": Preset(dict(image_backbone="tf_efficientnet_b4.ns_jft_in1k", **BERT_TINY, **_LATE), _HEADS),
        "late-clip": Preset(dict(**_TINYCLIP, **_LATE), _HEADS),
        # Ours: a small text model from random weights, 5 MB.
        "captions": Preset(
            dict(
                text_config=_bert(
                    *(128, 2, 4, 256),
                    vocab_size=8000,
                    max_position_embeddings=128,
                    hidden_dropout_prob=0.2,
                    attention_probs_dropout_prob=0.2,
                ),
                text_pooling="mean",
                dropout=0.1,
            ),
            _CAPTIONS,
        ),
        # Ours: models that learn the embedded data set from random weights, in minutes on two cores.
        "demo": Preset(
            dict(**_DEMO_IMAGE, **_DEMO_TEXT, **_QUERIES, width=128),
            _DEMO,
        ),
        "demo-image": Preset(_DEMO_IMAGE, _DEMO),
        "demo-text": Preset(dict(**_DEMO_TEXT, text_pooling="mean", dropout=0.1), _DEMO),
    }
)


def get_preset(name: str) -> Preset:
    """Return the preset of a name. Raises `ValueError` with the most similar names if there is no such preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]


def config_from_preset(name: str, **overrides: Any) -> MMClfConfig:
    """
    Return the configuration of a preset.

    Args:
        name (`str`): A key of `PRESETS`.
        overrides: Fields of [`MMClfConfig`], or `num_labels`, that win over those of the preset.

    Returns:
        [`MMClfConfig`]: The configuration.

    Raises:
        `ValueError`: If there is no such preset, or the configuration has no such field.
    """
    preset = get_preset(name)
    fields = [field.name for field in dataclasses.fields(MMClfConfig)] + ["num_labels"]
    for field in overrides:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            raise ValueError(f"MMClfConfig has no field {field!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    values = {**preset.config, **overrides}
    # copied, because a configuration is mutable and the presets are not
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return MMClfConfig(**values)


# Titles of the poster's figures in the table, and how the table writes them.
FIGURES = {
    "parameters": ("parameters", int),
    "MB": ("megabytes", "{:.2f}".format),
    "threshold": ("threshold", "{:g}".format),
    "F1 train": ("f1_train", "{:.4f}".format),
    "F1 validation": ("f1_validation", "{:.4f}".format),
    "epochs": ("epochs", int),
}


# Columns of the table on the screen, which is narrower than a page.
ON_SCREEN = dict.fromkeys(("preset", "image backbone", "text backbone", "fusion", "unfrozen", "MB"))
ON_SCREEN |= {"F1 validation": "F1"}  # with a shorter name


def presets_table(markdown: bool = False) -> str:
    """
    Format the presets as a table: the architecture and, for the systems of the poster, its figures.

    Args:
        markdown (`bool`, *optional*, defaults to `False`): Whether to write Markdown, as in the README. By default
            the table is plain text with the columns of `ON_SCREEN`.

    Returns:
        `str`: The table.
    """
    rows = []
    for name, preset in PRESETS.items():
        config, poster = config_from_preset(name), preset.poster
        both = config.has_image and config.has_text
        unfrozen = (config.unfrozen_image_stages, config.unfrozen_text_layers)
        rows.append(
            {
                "preset": f"`{name}`" if markdown else name,
                "image backbone": config.image_backbone and config.image_backbone.removesuffix(".tv_in1k"),
                "text backbone": (config.text_backbone or "own").split("/")[-1] if config.has_text else None,
                "fusion": config.fusion + (" + norm" if config.fusion_norm else "") if both else None,
                "unfrozen": "all" if unfrozen == (None, None) else "{} / {}".format(*unfrozen),
                "width": config.width if both else None,
                **{title: poster and form(getattr(poster, field)) for title, (field, form) in FIGURES.items()},
            }
        )
    return format_table(rows if markdown else list(map(_for_screen, rows)), markdown)


def _for_screen(row: dict[str, Any]) -> dict[str, Any]:
    return {short or title: row[title] for title, short in ON_SCREEN.items()}
