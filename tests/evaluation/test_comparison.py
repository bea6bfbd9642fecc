"""--compare: every measure of either result has a row, sets included, or says why it has no difference."""

import json
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch

from evaluation.comparison import compare, comparison_table
from evaluation.distances import frechet_distance
from evaluation.report import FEATURES, RESULTS

WIDTH, COUNT = 4, 40


@dataclass
class Result:
    """A folder as --out leaves it, with features of one network."""

    folder: object
    features: dict

    def write(self, **figures) -> str:
        self.folder.mkdir(exist_ok=True)
        measured = {f"render.net.{name}": {"value": 1.0} for name in ("fid", "kid", "cmmd")}
        measured |= {"render.net.mind": "mind needs 1000 pictures, has 160"}
        tasks = {"t2uv": {"figures": {**measured, **figures}, "values": {}}, "truth": {"figures": {}, "values": {}}}
        names = [f"{number:05d}" for number in range(COUNT)]
        results = {"data": "d", "body": "b", "texels": 8, "samples": names, "prompts": names, "tasks": tasks}
        (self.folder / RESULTS).write_text(json.dumps(results))
        safetensors.torch.save_file(self.features, self.folder / FEATURES)
        return str(self.folder)


@pytest.fixture()
def pair(tmp_path):
    """Features near the truth, and the same pushed away from it."""
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(COUNT, 4, WIDTH, generator=generator) for _ in range(2))
    near, far = truth + 0.3 * noise, truth + 0.3 * noise + 1
    sides = zip("ab", (near, far))
    return [Result(tmp_path / name, {"t2uv/net": side, "truth/net": truth}) for name, side in sides]


def test_distances_of_sets_are_compared_in_pairs(pair):
    first, second = pair
    rows = compare(first.write(), second.write())
    row = rows["t2uv.render.net.fid"]
    truth = first.features["truth/net"]
    expected = [frechet_distance(side.features["t2uv/net"], truth) for side in pair]
    assert row["difference"] == pytest.approx(expected[0] - expected[1], rel=1e-4)
    assert row["high"] < 0 and row["told_apart"] and row["low"] < row["difference"] < row["high"]
    assert row["samples_needed"].startswith("cannot be said: its bias")
    assert isinstance(rows["t2uv.render.net.kid"]["samples_needed"], int) and rows["t2uv.render.net.kid"]["told_apart"]
    assert rows["t2uv.render.net.mind"] == "mind needs 1000 pictures, has 160"
    assert "`t2uv.render.net.fid` | ↓ |" in comparison_table(rows)


def test_a_pair_is_surer_than_two_sets(pair):
    """The same rows of both are drawn, so that a system beside itself has no spread at all."""
    rows = compare(pair[0].write(), pair[0].write())
    for name in ("fid", "kid", "cmmd"):
        row = rows[f"t2uv.render.net.{name}"]
        assert row["difference"] == row["low"] == row["high"] == 0 and not row["told_apart"]
        assert not isinstance(row["samples_needed"], int)


def test_what_cannot_be_compared_says_why(pair):
    first, second = pair
    own = {"render.own.fid": {"value": 2.0}, "uv.fill": "fill needs textures with one colour outside"}
    folders = first.write(**own), second.write()
    rows = compare(*folders)
    assert rows["t2uv.render.own.fid"] == "was not measured in both"
    assert rows["t2uv.uv.fill"].startswith("fill needs")
    assert compare(*reversed(folders)).keys() == rows.keys(), "whichever has more"
    (second.folder / FEATURES).unlink()
    assert compare(*folders)["t2uv.render.net.fid"].startswith("needs features.safetensors")
