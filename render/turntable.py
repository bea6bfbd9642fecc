"""A body seen from all round: frames, contact sheets, and the files they are written to."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError, reason
from common.files import check_writable, write_whole
from common.pictures import encode_image
from render.bodies import Body
from render.cameras import orbit_cameras
from render.shading import render_views

BACKGROUND = (0.93, 0.94, 0.96)
ELEVATION, FOV = 6.0, 28.0  # degrees
SHEET_VIEWS = {"front": 0.0, "left": 90.0, "back": 180.0, "right": 270.0}
SUFFIXES = (".gif", ".webp", ".mp4", ".png", "")


def orbit_frames(
    body: Body,
    texture: Tensor,
    azimuth: Tensor,
    height: int = 512,
    width: int = 384,
    background: tuple[float, float, float] = BACKGROUND,
) -> list[Tensor]:
    """texture: (3, S, S) in [0, 1], filled outside the islands; azimuth: (N,) degrees → N pictures (3, height, width)
    in [0, 1]. body: as it is posed."""
    pictures = []
    for azimuths in azimuth.split(4):  # four at a time bounds the memory
        elevation, fov = torch.full_like(azimuths, ELEVATION), torch.full_like(azimuths, FOV)
        cameras = orbit_cameras(body, azimuths, elevation, fov, fill=0.94, aspect=width / height)
        behind = torch.tensor([background])
        pictures.extend(render_views(body, texture[None], cameras, height, width, background=behind))
    return pictures


def turntable_frames(body: Body, texture: Tensor, frames: int = 36, **options) -> list[Tensor]:
    """One turn in `frames` pictures; options as of `orbit_frames`."""
    return orbit_frames(body, texture, torch.linspace(0, 360, frames + 1)[:-1], **options)


def contact_sheet(body: Body, texture: Tensor, **options) -> Image.Image:
    """Front, left, back and right side by side; options as of `orbit_frames`."""
    azimuth = torch.tensor([*SHEET_VIEWS.values()])
    return _image(torch.cat(orbit_frames(body, texture, azimuth, **options), dim=-1))


def save_turntable(frames: list[Tensor], path: str | Path, seconds: float = 3.6) -> None:
    """Frames (3, H, W) in [0, 1] → an animation that repeats, by the path's suffix: .gif, .webp, .mp4, or a folder of
    PNG files where there is none. Whole or not written; raises UserError for another suffix."""
    path = Path(path)
    suffix, pictures = path.suffix.lower(), [_image(frame) for frame in frames]
    animation = dict(save_all=True, duration=round(1000 * seconds / len(frames)), loop=0)
    if suffix == ".gif":
        first, *others = _with_one_palette(pictures)
        write_whole(path, encode_image(first, format="GIF", append_images=others, **animation))
    elif suffix == ".webp":
        first, *others = pictures
        animation |= dict(append_images=others, quality=85, method=4)
        write_whole(path, encode_image(first, format="WEBP", **animation))
    elif suffix == ".mp4":
        _save_mp4(frames, path, seconds)
    elif not suffix:
        check_writable(path)
        for index, picture in enumerate(pictures):
            write_whole(path / f"{index:04d}.png", encode_image(picture, format="PNG"))
    else:
        raise UserError(f"{path}: a turntable is a .gif, .webp or .mp4 file, or a folder of frames")


def _with_one_palette(pictures: list[Image.Image]) -> list[Image.Image]:
    """256 colours chosen over all frames, so that none flickers."""
    sample = pictures[:: max(1, len(pictures) // 8)]
    strip = Image.new("RGB", (sample[0].width * len(sample), sample[0].height))
    for index, picture in enumerate(sample):
        strip.paste(picture, (index * picture.width, 0))
    palette = strip.quantize(256)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def _save_mp4(frames: list[Tensor], path: Path, seconds: float) -> None:
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401  its absence shows only when writing
    except ImportError:
        raise UserError(
            "MP4 needs imageio-ffmpeg: pip install imageio imageio-ffmpeg; or write a .gif or .webp"
        ) from None
    check_writable(path.parent)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    try:
        with imageio.get_writer(partial, fps=len(frames) / seconds, quality=8, macro_block_size=2) as writer:
            for frame in frames:
                writer.append_data(_bytes(frame))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {reason(error)}") from None


def _bytes(frame: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] → (H, W, 3) uint8."""
    return (frame.permute(1, 2, 0) * 255).round().byte().cpu().numpy()


def _image(frame: Tensor) -> Image.Image:
    return Image.fromarray(_bytes(frame))
