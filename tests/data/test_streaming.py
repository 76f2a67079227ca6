import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from support import stream_log
from support.stream_log import seen, train_with_log
from support.training_runs import TINY, TWO_PROCESSES, write_table

from hf_mmclf import Predictor, parse_arguments, train
from hf_mmclf.data.arguments import DataArguments
from hf_mmclf.data.collator import Preprocessing
from hf_mmclf.data.streaming import StreamCollator, open_stream
from hf_mmclf.data.tables import read_table
from hf_mmclf.data.tokenizer import load_tokenizer
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor
from hf_mmclf.model.processing_mmclf import MMClfProcessor

NAMES = ["blue", "cat", "dog", "green", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 rows as JSON lines and, in four shards, as Parquet with the bytes of the images."""
    folder = tmp_path_factory.mktemp("stream")
    rows = read_table(write_table(folder)).to_list()
    rows = [{"image": row["file"], "text": row["words"], "labels": row["tags"].split("|")} for row in rows]
    lines = "\n".join(json.dumps({**row, "labels": "|".join(row["labels"])}) for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "names.json").write_text(json.dumps({name: name.upper() for name in NAMES}), encoding="utf-8")
    for row in rows:
        row["image"] = {"bytes": (folder / "pictures" / row["image"]).read_bytes(), "path": row["image"]}
        row["labels"] = [NAMES.index(name) for name in row["labels"]]
    features = Features({"image": Image(), "text": Value("string"), "labels": List(ClassLabel(names=NAMES))})
    (folder / "parquet").mkdir()
    for shard in range(4):
        file = folder / "parquet" / f"train-{shard}.parquet"
        Dataset.from_list(rows[shard::4], features=features).to_parquet(str(file))
    Dataset.from_list(rows[:12], features=features).to_parquet(str(folder / "parquet" / "validation.parquet"))
    return folder


def lines(folder: Path, **changes) -> DataArguments:
    given = dict(data=str(folder / "rows.jsonl"), image_dir=str(folder / "pictures"), streaming=True)
    given |= dict(label_names_file=str(folder / "names.json"), validation_rows=10, shuffle_buffer=8)
    return DataArguments(**given | changes)


def take(stream, count):
    return [row for row, _ in zip(stream.rows, range(count), strict=False)]


def preprocessing_of(prepared, tokenizer=None) -> Preprocessing:
    return Preprocessing(MMClfProcessor(MMClfImageProcessor(size=32), tokenizer), prepared.folder)


def collator_of(stream, prepared, tokenizer=None, **options) -> StreamCollator:
    preprocessing = preprocessing_of(prepared, tokenizer)
    return StreamCollator(stream, preprocessing.evaluation, preprocessing.collator, **options)


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["--data", str(folder / "rows.jsonl"), "--image_dir", str(folder / "pictures"), "--preset", "demo", *TINY]
    given += ["--streaming", "--label_names_file", str(folder / "names.json"), "--validation_rows", "10"]
    given += ["--shuffle_buffer", "8", "--per_device_train_batch_size", "4", "--output_dir", str(output)]
    return [*given, "--use_cpu", "true", *more]


def test_a_stream_says_what_a_table_says(folder, tmp_path, notices):
    """Columns, labels that look wrong, and rows in two splits, of the first rows and of the validation rows."""
    rows = [{"text": f"text {row}", "labels": "cat" if row % 2 else "Cat"} for row in range(20)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "names.json").write_text('{"cat": "cat", "Cat": "Cat"}', encoding="utf-8")
    args = DataArguments(str(tmp_path / "train.jsonl"), streaming=True, label_names_file=str(tmp_path / "names.json"))
    stream, _ = open_stream(
        dataclasses.replace(args, validation_data=str(tmp_path / "validation.jsonl")), False, True, seed=0
    )
    said = notices()
    assert "Columns: text 'text', labels 'labels' (separated by white space)" in said
    assert any("train rows: these labels look like spellings of one label" in line for line in said)
    assert "20 of 20 validation rows are training rows too" in said
    preprocessing = Preprocessing(MMClfProcessor(None, load_tokenizer("train", ["text"], 60)[0]), Path("."))
    StreamCollator(stream, preprocessing.evaluation, preprocessing.collator)(take(stream, 4))
    assert notices() == []


@pytest.mark.parametrize(
    "content, changes, message",
    [
        ("", {}, "rows.jsonl: no training rows"),
        ("\n\n", {}, "rows.jsonl: (no training rows|cannot be read as a stream)"),
        ('{"text": "a", "labels"', {}, "rows.jsonl: cannot be read as a stream"),
        ('{"text": "a"}', {"shuffle_buffer": 0}, "--shuffle_buffer is 0 .* expected at least 1"),
        ('{"text": "a"}', {"validation_rows": -1}, "--validation_rows is -1; expected .* at least 0"),
    ],
)
def test_streams_that_cannot_be_read(tmp_path, content, changes, message):
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    given = {"validation_rows": 1, **changes}
    with pytest.raises(ValueError, match=message):
        open_stream(DataArguments(str(tmp_path / "rows.jsonl"), streaming=True, **given), False, True, seed=0)


def test_a_stream_has_no_end_and_each_pass_has_another_order(folder):
    stream, prepared = open_stream(lines(folder), True, True, seed=0)
    seen = [row["image"] for row in take(stream, 150)]
    held = {f"{row}.png" for row in range(10)}
    assert prepared.splits["validation"]["image"][:] == [f"{row}.png" for row in range(10)]
    assert set(seen[:60]) <= {f"{row}.png" for row in range(60)} - held and len(set(seen)) == 50
    assert seen[:50] != sorted(seen[:50], key=lambda name: int(name[:-4])) and seen[:50] != seen[50:100]
    assert [row["image"] for row in take(open_stream(lines(folder), True, True, seed=0)[0], 150)] == seen
    assert [row["image"] for row in take(open_stream(lines(folder), True, True, seed=1)[0], 150)] != seen


def test_rows_with_an_image_that_is_held_out_stay_out(folder, tmp_path):
    text = (folder / "rows.jsonl").read_text().split("\n")
    again = json.dumps({**json.loads(text[0]), "text": "another text"})
    (tmp_path / "rows.jsonl").write_text("\n".join([*text, again]))
    stream, _ = open_stream(lines(folder, data=str(tmp_path / "rows.jsonl")), True, True, seed=0)
    assert not {f"{row}.png" for row in range(10)} & {row["image"] for row in take(stream, 120)}


def test_validation_images_are_relative_to_their_own_table(folder, tmp_path):
    (tmp_path / "held.png").write_bytes((folder / "pictures" / "0.png").read_bytes())
    (tmp_path / "held.jsonl").write_text(json.dumps({"image": "held.png", "text": "a cat", "labels": "cat"}))
    shutil.copy(folder / "rows.jsonl", folder / "pictures")
    changes = dict(data=str(folder / "pictures" / "rows.jsonl"), image_dir=None, validation_rows=0)
    _, prepared = open_stream(
        lines(folder, **changes, validation_data=str(tmp_path / "held.jsonl")), True, True, seed=0
    )
    assert (prepared.folder / prepared.splits["validation"]["image"][0]).samefile(tmp_path / "held.png")


def test_batches_are_those_of_a_table(folder):
    stream, prepared = open_stream(lines(folder), True, True, seed=0)
    rows = take(stream, 3)
    made = collator_of(stream, prepared)(rows)
    expected = [[float(name in row["labels"].split("|")) for name in NAMES] for row in rows]
    assert made["labels"].tolist() == expected
    image = preprocessing_of(prepared).evaluation({"text": [None], "image": [rows[1]["image"]], "where": [""]})
    assert made["pixel_values"][1].equal(image["pixel_values"][0])


def test_batches_that_a_resumed_run_has_used_are_left_empty(folder):
    stream, prepared = open_stream(lines(folder), True, True, seed=0)
    collate, rows = collator_of(stream, prepared, skipped=2), take(stream, 2)
    assert [collate(rows), collate(rows)] == [{}, {}]
    assert collate(rows)["labels"].shape == (2, 5)


def test_parquet_with_class_labels_and_images(folder):
    args = DataArguments(data=str(folder / "parquet"), streaming=True)
    stream, prepared = open_stream(args, True, True, seed=0)
    assert stream.labels.ids == tuple(NAMES) and len(prepared.splits["validation"]) == 12
    batch = collator_of(stream, prepared)(take(stream, 4))
    assert batch["pixel_values"].shape == (4, 3, 32, 32) and (batch["labels"].sum(1) == 2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(label_names_file=None), "after which all labels are known; give --label_names_file"),
        (dict(validation_rows=0), "has no validation rows.*give --validation_data, or --validation_rows"),
        (dict(validation_rows=60), "--validation_rows 60 leaves no training rows"),
        (dict(data="no.jsonl"), "no.jsonl.*no such file"),
        (dict(data="table.csv"), ".csv tables are read whole; make it .parquet or .jsonl"),
        (dict(data=None), "--streaming needs --data"),
        (dict(label_column="no"), "--label_column: no column 'no'"),
        (dict(validation_rows=0, validation_data="unlabelled.csv"), "no label column in the validation rows"),
    ],
)
def test_streams_that_cannot_be(changes, message, folder):
    (folder / "unlabelled.csv").write_text("image,text\n0.png,a cat\n")
    if "validation_data" in changes:
        changes = {**changes, "validation_data": str(folder / changes["validation_data"])}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_stream(lines(folder, **changes), True, True, seed=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--streaming has no epochs; give --max_steps"),
        (["--max_steps", "4", "--eval_strategy", "epoch", "--save_strategy", "epoch"], "give --eval_strategy steps"),
        (["--max_steps", "4", "--cache_features"], "--cache_features keeps all rows on disk"),
    ],
)
def test_settings_that_need_the_number_of_rows(more, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(*parse_arguments(flags(folder, tmp_path / "m", *more)))
    assert not (tmp_path / "m").exists()


def test_an_unknown_label_names_its_row(folder):
    stream, prepared = open_stream(lines(folder), True, True, seed=0)
    row = {"image": "3.png", "text": "a bird", "labels": "cat|bird"}
    with pytest.raises(ValueError, match=r"rows.jsonl: row \{'image': '3.png'.*unknown label 'bird'"):
        collator_of(stream, prepared)([row])


@pytest.mark.parametrize("content", [b"no image", None])
@pytest.mark.parametrize(("policy", "rows"), [("error", None), ("skip", 1), ("missing", 2)])
def test_bad_and_vanished_images(policy, rows, content, folder, tmp_path, capsys):
    stream, prepared = open_stream(lines(folder, bad_images=policy, streaming=True), True, True, seed=0)
    bad = tmp_path / "bad.png"
    if content:
        bad.write_bytes(content)
    good = take(stream, 1)[0]
    tokenizer, _ = load_tokenizer("train", stream.head["text"], 60)
    collate = collator_of(stream, prepared, tokenizer)
    if rows is None:
        with pytest.raises((ValueError, FileNotFoundError), match="bad.png"):
            collate([{**good, "image": str(bad)}, good])
    else:
        assert collate([{**good, "image": str(bad)}, good])["image_mask"].tolist() == [False, True][-rows:]
        assert f"Image {'left out' if policy == 'skip' else 'taken as missing'}: " in capsys.readouterr().err


def test_a_streamed_run_leaves_a_complete_folder(folder, tmp_path):
    output = train(*parse_arguments(flags(folder, tmp_path / "m", "--max_steps", "30", "--learning_rate", "5e-3")))
    record = json.loads((output / "training.json").read_text())
    assert "training rows are streamed" in record["splits"] and record["rows"] == {"validation": 10}
    assert [entry["step"] for entry in record["history"] if "eval_f1" in entry] == list(range(3, 31, 3))
    assert (output / "splits.csv").read_text().count("validation,") == 10
    assert Predictor.load(output).model.config.id2label[1] == "CAT"
    assert "streamed" in (output / "README.md").read_text()


def start(log: Path, *given: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start `train_with_log` in a process of its own or, with `options`, under accelerate's launcher."""
    launcher = ["-m", "accelerate.commands.launch", *options] if options else []
    command = [sys.executable, *launcher, stream_log.__file__, str(log), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_two_processes_see_the_rows_of_one_step_by_step(folder, tmp_path):
    two = start(tmp_path / "two", *flags(folder, tmp_path / "m2", "--max_steps", "20"), options=TWO_PROCESSES)
    alone = flags(folder, tmp_path / "m1", "--max_steps", "20", "--per_device_train_batch_size", "8")
    train_with_log(tmp_path / "one", alone)
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    together = [a[1] + b[1] for a, b in zip(*(seen(tmp_path / "two", rank) for rank in (0, 1)), strict=True)]
    assert together == [rows for _, rows in seen(tmp_path / "one")] and len(together) == 20


@pytest.mark.slow
def test_a_killed_stream_continues_with_the_rows_that_were_next(folder, tmp_path):
    given = ["--max_steps", "40", "--save_steps", "5", "--dataloader_num_workers", "2", "--eval_strategy", "no"]
    given += ["--load_best_model_at_end", "false"]
    killed = start(tmp_path / "killed", *flags(folder, tmp_path / "m2", *given))
    deadline = time.monotonic() + 240
    while not list((tmp_path / "m2" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    train_with_log(tmp_path / "whole", flags(folder, tmp_path / "m1", *given))
    train_with_log(tmp_path / "resumed", flags(folder, tmp_path / "m2", *given, "--resume_from_checkpoint", "true"))
    expected, after = seen(tmp_path / "whole"), seen(tmp_path / "resumed")
    assert 0 < len(after) < len(expected) == 40
    assert after == expected[-len(after) :]
