"""The autoencoder's decoder, behind the fixed encoder of latents.py: it learns what lies across blocks."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoModel
from diffusers.training_utils import EMAModel

from common.errors import UserError
from embedded.pretrain.latents import basis_of, make_autoencoder
from embedded.pretrain.scenes import load_renders, load_scenes
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.variety import varied_picture
from models.diffusion import autocast, encode_posterior

BATCH, CROP = 8, 64  # crops, and their side in pixels
VARIED = 768  # pictures of anything, as many as scenes at most
NOISE = 0.01  # deviation of what is added to the latents before SCALING_FACTOR: what a UNet makes is not exact


def detail(picture: torch.Tensor) -> float:
    """Mean absolute difference of neighbours in a uint8 picture (3, H, W)."""
    levels = picture.short()
    return float(levels.diff(dim=1).abs().float().mean() + levels.diff(dim=2).abs().float().mean())


def random_crop(pictures: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Of two places the one with more detail, at times zoomed (edges of every softness), turned, mirrored, its channels
    permuted or its contrast changed. pictures: (N, 3, H, W) uint8 → (3, CROP, CROP) in [0, 1]."""
    side = round(CROP * rng.uniform(0.6, 2)) if rng.uniform() < 0.4 else CROP
    places = []
    for _ in range(2):
        top, left = (rng.integers(0, extent - side + 1) for extent in pictures.shape[2:])
        place = pictures[rng.integers(len(pictures)), :, top : top + side, left : left + side]
        places.append(torch.from_numpy(place.copy()))
    crop = max(places, key=detail) / 255
    if side != CROP:
        crop = F.interpolate(crop[None], size=(CROP, CROP), mode="bilinear", antialias=True)[0]
    crop = crop.rot90(int(rng.integers(4)), (1, 2))
    if rng.uniform() < 0.5:
        crop = crop.flip(2)
    if rng.uniform() < 0.25:  # any palette, not the grammar's alone
        crop = crop[torch.from_numpy(rng.permutation(3))]
    dark, light = rng.uniform(0, 0.4), rng.uniform(0.6, 1)
    return dark + (light - dark) * crop if rng.uniform() < 0.4 else crop


def reconstruction_loss(decoded: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Mean absolute error, and each crop's root mean square error: PSNR is a mean over pictures too."""
    error = decoded - pixel_values
    return error.abs().mean() + (error.square().mean((1, 2, 3)) + 1e-6).sqrt().mean()


def train_autoencoder(run: Run, steps: int) -> dict:
    """Needs out/vae of stage latents; trains its decoder, from the encoder's pseudo-inverse on, and rewrites it."""
    pictures, _ = load_scenes(run)
    written = AutoModel.from_pretrained(str(run.out / "vae"), dtype=torch.float32)
    if not isinstance(written, AutoencoderDC):
        raise UserError(
            f"{run.out / 'vae'} is none of stage latents: run `python -m embedded.pretrain --stage latents`"
        )
    torch.manual_seed(1)
    vae = make_autoencoder(*basis_of(written)).to(run.device)  # the decoder of an earlier run is left behind
    varied, _ = load_renders(run.work, "varied", varied_picture, min(VARIED, len(pictures)), seed=5)
    sources = [pictures, varied]
    batch = BATCH * run.batch_scale
    ema = EMAModel(vae.decoder.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def loss_fn(step):
        rng = np.random.default_rng([3, step])
        crops = torch.stack([random_crop(sources[row % 2], rng) for row in range(batch)])
        pixel_values = crops.to(run.device) * 2 - 1
        latents, _ = encode_posterior(vae, pixel_values)
        latents = latents + NOISE * torch.randn(latents.shape, device=run.device)
        with autocast(run.device, run.precision):
            decoded = vae.decode(latents).sample
        return reconstruction_loss(decoded.float(), pixel_values)

    summary = train_stage("autoencoder", run.work, {"decoder": vae.decoder}, loss_fn, steps, lr=1.5e-3, ema=ema)
    ema.copy_to(vae.decoder.parameters())
    vae.half().save_pretrained(run.out / "vae")
    return summary
