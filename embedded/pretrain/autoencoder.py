"""The autoencoder, on crops of the pictures and of patchworks of fabric."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from embedded.painter import generic_picture
from embedded.pretrain.scenes import RESOLUTION, load_scenes
from embedded.pretrain.stage import Run, train_stage
from models.diffusion import autocast

BATCH, CROP = 24, 64  # crops, and their side in pixels
PATCH = 8  # side in pixels of what one latent stands for
PATCHWORKS = 192
BLOCKS = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1)
# One group a normalisation: groups of two channels would lose the colour of flat areas.
CHANNELS = dict(latent_channels=8, block_out_channels=(16, 32, 64, 96), norm_num_groups=1)


def random_crop(pictures: np.ndarray, patchworks: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Of one of pictures (N, 3, 256, 256) uint8 or of patchworks (M, 3, 256, 256) in [0, 1], turned and with its
    colours changed at times → (3, CROP, CROP) in [0, 1]."""
    if rng.uniform() < 0.5:
        picture = torch.from_numpy(pictures[rng.integers(len(pictures))].copy()) / 255
    else:
        picture = patchworks[rng.integers(len(patchworks))]
    top, left = rng.integers(0, RESOLUTION - CROP + 1, 2)
    crop = picture[:, top : top + CROP, left : left + CROP].rot90(int(rng.integers(4)), (1, 2))
    if rng.uniform() < 0.25:  # any palette, not the grammar's alone
        crop = crop[torch.from_numpy(rng.permutation(3))]
    dark, light = rng.uniform(0, 0.4), rng.uniform(0.6, 1)
    return crop if rng.uniform() < 0.5 else dark + (light - dark) * crop


def train_autoencoder(run: Run, steps: int) -> dict:
    """Needs no other stage; writes out/vae."""
    pictures, _ = load_scenes(run)
    torch.manual_seed(1)
    vae = AutoencoderKL(**CHANNELS, **BLOCKS, sample_size=RESOLUTION).to(run.device)
    generators = [np.random.default_rng([2, index]) for index in range(PATCHWORKS)]
    patchworks = torch.stack([generic_picture(rng, RESOLUTION) for rng in generators])

    def loss_fn(step):
        rng = np.random.default_rng([3, step])
        crops = torch.stack([random_crop(pictures, patchworks, rng) for _ in range(BATCH)])
        pixel_values = crops.float().to(run.device) * 2 - 1
        with autocast(run.device, run.precision):
            posterior = vae.encode(pixel_values).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixel_values
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        coarse = F.avg_pool2d(error, 8).abs().mean()
        # The first three channels hold each patch's mean colour: learned at once, and smooth to diffuse in.
        anchor = F.mse_loss(posterior.mean[:, :3].float(), 2 * F.avg_pool2d(pixel_values, PATCH))
        return error.abs().mean() + 0.3 * edges + coarse + 0.5 * anchor + 1e-5 * posterior.kl().mean() / 64

    summary = train_stage("autoencoder", run.work, {"vae": vae}, loss_fn, steps, lr=2e-3)
    equalise(vae, torch.from_numpy(pictures[:256].copy()).to(run.device) / 127.5 - 1)
    vae.half().save_pretrained(run.out / "vae")
    return summary


@torch.no_grad()
def equalise(vae: AutoencoderKL, pixel_values: torch.Tensor) -> None:
    """Gives each latent channel mean 0, and deviation 1 where it holds colour and 0.5 where it holds detail, by the 1x1
    convolutions before and after the latents: what the autoencoder does stays the same, and colour counts for as much
    as all detail in the UNet's loss. pixel_values: (N, 3, H, W) in [-1, 1]."""
    mean = torch.cat([vae.encode(batch).latent_dist.mean for batch in pixel_values.split(32)])
    centre, factor = mean.mean((0, 2, 3)), 0.5 / mean.std((0, 2, 3))
    factor[:3] *= 2
    channels, before, after = len(centre), vae.quant_conv, vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] * centre).sum(1)
    after.weight /= factor[:, None, None]
    before.bias[:channels] = (before.bias[:channels] - centre) * factor
    before.weight[:channels] *= factor[:, None, None, None]
    before.bias[channels:] += 2 * factor.log()  # of the variance
    vae.register_to_config(scaling_factor=1.0)
