"""Train a model: `accelerate launch examples/train.py`, with flags (see `--help`) or a YAML file (`--config`).

Without arguments it trains on the embedded data set.
"""

from hf_mmclf import parse_arguments, train

if __name__ == "__main__":
    train(*parse_arguments())
