"""evaluate.py as a command: what it makes once, what it measures, what it says of bad input."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import evaluate as command
from atlas_dataset.dataset import ATLASLarge
from common.errors import UserError
from evaluation import making, measuring, page, procedural, running
from evaluation.data import procedural_set, stored_set
from evaluation.making import Job, make_textures, model_description, texture_path
from evaluation.measuring import measure, observe, rolled
from evaluation.page import chosen_cases
from evaluation.procedural import Judge, PatternClassifier, colours_named, held_out_paintings
from evaluation.report import markdown, read_results
from models.checkpoints import TrainedModel
from models.conditioning import make_aligner
from tests.conftest import command_line


@pytest.fixture(scope="module")
def samples():
    truths = held_out_paintings(24)
    judge = Judge(truths)
    judge.classifier = PatternClassifier(truths, [painting.texture[:3] for _, painting in truths])
    return procedural_set(judge)


@pytest.fixture()
def run(run_script, make_config, tmp_path):
    """evaluate.py on the tiny base."""
    arguments = command_line(make_config("model.image_encoder=null"))

    def call(*more: str, out: str = "out"):
        return run_script(command.main, *arguments, "--out", tmp_path / out, *more)

    return call


@pytest.fixture()
def quick(monkeypatch):
    """Renders of 64 pixels, and a classifier of patterns that has seen little."""
    monkeypatch.setattr(procedural, "FITTED_TO", 12)
    monkeypatch.setattr(page, "SIDE", 32)
    for name in ("view_features", "compare_renders"):
        function = getattr(measuring, name)

        def small(*arguments, function=function):
            return function(*arguments, side=64)

        monkeypatch.setattr(measuring, name, small)


def attributes(samples, textures):
    observed = observe(samples, textures, {}, "textures")
    measures = measure(samples, textures, {}, observed, None, against_truth=False)
    return {name: figure for name, figure in measures.figures.items() if name.startswith("follows.")}


def test_attributes_are_right_on_true_textures_and_by_chance_on_those_of_others(samples):
    right, wrong = attributes(samples, samples.truth), attributes(samples, rolled(samples.truth, len(samples)))
    assert {"follows.color.top", "follows.color.hair", "follows.pattern", "follows.length"} <= right.keys()
    for region in ("top", "bottom", "hair"):
        assert right[f"follows.color.{region}"].value == 1, region
    assert right["follows.color.skin"].value > 0.8  # tones lie near one another: docs/log.md
    assert right["follows.pattern"].value == 1
    assert right["follows.length"].value == 1
    # Of fourteen colours one in fourteen is right by chance, of five of hair one in five.
    assert wrong["follows.color.top"].low < 1 / 14 < 0.4 and wrong["follows.color.top"].value < 0.3
    assert wrong["follows.color.hair"].low < 1 / 5 < wrong["follows.color.hair"].high
    assert right["follows.color.top"].low > wrong["follows.color.top"].high


def test_a_second_run_makes_nothing_and_another_setting_all(base, make_config, samples, tmp_path, monkeypatch):
    trained, written = TrainedModel(base, None, make_config()), []
    write = making.write_texture
    monkeypatch.setattr(making, "write_texture", lambda path, *more: (written.append(path), write(path, *more)))
    jobs = [Job("t2uv", number, samples.prompts[number]) for number in range(3)]

    def make(**changes) -> list[str]:
        written.clear()
        count = make_textures(trained, jobs, tmp_path, {**model_description(trained, None), **changes})
        assert count == len(written)
        return [path.name for path in written]

    assert make() == ["00000.png", "00001.png", "00002.png"]
    path = texture_path(tmp_path, "t2uv", 1)
    whole = path.read_bytes()
    assert make() == []
    path.write_bytes(whole[:200])
    assert make() == ["00001.png"]
    other, first = (np.asarray(Image.open(source)).astype(int) for source in (path, io.BytesIO(whole)))
    assert abs(other - first).max() <= 1, "the same noise, alone in its batch"
    assert len(make(checkpoint="another")) == 3
    jobs[2] = Job("t2uv", 2, "another prompt")
    assert make(checkpoint="another") == ["00002.png"]


def test_processes_make_each_its_share(base, make_config, samples, tmp_path, monkeypatch):
    trained = TrainedModel(base, None, make_config())
    jobs = [Job("t2uv", number, samples.prompts[number]) for number in range(3)]
    monkeypatch.setattr(making.processes, "world_size", lambda: 2)
    monkeypatch.setattr(making.processes, "wait", lambda: None)
    for rank, count in ((0, 2), (1, 1)):
        monkeypatch.setattr(making.processes, "rank", lambda rank=rank: rank)
        assert make_textures(trained, jobs, tmp_path, {}) == count
    assert all(job.path(tmp_path).is_file() for job in jobs)


def test_what_is_written(run, quick, tmp_path):
    status, printed, error = run("--base", "--limit=3", "--extractor=embedded", "--extractor=inception")
    assert status == 0, error
    summary, out = json.loads(printed.splitlines()[-1]), tmp_path / "out"
    assert 0 <= summary["t2uv"]["color"]["hair"] <= 1 and summary["sentences"].keys() == {"forms", "synonyms"}
    assert summary["autoencoder"]["psnr"] > 0 and "i2uv" not in summary
    assert summary["t2uv"]["uv"]["sharpness"]["value"] == pytest.approx(summary["t2uv"]["sharpness"], abs=1e-4)
    assert summary["t2uv"]["texture"]["psnr"].keys() == {"value", "low", "high", "count", "skipped"}
    assert "needs 20 reference textures, has 3" in summary["t2uv"]["uv"]["defects"]["baked-in light"]
    assert summary["t2uv"]["render"]["embedded image encoder"]["fid"] == "fid needs 129 pictures, has 12"
    results, features = read_results(str(out))
    assert_named(results["procedural"], NAMES["t2uv"], 3)
    assert features["t2uv/embedded image encoder"].shape[:2] == (3, 4)
    assert "NaN" not in (out / "results.json").read_text() and "nan" not in (out / "results.md").read_text()
    assert "needs inception-2015-12-05.pt" in (out / "results.md").read_text()
    text = (out / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 3 * 2 * 5, "three cases, made and true, a texture and four renders"
    assert "<script" not in text and "http" not in text.replace("https://nvlabs-fi-cdn", "")
    assert list((out / "tensorboard").glob("events.*"))
    assert results["tasks"]["truth"]["figures"]["follows.color.hair"]["value"] == 1


# What the procedural set has in results.json, under "procedural": a dot is a level.
NAMES = {
    "t2uv": "autoencoder.psnr t2uv.sharpness t2uv.color.top t2uv.color.bottom t2uv.color.hair t2uv.color.skin "
    "t2uv.pattern t2uv.length t2uv.seam_error t2uv.seam_error_raw sentences.forms sentences.synonyms",
    "i2uv": "i2uv.color.top i2uv.color.bottom i2uv.color.hair i2uv.color.skin i2uv.skin_lab i2uv.psnr i2uv.ssim",
}


def assert_named(measures: dict, names: str, limit: int) -> None:
    """Colours of regions that no held-out outfit has a word for are not measured."""
    told = {region for outfit, _ in held_out_paintings(limit) for region in colours_named(outfit)}
    for name in names.split():
        if ".color." in name and name.rpartition(".")[2] not in told:
            continue
        value = measures
        for level in name.split("."):
            value = value[level]
        assert isinstance(value, float), name


@pytest.fixture()
def foreign(samples, tmp_path):
    """Four true textures as another system's PNGs, one of them damaged, one oblong, with a CSV of prompts."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for number in range(4):
        pixels = (samples.truth(number) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes()[:500])
    Image.new("RGB", (64, 32)).save(folder / "5.png")
    lines = [f'{number}.png,"{samples.prompts[number % 4]}"' for number in range(6)]
    (tmp_path / "prompts.csv").write_text("\n".join(["file_name,prompt", *lines]))
    return folder


