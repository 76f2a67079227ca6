import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import convert_bytes
from datasets import Dataset
from PIL import Image
from support.training_runs import table_flags, write_table

from hf_mmclf import parse_arguments, train
from hf_mmclf.cli import main
from hf_mmclf.data.augmentation import ImageAugmentation, TextAugmentation
from hf_mmclf.data.collator import Collator, EvaluationImageTransform, RowTransform
from hf_mmclf.data.tokenizer import load_tokenizer
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor
from hf_mmclf.model.processing_mmclf import MMClfProcessor
from hf_mmclf.training import feature_cache
from hf_mmclf.training.arguments import MMClfTrainingArguments
from hf_mmclf.training.cache_folders import ABOUT, cache_entries
from hf_mmclf.training.feature_cache import FeatureCache

TEXTS = ["a cat", "a small dog sits there", None, "two birds", "the cat and the dog", "a bird"]
PROCESSOR = MMClfImageProcessor(size=64)
PLAIN = EvaluationImageTransform(PROCESSOR)
AUGMENTED = ImageAugmentation(PROCESSOR)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for row in range(6):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
    return tmp_path


@pytest.fixture
def rows():
    """Six rows: the second has no image, the third has no text."""
    names = [None if row == 1 else f"{row}.png" for row in range(6)]
    labels = np.eye(6, 3).tolist()
    return Dataset.from_dict({"image": names, "text": TEXTS, "where": list(map(str, names)), "labels": labels})


@pytest.fixture
def make(tiny_model, folder):
    """Make the cache of a tiny model. Its attribute `computed` counts the rows that the model has seen."""

    def make(kind="both", seed=0, flags=(), size=64, recipe=(), **fields):
        torch.manual_seed(seed)
        model = tiny_model(kind, **{"unfrozen_image_stages": 0, "unfrozen_text_layers": 0, **fields})
        tokenizer, _ = load_tokenizer("train", filter(None, TEXTS), 60)
        tokenizer.model_max_length = 32
        image_processor = MMClfImageProcessor(size=size) if kind != "text" else None
        collator = Collator(MMClfProcessor(image_processor, tokenizer if kind != "image" else None))
        given = {"dataloader_num_workers": 0, "use_cpu": True, "per_device_eval_batch_size": 2, **dict(flags)}
        args = MMClfTrainingArguments(
            str(folder / "output"),
            cache_features=True,
            feature_cache_dir=str(folder / "cache"),
            dataloader_persistent_workers=False,
            **given,
        )
        cache = FeatureCache(model, collator, args, dict(recipe))
        cache.computed, run = 0, cache._features

        def count(batch):
            cache.computed += len(batch["labels"])
            return run(batch)

        cache._features = count
        return cache

    return make


def compute(cache, rows, folder, image=PLAIN, text=None, views=1):
    return cache.compute({"train": (rows, RowTransform(folder, image, text), views)})["train"]


@pytest.mark.parametrize(
    ("kind", "layers", "tokens"),
    [
        ("both", 0, "pooled"),
        ("both", 0, "spatial"),
        ("both", 0, "stages"),
        ("both", 1, "spatial"),  # the text backbone trains, so texts are not cached
        ("both", None, "spatial"),
        ("image", 0, "spatial"),
        ("text", 0, "pooled"),
    ],
)
def test_cached_rows_give_the_logits_of_the_rows(kind, layers, tokens, make, rows, folder):
    cache = make(kind, unfrozen_text_layers=layers, image_tokens=tokens)
    cached = compute(cache, rows, folder, PLAIN if kind != "text" else None)
    transform = RowTransform(folder, PLAIN if kind != "text" else None)
    order = [4, 1, 0, 2, 5, 3]
    batch = cache.cached_collator(cached.__getitems__(order))
    assert not {"pixel_values", *(["input_ids"] if layers == 0 else [])} & set(batch)
    live_rows = [rows.with_transform(transform)[i] for i in order]
    live = cache.collator(live_rows)
    assert torch.equal(batch["labels"], live["labels"])
    assert set(cache.cached_collator(live_rows)) == set(live)  # rows without features are collated as usual
    model = cache.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**live).logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("missing", ["image", "text"])
