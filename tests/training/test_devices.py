"""A second kind of device without a card: nothing of a run or of inference may be left on the first."""

from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.diffusion import SAMPLERS
from models.pipeline import TexturePipeline
from training.loop import train

aten = torch.ops.aten
CARD = torch.device("meta")  # stands for a card: it has shapes, dtypes and a name of its own, but no numbers
CROSSES_OVER = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}


class SecondDevice(TorchDispatchMode):
    """Refuses, as CUDA does, what mixes devices, but for copies and 0-d numbers; reads 1.0, True or 0 from the card."""

    def __init__(self):
        super().__init__()
        self.calls = 0  # on the card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_card = [tensor.device == CARD for tensor in tensors]
        self.calls += any(is_on_card)
        if func == aten._local_scalar_dense.default and any(is_on_card):
            return {torch.float32: 1.0, torch.bool: True}.get(tensors[0].dtype, 0)
        if func == aten._to_copy.default and is_on_card[0] and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if func == aten.nonzero.default and is_on_card[0]:
            return torch.empty((1, tensors[0].dim()), dtype=torch.int64, device=CARD)
        if func == aten.copy_.default and tensors[0].device != CARD and tensors[1].device == CARD:
            return tensors[0].fill_(1)
        elsewhere = [tensor for tensor, is_there in zip(tensors, is_on_card) if not is_there and tensor.dim()]
        if any(is_on_card) and elsewhere and func not in CROSSES_OVER:
            sides = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
            raise RuntimeError(f"{func} mixes devices: {sides}")
        return func(*args, **kwargs)


@pytest.fixture()
def second_device(monkeypatch):
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no such device
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **kwargs: adamw(*args, **kwargs))
    with SecondDevice() as device:
        yield device


def test_what_mixes_devices_is_refused(second_device):
    on_card, here = torch.zeros(2, 2, device=CARD), torch.zeros(2, 2)
    for mix in (torch.add, torch.mm, torch.nn.functional.linear):  # the last two are nothing to the meta device
        with pytest.raises(RuntimeError, match="mixes devices"):
            mix(on_card, here)
    assert (on_card * torch.tensor(2.0)).device == CARD and on_card.to("cpu").sum() == 4


@pytest.mark.parametrize("task", ["t2uv", "i2uv", "joint"])
@pytest.mark.parametrize("cache", ["all", "none"])
def test_a_run_keeps_to_its_device(task, cache, make_config, second_device):
    cfg = make_config(
        "training.device=meta",
        f"data.cache={cache}",
        "data.validation_textures=2",
        "output.validate_every=2",
        "output.sample_every=2",
        "output.log_every=1",
        "training.ema_decay=0.9",
        "training.outside_weight=0.5",
        f"training.{task}.batch_size=2",
        f"training.{task}.max_steps=2",
    )
    assert train(cfg, task).name == "step-000002"
    assert second_device.calls > 1000


def test_inference_keeps_to_its_device(make_config, textures, request):
    pipeline = TexturePipeline.from_pretrained(train(make_config("training.joint.max_steps=1"), "joint"))
    device = request.getfixturevalue("second_device")  # from here on: a checkpoint is held against what was loaded
    for module in (*pipeline.trained.base.modules().values(), pipeline.trained.aligner):
        module.to(CARD)
    picture = Image.open(textures / "0.png").convert("RGB")
    for sampler in SAMPLERS:
        asked = dict(sampler=sampler, img_weight=0.5, guidance_scale=2, size=32, num_inference_steps=3)
        (texture,) = pipeline("a man in red", [picture], **asked)
        assert texture.size == (32, 32)
    white = Image.new("L", (64, 64), 255)
    assert len(pipeline("a man in red", init_texture=picture, mask=white, size=32)) == 1 and device.calls > 1000