def test_textures_of_another_system(run, quick, foreign, tmp_path):
    status, printed, error = run("--textures", foreign, "--prompts", tmp_path / "prompts.csv")
    assert status == 0, error
    summary = json.loads(printed.splitlines()[-1])
    assert len(summary["skipped"]) == 2 and "4.png" in summary["skipped"][0] and "64 x 32" in summary["skipped"][1]
    assert summary["t2uv"]["texture"] == measuring.NO_TRUTH
    assert summary["t2uv"]["uv"]["seam_error"]["count"] == 4
    assert summary["t2uv"]["follows"]["retrieval"]["embedded image encoder"]["value"] > 0.25  # chance


def test_textures_of_another_system_against_the_truth_and_each_other(run, quick, foreign, samples, tmp_path):
    arguments = ("--textures", foreign, "--prompts", tmp_path / "prompts.csv", "--data=procedural", "--limit=6")
    status, printed, error = run(*arguments)
    assert status == 0, error
    assert json.loads(printed.splitlines()[-1])["t2uv"]["texture"]["psnr"]["value"] > 50  # but for 8 bits
    for number in range(4):
        ImageOps.invert(Image.open(foreign / f"{number}.png")).save(foreign / f"{number}.png")
    assert run(*arguments, out="inverted")[0] == 0
    status, printed, error = run("--compare", tmp_path / "out", tmp_path / "inverted" / "results.json")
    assert status == 0, error
    row = json.loads(printed.splitlines()[-1])["t2uv.texture.psnr"]
    assert row["low"] > 20 and row["told_apart"] and row["samples_needed"] == 2 and row["count"] == 4
    assert "| `t2uv.texture.psnr` | ↑ |" in printed and "| `t2uv.follows.color.hair` | ↑ |" in printed
    status, printed, _ = run("--compare", tmp_path / "out", tmp_path / "out")
    same = json.loads(printed.splitlines()[-1])["t2uv.texture.psnr"]
    assert same["difference"] == 0 and not same["told_apart"] and "no difference" in same["samples_needed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit=0",), "--limit must be 1"),
        (("--base", "--checkpoint=x"), "give one of the two"),
        (("--textures=nowhere",), "no textures in nowhere"),
        (("--prompts=x.txt",), "belong to --textures"),
        (("--data=nowhere", "--base"), "no data set in nowhere"),
        (("--base", "--task=i2uv"), "--task t2uv"),
        (("--compare", "nowhere", "nowhere"), "cannot read nowhere"),
        (("--checkpoint=nowhere",), "is no checkpoint"),
    ],
)
def test_bad_arguments_are_one_line(run, arguments, words):
    status, _, error = run(*arguments)
    assert status == 2 and words in error and "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_bad_textures_and_results_are_one_line(run, foreign, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"tasks": {}')
    (tmp_path / "short.txt").write_text("one prompt")
    for arguments, words in (
        (("--textures", tmp_path / "empty"), "no textures in"),
        (("--textures", foreign, "--prompts", tmp_path / "none.csv"), "cannot read"),
        (("--textures", foreign), "holds no prompts"),
        (("--textures", foreign, "--prompts", tmp_path / "short.txt"), "6 textures but 1 prompts"),
        (("--compare", tmp_path / "bad.json", tmp_path / "bad.json"), "holds no results"),
    ):
        status, _, error = run(*arguments)
        assert status == 2 and words in error, error


