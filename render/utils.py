"""Bodies, cameras and a plain PyTorch rasteriser.

Axes: the world is in metres, y up, a body looks along +z. Cameras follow OpenCV (x right, y down,
z forward). Pixel (row 0, column 0) covers [0, 1) x [0, 1), so its centre is (0.5, 0.5).
UV coordinates are in [0, 1] with v up: texel row 0 of a texture is v = 1.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError, reason

NEAR = 0.05  # metres; triangles that reach nearer than this to the camera are not drawn
MAX_CANDIDATES = 30_000_000  # (triangle, pixel) pairs tested at once, about 2 GB


@dataclass(frozen=True)
class Body:
    """A triangle mesh with texture coordinates.

    vertices: (V, 3) float32 metres. faces: (F, 3) int64 into vertices.
    uvs: (T, 2) float32 in [0, 1]. uv_faces: (F, 3) int64 into uvs, the corners in the order of faces.
    """

    vertices: Tensor
    faces: Tensor
    uvs: Tensor
    uv_faces: Tensor

    def to(self, device) -> "Body":
        return Body(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Cameras:
    """N pinhole cameras. rotation: (N, 3, 3) world to camera; translation: (N, 3); focal: (N,) in image heights."""

    rotation: Tensor
    translation: Tensor
    focal: Tensor

    def project(self, vertices: Tensor, height: int, width: int) -> Tensor:
        """vertices: (V, 3) or (N, V, 3) world → (N, V, 3): pixel x, pixel y, depth in metres."""
        points = vertices @ self.rotation.transpose(1, 2) + self.translation[:, None]
        depth = points[..., 2:]
        scale = self.focal[:, None, None] * height / depth
        centre = points.new_tensor([width / 2, height / 2])
        return torch.cat([points[..., :2] * scale + centre, depth], dim=-1)


@dataclass(frozen=True)
class Fragments:
    """What each pixel of N pictures sees.

    face_index: (N, H, W) int64, -1 where nothing is. barycentrics: (N, H, W, 3), perspective-correct, sum 1.
    depth: (N, H, W) metres, infinite where nothing is.
    """

    face_index: Tensor
    barycentrics: Tensor
    depth: Tensor

    @property
    def mask(self) -> Tensor:
        return self.face_index >= 0


def load_body(spec: str) -> Body:
    """Body from a spec: "anny" (the free embedded body) or "obj:PATH" (any mesh with UVs, y up).

    Raises UserError when the spec is unknown, the file is missing, or the mesh cannot carry a texture.
    """
    kind, _, path = spec.partition(":")
    if spec == "anny":
        return load_anny_body()
    if kind == "obj" and path:
        return read_obj(path)
    raise UserError(f"unknown body {spec!r}: use 'anny' or 'obj:PATH'")


@functools.lru_cache(maxsize=1)
def load_anny():
    """The Anny body model (Apache-2.0, assets CC0), which ships its data inside the wheel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anny

        return anny.Anny(skinning_method="lbs").eval()


@functools.lru_cache(maxsize=32)
def load_anny_body(**phenotype: float) -> Body:
    """Anny in its rest pose, feet at y = 0. phenotype: gender, age, weight, ... each in [0, 1]."""
    model = load_anny()
    with torch.no_grad():
        vertices = model(phenotype_kwargs=phenotype)["vertices"][0].float()
    x, y, z = vertices.unbind(-1)
    vertices = torch.stack([x, z, -y], dim=-1)  # Anny has z up and looks along -y
    vertices[:, 1] -= vertices[:, 1].min()
    return Body(
        vertices,
        model.faces.long(),
        model.texture_coordinates.float(),
        model.face_texture_coordinate_indices.long(),
    )


