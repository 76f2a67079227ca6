import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.training_runs import TWO_PROCESSES, launch, table_flags, write_table

from hf_mmclf import parse_arguments, train
from hf_mmclf.cli import main
from hf_mmclf.data.augmentation import ImageAugmentation, TextAugmentation
from hf_mmclf.data.collator import Collator, EvaluationImageTransform, RowTransform
from hf_mmclf.data.tokenizer import load_tokenizer
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor
from hf_mmclf.training import feature_cache
from hf_mmclf.training.arguments import MMClfTrainingArguments
from hf_mmclf.training.feature_cache import FeatureCache, cache_entries, in_words

CAPTIONS = ["a cat", "a small dog sits there", None, "two birds", "the cat and the dog", "a bird"]
PROCESSOR = MMClfImageProcessor(size=64)
PLAIN = EvaluationImageTransform(PROCESSOR)
AUGMENTED = ImageAugmentation.from_processor(PROCESSOR)
CUTS = [(0, 0), (1, 1), (2, None)]  # unfrozen image stages and text layers


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for row in range(6):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
    return tmp_path


@pytest.fixture
def rows():
    """Six rows, the second without a picture, the third without a caption."""
    names = [None if row == 1 else f"{row}.png" for row in range(6)]
    labels = np.eye(6, 3).tolist()
    return Dataset.from_dict({"image": names, "text": CAPTIONS, "where": list(map(str, names)), "labels": labels})


@pytest.fixture
def make(tiny_model, folder):
    """Makes the cache of a tiny model that counts the rows it has computed."""

    def make(kind="both", seed=0, flags=(), size=64, recipe=(), **fields):
        torch.manual_seed(seed)
        model = tiny_model(kind, **{"unfrozen_image_stages": 0, "unfrozen_text_layers": 0, **fields})
        tokenizer, _ = load_tokenizer("train", filter(None, CAPTIONS), 60)
        collator = Collator(tokenizer if kind != "image" else None, 32, size if kind != "text" else None)
        given = {"dataloader_num_workers": 0, "use_cpu": True, "per_device_eval_batch_size": 2, **dict(flags)}
        args = MMClfTrainingArguments(
            str(folder / "output"),
            feature_cache_dir=str(folder / "cache"),
            dataloader_persistent_workers=False,
            **given,
        )
        cache = FeatureCache(model, collator, args, dict(recipe))
        cache.computed, run = 0, cache._states

        def count(batch):
            cache.computed += len(batch["labels"])
            return run(batch)

        cache._states = count
        return cache

    return make


def compute(cache, rows, folder, image=PLAIN, text=None, views=1):
    return cache.compute({"train": (rows, RowTransform(folder, image, text), views)}, lambda _: None)["train"]


@pytest.mark.parametrize("kind", ["both", "image", "text"])
@pytest.mark.parametrize(("stages", "layers"), CUTS)
@pytest.mark.parametrize("tokens", ["pooled", "spatial"])
def test_cached_rows_give_the_logits_of_the_rows(kind, stages, layers, tokens, make, rows, folder):
    if kind == "text" and layers is None:
        pytest.skip("nothing is frozen")
    cache = make(kind, unfrozen_image_stages=stages, unfrozen_text_layers=layers, image_tokens=tokens)
    cached = compute(cache, rows, folder, PLAIN if kind != "text" else None)
    transform = RowTransform(folder, PLAIN if kind != "text" else None)
    order = [4, 1, 0, 2, 5, 3]
    batch = cache.cached_collator(cached.__getitems__(order))
    assert not {"pixel_values", *(["input_ids"] if layers is not None else [])} & set(batch)
    live = cache.collator([rows.with_transform(transform)[i] for i in order])
    assert torch.equal(batch["labels"], live["labels"])
    model = cache.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**live).logits, atol=2e-3, rtol=2e-3)


def test_views_differ_and_come_back_the_same(make, rows, folder):
    def states(cache):
        return compute(cache, rows, folder, AUGMENTED, TextAugmentation(0.5), views=3).states.with_format("numpy")[:]

    first = states(make())
    pictures = np.stack([states for states in first["image"] if len(states)])
    assert len(first["image"]) == 18 and len(np.unique(pictures, axis=0)) == len(pictures) == 15
    shutil.rmtree(folder / "cache")
    again = states(make())
    assert all(np.array_equal(*pair) for pair in zip(first["image"], again["image"], strict=True))
    assert all(np.array_equal(*pair) for pair in zip(first["text"], again["text"], strict=True))