def test_a_data_set_on_disk(run, quick, dataset_dir):
    status, printed, error = run("--base", "--data", dataset_dir, "--limit=3")
    assert status == 0, error
    summary = json.loads(printed.splitlines()[-1])
    assert summary["t2uv"]["texture"]["psnr"]["count"] == 3
    assert "attributes need openai/clip-vit-large-patch14" in summary["t2uv"]["follows"]["attributes"]


def test_a_picture_that_cannot_be_decoded_is_skipped_by_name(dataset_dir, make_config, monkeypatch):
    decode = ATLASLarge.texture

    def texture(self, row):
        if row == 1:
            raise UserError("texture 1 of data set d is damaged")
        return decode(self, row)

    monkeypatch.setattr(ATLASLarge, "texture", texture)
    stored = stored_set(str(dataset_dir), make_config(), 32, True, 3)
    assert stored.skipped == ["texture 1 of data set d is damaged"] and stored.names == ["00000", "00002"]
    assert stored.prompts == ["a man in red", "a man in blue"]
    assert stored.picture(1).height == 32 and stored.truth(1)[:, 16, 16].argmax() == 2, "blue, of row 2"


def test_prompts_and_pictures_and_both(run, quick, base, make_config, monkeypatch):
    cfg = make_config()
    aligner = make_aligner(cfg.model.aligner, base).eval().requires_grad_(False)
    monkeypatch.setattr(running, "load_model", lambda *arguments: (TrainedModel(base, aligner, cfg), None, 7))
    status, printed, error = run("--limit=2")
    assert status == 0, error
    summary = json.loads(printed.splitlines()[-1])
    assert summary["i2uv"]["psnr"] > 0 and {"psnr_visible", "psnr_hidden", "ssim"} <= summary["i2uv"].keys()
    assert_named(summary, " ".join(NAMES.values()), 2)
    assert {"img_weight_0_25", "img_weight_0_5", "img_weight_0_75"} == summary["both"].keys()
    assert summary["i2uv"]["follows"]["picture_retrieval"]["embedded image encoder"]["count"] == 2
    status, printed, error = run("--limit=2", "--task=i2uv")
    assert status == 0, error
    assert not {"t2uv", "both", "sentences"} & json.loads(printed.splitlines()[-1]).keys()


def test_best_median_and_worst_are_different_samples():
    values = torch.tensor([0.2, torch.nan, 0.9, 0.5])
    assert chosen_cases(values) == {"best": 2, "median": 3, "worst": 0}
    assert chosen_cases(values[:2]) == {"best": 0}


def test_tables_hold_no_bare_nan():
    figure = {"value": 0.5, "low": None, "high": None, "count": 2, "skipped": 1}
    results = {"tasks": {"t2uv": {"figures": {"uv.fill": figure}}}, "skipped": [], "samples": [], "texels": 8}
    table = markdown({**results, "data": "d", "body": "b", "base": "x"})
    assert "0.5000 [–, –] (N = 2, 1 could not be measured)" in table
