"""Text files as people have them: with a byte order mark, in UTF-16, with any line ends."""

import codecs
from pathlib import Path

from common.errors import UserError, reason

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file, line ends as \\n. errors: of decoding, as bytes.decode has it. Raises UserError when it cannot be
    read."""
    try:
        data = Path(path).read_bytes()
        if data.startswith(UTF_16):
            text = data.decode("utf-16", errors)
        else:
            text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give a text file in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number, spaces of any kind inside as plain ones."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, " ".join(line.split())) for number, line in lines if line.strip()]
