"""A body seen from all round, frame by frame, and its GIF."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from files import write_whole
from render.utils import Body, orbit_cameras, render_views


def turntable_frames(
    body: Body, texture: Tensor, frames: int = 36, height: int = 512, width: int = 384
) -> list[Tensor]:
    """texture: (3, S, S) in [0, 1], filled outside the islands → `frames` pictures (3, height, width) in [0, 1]."""
    pictures = []
    for azimuth in torch.linspace(0, 360, frames + 1)[:-1].split(4):  # four at a time bounds the memory
        cameras = orbit_cameras(
            body,
            azimuth,
            torch.full_like(azimuth, 6.0),
            torch.full_like(azimuth, 28.0),
            fill=0.94,
            aspect=width / height,
        )
        background = torch.tensor([[0.93, 0.94, 0.96]]).expand(len(azimuth), -1)
        pictures.extend(render_views(body, texture[None], cameras, height, width, background=background))
    return pictures


def save_gif(frames: list[Tensor], path: str | Path, seconds: float = 3.6) -> None:
    """Frames (3, H, W) in [0, 1] → a GIF that repeats, its colours chosen over all frames. Whole or not written."""
    pictures = [Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().cpu().numpy()) for frame in frames]
    stacked = torch.cat([frame for frame in frames[:: max(1, len(frames) // 8)]], dim=-1)
    palette = Image.fromarray((stacked.permute(1, 2, 0) * 255).round().byte().cpu().numpy()).quantize(256)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    buffer = io.BytesIO()
    duration = round(1000 * seconds / len(pictures))
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    write_whole(path, buffer.getvalue())
