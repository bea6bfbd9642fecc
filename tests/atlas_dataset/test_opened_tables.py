"""Data sets are opened from folders of any name, and their rows are checked when they are opened."""

import io
import os
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from atlas_dataset import tables
from atlas_dataset.build_atlas_large import main as build_main
from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import ATLASLarge
from atlas_dataset.sources import HuggingFaceATLAS
from atlas_dataset.tables import has_picture, open_parquet, open_saved
from common.errors import UserError

# What `datasets` and fsspec take for patterns, variables and chained URLs.
NAMES = ["a [1] b", "a::b", "file::c", "a$HOME", "a*b?", "a#b%20c"]
COLOURS = ["red", "lime", "blue", "yellow"]


def png(colour: str, size=(8, 8)) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def save_seed_layout(folder: Path, **changed) -> Path:
    """Four rows in the seed's layout; changed: other columns. Saved under a plain name and moved, as people do."""
    columns = {"texture": [png(colour) for colour in COLOURS], "image": [png(colour) for colour in COLOURS]}
    columns |= {"prompt": [f"a man in {colour}" for colour in COLOURS]} | changed
    features = datasets.Features(texture=datasets.Image(), image=datasets.Image(), prompt=datasets.Value("string"))
    plain = folder.parent / "plain name"
    schema = features.arrow_schema.remove_metadata()  # `datasets` itself does not save pictures without bytes and path
    datasets.Dataset(pyarrow.Table.from_pydict(columns, schema)).save_to_disk(plain)
    return plain.rename(folder)


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_data_sets_open_from_folders_of_any_name(name, is_relative, mesh, textures, tmp_path, monkeypatch, run_script):
    working = tmp_path / name / "$working [2]::d"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    base = Path() if is_relative else tmp_path
    folder, cache = base / f"{name} data", str(base / f"{name} cache")
    pictures = shutil.copytree(textures, base / f"{name} pictures")
    source = HuggingFaceATLAS(str(pictures), pictures / "prompts.txt")
    build_dataset(source, f"obj:{mesh}", 1, folder, 32, 24)
    for with_renders in (True, False):
        rows = ATLASLarge(folder, with_renders, 16, 32, cache)
        assert [row["prompt"] for row in rows] == source.prompts
        assert rows[1]["texture"][1].mean() > 0.5 > rows[1]["texture"][0].mean(), "green"
    assert len(list(Path(cache).glob("*.arrow"))) == 2, "read from the cache that was asked for"
    status, out, _ = run_script(build_main, "--verify", "--out", folder)
    assert status == 0 and "4 textures and 4 renders" in out
    seed = save_seed_layout(base / f"{name} seed")
    assert ATLASLarge(seed, True, 16, 32)[2]["prompt"] == "a man in blue"


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_atlas_open_from_folders_of_any_name(name, textures, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [png(colour) for colour in COLOURS]}, datasets.Features(image=datasets.Image())
    )
    for layout in ("parquet", "disk"):
        plain, folder = tmp_path / layout, tmp_path / name / layout
        folder.parent.mkdir(exist_ok=True)
        if layout == "disk":
            rows.save_to_disk(plain)
        else:
            plain.mkdir()
            rows.to_parquet(plain / "train-00000-of-00001.parquet")
        plain.rename(folder)
        atlas = HuggingFaceATLAS(str(folder), textures / "prompts.txt", str(tmp_path / "cache"))
        assert [encoded for encoded, _ in atlas] == [png(colour)["bytes"] for colour in COLOURS]


def write_numbers(file: Path, *numbers: int, name="number") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({name: numbers}), file)
    return file


def test_a_table_is_copied_once_and_again_when_its_files_change(tmp_path, monkeypatch):
    copies, real_copy = [], tables._copy_to_arrow
    monkeypatch.setattr(tables, "_copy_to_arrow", lambda *args: copies.append(args) or real_copy(*args))
    files = [write_numbers(tmp_path / "0.parquet", *range(40)), write_numbers(tmp_path / "1.parquet", 40, 41)]
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_parquet(files, tmp_path / "cache"), range(4)))
    assert len(copies) == 1, "by one for all who wait"
    assert all(table["number"][:] == list(range(42)) for table in opened)
    assert opened[0].cache_files, "memory-mapped"
    fingerprint = open_parquet(files, tmp_path / "cache")._fingerprint
    assert len(copies) == 1 and fingerprint == opened[0]._fingerprint
    write_numbers(files[1], 40, 43)
    os.utime(files[1], (1, 1))
    changed = open_parquet(files, tmp_path / "cache")
    assert changed["number"][-1] == 43 and changed._fingerprint != fingerprint and len(copies) == 2


