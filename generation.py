"""From conditions to finished textures; training's sample grids and infer_uv.py both come through here."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from checkpoints import TrainedModel
from conditioning import blend, encode_images, encode_prompts
from diffusion import decode_latents, sample_latents
from errors import UserError
from images import image_from_pixels, prepare_image
from render.utils import Body, fill_outside, uv_mask

ROWS_AT_ONCE = 8  # bounds the memory of a large --num


@torch.no_grad()
def condition(trained: TrainedModel, prompt: str | None, image: Image.Image | None, img_weight: float) -> Tensor:
    """encoder_hidden_states (1, L, D) from a prompt, a picture, or both blended by img_weight in [0, 1]."""
    text_states = image_states = None
    if prompt is not None:
        text_states = encode_prompts(trained.base, [trained.cfg.model.prompt_template.format(prompt=prompt)])
    if image is not None:
        if trained.aligner is None:
            raise UserError("this checkpoint was trained on text alone, it has no aligner; give --prompt, not --image")
        size = trained.base.image_encoder.config.image_size
        image_states = trained.aligner(encode_images(trained.base, prepare_image(image, size)[None]))
    if text_states is None or image_states is None:
        return image_states if text_states is None else text_states
    return blend(text_states, image_states, img_weight)


def unit_noise(trained: TrainedModel, seeds: list[int]) -> Tensor:
    """The starting latents (B, 4, R/8, R/8), one row a seed, the same whatever else is in the batch."""
    base = trained.base
    side = (trained.cfg.data.resolution or base.native_resolution) // base.vae_scale
    shape = (1, base.unet.config.in_channels, side, side)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows).to(base.device)


def generate(
    trained: TrainedModel, encoder_hidden_states: Tensor, negative_prompt: str, seeds: list[int],
    num_inference_steps: int, guidance_scale: float, **options,
) -> Tensor:  # fmt: skip
    """encoder_hidden_states: (B, L, D), a seed a row → textures (B, 3, R, R) in [-1, 1]."""
    base = trained.base
    negative = encode_prompts(base, [negative_prompt])
    pictures = []
    for start in range(0, len(seeds), ROWS_AT_ONCE):
        context, noise = encoder_hidden_states[start : start + ROWS_AT_ONCE], seeds[start : start + ROWS_AT_ONCE]
        latents = sample_latents(
            base.unet, base.noise_scheduler, context, negative.expand_as(context), unit_noise(trained, noise),
            num_inference_steps, guidance_scale, **options,
        )  # fmt: skip
        pictures.append(decode_latents(base.vae, latents))
    return torch.cat(pictures)


def finish_texture(pixel_values: Tensor, body: Body, size: int = 1024) -> Image.Image:
    """(3, R, R) in [-1, 1] → size x size RGBA: alpha is the UV mask, colours run on past the islands' edges."""
    pixels = F.interpolate(
        pixel_values[None].float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )[0].clamp(-1, 1)
    mask = uv_mask(body, size)
    pixels = fill_outside(pixels.cpu(), mask)
    return image_from_pixels(torch.cat([pixels, mask[None] * 2.0 - 1]))
