"""Text files as people's editors write them: UTF-8 with or without a byte order mark, UTF-16, any line ends."""

import codecs
import json
import re
from pathlib import Path

from common.errors import UserError, reason

# UTF-32 before UTF-16, whose little-endian mark begins like it.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What str.splitlines takes for the end of a line and editors do not, such as U+2028.
BREAKS_IN_A_LINE = re.compile("[\v\f\x1c-\x1e\x85\u2028\u2029]")


def read_text(path: str | Path, errors: str = "strict") -> str:
    """The text of a file, decoded by its byte order mark or else as UTF-8, each line's end as a line feed.

    errors: as of bytes.decode; "strict" also refuses NUL characters, which UTF-16 without a mark is full of. Raises
    UserError when the file cannot be read or is no such text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; save it as UTF-8 text") from None
    if errors == "strict" and "\0" in text:
        raise UserError(f"{path} holds NUL characters: it is no text, or of another encoding; save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes):
    """What JSON says. Raises ValueError for what is none, and for what is nested more deeply than Python follows."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def one_line(text: str) -> str:
    """The text without spaces at its ends, line breaks of every kind and stray byte order marks in it as spaces."""
    return BREAKS_IN_A_LINE.sub(" ", text.replace("\ufeff", " ").replace("\r", " ").replace("\n", " ")).strip()


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number, from 1 on. Raises UserError as `read_text`."""
    lines = enumerate(map(one_line, read_text(path).split("\n")), 1)
    return [(number, line) for number, line in lines if line]
