import json
import shutil
import types

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from atlas_dataset.build_atlas_large import main as build_main
from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import INFO_FILE, ATLASLarge
from atlas_dataset.sources import HuggingFaceATLAS
from atlas_dataset.views import frame_bodies, make_background, render_texture, sample_view
from common.errors import UserError
from common.pictures import open_image
from config.configuration import Render
from render.rigs import load_rig

PROMPTS = ["a man in red", "a man in green", "a man in blue", "a man in yellow"]


def build_arguments(textures, mesh, views=1) -> list:
    """The builder's command line, but for --out."""
    sources = ["--textures", textures, "--prompts", textures / "prompts.txt", "--body", f"obj:{mesh}"]
    return [*sources, "--views", views, "--height", 32, "--width", 24]


def test_built_rows_join_texture_prompt_and_render(dataset_dir, textures, tmp_path):
    rows = ATLASLarge(dataset_dir, True, 16, 32, str(tmp_path))
    assert len(rows) == 12 and len(ATLASLarge(dataset_dir, False, 16, 32, str(tmp_path))) == 4
    row = rows[4]  # the second texture's second view
    assert row["prompt"] == "a man in green"
    assert row["texture"].shape == (3, 16, 16) and row["image"].shape == (3, 32, 32)
    assert row["texture"][1].mean() > 0.5 and row["texture"][0].mean() < -0.5
    centre = row["image"][:, 12:20, 14:18].mean((1, 2))
    assert centre[1] > centre[0] + 0.3 and centre[1] > centre[2] + 0.3, "the render shows its own texture"
    assert (row["image"][:, :, 0] == -1).all(), "padded with black"
    for row in rows:
        assert all(row[key].abs().max() <= 1 for key in ("texture", "image"))


def test_textures_are_stored_once_bit_exact_and_load_without_this_project(dataset_dir, textures, tmp_path):
    table = datasets.load_dataset(str(dataset_dir), "textures", split="train", cache_dir=str(tmp_path))
    table = table.cast_column("texture", datasets.Image(decode=False))
    assert len(table) == 4
    assert [row["texture"]["bytes"] for row in table] == [(textures / f"{i}.png").read_bytes() for i in range(4)]
    renders = datasets.load_dataset(str(dataset_dir), split="train", cache_dir=str(tmp_path))
    assert renders[0]["image"].size == (24, 32)
    assert {"texture_id", "view", "azimuth", "elevation", "fov_degrees"} <= set(renders.column_names)


def test_each_picture_is_decoded_once(dataset_dir, tmp_path, monkeypatch):
    rows, opened = ATLASLarge(dataset_dir, True, 16, 32, str(tmp_path)), []
    monkeypatch.setattr("atlas_dataset.dataset.open_image", lambda *a: opened.append(a) or open_image(*a))
    rows[0]
    assert len(opened) == 2


def test_the_seeds_layout_works(tmp_path):
    images = [Image.new("RGB", (24, 32), colour) for colour in ("red", "blue")]
    textures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    columns = {"image": images, "texture": textures, "prompt": ["a man in red", "a man in blue"]}
    features = datasets.Features(image=datasets.Image(), texture=datasets.Image(), prompt=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "seed")
    for with_renders in (False, True):
        row = ATLASLarge(tmp_path / "seed", with_renders, 16, 32)[1]
        assert row["prompt"] == "a man in blue" and row["texture"][2].min() > 0.9
        assert ("image" in row) == with_renders
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "bad")
    with pytest.raises(UserError, match="lacks the columns"):
        ATLASLarge(tmp_path / "bad", True, 16, 32)


@pytest.mark.parametrize("layout", ["parquet", "disk"])
def test_a_copy_of_atlas(tmp_path, textures, layout):
    encoded = [(textures / f"{i}.png").read_bytes() for i in range(4)]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in encoded]},
        features=datasets.Features(image=datasets.Image()),
    )
    folder = tmp_path / "atlas"
    folder.mkdir()
    if layout == "parquet":
        table.to_parquet(folder / "train-00000-of-00001.parquet")
    else:
        table.save_to_disk(folder)
    atlas = HuggingFaceATLAS(str(folder), textures / "prompts.txt", str(tmp_path / "cache"))
    assert [atlas[i] for i in range(len(atlas))] == list(zip(encoded, PROMPTS))


