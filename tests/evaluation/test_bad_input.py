"""evaluate.py on what people give it by mistake: one line and status 2, or a row that says so; never a bare NaN."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

import evaluate as command
from atlas_dataset.building import build_dataset
from atlas_dataset.sources import HuggingFaceATLAS
from evaluation import measuring
from evaluation.report import FEATURES, RESULTS
from tests.conftest import command_line


@pytest.fixture()
def run(run_script, make_config, tmp_path, monkeypatch):
    """evaluate.py on the tiny base, with renders of 64 pixels → status, results.json or None, stdout, stderr."""
    for name in ("view_features", "compare_renders"):
        monkeypatch.setattr(measuring, name, functools.partial(getattr(measuring, name), side=64))
    config = command_line(make_config("model.image_encoder=null"))

    def call(*arguments: str, out: str = "out"):
        status, printed, error = run_script(command.main, *config, "--out", tmp_path / out, *arguments)
        written = tmp_path / out / RESULTS
        results = written.read_text() if written.is_file() else "null"
        assert "NaN" not in results and "Infinity" not in results and "Traceback" not in error
        return status, json.loads(results), printed, error

    return call


@pytest.fixture()
def folder(tmp_path):
    """Textures of 64 texels and what else may lie beside them, each with its prompt in NAME.txt."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a man, number {number}")
    return folder


def test_unreadable_pictures_and_other_sizes_are_told(run, folder):
    (folder / "3.png").write_bytes(b"")
    (folder / "4.png").write_text("<html>not found</html>")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "5.png")
    Image.new("RGB", (64, 32)).save(folder / "6.png")
    for number in range(3, 7):
        (folder / f"{number}.txt").write_text(f"a man, number {number}")
    status, results, printed, error = run("--textures", folder)
    assert status == 0, error
    assert len(results["samples"]) == 4 and results["texels"] == 64
    assert "5.png has 32 texels a side and is measured at 64" in printed
    for name in ("3.png", "4.png", "64 x 32"):
        assert any(name in line for line in results["skipped"]), name


def test_no_texture_that_can_be_read_is_one_line(run, folder):
    for picture in folder.glob("*.png"):
        picture.write_bytes(b"x")
    status, results, _, error = run("--textures", folder)
    assert status == 2 and "can be measured" in error and error.count("\n") == 1 and results is None


@pytest.mark.parametrize("change", ["missing", "empty"])
def test_missing_prompts_are_one_line(run, folder, change):
    if change == "missing":
        (folder / "1.txt").unlink()
    else:
        (folder / "1.txt").write_text(" \n")
    status, results, _, error = run("--textures", folder)
    assert status == 2 and ("1.png" in error or "1.txt" in error) and results is None
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_too_few_textures_are_rows_with_the_number_needed(run, folder):
    status, results, _, error = run("--textures", folder, "--limit=1")
    assert status == 0, error
    figures = results["tasks"]["t2uv"]["figures"]
    assert figures["uv.seam_error"] == "uv.seam_error needs 2 samples that it can be measured on, has 1"
    assert all(isinstance(figure, str) for figure in figures.values()), figures


def test_a_data_set_of_one_texture(run, textures, mesh, tmp_path):
    source = HuggingFaceATLAS(str(textures), textures / "prompts.txt", limit=1)
    build_dataset(source, f"obj:{mesh}", 1, tmp_path / "one", 32, 24)
    status, results, _, error = run("--base", "--data", tmp_path / "one")
    assert status == 0, error
    figures = results["tasks"]["t2uv"]["figures"]
    assert figures["texture.psnr"] == "texture.psnr needs 2 samples that it can be measured on, has 1"
    assert "needs 2 textures" in figures["render.embedded image encoder.kid"]


def test_networks_that_are_not_there_are_rows(run, folder, dataset_dir):
    options = ("--face-model=nowhere.pt", "--extractor=inception", "--extractor=owner/no.model")
    status, results, _, error = run("--base", "--data", dataset_dir, "--limit=2", *options)
    assert status == 0, error
    figures = results["tasks"]["t2uv"]["figures"]
    assert "there is no nowhere.pt" in figures["render.face_similarity"]
    assert figures["render.owner/no_model"].startswith("needs owner/no.model")
    assert figures["follows.attributes.owner/no_model"].startswith("needs owner/no.model")
    assert figures["render.inception"].startswith("needs inception-2015-12-05.pt")


def test_a_data_set_without_renders_has_no_pictures(run, textures, mesh, tmp_path):
    source = HuggingFaceATLAS(str(textures), textures / "prompts.txt")
    build_dataset(source, f"obj:{mesh}", 0, tmp_path / "bare", 32, 24)
    status, results, _, error = run("--textures", textures, "--prompts", textures / "prompts.txt", "--task=i2uv",
                                    "--data", tmp_path / "bare")  # fmt: skip
    assert status == 0 and not any("picture_retrieval" in name for name in results["tasks"]["i2uv"]["figures"]), error


def test_an_out_that_is_a_file_is_one_line(run, folder, tmp_path):
    (tmp_path / "taken").write_text("mine")
    status, _, _, error = run("--textures", folder, out="taken")
    assert status == 2 and error.startswith("error: ") and (tmp_path / "taken").read_text() == "mine"


def test_results_that_do_not_go_together_are_one_line(run, folder, tmp_path):
    assert run("--textures", folder, out="first")[0] == 0
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    assert run("--textures", folder, "--data.resolution=32", out="second")[0] == 0
    status, _, _, error = run("--compare", tmp_path / "first", tmp_path / "second")
    assert status == 2 and "differ in texels: 64 and 32" in error
    (tmp_path / "first" / FEATURES).write_bytes(b"torn")
    status, _, _, error = run("--compare", tmp_path / "first", tmp_path / "first")
    assert status == 2 and "run that evaluation again" in error