def test_a_batch_in_which_all_rows_lack_a_modality(missing, make, rows, folder):
    cache = make()
    rows = rows.remove_columns(missing).add_column(missing, [None] * 6).select([0, 3])
    batch = cache.cached_collator(compute(cache, rows, folder).__getitems__([0, 1]))
    live = cache.collator(rows.with_transform(RowTransform(folder, PLAIN)).__getitems__([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(cache.model(**batch).logits, cache.model(**live).logits, atol=2e-3, rtol=2e-3)


def test_views_differ_and_come_back_the_same(make, rows, folder):
    def features(cache):
        return compute(cache, rows, folder, AUGMENTED, TextAugmentation(0.5), views=3).features.with_format("numpy")[:]

    first = features(make())
    images = np.stack([image for image in first["image"] if len(image)])
    assert len(first["image"]) == 18 and len(np.unique(images, axis=0)) == len(images) == 15
    shutil.rmtree(folder / "cache")
    again = features(make())
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
        ({"width": 4, "fusion": "concat", "threshold": 0.2}, 0),  # these do not change the features
        ({"seed": 1}, 6),  # other weights
        ({"unfrozen_text_layers": 1}, 6),
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


@pytest.mark.parametrize("change", ["image", "text", "order", "view", "nothing"])
def test_changed_data_is_never_served_stale(change, make, rows, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 3)
    compute(make(), rows, folder)
    views = 1
    if change == "image":
        Image.new("RGB", (50, 40), "red").save(folder / "5.png")
    elif change == "text":
        rows = Dataset.from_list([{**row, "text": "another"} if row["image"] == "4.png" else row for row in rows])
    elif change == "order":
        rows = rows.select([0, 1, 2, 5, 4, 3])
    elif change == "view":
        views = 2
    cache = make()
    compute(cache, rows, folder, views=views)
    assert cache.computed == {"nothing": 0, "view": 6}.get(change, 3)  # a shard without a change stays


def test_images_in_the_table_are_told_apart_by_their_bytes(make, rows, folder):
    cells = [{"bytes": (folder / f"{row}.png").read_bytes(), "path": None} for row in range(6)]
    table = rows.remove_columns("image").add_column("image", cells)
    compute(make(), table, folder)
    cells[3] = cells[2]
    cache = make()
    compute(cache, rows.remove_columns("image").add_column("image", cells), folder)
    assert cache.computed == 6


def test_an_interrupted_run_leaves_complete_shards(make, rows, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 3)
    cache = make()
    run, calls = cache._features, []

    def dies(batch):
        calls.append(batch)
        if len(calls) == 6:  # two batches a shard: in the middle of the third
            raise KeyboardInterrupt
        return run(batch)

    cache._features = dies
    with pytest.raises(KeyboardInterrupt):
        compute(cache, rows, folder, AUGMENTED, views=2)
    again = make()
    compute(again, rows, folder, AUGMENTED, views=2)
    assert again.computed == 12 - 6


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, 0.5, -8])
def test_a_damaged_shard_is_named_and_computed_again(content, make, rows, folder, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "SHARD", 3)
    cache = make()
    expected = compute(cache, rows, folder).features.with_format("numpy")["image"][:]
    shard = sorted(cache.folder.glob("*.arrow"))[0]
    whole = shard.read_bytes()
    if isinstance(content, bytes):
        shard.write_bytes(content)
    else:
        shard.write_bytes(whole[: int(content * len(whole))] if content == 0.5 else whole[:content])
    again = make()
    found = compute(again, rows, folder).features.with_format("numpy")["image"][:]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    if content == -8:  # only the mark of the end is lost
        assert again.computed == 0
    else:
        assert again.computed == 3 and shard.read_bytes() == whole
        assert f"{shard} is damaged" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused(make, rows, folder, monkeypatch):
    cache = make()
    full = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"needs about .* KB, but .*cache has 10 bytes left; give fewer --cached_views"):
        compute(cache, rows, folder, views=4)
    assert cache.computed == 0 and not cache_entries(folder / "cache")


