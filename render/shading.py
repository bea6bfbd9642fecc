"""From what the rasteriser saw to pictures of a textured, lit body."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from render.bodies import Body, vertex_normals
from render.cameras import Cameras
from render.lights import Lights, studio_lights
from render.rasteriser import Fragments, blend_corners, rasterize, take

SAMPLES_A_SIDE = (2, 4, 6, 8, 12, 16, 24, 32)  # of a texture, in a pixel; even, so that fine checks average out
MAX_SAMPLED = 5_000_000  # samples of all textures at once


def sample_textures(textures: Tensor, uv: Tensor, texels_per_pixel: Tensor) -> Tensor:
    """Bilinear; a pixel wider than two texels takes the mean of samples a texel apart over all its width, so that none
    is skipped (wider than the last of SAMPLES_A_SIDE, over its middle).

    textures: (B, 3, S, S); uv: (K, 2); texels_per_pixel: (K,) along a side → (B, 3, K).
    """
    grid = torch.stack([uv[:, 0] * 2 - 1, 1 - uv[:, 1] * 2], dim=-1)
    out, wide = _sample_grid(textures, grid), (texels_per_pixel >= 2).nonzero()[:, 0]
    few = len(uv) // 50  # slanting pixels that are not worth a round of their own
    for samples in SAMPLES_A_SIDE:
        if len(wide) <= few:
            break
        is_wider = take(texels_per_pixel, wide) >= samples + 1  # so many texels do the samples touch
        pixels, wide = (wide[~is_wider], wide[is_wider]) if is_wider.sum() > few else (wide, wide[:0])
        steps = (torch.arange(samples, device=grid.device) - (samples - 1) / 2) * (2 / textures.shape[-1])
        offsets = torch.cartesian_prod(steps, steps)
        for pixel in pixels.split(max(1, MAX_SAMPLED // (len(offsets) * len(textures)))):
            points = (take(grid, pixel)[:, None] + offsets).flatten(0, 1)
            sampled = _sample_grid(textures, points)
            out[..., pixel] = sampled.unflatten(-1, (len(pixel), len(offsets))).mean(-1)
    return out


def _sample_grid(textures: Tensor, grid: Tensor) -> Tensor:
    """textures: (B, 3, S, S); grid: (K, 2) in [-1, 1] → (B, 3, K)."""
    # The CPU samples the rows of a batch at once: one texture's points go into as many rows as it has threads.
    rows = torch.get_num_threads() if len(textures) == 1 and grid.device.type == "cpu" else 1
    batch, count, length = max(rows, len(textures)), len(grid), -(-len(grid) // rows)
    grid = F.pad(grid, (0, 0, 0, rows * length - count)).view(rows, 1, length, 2)
    textures, grid = (each.expand(batch, -1, -1, -1) for each in (textures, grid))
    sampled = F.grid_sample(textures, grid, padding_mode="border", align_corners=False)[:, :, 0]
    return sampled if rows == 1 else sampled.transpose(0, 1).reshape(1, 3, -1)[..., :count]


@functools.lru_cache(maxsize=4)
def _uv_triangles(body: Body) -> tuple[Tensor, Tensor]:
    """Texture coordinates of each triangle's corners, (F * 3, 2), and the square root of its area there, (F,)."""
    corners = body.uvs[body.uv_faces]
    a, b, c = corners.unbind(1)
    (abx, aby), (acx, acy) = (b - a).unbind(-1), (c - a).unbind(-1)
    return corners.flatten(0, 1), ((abx * acy - acx * aby).abs() / 2).sqrt()


