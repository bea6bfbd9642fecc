"""Textures in UV space: which texels are on the body, what lies beyond, and pictures as textures.

UV coordinates are in [0, 1] with v up: texel row 0 of a texture is v = 1.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor

from common.pictures import pixels_from_image
from render.bodies import Body
from render.rasteriser import interpolate, rasterize_uv

MIRROR_TOLERANCE = 0.01  # of the body's height, between a texel and its mirror image


def uv_mask(body: Body, size: int) -> Tensor:
    """Texels whose centre lies on a UV island → (size, size) bool."""
    return rasterize_uv(body, size).mask[0]


@functools.lru_cache(maxsize=2)
def mirrored_texels(body: Body, size: int) -> tuple[Tensor, Tensor]:
    """Texels and those that lie at the mirrored places of the body: flat indices (K,) each."""
    fragments = rasterize_uv(body, size)
    positions = interpolate(fragments, body.faces, body.vertices).double().numpy()
    low, high = body.vertices.amin(0), body.vertices.amax(0)
    middle = (low + high)[0].item() / 2
    mirrored = np.column_stack([2 * middle - positions[:, 0], positions[:, 1:]])
    distance, nearest = cKDTree(positions).query(mirrored)
    close = distance <= MIRROR_TOLERANCE * (high - low)[1].item()
    return fragments.pixel[torch.from_numpy(close)], fragments.pixel[torch.from_numpy(nearest[close])]


def fill_outside(texture: Tensor, mask: Tensor) -> Tensor:
    """Colours the texels outside `mask` from the nearest islands, by the pull-push pyramid (Gortler et al. 1996).

    texture: (C, S, S); mask: (S, S) bool → (C, S, S), unchanged inside the mask. An empty mask changes nothing.
    """
    if not mask.any():
        return texture
    weight = mask.to(texture)[None, None]
    levels = [(texture[None] * weight, weight)]
    halve = functools.partial(F.avg_pool2d, kernel_size=2, ceil_mode=True, count_include_pad=False)
    while min(levels[-1][1].shape[-2:]) > 1:
        colour, weight = levels[-1]
        levels.append((halve(colour), halve(weight)))
    filled = levels[-1][0] / levels[-1][1]
    for colour, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, size=colour.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, colour / weight.clamp(min=1e-8), coarse)
    return torch.where(mask, texture, filled[0])


def texture_pixels(image: Image.Image, size: int) -> Tensor:
    """A texture → (3, size, size) in [-1, 1]; texels that its alpha leaves out take the nearest island's colour."""
    if image.mode != "RGBA":
        return pixels_from_image(image.resize((size, size), Image.Resampling.LANCZOS))
    # Resized with alpha premultiplied, so that what lies under transparent texels bleeds into none.
    resized = image.convert("RGBa").resize((size, size), Image.Resampling.BOX)
    pixels = pixels_from_image(resized.convert("RGBA"))
    return fill_outside(pixels[:3], pixels[3] > 0)


def body_pixels(image: Image.Image, body: Body, size: int) -> Tensor:
    """A texture to be rendered on a body → (3, size, size) in [-1, 1], filled outside the body's UV islands, also
    where the picture has no alpha to say so."""
    pixels = texture_pixels(image, size)
    return pixels if image.mode == "RGBA" else fill_outside(pixels, uv_mask(body, size))
