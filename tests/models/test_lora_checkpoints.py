import json
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from common.errors import UserError
from config.configuration import Aligner, LoRA
from lora_utils import LORA_FILE, add_lora, add_text_encoder_lora, lora_parameters, save_lora
from models.base import load_base
from models.checkpoints import (
    EMBEDDED_CHECKPOINT,
    RESUME_FILE,
    drop_old_checkpoints,
    load_aligner,
    load_checkpoint,
    newest_checkpoint,
    newest_state,
    save_checkpoint,
)
from models.conditioning import PooledAligner, make_aligner
from models.lora_files import load_lora


def randomise(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.2)


def output(unet):
    generator = torch.Generator().manual_seed(5)
    noisy_latents, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 16, generator=generator)
    with torch.no_grad():
        return unet.eval()(noisy_latents, 7, context).sample


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL_LAYERS = [*ATTENTION, "proj_in", "conv1", "conv2", "ff.net.2", "time_emb_proj"]


@pytest.mark.parametrize(
    "targets,variant",
    [(ATTENTION, {}), (ALL_LAYERS, {}), (ALL_LAYERS, {"use_rslora": True}), (ATTENTION, {"use_dora": True})],
)
def test_lora_loads_here_and_in_plain_diffusers_at_the_right_scale(base, tiny_base, tmp_path, targets, variant):
    before = output(base.unet)
    parameters = add_lora(base.unet, LoRA(r=4, alpha=6, target_modules=targets, **variant))
    assert torch.equal(output(base.unet), before), "a new LoRA changes nothing"
    randomise(parameters)
    expected = output(base.unet)
    assert (expected - before).abs().max() > 0.01
    save_lora(base, tmp_path)

    ours = load_base(str(tiny_base))
    load_lora(ours, tmp_path)
    assert torch.allclose(output(ours.unet), expected, atol=1e-6)
    assert not any(p.requires_grad for p in lora_parameters(ours.unet))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(output(pipeline.unet), expected, atol=1e-6)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_seeds_peft_folder_loads(tiny_base, tmp_path, weights):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    adapted = get_peft_model(unet, LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    randomise(parameter for name, parameter in adapted.named_parameters() if "lora_" in name)
    expected = output(adapted)
    adapted.save_pretrained(tmp_path, safe_serialization=weights.endswith("safetensors"))
    assert (tmp_path / weights).exists()
    ours = load_base(str(tiny_base))
    load_lora(ours, tmp_path)
    assert torch.allclose(output(ours.unet), expected, atol=1e-6)


def test_lora_is_float32_on_a_half_base(tiny_base):
    base = load_base(str(tiny_base), dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in add_lora(base.unet, LoRA()))
    assert base.unet.conv_in.weight.dtype == torch.bfloat16


def test_saving_asks_no_network(base, tmp_path, monkeypatch, recwarn):
    add_lora(base.unet, LoRA(r=2, target_modules=ATTENTION))
    add_text_encoder_lora(base.text_encoder, LoRA(r=2, text_encoder_r=2))
    # What a base from the hub, or from a folder with its config in a subfolder, has here.
    base.text_encoder.peft_config["default"].base_model_name_or_path = "owner/model"

    def asked(*args, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    save_lora(base, tmp_path)
    assert not [warning for warning in recwarn if "config" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_trains_under_channels_last(tiny_base, dtype):
    """PEFT flattens convolutions by view, which channels_last forbids; the result is the plain format's."""
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        base = load_base(str(tiny_base), dtype=dtype)
        torch.manual_seed(0)
        parameters = add_lora(base.unet, LoRA(r=2, use_dora=True, target_modules=["to_q", "conv1", "conv_in"]))
        base.unet.to(memory_format=memory_format)
        noisy_latents = torch.randn(2, 4, 8, 8).to(dtype).contiguous(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            base.unet(noisy_latents, 7, torch.randn(2, 77, 16).to(dtype)).sample.float().square().mean().backward()
        gradients.append([parameter.grad for parameter in parameters])
    for plain, channels_last in zip(*gradients):
        assert torch.allclose(plain, channels_last, rtol=0.05, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert any(gradient.abs().max() > 0 for gradient in gradients[1])


def test_foreign_or_missing_lora_is_refused(base, tiny_base, tmp_path):
    with pytest.raises(UserError, match="no LoRA at"):
        load_lora(base, tmp_path)
    (tmp_path / LORA_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"cannot read .*{LORA_FILE}"):
        load_lora(base, tmp_path)
    other = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 64), cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    add_lora(other, LoRA(r=4))
    save_lora(replace(base, unet=other), tmp_path)
    with pytest.raises(UserError, match="another base"):
        load_lora(load_base(str(tiny_base)), tmp_path)


@pytest.fixture()
def trained(base, make_config):
    cfg = make_config("model.lora.alpha=5")
    randomise(add_lora(base.unet, cfg.model.lora))
    aligner = make_aligner(cfg.model.aligner, base)
    return cfg, base, aligner


def test_checkpoint_rebuilds_the_model_from_its_own_config(trained, tmp_path):
    cfg, base, aligner = trained
    folder = tmp_path / "checkpoints" / "joint" / "step-000003"
    save_checkpoint(folder, cfg, "joint", 3, base, aligner)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-000003"]
    state = json.loads((folder / "training_state.json").read_text())
    assert state == {"task": "joint", "global_step": 3, "written": pytest.approx(time.time(), abs=60)}
    loaded = load_checkpoint(folder)
    assert loaded.cfg == cfg
    assert torch.allclose(output(loaded.base.unet), output(base.unet), atol=1e-6)
    for name, value in aligner.state_dict().items():
        assert torch.equal(value, loaded.aligner.state_dict()[name])
    save_checkpoint(folder.with_name("step-000004"), cfg, "t2uv", 4, base, None)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-000004"
    assert load_checkpoint(folder.with_name("step-000004")).aligner is None


def test_checkpoints_of_half_precision(trained, tmp_path):
    cfg, base, aligner = trained
    cfg = cfg.model_copy(update={"output": cfg.output.model_copy(update={"half_precision": True})})
    folder = tmp_path / "joint" / "step-000001"
    save_checkpoint(folder, cfg, "joint", 1, base, aligner)
    loaded = load_checkpoint(folder)
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(loaded.base.unet))
    difference = (output(loaded.base.unet) - output(base.unet)).abs().max()
    assert 0 < difference < 0.01
    for name, value in aligner.state_dict().items():
        assert torch.equal(value.half().float(), loaded.aligner.state_dict()[name])


def write_checkpoints(run_dir, *saved):
    """Folders as training writes them, (step, written or None for those before the field); mtimes as a cloud store
    copies them: newest first."""
    for age, (step, written) in enumerate(saved):
        folder = run_dir / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for name in ("config.yaml", LORA_FILE, RESUME_FILE):
            (folder / name).touch()
        state = {"task": "joint", "global_step": step} | ({} if written is None else {"written": written})
        (folder / "training_state.json").write_text(json.dumps(state))
        for path in (folder, folder / "training_state.json"):
            os.utime(path, (1e9 - age, 1e9 - age))


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


@pytest.mark.parametrize("dated", [True, False])
def test_copied_checkpoints_keep_their_order(tmp_path, dated):
    run_dir = tmp_path / "joint"
    write_checkpoints(run_dir, *((step, 100.0 + step if dated else None) for step in (2, 4, 6)))
    assert newest_state(run_dir).name == newest_checkpoint(tmp_path).name == "step-000006"
    drop_old_checkpoints(run_dir, 1)
    assert names(run_dir) == ["step-000006"]


def test_a_run_begun_anew_is_the_newer_whatever_its_steps(trained, tmp_path, monkeypatch):
    cfg, base, aligner = trained
    run_dir = tmp_path / "joint"
    write_checkpoints(run_dir, (900, None), (1000, 3e9))  # of a version without the field; of a clock that was wrong
    for step in (1, 2):
        save_checkpoint(run_dir / f"step-{step:06d}", cfg, "joint", step, base, aligner, {})
        assert newest_state(run_dir).name == newest_checkpoint(tmp_path).name == f"step-{step:06d}"
    drop_old_checkpoints(run_dir, 3)
    assert names(run_dir) == ["step-000001", "step-000002", "step-001000"]


def test_only_what_training_named_and_wrote_is_ever_deleted_or_chosen(tmp_path, capsys):
    run_dir = tmp_path / "joint"
    write_checkpoints(run_dir, (2, 1.0), (4, 2.0), (6, 3.0))
    shutil.copytree(run_dir / "step-000006", run_dir / "step-000006-good")
    shutil.copytree(run_dir / "step-000006", run_dir / "step-000099")  # says 6 of itself
    (run_dir / "step-000008").mkdir()
    (run_dir / "step-000009").mkdir()
    (run_dir / "step-000009" / "training_state.json").write_text("[torn")
    (run_dir / "step-000002.zip").write_bytes(b"PK")
    own = {"step-000002", "step-000004", "step-000006"}
    others = set(names(run_dir)) - own
    assert newest_state(run_dir).name == newest_checkpoint(tmp_path).name == "step-000006"
    assert "step-000008 does not say its step" in capsys.readouterr().err
    drop_old_checkpoints(run_dir, 1)
    assert set(names(run_dir)) == others | {"step-000006"}
    shutil.rmtree(run_dir / "step-000006")
    assert newest_state(run_dir) is None
    with pytest.raises(UserError, match="no checkpoint under"):
        newest_checkpoint(tmp_path)


def test_where_nobody_has_trained_the_embedded_checkpoint_is_used(tmp_path, monkeypatch, capsys, trained):
    cfg, base, aligner = trained
    monkeypatch.chdir(tmp_path)
    assert newest_checkpoint("checkpoints") == EMBEDDED_CHECKPOINT
    assert "using the embedded one" in capsys.readouterr().err
    save_checkpoint(tmp_path / "checkpoints/joint/step-000001", cfg, "joint", 1, base, aligner)
    assert newest_checkpoint("checkpoints").name == "step-000001"


def test_the_embedded_checkpoint_is_small_and_whole():
    assert sum(path.stat().st_size for path in EMBEDDED_CHECKPOINT.rglob("*")) <= 6e6
    loaded = load_checkpoint(EMBEDDED_CHECKPOINT)
    assert loaded.aligner is not None and loaded.cfg.model.pretrained_model == "embedded/base"


def test_an_interrupted_or_poisoned_save_leaves_the_last_checkpoint(trained, tmp_path, monkeypatch):
    cfg, base, aligner = trained
    folder = tmp_path / "checkpoints" / "joint" / "step-000001"
    save_checkpoint(folder, cfg, "joint", 1, base, aligner)

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.checkpoints.save_config", disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(folder.with_name("step-000002"), cfg, "joint", 2, base, aligner)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "checkpoints") == folder
    with torch.no_grad():
        lora_parameters(base.unet)[0][0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        save_checkpoint(folder.with_name("step-000003"), cfg, "joint", 3, base, aligner)
    assert not folder.with_name("step-000003").exists()


def test_bad_checkpoints_are_refused(trained, tmp_path):
    cfg, base, aligner = trained
    with pytest.raises(UserError, match="train one with"):
        newest_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no checkpoint"):
        load_checkpoint(tmp_path)
    folder = tmp_path / "joint" / "step-000001"
    save_checkpoint(folder, cfg, "joint", 1, base, aligner)
    shutil.copy(folder / "config.yaml", folder / "aligner.safetensors")
    with pytest.raises(UserError, match=r"cannot read .*aligner\.safetensors"):
        load_checkpoint(folder)


def test_pooled_aligner_from_pth_and_nothing_is_executed(base, tmp_path):
    aligner = PooledAligner(24, 16, 77, heads=8)  # the seed's number; no state dict tells it
    torch.save(aligner.state_dict(), tmp_path / "aligner.pth")
    loaded = load_aligner(tmp_path / "aligner.pth", Aligner(heads=2), base)
    tokens = torch.randn(1, 5, 24)
    assert torch.equal(loaded(tokens), aligner(tokens))

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"cls_token": Hostile()}))
    with pytest.raises(UserError, match=r"cannot read .*hostile\.pth"):
        load_aligner(tmp_path / "hostile.pth", Aligner(), base)
    assert not (tmp_path / "executed").exists()
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"keys neither of TexDreamer's .* nor of the seed's"):
        load_aligner(tmp_path / "other.pth", Aligner(heads=2), base)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a state dict"):
        load_aligner(tmp_path / "list.pth", Aligner(), base)
    with pytest.raises(UserError, match="no aligner at"):
        load_aligner(tmp_path / "nowhere.pth", Aligner(), base)
