"""From conditions to finished textures; training's sample grids and infer_uv.py both come through here."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.pictures import image_from_pixels, prepare_image
from models.checkpoints import TrainedModel
from models.conditioning import (
    encode_images,
    encode_long_prompt,
    encode_prompts,
    picture_size,
    prompt_pieces,
    same_length,
)
from models.diffusion import decode_latents, sample_latents
from models.settings import GenerationSettings
from render.rasteriser import Body
from render.seams import fix_seams
from render.uv_space import fill_outside, uv_mask


def check_takes_pictures(trained: TrainedModel) -> None:
    """Raises UserError for a checkpoint of text alone."""
    if trained.aligner is None:
        raise UserError("this checkpoint was trained on text alone, it has no aligner; give --prompt, not --image")


def templated(trained: TrainedModel, prompt: str) -> str:
    return trained.cfg.model.prompt_template.format(prompt=prompt)


@torch.no_grad()
def prompt_condition(trained: TrainedModel, prompt: str) -> Tensor:
    """encoder_hidden_states (1, n * L, D) of a prompt of any length, in the checkpoint's template."""
    return encode_long_prompt(trained.base, templated(trained, prompt))


def prompt_length(trained: TrainedModel, prompt: str) -> int:
    """n * L of `prompt_condition`, without encoding it."""
    return len(prompt_pieces(trained.base, templated(trained, prompt))) * trained.base.context_tokens


@torch.no_grad()
def picture_condition(trained: TrainedModel, images: list[Image.Image]) -> Tensor:
    """encoder_hidden_states (1, L, D) of one picture of a person, or of several: the aligner reads all their tokens."""
    check_takes_pictures(trained)
    if len(images) > 1 and not getattr(trained.aligner, "reads_all_tokens", True):
        raise UserError("this aligner reads the class token of one picture alone; give one --image")
    base, image_size = trained.base, trained.cfg.model.image_size
    prepared = [prepare_image(image, picture_size(base, image.size[::-1], image_size)) for image in images]
    return trained.aligner(torch.cat([encode_images(base, pixels[None]) for pixels in prepared], dim=1))


def conditions_of(
    trained: TrainedModel, prompt: str | None, images: list[Image.Image], settings: GenerationSettings
) -> list[tuple[Tensor, float]]:
    """encoder_hidden_states (1, n * L, D) and guidance scale of a prompt, of pictures of a person, or of both.

    An img_weight of 0 or 1 leaves the prompt or the pictures alone, to the bit. Raises UserError for neither.
    """
    weight = settings.img_weight if prompt is not None and images else None
    conditions = []
    if prompt is not None and weight != 1:
        conditions.append((prompt_condition(trained, prompt), settings.text_guidance))
    if images and weight != 0:
        conditions.append((picture_condition(trained, images), settings.image_guidance))
    if not conditions:
        raise UserError("nothing to make a texture from: give a prompt, pictures or both")
    if len(conditions) == 1:  # whose own scale is 0 where only the other one's was asked for
        ((states, scale),) = conditions
        return [(states, scale or settings.guidance_scale)]
    return conditions


def joined(rows: list[list[tuple[Tensor, float]]]) -> list[tuple[Tensor, float]]:
    """The conditions of B rows, each as of `conditions_of` with the same scales, as those of one batch: (B, L, D)."""
    return [(torch.cat(same_length(*(states for states, _ in of_rows))), of_rows[0][1]) for of_rows in zip(*rows)]


def shares_of(conditions: list, settings: GenerationSettings) -> tuple[float, ...] | None:
    """Of prompt and picture in a blend, for `sample_latents`; None for one alone, and for two that pull apart."""
    if len(conditions) == 1 or settings.img_weight is None:
        return None
    return 1 - settings.img_weight, settings.img_weight


def unit_noise(trained: TrainedModel, seeds: list[int]) -> Tensor:
    """The starting latents (B, 4, R/8, R/8), one row a seed, the same whatever else is in the batch."""
    base = trained.base
    side = (trained.cfg.data.resolution or base.native_resolution) // base.vae_scale
    shape = (1, base.unet.config.in_channels, side, side)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows).to(base.device)


def generate(
    trained: TrainedModel,
    encoder_hidden_states: Tensor,
    negative_prompt: str,
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
    **options,
) -> Tensor:
    """encoder_hidden_states: (B, L, D), a seed a row → textures (B, 3, R, R) in [-1, 1]. options: of sample_latents."""
    conditions = [(encoder_hidden_states, guidance_scale)]
    return generate_guided(trained, conditions, negative_prompt, seeds, num_inference_steps, **options)


def generate_guided(
    trained: TrainedModel,
    conditions: list[tuple[Tensor, float]],
    negative_prompt: str,
    seeds: list[int],
    num_inference_steps: int,
    **options,
) -> Tensor:
    """The same from several conditions, each (B, L, D) with a guidance scale of its own."""
    base = trained.base
    given, scales = zip(*conditions)
    negative, *states = same_length(encode_prompts(base, [negative_prompt]), *given)
    negative, noise = negative.expand_as(states[0]), unit_noise(trained, seeds)
    guided = list(zip(states, scales))
    latents = sample_latents(
        base.unet, base.noise_scheduler, guided, negative, noise, num_inference_steps, seeds=seeds, **options
    )
    return decode_latents(base.vae, latents)


def finish_texture(
    pixel_values: Tensor,
    body: Body,
    size: int = 1024,
    seam_fix: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Image.Image:
    """(3, R, R) in [-1, 1] → size x size RGBA: alpha is the UV mask, colours run on past the islands' edges.

    kept: pixels (3, size, size) in [-1, 1] that are put in with a share (size, size) in [0, 1]; seams come to them.
    """
    pixels = F.interpolate(
        pixel_values[None].float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )[0].clamp(-1, 1)
    mask, pixels, held = uv_mask(body, size), pixels.cpu(), None
    if kept is not None:
        kept_pixels, held = kept
        pixels = held * kept_pixels + (1 - held) * pixels
    pixels = fill_outside(pixels, mask)
    if seam_fix:
        pixels = fill_outside(fix_seams(body, (pixels + 1) / 2, held) * 2 - 1, mask)
    return image_from_pixels(torch.cat([pixels, mask[None] * 2.0 - 1]))
