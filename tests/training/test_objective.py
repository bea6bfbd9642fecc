"""The arithmetic of a step: what is drawn, what is minimised, and that ways of cutting it up agree."""

import pytest
import torch
from torch.utils.data import default_collate

from common.errors import UserError
from lora_utils import lora_parameters
from render.uv_space import uv_mask
from training import objective
from training.objective import RowDraws, batch_losses, validation_losses
from training.run import set_up

NO_CACHE = "data.cache=none"


def joint_run(make_config, *overrides: str, rows: int = 4):
    """A run whose LoRA is not at its start, where text and image would give the same, and a batch."""
    run = set_up(make_config(*overrides), "joint")
    with torch.no_grad():
        for parameter in lora_parameters(run.base.unet):
            parameter.normal_(std=0.1)
    return run, default_collate([run.dataset[row] for row in range(rows)])


def losses_of(run, batch, places=range(4), seed=0, step=1) -> dict[str, float]:
    """Each loss of a batch; of "loss/combined" the sum over the UNet's forwards."""
    values = {"loss/combined": 0.0}
    for losses in batch_losses(run, batch, RowDraws(seed, step, places)):
        combined = values["loss/combined"] + losses["loss/combined"].item()
        values |= {name: loss.item() for name, loss in losses.items()}
        values["loss/combined"] = combined
    return values


def gradients(run, micro_batches) -> torch.Tensor:
    """Of the mean over micro-batches, (batch, places) each."""
    for parameter in run.parameters:
        parameter.grad = None
    for batch, places in micro_batches:
        for losses in batch_losses(run, batch, RowDraws(0, 1, places)):
            (losses["loss/combined"] / len(micro_batches)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in run.parameters])


def test_step_arithmetic_is_pinned(make_config):
    """Golden losses of one batch on the untrained stand-in: a change of ranges, noise or conditions shows here."""
    run = set_up(make_config("training.joint.alpha=0.5", "training.joint.beta=2", NO_CACHE), "joint")
    losses = losses_of(run, default_collate([run.dataset[row] for row in range(4)]))
    schedule, combined = run.schedule, losses.pop("loss/combined")
    assert losses == pytest.approx(GOLDEN, abs=2e-3)
    expected = schedule.alpha * losses["loss/t2uv"] + schedule.beta * losses["loss/i2uv"]
    assert combined == pytest.approx(expected + schedule.gamma * losses["loss/align"], abs=1e-5)


GOLDEN = {"loss/t2uv": 1.1112, "loss/i2uv": 1.1437, "loss/align": 2.0113}


def test_micro_batches_add_up_to_the_large_batch(make_config):
    run, batch = joint_run(make_config)
    micro_batches = []
    for rows in (slice(0, 2), slice(2, 4)):
        half = {key: value[rows] for key, value in batch.items() if key != "prompt"}
        micro_batches.append((half, range(4)[rows]))
    of_whole, of_halves = gradients(run, [(batch, range(4))]), gradients(run, micro_batches)
    assert of_whole.abs().max() > 1e-3 and torch.allclose(of_whole, of_halves, rtol=1e-4, atol=1e-6)


def test_paired_and_alternate_have_equal_gradients(make_config):
    options = ("training.joint.both_share=0.5", "training.joint.condition_dropout=0.3", "training.min_snr_gamma=5")
    results = []
    for schedule in ("alternate", "paired"):
        run, batch = joint_run(make_config, f"training.joint.schedule={schedule}", *options)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.normal_(std=0.1)
        results.append((losses_of(run, batch), gradients(run, [(batch, range(4))])))
    (alternate, first), (paired, second) = results
    assert alternate == pytest.approx(paired, rel=1e-5)
    assert first.abs().max() > 1e-3 and torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def test_draws_depend_on_seed_step_and_place_alone():
    draws = {RowDraws(*numbers).uniform().item() for numbers in [(0, 1, [0]), (0, 2, [0]), (1, 1, [0]), (0, 1, [1])]}
    assert len(draws) == 4, "trailing zeros count"
    all_rows, third_row = RowDraws(0, 1, range(4)), RowDraws(0, 1, [2])
    for _ in range(2):
        assert torch.equal(all_rows.normal((3,))[2:3], third_row.normal((3,)))
    numbers = torch.cat([RowDraws(0, step, range(100)).integers(7) for step in range(10)])
    assert sorted(set(numbers.tolist())) == list(range(7)) and numbers.bincount().min() > 90
    noise = RowDraws(0, 1, range(64)).normal((4, 8, 8))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs(torch.corrcoef(noise.flatten(1)) - torch.eye(64)).max() < 0.35, "rows are independent"


def test_conditions_are_dropped_at_the_rate(make_config, monkeypatch):
    from training import objective

    run, batch = joint_run(make_config, "training.joint.condition_dropout=0.25")
    seen, original = [], objective.drop_conditions
    monkeypatch.setattr(
        objective, "drop_conditions", lambda a, b, dropped: seen.append(dropped) or original(a, b, dropped)
    )
    for step in range(50):
        losses_of(run, batch, step=step)
    share = torch.cat(seen).float().mean()
    assert 0.18 < share < 0.32


