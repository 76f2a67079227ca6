"""examples/prepare_coco.py, on a hand-made miniature of COCO's annotations."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_mmclf import DataArguments
from hf_mmclf.data.prepare import prepare_data

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


def test_invalid_flags(example, coco, capsys):
    assert "--rows is 5; expected 1 to 4" in error_of(example, capsys, "--rows", "5")
    assert "val2017" in error_of(example, capsys, "--split", "val2017")
    run(example)
    with pytest.raises(SystemExit):
        run(example)
    assert "coco already exists" in capsys.readouterr().err
