"""Dressed bodies without any data: textures painted on Anny from the outfits of grammar.py.

Everything is painted from the texel's 3D position on the resting body, so garments and patterns meet at UV
seams, and everything follows from (outfit, seed).
"""

import functools
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from embedded.grammar import COLOURS, ETHNICITIES, FEMALE, HAIR, HEMS, LEGS, SLEEVES, STYLES, Outfit
from render.bodies import Body, load_anny, load_anny_body, vertex_normals
from render.rasteriser import interpolate, rasterize_uv

PAINTER = 4  # to be raised when the same outfit and seed are painted differently: data sets are built anew
# What a texel shows, as numbered in a painting's regions.
OUTSIDE, SKIN, TOP, BOTTOM, HAIR_REGION, SHOES, DETAIL = range(7)
ARM_LENGTH = 0.52  # metres, shoulder to wrist
WAIST, NECK = 0.95, 1.375  # metres above the ground, as are all heights here
SHOULDER, ELBOW, WRIST = (0.165, 1.293, 0.013), (0.334, 1.105, 0.019), (0.45, 0.987, 0.174)  # the left ones
EYE, MOUTH, BROW = np.array([0.030, 1.515, 0.107], np.float32), 1.447, 1.538
HEAD_BONES = ("head", "neck", "eye", "jaw", "tongue")  # what their labels start with
LEG_BONES = ("upperleg", "lowerleg", "foot", "toe")
ARM_BONES = ("upperarm", "lowerarm", "wrist", "finger", "metacarpal")


@dataclass(frozen=True)
class Painting:
    """texture: (4, S, S) float32 in [0, 1], alpha 1 on the islands. regions: (S, S) uint8, OUTSIDE to DETAIL; DETAIL
    is what the outfit's words say nothing about: eyes, lips, beards, trimmings."""

    texture: torch.Tensor
    regions: torch.Tensor


@dataclass(frozen=True)
class BodyMaps:
    """What lies under each covered texel of Anny's UV layout, K texels of a size x size texture."""

    mask: np.ndarray  # (size, size) bool
    texel: float  # side of a texel on the body, metres
    position: np.ndarray  # (K, 3) metres, feet at y = 0
    normal: np.ndarray  # (K, 3)
    arm: np.ndarray  # (K,) 0 at the shoulder, 1 at the wrist; -1 off the arms
    is_hand: np.ndarray
    is_foot: np.ndarray
    is_head: np.ndarray
    is_neck: np.ndarray
    is_eye: np.ndarray
    is_nail: np.ndarray


def vertices_of_bones(names: tuple[str, ...]) -> np.ndarray:
    """Anny's vertices that follow most a bone whose label starts with one of names: (V,) bool."""
    model = load_anny()
    strongest = model.vertex_bone_weights.float().argmax(1, keepdim=True)
    bones = model.vertex_bone_indices.gather(1, strongest)[:, 0].numpy()
    return np.array([label.startswith(names) for label in model.bone_labels])[bones]


@functools.lru_cache(maxsize=16)
def body_maps(size: int, layout: int | None = None) -> BodyMaps:
    """Of Anny's own UV layout, or of another one (see `other_layout`)."""
    body = load_anny_body() if layout is None else other_layout(layout)
    fragments = rasterize_uv(body, size)
    mask = fragments.mask[0]
    position = interpolate(fragments, body.faces, body.vertices)
    normal = interpolate(fragments, body.faces, vertex_normals(body.vertices, body.faces))

    def follows(*names: str) -> np.ndarray:
        """Texels that follow the bones whose label starts with one of names: (K,) bool."""
        vertices = torch.from_numpy(vertices_of_bones(names)).float()
        return interpolate(fragments, body.faces, vertices[:, None])[:, 0].numpy() > 0.5

    shoulder, elbow, wrist = (torch.tensor(joint) for joint in (SHOULDER, ELBOW, WRIST))
    mirrored = torch.stack([position.abs()[:, 0], position[:, 1], position[:, 2]], -1)

    def along(start, end):
        axis = end - start
        return ((mirrored - start) @ axis / axis.square().sum()).clamp(0, 1)

    arm = 0.53 * along(shoulder, elbow) + 0.47 * along(elbow, wrist)
    is_arm = follows(*ARM_BONES)
    is_nail = np.zeros(len(arm), bool)
    reach = (mirrored @ torch.nn.functional.normalize(wrist - elbow, dim=0)).numpy()
    for side in "LR":
        for finger in range(1, 6):
            tip = follows(f"finger{finger}-3.{side}")
            if tip.any():
                is_nail |= tip & (reach > reach[tip].max() - 0.012) & (normal[:, 1].numpy() > 0.2)
    return BodyMaps(
        mask=mask.numpy(),
        texel=float(position.diff(dim=0).norm(dim=1).median()),
        position=position.numpy(),
        normal=normal.numpy(),
        arm=np.where(is_arm, arm.numpy(), -1),
        is_hand=follows("wrist", "finger", "metacarpal"),
        is_foot=follows("foot", "toe"),
        is_head=follows("head", "neck03"),
        is_neck=follows("neck"),
        is_eye=follows("eye"),
        is_nail=is_nail,
    )


