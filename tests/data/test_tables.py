import csv
import gzip
import io
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import openpyxl
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PILImage

from hf_mmclf.data import tables
from hf_mmclf.data.tables import read_source, read_table

DATA = Path(os.environ.get("HF_MMCLF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; HF_MMCLF_DATA names another place")

ROWS = [{"image": "a.jpg", "text": "a dog, wet", "tags": "1|2"}, {"image": "b.jpg", "text": 'a "cat"', "tags": "3"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def delimited(rows, **options):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read(path, content):
    return read_table(write(path, content)).remove_columns("where").to_list()


def texts(tmp_path, lines, header="ImageID,Labels,Caption"):
    """Return the texts that are read from a competition file with these lines."""
    return [row["Caption"] for row in read(tmp_path / "train.csv", "\n".join([header, *lines]) + "\n")]


# Forms


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.csv", delimited(ROWS)),
        ("rows.csv", delimited(ROWS, lineterminator="\n", quoting=csv.QUOTE_ALL)),
        ("rows.tsv", delimited(ROWS, delimiter="\t")),
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("rows.json", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
    ],
)
def test_a_table_is_read_as_it_is_written(tmp_path, name, content):
    assert read(tmp_path / name, content) == ROWS
    assert read(tmp_path / name, b"\xef\xbb\xbf" + content.encode()) == ROWS  # Excel's byte order mark


def test_parquet_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{**row, "where": "here"} for row in ROWS]).to_parquet(path)
    table = read_table(path)
    assert table.remove_columns("where").to_list() == ROWS
    assert table["where"][:] == ["rows.parquet:1", "rows.parquet:2"]  # never a column of the same name


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("train.csv", 'ImageID,Labels,Caption\n1.jpg,1,"two\nlines"\n\n2.jpg,1,b\n', [2, 5]),
        ("rows.csv", 'image,text\n\n1.jpg,"two\nlines"\n2.jpg,b', [3, 5]),
        ("rows.jsonl", '\n{"text": "a"}\n\n{"text": "b"}', [2, 4]),
    ],
)
def test_where_names_the_line_on_which_a_row_begins(tmp_path, name, content, lines):
    table = read_source(write(tmp_path / name, content))["train"]
    assert table["where"][:] == [f"{name}:{line}" for line in lines]


def test_json_objects_may_leave_keys_out(tmp_path):
    rows = read(tmp_path / "rows.jsonl", '{"text": "a", "labels": ["x"]}\n{"labels": [], "image": "b.jpg"}')
    assert rows == [
        {"text": "a", "labels": ["x"], "image": None},
        {"text": None, "labels": [], "image": "b.jpg"},
    ]


def test_a_table_read_in_pieces_is_the_table_read_at_once(tmp_path, monkeypatch):
    """Columns that begin late, are empty at first, or turn from whole numbers to others, or from empty lists."""
    rows = [{"image": "a.jpg"}, {"tags": []}, {"id": 1}, {"tags": ["x", None]}, {"text": "b", "id": 2.5}, {"size": {}}]
    json_lines = "\n".join(map(json.dumps, rows))
    lines = delimited([{"ImageID": f"{i}.jpg", "Caption": "two\nlines" * (i % 2)} for i in range(7)])
    at_once = read(tmp_path / "t.jsonl", json_lines), read(tmp_path / "t.csv", lines)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    assert (read(tmp_path / "t.jsonl", json_lines), read(tmp_path / "t.csv", lines)) == at_once
    where = [f"t.csv:{line}" for line in (2, 3, 5, 6, 8, 9, 11)]
    assert read_table(tmp_path / "t.csv")["where"][:] == where


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.jsonl", '{"a": "x"}\n{}\n{}\n{}\n{"a": 3}\n', "line 5: column 'a' is int here, but str on line 1"),
        ("t.csv", "a,b\n1,2\n1,2\n1,2\n\n1,2,3\n1,2\n", "line 6: 3 columns, expected 2: '1,2,3.n'"),
        ("t.csv", 'a,b\n1,2\n1,2\n1,"2\n2" 3\n4,5\n', "line 4: .*: '1,\"2.n2\" 3.n'; quote the field"),
        ("t.csv", b"a,b\n1,2\n1,2\n1,caf\xe9\n1,2\n", "line 4: not UTF-8"),
        ("t.csv", "ImageID,Caption\n1.jpg,a\n2.jpg,b\n3.jpg,c\nx\n", "line 5: neither a row .*'x'"),
    ],
)
def test_what_cannot_be_read_in_a_later_piece_is_named_too(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path / name, content))


