"""Each texture has its own prompt, or the run ends before it starts."""

import json
import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image

from atlas_dataset.build_atlas_large import main as build_main
from atlas_dataset.sources import HuggingFaceATLAS
from common.errors import UserError
from common.pictures import open_image

COUNT = 12


def colour(number: int) -> tuple[int, int, int]:
    return 20 * number, 250 - 20 * number, 7


def prompt_of(encoded: bytes) -> str:
    """The prompt of a picture, from its own pixels."""
    return f"outfit {open_image(encoded).getpixel((0, 0))[0] // 20}"


def save_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        Image.new("RGB", (4, 4), colour(number)).save(folder / name)


@pytest.fixture()
def folder(tmp_path) -> Path:
    """1.png ... 12.png, and what macOS and people leave beside them."""
    save_pictures(tmp_path / "pictures", [f"{number}.png" for number in range(1, COUNT + 1)])
    (tmp_path / "pictures" / "._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "pictures" / ".DS_Store").write_bytes(b"\0")
    return tmp_path / "pictures"


def is_paired(source: HuggingFaceATLAS) -> bool:
    return len(source) > 0 and all(prompt == prompt_of(encoded) for encoded, prompt in source)


def write_prompts(file: Path, form: str, order=range(1, COUNT + 1), column="file_name", prefix="") -> Path:
    rows = [(f"{prefix}{number}.png", f"outfit {number}") for number in order]
    if form == "plain":
        file.write_text("\n".join(prompt for _, prompt in rows) + "\n\n")
    elif form == "csv":
        file.write_text(f"id,prompt,{column}\n" + "".join(f'7,"{prompt}",{name}\n' for name, prompt in rows))
    elif form == "jsonl":
        file.write_text("".join(json.dumps({column: name, "text": prompt}) + "\n" for name, prompt in rows))
    elif form == "texts":
        for name, prompt in rows:
            (file / name).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf" + prompt.encode() + b"\r\n")
    return file


def test_plain_lines_go_with_the_order_of_numbers(folder, tmp_path):
    source = HuggingFaceATLAS(str(folder), write_prompts(tmp_path / "prompts.txt", "plain"))
    assert len(source) == COUNT and is_paired(source)


def test_other_kinds_of_pictures_count(tmp_path):
    names = ["1.png", "2.tga", "3.tif", "4.bmp", "5.webp", "6.png"]
    save_pictures(tmp_path / "mixed", names)
    (tmp_path / "prompts.txt").write_text("\n".join(f"outfit {number}" for number in range(1, 7)))
    source = HuggingFaceATLAS(str(tmp_path / "mixed"), tmp_path / "prompts.txt")
    assert len(source) == 6 and is_paired(source)


@pytest.mark.parametrize("column", ["file_name", "file", "image"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_prompts_that_name_their_textures_come_in_any_order(form, column, folder, tmp_path):
    order = [3, 1, 12, *range(4, 12), 2]
    prompts = write_prompts(tmp_path / f"prompts.{form}", form, order, column)
    assert is_paired(HuggingFaceATLAS(str(folder), prompts))
    prompts = write_prompts(tmp_path / f"prompts.{form}", form, order, column, prefix="pictures/")
    assert is_paired(HuggingFaceATLAS(str(folder), prompts)), "named from where the prompts lie"
    limited = HuggingFaceATLAS(str(folder), prompts, limit=2)
    assert len(limited) == 2 and is_paired(limited)


@pytest.mark.parametrize("form", ["csv", "jsonl", "texts"])
def test_a_folder_carries_its_own_prompts(form, folder):
    """As `datasets` (metadata) and kohya's scripts (NAME.txt) lay it out."""
    write_prompts(folder if form == "texts" else folder / f"metadata.{form}", form)
    source = HuggingFaceATLAS(str(folder))
    assert len(source) == COUNT and is_paired(source)
    if form != "texts":
        rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder.parent))
        assert len(rows) == COUNT and {"prompt", "text"} & set(rows.column_names), "the layout is that of `datasets`"


def test_spreadsheets_of_other_countries(folder, tmp_path):
    text = "Image;Prompt\n" + "".join(f'{number}.png;"outfit {number}"\n' for number in range(1, COUNT + 1))
    (tmp_path / "prompts.csv").write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
    assert is_paired(HuggingFaceATLAS(str(folder), tmp_path / "prompts.csv"))
    (tmp_path / "prompts.csv").write_text('file,prompt\n1.png,"a man, in\nred, ""so"" he says"\n')
    source = HuggingFaceATLAS(str(one_picture(tmp_path, "1.png")), tmp_path / "prompts.csv")
    assert source[0][1] == 'a man, in red, "so" he says'
    accent = unicodedata.normalize("NFD", "ä.png")
    (tmp_path / "prompts.csv").write_text("file,prompt\n" + unicodedata.normalize("NFC", accent) + ",a man\n")
    assert HuggingFaceATLAS(str(one_picture(tmp_path, accent)), tmp_path / "prompts.csv")[0][1] == "a man"


def one_picture(tmp_path: Path, name: str) -> Path:
    save_pictures(tmp_path / f"folder of {name}", [name])
    return tmp_path / f"folder of {name}"


REFUSED = {
    "missing.csv": ("file,prompt\n1.png,a\n3.png,b\n", r"line 3: '3\.png' is missing"),
    "unread.csv": ("file,prompt\n1.png,a\n2.heic,b\n", r"line 3: '2\.heic' is no texture that can be read"),
    "unnamed.csv": ("file,prompt\n1.png,a\n", r"no prompt for 2\.png"),
    "twice.csv": (
        "file,prompt\n1.png,a\n\n2.png,b\n./1.png,c\n",
        r"line 5: '\./1\.png' is named a second.*line 2",
    ),
    "empty.csv": ("file,prompt\n1.png,\n2.png,b\n", r"line 2: the prompt of '1\.png' is empty"),
    "unquoted.csv": ("file,prompt\n1.png,a man, in red\n2.png,b\n", "line 2 has 3 cells, line 1 has 2"),
    "no header.csv": ("1.png,a\n2.png,b\n", "line 1 must name its columns"),
    "nothing.csv": ("", "line 1 must name its columns"),
    "missing.jsonl": ('{"file_name": "3.png", "text": "a"}\n', r"line 1: '3\.png' is missing"),
    "null.jsonl": ('{"file_name": "1.png", "text": null}\n', "line 1 must be like"),
    "keys.jsonl": ('{"file_name": "1.png"}\n', "line 1 must be like"),
    "broken.jsonl": ('{"file_name": "1.png", "text": "a"}\n{"file\n', "line 2 is not JSON"),
    "more.txt": ("a\nb\nc\n", "2 textures but 3 prompts"),
    "fewer.txt": ("a\n", "2 textures but 1 prompts"),
    "blank.txt": ("a\n\nb\n", "line 2 is empty"),
    "names.txt": ("1.png, a man\n2.png, a woman\n", "line 1 names its texture"),
    "json.txt": ('{"file_name": "1.png", "text": "a"}\n{}\n', "line 1 names its texture"),
    "list.json": ("[]", "give a CSV or JSONL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_pair_is_refused_with_its_line(name, tmp_path):
    save_pictures(tmp_path / "two", ["1.png", "2.png"])
    (tmp_path / "two" / "2.heic").touch()
    text, message = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        HuggingFaceATLAS(str(tmp_path / "two"), tmp_path / name)


def test_text_files_that_do_not_pair_are_refused(tmp_path):
    folder = tmp_path / "two"
    save_pictures(folder, ["1.png", "2.png"])
    with pytest.raises(UserError, match="holds no prompts; give them with --prompts"):
        HuggingFaceATLAS(str(folder))
    (folder / "1.txt").write_text("outfit 1\n")
    with pytest.raises(UserError, match=r"2\.png has no prompt: .*2\.txt is missing"):
        HuggingFaceATLAS(str(folder))
    (folder / "2.txt").write_text("outfit 2\nanother\n")
    with pytest.raises(UserError, match=r"2\.txt holds 2 lines"):
        HuggingFaceATLAS(str(folder))
    (folder / "2.txt").write_text("outfit 2")
    assert is_paired(HuggingFaceATLAS(str(folder)))
    save_pictures(folder, ["2.jpg"])
    with pytest.raises(UserError, match=r"2\.jpg and 2\.png have one prompt"):
        HuggingFaceATLAS(str(folder))


def test_a_limit_takes_the_first_of_both(folder, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt", "plain", range(1, COUNT + 5))
    with pytest.raises(UserError, match="12 textures but 16 prompts"):
        HuggingFaceATLAS(str(folder), prompts)
    source = HuggingFaceATLAS(str(folder), prompts, limit=3)
    assert len(source) == 3 and is_paired(source)
    with pytest.raises(UserError, match="12 textures but 16 prompts"):
        HuggingFaceATLAS(str(folder), prompts, limit=13)


def save_table(folder: Path, paths: list[str | None], prompts: list[str | None] | None = None) -> Path:
    save_pictures(folder.parent / "stored", [f"{number}.png" for number in range(1, len(paths) + 1)])
    stored = [(folder.parent / "stored" / f"{number}.png").read_bytes() for number in range(1, len(paths) + 1)]
    columns = {"image": [{"bytes": data, "path": path} for data, path in zip(stored, paths)]}
    features = {"image": datasets.Image()}
    if prompts:
        columns["text"], features["text"] = prompts, datasets.Value("string")
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "data" / "._train-00000-of-00001.parquet").write_bytes(b"\0")
    return folder


def test_tables_pair_by_name_order_or_column(tmp_path):
    cache = str(tmp_path / "cache")
    named = save_table(tmp_path / "named", ["1.png", "2.png", "3.png"])
    prompts = write_prompts(tmp_path / "prompts.csv", "csv", [3, 1, 2])
    assert is_paired(HuggingFaceATLAS(str(named), prompts, cache))
    nameless = save_table(tmp_path / "nameless", [None] * 3)
    with pytest.raises(UserError, match="these have no names"):
        HuggingFaceATLAS(str(nameless), prompts, cache)
    assert is_paired(HuggingFaceATLAS(str(nameless), write_prompts(tmp_path / "p.txt", "plain", [1, 2, 3]), cache))
    with pytest.raises(UserError, match="holds no prompts"):
        HuggingFaceATLAS(str(nameless), None, cache)
    captioned = save_table(tmp_path / "captioned", [None] * 2, ["outfit 1", "outfit 2"])
    assert is_paired(HuggingFaceATLAS(str(captioned), None, cache))
    gap = save_table(tmp_path / "gap", [None] * 2, ["outfit 1", None])
    with pytest.raises(UserError, match=r"row 1 of .*gap has no prompt"):
        HuggingFaceATLAS(str(gap), None, cache)


def test_the_command_shows_the_first_and_the_last_pair_before_it_works(folder, mesh, tmp_path, run_script):
    write_prompts(folder / "metadata.jsonl", "jsonl", [2, 1, *range(3, COUNT + 1)])
    arguments = ["--textures", folder, "--body", f"obj:{mesh}", "--views", 0, "--out", tmp_path / "out"]
    status, out, _ = run_script(build_main, *arguments)
    assert status == 0 and f"{COUNT} textures" in out
    first, last, work = out.splitlines()[:3]
    assert first.endswith("1.png: outfit 1") and last.endswith("12.png: outfit 12") and "will take" in work
    rows = datasets.load_dataset(str(tmp_path / "out"), "textures", split="train", cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("texture", datasets.Image(decode=False))
    assert all(row["prompt"] == prompt_of(row["texture"]["bytes"]) for row in rows) and len(rows) == COUNT


def test_procedural_textures_keep_to_their_body(mesh, tmp_path, run_script):
    arguments = ["--textures", "procedural:2", "--body", f"obj:{mesh}", "--out", tmp_path / "out"]
    status, _, error = run_script(build_main, *arguments)
    assert status == 2 and "procedural textures are painted on anny" in error and not (tmp_path / "out").exists()
