"""Frozen weights of half precision under LoRA in float32, without a card."""

import pytest
import torch
from torch.utils.data import default_collate

from training.objective import RowDraws, batch_losses
from training.run import set_up

OPTIONS = {
    "plain": (),
    "rank-stabilised": ("model.lora.use_rslora=true",),
    "dora": ("model.lora.use_dora=true",),
    "dropout": ("model.lora.dropout=0.1",),
    "text encoder": ("model.lora.text_encoder_r=4",),
    "image encoder": ("model.lora.image_encoder_r=4",),
    "checkpointing": ("model.gradient_checkpointing=true",),
}


def losses_of_a_step(run) -> list[torch.Tensor]:
    """loss/combined of each forward of a first step, each after its backward."""
    rows = range(run.schedule.batch_size)
    batch = default_collate([run.dataset[row] for row in rows])
    combined = []
    for losses in batch_losses(run, batch, RowDraws(0, 1, rows)):
        losses["loss/combined"].backward()
        combined.append(losses["loss/combined"].detach())
    return combined


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lora_trains_in_float32_on_frozen_weights_of_half_the_size(options, dtype, make_config, monkeypatch):
    whole = torch.stack(losses_of_a_step(set_up(make_config(*options, "data.cache=none"), "joint")))
    monkeypatch.setattr("training.run.frozen_dtype", lambda precision, device: dtype)  # as on CUDA
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    run = set_up(make_config(*options, "data.cache=none", f"training.mixed_precision={short}"), "joint")
    assert {parameter.dtype for parameter in run.parameters} == {torch.float32}
    trained = {id(parameter) for parameter in run.parameters}
    frozen = [weight for weight in run.base.unet.parameters() if id(weight) not in trained]
    assert {weight.dtype for weight in frozen} == {dtype}
    halved = torch.stack(losses_of_a_step(run))
    assert torch.allclose(halved, whole, rtol=0.05)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in run.parameters)
    before = [parameter.detach().clone() for parameter in run.parameters]
    run.optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, run.parameters))