def test_every_view_is_drawn(make, rows, folder):
    cached = compute(make(), rows, folder, AUGMENTED, views=2)
    seen = {cached[0]["image_features"].tobytes() for _ in range(40)}
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, 0),
        ({"width": 4, "fusion": "concat", "threshold": 0.2}, 0),  # comes after the states
        ({"seed": 1}, 6),  # other weights
        ({"unfrozen_image_stages": 1}, 6),
        ({"image_tokens": "spatial"}, 6),
        ({"size": 32}, 6),
        ({"recipe": {"rotation": 10}}, 6),
        ({"flags": {"bf16": True}}, 6),
    ],
)
def test_a_change_is_never_served_stale(changes, computed, make, rows, folder):
    first = make()
    compute(first, rows, folder)
    assert first.computed == 6
    second = make(**changes)
    compute(second, rows, folder, EvaluationImageTransform(MMClfImageProcessor(size=changes.get("size", 64))))
    assert second.computed == computed


@pytest.mark.parametrize("change", ["picture", "caption", "order", "view", "nothing"])
def test_changed_data_is_never_served_stale(change, make, rows, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 3)
    compute(make(), rows, folder)
    views = 1
    if change == "picture":
        Image.new("RGB", (50, 40), "red").save(folder / "5.png")
    elif change == "caption":
        rows = Dataset.from_list([{**row, "text": "another"} if row["image"] == "4.png" else row for row in rows])
    elif change == "order":
        rows = rows.select([0, 1, 2, 5, 4, 3])
    elif change == "view":
        views = 2
    cache = make()
    compute(cache, rows, folder, views=views)
    assert cache.computed == {"nothing": 0, "view": 6}.get(change, 3)  # a shard without a change stays


def test_pictures_in_the_table_are_told_apart_by_their_bytes(make, rows, folder):
    cells = [{"bytes": (folder / f"{row}.png").read_bytes(), "path": None} for row in range(6)]
    table = rows.remove_columns("image").add_column("image", cells)
    compute(make(), table, folder)
    cells[3] = cells[2]
    cache = make()
    compute(cache, rows.remove_columns("image").add_column("image", cells), folder)
    assert cache.computed == 6


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1]]
from hf_mmclf.training import feature_cache
from hf_mmclf import parse_arguments, train
feature_cache.SHARD, run, calls = 10, feature_cache.FeatureCache._states, []

def dies(self, batch):
    calls.append(batch)
    if len(calls) == 9:  # two of setting up, then two batches a shard: in the middle of the fourth
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, batch)

feature_cache.FeatureCache._states = dies
train(*parse_arguments(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_run_leaves_whole_shards(tmp_path, capsys, monkeypatch):
    table = write_table(tmp_path / "table")
    flags = [*run_flags(table, tmp_path / "m", tmp_path / "cache"), "--per_device_eval_batch_size", "5"]
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), *flags]
    died = subprocess.run(command, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    monkeypatch.setattr(feature_cache, "SHARD", 10)
    computed, run = [], FeatureCache._states
    monkeypatch.setattr(FeatureCache, "_states", lambda self, batch: computed.append(batch) or run(self, batch))
    train(*parse_arguments(flags))
    said = capsys.readouterr().out
    assert "are there already" in said
    rows = sum(len(batch["labels"]) for batch in computed if "labels" in batch)
    assert rows == 4 * 48 + 6 - 30  # four views and the validation rows, without the three whole shards


def test_a_disk_that_is_too_small_is_refused(make, rows, folder, monkeypatch):
    cache = make()
    full = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"needs about .* KiB, but .*cache has 10 bytes left; give fewer --cached_views"):
        compute(cache, rows, folder, views=4)
    assert cache.computed == 0 and not cache_entries(folder / "cache")