def read_obj(path: str) -> Body:
    """Wavefront OBJ with texture coordinates; polygons become triangle fans.

    Read here and not by a mesh library because those split vertices along UV seams, which breaks smooth
    normals and hides which texels face each other across a seam.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read mesh {path}: {reason(error)}; give the path of an .obj file") from None
    vertices, uvs, faces, uv_faces = [], [], [], []
    for number, line in enumerate(lines, 1):
        kind, *fields = line.split() or [""]
        try:
            if kind == "v":
                vertices.append([float(field) for field in fields[:3]])
            elif kind == "vt":
                uvs.append([float(field) for field in fields[:2]])
            elif kind == "f":
                corners = [[int(index) for index in field.split("/")[:2]] for field in fields]
                if any(len(corner) < 2 for corner in corners):
                    raise ValueError("a face has no texture coordinates")
                for a, b in pairwise(corners[1:]):
                    triangle = [corners[0], a, b]
                    faces.append([v - 1 if v > 0 else len(vertices) + v for v, _ in triangle])
                    uv_faces.append([t - 1 if t > 0 else len(uvs) + t for _, t in triangle])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; give an OBJ mesh with UVs (v, vt and f a/b)") from None
    if not faces:
        raise UserError(f"{path} holds no faces; give an OBJ mesh with UVs (v, vt and f a/b)")
    if any(len(row) != 3 for row in vertices) or any(len(row) != 2 for row in uvs):
        raise UserError(f"{path} has a vertex without 3 or a texture coordinate without 2 numbers")
    body = Body(torch.tensor(vertices), torch.tensor(faces), torch.tensor(uvs), torch.tensor(uv_faces))
    for indices, points, name in ((body.faces, body.vertices, "vertex"), (body.uv_faces, body.uvs, "UV")):
        if indices.min() < 0 or indices.max() >= len(points):
            raise UserError(f"{path} has a face whose {name} index is outside the {len(points)} in the file")
        if not points.isfinite().all():
            raise UserError(f"{path} has a {name} that is not a finite number")
    return body


def look_at(eye: Tensor, target: Tensor, fov_degrees: Tensor) -> Cameras:
    """Cameras at eye (N, 3) that look at target (N, 3), y up; fov_degrees: (N,) vertical field of view."""
    forward = F.normalize(target - eye, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, torch.tensor([[0.0, 1.0, 0.0]]).to(eye).expand_as(eye)), dim=-1)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=1)
    translation = -(rotation @ eye[..., None])[..., 0]
    return Cameras(rotation, translation, 0.5 / torch.tan(torch.deg2rad(fov_degrees) / 2))


def orbit_cameras(
    body: Body, azimuth: Tensor, elevation: Tensor, fov_degrees: Tensor, fill: float = 0.9, aspect: float = 1.0
) -> Cameras:
    """Cameras round a body at azimuth and elevation (N,) degrees; azimuth 0 sees the front, 90 its left side.

    fill: share of the picture, in height or in width, that the body takes from every side. aspect: width / height.
    """
    low, high = body.vertices.amin(0), body.vertices.amax(0)
    centre = (low + high) / 2
    radius = (body.vertices - centre)[:, [0, 2]].norm(dim=-1).amax()
    half_extent = torch.maximum((high - low)[1] / 2, radius / aspect)
    distance = half_extent / (torch.tan(torch.deg2rad(fov_degrees) / 2) * fill) + (high - low)[2] / 2
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    direction = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], dim=-1)
    return look_at(centre + direction * distance[:, None], centre.expand_as(direction), fov_degrees)


def rasterize(vertices: Tensor, faces: Tensor, cameras: Cameras, height: int, width: int) -> Fragments:
    """The nearest triangle in each pixel, both sides drawn.

    vertices: (V, 3) or (N, V, 3) world; faces: (F, 3); N cameras → Fragments of (N, height, width).
    """
    return _rasterize_points(cameras.project(vertices, height, width), faces, height, width)


@functools.lru_cache(maxsize=8)
def rasterize_uv(body: Body, size: int) -> Fragments:
    """Which triangle covers each texel of a size x size texture → Fragments of (1, size, size)."""
    u, v = body.uvs.unbind(-1)
    points = torch.stack([u * size, (1 - v) * size, torch.ones_like(u)], dim=-1)
    return _rasterize_points(points[None], body.uv_faces, size, size)


def _rasterize_points(points: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """points: (N, V, 3) pixel x, pixel y, depth. Tests each triangle on its bounding box, keeps the nearest."""
    views, device = len(points), points.device
    corners = points[:, faces]  # (N, F, 3, 3)
    xy, depth = corners[..., :2], corners[..., 2]
    limit = torch.tensor([width - 1, height - 1], device=device)
    usable = (depth.amin(-1) > NEAR) & xy.isfinite().flatten(2).all(-1)
    xy = torch.where(usable[..., None, None], xy, -1.0)
    low = (xy.amin(2) - 0.5).ceil().clamp(-1e6, 1e6).long().clamp(min=0)  # (N, F, 2)
    high = torch.minimum((xy.amax(2) - 0.5).floor().clamp(-1e6, 1e6).long(), limit)
    extent = (high - low + 1).clamp(min=0)
    counts = (extent.prod(-1) * usable).flatten()  # (N*F,)
    total = int(counts.sum())
    if total > MAX_CANDIDATES and views > 1:
        halves = (_rasterize_points(half, faces, height, width) for half in points.tensor_split(2))
        first, second = ([part.face_index, part.barycentrics, part.depth] for part in halves)
        return Fragments(*(torch.cat(pair) for pair in zip(first, second)))

    triangle = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=total)
    offset = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[triangle]
    box_width = extent[..., 0].flatten()[triangle]
    box_low = low.flatten(0, 1)[triangle]
    column = box_low[:, 0] + offset % box_width
    row = box_low[:, 1] + torch.div(offset, box_width, rounding_mode="floor")

    flat_xy, flat_depth = xy.flatten(0, 1), depth.flatten(0, 1)
    weights = _screen_barycentrics(flat_xy[triangle], column, row)
    inside = (weights >= 0).all(-1)
    triangle, column, row, weights = triangle[inside], column[inside], row[inside], weights[inside]
    pixel_depth = 1 / (weights / flat_depth[triangle]).sum(-1)
    view = torch.div(triangle, len(faces), rounding_mode="floor")
    pixel = (view * height + row) * width + column

    # One integer holds depth above and triangle below: positive floats sort like their bits.
    key = (pixel_depth.contiguous().view(torch.int32).long() << 32) | (triangle - view * len(faces))
    empty = torch.iinfo(torch.int64).max
    nearest = torch.full((views * height * width,), empty, device=device)
    nearest.scatter_reduce_(0, pixel, key, "amin")

    seen = (nearest != empty).nonzero()[:, 0]
    face = nearest[seen] & 0xFFFFFFFF
    view = torch.div(seen, height * width, rounding_mode="floor")
    triangle = view * len(faces) + face
    row, column = torch.div(seen, width, rounding_mode="floor") % height, seen % width
    weights = _screen_barycentrics(flat_xy[triangle].double(), column, row) / flat_depth[triangle]
    inverse_depth = weights.sum(-1, keepdim=True)

    face_index = torch.full((views * height * width,), -1, device=device)
    face_index[seen] = face
    barycentrics = points.new_zeros(views * height * width, 3)
    barycentrics[seen] = (weights / inverse_depth).to(points)
    pixels_depth = points.new_full((views * height * width,), math.inf)
    pixels_depth[seen] = (1 / inverse_depth[:, 0]).to(points)
    shape = (views, height, width)
    return Fragments(face_index.view(shape), barycentrics.view(*shape, 3), pixels_depth.view(shape))


def _screen_barycentrics(corners: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """corners: (K, 3, 2) pixels; the centre of pixel (column, row) → (K, 3), negative outside, NaN if degenerate."""
    a, b, c = (corners - torch.stack([column, row], -1)[:, None] - 0.5).unbind(1)

    def cross(p, q):
        return p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]

    areas = torch.stack([cross(b, c), cross(c, a), cross(a, b)], dim=-1)
    return areas / areas.sum(-1, keepdim=True)


def interpolate(fragments: Fragments, faces: Tensor, values: Tensor) -> Tensor:
    """Corner values (V, C) at each pixel → (N, H, W, C), zero where nothing is."""
    mask = fragments.mask
    corners = values[faces[fragments.face_index[mask]]]  # (K, 3, C), covered pixels only
    dense = values.new_zeros(*mask.shape, values.shape[-1])
    dense[mask] = (fragments.barycentrics[mask][..., None] * corners).sum(-2)
    return dense


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Smooth unit normals, weighted by triangle area. vertices: (V, 3) → (V, 3)."""
    a, b, c = vertices[faces].unbind(1)
    face_normals = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for corner in range(3):
        normals.index_add_(0, faces[:, corner], face_normals)
    return F.normalize(normals, dim=-1)


