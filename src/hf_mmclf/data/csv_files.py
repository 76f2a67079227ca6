"""Rows of CSV files. The separator is found; every row is read, or an error names the line that cannot be read."""

import codecs
import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
COMPETITION_HEADERS = (["ImageID", "Labels", "Caption"], ["ImageID", "Caption"])
Rows = Iterator[tuple[int, dict[str, str]]]  # the line on which a row begins, and its cells by column


class LineError(ValueError):
    """
    A line that cannot be read.

    Args:
        path (`Path`): The file.
        line (`int`): The number of the line.
        reason (`str`): What is wrong with it.
    """

    def __init__(self, path: Path, line: int, reason: str):
        super().__init__(f"{path}, line {line}: {reason}")
        self.line = line


def read_lines(path: Path) -> Iterator[str]:
    """
    Yield the lines of a text file with their ends. Only line feeds end a line; other line breaks belong to the fields.

    The file is UTF-8, with or without a byte order mark, or UTF-16 with one. It is decompressed if it ends in `.gz`.

    Raises:
        `ValueError`: If the file is something else.
    """
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            file.seek(0)
            lines = io.TextIOWrapper(file, "utf-16", newline="\n") if wide else file
            for number, content in enumerate(lines, 1):
                line = content if wide else content.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in line:
                    raise UnicodeError("it contains the character NUL, as UTF-16 does")
                yield line
    except UnicodeError as error:
        raise LineError(path, number, f"not UTF-8 ({error}); save the file as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed: {error}") from None


def csv_readers(path: Path) -> list[Callable[[], Rows]]:
    """
    Return the ways to read a CSV file, of which the first that reads all of it is right.

    The separator is that of a first line such as `sep=;`, as Excel writes it, or else the one of `SEPARATORS` that
    gives the most columns in the header.

    Args:
        path (`Path`): The file. If it ends in `.tsv`, tabs come first among separators that give as many columns.

    Raises:
        `ValueError`: If the header is not a list of distinct names.
    """
    lines, start = read_lines(path), 2  # the first line after the header
    first = next(lines, "").rstrip("\r\n")
    declared = re.fullmatch(r'"?sep=(.)"?', first, re.IGNORECASE)
    if declared:
        first, start = next(lines, "").rstrip("\r\n"), 3
    usual = "\t" if ".tsv" in path.name.lower() else ","
    separators = declared[1] if declared else [usual, *SEPARATORS]
    headers = {mark: [] if "\r" in first else next(csv.reader([first], delimiter=mark), []) for mark in separators}
    separator = max(headers, key=lambda mark: len(headers[mark]))
    header = headers[separator]
    if len(set(header)) != len(header) or not header:
        raise LineError(path, start - 1, f"expected a header of distinct column names, got {first[:200]!r}")
    if separator != usual:
        logger.info(f"{path.name}: the columns are separated by {SEPARATORS.get(separator, repr(separator))}")

    def read(reader: Callable[[], Iterator[tuple[int, list[str]]]]) -> Rows:
        return ((line, dict(zip(header, row, strict=True))) for line, row in reader())

    readers = [lambda: read(lambda: _plain_rows(path, separator, len(header), start))]
    if header in COMPETITION_HEADERS:
        readers.append(lambda: read(lambda: _competition_rows(path, len(header), start)))
    return readers


def _after(path: Path, start: int) -> Iterator[str]:
    return itertools.islice(read_lines(path), start - 1, None)


def _plain_rows(path: Path, separator: str, width: int, start: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a well-formed CSV. The reader is strict: a lenient one loses rows after a stray quote."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_after(path, start), delimiter=separator, strict=True)
    above = start - 1  # lines before those of the reader

    def shown(end: int) -> str:
        return repr("".join(itertools.islice(read_lines(path), start - 1, end))[:200])

    try:
        for row in reader:
            if row and len(row) != width:
                end = reader.line_num + above
                raise LineError(path, start, f"{len(row)} columns, expected {width}: {shown(end)}")
            if row:
                yield start, row
            start = reader.line_num + above + 1
    except csv.Error as error:
        reason = f"{error}: {shown(start + 1)}; quote the field and double the quotes inside it"
        raise LineError(path, start, reason) from None


_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"\s*')


def _competition_rows(path: Path, width: int, start: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of the competition's CSV, which no CSV reader reads correctly.

    The text is the last field. It may contain commas, line breaks and bare quotes, in quotes or not. A line that
    starts with the name of an image, or with a comma where the image is missing, is therefore a row. All other lines
    continue the text before them, which must then be in quotes.
    """
    labels = r'(?:"([^"]*)"|([^,"]*)),' if width == 3 else "()()"
    beginning = re.compile(
        rf'("?)([^,"]+\.(?:jpe?g|jfif|png|webp|bmp|gif|tiff?)|(?=\1,\S))\1,{labels}(.*)', re.IGNORECASE | re.DOTALL
    )
    row, quoted = None, False  # quoted: the text of the row has an open quote
    for line, content in enumerate(_after(path, start), start):
        content = content.removesuffix("\n")
        match = beginning.match(content)
        if match and not (quoted and not match[2]):
            if quoted and _QUOTED.fullmatch("\n".join([*row[2], content])):
                raise LineError(path, line, f"a row, or the end of the text before it? {content[:200]!r}")
            if row:
                yield _finish_competition_row(path, *row)
            _, name, quoted_labels, bare_labels, text = match.groups()
            row = (line, [name, quoted_labels or bare_labels or ""][: width - 1], [text])
            quoted = text.startswith('"') and text.count('"') % 2 == 1
        elif quoted:
            row[2].append(content)
            quoted = content.count('"') % 2 == 0
        elif content.strip():
            reason = f"neither a row (image.jpg,...) nor inside a quoted text: {content[:200]!r}"
            raise LineError(path, line, reason)
    if row:
        yield _finish_competition_row(path, *row)


def _finish_competition_row(path: Path, line: int, fields: list[str], lines: list[str]) -> tuple[int, list[str]]:
    text = "\n".join(lines).rstrip("\r\n")
    if _QUOTED.fullmatch(text):
        text = text.rstrip()[1:-1].replace('""', '"')
    elif "\n" in text:
        raise LineError(path, line, f"the quote of the text is never closed: {text[:200]!r}")
    return line, [*fields, text]
