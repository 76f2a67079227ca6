"""Labels that look wrong. They are used as they are, and each kind gives one warning with examples."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

MISSING = {"nan", "none", "null", "n/a", "na", "<na>", "#n/a", "nil"}
MARKS = "#/+&:~\\|;,"  # characters that separate labels in some tables
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
    for mark in MARKS:
        joined = [label for label in counts if mark in label.strip(mark)]
        if joined and len({part.strip() for label in counts for part in label.split(mark)}) < len(counts):
            some = f"{len(joined):,} of {len(counts):,} labels"
            advice = f"if it separates labels, give --label_delimiter '{mark}'"
            warnings.append(f"{some} contain {mark!r}, such as {shown(joined)}; {advice}")
    return warnings


def _is_piece(label: str) -> bool:
    """Return whether a label has a bracket without its counterpart."""
    return re.search(r"[][(){}]", re.sub(r"\(.*\)|\[.*\]|\{.*\}", "", label)) is not None


def _spellings(labels: Iterable[str]) -> Iterable[list[str]]:
    """Group labels that differ only in case, blanks, underscores and hyphens."""
    groups = defaultdict(list)
    for label in labels:
        groups[re.sub(r"[\s_-]+", "", label.casefold())].append(label)
    return groups.values()


def contradictions(keys: Sequence[str | None], labels: np.ndarray, where: Sequence[str]) -> list[str]:
    """
    Describe rows of one image, or of one text without an image, that have different labels.

    Args:
        keys (`Sequence[str]`): The name of each row's image or its text, `None` for rows to leave out.
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels.
        where (`Sequence[str]`): The names of the rows.
    """
    seen, differing = {}, {}
    for row, key in enumerate(keys):
        if key is not None and not np.array_equal(labels[seen.setdefault(key, row)], labels[row]):
            differing.setdefault(key, row)
    if not differing:
        return []
    shown = [f"{key!r} ({where[seen[key]]} and {where[row]})" for key, row in list(differing.items())[:SHOWN]]
    return [f"{len(differing):,} images or texts occur with different labels: {', '.join(shown)}"]
