"""What an evaluation says where a figure cannot be had, or means less than it seems to."""

import pytest
import torch

from atlas_dataset.building import build_dataset
from embedded.sources import open_textures
from evaluation.consistency import MEASURES, NEEDED
from evaluation.data import EvaluationSet, stored_set, training_warning
from evaluation.measuring import measure, observe
from evaluation.page import page
from evaluation.report import markdown, results_of
from evaluation.texture_space import filled
from render.rigs import load_body
from render.uv_space import uv_mask


@pytest.fixture()
def samples(dataset_dir, make_config):
    return stored_set(str(dataset_dir), make_config(), 32, False, 3)


def test_filled_textures_say_why_they_have_no_background(samples):
    body = load_body(samples.body)
    mask = uv_mask(body, samples.size)

    def textures(number):
        return filled(torch.rand(1, 3, samples.size, samples.size), mask)[0]

    observed = observe(samples, textures, {}, "t2uv")
    figures = measure(samples, textures, {}, observed, None, against_truth=False).figures
    for name in ("fill", "bleeding_background"):
        assert figures[f"uv.{name}"] == f"{name} {NEEDED[name]}"
    assert "one colour outside the islands" in figures["uv.fill"]
    assert NEEDED.keys() == MEASURES.keys()


def test_a_checkpoints_own_training_set_is_warned_of(make_config, dataset_dir, tmp_path):
    cfg = make_config("data.validation_textures=2")
    warning = training_warning(str(dataset_dir), cfg, 16)
    assert "was trained on" in warning and "all but 2 of its textures" in warning
    moved = tmp_path / "elsewhere" / dataset_dir.name
    assert training_warning(str(moved), cfg, 16) == warning, "the same name elsewhere"
    assert training_warning(str(tmp_path / "another"), cfg, 16) is None


def test_what_was_painted_for_training_is_told_by_its_content(make_config, tmp_path):
    cfg = make_config("data.dataset=procedural:2")
    for seed, folder in ((0, tmp_path / "same"), (1, tmp_path / "other")):
        source = open_textures("procedural:2", size=16, seed=seed)
        build_dataset(source, "anny", 0, folder, 16, 12)
    assert "procedural:2" in training_warning(str(tmp_path / "same"), cfg, 16)
    assert training_warning(str(tmp_path / "other"), cfg, 16) is None
    assert training_warning(str(tmp_path / "nowhere"), cfg, 16) is None


def test_warnings_stand_in_every_report(mesh):
    samples = EvaluationSet("d", f"obj:{mesh}", 8, ["0"], ["a man"], warnings=["seen <before>"])
    results = results_of(samples, {}, {"base": "x"}, {})
    assert results["warnings"] == ["seen <before>"] and "**Warning:** seen <before>." in markdown(results)
    text = page(results, samples, {}, {})
    assert "<b>Warning:</b> seen &lt;before&gt;." in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text, "or phones show it small"
