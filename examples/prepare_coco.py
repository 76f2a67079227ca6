"""Make a data set like the competition's from COCO: images with one caption each and any of 18 labels.

    python examples/prepare_coco.py annotations train2017 --rows 30000 --output coco
    hf-mmclf train --data coco/train.csv --image_dir train2017 --label_names_file coco/labels.json

With --competition it makes the competition's own 40,000 rows instead, from COCO's train2014:

    python examples/prepare_coco.py annotations train2014 --competition --output competition
    hf-mmclf train --config examples/configs/competition.yaml --data competition/train.csv \\
        --image_dir competition/data --label_names_file competition/labels.json

Nothing is downloaded: unpack `annotations` (annotations_trainval2017.zip) and `train2017` (train2017.zip) of
https://cocodataset.org/#download first, or the files of 2014 for --competition. The labels of an image are the
categories 1 to 19 (there is no 12) of its objects, crowds included. Images without such an object or caption are
left out. The competition numbers the others in the order of COCO's ids: 0.jpg to 29999.jpg are its training rows, the
next 10,000 its test rows.
"""

import argparse
import csv
import json
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

TRAIN, TEST = 30_000, 10_000  # rows of the competition
CATEGORIES = [number for number in range(1, 20) if number != 12]
# The keys that are kept. The outlines, which are left out, would need three times the memory.
KEYS = {"images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id", "caption"}


def read_annotations(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read COCO's lists `images`, `annotations` and (for objects) `categories`, with `KEYS` only."""

    def needed(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key in KEYS}

    print(f"Reading {path} ({path.stat().st_size / 2**20:,.0f} MB in one piece, which takes a while)", flush=True)
    with path.open(encoding="utf-8") as file:
        try:
            content = json.load(file, object_hook=needed)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}; is the download complete?") from None
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"{path}: expected COCO's object with the lists images and annotations")
    return content


def build_rows(objects: dict[str, Any], captions: dict[str, Any], seed: int | None = None) -> list[dict[str, str]]:
    """
    Make rows of all images with a caption and at least one of `CATEGORIES`, in the order of COCO's ids.

    Args:
        objects, captions (`dict`): Annotations from [`read_annotations`].
        seed (`int`, *optional*): Seed that draws one of an image's captions. Defaults to the first caption.

    Returns:
        `list[dict[str, str]]`: The columns `ImageID`, `Labels` and `Caption`.
    """
    labels, texts = defaultdict(set), defaultdict(list)
    for annotation in tqdm(objects["annotations"], "objects", unit_scale=True):
        if annotation["category_id"] in CATEGORIES:
            labels[annotation["image_id"]].add(annotation["category_id"])
    for annotation in tqdm(captions["annotations"], "captions", unit_scale=True):
        if caption := " ".join(annotation["caption"].split()):  # some end in a line break
            texts[annotation["image_id"]].append((annotation["id"], caption))
    rows = []
    for image in sorted(objects["images"], key=lambda image: image["id"]):
        number = image["id"]
        if number in labels and number in texts:
            written = [caption for _, caption in sorted(texts[number])]
            # a generator for each image, so that its caption does not depend on other images
            caption = written[0] if seed is None else random.Random(f"{seed} {number}").choice(written)
            rows.append(
                {
                    "ImageID": image["file_name"],
                    "Labels": " ".join(map(str, sorted(labels[number]))),
                    "Caption": caption,
                }
            )
    return rows


def check_images(rows: Sequence[dict[str, str]], folder: Path) -> None:
    """Raise `FileNotFoundError` if images are missing, with their number and the first names."""
    missing = [row["ImageID"] for row in tqdm(rows, "images") if not (folder / row["ImageID"]).is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{len(missing):,} of {len(rows):,} images are not in {folder} ({shown}); unpack the zip file of this "
            "split, or give another folder"
        )


