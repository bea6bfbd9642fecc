import pytest
from PIL import Image

from common.errors import UserError
from common.files import temporary_name, write_whole
from common.pictures import PICTURE_SUFFIXES, open_image, picture_files


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    names = ["1.png", "2.png", "9.png", "10.png", "12.png", "a1b2.png", "a1b10.png", "a2b1.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in picture_files(tmp_path)] == names
    (tmp_path / "01.png").touch()
    assert [path.name for path in picture_files(tmp_path)][:3] == ["01.png", "1.png", "2.png"], "one order for all"


def test_hidden_and_foreign_files_are_no_pictures(tmp_path):
    folder = tmp_path / ".hidden above" / "[1]"
    folder.mkdir(parents=True)
    for name in ("1.png", "._1.png", ".DS_Store", "Thumbs.db", "prompts.txt", ".hidden.jpg"):
        (folder / name).touch()
    (folder / "folder.png").mkdir()
    assert [path.name for path in picture_files(folder)] == ["1.png"]


def test_every_kind_that_counts_as_a_picture_is_read(tmp_path):
    for suffix in PICTURE_SUFFIXES:
        file = tmp_path / f"red{suffix.upper()}"
        Image.new("RGB", (16, 16), "red").save(file, format={".jfif": "JPEG"}.get(suffix))
        red, green, blue = open_image(file).convert("RGB").getpixel((8, 8))
        assert red > 240 and green < 15 and blue < 15, suffix
    assert len(picture_files(tmp_path)) == len(PICTURE_SUFFIXES)


def test_pictures_of_other_kinds_are_named(tmp_path, capsys):
    for name in ("1.png", "2.HEIC", "3.exr", "4.psd", "5.svg", "notes.txt", "._6.heic"):
        (tmp_path / name).touch()
    assert len(picture_files(tmp_path)) == 1
    said = capsys.readouterr().err
    assert all(name in said for name in ("2.HEIC", "3.exr", "4.psd", "5.svg"))
    assert "notes.txt" not in said and "6.heic" not in said
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="no pictures in"):
        picture_files(tmp_path)
    assert "2.HEIC" in capsys.readouterr().err


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        assert temporary_name(tmp_path / "file").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("common.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())
