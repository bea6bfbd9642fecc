"""Pictures and pixels: reading files, the one conversion to [-1, 1], and preparing pictures and textures."""

import functools
import io
import itertools
import mimetypes
import sys
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, PngImagePlugin
from torch import Tensor

from common.errors import UserError, reason
from common.files import is_hidden, natural_order

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tga", ".tif", ".tiff", ".avif", ".gif")
# Pictures that are not read, of cameras and of editors; `mimetypes` knows more.
CAMERA_SUFFIXES = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")
EDITOR_SUFFIXES = (".psd", ".psb", ".xcf", ".kra", ".exr", ".hdr", ".dds", ".ktx", ".ktx2", ".jp2", ".qoi")
# Pillow refuses a PNG with a text or a profile of more than 1 MB, which editors write. Its limit for all
# texts of a picture stands, 64 MB: less than the pixels of a picture that it opens may take.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the value of EXIF's Orientation
PROFILE_SPACES = {"RGB": "RGB ", "RGBA": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # of ICC, by Pillow's mode
SAME_COLOUR = 2  # of 255: a profile that changes no colour by more is sRGB, whatever it calls itself
COLOURS = bytes(itertools.chain(*itertools.product(range(0, 256, 15), repeat=3)))
COLOUR_GRID = Image.frombytes("RGB", (18 * 18, 18), COLOURS)


def open_image(
    source: str | Path | bytes, name: str | None = None, size: int | None = None, most_pixels: int | None = None
) -> Image.Image:
    """A picture from a file or from encoded bytes, turned upright, as RGB or RGBA in sRGB.

    A damaged profile, or one of another kind than the pixels, is not used: they are taken as sRGB.
    size: the side it will be shrunk to, if known: a JPEG is then decoded no larger than needed.
    most_pixels: a larger picture is refused before its pixels are decoded. Raises UserError, with `name` or the path,
    when it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if most_pixels and image.width * image.height > most_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {most_pixels:,}")
            if size:
                image.draft("RGB", (size, size))
            image.load()
            image = _turned_upright(image)
            # 16 bits: PIL would cut, not scale.
            if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
                image = image.point(lambda value: value / 257).convert("L")
            image = _converted_to_srgb(image)
            image.info.clear()  # the orientation and the profile hold no longer: saved, they would be used twice
            return image
    except Exception as error:  # decoders of damaged files raise anything
        place = name or ("from its bytes" if isinstance(source, bytes) else source)
        raise UserError(f"cannot read picture {place}: {reason(error)}; give a PNG, JPEG or WebP file") from None


def _turned_upright(image: Image.Image) -> Image.Image:
    """As EXIF's Orientation says; PIL's exif_transpose fails where it cannot write the other tags again."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF says nothing, and raises anything
        orientation = None
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _converted_to_srgb(image: Image.Image) -> Image.Image:
    """RGB or RGBA, its colours taken from its ICC profile's space to sRGB, those of transparent pixels too."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    converted, profile = image.convert(mode), image.info.get("icc_profile")
    if not profile:
        return converted
    if image.mode == "CMYK":
        transform = _to_srgb(profile, "CMYK")
        return transform.apply(image) if transform else converted
    if transform := _to_srgb(profile, mode):
        return transform.apply(converted)
    if image.mode in ("1", "L", "LA") and (transform := _to_srgb(profile, "L")):
        gray = transform.apply(converted.getchannel("R"))
        if mode == "RGBA":
            gray.putalpha(converted.getchannel("A"))
        return gray
    return converted


@functools.lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile's colours, in mode RGB, RGBA, L or CMYK, to sRGB, by relative colorimetry with
    black point compensation: what both spaces hold stays exactly, and black is black. Perceptual tables
    would also move those colours, differently in each profile, and most RGB profiles have none.

    None for sRGB itself, for a damaged profile and for one of another kind.
    """
    target = "RGBA" if mode == "RGBA" else "RGB"
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":
        flags |= ImageCms.Flags.NOOPTIMIZE  # optimised, dark grays are up to 10 of 255 off
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != PROFILE_SPACES[mode]:
            return None
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            target,
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=flags,
        )
    except Exception:  # a damaged profile can raise anything
        return None
    colours = COLOUR_GRID.convert(mode)
    changes = ImageChops.difference(colours.convert("RGB"), transform.apply(colours).convert("RGB"))
    return transform if max(high for _, high in changes.getextrema()) > SAME_COLOUR else None


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
    sides = max(image.width, round(width * scale)), max(image.height, round(height * scale))
    canvas = Image.new("RGB", sides)
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
