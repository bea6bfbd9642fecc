"""Pictures of anything, painted without a data file: what the autoencoder's decoder is to learn beyond our own scenes.

Grounds are patchworks of fabric, noise with the spectrum of photographs, or gradients. On them lie thin strokes, words,
and small blobs such as eyes and lips; over all of it speckle and shading.
"""

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedded.painter import generic_picture
from embedded.pretrain.scenes import RESOLUTION

SUPERSAMPLE = 2  # strokes and words are drawn this much larger, and brought down
GLYPHS = np.array(list(string.ascii_letters + string.digits + string.punctuation))


def spectral_noise(rng: np.random.Generator, channels: int, size: int, slope: float) -> np.ndarray:
    """Noise whose amplitude falls with frequency**-slope; photographs have about 1 (Field 1987). (channels, size, size)
    of mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(channels, size, size))) / frequency**slope
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return noise / noise.std((1, 2), keepdims=True)


def mixed_colours(rng: np.random.Generator, noise: np.ndarray) -> np.ndarray:
    """noise (3, H, W) as light and, fainter, two directions of colour, about a colour of its own → (3, H, W)."""
    directions = np.linalg.qr(np.c_[np.ones(3), rng.normal(size=(3, 2))])[0]
    strength = rng.uniform(0.1, 0.35) * np.array([1, *rng.uniform(0, 0.5, 2)])
    return rng.uniform(0.15, 0.85, (3, 1, 1)) + np.tensordot(directions * strength, noise, 1)


def gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """From one colour to another, straight or round → (3, size, size)."""
    rows, columns = np.mgrid[:size, :size] / size
    y, x = rng.uniform(-0.5, 1.5, 2)
    angle = rng.uniform(0, 2 * np.pi)
    straight = rows * np.sin(angle) + columns * np.cos(angle)
    share = straight if rng.uniform() < 0.5 else np.hypot(rows - y, columns - x)
    ends = rng.uniform(0, 1, (2, 3, 1, 1))
    share = (share - share.min()) / (share.max() - share.min())
    return ends[0] + (ends[1] - ends[0]) * share


def colour(rng: np.random.Generator) -> tuple[int, ...]:
    """Any, often nearly grey or dark as lines are."""
    base = rng.uniform(0, 255) if rng.uniform() < 0.6 else rng.uniform(0, 60)
    return tuple(int(level) for level in (base + rng.normal(0, rng.choice([6, 80]), 3)).clip(0, 255))


def draw_strokes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    """Thin lines: curves side by side as hair and seams have them, or in any direction."""
    steps = np.linspace(0, 1, 12)[:, None]
    centre, along = rng.uniform(0, size, 2), rng.normal(0, size * rng.uniform(0.05, 0.4), 2)
    spread, bend, width = size * rng.uniform(0.01, 0.15), rng.normal(0, 0.3), rng.uniform(1, 6)
    parallel, shade = rng.uniform() < 0.6, colour(rng)
    for _ in range(rng.integers(1, 40)):
        start = centre + rng.normal(0, spread, 2)
        reach = along * rng.uniform(0.6, 1.3) if parallel else rng.normal(0, np.abs(along).mean(), 2)
        across = np.array([-reach[1], reach[0]]) * (bend + rng.normal(0, 0.05))
        points = start + reach * steps + across * steps * (1 - steps)
        fill = shade if rng.uniform() < 0.7 else colour(rng)
        draw.line([tuple(point) for point in points], fill, max(1, round(width * rng.uniform(0.5, 1.3))), "curve")


def draw_blobs(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    """Ellipses in ellipses, as eyes, buttons and petals are, and leaves of two arcs, as lips are."""
    for _ in range(rng.integers(1, 16)):
        (y, x), radius, flatness = rng.uniform(0, size, 2), size * rng.uniform(0.004, 0.05), rng.uniform(0.3, 1)
        if rng.uniform() < 0.3:
            angles = np.linspace(0, np.pi, 12)
            top, bottom = rng.uniform(0.2, 0.8, 2) * radius
            xs, ys = 2 * radius * np.cos(angles), np.sin(angles)
            turn = rng.normal(0, 0.5)
            outline = np.r_[np.c_[xs, -top * ys], np.c_[-xs, bottom * ys]]
            outline = outline @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]] + [x, y]
            draw.polygon([tuple(point) for point in outline], colour(rng))
            continue
        for share in sorted(rng.uniform(0.15, 1, rng.integers(1, 4)), reverse=True):
            a, b = radius * share, radius * max(flatness, share if share < 0.5 else flatness) * share
            draw.ellipse((x - a, y - b, x + a, y + b), colour(rng))


def draw_words(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    """Characters of any size, as prints on clothes have them."""
    for _ in range(rng.integers(1, 6)):
        font = ImageFont.load_default(size * rng.uniform(0.02, 0.16))
        word = "".join(rng.choice(GLYPHS, rng.integers(1, 9)))
        outline = int(rng.integers(0, 3))
        place = tuple(rng.uniform(-0.1, 0.9, 2) * size)
        draw.text(place, word, colour(rng), font, stroke_width=outline, stroke_fill=colour(rng))


def varied_picture(seed: int, index: int, size: int = RESOLUTION) -> tuple[np.ndarray, dict]:
    """Picture `index` → (3, size, size) uint8 and no labels; the same for the same (seed, index)."""
    rng = np.random.default_rng([seed, index])
    kind = rng.uniform()
    if kind < 0.55:
        picture = generic_picture(rng, size).numpy().astype(np.float64)
    elif kind < 0.85:
        picture = mixed_colours(rng, spectral_noise(rng, 3, size, rng.uniform(0.7, 2)))
    else:
        picture = gradient(rng, size)
    if rng.uniform() < 0.7:  # a surface: its own light and dark in every octave
        picture = picture * (1 + rng.uniform(0.02, 0.2) * spectral_noise(rng, 1, size, rng.uniform(0.3, 1.5)))
    levels = (picture.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    canvas = Image.fromarray(levels).resize((SUPERSAMPLE * size,) * 2, Image.Resampling.BILINEAR)
    for paint in (draw_strokes, draw_blobs, draw_words):
        for _ in range(rng.integers(0, 5)):
            turn = float(rng.uniform(0, 360)) if paint is draw_words else 0.0
            layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
            paint(ImageDraw.Draw(layer), rng, SUPERSAMPLE * size)
            layer = layer.rotate(turn, Image.Resampling.BILINEAR)
            canvas.paste(layer, mask=layer)
    picture = np.asarray(canvas.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1) / 255
    if rng.uniform() < 0.3:
        speckled = rng.uniform(size=(size, size)) < rng.uniform(0.005, 0.2)
        picture = picture + speckled * rng.normal(0, rng.uniform(0.03, 0.3), (size, size))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8), {}