def test_the_announced_size_is_the_size_on_disk(make, rows, folder, capsys):
    cache = make(image_tokens="spatial")
    cached = compute(cache, rows, folder, views=2).features.with_format("numpy")
    numbers = sum(map(len, cached["image"][:])) + sum(map(len, cached["text"][:]))
    needed = 12 * cache._bytes_of_a_row(rows)
    assert 0.8 < 2 * numbers / needed < 1.2
    said = capsys.readouterr().err
    assert f"feature cache: train 6 rows x 2; about {convert_bytes(needed)} in {cache.folder}\n" in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(unfrozen_image_stages=None),
            "a frozen image backbone, but all of it trains; give --unfrozen_image_stages 0",
        ),
        (dict(unfrozen_image_stages=1), "its last 1 stages train; give --unfrozen_image_stages 0, or leave"),
        (dict(kind="text", unfrozen_text_layers=None), "a frozen text backbone, but all of it trains"),
    ],
)
def test_a_backbone_that_trains_is_refused(fields, message, make):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_features_beyond_half_precision_are_refused(make, rows, folder):
    cache = make()
    with torch.no_grad():
        cache.model.image_model.features.norm5.weight.fill_(1e6)
    with pytest.raises(ValueError, match="features of the image backbone exceed half precision"):
        compute(cache, rows, folder)
    assert not list(cache.folder.glob("*.arrow"))


# In training


def run_flags(table: Path, output: Path, cache: Path | None, augmented=True) -> list[str]:
    flags = [*table_flags(table), "--output_dir", str(output), "--num_train_epochs", "2", "--use_cpu", "true"]
    flags += ["--per_device_train_batch_size", "8", "--fusion", "cross_text", "--image_tokens", "spatial"]
    flags += ["--unfrozen_image_stages", "0", "--unfrozen_text_layers", "0"]
    if not augmented:
        flags += ["--crop_scale", "0", "--flip", "0", "--rotation", "0", "--color_jitter", "0", "--swap_words", "0"]
    return [*flags, "--cache_features", "--feature_cache_dir", str(cache)] if cache else flags


def outcome(folder: Path) -> tuple[dict, list[float]]:
    history = json.loads((folder / "training.json").read_text())["history"]
    return json.loads((folder / "metrics.json").read_text()), [entry["loss"] for entry in history if "loss" in entry]


def test_one_view_without_augmentation_gives_the_same_metrics(tmp_path, capsys):
    table = write_table(tmp_path / "table")
    plain = train(*parse_arguments(run_flags(table, tmp_path / "plain", None, augmented=False)))
    cached = train(*parse_arguments(run_flags(table, tmp_path / "cached", tmp_path / "cache", augmented=False)))
    assert "feature cache: train 48 rows x 1, validation 6 rows x 1; about" in capsys.readouterr().err
    (metrics, losses), (cached_metrics, cached_losses) = outcome(plain), outcome(cached)
    assert cached_losses == pytest.approx(losses, rel=5e-3)
    for split in ("validation", "test"):
        for at in ("at_0.5", "fitted"):
            ece = cached_metrics[split][at].pop("ece"), metrics[split][at].pop("ece")
            assert ece[0] == pytest.approx(ece[1], abs=1e-3)  # features have half precision
            assert cached_metrics[split][at] == pytest.approx(metrics[split][at], abs=1e-9)


def test_the_processes_of_a_machine_share_the_work(make, rows, folder, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    seen = []
    for rank in (0, 1):
        cache = make()
        monkeypatch.setattr(type(cache.args), "local_process_index", rank)
        monkeypatch.setattr(cache, "_read", lambda *_: None)  # the other process has not computed its share yet
        compute(cache, rows, folder)
        seen.append(cache.computed)
    assert seen == [3, 3] and len(list((folder / "cache").rglob("*.arrow"))) == 6


def test_the_command_lists_and_clears(make, rows, folder, capsys):
    compute(make(), rows, folder)
    compute(make(seed=1), rows, folder)
    (folder / "cache" / "other").mkdir()
    main(["cache", "--feature_cache_dir", str(folder / "cache")])
    listed = capsys.readouterr().out
    assert listed.count("densenet121") == 2 and "KB in" in listed
    main(["cache", "--clear", "--feature_cache_dir", str(folder / "cache")])
    assert "removed from" in capsys.readouterr().out
    assert [path.name for path in (folder / "cache").iterdir()] == ["other"]
    main(["cache", "--feature_cache_dir", str(folder / "cache")])
    assert "No feature cache in" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["{", "[]", "{}", b"\xff", None])
def test_a_damaged_record_is_listed_and_cleared(damage, make, rows, folder, capsys):
    cache = make()
    compute(cache, rows, folder)
    record = cache.folder / ABOUT
    if damage is None:
        record.unlink()
    else:
        record.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    main(["cache", "--feature_cache_dir", str(folder / "cache")])
    listed = capsys.readouterr().out
    assert cache.key in listed and "damaged about.json" in listed
    main(["cache", "--clear", "--feature_cache_dir", str(folder / "cache")])
    assert not list((folder / "cache").iterdir())
