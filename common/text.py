"""Text files as people's tools write them."""

import codecs
from pathlib import Path

from common.errors import UserError, reason


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file in UTF-8 or, where its byte order mark says so, UTF-16; all line ends become "\\n".

    errors: as of bytes.decode. Raises UserError, with the path, for a file that cannot be read or decoded.
    """
    try:
        data = Path(path).read_bytes()
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig", errors)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 or UTF-16 text ({reason(error)}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
