import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, StableDiffusionPipeline

from common import processes
from common.files import PROJECT_ROOT
from embedded.grammar import Outfit
from embedded.pretrain import __main__ as pretrain
from embedded.pretrain import autoencoder, latents, scenes
from embedded.pretrain.__main__ import STAGES, Stage, main, run_stage
from embedded.pretrain.autoencoder import random_crop
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.tokenizer import train_tokenizer
from embedded.pretrain.unet import encode_captions, encode_pictures
from embedded.pretrain.variety import varied_picture
from models.base import load_base
from models.conditioning import encode_prompts


@pytest.fixture()
def small_run(tmp_path, monkeypatch, run_script):
    """Runs the stages in little, in a folder of their own → what `run_script` returns."""
    steps = [f"--{name.replace('_', '-')}-steps=2" for name, stage in STAGES.items() if stage.steps]
    size = ["--renders=16", "--outfits=24", "--mixed-precision=no", "--device=cpu"]
    in_little(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_script(main, "--out=base", "--work=work", *size, *steps, *arguments)


def in_little(monkeypatch):
    monkeypatch.setattr(latents, "PATCHWORKS", 16)
    monkeypatch.setattr(processes, "cores", lambda: 1)  # a second renderer takes longer to start than to render


def weights() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("base").rglob("*.safetensors")}


def test_pretraining_writes_a_base_and_resumes(small_run, monkeypatch, tmp_path):
    status, printed, _ = small_run()
    summary = json.loads(printed.splitlines()[-1])
    assert status == 0 and summary["unet"]["steps"] == 2 and summary["unet"]["last_loss"] > 0
    base = load_base("base")
    assert encode_prompts(base, ["white, woman, black shirt, striped jeans, black hair"]).shape == (1, 77, 128)
    assert base.native_resolution == 256 and base.noise_scheduler.config.prediction_type == "v_prediction"
    assert "| text_encoder | 2 |" in Path("base/README.md").read_text()
    unet_done, decoder_done = (Path(f"work/stages/{name}.json").stat().st_mtime for name in ("unet", "autoencoder"))
    assert unet_done < decoder_done, "the UNet needs no trained decoder"
    assert base.vae_scale == 8 and base.unet.config.in_channels == base.vae.config.latent_channels == 24
    plain = StableDiffusionPipeline.from_pretrained("base", dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    sampled = plain("a man", num_inference_steps=2, output_type="latent").images
    with torch.no_grad():
        assert plain.vae.decode(sampled / plain.vae.config.scaling_factor).sample.shape == (1, 3, 256, 256)

    def never(*args):
        raise AssertionError("a finished stage or render was made again")

    monkeypatch.setattr(scenes, "render_scene", never)
    monkeypatch.setattr(scenes, "render_outfit", never)
    monkeypatch.setattr(torch.Tensor, "backward", never)
    before = weights()
    assert small_run()[0] == 0 and weights() == before

    # The decoder begins at the encoder's inverse, not where an earlier training ended.
    monkeypatch.undo()
    in_little(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("work/autoencoder.pt").unlink()
    assert small_run("--stage=autoencoder")[0] == 0 and weights() == before

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
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 30e6
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


@pytest.fixture(scope="module")
def basis():
    """The latents of eight patchworks: weight (24, 192), bias (24,), and the pictures (8, 3, 256, 256) in [-1, 1]."""
    pictures = torch.stack([latents.patchwork(index) for index in range(8)]) * 2 - 1
    return *latents.fit_basis(pictures), pictures


def blocks_of(pictures):
    """(N, 3, H, W) → (N, H/8, W/8, 192), ordered channel, row, column."""
    rows = pictures.unflatten(2, (-1, 8)).unflatten(4, (-1, 8))  # (N, 3, H/8, 8, W/8, 8)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3)


def test_latents_are_means_and_principal_components_of_set_spread(basis):
    weight, bias, pictures = basis
    values = blocks_of(pictures) @ weight.T + bias
    deviation = values.flatten(0, 2).std(0) * latents.SCALING_FACTOR
    assert torch.allclose(deviation[:4], torch.tensor([1.0, 1.0, 1.0, 0.6]), atol=1e-3)
    in_pixels = deviation[3:] / weight[3:].norm(dim=1)  # components are of length 1
    assert torch.allclose(deviation[3:] / deviation[3], (in_pixels / in_pixels[0]).sqrt(), atol=1e-3)
    assert values.mean((0, 1, 2)).abs().max() < 1e-4
    means = pictures.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).permute(0, 2, 3, 1).flatten(0, 2)
    correlation = torch.corrcoef(torch.cat([means, values[..., :3].flatten(0, 2)], 1).T)[:3, 3:].diagonal()
    assert torch.allclose(correlation, torch.ones(3), atol=1e-4)
    # Principal components are orthogonal, uncorrelated, and sorted by what they hold of the pictures.
    components = weight[3:] / weight[3:].norm(dim=1, keepdim=True)
    assert torch.allclose(components @ components.T, torch.eye(21), atol=1e-4)
    energies = (blocks_of(pictures) @ components.T).flatten(0, 2).var(0)
    assert (energies.diff() <= 1e-6).all()


def test_the_encoder_is_the_basis_and_the_decoder_its_inverse(basis, tmp_path):
    weight, bias, pictures = basis
    pictures = pictures[:2, :, :64, :64]  # half precision is slow on a CPU
    vae = latents.make_autoencoder(weight, bias)
    with torch.no_grad():
        encoded = vae.encode(pictures).latent
        assert torch.allclose(encoded, (blocks_of(pictures) @ weight.T + bias).permute(0, 3, 1, 2), atol=1e-5)
        decoded = blocks_of(vae.decode(encoded).sample)
        expected = (encoded.permute(0, 2, 3, 1) - bias) @ torch.linalg.pinv(weight).T
        assert (decoded - expected).abs().max() < 1e-3
        assert blocks_of(pictures).sub(expected).abs().max() > 0.1, "24 numbers cannot hold all of a block"

        vae.half().save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path), dtype=torch.float16)
        assert (loaded.encode(pictures.half()).latent - encoded).abs().max() < 0.02
        assert (blocks_of(loaded.decode(encoded.half()).sample) - expected).abs().max() < 0.02
    assert loaded.config.scaling_factor == 2 and list(loaded.config.block_out_channels) == [3, 32, 64, 128]


