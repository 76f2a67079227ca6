"""The embedded data set: the desk of a small toy shop, drawn by code from a seed. Nothing is downloaded.

A row has a photograph of the shelf and the note that a customer left with it. The shelf is a rack of two by two
compartments on a cloth. A compartment holds a toy or nothing, and no two toys have the same colour. Five labels can
only be seen, four can only be read, and three need both: the note asks for "the red one", and only the image shows
what the red one is. The shelf and the note are drawn independently, so neither says anything about the other. Some
notes are vague, and in some photographs wrapping paper covers compartments. What is hidden in this way limits every
model. The best F1 that is possible follows from the exact probabilities in the column `chances`.

    dataset = demo_dataset()
    dataset["train"][0]["text"], dataset["train"][0]["labels"]
"""

import io
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw

# Probability of each content of a compartment; None is an empty one. The block has no label.
KINDS = {"ball": 0.13, "boat": 0.11, "kite": 0.08, "star": 0.03, "block": 0.43, None: 0.22}
LABELLED, WANTED = ("ball", "boat", "kite", "star"), ("ball", "boat", "kite")
COLOURS = {"red": (214, 48, 49), "yellow": (245, 196, 30), "green": (38, 160, 90), "blue": (45, 105, 215)}
STATED = {"gift": 0.42, "repair": 0.28, "delivery": 0.15, "complaint": 0.05}
# Probability that the cloth is striped, that a note asks for a colour, that a note is vague, that paper covers
# compartments, and that a note has a near miss of each kind, or an opener or a closer.
STRIPED, ORDERED, VAGUE, COVERED, NEAR_MISS, CHATTER = 0.17, 0.8, 0.06, 0.12, 0.15, 0.4

# Each label and the modality that shows it, in the order of the `chances` column.
DEMO_LABELS = {
    **dict.fromkeys((*LABELLED, "striped"), "image"),
    **dict.fromkeys(STATED, "text"),
    **{f"wants {kind}": "both" for kind in WANTED},
}

# Outlines in units of the radius of the toy; y points down.
SHAPES = {
    "ball": [(math.sin(i * math.pi / 16), -math.cos(i * math.pi / 16)) for i in range(32)],
    "boat": [(-1, 0.3), (-0.1, 0.3), (-0.1, -1), (0.8, 0), (0.1, 0), (0.1, 0.3), (1, 0.3), (0.6, 1), (-0.6, 1)],
    "kite": [(0, -1), (0.75, -0.2), (0, 1), (-0.75, -0.2)],
    "star": [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate((1, 0.42) * 5)],
    "block": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
}
PAPER, RACK = (176, 146, 112), (96, 74, 60)
FINE = 2  # images are drawn larger by this factor

