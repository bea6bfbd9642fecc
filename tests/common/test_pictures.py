"""Pictures as cameras and editors write them: turned, with texts and profiles of any size, in any mode."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from common.pictures import encode_image, open_image

# Columns: the primaries in XYZ under D50. IEC 61966-2-1 and Adobe RGB (1998), both adapted by Bradford's method.
SRGB_MATRIX = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_MATRIX = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
ADOBE_GAMMA = 563 / 256


def icc_profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", padding: int = 0) -> bytes:
    """A profile as ICC.1:2001-04 lays it out; padding: bytes of a private tag behind the others."""
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), **tags, b"zzzz": b"text" + bytes(4 + padding)}
    offset, table, data = 132 + 12 * len(tags), b"", b""
    for signature, content in tags.items():
        table += signature + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">II", offset + len(data), 0) + b"\x02\x40\0\0" + b"mntr" + space + pcs + bytes(12)
    header += b"acsp" + bytes(28) + xyz(0.9642, 1, 0.8249)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def fixed_point(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + fixed_point(*values)


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def sampled_curve(values: np.ndarray) -> bytes:
    values = (values * 65535).round().astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + values.tobytes()


def rgb_profile(matrix: np.ndarray, curve: bytes, padding: int = 0) -> bytes:
    primaries = {b"rXYZ": xyz(*matrix[:, 0]), b"gXYZ": xyz(*matrix[:, 1]), b"bXYZ": xyz(*matrix[:, 2])}
    curves = {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return icc_profile(b"RGB ", {**primaries, **curves}, padding=padding)


def srgb_from_linear(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def linear_from_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def adobe_as_srgb(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 in Adobe RGB → in sRGB, not rounded."""
    light = (pixels / 255) ** ADOBE_GAMMA @ ADOBE_MATRIX.T
    return 255 * srgb_from_linear(light @ np.linalg.inv(SRGB_MATRIX).T)


ADOBE = rgb_profile(ADOBE_MATRIX, gamma_curve(ADOBE_GAMMA))
GRAY = icc_profile(b"GRAY", {b"kTRC": gamma_curve(1.0)})
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
RGBA = Image.fromarray(PIXELS)
RGB = RGBA.convert("RGB")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def gray_by_ink_profile() -> bytes:
    """CMYK → Lab by a table (lut8Type) between no ink and all of it: each ink takes 25 of L, none has a colour."""
    corners = [round(255 * (4 - sum(inks)) / 4) for inks in itertools.product((0, 1), repeat=4)]
    table = b"".join(bytes([lightness, 128, 128]) for lightness in corners)
    ramp = bytes(range(256))
    identity = fixed_point(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    return icc_profile(b"CMYK", {b"A2B0": lut}, pcs=b"Lab ")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_of_exif_is_turned_upright(orientation):
    stored = PIXELS[..., :3]
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encode_image(RGB, format="PNG", exif=exif))
    assert np.array_equal(pixels(opened), upright)
    assert np.array_equal(pixels(open_image(encode_image(opened, format="PNG"))), upright), "not turned twice"


@pytest.mark.parametrize("tag", [0x010F, 0x8298, 0x0131])
def test_tags_of_a_wrong_type_do_not_hide_the_orientation(tag):
    """Make, Copyright and Software are text by the EXIF standard; some phones write numbers."""
    entries = sorted([(0x0112, 3, 1, 6), (tag, 5, 1, 8 + 2 + 2 * 12 + 4)])
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + directory + struct.pack("<III", 0, 72, 1)
    picture = Image.new("RGB", (32, 16), "red")
    picture.paste("blue", (0, 0, 16, 16))
    for format in ("JPEG", "WEBP"):
        opened = open_image(encode_image(picture, format=format, exif=exif, quality=95))
        assert opened.size == (16, 32)
        top, bottom = (np.array(opened.getpixel((8, row))) for row in (4, 28))
        assert np.abs(top - (0, 0, 255)).max() < 8 and np.abs(bottom - (255, 0, 0)).max() < 8


def test_damaged_exif_loses_no_picture():
    for exif in (b"Exif\0\0II*\0" + struct.pack("<I", 10**6), b"Exif\0\0nothing of the kind"):
        assert open_image(encode_image(RGB, format="JPEG", exif=exif)).size == RGB.size


@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("is_compressed", [True, False])
def test_long_texts_in_a_png_lose_no_picture(place, is_compressed):
    texts = PngInfo()
    for add in (texts.add_text, texts.add_itxt):
        add("workflow", "node " * 500_000, zip=is_compressed)
    png = encode_image(RGB, format="PNG", pnginfo=texts)
    if place == "behind the pixels":
        start, first, end = 33, png.index(b"IDAT") - 4, png.rindex(b"IEND") - 4
        png = png[:start] + png[first:end] + png[start:first] + png[end:]
    assert np.array_equal(pixels(open_image(png)), pixels(RGB))


