"""The fast adapter: what its windows are made to lead to, that it is trained, loaded, and refused where it must be."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from common.errors import UserError
from config.configuration import load_config
from lora_utils import FAST_FOLDER, LORA_FILE, bake_lora
from models.adapters import weights_hash
from models.checkpoints import CONFIG_FILE, EMBEDDED_CHECKPOINT, load_checkpoint
from models.diffusion import sample_latents
from models.fast import load_fast
from models.pipeline import TexturePipeline
from training.distilling import distill, fast_config
from training.fast import Shortcuts


@pytest.fixture
def teacher(checkpoint):
    """A joint checkpoint, its LoRA one with the base, as `add_fast` has it."""
    trained = load_checkpoint(checkpoint)
    bake_lora(trained.base)
    return trained


def shortcuts_of(teacher, windows, substeps) -> Shortcuts:
    fast = teacher.cfg.fast.model_copy(update={"windows": windows, "teacher_steps": substeps})
    inference = teacher.cfg.inference.model_copy(update={"guidance_scale": 2.0})
    return Shortcuts.of(teacher.cfg.model_copy(update={"fast": fast, "inference": inference}), teacher.base)


def random_rows(teacher, rows):
    unet = teacher.base.unet
    shape = (rows, unet.config.in_channels, 8, 8)
    states = torch.randn(rows, teacher.base.context_tokens, unet.config.cross_attention_dim)
    return torch.randn(shape), torch.randn(shape), states


@torch.no_grad()
def test_a_step_of_the_teacher_is_one_that_inference_takes(teacher):
    """One step from the last timestep ends at clean latents: they are the target's."""
    shortcuts = shortcuts_of(teacher, windows=1, substeps=1)
    latents, noise, states = random_rows(teacher, 2)
    scheduler = teacher.base.noise_scheduler
    first = shortcuts.timesteps[:1]
    start = shortcuts._mixed(latents, noise, first)
    negative = shortcuts.negative_states.expand_as(states)
    # Inference starts at init_noise_sigma 1 with the noise itself: give it the start as if it were noise.
    expected = sample_latents(teacher.base.unet, scheduler, [(states, 2.0)], negative, start, 1, sampler="ddim")
    timesteps = torch.full((2,), 500)
    clean, remaining = shortcuts.straightened(latents, noise, timesteps, states, torch.full((2,), 2.0))
    torch.testing.assert_close(clean, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shortcuts._mixed(clean, remaining, first.expand(2)), start, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type, zero_terminal_snr", [("epsilon", False), ("v_prediction", False),
                                                                ("v_prediction", True)])  # fmt: skip
def test_the_teachers_prediction_is_read_as_diffusers_reads_it(prediction_type, zero_terminal_snr, teacher):
    scheduler = DDIMScheduler.from_config(
        teacher.base.noise_scheduler.config, prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr, clip_sample=False,
    )  # fmt: skip
    teacher = replace(teacher, base=replace(teacher.base, noise_scheduler=scheduler))
    shortcuts, timesteps = shortcuts_of(teacher, windows=4, substeps=1), torch.tensor([999, 749, 499, 249])
    latents, noise, states = random_rows(teacher, 4)
    noisy_latents = shortcuts._mixed(latents, noise, timesteps)
    negative, positive = (
        teacher.base.unet(noisy_latents, timesteps, states).sample
        for states in (shortcuts.negative_states.expand_as(states), states)
    )
    guided = negative + 2 * (positive - negative)
    clean, remaining = shortcuts._predicted(noisy_latents, timesteps, states, torch.full((4,), 2.0))
    scheduler.set_timesteps(4)
    for row, timestep in enumerate(timesteps):
        expected = scheduler.step(guided[row], timestep, noisy_latents[row]).pred_original_sample
        torch.testing.assert_close(clean[row], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shortcuts._mixed(clean, remaining, timesteps), noisy_latents, rtol=1e-3, atol=1e-3)


def test_a_timestep_lies_in_the_window_that_inference_would_start_above_it(teacher):
    shortcuts = shortcuts_of(teacher, windows=4, substeps=3)
    timesteps = torch.tensor([999, 750, 749, 500, 499, 250, 249, 0])
    assert shortcuts.windows_of(timesteps).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@torch.no_grad()