# The parts of notes, by the name of a list. Words with stars are the evidence. {braces} are filled from the slots,
# {colour} from the slot of the colour that is meant.
NOTES = json.loads(Path(__file__).with_name("demo_notes.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Compartment:
    """A compartment of the shelf. An empty one has a colour too: the one that is missing from the shelf."""

    kind: str | None
    colour: str
    covered: bool = False


@dataclass(frozen=True)
class Note:
    """What a customer says: the colour that is asked for, and the stated labels."""

    order: str | None
    stated: tuple[str, ...]


UNSEEN = [Compartment(None, colour, covered=True) for colour in COLOURS]


def demo_dataset(rows: int = 3000, size: int = 64, seed: int = 0) -> DatasetDict:
    """
    Draw the toy shop data set.

    Args:
        rows (`int`, *optional*, defaults to 3000):
            Number of rows, at least 10. A tenth, rounded down, is `validation`, a tenth `test`, the rest `train`.
        size (`int`, *optional*, defaults to 64):
            Side of the square images in pixels, at least 64.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws. The same seed gives the same rows, byte for byte.

    Returns:
        `DatasetDict`: The splits `train`, `validation` and `test` with the columns

        - `image`: an RGB image of `size` x `size` pixels.
        - `text`: an English text, never empty.
        - `labels`: a list of strings, a subset of `DEMO_LABELS` in its order. It may be empty.
        - `evidence`: one `{"label", "boxes", "words"}` for each entry of `labels`: the pixel boxes `[x0, y0, x1, y1]`
          (x1 and y1 exclusive) and the indices into `text.split()` that show it. They are empty if that modality does
          not show the label, or if paper or a vague note hides it.
        - `chances`: `{"image", "text", "both"}`, each a list with the probability of every label of `DEMO_LABELS`
          given what the modality shows.

    Raises:
        `ValueError`: If `rows` is below 10 or `size` is below 64.
    """
    if rows < 10:
        raise ValueError(f"rows is {rows}; at least 10 are needed to leave a row for each split.")
    if size < 64:
        raise ValueError(f"size is {size}; toys are only recognisable in images of at least 64 pixels.")
    rng = random.Random(f"toy shop {seed}")
    sizes = {"train": rows - rows // 10 * 2, "validation": rows // 10, "test": rows // 10}
    features = Features(
        {
            "image": Image(),
            "text": Value("string"),
            "labels": [Value("string")],
            "evidence": [{"label": Value("string"), "boxes": [[Value("int32")]], "words": [Value("int32")]}],
            "chances": {modality: [Value("float32")] for modality in ("image", "text", "both")},
        }
    )
    return DatasetDict(
        {
            name: Dataset.from_list([_draw_row(rng, size) for _ in range(count)], features=features)
            for name, count in sizes.items()
        }
    )


def _draw_row(rng: random.Random, size: int) -> dict:
    covered = rng.sample(range(4), rng.choice((1, 2))) if rng.random() < COVERED else []
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=4)
    colours = rng.sample(list(COLOURS), 4)
    shelf = [Compartment(kinds[i], colours[i], i in covered) for i in range(4)]
    striped = rng.random() < STRIPED
    order = rng.choice(list(COLOURS)) if rng.random() < ORDERED else None
    note = Note(order, tuple(label for label, rate in STATED.items() if rng.random() < rate))
    read = None if rng.random() < VAGUE else note
    image, boxes = _draw_image(rng, shelf, striped, size)
    text, words = _write_note(rng, read)
    truth = _chances([Compartment(cell.kind, cell.colour) for cell in shelf], striped, note)
    labels = [label for label, chance in zip(DEMO_LABELS, truth, strict=True) if chance == 1]
    return {
        "image": {"bytes": image, "path": None},
        "text": text,
        "labels": labels,
        "evidence": [_evidence(label, shelf, boxes, order, words, size) for label in labels],
        "chances": {
            "image": _chances(shelf, striped, None),
            "text": _chances(UNSEEN, None, read),
            "both": _chances(shelf, striped, read),
        },
    }


def _chances(shelf: list[Compartment], striped: bool | None, note: Note | None) -> list[float]:
    """Return the probability of each label given what is on view. `None` for `striped` or `note` means not seen."""
    hidden = sum(cell.covered for cell in shelf)
    on_view = {cell.colour: cell.kind for cell in shelf if cell.kind and not cell.covered}

    def wanted(kind: str, colour: str) -> float:
        if colour in on_view:
            return float(on_view[colour] == kind)
        # A colour that is not on view is as likely under the paper as in any empty compartment.
        return hidden / (len(COLOURS) - len(on_view)) * KINDS[kind]

    chances = {label: float(label in note.stated) if note else rate for label, rate in STATED.items()}
    chances["striped"] = STRIPED if striped is None else float(striped)
    for kind in LABELLED:
        chances[kind] = 1.0 if kind in on_view.values() else 1 - (1 - KINDS[kind]) ** hidden
    for kind in WANTED:
        if note is None:
            chances[f"wants {kind}"] = ORDERED * sum(wanted(kind, colour) for colour in COLOURS) / len(COLOURS)
        else:
            chances[f"wants {kind}"] = wanted(kind, note.order) if note.order else 0.0
    return [chances[label] for label in DEMO_LABELS]


def _evidence(label: str, shelf: list[Compartment], boxes: list, order: str | None, words: dict, size: int) -> dict:
    kind = label.removeprefix("wants ")
    wanted = label != kind
    toys = [(cell, box) for cell, box in zip(shelf, boxes, strict=True) if box and cell.kind == kind]
    shown = [box for cell, box in toys if not wanted or cell.colour == order]
    if label == "striped":
        shown = [[0, 0, size, size]]
    return {"label": label, "boxes": shown, "words": words.get("order" if wanted else label, [])}


def _draw_image(rng: random.Random, shelf: list[Compartment], striped: bool, size: int) -> tuple[bytes, list]:
    """Return PNG bytes and, for each compartment, the box of its toy, or None if no toy is on view."""
    cloth = tuple(rng.randint(205, 245) for _ in range(3))
    # Drawn larger and reduced, so that edges are smooth.
    image = PILImage.new("RGB", (size * FINE, size * FINE), cloth)
    draw = ImageDraw.Draw(image)
    if striped:
        step = size * FINE // 8
        for x in range(rng.randrange(step), size * FINE, step):
            draw.rectangle((x, 0, x + step // 2 - 1, size * FINE), fill=tuple(c - 45 for c in cloth))
    half, boxes = size // 2, []
    for i, cell in enumerate(shelf):
        left, top = i % 2 * half, i // 2 * half
        radius = rng.randint(size * 10 // 64, size * 13 // 64)
        x, y = (corner + rng.randint(radius + 2, half - radius - 2) for corner in (left, top))
        if cell.covered:
            _draw_paper(rng, draw, left, top, half)
        boxes.append(_draw_toy(draw, cell, x, y, radius) if cell.kind and not cell.covered else None)
    for line in ((half, 0, half, size), (0, half, size, half)):
        draw.line([c * FINE for c in line], fill=RACK, width=2 * FINE)
    pixels = np.asarray(image.reduce(FINE), dtype=np.int16)
    grain = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape) // 16 - 8.0
    if any(cell.covered for cell in shelf):
        grain *= 3
    buffer = io.BytesIO()
    PILImage.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue(), boxes


def _draw_paper(rng: random.Random, draw: ImageDraw.ImageDraw, left: int, top: int, side: int) -> None:
    edge = (left * FINE, top * FINE, (left + side) * FINE - 1, (top + side) * FINE - 1)
    draw.rectangle(edge, fill=PAPER)
    for _ in range(4):  # creases
        ends = [(rng.randint(edge[0], edge[2]), rng.randint(edge[1], edge[3])) for _ in range(2)]
        draw.line(ends, fill=tuple(c - 30 for c in PAPER), width=FINE)


def _draw_toy(draw: ImageDraw.ImageDraw, cell: Compartment, x: int, y: int, radius: int) -> list[int]:
    """Draw a toy and return its box."""
    outline = np.array([x, y]) + radius * np.array(SHAPES[cell.kind])
    colour = COLOURS[cell.colour]
    points = [tuple(point) for point in outline * FINE]
    draw.polygon(points, fill=colour, outline=tuple(c * 2 // 3 for c in colour), width=FINE)
    return [*np.floor(outline.min(axis=0)).astype(int), *np.ceil(outline.max(axis=0)).astype(int) + 1]


def _write_note(rng: random.Random, note: Note | None) -> tuple[str, dict[str, list[int]]]:
    """Return the text and, by stated label or "order", the indices of the words that show it. None is a vague note."""
    words: list[str] = []
    evidence: dict[str, list[int]] = {}
    for label, template in _sentences(rng, note) if note else [(None, rng.choice(NOTES["vague_notes"]))]:
        for word in re.sub(r"{(\w+)}", lambda slot: rng.choice(NOTES["slots"][slot[1]]), template).split():
            if "*" in word:
                evidence.setdefault(label, []).append(len(words))
            words.append(word.replace("*", ""))
    return " ".join(words), evidence


def _sentences(rng: random.Random, note: Note) -> list[tuple[str | None, str]]:
    """Return what each sentence states (a label, "order" or nothing) and its template."""
    body = [(label, rng.choice(NOTES["sentences"][label])) for label in note.stated]
    missed = [label for label in NOTES["near_misses"] if label not in note.stated and rng.random() < NEAR_MISS]
    body += [(None, rng.choice(NOTES["near_misses"][label])) for label in missed]
    if rng.random() < NEAR_MISS:
        body.append((None, rng.choice(NOTES["colour_misses"]).replace("colour", rng.choice(list(COLOURS)))))
    if note.order:
        body.append(("order", rng.choice(NOTES["orders"]).replace("colour", note.order)))
    else:
        body.append((None, rng.choice(NOTES["browsing"])))
    rng.shuffle(body)
    opener = [(None, rng.choice(NOTES["openers"]))] if rng.random() < CHATTER else []
    closer = [(None, rng.choice(NOTES["closers"]))] if rng.random() < CHATTER else []
    return opener + body + closer
