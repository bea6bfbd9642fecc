"""Dressed bodies without any data: textures painted on Anny from prompts of the ATLAS grammar.

Everything is painted from the texel's 3D position on the resting body, so garments and patterns meet at UV
seams, and everything follows from (outfit, seed).
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from render.bodies import load_anny, load_anny_body
from render.utils import interpolate, rasterize_uv, vertex_normals

ETHNICITIES = {
    "white": (226, 178, 150), "Asian": (222, 182, 136), "African American": (98, 62, 43),
    "Latino": (182, 126, 90), "Middle Eastern": (196, 145, 104), "Mixed race": (152, 102, 72),
}  # fmt: skip
PERSONS = ("man", "woman", "young boy", "young girl", "elder man", "elder woman")
HAIR = {"black": (24, 22, 24), "brown": (84, 52, 30), "blonde": (214, 172, 98), "auburn": (138, 54, 30),
        "white": (226, 224, 220)}  # fmt: skip
COLOURS = {
    "white": (238, 238, 234), "black": (30, 30, 33), "gray": (132, 134, 136), "blue": (38, 82, 176),
    "green": (40, 122, 62), "pink": (236, 140, 172), "orange": (236, 122, 32), "khaki": (178, 158, 112),
}  # fmt: skip
PATTERNS = ("denim", "striped", "plaid", "floral")
STYLES = (*COLOURS, *PATTERNS)
TOPS = ("shirt", "long sleeve shirt", "polo shirt", "button-down shirt", "blouse", "sweater", "jacket", "blazer")
BOTTOMS = ("jeans", "pants", "shorts")
# Share of the way from shoulder to wrist that a top's sleeve covers, and the height of its hem in metres.
SLEEVES = {"shirt": 0.36, "long sleeve shirt": 0.96, "polo shirt": 0.38, "button-down shirt": 0.97,
           "blouse": 0.68, "sweater": 0.99, "jacket": 0.98, "blazer": 0.97}  # fmt: skip
HEMS = {"shirt": 0.88, "long sleeve shirt": 0.88, "polo shirt": 0.88, "button-down shirt": 0.91, "blouse": 0.90,
        "sweater": 0.85, "jacket": 0.87, "blazer": 0.80}  # fmt: skip
WAIST, KNEE, ANKLE = 0.95, 0.46, 0.09  # metres
EYE, MOUTH = np.array([0.030, 1.515, 0.107], np.float32), 1.447


@dataclass(frozen=True)
class Outfit:
    """The seven attributes of an ATLAS prompt."""

    ethnicity: str
    person: str
    top_style: str
    top: str
    bottom_style: str
    bottom: str
    hair: str

    @property
    def prompt(self) -> str:
        return (
            f"{self.ethnicity}, {self.person}, {self.top_style} {self.top}, "
            f"{self.bottom_style} {self.bottom}, {self.hair} hair"
        )

    def sentence(self, rng: np.random.Generator) -> str:
        """The same in one of a few natural sentences."""
        person = f"{self.ethnicity} {self.person}"
        article = "an" if person[0] in "AE" else "a"
        top, bottom = f"{self.top_style} {self.top}", f"{self.bottom_style} {self.bottom}"
        return str(
            rng.choice([
                f"{article} {person} with {self.hair} hair wearing {top} and {bottom}",
                f"{article} {person} with {self.hair} hair, in {top} and {bottom}",
                f"{self.hair} haired {person} in {bottom} and a {top}",
            ])
        )  # fmt: skip

    @property
    def held_out(self) -> bool:
        """One combination in ten is never trained on."""
        return zlib.crc32(self.prompt.encode()) % 10 == 0


def sample_outfit(rng: np.random.Generator, held_out: bool = False) -> Outfit:
    while True:
        outfit = Outfit(*(str(rng.choice(options)) for options in (
            list(ETHNICITIES), PERSONS, STYLES, TOPS, STYLES, BOTTOMS, list(HAIR))))  # fmt: skip
        if outfit.held_out == held_out:
            return outfit


@dataclass(frozen=True)
class BodyMaps:
    """What lies under each covered texel of Anny's UV layout, K texels of a size x size texture."""

    mask: np.ndarray  # (size, size) bool
    position: np.ndarray  # (K, 3) metres, feet at y = 0
    normal: np.ndarray  # (K, 3)
    arm: np.ndarray  # (K,) 0 at the shoulder, 1 at the wrist; -1 off the arms
    is_hand: np.ndarray
    is_foot: np.ndarray
    is_head: np.ndarray
    is_neck: np.ndarray
    is_eye: np.ndarray