@dataclass(frozen=True)
class Lights:
    """One directional light a view over an ambient term. direction: (N, 3) unit, towards the light; rest (N,)."""

    direction: Tensor
    ambient: Tensor
    strength: Tensor


def studio_lights(cameras: Cameras) -> Lights:
    """Soft light from above the camera's left shoulder, the same for every view."""
    towards = torch.tensor([-0.35, -0.45, -1.0]).to(cameras.rotation)
    direction = F.normalize(towards @ cameras.rotation, dim=-1)  # camera axes to world
    count = len(cameras.focal)
    return Lights(direction, direction.new_full((count,), 0.45), direction.new_full((count,), 0.6))


def shade(fragments: Fragments, body: Body, textures: Tensor, lights: Lights, background: Tensor) -> Tensor:
    """Pictures of a textured body.

    textures: (1 or N, 3, S, S) in [0, 1], filled outside the UV islands so that none bleeds in (see
    `fill_outside`); background: (N, 3) → (N, 3, H, W) in [0, 1].
    """
    uv = interpolate(fragments, body.uv_faces, body.uvs)
    grid = torch.stack([uv[..., 0] * 2 - 1, 1 - uv[..., 1] * 2], dim=-1)
    textures = textures.expand(len(grid), -1, -1, -1)
    colours = F.grid_sample(textures, grid, mode="bilinear", padding_mode="border", align_corners=False)

    normals = interpolate(fragments, body.faces, vertex_normals(body.vertices, body.faces))
    facing = (F.normalize(normals, dim=-1) * lights.direction[:, None, None]).sum(-1)
    # Half-Lambert (Valve, 2004): light wraps round the body, so that no side is black.
    wrapped = (0.5 + 0.5 * facing).square()
    light = lights.ambient[:, None, None] + lights.strength[:, None, None] * wrapped
    colours = (colours * light[:, None]).clamp(0, 1)
    return torch.where(fragments.mask[:, None], colours, background[:, :, None, None])