def number_rows(rows: Sequence[dict[str, str]]) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """
    Give rows the competition's image names.

    Args:
        rows (`Sequence[dict]`): Rows of [`build_rows`].

    Returns:
        `tuple[dict, dict]`: The rows of `train.csv`, of `test.csv` if there are more than `TRAIN`, and of
        `coco_ids.csv`; the file of each image by its new name.
    """
    if len(rows) < TRAIN + TEST:
        print(f"Only {len(rows):,} rows, and the competition has {TRAIN + TEST:,}; is this all of train2014?")
    files = {f"{number}.jpg": row["ImageID"] for number, row in enumerate(rows[: TRAIN + TEST])}
    numbered = [{**row, "ImageID": name} for name, row in zip(files, rows, strict=False)]
    ids = [{"ImageID": name, "coco_file": file} for name, file in files.items()]
    tables = {"train.csv": numbered[:TRAIN], "test.csv": numbered[TRAIN:], "coco_ids.csv": ids}
    return {name: table for name, table in tables.items() if table}, files


def link_image(file: Path, link: Path) -> None:
    """Give an image another name without a copy: by a hard link or, on another disk, by a symbolic one."""
    link.parent.mkdir(exist_ok=True)
    try:
        os.link(file, link)
    except OSError:
        link.symlink_to(file.resolve())


def prepare(args: argparse.Namespace) -> None:
    """Read, sample, check and write the rows. The output folder is complete or does not exist."""
    if args.competition and (args.rows is not None or args.random_caption or args.split is not None):
        raise ValueError("--competition has all rows of train2014; leave out --rows, --random_caption and --split")
    args.split = args.split or ("train2014" if args.competition else "train2017")
    if args.output.exists():
        raise FileExistsError(f"{args.output} already exists; give another --output")
    objects = read_annotations(args.annotations / f"instances_{args.split}.json")
    names = {entry["id"]: entry["name"] for entry in objects.get("categories", ())}
    if missing := [number for number in CATEGORIES if number not in names]:
        raise ValueError(f"instances_{args.split}.json: no names of the categories {missing}; expected COCO's file")
    captions = read_annotations(args.annotations / f"captions_{args.split}.json")
    rows = build_rows(objects, captions, args.seed if args.random_caption else None)
    print(f"{len(rows):,} of {len(objects['images']):,} images have a caption and at least one of the 18 labels")
    if args.rows is not None:
        if not 0 < args.rows <= len(rows):
            raise ValueError(f"--rows is {args.rows:,}; expected 1 to {len(rows):,}")
        chosen = sorted(random.Random(args.seed).sample(range(len(rows)), args.rows))
        rows = [rows[index] for index in chosen]
    check_images(rows, args.images)
    tables, files = {"train.csv": rows}, {}
    if args.competition:
        tables, files = number_rows(rows)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
        stage = Path(scratch, "coco")
        stage.mkdir()
        for name, table in tables.items():
            with (stage / name).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, table[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(table)
        for number, name in tqdm(files.items(), "links"):
            link_image(args.images / name, stage / "data" / number)
        labels = {number: names[number] for number in CATEGORIES}
        (stage / "labels.json").write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
        stage.rename(args.output)
    for name, table in tables.items():
        print(f"{len(table):,} rows: {args.output / name}")
    print("Train on them with:")
    print(
        f"  hf-mmclf train --data {args.output / 'train.csv'} "
        f"--image_dir {args.output / 'data' if args.competition else args.images} "
        f"--label_names_file {args.output / 'labels.json'}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("annotations", type=Path, help="folder with instances_SPLIT.json and captions_SPLIT.json")
    parser.add_argument("images", type=Path, help="folder with the images, which are not copied")
    parser.add_argument("--output", type=Path, required=True, help="new folder for train.csv and labels.json")
    parser.add_argument(
        "--split", help="split of COCO: train2017 or val2017 (default: train2017, train2014 with --competition)"
    )
    parser.add_argument("--competition", action="store_true", help="the competition's own rows, from train2014")
    parser.add_argument("--rows", type=int, help="number of images, drawn at random (default: all)")
    parser.add_argument("--random_caption", action="store_true", help="a random caption of each image, not the first")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        prepare(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