def test_a_folder_with_metadata_is_the_training_split(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,text\nb/a.jpg,a dog\n")
    splits = read_source(str(tmp_path))
    assert {name: split.to_list() for name, split in splits.items()} == {
        "train": [{"file_name": "b/a.jpg", "text": "a dog", "where": "metadata.csv:2"}]
    }


def test_split_folders_prefix_names_and_places(tmp_path):
    write(tmp_path / "train" / "metadata.csv", "file_name,text\na.jpg,a dog\n,no image\n")
    write(tmp_path / "val" / "metadata.jsonl", '{"file_name": "a.jpg", "text": "a cat"}')
    splits = read_source(str(tmp_path))
    assert list(splits) == ["train", "validation"]
    assert splits["train"]["file_name"][:] == ["train/a.jpg", ""]
    assert splits["validation"]["file_name"][:] == ["val/a.jpg"]
    assert splits["train"]["where"][:] == ["train/metadata.csv:2", "train/metadata.csv:3"]
    assert splits["validation"]["where"][:] == ["val/metadata.jsonl:1"]


def test_a_folder_of_tables_has_their_splits(tmp_path):
    for stem, suffix in (("train", ".csv"), ("dev", ".tsv"), ("test", ".csv")):
        write(tmp_path / f"{stem}{suffix}", f"text\n{stem}\n")
    splits = read_source(str(tmp_path))
    assert {name: split["text"][:] for name, split in splits.items()} == {
        "train": ["train"],
        "validation": ["dev"],
        "test": ["test"],
    }
    write(tmp_path / "valid.csv", "text\nagain\n")
    with pytest.raises(ValueError, match="dev.tsv and valid.csv are both 'validation'. Expected .*, each once"):
        read_source(str(tmp_path))


def test_split_names_have_any_case_and_other_parts_are_said_to_be_left_out(tmp_path, notices):
    for name in ("Train.CSV", "EVAL.csv", "train_extra.csv", "metadata.csv", "more/metadata.csv"):
        write(tmp_path / name, f"file_name,text\na.png,{name}\n")
    splits = read_source(str(tmp_path))
    assert {name: split["text"][:] for name, split in splits.items()} == {
        "train": ["Train.CSV"],
        "validation": ["EVAL.csv"],
    }
    assert notices() == [
        f"{tmp_path}: left out, because it is no split: metadata.csv, train_extra.csv, more/metadata.csv"
    ]
    rows = Dataset.from_dict({"text": ["a"]})
    assert list(read_source(DatasetDict(Validation=rows, unsupervised=rows, TRAIN=rows))) == ["train", "validation"]
    assert notices() == ["data: left out, because it is no split: unsupervised"]


def image_bytes():
    file = io.BytesIO()
    PILImage.new("RGB", (4, 3), "red").save(file, "png")
    return file.getvalue()


def test_saved_data_sets_keep_their_bytes_and_splits(tmp_path):
    rows = Dataset.from_dict({"image": [{"bytes": image_bytes(), "path": None}], "text": ["red"]})
    rows = rows.cast_column("image", Image())
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "val": rows, "other": rows}).save_to_disk(tmp_path / "two")

    one, two = read_source(str(tmp_path / "one")), read_source(str(tmp_path / "two"))
    assert list(one) == ["train"] and list(two) == ["train", "validation"]
    assert one["train"][0]["image"].size == (4, 3)
    stored = two["validation"].cast_column("image", Image(decode=False))[0]["image"]["bytes"]
    assert stored == image_bytes()
    assert two["validation"]["where"][:] == ["two/val:1"]  # no path of this machine