def test_a_profile_of_megabytes_is_used():
    png = encode_image(RGB, format="PNG", icc_profile=rgb_profile(ADOBE_MATRIX, gamma_curve(2.2), padding=3_000_000))
    assert np.abs(pixels(open_image(png)) - adobe_as_srgb(pixels(RGB))).max() < 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P with alpha"])
def test_colours_of_a_wide_gamut_are_converted(mode):
    picture = {"RGB": RGB, "RGBA": RGBA}.get(mode, RGB.quantize(64))
    transparency = {"transparency": 5} if mode == "P with alpha" else {}
    expected = pixels(picture.convert("RGB"))
    for format, options in (("PNG", transparency), ("WEBP", {"lossless": True, "exact": True})):
        if format == "WEBP" and picture.mode == "P":
            continue
        opened = open_image(encode_image(picture, format=format, icc_profile=ADOBE, **options))
        assert opened.mode == ("RGBA" if mode in ("RGBA", "P with alpha") else "RGB")
        assert np.abs(pixels(opened)[..., :3] - adobe_as_srgb(expected)).max() < 1.6
        if mode == "RGBA":
            assert np.array_equal(pixels(opened)[..., 3], PIXELS[..., 3])
        if mode == "P with alpha":
            assert np.array_equal(pixels(opened)[..., 3] == 0, pixels(picture) == 5)
        assert "icc_profile" not in Image.open(io.BytesIO(encode_image(opened, format="PNG"))).info


def test_a_jpeg_of_a_wide_gamut_is_converted_at_each_size():
    red = Image.new("RGB", (256, 256), (180, 60, 50))
    jpeg = encode_image(red, format="JPEG", quality=98, icc_profile=ADOBE)
    expected = adobe_as_srgb(np.array([180, 60, 50]))
    for size in (None, 64):
        opened = open_image(jpeg, size=size)
        assert opened.size == ((64, 64) if size else (256, 256))
        assert np.abs(np.array(opened.getpixel((9, 9))) - expected).max() < 4


def test_srgb_stays_to_the_bit_however_its_profile_is_written():
    curve = linear_from_srgb(np.linspace(0, 1, 1024))
    profiles = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(SRGB_MATRIX, sampled_curve(curve)),
    )
    for profile, picture in itertools.product(profiles, (RGB, RGBA, RGB.quantize(64), RGB.convert("L"))):
        opened = open_image(encode_image(picture, format="PNG", icc_profile=profile))
        assert np.array_equal(pixels(opened), pixels(picture.convert(opened.mode)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
def test_a_damaged_or_foreign_profile_is_as_none(mode):
    picture, format = RGBA.convert(mode) if mode != "P" else RGB.quantize(64), "JPEG" if mode == "CMYK" else "PNG"
    plain = open_image(encode_image(picture, format=format))
    foreign = ADOBE if mode == "CMYK" else gray_by_ink_profile()
    for profile in (b"no profile", ADOBE[:300], ADOBE[:60] + b"\xff" * 600, foreign):
        opened = open_image(encode_image(picture, format=format, icc_profile=profile))
        assert opened.mode == plain.mode and np.array_equal(pixels(opened), pixels(plain))


def test_gray_with_its_own_profile_is_converted():
    """Linear light in 8 and 16 bits, with and without alpha; an RGB profile on gray counts too."""
    gray = RGBA.convert("L")
    expected = 255 * srgb_from_linear(pixels(gray) / 255)
    for picture in (gray, RGBA.convert("LA"), Image.fromarray(pixels(gray).astype(np.uint16) * 257)):
        opened = open_image(encode_image(picture, format="PNG", icc_profile=GRAY))
        assert np.abs(pixels(opened)[..., :3] - expected[..., None]).max() < 1.6
        assert opened.mode == ("RGBA" if picture.mode == "LA" else "RGB")
    assert np.array_equal(pixels(open_image(encode_image(RGBA.convert("LA"), format="PNG")))[..., 3], PIXELS[..., 3])
    opened = open_image(encode_image(gray, format="PNG", icc_profile=ADOBE))
    assert np.abs(pixels(opened) - adobe_as_srgb(pixels(gray.convert("RGB")))).max() < 1.6


def test_cmyk_is_read_with_and_without_a_profile():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert open_image(encode_image(cyan, format="JPEG", quality=98)).getpixel((8, 8)) == (0, 255, 255)
    jpeg = encode_image(cyan, format="JPEG", quality=98, icc_profile=gray_by_ink_profile())
    # L = 75 is 48.3 % of white's light, and black point compensation changes nothing where all inks are black.
    lightness = 255 * srgb_from_linear(np.array(((75 + 16) / 116) ** 3))
    assert np.abs(np.array(open_image(jpeg).getpixel((8, 8))) - lightness).max() < 4
