import codecs

import pytest

from common.errors import UserError
from common.text import read_lines, read_text

LINES = ["a woman in a yellow dress", "ein Mann in grüner Hose"]
ENCODED = {
    "utf-8": "{}\n{}\n".format(*LINES).encode(),
    "no end": "{}\n{}".format(*LINES).encode(),
    "mark and CRLF": codecs.BOM_UTF8 + "{}\r\n{}\r\n".format(*LINES).encode(),
    "old Macintosh": "{}\r{}\r".format(*LINES).encode(),
    "utf-16, little-endian": codecs.BOM_UTF16_LE + "{}\r\n{}\r\n".format(*LINES).encode("utf-16-le"),
    "utf-16, big-endian": codecs.BOM_UTF16_BE + "{}\n{}\n".format(*LINES).encode("utf-16-be"),
    "utf-32": codecs.BOM_UTF32_LE + "{}\n{}\n".format(*LINES).encode("utf-32-le"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_lines_are_the_same_in_every_encoding(name, tmp_path):
    (tmp_path / "lines.txt").write_bytes(ENCODED[name])
    assert read_lines(tmp_path / "lines.txt") == list(enumerate(LINES, 1))
    assert read_text(tmp_path / "lines.txt").removesuffix("\n").split("\n") == LINES


def test_a_line_ends_where_an_editor_ends_it(tmp_path):
    text = "blue jeans\u2028with a red belt\n\n \t\na man\x85in \x0bgreen \n\ufeffa boy\n\n"
    (tmp_path / "lines.txt").write_text(text, encoding="utf-8")
    lines = read_lines(tmp_path / "lines.txt")
    assert lines == [(1, "blue jeans with a red belt"), (4, "a man in  green"), (5, "a boy")]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read_lines(tmp_path / "empty.txt") == [] and read_text(tmp_path / "empty.txt") == ""


def test_what_is_no_text_is_refused_and_named(tmp_path):
    file = tmp_path / "prompts.txt"
    with pytest.raises(UserError, match=r"cannot read .*prompts\.txt: No such file"):
        read_text(file)
    with pytest.raises(UserError, match="cannot read"):
        read_text(tmp_path)
    for data in ("grün".encode("latin-1"), codecs.BOM_UTF16_LE + b"a", b"\x89PNG\r\n\x1a\n\0\0"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"prompts\.txt.*save it as UTF-8"):
            read_text(file)
    file.write_bytes("a man".encode("utf-16-le"))  # without a mark each second byte is a NUL
    with pytest.raises(UserError, match="NUL characters"):
        read_lines(file)
    file.write_bytes(b"# Gr\xfcn\r\nv 1 2 3\r\n")
    assert read_text(file, errors="replace") == "# Gr\ufffdn\nv 1 2 3\n"
