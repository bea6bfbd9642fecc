"""Pictures and pixels: reading files, the one conversion to [-1, 1], and preparing pictures and textures."""

import io
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError, reason

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def open_image(source: str | Path | bytes, name: str | None = None, size: int | None = None) -> Image.Image:
    """A picture from a file or from encoded bytes, turned upright, as RGB or RGBA.

    size: the side it will be shrunk to, if known: a JPEG is then decoded no larger than needed. Raises UserError,
    with `name` or the path, when it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if size:
                image.draft("RGB", (size, size))
            image = ImageOps.exif_transpose(image)
            # 16 bits: PIL would cut, not scale.
            if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
                image = image.point(lambda value: value / 257).convert("L")
            has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            return image.convert("RGBA" if has_alpha else "RGB")
    except Exception as error:  # decoders of damaged files raise anything
        raise UserError(
            f"cannot read picture {name or source}: {reason(error)}; give a PNG, JPEG or WebP file"
        ) from None


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in a folder, in the order of their names. Raises UserError when there are none."""
    pictures = sorted(path for path in Path(folder).glob("*") if is_picture(path))
    if not pictures:
        raise UserError(f"no pictures in {folder}; give a folder of PNG, JPEG or WebP files")
    return pictures


def prepare_image(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """A picture of a person, padded with black to the shape of size, a square's side or (height, width) → (3, height,
    width) in [-1, 1]."""
    height, width = (size, size) if isinstance(size, int) else size
    scale = max(image.height / height, image.width / width)
    canvas = Image.new("RGB", (max(image.width, round(width * scale)), max(image.height, round(height * scale))))
    corner = ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2)
    canvas.paste(image, corner, image if image.mode == "RGBA" else None)
    return pixels_from_image(canvas.resize((width, height), Image.Resampling.BICUBIC))


def pixels_from_image(image: Image.Image) -> Tensor:
    """RGB or RGBA picture → (3 or 4, H, W) in [-1, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, -1).permute(2, 0, 1).float() / 127.5 - 1


def image_from_pixels(pixel_values: Tensor) -> Image.Image:
    """(3 or 4, H, W) in [-1, 1] → RGB or RGBA picture."""
    data = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(data)


def encode_image(image: Image.Image, **options) -> bytes:
    """options as of PIL's save: format="PNG", or format="JPEG", quality=95."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()