@functools.lru_cache(maxsize=4)
def body_maps(size: int) -> BodyMaps:
    model, body = load_anny(), load_anny_body()
    fragments = rasterize_uv(body, size)
    mask = fragments.mask[0]
    position = interpolate(fragments, body.faces, body.vertices)
    normal = interpolate(fragments, body.faces, vertex_normals(body.vertices, body.faces))
    weights = model.vertex_bone_weights.float()
    strongest = model.vertex_bone_indices.gather(1, weights.argmax(1, keepdim=True))[:, 0]

    def part(*names: str) -> np.ndarray:
        """Texels that follow the bones whose label starts with one of names."""
        bones = torch.tensor([label.startswith(names) for label in model.bone_labels])
        return interpolate(fragments, body.faces, bones[strongest].float()[:, None])[:, 0].numpy() > 0.5

    x, y, z = position.abs()[:, 0], position[:, 1], position[:, 2]
    shoulder, elbow, wrist = (
        torch.tensor(p) for p in ((0.165, 1.293, 0.013), (0.334, 1.105, 0.019), (0.45, 0.987, 0.174))
    )
    mirrored = torch.stack([x, y, z], -1)

    def along(start, end):
        axis = end - start
        return ((mirrored - start) @ axis / axis.square().sum()).clamp(0, 1)

    arm = 0.53 * along(shoulder, elbow) + 0.47 * along(elbow, wrist)
    is_arm = part("upperarm", "lowerarm", "wrist", "finger", "metacarpal")
    return BodyMaps(
        mask=mask.numpy(), position=position.numpy(), normal=normal.numpy(),
        arm=np.where(is_arm, arm.numpy(), -1),
        is_hand=part("wrist", "finger", "metacarpal"), is_foot=part("foot", "toe"),
        is_head=part("head", "neck03"), is_neck=part("neck"), is_eye=part("eye"),
    )  # fmt: skip


def smooth_noise(points: np.ndarray, rng: np.random.Generator, scale: float, waves: int = 5) -> np.ndarray:
    """A sum of random sine waves with a wavelength of about `scale` metres. points: (K, 3) → (K,), about [-1, 1]."""
    directions = rng.normal(size=(3, waves)).astype(np.float32)
    directions *= (
        2 * np.pi / scale * rng.uniform(0.6, 1.5, waves).astype(np.float32) / np.linalg.norm(directions, axis=0)
    )
    return np.sin(points @ directions + rng.uniform(0, 6.28, waves).astype(np.float32)).mean(-1) * 1.6


def jitter(colour, rng: np.random.Generator, amount: float) -> np.ndarray:
    return np.clip(
        np.array(colour, np.float32) / 255 * rng.uniform(1 - amount, 1 + amount) + rng.normal(0, amount / 5, 3), 0, 1
    )