def render_views(
    body: Body, textures: Tensor, cameras: Cameras, height: int, width: int,
    lights: Lights | None = None, background: Tensor | None = None, supersample: int = 2,
) -> Tensor:  # fmt: skip
    """Anti-aliased pictures: drawn `supersample` times larger and averaged down → (N, 3, height, width) in [0, 1].

    textures: (1 or N, 3, S, S) in [0, 1]. Without lights or background: studio light on white.
    """
    lights = lights or studio_lights(cameras)
    background = textures.new_ones(len(cameras.focal), 3) if background is None else background
    fragments = rasterize(body.vertices, body.faces, cameras, height * supersample, width * supersample)
    pictures = shade(fragments, body, textures, lights, background)
    return F.avg_pool2d(pictures, supersample) if supersample > 1 else pictures


def uv_mask(body: Body, size: int) -> Tensor:
    """Texels whose centre lies on a UV island → (size, size) bool."""
    return rasterize_uv(body, size).mask[0]


def fill_outside(texture: Tensor, mask: Tensor) -> Tensor:
    """Colours the texels outside `mask` from the nearest islands, by the pull-push pyramid (Gortler et al. 1996).

    texture: (C, S, S); mask: (S, S) bool → (C, S, S), unchanged inside the mask. An empty mask changes nothing.
    """
    if not mask.any():
        return texture
    weight = mask.to(texture)[None, None]
    levels = [(texture[None] * weight, weight)]
    while min(levels[-1][1].shape[-2:]) > 1:
        levels.append(tuple(F.avg_pool2d(part, 2, ceil_mode=True, count_include_pad=False) for part in levels[-1]))
    filled = levels[-1][0] / levels[-1][1]
    for colour, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, size=colour.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(weight > 0, colour / weight.clamp(min=1e-8), coarse)
    return torch.where(mask, texture, filled[0])