def test_a_saved_tables_fingerprint_changes_with_its_files(tmp_path):
    folder = save_seed_layout(tmp_path / "data")
    fingerprint = open_saved(folder)._fingerprint
    assert open_saved(folder)._fingerprint == fingerprint
    os.utime(next(folder.glob("*.arrow")), (1, 1))
    assert open_saved(folder)._fingerprint != fingerprint


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    good = write_numbers(tmp_path / "0.parquet", 1)
    for bad in (tmp_path / "damaged.parquet", write_numbers(tmp_path / "other.parquet", 1, name="other")):
        if not bad.exists():
            bad.write_bytes(good.read_bytes()[:50])
        with pytest.raises(UserError, match=f"cannot read .*{bad.name}"):
            open_parquet([good, bad], tmp_path / "cache")
    full = types.SimpleNamespace(new_stream=lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(tables.pyarrow, "ipc", full)
    with pytest.raises(UserError, match=r"No space left on device; make room .*data\.cache_dir"):
        open_parquet([good], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


NO_PICTURES = (None, {"bytes": None, "path": None}, {"bytes": b"", "path": None})


@pytest.mark.parametrize("empty", NO_PICTURES)
def test_rows_without_a_picture_are_left_out_and_named(empty, tmp_path, capsys):
    pictures = [png("red"), empty, png("blue"), empty]
    save_seed_layout(tmp_path / "data", image=pictures)
    table = open_saved(tmp_path / "data").cast_column("image", datasets.Image(decode=False))
    assert has_picture(table, "image").tolist() == [True, False, True, False]
    capsys.readouterr()
    rows = ATLASLarge(tmp_path / "data", True, 8, 8)
    assert "2 of 4 rows" in (said := capsys.readouterr().err) and "left out: 1, 3" in said
    assert [row["prompt"] for row in rows] == ["a man in red", "a man in blue"]
    assert rows[1]["image"][2].min() > 0.9 and rows[1]["texture"][2].min() > 0.9, "still of one row"
    again = ATLASLarge(tmp_path / "data", True, 8, 8)
    assert again.textures._fingerprint == rows.textures._fingerprint
    orders = [data.shuffled(np.random.default_rng(3)).tolist() for data in (rows, again)]
    assert orders[0] == orders[1] and sorted(orders[0]) == [0, 1]
    capsys.readouterr()
    assert len(ATLASLarge(tmp_path / "data", False, 8, 8)) == 4 and not capsys.readouterr().err
    save_seed_layout(tmp_path / "none", image=[empty] * 4)
    with pytest.raises(UserError, match=r"no row of data set .*none has a picture"):
        ATLASLarge(tmp_path / "none", True, 8, 8)


def test_a_picture_that_cannot_be_decoded_is_named_with_its_row(tmp_path, run_script):
    torn = {"bytes": png("blue", (64, 64))["bytes"][:60], "path": None}
    folder = save_seed_layout(tmp_path / "data", image=[png("red"), None, torn, torn])
    rows = ATLASLarge(folder, True, 8, 8)
    assert rows[0]["prompt"] == "a man in red"
    with pytest.raises(UserError, match=r"image of row 2 of data set .*data.*--verify --out .*data'") as error:
        rows[1]
    assert "\n" not in str(error.value)
    status, _, said = run_script(build_main, "--verify", "--out", folder)
    assert status == 2 and "2 pictures of" in said and "image of row 2" in said and "image of row 3" in said
    save_seed_layout(tmp_path / "whole")
    status, out, _ = run_script(build_main, "--verify", "--out", tmp_path / "whole")
    assert status == 0 and "4 textures and 4 renders" in out


@pytest.mark.parametrize("with_renders", [True, False])
def test_a_row_without_prompt_is_refused_with_its_number(with_renders, dataset_dir, tmp_path):
    prompts = ["a man", None, "a boy", "a woman"]
    folder = save_seed_layout(tmp_path / "seed", prompt=prompts)
    with pytest.raises(UserError, match=r"row 1 of data set .*seed has no prompt"):
        ATLASLarge(folder, with_renders, 8, 8)
    left_out = save_seed_layout(tmp_path / "left out", prompt=[*prompts[1:], None], texture=[None] + [png("red")] * 3)
    with pytest.raises(UserError, match=r"row 3 of data set .*left out has no prompt"):
        ATLASLarge(left_out, with_renders, 8, 8)
    built = shutil.copytree(dataset_dir, tmp_path / "built")
    file = next((built / "textures").glob("*.parquet"))
    table = pyarrow.parquet.read_table(file)
    table = table.set_column(2, "prompt", pyarrow.array(["a", "b", "c", None], pyarrow.string()))
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(UserError, match=r"row 3 of data set .*built has no prompt"):
        ATLASLarge(built, with_renders, 8, 8, str(tmp_path / "cache"))