def test_an_autoencoder_of_another_class_is_not_trained_on(small_run, tiny_base, monkeypatch):
    shutil.copytree(tiny_base / "vae", "base/vae")
    monkeypatch.setattr(autoencoder, "load_scenes", lambda run: ([], []))
    status, _, message = small_run("--stage=autoencoder")
    assert status == 2 and "--stage latents`" in message


def test_varied_pictures_are_reproducible_and_rich():
    pictures = np.stack([varied_picture(5, index, 64)[0] for index in range(12)])
    assert pictures.dtype == np.uint8 and pictures.shape == (12, 3, 64, 64)
    assert np.array_equal(pictures[3], varied_picture(5, 3, 64)[0])
    assert len({picture.tobytes() for picture in pictures}) == 12
    spread = pictures.reshape(12, -1).std(1)
    assert (spread > 5).all(), "none is flat"


def test_of_two_crops_the_one_with_more_detail_is_taken():
    flat, striped = np.full((3, 128, 128), 90, np.uint8), np.zeros((3, 128, 128), np.uint8)
    striped[:, ::2] = 255
    crops = [random_crop(np.stack([flat, striped]), np.random.default_rng(seed)) for seed in range(200)]
    assert all(crop.shape == (3, 64, 64) and crop.min() >= 0 and crop.max() <= 1 for crop in crops)
    # Both places are flat in a quarter of the draws.
    assert 0.15 < np.mean([float(crop.std()) < 1e-3 for crop in crops]) < 0.35


def test_stages_of_two_processes_keep_each_others_summaries(tmp_path, monkeypatch):
    run = Run(tmp_path / "base", tmp_path / "work", 1, 1, torch.device("cpu"), None)

    def other_process_meanwhile(run, steps):
        run_stage("second", run, 3)
        return {"steps": steps}

    def second(run, steps):
        return {"steps": steps}

    stages = {
        "first": Stage(other_process_meanwhile, 5, "vae"),
        "second": Stage(second, 3, "unet"),
        "third": Stage(second, 3, "unet", ("first",)),
    }
    monkeypatch.setattr(pretrain, "STAGES", stages)
    run_stage("first", run, 5)
    where = {"batch_scale": 1, "device": "cpu"}
    assert pretrain.read_summaries(run) == {
        "first": {"steps": 5, **where},
        "second": {"steps": 3, **where},
        "third": None,
    }


def test_latents_and_states_are_joined_under_bfloat16(base):
    pictures = np.zeros((60, 3, 16, 16), np.uint8)
    latents = encode_pictures(base.vae, pictures, 16, torch.bfloat16)
    assert latents.shape == (60, 4, 8, 8) and latents.dtype == torch.float16
    states = encode_captions(base.text_encoder, base.tokenizer, ["a man"] * 101, torch.bfloat16)
    assert states.shape == (101, 77, 16) and states.dtype == torch.float16
