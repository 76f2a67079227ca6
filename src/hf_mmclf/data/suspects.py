"""Labels that look wrong. They are used as they are, and each kind gives one warning with examples."""

import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

import numpy as np

MISSING = {"nan", "none", "null", "n/a", "na", "<na>", "#n/a", "nil", "?", "-", "--", ".", "unknown", "undefined"}
MARKS = "#/+&:~\\|;,，；｜、"  # characters that separate labels in some tables
SHOWN = 3  # examples in one warning


def label_warnings(rows: Iterable[Sequence[str]], where: Sequence[str]) -> list[str]:
    """
    Describe labels that look like missing values, like spellings of one label, or like several labels in one.

    Args:
        rows (`Iterable[Sequence[str]]`): The labels of each row.
        where (`Sequence[str]`): The names of the rows.
    """
    counts, first = Counter(), {}
    for place, labels in zip(where, rows, strict=True):
        counts.update(labels)
        for label in labels:
            first.setdefault(label, place)

    def shown(labels: Sequence[str]) -> str:
        return ", ".join(f"{label!r} ({first[label]}, {counts[label]:,} in all)" for label in labels[:SHOWN])

    warnings = []
    if pieces := list(filter(_is_piece, counts)):
        warnings.append(f"these labels look like pieces of lists: {shown(pieces)}; write them as JSON lists")
    if missing := [label for label in counts if label.lower() in MISSING]:
        warnings.append(
            f"these labels look like missing values, and are labels: {shown(missing)}; leave such cells empty"
        )
    if alike := [shown(labels) for labels in _spellings(counts) if len(labels) > 1]:
        some = "; ".join(alike[:SHOWN])
        warnings.append(f"these labels look like spellings of one label: {some}; {len(alike):,} such groups in all")
    if len(set(map(len, counts))) == 1 and all(map(re.compile("[01]{3,}").fullmatch, counts)):
        warnings.append(
            f"these labels look like multi-hot lists without separators: {shown(list(counts))}; write them as lists, "
            "[1, 0, 0, 1], and name their labels by --label_names_file"
        )
    for mark, joined in _joined(counts):
        some = f"{len(joined):,} of {len(counts):,} labels"
        advice = f"if it separates labels, give --label_delimiter '{mark}'"
        warnings.append(f"{some} contain {mark!r}, such as {shown(joined)}; {advice}")
    return warnings


def _joined(labels: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each character that seems to separate labels inside of labels, and the labels that contain it."""
    for mark in MARKS:
        joined = [label for label in labels if mark in label.strip(mark)]
        if joined and len({part.strip() for label in labels for part in label.split(mark)}) < len(labels):
            yield mark, joined


def _is_piece(label: str) -> bool:
    """Return whether a label has a bracket without its counterpart."""
    return re.search(r"[][(){}]", re.sub(r"\(.*\)|\[.*\]|\{.*\}", "", label)) is not None


def _spellings(labels: Iterable[str]) -> Iterable[list[str]]:
    """Group labels that differ only in how they are written."""
    groups = defaultdict(list)
    for label in labels:
        groups[_plain(label)].append(label)
    return groups.values()


def _plain(label: str) -> str:
    """Return a label without case, blanks, invisible characters, hyphens and quotes; a number in its usual form."""
    plain = unicodedata.normalize("NFKC", html.unescape(label)).casefold()
    visible = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")
    plain = re.sub(r"[\s_\-'\"`“”‘’«»]+", "", visible) or label
    return f"{float(visible):g}" if re.fullmatch(r"\d{1,15}(\.\d{1,15})?", visible.strip()) else plain


def contradictions(
    keys: Sequence[Hashable], names: Sequence[str | None], labels: np.ndarray, where: Sequence[str]
) -> list[str]:
    """
    Describe rows of one image, or of one text without an image, that have different labels.

    Args:
        keys (`Sequence`): What is equal for rows that should agree; `None` for rows to leave out.
        names (`Sequence[str]`): The name of each row's image, or its text.
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels.
        where (`Sequence[str]`): The names of the rows.
    """
    seen, differing = {}, {}
    for row, key in enumerate(keys):
        if key is not None and not np.array_equal(labels[seen.setdefault(key, row)], labels[row]):
            differing.setdefault(key, row)
    if not differing:
        return []
    shown = [f"{names[row]!r} ({where[seen[key]]} and {where[row]})" for key, row in list(differing.items())[:SHOWN]]
    return [f"{len(differing):,} images or texts occur with different labels: {', '.join(shown)}"]
