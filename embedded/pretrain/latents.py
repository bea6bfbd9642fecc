"""The latents, a fixed linear basis, and the autoencoder that holds it: exact both ways, with nothing trained yet.

Every 8x8 block of pixels becomes 24 numbers: its mean red, green and blue, then 21 principal components of what the
means leave. The encoder stays so. The decoder starts as the pseudo-inverse, so that training (autoencoder.py) has to
learn only what linear algebra cannot tell: what lies across blocks. The UNet needs no more than the encoder.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from diffusers import AutoencoderDC

from embedded.painter import generic_picture
from embedded.pretrain.scenes import RESOLUTION, load_scenes
from embedded.pretrain.stage import Run

PATCH = 8  # side in pixels of the block that one latent stands for
TEXELS = PATCH * PATCH
CHANNELS = 24
SPREAD = 0.5, 0.3  # deviation of colour and of the first component, before SCALING_FACTOR: see `fit_basis`
SCALING_FACTOR = 2.0
PICTURES, PATCHWORKS = 300, 100  # that the basis is fitted to
WIDTHS, LAYERS = (32, 64, 128), (1, 4, 3)  # the decoder's channels and residual blocks at 1/2, 1/4 and 1/8 of the size
ANCHOR = 256.0  # a constant channel, so large that the last RMSNorm divides every pixel by nearly the same number
OFFSET = 2.0  # added before the last ReLU and taken off after it, for pixels are in [-1, 1]


def fit_basis(pictures: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """latents = weight @ block + bias for blocks of pictures in [-1, 1]: weight (24, 192), bias (24,), float32.

    pictures: (3, H, W) in [-1, 1]. A block is ordered channel, row, column. Over all blocks of pictures every latent
    has mean 0; colour has deviation SPREAD[0], the first component SPREAD[1] and the others less by the square root of
    what they have less in pixels: as small as in pixels, noise would drown them, and as large as the first one, a UNet
    would spend itself on what hardly shows.
    """
    total, squares, count = torch.zeros(3 * TEXELS).double(), torch.zeros(3 * TEXELS, 3 * TEXELS).double(), 0
    for picture in pictures:
        blocks = torch.nn.functional.unfold(picture[None].double(), PATCH, stride=PATCH)[0].T
        total, squares, count = total + blocks.sum(0), squares + blocks.T @ blocks, count + len(blocks)
    mean = total / count
    covariance = squares / count - mean.outer(mean)
    channel_means = torch.eye(3).double().repeat_interleave(TEXELS, 1) / TEXELS
    without_means = torch.eye(3 * TEXELS).double() - TEXELS * channel_means.T @ channel_means
    eigenvectors = torch.linalg.eigh(without_means @ covariance @ without_means)[1]
    components = eigenvectors[:, -(CHANNELS - 3) :].flip(1).T  # the largest first
    basis = torch.cat([channel_means, components])
    deviation = (basis @ covariance @ basis.T).diagonal().sqrt()
    spread = torch.cat([torch.full((3,), SPREAD[0]).double(), SPREAD[1] * (deviation[3:] / deviation[3]).sqrt()])
    gain = spread / deviation
    weight = basis * gain[:, None]
    return weight.float(), (-weight @ mean).float()


def shuffled_place(row: int, column: int) -> int:
    """The place of a texel of an 8x8 block among the 64 channels that three pixel unshuffles make of it."""
    place = 0
    for bit in (1, 2, 4):
        place = place * 4 + 2 * (row // bit % 2) + column // bit % 2
    return place


# How pixel unshuffles order the texels of a block: row by row in a block → in their channels.
UNSHUFFLED = torch.tensor(
    [c * TEXELS + shuffled_place(row, column) for c in range(3) for row in range(PATCH) for column in range(PATCH)]
)


@torch.no_grad()
def make_autoencoder(weight: torch.Tensor, bias: torch.Tensor) -> AutoencoderDC:
    """An autoencoder that encodes with fit_basis' weight and bias, and decodes with their pseudo-inverse."""
    vae = AutoencoderDC(
        latent_channels=CHANNELS,
        scaling_factor=SCALING_FACTOR,
        encoder_block_out_channels=(3, 12, 48, 192),
        encoder_layers_per_block=(0, 1, 1, 0),
        encoder_qkv_multiscales=((),) * 4,
        encoder_out_shortcut=False,
        decoder_block_out_channels=(3, *WIDTHS),
        decoder_layers_per_block=(0, *LAYERS),
        decoder_qkv_multiscales=((),) * 4,
        decoder_in_shortcut=False,
        decoder_norm_types="batch_norm",  # in eval mode: a scale and a shift
        decoder_act_fns="silu",
    )
    vae.register_to_config(block_out_channels=(3, *WIDTHS))  # from which StableDiffusionPipeline counts halvings
    # The shortcuts unshuffle pixels; convolutions and residual blocks add nothing to them.
    for parameter in vae.encoder.parameters():
        parameter.zero_()
    for c in range(3):  # this convolution runs before its own unshuffle, so it only copies
        vae.encoder.conv_in.conv.weight[c, c, 1, 1] = 1
    vae.encoder.conv_out.weight[:, UNSHUFFLED, 1, 1] = weight
    vae.encoder.conv_out.bias.copy_(bias)
    inverse = torch.linalg.pinv(weight.double())  # (192, 24)
    set_linear_decoder(vae.decoder, inverse.float(), (-inverse @ bias.double()).float())
    return vae.eval()


