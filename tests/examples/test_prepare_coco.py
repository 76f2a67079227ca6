"""examples/prepare_coco.py, on a hand-made miniature of COCO's annotations."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_mmclf import DataArguments
from hf_mmclf.data.prepare import prepare_data

DATA = Path(os.environ.get("HF_MMCLF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; HF_MMCLF_DATA names another place")

NAMES = "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
NAMES = (NAMES + "parking meter,bench,bird,cat,dog,horse").split(",")
IDS = [*range(1, 12), *range(13, 20)]

OBJECTS = {  # by image: category, and 1 for a crowd
    9: [(18, 0), (1, 0), (1, 0), (1, 0)],  # several of one kind
    25: [(19, 0), (20, 0), (90, 0)],  # sheep and toothbrush are none of the 18
    30: [(1, 1)],  # a crowd and nothing else
    34: [(20, 0), (44, 0)],  # none of the 18
    36: [(3, 0)],  # no caption
    42: [],
    49: [(10, 0), (2, 0)],
}
CAPTIONS = {  # by image: id of the annotation, text
    9: [(7, "A later caption"), (3, "Two people, a dog\nand nobody else \n")],
    25: [(8, '"Horse" says the sign, "no sheep"')],
    30: [(11, " \n"), (12, "People, people, people")],  # the first is blank
    34: [(1, "A sheep")],
    42: [(2, "Nothing")],
    49: [(4, "000000000009.jpg,1,is not a row of its own"), (5, "second"), (6, "third")],
}
ROWS = [
    ("000000000009.jpg", "1 18", "Two people, a dog and nobody else"),
    ("000000000025.jpg", "19", '"Horse" says the sign, "no sheep"'),
    ("000000000030.jpg", "1", "People, people, people"),
    ("000000000049.jpg", "2 10", "000000000009.jpg,1,is not a row of its own"),
]


@pytest.fixture(scope="module")
def example(load_example):
    return load_example("prepare_coco")


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A folder with annotations as COCO has them, with images that are not sorted by id."""
    monkeypatch.chdir(tmp_path)
    images = [{"id": i, "file_name": f"{i:012}.jpg", "height": 8, "width": 8, "license": 1} for i in OBJECTS][::-1]
    outline = {"segmentation": [[1.5, 2.5, 3.5, 4.5]], "area": 2.0, "bbox": [1, 2, 3, 4]}
    objects = [
        {"id": 1000 + number, "image_id": image, "category_id": category, "iscrowd": crowd, **outline}
        for number, (image, (category, crowd)) in enumerate((i, o) for i, found in OBJECTS.items() for o in found)
    ]
    captions = [{"image_id": i, "id": n, "caption": text} for i, found in CAPTIONS.items() for n, text in found]
    categories = [{"supercategory": "thing", "id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)]
    categories.append({"supercategory": "animal", "id": 20, "name": "sheep"})
    about = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none", "url": ""}], "images": images}
    Path("annotations").mkdir()
    for kind, more in (
        ("instances", {"annotations": objects, "categories": categories}),
        ("captions", {"annotations": captions}),
    ):
        Path("annotations", f"{kind}_train2017.json").write_text(json.dumps({**about, **more}))
    Path("train2017").mkdir()
    for image in images:
        Image.new("RGB", (8, 8)).save(Path("train2017", image["file_name"]))
    return tmp_path


def run(example, *flags):
    example.main(["annotations", "train2017", "--output", "coco", *flags])
    with open("coco/train.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["ImageID", "Labels", "Caption"]
    return [tuple(row) for row in rows]


def error_of(example, capsys, *flags):
    with pytest.raises(SystemExit) as caught:
        run(example, *flags)
    assert caught.value.code == 2
    assert set(os.listdir()) == {"annotations", "train2017"}  # no incomplete file is left
    return capsys.readouterr().err.partition("error: ")[2]


def test_rows_and_names(example, coco, capsys):
    assert run(example) == ROWS
    assert json.loads(Path("coco/labels.json").read_text()) == {str(i): n for i, n in zip(IDS, NAMES, strict=True)}
    assert sorted(os.listdir("coco")) == ["labels.json", "train.csv"]
    said = capsys.readouterr().out
    assert "4 of 7 images have a caption and at least one of the 18 labels" in said
    command = "--data coco/train.csv --image_dir train2017 --label_names_file coco/labels.json"
    assert said.endswith(f"{command}\n")


def test_the_package_reads_what_was_meant(example, coco):
    run(example)
    args = DataArguments(
        "coco/train.csv",
        validation_data="coco/train.csv",
        test_fraction=0.0,
        image_dir="train2017",
        label_names_file="coco/labels.json",
    )
    prepared = prepare_data(args)
    assert (prepared.labels.ids, prepared.labels.names) == (tuple(map(str, IDS)), tuple(NAMES))
    train = prepared.splits["train"]
    assert list(zip(train["image"], train["text"], strict=True)) == [(name, text) for name, _, text in ROWS]
    found = [np.array(IDS)[np.array(labels) > 0].tolist() for labels in train["labels"]]
    assert found == [[int(label) for label in labels.split()] for _, labels, _ in ROWS]


def test_a_sample_depends_on_the_seed(example, coco):
    def sample(seed):
        rows = run(example, "--rows", "2", "--seed", str(seed))
        for file in Path("coco").iterdir():
            file.unlink()
        Path("coco").rmdir()
        return rows

    samples = [sample(seed) for seed in range(6)]
    assert sample(3) == samples[3] and len(set(map(tuple, samples))) > 1
    assert all(len(rows) == 2 and rows == sorted(rows) and set(rows) <= set(ROWS) for rows in samples)


def test_a_random_caption_depends_on_seed_and_image_only(example, coco):
    objects = example.read_annotations(Path("annotations/instances_train2017.json"))
    captions = example.read_annotations(Path("annotations/captions_train2017.json"))
    drawn = [example.build_rows(objects, captions, seed) for seed in range(8)]
    assert {rows[-1]["Caption"] for rows in drawn} == {text for _, text in CAPTIONS[49]}
    fewer = {**objects, "images": [image for image in objects["images"] if image["id"] == 49]}
    assert [example.build_rows(fewer, captions, seed)[0] for seed in range(8)] == [rows[-1] for rows in drawn]
    assert "Two people, a dog and nobody else" in {rows[0]["Caption"] for rows in drawn}


def test_missing_images(example, coco, capsys):
    Path("train2017/000000000034.jpg").unlink()  # not in any row
    for name in ("000000000025.jpg", "000000000049.jpg"):
        Path("train2017", name).unlink()
    error = error_of(example, capsys)
    assert error.startswith("2 of 4 images are not in train2017 (000000000025.jpg, 000000000049.jpg);")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("captions", None, "annotations/captions_train2017.json"),
        ("captions", '{"images": [', "annotations/captions_train2017.json: not JSON"),
        ("instances", "[]", "instances_train2017.json: expected COCO's object"),
        ("instances", '{"images": [], "annotations": [], "categories": []}', "no names of the categories [1, 2, 3,"),
    ],
)
def test_invalid_annotations(file, content, message, example, coco, capsys):
    path = Path(f"annotations/{file}_train2017.json")
    path.unlink() if content is None else path.write_text(content)
    assert message in error_of(example, capsys)


COMPETITION = [  # the rows of the miniature, in the competition's form
    ("0.jpg", "1 18", "Two people, a dog and nobody else"),
    ("1.jpg", "19", '"Horse" says the sign, "no sheep"'),
    ("2.jpg", "1", "People, people, people"),
    ("3.jpg", "2 10", "000000000009.jpg,1,is not a row of its own"),
]


def as_of_2014():
    for kind in ("instances", "captions"):
        Path(f"annotations/{kind}_train2017.json").rename(f"annotations/{kind}_train2014.json")


def test_the_competitions_own_rows(example, coco, capsys, monkeypatch):
    """The images are numbered in the order of their ids; ids without a label or a caption leave no gap."""
    as_of_2014()
    monkeypatch.setattr(example, "TRAIN", 3)
    monkeypatch.setattr(example, "TEST", 1)
    assert run(example, "--competition") == COMPETITION[:3]
    with open("coco/test.csv", newline="", encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == COMPETITION[3:]
    numbers = Path("coco/coco_ids.csv").read_text().split()
    assert numbers == ["ImageID,coco_file", *(f"{i}.jpg,{row[0]}" for i, row in enumerate(ROWS))]
    for (number, *_), (name, *_) in zip(COMPETITION, ROWS, strict=True):
        assert Path("coco/data", number).samefile(Path("train2017", name))
    said = capsys.readouterr().out
    assert "3 rows: coco/train.csv\n1 rows: coco/test.csv\n" in said and "Only" not in said
    assert "--data coco/train.csv --image_dir coco/data" in said
    args = DataArguments("coco/train.csv", validation_data="coco/test.csv", image_dir="coco/data", test_fraction=0.0)
    prepared = prepare_data(dataclasses.replace(args, label_names_file="coco/labels.json"))
    assert prepared.splits["train"]["image"] == ["0.jpg", "1.jpg", "2.jpg"]


def test_fewer_rows_than_the_competition_has_are_said(example, coco, capsys):
    as_of_2014()
    assert run(example, "--competition") == COMPETITION
    assert "Only 4 rows, and the competition has 40,000" in capsys.readouterr().out
    assert not Path("coco/test.csv").exists()


@needs_data
def test_the_recorded_numbers_of_the_competition_ascend():
    """The first rows by number, and ascending ids: what the rule of --competition says of the real rows."""
    with (DATA / "competition" / "coco_ids.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ImageID"] for row in rows] == [f"{number}.jpg" for number in range(40_000)]
    ids = [int(row["coco_train2014_id"]) for row in rows]
    assert ids == sorted(set(ids))


def test_invalid_flags(example, coco, capsys):
    assert "leave out --rows" in error_of(example, capsys, "--competition", "--rows", "5")
    assert "leave out --rows" in error_of(example, capsys, "--competition", "--split", "val2014")
    assert "--rows is 5; expected 1 to 4" in error_of(example, capsys, "--rows", "5")
    assert "val2017" in error_of(example, capsys, "--split", "val2017")
    run(example)
    with pytest.raises(SystemExit):
        run(example)
    assert "coco already exists" in capsys.readouterr().err
