import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from common.files import PROJECT_ROOT
from embedded.grammar import Outfit
from embedded.pretrain import scenes as pretrain_base
from models.base import load_base
from models.conditioning import encode_prompts


@pytest.fixture()
def small_run(tmp_path, monkeypatch):
    arguments = "--out base --work work --renders 40 --outfits 80 --clip-steps 2 --image-steps 2 --vae-steps 2"
    arguments = f"{arguments} --text-steps 2 --unet-steps 2 --mixed-precision no --device cpu".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain_base.py", *arguments])
    return tmp_path


def test_pretraining_writes_a_base_and_resumes(small_run, monkeypatch, capsys):
    pretrain_base.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["unet"]["steps"] == 2 and summary["unet"]["last_loss"] > 0
    base = load_base(str(small_run / "base"))
    assert encode_prompts(base, ["white, woman, black shirt, striped jeans, black hair"]).shape == (1, 77, 128)
    assert base.native_resolution == 256 and base.noise_scheduler.config.prediction_type == "v_prediction"

    def never(*args):
        raise AssertionError("a finished stage or render was made again")

    monkeypatch.setattr(pretrain_base, "render_scene", never)
    monkeypatch.setattr(pretrain_base, "render_outfit", never)
    monkeypatch.setattr(torch.Tensor, "backward", never)
    before = {path: path.read_bytes() for path in (small_run / "base").rglob("*.safetensors")}
    pretrain_base.main()
    assert before == {path: path.read_bytes() for path in (small_run / "base").rglob("*.safetensors")}


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
                pretrain_base.train_stage("stage", work, {"module": module}, loss_fn, 6, lr=0.1, save_seconds=0)
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
    rng = np.random.default_rng(0)
    outfit = Outfit("white", "woman", "red", "blouse", "navy", "skirt", "black")
    for _ in range(40):
        words = pretrain_base.confused(outfit, rng)
        assert words != outfit.prompt
        right = [
            outfit.ethnicity in words,
            f"{outfit.hair} hair" in words or f"{outfit.hair}-haired" in words,
            "red blouse" in words or "blouse in red" in words,
            "navy skirt" in words or "skirt in navy" in words,
        ]
        assert not all(right)


def test_equalised_latents_have_unit_colour_and_the_same_pictures():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=5, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    pictures = torch.rand(6, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, deviation = vae(pictures).sample, vae.encode(pictures).latent_dist.std
        pretrain_base.equalise(vae, pictures)
        after, posterior = vae(pictures).sample, vae.encode(pictures).latent_dist
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(posterior.mean.mean((0, 2, 3)), torch.zeros(5), atol=1e-4)
    assert torch.allclose(posterior.mean.std((0, 2, 3)), torch.tensor([1, 1, 1, 0.5, 0.5]), atol=1e-3)
    factor = (posterior.std / deviation).mean((0, 2, 3))
    assert torch.allclose(posterior.std, deviation * factor[:, None, None], rtol=1e-3)
