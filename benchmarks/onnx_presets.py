"""Does every system of the poster export to ONNX, and how fast is it there? All have random weights.

    python benchmarks/onnx_presets.py [--presets warmerdbert rest] [--rounds 10] [--int8]

For each preset it prints the size of the file, the largest difference between its logits and the model's, the number
of labels that differ on the sample, and the seconds of the export. For one preset it also prints the images per second
in batches of 16, with onnxruntime and with PyTorch (channels-last), which take turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from hf_mmclf import (
    MMClfForImageTextClassification,
    MMClfImageProcessor,
    MMClfProcessor,
    config_from_preset,
    demo_dataset,
)
from hf_mmclf.data.tokenizer import load_tokenizer
from hf_mmclf.evaluation.report import format_table
from hf_mmclf.export.onnx import export_onnx, report_rows
from hf_mmclf.export.onnx_predict import OnnxClassifier
from hf_mmclf.inference.predictor import Predictor
from hf_mmclf.presets import PRESETS

TIMED = "warmerdbert"
BATCH, LABELS, TOKENS = 16, 18, 16


def random_model(preset: str, texts: list[str], folder: Path) -> Predictor:
    """Build a preset with random weights, for an export to `folder`."""
    torch.manual_seed(0)
    config = config_from_preset(preset, num_labels=LABELS)
    image_processor = MMClfImageProcessor(size=224) if config.has_image else None
    model = MMClfForImageTextClassification(config).eval()
    tokenizer = load_tokenizer("train", texts, 1000)[0] if config.has_text else None
    if tokenizer is not None:
        model.limit_text(tokenizer)
    return Predictor(folder, model, MMClfProcessor(image_processor, tokenizer))


def speeds(predictor: Predictor, classifier: OnnxClassifier, rounds: int) -> dict[str, list[float]]:
    """Measure the images per second in each round."""
    model = predictor.model.to(memory_format=torch.channels_last)
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last),
        "input_ids": torch.randint(5, 500, (BATCH, TOKENS)),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "token_type_ids": torch.zeros(BATCH, TOKENS, dtype=torch.long),
        "image_mask": torch.ones(BATCH, dtype=torch.bool),
        "text_mask": torch.ones(BATCH, dtype=torch.bool),
    }
    arrays = {name: value.contiguous().numpy() for name, value in batch.items()}
    ways = {"eager": lambda: model(**batch), "onnxruntime": lambda: classifier.session.run(["logits"], arrays)}
    found = {name: [] for name in ways}
    with torch.inference_mode():
        for number in range(rounds + 2):  # the first two warm up
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if number > 1:
                    found[name].append(BATCH / (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    posters = [name for name, preset in PRESETS.items() if preset.poster]
    parser.add_argument(
        "--presets", nargs="+", choices=posters, default=posters, help="Default: all systems of the poster."
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="Number of timed batches of each (default: %(default)s)."
    )
    parser.add_argument("--int8", action="store_true", help="Also quantize each.")
    options = parser.parse_args()
    texts = demo_dataset(300)["train"]["text"]
    table, race = [], None
    for preset in options.presets:
        with tempfile.TemporaryDirectory() as scratch:
            predictor = random_model(preset, texts, Path(scratch))
            start = time.perf_counter()
            report = export_onnx(predictor, quantize=options.int8)
            seconds = time.perf_counter() - start
            table += [{"preset": preset, **row, "seconds": round(seconds)} for row in report_rows(report)]
            if preset == TIMED:
                race = speeds(predictor, OnnxClassifier(Path(scratch, "onnx", "model.onnx")), options.rounds)
    print("\n" + format_table(table))
    if race:
        ratios = [fast / slow for fast, slow in zip(race["onnxruntime"], race["eager"], strict=True)]
        print(f"\n{TIMED}, batch {BATCH}, {torch.get_num_threads()} threads, median of {options.rounds} rounds:")
        for name, values in race.items():
            print(f"  {name}: {statistics.median(values):.1f} images per second")
        print(f"  ratio {statistics.median(ratios):.2f} (lowest {min(ratios):.2f}, highest {max(ratios):.2f})")


if __name__ == "__main__":
    main()