def shade(
    fragments: Fragments, body: Body, vertices: Tensor, textures: Tensor, lights: Lights, background: Tensor,
    supersample: int = 1,
) -> Tensor:  # fmt: skip
    """Pictures of a textured body from what `rasterize` saw.

    vertices: (V, 3) or (N, V, 3), the posed body. textures: (B, 3, S, S) in [0, 1], filled outside the UV islands so
    that none bleeds in (see `fill_outside`): one for all N views, one a view, or any number through a single view.
    background: (1 or N, 3) or (1 or N, 3, h, w). supersample: side of the block of fragments in a pixel
    → (max(B, N), 3, H / supersample, W / supersample) in [0, 1].
    """
    views, height, width = fragments.shape
    if 1 < views != len(textures) > 1:
        raise ValueError(f"{len(textures)} textures for {views} views; give one, one a view, or a single view")
    # What a triangle's corners carry, side by side: texture coordinates and light, (N, F, 3, 5). Light is smooth
    # enough to be worked out at the vertices.
    light = lights.at(vertex_normals(vertices, body.faces)).index_select(-2, body.faces.flatten())
    uvs, sides = _uv_triangles(body)
    carried = torch.cat([uvs.expand(len(light), -1, -1), light], dim=-1).view(-1, 15)
    corner = fragments.face if len(light) == 1 else fragments.view * len(body.faces) + fragments.face
    uv, light = blend_corners(fragments.barycentrics, take(carried, corner)).split([2, 3], dim=-1)
    density = take(sides, fragments.face) * fragments.area.clamp(min=1e-6).rsqrt() * textures.shape[-1]
    if views == 1 or len(textures) == 1:
        colours = sample_textures(textures, uv, density)
    else:
        edges = torch.searchsorted(fragments.view, torch.arange(views + 1, device=uv.device)).tolist()
        colours_by_view = [
            sample_textures(texture[None], uv[start:end], density[start:end])
            for texture, start, end in zip(textures, edges, edges[1:])
        ]
        colours = torch.cat(colours_by_view, dim=-1)
    colours = (colours * light.T).clamp(0, 1)  # (1 or B, 3, K)

    # Each fragment is one of supersample^2 in its pixel; what none covers shows the background. (B, 3, N, h, w)
    size = (views, height // supersample, width // supersample)
    pixels, behind = math.prod(size), _full(background, *size)
    if supersample == 1:
        canvas = behind.expand(len(colours), *behind.shape[1:]).flatten(2)
        canvas = canvas.clone(memory_format=torch.contiguous_format)
        canvas.scatter_(2, fragments.pixel.expand_as(colours), colours)
    else:
        row = torch.div(fragments.pixel, width * supersample, rounding_mode="floor")
        column = torch.div(fragments.pixel % width, supersample, rounding_mode="floor")
        pixel, share = row * size[2] + column, supersample**-2  # H divides, so that rows of two views stay apart
        taken = colours.new_full((1,), -share).expand(len(pixel))
        uncovered = colours.new_ones(pixels).index_add_(0, pixel, taken)
        canvas = (behind.flatten(2) * uncovered).expand(len(colours), -1, -1).contiguous()
        for channel, values in zip(canvas.flatten(0, 1), (colours * share).flatten(0, 1)):
            channel.index_add_(0, pixel, values)  # by rows: adding along a later axis is many times slower
    canvas = canvas.view(len(colours), 3, *size)
    return canvas[:, :, 0] if views == 1 else canvas[0].transpose(0, 1)


def _full(background: Tensor, views: int, height: int, width: int) -> Tensor:
    """(1 or N, 3) or (1 or N, 3, height, width) → (1, 3, N, height, width)."""
    background = background[:, :, None, None] if background.dim() == 2 else background
    return background.expand(views, 3, height, width).transpose(0, 1)[None]


def render_views(
    body: Body, textures: Tensor, cameras: Cameras, height: int, width: int,
    lights: Lights | None = None, background: Tensor | None = None, supersample: int = 2,
    vertices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Anti-aliased pictures: drawn `supersample` times larger and averaged down → (N, 3, height, width) in [0, 1].

    textures: (1 or N, 3, S, S) in [0, 1], or any number for one camera. vertices: the posed body, (V, 3) or (N, V, 3);
    None: as it rests. Without lights or background: studio light on white.
    """
    lights = lights or studio_lights(cameras)
    vertices = body.vertices if vertices is None else vertices
    background = textures.new_ones(1, 3) if background is None else background
    height, width = height * supersample, width * supersample
    fragments = rasterize(vertices, body.faces, cameras, height, width, back_faces=not body.is_closed)
    return shade(fragments, body, vertices, textures, lights, background, supersample)
