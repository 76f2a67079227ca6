"""Push a model with another threshold, as a revision next to the one with the fitted threshold.

    python examples/push_to_hub.py outputs/demo user/name --threshold 0.8 --revision precise

`AutoModel.from_pretrained("user/name", revision="precise")` then loads it. To push a folder without changes, run
`hf-mmclf push outputs/demo user/name`.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoConfig

from hf_mmclf import push_to_hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="output folder of a training run, which stays as it is")
    parser.add_argument("repo_id", help="user/name or organisation/name")
    parser.add_argument(
        "--threshold",
        type=float,
        required=True,
        help="from 0 to 1; a higher one predicts fewer and more certain labels",
    )
    parser.add_argument("--revision", required=True, help="name of the branch")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "model")
        # the exported model in `onnx` has the old threshold
        shutil.copytree(args.folder, copy, ignore=shutil.ignore_patterns("checkpoints", "onnx"))
        config = AutoConfig.from_pretrained(copy)
        note = (
            f"Threshold {args.threshold:g} for all labels. The figures below are for the fitted {config.threshold:g}."
        )
        config.threshold, config.label_thresholds, config.missing_thresholds = args.threshold, None, None
        config.save_pretrained(copy)
        card = ModelCard.load(copy / "README.md")
        card.text = f"\n> {note}\n{card.text}"
        card.save(copy / "README.md")
        push_to_hub(copy, args.repo_id, revision=args.revision, message=note)


if __name__ == "__main__":
    main()
