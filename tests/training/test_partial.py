"""Input channels for partial textures: trained with a share of the pictures' rows, kept beside the LoRA, and used where
a picture's own pixels are kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from atlas_dataset.views import render_texture
from common.errors import UserError
from common.pictures import image_from_pixels
from config.configuration import Render
from infer_uv import main as infer_main
from lora_utils import LORA_FILE
from models.checkpoints import load_checkpoint
from models.partial import PARTIAL_FILE, PartialInput, attach, partial_channels
from models.pipeline import TexturePipeline
from render.rigs import load_rig
from training.loop import train
from training.objective import RowDraws
from training.run import set_up

OPTIONS = ("training.joint.partial_share=1", "training.joint.partial_learning_rate=0.05", "data.cache=latents")
MAIN = {"joint": OPTIONS, "i2uv": tuple(option.replace("joint", "i2uv") for option in OPTIONS)}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_unet_that_is_shown_nothing_is_the_same_to_the_bit(base):
    latents, states, timestep = noise(2, 4, 8, 8), noise(2, 5, 16), torch.tensor(300)
    before = base.unet(latents, timestep, states).sample
    partial_input = PartialInput.of(base.unet)
    attach(base.unet, partial_input)
    shown = torch.cat([latents, partial_channels(noise(2, 4, 8, 8), torch.ones(2, 1, 8, 8))], dim=1)
    assert torch.equal(base.unet(latents, timestep, states).sample, before)
    assert torch.equal(base.unet(shown, timestep, states).sample, before), "zero to begin with"
    torch.nn.init.normal_(partial_input.conv.weight)
    assert torch.equal(base.unet(latents, timestep, states).sample, before)
    after = base.unet(shown, timestep, states).sample
    assert not torch.allclose(after, before)
    hidden = torch.cat([latents, torch.zeros(2, 5, 8, 8)], dim=1)
    assert torch.equal(base.unet(hidden, timestep, states).sample, before), "a partial of 0 says nothing"


@pytest.mark.parametrize("schedule", ["alternate", "paired"])
def test_rows_of_pictures_see_what_a_view_shows_of_their_own_texture(make_config, schedule):
    halved = ("training.joint.partial_share=0.5", f"training.joint.schedule={schedule}")
    run = set_up(make_config(*OPTIONS, *halved), "joint")
    visible = run.partials.visible
    assert visible.shape[1:] == (1, 8, 8) and visible.min() >= 0 and visible.max() <= 1
    assert 0.05 < visible.mean() < 0.6
    assert len({tuple(view.flatten().tolist()) for view in visible}) > len(visible) / 2, "other views each"
    latents = noise(200, 4, 8, 8)
    rows = run.partials.rows("image", latents, RowDraws(0, 1, range(200)))
    held = rows[:, 4:]
    assert torch.equal(rows[:, :4], latents * held)
    shown = held.flatten(1).any(1)
    assert 70 < shown.sum() < 130
    assert all((held[row] == visible).flatten(1).all(1).any() for row in shown.nonzero()[:, 0])
    assert not run.partials.rows("text", latents, RowDraws(0, 1, range(200))).any()


@pytest.mark.parametrize("task", ["joint", "i2uv"])
def test_it_trains_and_its_file_lies_beside_a_lora_that_loads_without_it(task, make_config, tiny_base):
    folder = train(make_config(*MAIN[task]), task)
    weights = load_file(folder / PARTIAL_FILE)
    assert list(weights) == ["conv.weight"] and weights["conv.weight"].shape == (16, 5, 3, 3)
    assert (weights["conv.weight"].abs().amax((0, 2, 3)) > 0).all(), "each channel has learned"
    assert not any("partial" in key for key in load_file(folder / LORA_FILE))
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_base), safety_checker=None)
    pipeline.load_lora_weights(str(folder))
    assert torch.equal(load_checkpoint(folder).partial_input.conv.weight, weights["conv.weight"])


def test_a_copy_without_it_is_refused(make_config):
    folder = train(make_config(*OPTIONS), "joint")
    (folder / PARTIAL_FILE).unlink()
    with pytest.raises(UserError, match=r"joint.partial_share 1.0 but has no partial_input.safetensors; copy it whole"):
        load_checkpoint(folder)


def test_prompts_alone_have_no_use_for_it(make_config):
    folder = train(make_config(*MAIN["joint"]), "t2uv")  # which inherits from joint
    assert not (folder / PARTIAL_FILE).exists()


def test_it_resumes_to_the_bit(make_config, tmp_path):
    whole = train(make_config(*OPTIONS, f"output.out_dir={tmp_path / 'whole'}"), "joint")
    halves = make_config(*OPTIONS, f"output.out_dir={tmp_path / 'halves'}", "output.save_every=2")
    train(halves, "joint")
    shutil.rmtree(tmp_path / "halves" / "joint" / "step-000003")
    again = train(halves, "joint", resume="auto")
    assert (again / PARTIAL_FILE).read_bytes() == (whole / PARTIAL_FILE).read_bytes()


def test_own_pixels_go_through_it_and_nothing_else_does(checkpoint, mesh, tmp_path, run_script):
    render = Render(full_body=1, backgrounds={"plain": 0, "gradient": 0, "noise": 0, "white": 1})
    picture, view = render_texture(load_rig(f"obj:{mesh}"), torch.full((3, 64, 64), 0.4), render, 3, 0, [0], 128, 96)[0]
    image_from_pixels(picture).save(tmp_path / "one.png")
    (tmp_path / "one.json").write_text(json.dumps(view))
    options = ["--image", tmp_path / "one.png", "--checkpoint", checkpoint, "--size", 64]

    def textures() -> list[bytes]:
        made = []
        for more in ([], ["--fit", tmp_path / "one.json"]):
            status, _, error = run_script(infer_main, *options, *more, "--out", tmp_path / "out.png")
            assert status == 0, error
            made.append(Image.open(tmp_path / "out.png").tobytes())
        return made

    before = textures()
    torch.manual_seed(0)
    save_file({"conv.weight": torch.randn(16, 5, 3, 3)}, checkpoint / PARTIAL_FILE)
    after = textures()
    assert before[0] == after[0] and before[1] != after[1]


def test_a_file_of_another_unet_is_refused(checkpoint, tmp_path, run_script):
    for tensors in ({"conv.weight": torch.zeros(8, 5, 3, 3)}, {"weight": torch.zeros(16, 5, 3, 3)}):
        save_file(tensors, checkpoint / PARTIAL_FILE)
        with pytest.raises(UserError, match="does not fit this base"):
            TexturePipeline.from_pretrained(checkpoint)
    (Path(checkpoint) / PARTIAL_FILE).write_bytes(b"no")
    status, _, error = run_script(infer_main, "--prompt", "x", "--checkpoint", checkpoint, "--out", tmp_path / "o.png")
    assert status == 2 and len(error.strip().splitlines()) == 1