def test_a_share_of_rows_is_conditioned_on_both(make_config, monkeypatch):
    from training import objective

    seen, original = [], objective.denoising_errors
    monkeypatch.setattr(objective, "denoising_errors", lambda *args: seen.append(args[4].detach()) or original(*args))
    for share in (0, 0.5):
        options = ("training.joint.condition_dropout=0", "training.joint.schedule=alternate")
        run, batch = joint_run(make_config, f"training.joint.both_share={share}", *options)
        for step in range(10):
            losses_of(run, batch, step=step)
    text, picture, mixed = seen[0], seen[1], torch.cat(seen[21::2])
    assert torch.equal(seen[20], text), "the text's rows stay as they are"
    towards_picture = picture - text
    direction = towards_picture.flatten(1)
    weights = ((mixed.view(10, 4, -1) - text.flatten(1)) * direction).sum(-1) / direction.square().sum(-1)
    points = text + weights[..., None, None] * towards_picture
    assert torch.allclose(mixed.view(10, *text.shape), points, atol=1e-4), "a point between the two"
    blended = (weights < 0.999).float().mean()
    assert 0.3 < blended < 0.7 and weights.min() < 0.4


def test_texels_outside_the_islands_can_be_left_out(make_config):
    run, _ = joint_run(make_config, "training.outside_weight=0", "data.resolution=64", "training.joint.gamma=0")
    side = 64 // run.base.vae_scale
    assert run.texel_weight.shape == (side, side)
    inside = uv_mask(run.body, 64)
    assert run.texel_weight.mean().item() == pytest.approx(inside.float().mean().item(), abs=1e-6)
    outside = run.texel_weight == 0
    assert 0 < outside.sum() < outside.numel()

    class Wrong(torch.nn.Module):
        """Predicts the noise but for the texels outside, where it is far off."""

        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, noisy_latents, timesteps, states):
            return type("Output", (), {"sample": noise + 9 * outside})()

    from training.objective import denoising_errors

    latents, noise = torch.randn(2, 4, side, side), torch.randn(2, 4, side, side)
    run.base.unet, timesteps = Wrong(), torch.tensor([1, 2])
    assert denoising_errors(run, latents, noise, timesteps, torch.zeros(2, 1, 1)).abs().max() == 0
    run.texel_weight = None
    assert denoising_errors(run, latents, noise, timesteps, torch.zeros(2, 1, 1)).min() > 1


def test_leading_channels_count_for_as_much_as_all_the_others(make_config):
    run, _ = joint_run(make_config, "training.leading_channels=1", "data.resolution=64")
    side = 64 // run.base.vae_scale

    class WrongBy(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self, *errors):
            super().__init__()
            self.errors = torch.tensor(errors, dtype=torch.float32)[:, None, None]

        def forward(self, noisy_latents, timesteps, states):
            return type("Output", (), {"sample": noise + self.errors})()

    latents, noise, timesteps = torch.randn(2, 4, side, side), torch.randn(2, 4, side, side), torch.tensor([1, 2])
    for errors, loss in (((2, 0, 0, 0), 2), ((0, 1, 1, 1), 0.5), ((0, 3, 0, 0), 1.5)):
        run.base.unet = WrongBy(*errors)
        measured = objective.denoising_errors(run, latents, noise, timesteps, torch.zeros(2, 1, 1))
        assert torch.allclose(measured, torch.full((2,), float(loss)))
    with pytest.raises(UserError, match="have 4 channels in all"):
        joint_run(make_config, "training.leading_channels=4")


def test_validation_is_on_held_out_rows_with_fixed_noise(make_config):
    run = set_up(
        make_config("data.validation_textures=2", "training.joint.batch_size=1", "model.lora.dropout=0.5"), "joint"
    )
    held = {run.validation[row]["texture_id"] for row in range(len(run.validation))}
    kept = {run.dataset[row]["texture_id"] for row in range(len(run.dataset))}
    assert len(run.validation) == 2 and len(held) == 2 and not held & kept and len(run.dataset) == 6
    with torch.no_grad():
        for parameter in lora_parameters(run.base.unet):
            parameter.normal_(std=0.1)
    with run.evaluating():
        first = validation_losses(run)
        torch.manual_seed(99)
        assert first.keys() == {"val/t2uv", "val/i2uv"} and validation_losses(run) == first
    assert run.base.unet.training and validation_losses(run) != first, "dropout is on again"
    other = set_up(make_config("data.validation_textures=2", "training.seed=5"), "joint")  # batches of 4
    assert {other.validation[row]["texture_id"] for row in range(2)} == held, "whatever the seed"
    run = set_up(make_config("data.validation_textures=2", "training.joint.batch_size=1"), "joint")
    of_single_rows, of_larger_batches = (validation_losses(each)["val/t2uv"] for each in (run, other))
    assert of_single_rows == pytest.approx(of_larger_batches, rel=1e-5), "a new LoRA changes nothing"
