import json

import pytest
import torch

import pretrain_base
from base_model import PROJECT_ROOT, load_base
from conditioning import encode_prompts


@pytest.fixture()
def small_run(tmp_path, monkeypatch):
    arguments = "--out base --work work --renders 100 --outfits 96 --clip-steps 2 --image-steps 2 --vae-steps 2"
    arguments = f"{arguments} --unet-steps 2 --mixed-precision no --device cpu".split()
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
    folder = PROJECT_ROOT / "embedded_base"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 20e6
    base = load_base("embedded_base")
    prompts = ["white, man, black shirt, blue jeans, black hair", "a woman in a yellow dress"]
    assert encode_prompts(base, prompts).shape == (2, base.context_tokens, base.unet.config.cross_attention_dim)
    assert (
        base.tokenizer.decode(base.tokenizer(prompts[1]).input_ids, skip_special_tokens=True).split()
        == prompts[1].split()
    )
