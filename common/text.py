"""Text files, as whatever editor wrote them."""

import codecs
from pathlib import Path

from common.errors import UserError, reason


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A file's text, lines ending in "\\n": UTF-8 with or without a byte order mark, or UTF-16 with one.

    errors: as of bytes.decode, for UTF-8. Raises UserError when the file cannot be read or decoded.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(codecs.BOM_UTF8):
            text = data.decode("utf-8-sig", errors)
        elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = data.decode("utf-16")
        else:
            text = data.decode("utf-8", errors)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; save it as UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
