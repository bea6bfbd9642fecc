"""Pictures and pixels: reading files, the one conversion to [-1, 1], and preparing pictures and textures."""

import io
import mimetypes
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError, reason
from common.files import is_hidden, natural_order

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tga", ".tif", ".tiff", ".avif", ".gif")
# Pictures that are not read, of cameras and of editors; `mimetypes` knows more.
CAMERA_SUFFIXES = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")
EDITOR_SUFFIXES = (".psd", ".psb", ".xcf", ".kra", ".exr", ".hdr", ".dds", ".ktx", ".ktx2", ".jp2", ".qoi")


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
    """Whether a file's name says that it is a picture of a kind that is read; hidden files are none."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not is_hidden(Path(path.name)) and path.is_file()


def _is_other_picture(path: Path) -> bool:
    """Whether a file's name says that it is a picture, but of a kind that is not read."""
    kind, suffix = mimetypes.guess_type(path.name)[0] or "", path.suffix.lower()
    looks_like_one = suffix in CAMERA_SUFFIXES + EDITOR_SUFFIXES or kind.startswith("image/")
    return looks_like_one and suffix not in PICTURE_SUFFIXES and not is_hidden(Path(path.name))


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in a folder in the natural order of their names: 2.png before 10.png.

    Names on stderr what is a picture of a kind that is not read. Raises UserError when there is none that is.
    """
    files = sorted(Path(folder).glob("*"), key=lambda path: natural_order(Path(path.name)))
    pictures = [path for path in files if is_picture(path)]
    others = [path.name for path in files if _is_other_picture(path)]
    if others:
        names = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        print(f"{folder}: left out, of a kind that cannot be read: {names}; save them as PNG", file=sys.stderr)
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