def test_building_continues_after_the_last_whole_shard(tmp_path, mesh, textures, monkeypatch):
    from atlas_dataset import building

    monkeypatch.setattr(building, "TEXTURES_PER_SHARD", 1)
    source = HuggingFaceATLAS(str(textures), textures / "prompts.txt")
    arguments = (source, f"obj:{mesh}", 2)
    whole = build_dataset(*arguments, tmp_path / "whole", 32, 24)
    real_render, rendered = building.render_texture, []

    def fails_at_the_third(*args):
        rendered.append(1)
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return real_render(*args)

    monkeypatch.setattr(building, "render_texture", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(*arguments, tmp_path / "cut", 32, 24)
    with pytest.raises(UserError, match="not finished"):
        ATLASLarge(tmp_path / "cut", True, 16)
    rendered.clear()
    monkeypatch.setattr(building, "render_texture", lambda *args: rendered.append(1) or real_render(*args))
    build_dataset(*arguments, tmp_path / "cut", 32, 24)
    assert len(rendered) == 2, "the two whole shards are not rendered again"
    for file in sorted(whole.rglob("*.parquet")):
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(whole)).read_bytes()
    assert not list((tmp_path / "cut").rglob("*.partial"))
    build_dataset(*arguments, tmp_path / "cut", 32, 24)
    assert len(rendered) == 2
    with pytest.raises(UserError, match="built with views 2, not 3"):
        build_dataset(source, f"obj:{mesh}", 3, tmp_path / "cut", 32, 24)


def test_views_follow_from_their_numbers_and_differ():
    rig, render = load_rig("anny"), Render()
    assert sample_view(render, rig, 0, 3, 1) == sample_view(render, rig, 0, 3, 1)
    views = [sample_view(render, rig, 0, texture, view) for texture in range(10) for view in range(10)]
    azimuths = [view["azimuth"] for view in views]
    assert len(set(azimuths)) == 100 and max(azimuths) - min(azimuths) > 300
    assert {view["background"] for view in views} == {"plain", "gradient", "noise"}
    assert 5 < sum(view["bottom"] > 0 for view in views) < 40, "about one in five ends above the knees"
    assert {len(view["lights"]) > 2 for view in views} == {True, False}
    assert len({tuple(view["pose"]) for view in views}) == 100 and len({tuple(view["shape"]) for view in views}) == 100
    plain = {"plain": 1, "gradient": 0, "noise": 0}
    narrow = Render(azimuth=[5, 5], elevation=[0, 0], full_body=1, environment=0, backgrounds=plain)
    for number in range(10):
        view = sample_view(narrow, rig, 0, 0, number)
        assert (view["azimuth"], view["elevation"], view["bottom"], view["background"]) == (5, 0, 0, "plain")


def test_renders_are_framed_as_their_view_says():
    """The whole body stands in the picture, its height `fill` of it; or it ends at the picture's edge."""
    rig, texture = load_rig("anny"), torch.full((3, 32, 32), 1.0)
    for full_body in (1, 0):
        render = Render(full_body=full_body, fill=[0.8, 0.8], elevation=[0, 0], ambient=[1, 1])
        for number in range(6):
            _, view = render_texture(rig, texture, render, 0, 0, [number], 96, 96)[0]
            vertices = rig.vertices([view])
            points = frame_bodies(vertices, [view], 1.0).project(vertices, 96, 96)[0]
            top, bottom = points[:, 1].min() / 96, points[:, 1].max() / 96
            if full_body:
                assert top > 0.02 and bottom < 0.98
            else:
                assert 0 < top < 0.2 and bottom > 1.1


def test_backgrounds(tmp_path):
    Image.new("RGB", (30, 50), "red").save(tmp_path / "red.png")
    for kind in ("plain", "gradient", "noise", "white", "pictures"):
        first, again, other = (
            make_background(kind, np.random.default_rng(seed), 24, 16, str(tmp_path)) for seed in (1, 1, 2)
        )
        assert first.shape == (3, 24, 16) and first.min() >= 0 and first.max() <= 1
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (kind in ("white", "pictures"))
        is_flat = (first == first[:, :1, :1]).all()
        assert is_flat == (kind in ("plain", "white", "pictures"))
    assert torch.allclose(first[:, 0, 0], torch.tensor([1.0, 0, 0]))
    with pytest.raises(UserError, match="no pictures in"):
        make_background("pictures", np.random.default_rng(0), 8, 8, str(tmp_path / "nowhere"))