def fabric(style: str, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cloth of that colour or pattern, continuous in space. points: (K, 3) metres → (K, 3) in [0, 1]."""
    points = points.astype(np.float32)
    if style in COLOURS:
        colour = np.broadcast_to(jitter(COLOURS[style], rng, 0.10), points.shape)
    elif style == "denim":
        weave = np.sin(points @ (np.array([1.0, 1.0, 1.0]) * 2 * np.pi / 0.02))
        fade = smooth_noise(points, rng, 0.35)
        colour = jitter((62, 88, 128), rng, 0.10) * (1 + 0.10 * weave + 0.16 * fade)[:, None]
    elif style == "striped":
        dark, light = jitter((40, 50, 84), rng, 0.5), jitter((236, 234, 226), rng, 0.05)
        stripe = np.sin(points[:, 1] * 2 * np.pi / rng.uniform(0.07, 0.10)) > 0
        colour = np.where(stripe[:, None], dark, light)
    elif style == "plaid":
        base, line = jitter((168, 36, 36), rng, 0.15), jitter((26, 30, 52), rng, 0.3)
        period = rng.uniform(0.09, 0.12)
        across = (np.sin(points[:, 1] * 2 * np.pi / period) > 0.25).astype(np.float32)
        down = (np.sin((points[:, 0] + 0.6 * points[:, 2]) * 2 * np.pi / period) > 0.25).astype(np.float32)
        share = 0.5 * (across + down)[:, None]
        colour = base * (1 - share) + line * share
    else:  # floral: flowers round the points of a jittered lattice
        colour = np.broadcast_to(jitter((240, 232, 216), rng, 0.06), points.shape).copy()
        petals = np.array([jitter(c, rng, 0.1) for c in ((214, 48, 92), (242, 176, 44), (122, 74, 168))])
        shift, cell = rng.uniform(0, 1, 3), 0.085
        lattice = np.floor(points / cell + shift).astype(np.int64)
        key = (lattice @ np.array([73856093, 19349663, 83492791])) & 0xFFFF
        centre = (
            lattice + 0.3 + 0.4 * np.stack([key % 7, key % 11, key % 13], -1) / np.array([6, 10, 12]) - shift
        ) * cell
        distance = np.linalg.norm(points - centre, axis=-1)
        colour[distance < 0.036] = petals[key % 3][distance < 0.036]
        colour[distance < 0.012] = (0.98, 0.90, 0.55)
    folds = smooth_noise(points, rng, 0.22) * 0.06 + smooth_noise(points, rng, 0.06) * 0.03
    return np.clip(colour * (1 + folds)[:, None], 0, 1).astype(np.float32)


def paint_texture(outfit: Outfit, seed: int, size: int) -> torch.Tensor:
    """A dressed body's texture in Anny's UV layout → (4, size, size) float32 in [0, 1], alpha 1 on the islands."""
    rng = np.random.default_rng([seed, zlib.crc32(outfit.prompt.encode())])
    maps = body_maps(size)
    colours = paint_skin(outfit, maps, rng)
    paint_bottom(colours, outfit, maps, rng)
    paint_top(colours, outfit, maps, rng)
    paint_hair(colours, outfit, maps, rng)
    texture = np.zeros((size, size, 4), np.float32)
    texture[maps.mask, :3] = np.clip(colours, 0, 1)
    texture[maps.mask, 3] = 1
    return torch.from_numpy(texture).permute(2, 0, 1).contiguous()


def paint_skin(outfit: Outfit, maps: BodyMaps, rng: np.random.Generator) -> np.ndarray:
    points = maps.position
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    skin = jitter(ETHNICITIES[outfit.ethnicity], rng, 0.07)
    tone = 1 + 0.035 * smooth_noise(points, rng, 0.15) + 0.02 * smooth_noise(points, rng, 0.03)
    colours = skin * tone[:, None]

    face = maps.is_head & (z > 0.06)
    cheeks = face & (np.hypot(x - 0.042, y - 1.475) < 0.02)
    colours[cheeks] *= (1.04, 0.93, 0.92)
    lips = face & (((x / 0.025) ** 2 + ((y - MOUTH) / (0.008 if "man" in outfit.person.split() else 0.010)) ** 2) < 1)
    colours[lips] = skin * (0.88, 0.58, 0.58)
    hair = jitter(HAIR[outfit.hair], rng, 0.05)
    brow = (
        face
        & (np.abs(x - 0.031) < 0.018)
        & (np.abs(y - 1.537 + 0.6 * np.maximum(x - 0.038, 0)) < 0.0045 - 0.12 * np.maximum(x - 0.030, 0))
    )
    colours[brow] = 0.7 * hair + 0.3 * skin
    socket = face & (np.hypot((x - EYE[0]) / 0.019, (y - EYE[1]) / 0.009) < 1) & ~maps.is_eye
    colours[socket] *= 0.72
    if "elder" in outfit.person:
        wrinkle = face & (y > 1.55) & (np.sin(y * 2 * np.pi / 0.011) > 0.55)
        wrinkle |= face & (np.abs(x - 0.022 - 0.5 * (1.475 - y)) < 0.0028) & (y < 1.478) & (y > 1.445)
        colours[wrinkle] *= 0.84
    gaze = points - EYE * np.sign(points[:, :1]) ** np.array([1, 0, 0])
    radius = np.hypot(gaze[:, 0], gaze[:, 1])
    colours[maps.is_eye] = 0.93
    colours[maps.is_eye & (radius < 0.0068)] = jitter((92, 66, 44), rng, 0.3)
    colours[maps.is_eye & (radius < 0.0030)] = 0.05

    shoe = maps.is_foot & (y < 0.085)
    leather = jitter([(52, 38, 30), (28, 28, 30), (228, 226, 222), (110, 72, 42)][rng.integers(4)], rng, 0.1)
    colours[shoe] = leather
    colours[shoe & (y < 0.016)] = leather * 0.55
    return colours


def paint_bottom(colours: np.ndarray, outfit: Outfit, maps: BodyMaps, rng: np.random.Generator):
    points = maps.position
    y = points[:, 1]
    off_arms = (maps.arm < 0) & ~maps.is_hand
    end = KNEE + 0.03 if outfit.bottom == "shorts" else ANKLE - 0.012
    worn = off_arms & (y < WAIST + 0.04) & (y > end)
    colours[worn] = fabric(outfit.bottom_style, points[worn], rng)
    colours[worn & (y > WAIST + 0.015)] *= 0.75  # waistband
    colours[worn & (y < end + 0.012)] *= 0.82  # hem
    if outfit.bottom == "jeans":
        side = worn & (np.abs(maps.normal[:, 2]) < 0.12) & (np.abs(points[:, 0]) > 0.12)
        colours[side] = 0.55 * colours[side] + 0.45 * np.array((0.80, 0.56, 0.26))  # orange thread
        worn_out = np.clip(0.25 - np.abs(y - 0.6), 0, 0.25) * np.clip(maps.normal[:, 2], 0, 1)
        colours[worn] *= (1 + 0.8 * worn_out[worn])[:, None]
        pocket = worn & (np.abs(np.hypot(np.abs(points[:, 0]) - 0.155, y - 0.955) - 0.075) < 0.004) & (points[:, 2] > 0)
        colours[pocket] *= 0.6
    elif outfit.bottom == "pants":
        crease = worn & (np.abs(np.abs(points[:, 0]) - 0.118) < 0.004) & (points[:, 2] > 0)
        colours[crease] *= 0.82


def paint_top(colours: np.ndarray, outfit: Outfit, maps: BodyMaps, rng: np.random.Generator):
    points, top = maps.position, outfit.top
    x, y, front = np.abs(points[:, 0]), points[:, 1], points[:, 2] > 0.02
    torso = (maps.arm < 0) & ~maps.is_head & (y > HEMS[top])
    neckline = 1.375 - 0.35 * np.maximum(0.05 - x, 0) * front
    torso &= ~((y > neckline) & (x < 0.09) & (maps.is_neck | (y > neckline)))
    sleeve = (maps.arm >= 0) & (maps.arm < SLEEVES[top]) & ~maps.is_hand
    worn = torso | sleeve
    opening = {"polo shirt": 1.29, "blouse": 1.24, "button-down shirt": 1.31}.get(top)
    v_neck = np.zeros_like(worn)
    if opening is not None:
        v_neck = torso & front & (y > opening) & (x < 0.42 * (y - opening))
        worn &= ~v_neck
    colours[worn] = fabric(outfit.top_style, points[worn], rng)
    colours[sleeve & (maps.arm > SLEEVES[top] - 0.025)] *= 0.80
    colours[torso & (y < HEMS[top] + 0.012)] *= 0.80
    trim = 1.25 if outfit.top_style in ("black", "denim", "blue", "green") else 0.74
    if top in ("jacket", "blazer"):
        lowest = 1.10 if top == "blazer" else HEMS[top]
        width = 0.30 * (y - lowest) if top == "blazer" else 0.022 + 0.05 * np.maximum(y - 1.2, 0)
        inner = torso & front & (y > lowest) & (x < width)
        colours[inner] = jitter((236, 236, 232) if top == "blazer" else (196, 198, 202), rng, 0.04)
        lapel = torso & front & ~inner & (y > lowest) & (x < width + (0.035 if top == "blazer" else 0.010))
        colours[lapel] *= trim
    if top in ("polo shirt", "button-down shirt", "blouse"):
        collar = torso & ~v_neck & (y > 1.335) & (x < 0.10)
        colours[collar] *= trim
    if top in ("polo shirt", "button-down shirt"):
        lowest = 1.20 if top == "polo shirt" else HEMS[top]
        placket = torso & ~v_neck & front & (x < 0.011) & (y > lowest)
        colours[placket] *= trim
        colours[placket & (x < 0.006) & (np.mod(y, 0.07) < 0.012)] = 0.92
    if top == "sweater":
        colours[worn] *= (1 + 0.06 * np.sin(y[worn] * 2 * np.pi / 0.016))[:, None]
        colours[torso & (y < HEMS[top] + 0.045)] *= 0.88


def paint_hair(colours: np.ndarray, outfit: Outfit, maps: BodyMaps, rng: np.random.Generator):
    points = maps.position
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    long_hair = outfit.person in ("woman", "young girl", "elder woman")
    hairline = 1.575 + 0.003 * np.sin(points[:, 0] * 130) - 0.5 * np.maximum(x - 0.045, 0)
    scalp = maps.is_head & ((y > hairline) | ((z < 0.045) & (y > 1.50)) | ((z < 0.0) & (y > 1.455)))
    if not long_hair:
        scalp &= ~(maps.is_head & (x > 0.078) & (y < 1.545) & (z > -0.02))  # ears
    else:
        scalp |= (maps.is_head | maps.is_neck) & (z < 0.035)
        scalp |= (y > 1.25) & (y < 1.46) & (z < -0.02) & (x < 0.10) & (maps.arm < 0)
        scalp |= maps.is_head & (x > 0.058) & (z < 0.075)
    scalp &= ~maps.is_eye
    angle = np.arctan2(points[:, 0], z - 0.03)[scalp]
    strands = np.sin(angle * 46 + 3 * smooth_noise(points[scalp], rng, 0.12)) * 0.10
    strands += smooth_noise(points[scalp], rng, 0.05) * 0.07
    colours[scalp] = jitter(HAIR[outfit.hair], rng, 0.10) * (1 + strands)[:, None]


def generic_picture(rng: np.random.Generator, size: int) -> torch.Tensor:
    """A patchwork of fabrics, skin and hair tones with soft shading, no body in it → (3, size, size) in [0, 1]."""
    grid = np.stack(np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij"), -1).reshape(-1, 2)
    seeds = rng.uniform(0, 1, (rng.integers(2, 14), 2))
    warp = 0.05 * rng.normal(size=2) * np.sin(grid[:, ::-1] * rng.uniform(4, 30))
    patch = ((grid + warp)[:, None] - seeds).__pow__(2).sum(-1).argmin(1)
    scale, picture = rng.uniform(0.3, 1.6), np.zeros((size * size, 3), np.float32)
    for index in range(len(seeds)):
        inside = patch == index
        tilt = np.linalg.qr(rng.normal(size=(3, 3)))[0][:2] * scale
        points = (grid[inside] @ tilt).astype(np.float32)
        kind = rng.uniform()
        if kind < 0.55:
            picture[inside] = fabric(str(rng.choice(STYLES)), points, rng)
        elif kind < 0.75:
            tones = [*ETHNICITIES.values(), *HAIR.values()]
            tone = 1 + 0.06 * smooth_noise(points, rng, 0.1)
            picture[inside] = jitter(tones[rng.integers(len(tones))], rng, 0.1) * tone[:, None]
        else:
            ends = rng.uniform(0, 1, (2, 3))
            share = 0.5 + 0.5 * smooth_noise(points, rng, rng.uniform(0.05, 0.5))[:, None]
            picture[inside] = ends[0] * share + ends[1] * (1 - share)
    return torch.from_numpy(picture.clip(0, 1).reshape(size, size, 3)).permute(2, 0, 1).contiguous()