@functools.lru_cache(maxsize=16)
def other_layout(number: int) -> Body:
    """Anny with texture coordinates that are not its own: the parts of the body, seen from in front and from behind,
    packed into the square in an order, turn and size that follow from number."""
    body, rng = load_anny_body(), np.random.default_rng([number, 77])
    vertices, faces = body.vertices.numpy(), body.faces.numpy()
    limbs = [vertices_of_bones(names)[faces[:, 0]] for names in (HEAD_BONES, LEG_BONES, ARM_BONES)]
    body_part = np.select(limbs, [1, 2, 3], 0)  # 0 is the torso
    centre = vertices[faces].mean(1)
    corner, along, across = vertices[faces].transpose(1, 0, 2)
    normal = np.cross(along - corner, across - corner)
    is_right_limb = (centre[:, 0] < 0) & (body_part > 1)
    chart_of_face = body_part * 4 + (normal[:, 2] < 0) * 2 + is_right_limb
    zoom = np.array([1.0, rng.uniform(1.6, 2.4), 1.0, rng.uniform(0.9, 1.2)])

    def turned_charts() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Each chart's faces, their corners (F', 3, 2) from (0, 0) on, and its size, in a new order and turn."""
        charts = []
        for index in rng.permutation(np.unique(chart_of_face)):
            chart_faces = np.flatnonzero(chart_of_face == index)
            corners = vertices[faces[chart_faces]][..., :2] * zoom[index // 4]
            _, upright = np.linalg.eigh(np.cov(corners.reshape(-1, 2).T))
            corners = corners @ upright.astype(np.float32)
            for _ in range(rng.integers(4)):
                corners = np.stack([-corners[..., 1], corners[..., 0]], -1)
            low = corners.min((0, 1))
            charts.append((chart_faces, corners - low, corners.max((0, 1)) - low))
        return charts

    def pack(charts, scale: float) -> np.ndarray | None:
        """Shelf by shelf → (F, 3, 2) in [0, 1]; None where they do not fit."""
        uvs = np.zeros((len(faces), 3, 2), np.float32)
        x, y, tall, wide = 0.0, 0.0, 0.0, 0.0
        for chart_faces, corners, size in charts:
            width, height = size * scale + 0.012
            if x + width > 1:
                x, y, tall = 0.0, y + tall, 0.0
            if width > 1 or y + height > 1:
                return None
            uvs[chart_faces] = corners * scale + (x + 0.006, y + 0.006)
            x, tall = x + width, max(tall, height)
            wide = max(wide, x)
        return uvs / (wide, y + tall)  # stretched to fill the square

    scale, uvs = 0.1, None
    for _ in range(60):  # the largest of many random packings
        charts = turned_charts()
        while (packed := pack(charts, scale)) is not None:
            scale, uvs = scale * 1.03, packed
    uvs, uv_faces = torch.from_numpy(uvs).float().view(-1, 2), torch.arange(len(faces) * 3).view(-1, 3)
    return replace(body, uvs=uvs, uv_faces=uv_faces)


def smooth_noise(points: np.ndarray, rng: np.random.Generator, scale: float, waves: int = 5) -> np.ndarray:
    """A sum of random sine waves with a wavelength of about `scale` metres. points: (K, 3) → (K,), about [-1, 1]."""
    directions = rng.normal(size=(3, waves)).astype(np.float32)
    frequency = 2 * np.pi / scale * rng.uniform(0.6, 1.5, waves).astype(np.float32)
    directions *= frequency / np.linalg.norm(directions, axis=0)
    phase = rng.uniform(0, 6.28, waves).astype(np.float32)
    return np.sin(points @ directions + phase).mean(-1) * 1.6


def grain(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random values on the integer lattice of (u, v), interpolated between: (K,) each → (K,) in [-1, 1]."""
    table = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
    column, row = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    x, y = u - column, v - row
    left, right, low, high = column & 63, (column + 1) & 63, row & 63, (row + 1) & 63
    at_low = table[low, left] * (1 - x) + table[low, right] * x
    at_high = table[high, left] * (1 - x) + table[high, right] * x
    return at_low * (1 - y) + at_high * y


def jitter(colour, rng: np.random.Generator, amount: float) -> np.ndarray:
    """A colour (3,) in [0, 255] → one a share of about `amount` away from it (3,) in [0, 1]."""
    brighter = np.array(colour, np.float32) / 255 * rng.uniform(1 - amount, 1 + amount)
    return np.clip(brighter + rng.normal(0, amount / 5, 3), 0, 1).astype(np.float32)


def pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


PLAIDS = (  # ground, band and line
    ((172, 36, 40), (26, 28, 50), (236, 220, 190)),
    ((40, 96, 66), (24, 30, 60), (230, 200, 90)),
    ((150, 110, 74), (70, 44, 36), (226, 60, 50)),
)


def fabric(style: str, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cloth of that colour or pattern, continuous in space. points: (K, 3) metres → (K, 3) in [0, 1]."""
    points = points.astype(np.float32)
    across = points[:, 0] + 0.6 * points[:, 2]
    if style in COLOURS:
        colour = np.broadcast_to(jitter(COLOURS[style], rng, 0.08), points.shape)
    elif style == "denim":
        threads = grain(across / 0.006, points[:, 1] / 0.05, rng)
        threads = threads + 0.25 * grain(across / 0.03, points[:, 1] / 0.006, rng)
        fade = smooth_noise(points, rng, 0.35)
        colour = jitter((66, 94, 138), rng, 0.10) * (1 + 0.16 * threads + 0.20 * fade)[:, None]
    elif style == "striped":
        dark = jitter(pick(rng, ((34, 44, 88), (28, 28, 32), (176, 36, 42))), rng, 0.2)
        light = jitter((238, 236, 228), rng, 0.04)
        wave = np.sin(points[:, 1] * 2 * np.pi / rng.uniform(0.12, 0.16))
        share = np.clip(0.5 + 6 * wave, 0, 1)[:, None]
        colour = dark * share + light * (1 - share)
    elif style == "plaid":
        ground, band, line = pick(rng, PLAIDS)
        period, shares = rng.uniform(0.18, 0.24), []
        for axis in (points[:, 1], across):
            wave = np.sin(axis * 2 * np.pi / period)
            shares.append((np.clip(0.5 + 6 * (wave - 0.25), 0, 1), wave < -0.94))
        (rows, row_line), (columns, column_line) = shares
        share = 0.5 * (rows + columns)[:, None]
        colour = jitter(ground, rng, 0.12) * (1 - share) + jitter(band, rng, 0.2) * share
        on_line = row_line | column_line
        colour[on_line] = 0.45 * colour[on_line] + 0.55 * jitter(line, rng, 0.1)
    else:
        colour = flowers(points, across, rng)
    # Folds, and less light where the cloth looks down.
    folds = smooth_noise(points * (1.0, 0.55, 1.0), rng, 0.13) * 0.05
    folds = folds + smooth_noise(points, rng, 0.05) * 0.025
    return np.clip(colour * (1 + folds)[:, None], 0, 1).astype(np.float32)


def flowers(points: np.ndarray, across: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Five-petalled flowers and leaves round the points of a jittered lattice."""
    ground = pick(rng, ((240, 232, 216), (30, 38, 76), (248, 214, 220), (24, 60, 50)))
    colour = np.broadcast_to(jitter(ground, rng, 0.06), points.shape).copy()
    petal_colours = ((214, 48, 92), (242, 176, 44), (150, 92, 190), (238, 240, 236))
    petals = np.array([jitter(petal_colour, rng, 0.1) for petal_colour in petal_colours])
    shift, cell = rng.uniform(0, 1, 3).astype(np.float32), np.float32(0.16)
    lattice = np.floor(points / cell + shift).astype(np.int32)
    key = (lattice @ np.array([73856093, 19349663, 83492791])) & 0xFFFF
    jumps = np.stack([key % 7 / 6, key % 11 / 10, key % 13 / 12], -1).astype(np.float32)
    offset = points - (lattice + 0.3 + 0.4 * jumps - shift) * cell
    distance = np.sqrt((offset**2).sum(-1))
    angle = np.arctan2(offset[:, 1], offset[:, 0] + 0.6 * offset[:, 2]) + key
    leaf = (distance < 0.076) & (np.cos(2 * angle) > 0.55)
    colour[leaf] = (0.20, 0.42, 0.24)
    petal = distance < 0.048 + 0.020 * np.cos(5 * angle)
    colour[petal] = petals[key % 4][petal] * (0.75 + 5 * distance[petal, None])
    colour[distance < 0.018] = (0.98, 0.86, 0.40)
    return colour


class Brush:
    """Colours and regions of the K texels, painted over one another; edges are a texel soft."""

    def __init__(self, maps: BodyMaps, rng: np.random.Generator):
        self.maps, self.rng = maps, rng
        self.colours = np.zeros((len(maps.position), 3), np.float32)
        self.regions = np.full(len(maps.position), SKIN, np.uint8)

    def inside(self, distance: np.ndarray, softness: float = 0.0) -> np.ndarray:
        """Signed distance (K,) in metres, negative inside → share (K,) in [0, 1]."""
        return np.clip(0.5 - distance / max(self.maps.texel, softness), 0, 1).astype(np.float32)

    def lay(self, share: np.ndarray, colour, region: int | None = None) -> None:
        """colour: (3,) or (K, 3); share: (K,) of it, bool or in [0, 1]."""
        painted = np.flatnonzero(share)
        amount = share[painted, None].astype(np.float32)
        colour = np.asarray(colour, np.float32)
        colour = colour[painted] if colour.ndim == 2 else colour
        self.colours[painted] += amount * (colour - self.colours[painted])
        if region is not None:
            self.regions[share > 0.5] = region

    def dim(self, share: np.ndarray, factor) -> None:
        """Multiplies by factor, a number or (3,), where share (K,) is 1, and by less where it is less."""
        painted = np.flatnonzero(share)
        amount = share[painted, None].astype(np.float32)
        self.colours[painted] *= 1 + amount * (np.asarray(factor, np.float32) - 1)

    def cloth(self, share: np.ndarray, style: str, region: int) -> None:
        painted = np.flatnonzero(share)
        colour = np.zeros_like(self.colours)
        colour[painted] = fabric(style, self.maps.position[painted], self.rng)
        colour[painted] *= 1 - 0.10 * np.clip(-self.maps.normal[painted, 1:2], 0, 1)
        self.lay(share, colour, region)


def paint(outfit: Outfit, seed: int, size: int, layout: int | None = None) -> Painting:
    """A dressed body, size x size texels, in Anny's UV layout or in another one (see `other_layout`)."""
    rng = np.random.default_rng([seed, zlib.crc32(outfit.prompt.encode())])
    maps = body_maps(size, layout)
    brush = Brush(maps, rng)
    paint_skin(brush, outfit)
    paint_shoes(brush, outfit)
    paint_bottom(brush, outfit)
    paint_top(brush, outfit)
    paint_beard(brush, outfit)
    paint_hair(brush, outfit)
    texture, regions = np.zeros((size, size, 4), np.float32), np.zeros((size, size), np.uint8)
    texture[maps.mask, :3] = np.clip(brush.colours, 0, 1)
    texture[maps.mask, 3] = 1
    regions[maps.mask] = brush.regions
    return Painting(torch.from_numpy(texture).permute(2, 0, 1).contiguous(), torch.from_numpy(regions))


def paint_skin(brush: Brush, outfit: Outfit) -> None:
    maps, rng = brush.maps, brush.rng
    points = maps.position
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    skin = jitter(ETHNICITIES[outfit.ethnicity], rng, 0.06)
    tone = 1 + 0.03 * smooth_noise(points, rng, 0.15) + 0.015 * smooth_noise(points, rng, 0.03)
    brush.colours[:] = skin * tone[:, None]
    brush.dim(maps.is_nail, (1.10, 1.04, 1.06))

    # The face, from large to small; what is round is a Gaussian of the distance.
    face = maps.is_head & (z > 0.05)

    def near(centre_x: float, height: float, width: float, tall: float) -> np.ndarray:
        return face * np.exp(-(((x - centre_x) / width) ** 2) - ((y - height) / tall) ** 2)

    brush.dim(near(0.042, 1.478, 0.018, 0.014), (1.05, 0.90, 0.90))  # cheeks
    brush.dim(near(0.0, 1.484, 0.012, 0.010), (1.04, 0.93, 0.93))  # nose
    brush.dim(near(0.009, 1.4765, 0.005, 0.0035), 0.62)  # nostrils
    brush.dim(near(0.0, 1.458, 0.004, 0.006), 0.94)
    brush.dim(near(0.030, 1.516, 0.022, 0.012) * ~maps.is_eye, 0.80)  # sockets
    female, elder = outfit.person in FEMALE, "elder" in outfit.person
    fullness = rng.uniform(0.9, 1.25) * (1.15 if female else 0.9)
    lip = skin * ((0.92, 0.52, 0.54) if female else (0.90, 0.64, 0.62))
    bow = 1 - 0.3 * np.exp(-((x / 0.005) ** 2))
    upper = np.maximum(y - MOUTH - 0.0075 * fullness * bow * (1 - (x / 0.026) ** 2), MOUTH - y)
    lower = np.maximum(MOUTH - 0.0095 * fullness * (1 - (x / 0.024) ** 2) - y, y - MOUTH)
    for distance, shade in ((upper, 0.90), (lower, 1.0)):
        share = face * brush.inside(np.where(x < 0.026, distance, 1))
        brush.lay(0.85 * share, lip * shade)
        brush.regions[share > 0.5] = DETAIL
    brush.dim(face * brush.inside(np.maximum(np.abs(y - MOUTH) - 0.0012, x - 0.024)), 0.62)
    hair = jitter(HAIR[outfit.hair], rng, 0.05) * 0.9
    arc = BROW + 0.002 - 6.0 * (x - 0.030) ** 2
    thickness = (0.0035 if female else 0.0048) * np.clip(1.15 - np.abs(x - 0.027) / 0.024, 0, 1)
    brow = face * brush.inside(np.maximum(np.abs(y - arc) - thickness, np.abs(x - 0.031) - 0.021))
    brush.lay(0.85 * brow, hair * 0.8 + skin * 0.2)
    brush.regions[brow > 0.4] = DETAIL
    lashes = np.hypot((x - EYE[0]) / 0.0175, (y - EYE[1]) / 0.0085)
    rim = face * np.clip(1 - np.abs(lashes - 1) / 0.22, 0, 1)
    brush.dim(rim * (y > EYE[1] - 0.003) * ~maps.is_eye, 0.30 if female else 0.5)
    if elder:
        lines = 0.5 + 0.5 * np.sin((y + 6 * x**2) * 2 * np.pi / 0.013)
        brush.dim(face * (y > 1.552) * (x < 0.055) * lines**4, 0.80)
        fold = np.abs(x - 0.021 - 0.42 * (1.475 - y)) - 0.0018
        brush.dim(face * brush.inside(np.maximum(fold, np.abs(y - 1.459) - 0.017), 0.003), 0.78)
        crow = np.abs(np.abs(y - 1.515) - 0.22 * (x - 0.046)) - 0.0009
        brush.dim(face * brush.inside(np.maximum(crow, np.abs(x - 0.056) - 0.008), 0.002), 0.84)
        brush.dim(near(0.030, 1.497, 0.014, 0.004), 0.84)  # bags under the eyes
    gaze = points - EYE * np.sign(points[:, :1]) ** np.array([1, 0, 0])
    radius = np.hypot(gaze[:, 0], gaze[:, 1])
    iris = pick(rng, ((92, 62, 38), (72, 96, 128), (84, 104, 70), (48, 34, 26)))
    brush.lay(maps.is_eye, (0.92, 0.91, 0.90), DETAIL)
    brush.lay(maps.is_eye * brush.inside(radius - 0.0070), jitter(iris, rng, 0.15))
    brush.lay(maps.is_eye * brush.inside(radius - 0.0032), (0.04, 0.04, 0.05))


def paint_shoes(brush: Brush, outfit: Outfit) -> None:
    maps, rng = brush.maps, brush.rng
    _, y, z = maps.position.T
    shoe = maps.is_foot * brush.inside(y - 0.085)
    if outfit.sneakers:
        brush.lay(shoe, jitter(COLOURS[outfit.sneakers], rng, 0.06), SHOES)
        white = jitter((240, 240, 238), rng, 0.03)
        brush.lay(maps.is_foot * brush.inside(y - 0.020), white)
        brush.lay(maps.is_foot * brush.inside(np.maximum(0.150 - z, y - 0.045)), white * 0.96)  # toe cap
        instep = maps.is_foot & (z > 0.05) & (z < 0.135) & (maps.normal[:, 1] > 0.5)
        brush.lay(instep & (np.mod(z, 0.02) < 0.009), white)  # laces
        stripe = brush.inside(np.abs(y - 0.045 - 0.25 * (z - 0.05)) - 0.007) * (np.abs(z - 0.05) < 0.045)
        brush.lay(maps.is_foot * stripe * (np.abs(maps.normal[:, 0]) > 0.6), white)
    else:
        leather = jitter(pick(rng, ((52, 38, 30), (28, 28, 30), (110, 72, 42), (72, 48, 36))), rng, 0.1)
        brush.lay(shoe, leather, SHOES)
        brush.lay(maps.is_foot * brush.inside(y - 0.014), leather * 0.45)
        brush.dim(maps.is_foot * brush.inside(np.abs(z - 0.115) - 0.002), 0.75)


def paint_bottom(brush: Brush, outfit: Outfit) -> None:
    maps, bottom = brush.maps, outfit.bottom
    if not bottom:
        return
    points = maps.position
    x, y, front = np.abs(points[:, 0]), points[:, 1], points[:, 2] > 0
    end = LEGS[bottom]
    worn = (maps.arm < 0) * ~maps.is_hand * brush.inside(np.maximum(y - WAIST - 0.04, end - y))
    brush.cloth(worn, outfit.bottom_style, BOTTOM)
    brush.dim(worn * brush.inside(WAIST + 0.012 - y), 0.78)  # waistband
    brush.dim(worn * brush.inside(np.abs(y - end - 0.014) - 0.002), 0.78)  # hem
    brush.dim(worn * np.exp(-((x / 0.02) ** 2) - ((y - 0.80) / 0.05) ** 2), 0.78)  # between the legs
    if bottom in ("jeans", "pants"):
        for height in (0.47, 0.44, 0.12):  # folds at knee and ankle
            wave = height + 0.012 * np.sin(points[:, 0] * 70 + height * 100)
            brush.dim(worn * np.exp(-(((y - wave) / 0.009) ** 2)), 0.91)
    if bottom == "jeans":
        thread = worn * (np.abs(maps.normal[:, 2]) < 0.16) * (x > 0.12) * (y < WAIST)
        brush.lay(0.5 * thread, (0.80, 0.58, 0.30))
        pocket = np.abs(np.hypot(x - 0.155, y - 0.955) - 0.072) - 0.003
        brush.dim(worn * front * brush.inside(pocket), 0.62)
        back_pocket = np.maximum(np.abs(x - 0.075) - 0.048, np.abs(y - 0.84) - 0.055)
        brush.dim(worn * ~front * brush.inside(np.abs(back_pocket) - 0.003), 0.68)
        worn_out = np.exp(-(((y - 0.62) / 0.12) ** 2) - ((x - 0.10) / 0.05) ** 2) * front
        brush.dim(worn * worn_out, 1.16)
    elif bottom == "pants":
        crease = np.abs(x - 0.112 + 0.02 * (0.9 - y)) - 0.002
        brush.dim(worn * front * brush.inside(crease), 0.80)
    elif bottom == "skirt":
        pleats = 0.5 + 0.5 * np.sin(np.arctan2(points[:, 0], points[:, 2]) * 26)
        brush.dim(worn * pleats**3 * (y < 0.88), 0.82)
    fly = np.maximum(np.abs(x - 0.004) - 0.002, 0.86 - y)
    brush.dim(worn * front * brush.inside(fly), 0.75)
    if bottom != "skirt":
        button = np.hypot(points[:, 0], y - WAIST - 0.022) - 0.006
        brush.lay(worn * front * brush.inside(button), (0.62, 0.56, 0.44))


def paint_top(brush: Brush, outfit: Outfit) -> None:
    maps, top, rng = brush.maps, outfit.top, brush.rng
    points = maps.position
    x, y, front = np.abs(points[:, 0]), points[:, 1], points[:, 2] > 0.02
    hem, sleeve_end = HEMS[top], SLEEVES[top]
    depth = {"dress": 0.95, "t-shirt": 0.45, "sweater": 0.45, "hoodie": 0.3}.get(top, 0.35)
    neckline = np.where(x < 0.09, NECK - depth * np.maximum(0.06 - x, 0) * front, 9)
    on_torso = (maps.arm < 0) & ~maps.is_head & ~maps.is_hand
    torso = on_torso * brush.inside(np.maximum(hem - y, y - neckline))
    sleeve = (maps.arm >= 0) * ~maps.is_hand * brush.inside((maps.arm - sleeve_end) * ARM_LENGTH)
    opening = {"polo shirt": 1.29, "blouse": 1.24, "button-down shirt": 1.31}.get(top)
    if opening is not None:
        torso = torso * (1 - front * brush.inside(np.maximum(opening - y, x - 0.42 * (y - opening))))
    worn = np.maximum(torso, sleeve)
    if top == "tuxedo":
        trousers = np.maximum(y - WAIST - 0.04, LEGS["pants"] - y)
        legs = (maps.arm < 0) * ~maps.is_hand * brush.inside(trousers)
        brush.cloth(np.maximum(worn, legs), outfit.top_style, TOP)
        satin_stripe = legs * (np.abs(maps.normal[:, 2]) < 0.10) * (x > 0.12) * (y < hem)
        brush.dim(satin_stripe, 1.35)
    else:
        brush.cloth(worn, outfit.top_style, TOP)
    cuff = np.abs((maps.arm - sleeve_end) * ARM_LENGTH + 0.016) - 0.002
    brush.dim(sleeve * brush.inside(cuff), 0.75)
    brush.dim(torso * brush.inside(np.abs(y - hem - 0.013) - 0.002), 0.75)
    armpits = np.exp(-(((x - 0.15) / 0.03) ** 2) - ((y - 1.20) / 0.05) ** 2)
    brush.dim(worn * armpits, 0.84)
    elbow = np.exp(-(((maps.arm - 0.53) / 0.05) ** 2))
    brush.dim(sleeve * elbow * (maps.normal[:, 2] > 0), 0.88)
    if top in ("shirt", "long sleeve shirt", "t-shirt", "sweater", "dress"):
        brush.dim(torso * brush.inside(np.where(x < 0.09, neckline - y - 0.014, 1)), 0.80)  # neckband
    dark = outfit.top_style in ("black", "navy", "denim", "blue", "green", "purple", "brown")
    trim = 1.3 if dark else 0.74
    if top in ("polo shirt", "button-down shirt", "blouse"):
        paint_shirt_front(brush, top, torso * front, torso, trim)
    elif top in ("jacket", "blazer", "tuxedo"):
        paint_lapels(brush, top, torso * front, trim)
    elif top == "hoodie":
        paint_hood(brush, torso * front, torso)
    if top in ("sweater", "hoodie"):
        ribs = 0.5 + 0.5 * np.sin(np.arctan2(points[:, 0], points[:, 2]) * 70)
        ends = np.maximum(torso * (y < hem + 0.05), sleeve * (maps.arm > sleeve_end - 0.11))
        brush.dim(ends * ribs, 0.86)
    if top == "sweater":
        brush.dim(worn * (0.5 + 0.5 * np.sin(y * 2 * np.pi / 0.016)), 0.93)
    if top == "dress":
        brush.dim(torso * brush.inside(np.abs(y - 1.02) - 0.012), trim)
        pleats = 0.5 + 0.5 * np.sin(np.arctan2(points[:, 0], points[:, 2]) * 18)
        brush.dim(torso * pleats**3 * (y < 0.99), 0.86)
    if top == "blazer":
        pocket = np.maximum(np.abs(x - 0.105) - 0.038, np.abs(y - 0.915) - 0.005)
        brush.dim(torso * front * brush.inside(pocket), 0.65)
    if top == "jacket":
        pocket = np.maximum(np.abs(x - 0.09 - 0.25 * (y - 0.96)) - 0.003, np.abs(y - 0.96) - 0.05)
        brush.dim(torso * front * brush.inside(pocket), 0.6)
    if rng.uniform() < 0.3 and top in ("polo shirt", "button-down shirt"):
        pocket = np.maximum(np.abs(points[:, 0] - 0.075) - 0.036, np.abs(y - 1.19) - 0.042)
        brush.dim(torso * front * brush.inside(np.abs(pocket) - 0.002), 0.72)


def paint_shirt_front(brush: Brush, top: str, front: np.ndarray, torso: np.ndarray, trim: float) -> None:
    """Collar, placket and buttons. torso, front: (K,) share of a texel that shows the top there; trim: a factor."""
    x, y = np.abs(brush.maps.position[:, 0]), brush.maps.position[:, 1]
    collar = np.maximum(1.335 - y - 0.35 * np.maximum(x - 0.05, 0), x - 0.10)
    brush.dim(torso * brush.inside(collar), trim)
    if top == "blouse":
        return
    lowest = 1.20 if top == "polo shirt" else HEMS[top]
    brush.dim(front * brush.inside(np.maximum(np.abs(x - 0.012) - 0.0015, lowest - y)), 0.75)
    button = np.hypot(x, np.mod(y, 0.075) - 0.0375) - 0.0055
    brush.lay(front * brush.inside(np.maximum(button, lowest + 0.01 - y)), (0.93, 0.93, 0.90), DETAIL)


def paint_lapels(brush: Brush, top: str, front: np.ndarray, trim: float) -> None:
    """What an open jacket, blazer or tuxedo shows under it, and its lapels."""
    x, y = np.abs(brush.maps.position[:, 0]), brush.maps.position[:, 1]
    lowest = {"jacket": HEMS["jacket"], "blazer": 1.10, "tuxedo": 1.06}[top]
    width = 0.022 + 0.05 * np.maximum(y - 1.2, 0) if top == "jacket" else 0.30 * (y - lowest)
    inner = front * brush.inside(np.maximum(lowest - y, x - width))
    under = (196, 198, 202) if top == "jacket" else (238, 238, 236)
    brush.lay(inner, jitter(under, brush.rng, 0.03), DETAIL)
    lapel = 0.010 if top == "jacket" else 0.034 * np.clip((y - lowest) / 0.1, 0, 1)
    brush.dim(front * (1 - inner) * brush.inside(np.maximum(lowest - y, x - width - lapel)), trim)
    brush.dim(front * (1 - inner) * brush.inside(np.abs(x - width - lapel) - 0.0015) * (y > lowest), 0.6)
    if top == "jacket":
        brush.dim(front * brush.inside(np.abs(x - width) - 0.002), 0.6)  # zip
        return
    brush.dim(front * brush.inside(np.maximum(x - 0.0015, y - lowest)), 0.7)  # closed below
    for height in (lowest - 0.02, lowest - 0.10):
        brush.lay(front * brush.inside(np.hypot(x, y - height) - 0.007), (0.10, 0.10, 0.11), DETAIL)
    if top == "tuxedo":
        for height in (1.28, 1.21, 1.14):
            brush.lay(inner * brush.inside(np.hypot(x, y - height) - 0.004), (0.08, 0.08, 0.09))
        bow = np.maximum(np.abs(y - 1.335) - 0.005 - 0.30 * x, x - 0.042)
        brush.lay((front > 0) * brush.inside(bow), (0.07, 0.07, 0.08), DETAIL)


def paint_hood(brush: Brush, front: np.ndarray, torso: np.ndarray) -> None:
    """The hood round the neck, its strings and the pocket."""
    points = brush.maps.position
    x, y = np.abs(points[:, 0]), points[:, 1]
    hood = np.where(points[:, 2] > 0.02, 1.33 - y + 0.5 * x, 1.27 - y + 0.4 * x)
    brush.dim(torso * brush.inside(hood), 0.82)
    strings = np.maximum(np.abs(x - 0.022) - 0.003, np.abs(y - 1.26) - 0.055)
    brush.lay(front * brush.inside(strings), (0.92, 0.92, 0.90))
    pocket = np.maximum(np.abs(y - 0.955) - 0.065, x - 0.14 + 0.7 * np.maximum(y - 0.95, 0))
    brush.dim(front * brush.inside(np.abs(pocket) - 0.003), 0.66)


def paint_beard(brush: Brush, outfit: Outfit) -> None:
    """Cheeks below the sideburns, chin and upper lip, in the hair's colour; no region, for words say little of it."""
    if not outfit.beard:
        return
    maps, rng = brush.maps, brush.rng
    points = maps.position
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    ragged = 0.003 * grain(points[:, 0] / 0.004, y / 0.006, rng)
    cheeks = np.maximum(y - 1.452 - 1.2 * np.maximum(x - 0.024, 0) - ragged, 1.39 - y)
    moustache = np.maximum(np.abs(y - 1.461 + 2.5 * x**2) - 0.006 - ragged, x - 0.036)
    lips = np.hypot(x / 0.026, (y - MOUTH + 0.001) / 0.010) - 1
    worn = np.maximum(np.minimum(cheeks, moustache), -0.01 * lips)
    strands = 0.22 * grain(points[:, 0] / 0.004, y / 0.012, rng)
    colour = jitter(HAIR[outfit.hair], rng, 0.08) * (1 + strands)[:, None]
    share = maps.is_head * (z > 0.015) * (x < 0.074) * brush.inside(worn, 0.004)
    brush.lay(0.9 * share, np.clip(colour, 0, 1), DETAIL)


def paint_hair(brush: Brush, outfit: Outfit) -> None:
    if outfit.hair_cut == "bald":
        return
    maps, rng = brush.maps, brush.rng
    points = maps.position
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    is_long = outfit.has_long_hair
    ragged = 0.004 * grain(points[:, 0] / 0.004, z / 0.02, rng)
    ragged = ragged + 0.004 * np.sin(points[:, 0] * rng.uniform(60, 110))
    hairline = rng.uniform(1.567, 1.582) + ragged - 0.5 * np.maximum(x - 0.045, 0)
    # Signed distances: above the hairline in front; behind the ears down to the nape.
    cap = hairline - y
    sides = np.maximum(z - 0.045 - ragged, 1.505 - y)
    nape = np.maximum(z, (1.30 if is_long else 1.452) - y)
    scalp = maps.is_head * brush.inside(np.minimum(np.minimum(cap, sides), nape), 0.006)
    ears = maps.is_head & (x > 0.078) & (y < 1.545) & (z > -0.02)
    if is_long:
        length = rng.uniform(1.24, 1.40)
        falls = np.maximum(np.maximum(length + ragged - y, y - 1.46), np.maximum(z + 0.02, x - 0.10))
        framing = np.minimum(np.maximum(0.060 + ragged - x, z - 0.075), z - 0.035)
        scalp = np.maximum(scalp, maps.is_head * brush.inside(np.maximum(framing, length - y), 0.006))
        behind_neck = brush.inside(np.maximum(z + 0.005, length - y), 0.006)
        scalp = np.maximum(scalp, (maps.is_neck & ~maps.is_head) * behind_neck)
        scalp = np.maximum(scalp, (maps.arm < 0) * brush.inside(falls, 0.006))
    else:
        scalp = scalp * ~ears
    scalp = scalp * ~maps.is_eye
    angle = np.arctan2(points[:, 0], z - 0.03)
    flow = angle * 26 + 2.5 * smooth_noise(points, rng, 0.10)
    strands = 0.13 * grain(flow, y / 0.05, rng) + 0.09 * grain(flow * 2.7, y / 0.03, rng)
    shine = 0.16 * np.exp(-(((maps.normal[:, 1] - 0.55) / 0.18) ** 2))
    colour = jitter(HAIR[outfit.hair], rng, 0.08) * (1 + strands + shine)[:, None]
    brush.lay(scalp, np.clip(colour + 0.02 * shine[:, None], 0, 1), HAIR_REGION)


def generic_picture(rng: np.random.Generator, size: int) -> torch.Tensor:
    """A patchwork of fabrics, skin and hair tones with soft shading, no body in it → (3, size, size) in [0, 1]."""
    line = np.linspace(0, 1, size)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    seeds = rng.uniform(0, 1, (rng.integers(2, 14), 2))
    warp = 0.05 * rng.normal(size=2) * np.sin(grid[:, ::-1] * rng.uniform(4, 30))
    patch = (((grid + warp)[:, None] - seeds) ** 2).sum(-1).argmin(1)
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