def test_the_same_rows_for_any_number_of_workers_and_processes(tmp_path, mesh, textures, monkeypatch):
    from atlas_dataset import building

    monkeypatch.setattr(building, "TEXTURES_PER_SHARD", 1)
    source, spec = HuggingFaceATLAS(str(textures), textures / "prompts.txt"), f"obj:{mesh}"
    build_dataset(source, spec, 2, tmp_path / "one", 64, 48, workers=0)
    build_dataset(source, spec, 2, tmp_path / "workers", 64, 48, workers=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "ranks" / "README.md").exists()
        monkeypatch.setenv("RANK", rank)
        build_dataset(source, spec, 2, tmp_path / "ranks", 64, 48, workers=0)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 4 + 4 + 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "workers" / file).read_bytes(), file
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "ranks" / file).read_bytes(), file


def test_a_bad_texture_is_skipped_and_reported(tmp_path, mesh, textures, run_script):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(textures, copy)
    (copy / "1.png").write_bytes((copy / "1.png").read_bytes()[:60])
    arguments = [*build_arguments(copy, mesh), "--out", out]
    status, printed, _ = run_script(build_main, *arguments)
    assert status == 0 and "1 skipped" in printed
    skipped = json.loads((out / "skipped.json").read_text())
    assert [row["texture_id"] for row in skipped] == [1] and "1.png" in skipped[0]["reason"]
    rows = ATLASLarge(out, True, 16, 32, str(tmp_path / "cache"))
    assert [rows[index]["prompt"] for index in range(len(rows))] == ["a man in red", "a man in blue", "a man in yellow"]
    status, printed, _ = run_script(build_main, "--verify", "--out", out)
    assert status == 0 and "3 textures and 3 renders" in printed
    shard = next((out / "renders").glob("*.parquet"))
    damaged = bytearray(shard.read_bytes())
    damaged[100:400] = bytes(300)
    shard.write_bytes(damaged)
    status, _, error = run_script(build_main, "--verify", "--out", out)
    assert status == 2 and shard.name in error
    for file in copy.glob("*.png"):
        file.write_bytes(b"broken")
    status, _, error = run_script(build_main, *arguments[:-1], tmp_path / "none")
    assert status == 2 and "no texture could be read" in error
    status, _, error = run_script(build_main, *arguments)
    assert status == 2 and "other textures or prompts" in error


def test_a_full_disk_is_refused_beforehand(tmp_path, mesh, textures, run_script, monkeypatch):
    from atlas_dataset import building

    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    status, _, error = run_script(build_main, *build_arguments(textures, mesh), "--out", tmp_path / "out")
    assert status == 2 and "needs about" in error and not list((tmp_path / "out").rglob("*.parquet"))


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, mesh, textures, monkeypatch):
    from atlas_dataset import building

    monkeypatch.setattr(building, "TEXTURES_PER_SHARD", 2)
    real_write, written = building.pyarrow.parquet.ParquetWriter.write_table, []

    def fills_up(*args):
        written.append(1)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return real_write(*args)

    source = HuggingFaceATLAS(str(textures), textures / "prompts.txt")
    with monkeypatch.context() as patch:
        patch.setattr(building.pyarrow.parquet.ParquetWriter, "write_table", fills_up)
        with pytest.raises(UserError, match="No space left on device; make room"):
            build_dataset(source, f"obj:{mesh}", 1, tmp_path / "out", 32, 24)
    assert len(list((tmp_path / "out" / "renders").iterdir())) == 1, "the first shard stays, nothing half-written"
    build_dataset(source, f"obj:{mesh}", 1, tmp_path / "out", 32, 24)
    assert len(ATLASLarge(tmp_path / "out", True, 16, 32, str(tmp_path / "cache"))) == 4