def test_the_pair_leads_from_a_windows_start_to_where_the_true_way_ends(teacher, monkeypatch):
    """Of latents with a normal distribution, for which the way from noise is known: in any window, one DDIM step with
    the target ends nearer to its end than twice as many steps of DDIM as the teacher took."""
    shortcuts, timesteps = shortcuts_of(teacher, windows=4, substeps=3), torch.tensor([900, 600, 300, 100])
    latents, noise, states = random_rows(teacher, 4)

    def variance(timesteps):
        alpha, sigma = shortcuts._rates(timesteps)
        return (alpha * 0.3) ** 2 + sigma**2

    def predicted(noisy_latents, timesteps, *_):
        alpha, sigma = shortcuts._rates(timesteps)
        return tuple(noisy_latents * share / variance(timesteps) for share in (alpha * 0.3**2, sigma))

    monkeypatch.setattr(shortcuts, "_predicted", predicted)
    clean, remaining = shortcuts.straightened(latents, noise, timesteps, states, torch.ones(4))
    starts, ends = torch.tensor([999, 749, 499, 249]), torch.tensor([749, 499, 249, -1])
    start = shortcuts._mixed(latents, noise, starts)
    true_end = start * (variance(ends) / variance(starts)).sqrt()
    by_ddim, grid = start, shortcuts_of(teacher, windows=4, substeps=6).timesteps
    for here, there in zip(grid.view(4, 6).T, [*grid.view(4, 6).T[1:], ends]):
        by_ddim = shortcuts._mixed(*predicted(by_ddim, here), there)
    error, error_of_ddim = (
        (end - true_end).square().mean((1, 2, 3)) for end in (shortcuts._mixed(clean, remaining, ends), by_ddim)
    )
    assert (error < error_of_ddim).all(), (error, error_of_ddim)
    torch.testing.assert_close(shortcuts._mixed(clean, remaining, starts), start, rtol=1e-3, atol=1e-3)


def test_distilling_writes_an_adapter_that_changes_what_few_steps_give(checkpoint, tmp_path):
    overrides = ["training.fast.max_steps=3", "training.fast.batch_size=2", "training.fast.effective_batch_size=2"]
    cfg = fast_config(checkpoint, overrides)
    before = weights_hash(checkpoint)
    folder = distill(cfg, tmp_path / "work")
    assert folder == checkpoint / FAST_FOLDER and not list((tmp_path / "work").glob("*"))
    assert weights_hash(checkpoint) == before  # or the adapter would refuse the checkpoint that it lies in
    plain = TexturePipeline.from_pretrained(checkpoint)
    fast = TexturePipeline.from_pretrained(checkpoint, fast=4)
    assert (fast.settings.num_inference_steps, fast.settings.guidance_scale) == (4, 1)
    few = {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "ddim", "size": 64}
    (with_adapter,), (without,) = (pipeline("a red dress", **few) for pipeline in (fast, plain))
    assert with_adapter.tobytes() != without.tobytes()
    # Plain diffusers reads the file as one of a LoRA's.
    tensors = StableDiffusionPipeline.lora_state_dict(folder, weight_name=LORA_FILE)[0]
    assert tensors and all(key.startswith("unet.") for key in tensors)


def test_an_adapter_of_other_weights_and_none_are_refused(checkpoint):
    with pytest.raises(UserError, match="no fast adapter; make one with"):
        load_fast(load_checkpoint(checkpoint), checkpoint, 4)
    folder = checkpoint / FAST_FOLDER
    folder.mkdir()
    (folder / "fast.json").write_text(json.dumps({"base_weights": "0" * 16, "windows": 4}))
    with pytest.raises(UserError, match="made for other weights"):
        load_fast(load_checkpoint(checkpoint), checkpoint, 4)
    (folder / "fast.json").write_text("[1]")
    with pytest.raises(UserError, match="cannot read"):
        load_fast(load_checkpoint(checkpoint), checkpoint, 4)


def test_a_checkpoint_of_text_alone_is_refused(checkpoint):
    (checkpoint / "aligner.safetensors").unlink()
    with pytest.raises(UserError, match="give one that joint"):
        fast_config(checkpoint)


def test_a_data_set_has_one_name_whether_its_ranges_are_defaults_or_read_from_a_file(checkpoint):
    """An integer default was 0 and the same read from a checkpoint's file 0.0, and all textures were painted anew."""
    cfg = load_config(checkpoint / CONFIG_FILE)
    assert json.dumps(cfg.data.render.model_dump()) == json.dumps(type(cfg)().data.render.model_dump())


def test_the_embedded_checkpoint_has_a_fast_adapter():
    fast = load_fast(load_checkpoint(EMBEDDED_CHECKPOINT), EMBEDDED_CHECKPOINT, 4)
    assert fast.cfg.inference.num_inference_steps == 4