def test_other_names_are_data_sets_of_the_hub(monkeypatch):
    rows = Dataset.from_dict({"text": ["a"]})
    asked = []
    hub = {
        "user/pets": DatasetDict(train=rows, dev=rows),
        "user/one": rows,
        "user/odd": DatasetDict(val=rows, dev=rows),
    }
    monkeypatch.setattr(tables, "load_dataset", lambda name: asked.append(name) or hub[name])
    monkeypatch.setattr(tables, "check_reachable", lambda name: None)
    assert list(read_source("user/pets")) == ["train", "validation"]
    assert read_source("user/one")["train"]["where"][:] == ["user/one/train:1"]
    with pytest.raises(ValueError, match=r"splits val, dev; val and dev are both 'validation'. Expected .* each once"):
        read_source("user/odd")
    assert asked == ["user/pets", "user/one", "user/odd"]


@pytest.mark.parametrize("mark, words", [(",", None), (";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
@pytest.mark.parametrize("declared", [False, True])
def test_the_separator_is_found_and_said(tmp_path, notices, mark, words, declared):
    content = delimited(ROWS, delimiter=mark)
    assert read(tmp_path / "rows.CSV", f"sep={mark}\n{content}" if declared else content) == ROWS
    assert notices() == ([f"rows.CSV: the columns are separated by {words}"] if words else [])


def test_lines_below_a_declared_separator_have_their_numbers(tmp_path):
    with pytest.raises(ValueError, match="line 4: 3 columns, expected 2"):
        read(tmp_path / "t.csv", "sep=;\na;b\n1;2\n1;2;3\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_encodings_of_excel(tmp_path, encoding):
    assert read(tmp_path / "rows.tsv", delimited(ROWS, delimiter="\t").encode(encoding)) == ROWS


def test_compressed_tables(tmp_path):
    assert read(tmp_path / "rows.csv.gz", gzip.compress(delimited(ROWS).encode())) == ROWS
    assert read(tmp_path / "rows.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode())) == ROWS
    with pytest.raises(ValueError, match="cannot be decompressed"):
        read(tmp_path / "rows.csv.gz", gzip.compress(delimited(ROWS * 999).encode())[:-20])


@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays(tmp_path, indent):
    assert read(tmp_path / "rows.json", json.dumps(ROWS, indent=indent)) == ROWS
    assert read_table(tmp_path / "rows.json")["where"][:] == [f"rows.json:{row}" for row in range(1, len(ROWS) + 1)]


def test_excel_files(tmp_path, notices):
    with pd.ExcelWriter(tmp_path / "rows.xlsx") as file:
        pd.DataFrame({"text": ["a dog", None], "labels": ["dog", "1 3"], "n": [1, 2]}).to_excel(file, index=False)
        pd.DataFrame({"x": [1]}).to_excel(file, sheet_name="more")
    table = read_source(str(tmp_path / "rows.xlsx"))["train"]
    assert table["text"][:] == ["a dog", None] and table["labels"][:] == ["dog", "1 3"] and table["n"][:] == [1, 2]
    assert table["where"][:] == ["rows.xlsx:2", "rows.xlsx:3"]
    assert notices() == ["rows.xlsx: the sheet 'Sheet1' is read, 1 more are left out"]


def test_tables_in_memory(notices):
    rows = {"text": ["a dog", None], "labels": ["dog", "cat"]}
    for source in (pd.DataFrame(rows), Dataset.from_dict(rows), DatasetDict(train=Dataset.from_dict(rows))):
        table = read_source(source)["train"]
        assert table.remove_columns("where").to_dict() == rows and len(set(table["where"])) == 2
    read_source(Dataset.from_dict({**rows, "where": ["x", "y"]}))
    assert notices() == ["data/train: its column 'where' is left out, because the places of rows have this name"]


def test_images_of_pillow_in_a_table_of_pandas():
    frame = pd.DataFrame({"image": [PILImage.new("RGB", (4, 3)), None], "text": ["a", "b"]})
    first, second = read_source(frame)["train"]["image"]
    assert first.size == (4, 3) and second is None


@pytest.mark.parametrize(
    "source, message",
    [
        ([{"text": "a"}], "data is a list; expected a path"),
        (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "data is a IterableDataset; expected a path"),
        (pd.Series(["a"]), "data is a Series; expected a path"),
        (pd.DataFrame({"text": []}), "data/train: no rows"),
        (pd.DataFrame(), "expected columns with different names"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "expected columns with different names"),
        (pd.DataFrame({"text": ["a", "b"], "labels": [["cat"], "cat"]}), "'labels' has cells of the types list, str"),
        (pd.DataFrame({"text": ["a", "b"], "labels": [1, "1"]}), "'labels' has cells of the types int, str"),
        (Dataset.from_dict({"text": ["a"]}).with_transform(lambda rows: rows), "data/train has a transform"),
    ],
)
def test_what_is_no_table_in_memory(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_source(source)


def test_formats_of_datasets_are_taken_off():
    rows = Dataset.from_dict({"text": ["a"], "labels": [[1, 2]]})
    assert read_source(rows.with_format("torch"))["train"][0]["labels"] == [1, 2]


def test_formulas_of_excel_without_a_value(tmp_path):
    book = openpyxl.Workbook()
    for row in (("text", "labels"), ("a dog", "dog"), ("a cat", '="cat"')):
        book.active.append(row)
    book.active["C4"] = "=1+1"  # the last row has no value at all
    book.save(tmp_path / "rows.xlsx")  # openpyxl computes nothing
    with pytest.raises(ValueError, match="""rows.xlsx:3: column 'labels' has the formula '="cat"' and no value"""):
        read_source(str(tmp_path / "rows.xlsx"))
    book.active["B3"] = "cat"
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(ValueError, match="rows.xlsx:4: column 'Unnamed: 2' has the formula '=1[+]1' and no value"):
        read_source(str(tmp_path / "rows.xlsx"))


# The competition's own file


@pytest.mark.parametrize(
    "lines",
    [
        ["a0.jfif,1,a dog", "a1.jfif,2,a cat"],
        ["0,1,a dog", "1,2,a cat"],
        ['"a, 0.jpg",1,a dog', '"a, 1.jpg",2,a cat'],
    ],
)
def test_a_valid_csv_under_the_competitions_header(tmp_path, lines):
    assert texts(tmp_path, lines) == ["a dog", "a cat"]


@pytest.mark.parametrize(
    "written, text",
    [
        ("a dog", "a dog"),
        ("a dog, a cat, and more", "a dog, a cat, and more"),
        ('"a dog, a cat"', "a dog, a cat"),
        ('"a ""stop"" sign"', 'a "stop" sign'),
        ('a man says "hi" to a dog', 'a man says "hi" to a dog'),
        ('"hi" says a man', '"hi" says a man'),
        ('"hi" and "ho", says a man', '"hi" and "ho", says a man'),
        ('"hi says a man', '"hi says a man'),
        ('a 5" nail', 'a 5" nail'),
        ('""hi"" says a man', '""hi"" says a man'),
        ('"', '"'),
        ('""', ""),
        ('""""', '"'),
        ("", ""),
        ('"two\nlines"', "two\nlines"),
        ('"two\r\nlines\rand\n\n\nmore, or ""less""\n"', 'two\r\nlines\rand\n\n\nmore, or "less"\n'),
        ('"a list:\n, then a comma"', "a list:\n, then a comma"),
        ("naïve café 狗", "naïve café 狗"),
        ("a\u2028b\x85c\x0bd", "a\u2028b\x85c\x0bd"),  # breaks to str.splitlines, not to a CSV
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header, middle", [("ImageID,Labels,Caption", "1 3,"), ("ImageID,Caption", "")])
def test_a_text_of_any_form_is_one_row(tmp_path, written, text, end, header, middle):
    lines = [header, f"7.jpg,{middle}before", f"8.jpg,{middle}{written}", f"9.jpg,{middle}after"]
    for tail in (end, "", end * 3):
        rows = read(tmp_path / "train.csv", end.join(lines) + tail)
        assert [row["Caption"] for row in rows] == ["before", text, "after"]
        assert [row["ImageID"] for row in rows] == ["7.jpg", "8.jpg", "9.jpg"]
        assert {row.get("Labels", "1 3") for row in rows} == {"1 3"}


@pytest.mark.parametrize("written", ['"hi says a man', '"', '"""', '"hi" says "a man'])
def test_an_unclosed_quote_swallows_no_rows(tmp_path, written):
    lines = [f"7.jpg,1,{written}", '8.jpg,1,"a dog, wet"', f"9.jpg,1,{written}", "10.jpg,1,says 'hi'"]
    assert texts(tmp_path, lines) == [written, "a dog, wet", written, "says 'hi'"]
    assert texts(tmp_path, lines[:3]) == [written, "a dog, wet", written]


@pytest.mark.parametrize(
    "line, row",
    [
        ("7.jpg,,a dog", ["7.jpg", "", "a dog"]),
        (",1 3,a dog", ["", "1 3", "a dog"]),
        (",,a dog", ["", "", "a dog"]),
        ('7.jpg,"1,3",a dog', ["7.jpg", "1,3", "a dog"]),
        ('"7.jpg","1 3","a dog"', ["7.jpg", "1 3", "a dog"]),
        ('"",1,a dog', ["", "1", "a dog"]),
        ("data/my dog.JPEG,traffic light|dog,a dog", ["data/my dog.JPEG", "traffic light|dog", "a dog"]),
        ("7.jpg,1,", ["7.jpg", "1", ""]),
    ],
)
def test_names_and_labels_of_competition_rows(tmp_path, line, row):
    rows = read(tmp_path / "train.csv", f"ImageID,Labels,Caption\n{line}\n9.jpg,1,b\n")
    assert [list(row.values()) for row in rows] == [row, ["9.jpg", "1", "b"]]


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_random_texts_come_back_as_a_csv_writer_wrote_them(tmp_path, width, quoting):
    rng = random.Random(0)
    pieces = ["a", "dog", " ", ",", '"', '""', "\n", "\r", "\r\n", "é", "狗", "\u2028", "'", ", ", '",', "1 3"]
    written = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(2000)]
    rows = [[f"{i}.jpg", "1 3", text][:: 2 if width == 2 else 1] for i, text in enumerate(written)]
    file = io.StringIO()
    csv.writer(file, quoting=quoting).writerows([["ImageID", "Labels", "Caption"][:: 2 if width == 2 else 1], *rows])
    found = read(tmp_path / "train.csv", file.getvalue())
    assert [list(row.values()) for row in found] == rows


# What cannot be read


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "ImageID,Labels,Caption\n1.jpg,1,a, b\nx,1,b\n", "line 3: neither a row .*'x,1,b"),
        ("t.csv", "ImageID,Labels,Caption\n1.jpg;1;a\n", "line 2: neither a row"),
        ("t.csv", "ImageID,Labels,Caption\n1.jpg,1\n", "line 2: neither a row"),
        ("t.csv", "ImageID,Labels,Caption\n1.jpg,1,a dog\nand a cat\n", "line 3: neither a row .*'and a cat'"),
        ("t.csv", 'ImageID,Labels,Caption\n1.jpg,1,"a"\nand a cat\n', "line 3: neither a row"),
        ("t.csv", "ImageID,Caption\n1.jpg,a dog, wet\n, and a cat\n", "line 3: neither a row"),
        ("t.csv", 'ImageID,Labels,Caption\n0.jpg,1,a\n1.jpg,1,"a\nb\n2.jpg,1,c\n', "line 3: .*never closed: '\"a"),
        ("t.csv", 'ImageID,Labels,Caption\n1.jpg,1,"a\nb', "line 2: .*never closed"),
        (
            "t.csv",
            'ImageID,Caption\n2.jpg,a, b\n1.jpg,"see\nx.jpg, and more"\n',
            "line 4: a row, or the end of the text",
        ),
        ("t.csv", "image,text\na.jpg,b\nc.jpg,d,e\n", "line 3: 3 columns, expected 2: 'c.jpg,d,e"),
        ("t.csv", "image,text\na.jpg\n", "line 2: 1 columns, expected 2"),
        ("t.csv", 'image,text\na.jpg,b\nc.jpg,"hi" says a man\n', 'line 3: .*"hi" says .*quote the field'),
        ("t.csv", 'image,text\na.jpg,"b\nc.jpg,d\n', "line 2: "),
        ("t.csv", "image,text\na.jpg,b\rc.jpg,d\n", "line 2: "),
        ("t.csv", "image,text\ra.jpg,b\r", "line 1: expected a header"),
        ("t.csv", "image,image\na,b\n", "line 1: .*distinct column names, got 'image,image'"),
        ("t.csv", "", "line 1: expected a header"),
        ("t.csv", "ImageID,Labels,Caption\n", "no rows"),
        ("t.tsv", "image\ttext\n\n", "no rows"),
        ("t.jsonl", "\n", "no rows"),
        ("t.csv", b"text\nfine\ncaf\xe9\n", "line 3: not UTF-8"),
        ("t.csv", b"\xef\xbb\xbftext\r\nfine\r\ncaf\xe9\r\n", "line 3: not UTF-8"),
        ("t.csv", "text\na\n".encode("utf-16-le"), "line 1: not UTF-8"),
        ("t.csv.gz", "no gzip", "cannot be decompressed"),
        ("t.jsonl", '{"a": 1}\n{"a": }\n', "line 2: not JSON .*'{\"a\": }'"),
        ("t.json", '[{"a": 1}, 2]', "row 2: expected an object, got 2"),
        ("t.json", '[\n{"a": 1},\n{"a": }]', "line 3: not JSON .*'{\"a\": }]'"),
        ("t.json", '{\n"a": [1]\n}', "line 1: not JSON"),
        ("t.jsonl", '{"a": "x"}\n{"a": "y"}\n{"a": 3}\n', "line 3: column 'a' is int here, but str on line 1"),
        ("t.jsonl", '{"a": [1]}\n{"a": "1"}\n', "line 2: column 'a' is str here, but list on line 1"),
        ("t.parquet", "no parquet", "cannot be read as Parquet"),
        ("t.xlsx", "PK", "cannot be read as Excel"),
        ("t.ods", "PK", "unknown kind of table; expected one of .csv"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_source(path)
    assert str(error.value).startswith(path)


@pytest.mark.parametrize("source", ["rows.csv", "./rows", "/nowhere/rows"])
def test_a_source_that_is_not_there(source):
    with pytest.raises(ValueError, match=f"'{source}': no such file or folder"):
        read_source(source)


def test_folders_without_a_table(tmp_path):
    with pytest.raises(ValueError, match="nothing to read; expected metadata.csv"):
        read_source(str(tmp_path))
    write(tmp_path / "train" / "metadata.csv", "image,text\na.jpg,b\n")
    with pytest.raises(ValueError, match="expected a column file_name, got"):
        read_source(str(tmp_path))


# Real files


@needs_data
def test_every_row_of_the_real_competition_file():
    table = read_table(DATA / "captions" / "train.csv")
    assert len(table) == 27_044 == len(set(table["ImageID"][:]))
    counts = Counter(label for labels in table["Labels"][:] for label in labels.split())
    assert counts["1"] == 20_592 and set(counts) == {str(i) for i in range(1, 20) if i != 12}
    broken = [text for text in table["Caption"][:] if "\r" in text or "\n" in text]
    assert len(broken) == 4 and sum(text.count("\r") for text in broken) == 17
    assert all(text.strip('\r\n "') for text in table["Caption"][:])
    quoted = dict(zip(table["ImageID"][:], table["Caption"][:], strict=True))["9798.jpg"]
    assert quoted == 'Two street signs reading Nice Ave" and "Sapphire St" sit on top of a stop sign."'


@needs_data
def test_every_row_of_the_real_unlabelled_file():
    table = read_table(DATA / "captions" / "test_unlabelled.csv")
    assert table["ImageID"][:] == [f"{i}.jpg" for i in range(30_000, 40_000)]


@needs_data
@pytest.mark.parametrize("table, rows", [("competition/train.csv", 3257), ("coco301/all.csv", 301)])
def test_real_tables_name_images_that_exist(table, rows):
    names = read_table(DATA / table)["ImageID"][:]
    assert len(names) == rows and all(((DATA / table).parent / "data" / name).is_file() for name in names)