def test_the_size_said_is_the_size_taken(make, rows, folder):
    said = []
    cache = make(image_tokens="spatial")
    cached = cache.compute({"train": (rows, RowTransform(folder, PLAIN), 2)}, said.append)["train"]
    width = sum(map(len, cached.states.with_format("numpy")["image"][:]))
    width += sum(map(len, cached.states.with_format("numpy")["text"][:]))
    needed = sum(cache._bytes_of_a_row(rows) for _ in range(12))
    assert 0.8 < 2 * width / needed < 1.2
    assert said == [f"feature cache: train 6 rows x 2; about {in_words(needed)} in {cache.folder}"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(unfrozen_image_stages=None),
            "all of the image backbone trains; freeze some of it by --unfrozen_image",
        ),
        (
            dict(image_tokens="stages", unfrozen_image_stages=1),
            "densenet121 with image_tokens 'stages' cannot be cut before its last 1 stages; give",
        ),
        (
            dict(
                image_backbone="eva02_tiny_patch14_224",
                image_backbone_args=dict(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2),
                unfrozen_image_stages=1,
            ),
            "eva02_tiny_patch14_224 cannot be cut before its last 1 stages; give --unfrozen_image_stages 0",
        ),
        (dict(kind="text", unfrozen_text_layers=None), "all of the text backbone trains"),
    ],
)
def test_models_without_states(fields, message, make):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_states_beyond_half_precision_are_refused(make, rows, folder):
    cache = make()
    with torch.no_grad():
        cache.model.image_model.features.norm5.weight.fill_(1e6)
    with pytest.raises(Exception) as raised:
        compute(cache, rows, folder)
    assert "states of the image backbone exceed half precision" in str(raised.value.__cause__ or raised.value)


# In training


def run_flags(table: Path, output: Path, cache: Path | None, stages="0", layers="0", augmented=True) -> list[str]:
    flags = [*table_flags(table), "--output_dir", str(output), "--num_train_epochs", "2", "--use_cpu", "true"]
    flags += ["--per_device_train_batch_size", "8", "--fusion", "cross_text", "--image_tokens", "spatial"]
    flags += ["--unfrozen_image_stages", stages, "--unfrozen_text_layers", layers]
    if not augmented:
        flags += ["--crop_scale", "0", "--flip", "0", "--rotation", "0", "--color_jitter", "0", "--swap_words", "0"]
    return [*flags, "--cache_features", "--feature_cache_dir", str(cache)] if cache else flags


def outcome(folder: Path) -> tuple[dict, list[float]]:
    history = json.loads((folder / "training.json").read_text())["history"]
    return json.loads((folder / "metrics.json").read_text()), [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize(("stages", "layers"), [("0", "0"), ("1", "1")])
def test_one_view_without_augmentation_gives_the_same_metrics(stages, layers, tmp_path, capsys):
    table = write_table(tmp_path / "table")
    given = dict(stages=stages, layers=layers, augmented=False)
    plain = train(*parse_arguments(run_flags(table, tmp_path / "plain", None, **given)))
    cached = train(*parse_arguments(run_flags(table, tmp_path / "cached", tmp_path / "cache", **given)))
    assert "feature cache: train 48 rows x 1, validation 6 rows x 1; about" in capsys.readouterr().out
    (metrics, losses), (cached_metrics, cached_losses) = outcome(plain), outcome(cached)
    assert cached_losses == pytest.approx(losses, rel=5e-3)
    for split in ("validation", "test"):
        for at in ("at_0.5", "fitted"):
            ece = cached_metrics[split][at].pop("ece"), metrics[split][at].pop("ece")
            assert ece[0] == pytest.approx(ece[1], abs=1e-3)  # of the scores themselves: features are half precision
            assert cached_metrics[split][at] == pytest.approx(metrics[split][at], abs=1e-9)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, capsys, monkeypatch):
    table = write_table(tmp_path / "table")
    cache = tmp_path / "cache"
    process = launch(*run_flags(table, tmp_path / "two", cache), options=TWO_PROCESSES)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("feature cache:") == 1
    computed = []
    monkeypatch.setattr(FeatureCache, "_generate", lambda *args, **kwargs: computed.append(args))
    train(*parse_arguments(run_flags(table, tmp_path / "one", cache)))
    assert "are there already" in capsys.readouterr().out and not computed


def test_the_command_lists_and_clears(make, rows, folder, capsys):
    compute(make(), rows, folder)
    compute(make(seed=1), rows, folder)
    (folder / "cache" / "other").mkdir()
    main(["cache", "--feature_cache_dir", str(folder / "cache")])
    listed = capsys.readouterr().out
    assert listed.count("densenet121") == 2 and "KiB in" in listed
    main(["cache", "--clear", "--feature_cache_dir", str(folder / "cache")])
    assert "removed from" in capsys.readouterr().out
    assert [path.name for path in (folder / "cache").iterdir()] == ["other"]
    main(["cache", "--feature_cache_dir", str(folder / "cache")])
    assert "No feature cache in" in capsys.readouterr().out


def test_sizes_in_words():
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.0 KiB", 5_500_000: "5.2 MiB", 3 * 2**40: "3.0 TiB"}
    assert {size: in_words(size) for size in sizes} == sizes
