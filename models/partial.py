"""Further input channels of a UNet, for what pictures show of a texture: its latents there, and how much of each is
seen.

As the inpainting UNets of Stable Diffusion have them, but beside conv_in and not in it, zero to begin with and in a
file of their own (PARTIAL_FILE): the LoRA loads anywhere without them, and a UNet that is given the usual channels
alone runs as if it had no others.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from common.errors import UserError
from lora_utils import read_tensors

PARTIAL_FILE = "partial_input.safetensors"


class PartialInput(nn.Module):
    """partial: (B, latent_channels + 1, h, w) of `partial_channels` → features (B, width, h, w), 0 for one of 0."""

    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(latent_channels + 1, width, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, partial: Tensor) -> Tensor:
        return self.conv(partial)

    @classmethod
    def of(cls, unet) -> "PartialInput":
        """A new one for that UNet, on its device, float32."""
        return cls(unet.config.out_channels, unet.config.block_out_channels[0]).to(unet.device)


def partial_channels(latents: Tensor, held: Tensor) -> Tensor:
    """latents: (B, C, h, w); held: (B, 1, h, w) in [0, 1], how much of each place is seen → (B, C + 1, h, w)."""
    return torch.cat([latents * held, held], dim=1)


def attach(unet, partial_input: PartialInput) -> None:
    """From now on the UNet takes (B, C, h, w), or (B, 2 C + 1, h, w): noisy_latents, then `partial_channels`.

    To be called once conv_in is what it stays: merging or adding a LoRA afterwards puts another module in its place.
    """
    latent_channels = unet.config.out_channels
    given: list[Tensor] = []

    def split(_, inputs: tuple[Tensor]) -> Tensor:
        given[:] = [inputs[0][:, latent_channels:]]
        return inputs[0][:, :latent_channels]

    def add(_, inputs: tuple[Tensor], features: Tensor) -> Tensor:
        partial = given.pop()
        return features + partial_input(partial) if partial.shape[1] else features

    unet.conv_in.register_forward_pre_hook(split)
    unet.conv_in.register_forward_hook(add)


def save_partial_input(folder: Path, partial_input: PartialInput, dtype: torch.dtype) -> None:
    weights = {key: value.detach().cpu().to(dtype).contiguous() for key, value in partial_input.state_dict().items()}
    safetensors.torch.save_file(weights, folder / PARTIAL_FILE)


def load_partial_input(file: Path, unet) -> PartialInput:
    """Frozen, in eval mode. Raises UserError for a file that cannot be read, and for one of another UNet."""
    partial_input = PartialInput.of(unet)
    tensors, _ = read_tensors(file)
    needed = {key: list(value.shape) for key, value in partial_input.state_dict().items()}
    shapes = {key: list(value.shape) for key, value in tensors.items()}
    if shapes != needed:
        raise UserError(f"{file} does not fit this base: it holds {shapes}, and its UNet takes {needed}")
    partial_input.load_state_dict({key: value.float() for key, value in tensors.items()})
    return partial_input.eval().requires_grad_(False)
