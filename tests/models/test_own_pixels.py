"""infer_uv.py keeps a fitted picture's own pixels, and makes the rest."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_inference import pixels

from atlas_dataset.fits import read_fit
from atlas_dataset.views import render_texture
from common.errors import INCOMPLETE
from common.pictures import image_from_pixels
from config.configuration import Render
from infer_uv import main as infer_main
from models.body_map import MAP_SIZE, BodyMap
from models.pipeline import TexturePipeline
from render.rigs import load_rig
from render.uv_space import uv_mask
from training.personalising import personal_config, textures_of_pictures

SIZE = 64
WHITE = {"plain": 0, "gradient": 0, "noise": 0, "pictures": 0, "white": 1}


@pytest.fixture()
def person(mesh, tmp_path):
    """A red and blue box's picture and its fit; the true texture (3, SIZE, SIZE) in [-1, 1]."""
    rig, texture = load_rig(f"obj:{mesh}"), torch.full((3, SIZE, SIZE), -0.5)
    texture[0, :, : SIZE // 2], texture[2, :, SIZE // 2 :] = 0.6, 0.6
    render = Render(full_body=1, backgrounds=WHITE, azimuth=[200, 240])
    folder = tmp_path / "people"
    folder.mkdir()
    for number, name in enumerate(("one", "two")):
        picture, view = render_texture(rig, texture, render, 3, number, [0], 128, 96)[0]
        image_from_pixels(picture).save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(json.dumps(view))
    return folder, texture


def test_what_the_picture_shows_is_kept_and_repeats(checkpoint, person, mesh, tmp_path, run_script):
    folder, texture = person
    picture = ["--image", folder / "one.png", "--checkpoint", checkpoint, "--size", SIZE]
    fitted = [*picture, "--fit", folder / "one.json"]
    status, out, error = run_script(infer_main, *fitted, "--save-partial", "--out", tmp_path / "own.png")
    assert status == 0, error
    assert out.split() == [str(tmp_path / "own.png"), str(tmp_path / "own-partial.png")]
    own, partial = pixels(tmp_path / "own.png"), pixels(tmp_path / "own-partial.png")
    sure = partial[..., 3] == 255
    body = load_rig(f"obj:{mesh}").body
    assert 0.1 < sure.sum() / uv_mask(body, SIZE).sum() < 0.7
    assert np.array_equal(own[sure][:, :3], partial[sure][:, :3]), "seen texels stay to the bit"
    off = np.abs(own[..., :3] - (texture.permute(1, 2, 0).numpy() + 1) * 127.5)[sure]
    assert np.median(off) < 3 and off.mean() < 12, "but where red meets blue"
    assert np.array_equal(own[..., 3] == 255, uv_mask(body, SIZE).numpy())

    assert run_script(infer_main, *picture, "--out", tmp_path / "without.png")[0] == 0
    assert not np.array_equal(pixels(tmp_path / "without.png")[sure], own[sure])
    status, _, error = run_script(infer_main, "--settings", tmp_path / "own.png", "--out", tmp_path / "again.png")
    assert status == 0, error
    assert np.array_equal(pixels(tmp_path / "again.png"), own)
    status, _, error = run_script(infer_main, *fitted, "--relight", "off", "--out", tmp_path / "lit.png")
    assert status == 0 and not np.array_equal(pixels(tmp_path / "lit.png")[sure], own[sure]), error
    settings = json.loads(Image.open(tmp_path / "lit.png").text["parameters"])
    assert settings["relight"] is False and settings["fits"] == [str(folder / "one.json")]
    (folder / "one.json").write_text((folder / "two.json").read_text())
    status, _, error = run_script(infer_main, "--settings", tmp_path / "own.png", "--out", tmp_path / "again.png")
    assert status == 2 and "one.json" in error and "no longer" in error


def test_two_pictures_and_folders(checkpoint, person, tmp_path, run_script):
    folder, _ = person
    common = ["--checkpoint", checkpoint, "--size", SIZE, "--save-partial"]
    both = [option for name in ("one", "two") for option in ("--image", folder / f"{name}.png")]
    fits = [option for name in ("one", "two") for option in ("--fit", folder / f"{name}.json")]
    assert run_script(infer_main, *both, *fits, *common, "--out", tmp_path / "both.png")[0] == 0
    one = ["--images", folder, "--fit", folder, *common, "--out", tmp_path / "each"]
    status, _, error = run_script(infer_main, *one)
    assert status == 0, error
    single = pixels(tmp_path / "each" / "one-png-0-partial.png")[..., 3] > 0
    merged = pixels(tmp_path / "both-partial.png")[..., 3] > 0
    assert merged[single].all() and merged.sum() >= single.sum()
    assert "2 of 2 textures are there already" in run_script(infer_main, *one)[1]
    (folder / "two.json").write_text('{"azimuth": 3}')
    status, printed, error = run_script(infer_main, *one)
    assert status == INCOMPLETE and "two.json" in error and "1 of 2 textures are there already" in printed
    (folder / "two.json").unlink()
    status, _, error = run_script(infer_main, *one)
    assert status == 2 and "no fit of" in error and "two.json" in error


def test_pictures_of_a_personal_run_keep_theirs_where_a_fit_lies_beside_them(checkpoint, person, tmp_path):
    folder, _ = person
    (folder / "two.json").unlink()
    made = textures_of_pictures(personal_config(checkpoint, folder, "sks", "a man"), tmp_path / "made")
    pipeline, shares = TexturePipeline.from_pretrained(checkpoint), []
    for name in ("one", "two"):
        picture, own = Image.open(folder / f"{name}.png"), pixels(made / f"{name}.png")
        sighting = read_fit(folder / "one.json", pipeline.body_spec, picture.height, picture.width)
        partial = np.array(pipeline.own_pixels([picture], [sighting], len(own)))
        sure = partial[..., 3] == 255
        shares.append((own[sure][:, :3] == partial[sure][:, :3]).all(-1).mean())
    assert shares[0] == 1 and shares[1] < 0.1


def test_the_same_from_python(checkpoint, person, mesh, tmp_path):
    folder, _ = person
    pipeline = TexturePipeline.from_pretrained(checkpoint)
    images = [Image.open(folder / f"{name}.png") for name in ("one", "two")]
    fits = [read_fit(folder / f"{name}.json", f"obj:{mesh}", 128, 96) for name in ("one", "two")]
    partials = [pipeline.own_pixels([image], [fit], size=SIZE) for image, fit in zip(images, fits)]
    textures = pipeline(images=[[image] for image in images], seeds=[0, 1], partial=partials, size=SIZE)
    for texture, partial in zip(textures, partials):
        texture, partial = np.asarray(texture), np.asarray(partial)
        sure = partial[..., 3] == 255
        assert sure.any() and np.array_equal(texture[sure][:, :3], partial[sure][:, :3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "one.json"], "nothing to make"),
        (["--prompt", "a", "--fit", "one.json"], "give it with --image"),
        (["--image", "one.png", "--fit", "one.json", "--fit", "two.json"], "2 fits for 1 pictures"),
        (["--image", "one.png", "--fit", "one.json", "--iuv", "i.png"], "not both"),
        (["--image", "one.png", "--iuv", "i.png"], "UV_Processed.mat"),
        (["--image", "one.png", "--mirror-fill"], "--mirror-fill is for a picture"),
        (["--image", "one.png", "--save-partial"], "--save-partial is for a picture"),
        (["--image", "one.png", "--fit", "one.json", "--init-texture", "one.png"], "give one of them"),
        (["--images", ".", "--fit", "one.json"], "give the folder of their fits"),
        (["--image", "one.png", "--fit", "nowhere.json"], "nowhere.json"),
        (["--image", "one.png", "--fit", "far.json"], "of the body that its fit describes"),
        (["--image", "one.png", "--fit", "auto"], "--fit auto knows Anny alone"),
        (["--image", "one.png", "--iuv", "one.png", "--iuv-table", "t.mat"], "6890 vertices; this one has 8"),
    ],
)
def test_bad_fits_are_one_line(arguments, message, checkpoint, person, monkeypatch, run_script):
    folder, _ = person
    monkeypatch.chdir(folder)
    view = json.loads((folder / "one.json").read_text())
    (folder / "far.json").write_text(json.dumps({**view, "fill": 0.001}))
    before = sorted(folder.iterdir())
    status, _, error = run_script(infer_main, *arguments, "--checkpoint", checkpoint, "--size", SIZE, "--out", "o.png")
    assert status == 2 and message in error and error.count("\n") == 1, error
    assert sorted(folder.iterdir()) == before, "nothing is written"


def test_the_body_map_answers_at_the_pictures_own_size():
    torch.manual_seed(0)
    network = BodyMap(channels=(8, 16, 16)).eval()
    assert network(torch.zeros(2, 3, 64, 48)).shape == (2, 7, 64, 48)
    for width, height in ((300, 400), (400, 300)):
        image = Image.new("RGB", (width, height), (200, 10, 10))
        positions, is_body, light = network.read(image)
        assert positions.shape == light.shape == (height, width, 3) and is_body.shape == (height, width)
        assert is_body.dtype == torch.bool and (light > 0).all()
    full = BodyMap()
    assert sum(parameter.numel() for parameter in full.parameters()) * 2 <= 3e6, "3 MB in half precision"
    assert full(torch.zeros(1, 3, *MAP_SIZE)).shape == (1, 7, *MAP_SIZE)
