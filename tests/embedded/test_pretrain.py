import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import PROJECT_ROOT
from embedded.grammar import Outfit
from embedded.pretrain import scenes
from embedded.pretrain.__main__ import STAGES, main
from embedded.pretrain.stage import train_stage
from embedded.pretrain.tokenizer import train_tokenizer
from embedded.pretrain.unet import encode_captions, encode_pictures
from models.base import load_base
from models.conditioning import encode_prompts


@pytest.fixture()
def small_run(tmp_path, monkeypatch, run_script):
    """Runs the stages in little, in a folder of their own → what `run_script` returns."""
    steps = [f"--{name.replace('_', '-')}-steps=2" for name, stage in STAGES.items() if stage.steps]
    size = ["--renders=40", "--outfits=80", "--mixed-precision=no", "--device=cpu"]
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_script(main, "--out=base", "--work=work", *size, *steps, *arguments)


def weights() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("base").rglob("*.safetensors")}


def test_pretraining_writes_a_base_and_resumes(small_run, monkeypatch):
    status, printed, _ = small_run()
    summary = json.loads(printed.splitlines()[-1])
    assert status == 0 and summary["unet"]["steps"] == 2 and summary["unet"]["last_loss"] > 0
    base = load_base("base")
    assert encode_prompts(base, ["white, woman, black shirt, striped jeans, black hair"]).shape == (1, 77, 128)
    assert base.native_resolution == 256 and base.noise_scheduler.config.prediction_type == "v_prediction"
    assert "| text_encoder | 2 |" in Path("base/README.md").read_text()

    def never(*args):
        raise AssertionError("a finished stage or render was made again")

    monkeypatch.setattr(scenes, "render_scene", never)
    monkeypatch.setattr(scenes, "render_outfit", never)
    monkeypatch.setattr(torch.Tensor, "backward", never)
    before = weights()
    assert small_run()[0] == 0 and weights() == before

    # The encoders of another tokenizer are not what a later stage is to be trained behind.
    assert small_run("--stage=tokenizer")[0] == 0
    status, _, message = small_run("--stage=image_encoder")
    assert status == 2 and "--stage text_encoder` first" in message
    assert small_run("--stage=text_encoder")[0] == small_run("--stage=image_encoder")[0] == 0
    assert weights() == before


@pytest.mark.parametrize(("stage", "first"), [("text_encoder", "tokenizer"), ("unet", "text_encoder")])
def test_a_stage_alone_names_the_stage_to_run_first(small_run, stage, first):
    if stage == "unet":
        train_tokenizer(Path("base"))
    status, _, message = small_run(f"--stage={stage}")
    assert status == 2 and f"--stage {first}` first" in message and message.count("\n") == 1
    assert not Path("work").exists(), "nothing was written"


def test_a_stage_resumed_halfway_ends_the_same(tmp_path):
    def run(work, stops):
        work.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            module = torch.nn.Linear(4, 1)

            def loss_fn(step, module=module, stop=stop):
                if step == stop:
                    raise KeyboardInterrupt
                return module(torch.randn(8, 4)).square().mean()

            try:
                train_stage("stage", work, {"module": module}, loss_fn, 6, lr=0.1, save_seconds=0)
            except KeyboardInterrupt:
                continue
        return module.weight

    assert torch.equal(run(tmp_path / "whole", [None]), run(tmp_path / "cut", [2, 5, None]))


def test_the_embedded_base_is_small_and_complete():
    folder = PROJECT_ROOT / "embedded" / "base"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 20e6
    base = load_base("embedded/base")
    prompts = ["white, man, black shirt, blue jeans, black hair", "a woman in a yellow dress"]
    assert encode_prompts(base, prompts).shape == (2, base.context_tokens, base.unet.config.cross_attention_dim)
    assert (
        base.tokenizer.decode(base.tokenizer(prompts[1]).input_ids, skip_special_tokens=True).split()
        == prompts[1].split()
    )


def test_captions_that_are_nearly_right_differ_from_the_right_ones():
    """Of what their prompts say, for sentences have too many words for it."""
    rng, outfit = np.random.default_rng(0), Outfit("white", "woman", "red", "blouse", "navy", "skirt", "black")
    confused = [scenes.confused(outfit, rng) for _ in range(60)]
    assert outfit.prompt not in confused and len(set(confused)) > 50
    bald = replace(outfit, person="man", bottom="jeans", hair_cut="bald")
    assert bald.prompt not in [scenes.confused(bald, rng) for _ in range(60)]


def test_latents_and_states_are_joined_under_bfloat16(base):
    pictures = np.zeros((60, 3, 16, 16), np.uint8)
    latents = encode_pictures(base.vae, pictures, 16, torch.bfloat16)
    assert latents.shape == (60, 4, 8, 8) and latents.dtype == torch.float16
    states = encode_captions(base.text_encoder, base.tokenizer, ["a man"] * 101, torch.bfloat16)
    assert states.shape == (101, 77, 16) and states.dtype == torch.float16
