"""Counts the arithmetic and the memory of a training step of Stable Diffusion, without weights and without a GPU.

    python benchmarks/count_scaling.py        # prints the tables of docs/scaling.md

Runs the architectures on the meta device, where tensors have shapes and no numbers: each matrix product is counted
(2 FLOP a multiply-add), and each tensor that the backward keeps, in bf16 and with fused attention.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
UNETS = {
    "SD 1.5": dict(cross_attention_dim=768, attention_head_dim=8),
    "SD 2.1": dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
}
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
TEXT = {
    "SD 1.5": CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "SD 2.1": CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16),
}
PATCHES = dict(image_size=224, patch_size=14, num_attention_heads=16)
VISION = {
    "SD 1.5": CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, **PATCHES),
    "SD 2.1": CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, **PATCHES),
}
PEAK, REACHED = 989, 0.4  # TFLOP a second of an H100 in bf16, and the share of it that is assumed

ARITHMETIC_HEADER = """\
| base, pixels | UNet forward | LoRA step | with checkpointing | VAE encoder | CLIP vision | text encoder |
| --- | --- | --- | --- | --- | --- | --- |"""
MEMORY_HEADER = """
| base, pixels | weights GB | kept a row GB | with checkpointing GB | the seed's TFLOP a row | ours | \
rows a second on one H100 at 40 % |
| --- | --- | --- | --- | --- | --- | --- |"""


def tflop(action) -> float:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e12


class FusedAttention(torch.autograd.Function):
    """What fused attention keeps: queries, keys, values and the result, no matrix of weights."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def kept_bytes(action, module: torch.nn.Module) -> int:
    """Bytes of the tensors that the backward of action() keeps, but for the module's weights."""
    kept, original = {}, F.scaled_dot_product_attention
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    F.scaled_dot_product_attention = lambda query, key, value, **options: FusedAttention.apply(query, key, value)
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            action()
    finally:
        F.scaled_dot_product_attention = original
    return sum(size for _, size in kept.values())


def meta(make):
    with torch.device("meta"):
        return make().to(torch.bfloat16).requires_grad_(False)


def count(name: str, resolution: int) -> dict[str, float]:
    """TFLOP of each module for one picture or prompt, GB that a row's backward keeps, parameters."""
    unet = meta(lambda: UNet2DConditionModel(sample_size=resolution // 8, **UNETS[name]))
    vae = meta(lambda: AutoencoderKL(**VAE))
    text, vision = meta(lambda: CLIPTextModel(TEXT[name])), meta(lambda: CLIPVisionModel(VISION[name]))
    unet.add_adapter(LoraConfig(r=16, target_modules=TARGETS))

    def tensor(*shape):
        return torch.zeros(shape, device="meta", dtype=torch.bfloat16)

    side = resolution // 8
    latents, states = tensor(1, 4, side, side), tensor(1, 77, UNETS[name]["cross_attention_dim"])

    def forward():
        return unet(latents, torch.zeros(1, device="meta"), states).sample

    def step():
        forward().sum().backward()

    counts = {"forward": tflop(forward), "step": tflop(step), "kept": kept_bytes(step, unet) / 1e9}
    unet.enable_gradient_checkpointing()
    unet.train()
    counts |= {"checkpointed": tflop(step), "kept_checkpointed": kept_bytes(step, unet) / 1e9}
    with torch.no_grad():
        counts["vae"] = tflop(lambda: vae.encode(tensor(1, 3, resolution, resolution)))
        counts["clip"] = tflop(lambda: vision(tensor(1, 3, 224, 224)))
        counts["text"] = tflop(lambda: text(torch.zeros(1, 77, dtype=torch.long, device="meta")))
    counts["lora"] = sum(p.numel() for name, p in unet.named_parameters() if "lora_" in name) / 1e6
    modules = (unet, vae, text, vision)
    counts["frozen"] = sum(p.numel() for module in modules for p in module.parameters()) * 2 / 1e9
    return counts


def main():
    rows = {(name, resolution): count(name, resolution) for name in UNETS for resolution in (512, 1024)}
    print(ARITHMETIC_HEADER)
    for (name, resolution), row in rows.items():
        counts = [row[key] for key in ("forward", "step", "checkpointed", "vae", "clip", "text")]
        print(f"| {name}, {resolution} | " + " | ".join(f"{tflops:.3g}" for tflops in counts) + " |")
    print(MEMORY_HEADER)
    for (name, resolution), row in rows.items():
        seed = 2 * row["checkpointed"] + row["vae"] + row["clip"] + row["text"]
        ours = 2 * row["step"]
        counts = [row["frozen"], row["kept"], row["kept_checkpointed"], seed, ours]
        cells = " | ".join(f"{value:.2f}" for value in counts)
        print(f"| {name}, {resolution} | {cells} | {REACHED * PEAK / ours:.0f} |")


if __name__ == "__main__":
    main()