def test_limit_licence_and_push(tmp_path, mesh, textures, run_script, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: calls.append(name))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **options: calls.append(options["folder_path"])
    )
    out = tmp_path / "out"
    arguments = [*build_arguments(textures, mesh, views=2), "--out", out, "--limit", 3, "--licence", "CC-BY-4.0"]
    status, _, _ = run_script(build_main, *arguments, "--push-to-hub", "someone/atlas")
    assert status == 0 and calls == ["someone/atlas", out]
    rows = datasets.load_dataset(str(out), "renders", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 6 and set(rows["licence"]) == {"CC-BY-4.0"} and rows[0]["image"].size == (24, 32)
    assert len(rows[0]["ambient"]) == 3 and len(rows[0]["lights"][0]) == 5 and rows[0]["pose"] == []

    def offline(self, name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    status, _, error = run_script(build_main, *arguments, "--push-to-hub", "someone/atlas")
    assert status == 2 and "cannot push to someone/atlas" in error and "is whole" in error


def test_an_epochs_order_keeps_a_textures_renders_near(dataset_dir, tmp_path, monkeypatch):
    from atlas_dataset import dataset

    monkeypatch.setattr(dataset, "TEXTURES_KEPT", 2)
    rows = ATLASLarge(dataset_dir, True, 16, 32, str(tmp_path))
    orders = [rows.shuffled(np.random.default_rng(seed)).tolist() for seed in range(20)]
    assert all(sorted(order) == list(range(12)) for order in orders) and len(set(map(tuple, orders))) == 20
    for order in orders:
        textures = [rows.texture_rows[row] for row in order]
        assert len(set(textures[:6])) == len(set(textures[6:])) == 2, "two textures at a time"
    assert len({frozenset(rows.texture_rows[row] for row in order[:6]) for order in orders}) > 3
    assert any(len({rows.texture_rows[row] for row in order[:3]}) == 2 for order in orders), "their rows are mixed"


def test_renders_made_online_are_fresh_each_epoch(tmp_path, mesh, textures):
    source, spec = HuggingFaceATLAS(str(textures), textures / "prompts.txt"), f"obj:{mesh}"
    root = build_dataset(source, spec, 0, tmp_path / "textures only", 32, 24)
    rows = ATLASLarge(root, True, 16, 32, str(tmp_path / "cache"))
    rows.render_online(Render(), rows.body, 3, seed=0)
    assert len(rows) == 12
    first, again, later = rows[4], rows[4], rows[4 + len(rows)]
    assert first["prompt"] == later["prompt"] and first["texture_id"] == later["texture_id"] == 1
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], later["image"])
    assert first["image"].shape == (3, 32, 32) and torch.equal(first["texture"], later["texture"])


def test_build_command(tmp_path, mesh, textures, run_script):
    status, out, _ = run_script(build_main, *build_arguments(textures, mesh), "--out", tmp_path / "out")
    assert status == 0 and "4 textures and 4 renders" in out
    assert json.loads((tmp_path / "out" / INFO_FILE).read_text())["complete"]
    status, out, _ = run_script(
        build_main, "--textures", "procedural:2", "--views", 1, "--height", 32, "--width", 24, "--out", tmp_path / "p"
    )
    assert status == 0 and len(ATLASLarge(tmp_path / "p", True, 16, 32, str(tmp_path))) == 2


@pytest.mark.parametrize(
    "case,message",
    [
        ("no textures", "no textures in"),
        ("no prompts", "--prompts"),
        ("missing prompts", "nowhere.txt: No such file"),
        ("too few prompts", "4 textures"),
        ("empty prompt", "line 2 is empty"),
        ("bad mesh", "cannot read mesh"),
        ("views", "must be 1 or more"),
        ("procedural", "procedural:COUNT"),
    ],
)
def test_build_command_refuses(case, message, tmp_path, mesh, textures, run_script):
    copy = tmp_path / "copy"
    shutil.copytree(textures, copy)
    arguments = iter([*build_arguments(copy, mesh), "--out", tmp_path / "out"])
    values = dict(zip(arguments, arguments))
    if case == "no textures":
        values["--textures"] = tmp_path / "nowhere"
    elif case == "no prompts":
        del values["--prompts"]
    elif case == "missing prompts":
        values["--prompts"] = tmp_path / "nowhere.txt"
    elif case == "too few prompts":
        (copy / "prompts.txt").write_text("one\ntwo\n")
    elif case == "empty prompt":
        (copy / "prompts.txt").write_text("one\n\nthree\nfour\n")
    elif case == "bad mesh":
        values["--body"] = "obj:nowhere.obj"
    elif case == "views":
        values["--views"] = -1
    elif case == "procedural":
        values["--textures"] = "procedural:x"
    status, _, error = run_script(build_main, *(word for pair in values.items() for word in pair))
    assert status == 2 and message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("out/**/*")), "nothing half-written"


def test_unreadable_data_sets(tmp_path):
    with pytest.raises(UserError, match="no data set"):
        ATLASLarge(tmp_path, True, 16)
    (tmp_path / INFO_FILE).write_text("{")
    with pytest.raises(UserError, match="build it again"):
        ATLASLarge(tmp_path, True, 16)
