"""Writes the card of the eighteen systems, systems.md, from the presets: python model_cards/systems.py"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mmclf import PRESETS, config_from_preset
from hf_mmclf.evaluation.report import format_table

RECIPE = ("epochs", "learning rate", "schedule", "weight decay", "batch size")
TEXT = """# The eighteen systems

The systems of the poster "Image-Text Multi-label Classification" (COMP5329, assignment 2, 2023): several of 18 labels
for a picture with its caption. Each is a preset of `hf_mmclf`:

    hf-mmclf train --preset warmerdbert --data train.csv --image_dir pictures

The architectures are the poster's, to the parameter. No weights are published here: whoever trains one gets a card of
its own (README.md) in the output folder, with figures measured on their rows.

## Architectures

{architectures}

- **Image and text backbones** start from pretrained weights: {backbones}.
- **Fusion**: `self`, each modality attends to itself; `cross_text`, the caption's tokens ask and the picture's answer;
  `cross_image`, the other way round. With `+ norm` attended tokens are scaled by a learned vector and
  layer-normalised.
- **Unfrozen**: how many of the last image stages and text layers train; the rest stays frozen.
- **Width**: what each modality is projected to before the classifier. `wwdbert` puts BatchNorm, ReLU and dropout 0.5
  behind each projection.
- The picture is one pooled vector, as with the poster. `--image_tokens spatial` makes each cell of the last feature
  map a token, with the same parameters.

## What the poster reports

F1 is micro-averaged, over 27,000 training and 3,000 validation rows with 18 labels, at the system's threshold; MB are
of 2^20 bytes. Each system was trained for as many epochs as given, by AdamW at a learning rate of 1e-5.

{poster}

## How the presets train

The recipes are ours, since the poster's under-trains. The best epoch by validation F1 is kept, and the threshold is
fitted on the validation rows. `--help` with a preset shows its defaults, and every one of them is a flag.

{recipes}
"""


def render() -> str:
    """The card as Markdown."""
    architectures, poster, backbones = [], [], set()
    alike: dict[tuple[str, ...], list[str]] = {}  # presets by recipe
    for name, preset in PRESETS.items():
        if preset.poster is None:
            continue
        config, reported = config_from_preset(name), preset.poster
        both = config.has_image and config.has_text
        unfrozen = (config.unfrozen_image_stages, config.unfrozen_text_layers)
        backbones |= {used for used in (config.image_backbone, config.text_backbone) if used}
        architectures.append(
            {
                "preset": f"`{name}`",
                "image": (config.image_backbone or "–").removesuffix(".tv_in1k"),
                "text": (config.text_backbone or "–").split("/")[-1],
                "fusion": config.fusion + (" + norm" if config.fusion_norm else "") if both else "–",
                "unfrozen": "all" if unfrozen == (None, None) else "{} / {}".format(*unfrozen),
                "width": config.width if both else None,
                "parameters": reported.parameters,
            }
        )
        poster.append(
            {
                "preset": f"`{name}`",
                "F1, validation": f"{reported.f1_validation:.4f}",
                "F1, training": f"{reported.f1_train:.4f}",
                "threshold": f"{reported.threshold:g}",
                "epochs": reported.epochs,
                "MB": f"{reported.megabytes:.2f}",
            }
        )
        alike.setdefault(_recipe(preset.recipe), []).append(f"`{name}`")
    return TEXT.format(
        architectures=format_table(architectures, markdown=True),
        poster=format_table(poster, markdown=True),
        recipes=format_table(
            [
                {**dict(zip(RECIPE, recipe, strict=True)), "presets": ", ".join(names)}
                for recipe, names in alike.items()
            ],
            markdown=True,
        ),
        backbones=", ".join(f"`{name}`" for name in sorted(backbones)),
    )


def _recipe(values: Mapping[str, Any]) -> tuple[str, ...]:
    """A preset's recipe, in the order of `RECIPE`."""
    return (
        f"{values['num_train_epochs']}, patience {values['early_stopping_patience']}",
        f"{values['learning_rate']:g}, of backbones {values['backbone_learning_rate']:g}",
        f"{values['lr_scheduler_type']}, warm-up {values['warmup_steps']:.0%}",
        f"{values['weight_decay']:g}",
        f"{values['per_device_train_batch_size']}",
    )


if __name__ == "__main__":
    Path(__file__).with_name("systems.md").write_text(render(), encoding="utf-8")