def basis_of(vae: AutoencoderDC) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias that `make_autoencoder` gave it."""
    return vae.encoder.conv_out.weight.detach()[:, UNSHUFFLED, 1, 1], vae.encoder.conv_out.bias.detach()


@torch.no_grad()
def set_linear_decoder(decoder: torch.nn.Module, inverse: torch.Tensor, shift: torch.Tensor) -> None:
    """Makes a new decoder block = inverse @ latents + shift, its residual blocks adding nothing. inverse: (192, 24)."""
    quarter, half = 3 * 16, 3 * 4  # channels that hold pixels at 1/4 and at 1/2 of the size
    for block in decoder.up_blocks.modules():
        if hasattr(block, "conv2"):  # a residual block's last convolution
            block.conv2.weight.zero_()
    # 1/8: the first channels are the latents themselves.
    decoder.conv_in.weight[:CHANNELS] = 0
    decoder.conv_in.bias[:CHANNELS] = 0
    for channel in range(CHANNELS):
        decoder.conv_in.weight[channel, channel, 1, 1] = 1
    # To 1/4: the pixels of a 4x4 quarter of the block. What the shortcut repeats into them is taken off.
    up = decoder.up_blocks[2][0]
    take_off_shortcut(up, range(4 * quarter))
    up.conv.weight[UNSHUFFLED, :CHANNELS, 1, 1] += inverse
    up.conv.bias[UNSHUFFLED] = shift
    # To 1/2: the pixels of a 2x2. The last channel is the anchor, by which the norm divides and its weight multiplies.
    up, anchor = decoder.up_blocks[1][0], WIDTHS[0] - 1
    take_off_shortcut(up, [*range(4 * half), *range(4 * anchor, 4 * WIDTHS[0])])
    for channel in range(4 * half):
        up.conv.weight[channel, channel, 1, 1] += 1
    decoder.up_blocks[1][-1].norm.bias[anchor] = ANCHOR
    decoder.norm_out.weight.fill_(ANCHOR / math.sqrt(WIDTHS[0]))
    decoder.norm_out.weight[anchor] = 0
    decoder.norm_out.bias.zero_()
    decoder.norm_out.bias[:half] = OFFSET
    decoder.conv_out.conv.weight.zero_()
    decoder.conv_out.conv.bias.fill_(-OFFSET)
    for channel in range(half):
        decoder.conv_out.conv.weight[channel, channel, 1, 1] = 1


def take_off_shortcut(up, channels: Iterable[int]) -> None:
    """Makes those channels of an upsampling block, counted before its pixel shuffle, zero with its shortcut."""
    for channel in channels:
        up.conv.weight[channel] = 0
        up.conv.weight[channel, channel // up.repeats, 1, 1] = -1
        up.conv.bias[channel] = 0


def patchwork(index: int) -> torch.Tensor:
    """Picture `index` of fabrics, no body in it → (3, RESOLUTION, RESOLUTION) in [0, 1]."""
    return generic_picture(np.random.default_rng([2, index]), RESOLUTION)


def build_latents(run: Run, steps: int) -> dict:
    """Needs no other stage and takes no steps; writes out/vae."""
    pictures, _ = load_scenes(run)
    scenes = (torch.from_numpy(picture.copy()) / 127.5 - 1 for picture in pictures[:PICTURES])
    patchworks = (patchwork(index) * 2 - 1 for index in range(PATCHWORKS))
    weight, bias = fit_basis(picture for group in (scenes, patchworks) for picture in group)
    # The decoder inverts what half precision keeps of the basis.
    make_autoencoder(weight.half().float(), bias.half().float()).half().save_pretrained(run.out / "vae")
    return {}
