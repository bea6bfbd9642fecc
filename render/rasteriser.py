"""Cameras, a plain PyTorch rasteriser, lights and shading.

Axes: the world is in metres, y up, a body looks along +z. Cameras follow OpenCV (x right, y down,
z forward). Pixel (row 0, column 0) covers [0, 1) x [0, 1), so its centre is (0.5, 0.5).
UV coordinates are in [0, 1] with v up: texel row 0 of a texture is v = 1.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from render.bodies import Body
from render.rigs import load_body  # noqa: F401  offered here

NEAR = 0.05  # metres; triangles that reach nearer than this to the camera are not drawn
MAX_CANDIDATES = 30_000_000  # (triangle, pixel) pairs tested at once, about 1 GB
SAMPLES_A_SIDE = (2, 4, 6, 8, 12, 16, 24, 32)  # of a texture, in a pixel; even, so that fine checks average out
MAX_SAMPLED = 5_000_000  # samples of all textures at once


@dataclass(frozen=True)
class Cameras:
    """N pinhole cameras. rotation: (N, 3, 3) world to camera; translation: (N, 3); focal: (N,) in image heights."""

    rotation: Tensor
    translation: Tensor
    focal: Tensor

    def to(self, device) -> "Cameras":
        return Cameras(self.rotation.to(device), self.translation.to(device), self.focal.to(device))

    def take(self, index: Tensor) -> "Cameras":
        """Those that index (M,) names, in its order."""
        return Cameras(self.rotation[index], self.translation[index], self.focal[index])

    def project(self, vertices: Tensor, height: int, width: int) -> Tensor:
        """vertices: (V, 3) or (N, V, 3) world → (N, V, 3): pixel x, pixel y, depth in metres."""
        points = vertices @ self.rotation.transpose(1, 2) + self.translation[:, None]
        depth = points[..., 2:]
        scale = self.focal[:, None, None] * height / depth
        centre = points.new_tensor([width / 2, height / 2])
        return torch.cat([points[..., :2] * scale + centre, depth], dim=-1)


@dataclass(frozen=True)
class Fragments:
    """What the pixels of N pictures see: K of the N * H * W pixels see a triangle.

    pixel: (K,) int64, ascending, (view * H + row) * W + column. face: (K,) int64. area: (K,) of the triangle in
    pixels. The rest of a picture's pixels see nothing. barycentrics: (K, 3), perspective-correct, sum 1. depth: (K,)
    metres. `face_index` (N, H, W), -1 where nothing is, and `mask` (N, H, W) hold a place for every pixel.
    """

    shape: tuple[int, int, int]
    pixel: Tensor
    face: Tensor
    barycentrics: Tensor
    depth: Tensor
    area: Tensor

    def dense(self, values: Tensor, empty: float = 0) -> Tensor:
        """(K, ...) → (N, H, W, ...), `empty` where nothing is."""
        out = values.new_full((math.prod(self.shape), *values.shape[1:]), empty)
        out[self.pixel] = values
        return out.view(*self.shape, *values.shape[1:])

    @property
    def view(self) -> Tensor:
        """(K,) the picture that each pixel is in."""
        return torch.div(self.pixel, self.shape[1] * self.shape[2], rounding_mode="floor")

    @functools.cached_property
    def face_index(self) -> Tensor:
        return self.dense(self.face, -1)

    @functools.cached_property
    def mask(self) -> Tensor:
        return self.face_index >= 0


def look_at(eye: Tensor, target: Tensor, fov_degrees: Tensor) -> Cameras:
    """Cameras at eye (N, 3) that look at target (N, 3), y up; fov_degrees: (N,) vertical field of view."""
    forward = F.normalize(target - eye, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, torch.tensor([[0.0, 1.0, 0.0]]).to(eye).expand_as(eye)), dim=-1)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=1)
    translation = -(rotation @ eye[..., None])[..., 0]
    return Cameras(rotation, translation, 0.5 / torch.tan(torch.deg2rad(fov_degrees) / 2))


def orbit_direction(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Degrees (N,) → unit vectors (N, 3) from a body towards the camera; azimuth 0 is in front, 90 on its left."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    return torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], dim=-1)


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
    direction = orbit_direction(azimuth, elevation)
    return look_at(centre + direction * distance[:, None], centre.expand_as(direction), fov_degrees)


def rasterize(
    vertices: Tensor, faces: Tensor, cameras: Cameras, height: int, width: int, back_faces: bool = True
) -> Fragments:
    """The nearest triangle in each pixel.

    vertices: (V, 3) or (N, V, 3) world; faces: (F, 3); N cameras → Fragments of (N, height, width). back_faces:
    False leaves out triangles seen from behind, which on a closed body (`Body.is_closed`) changes nothing.
    """
    return _rasterize_points(cameras.project(vertices, height, width), faces, height, width, back_faces)


@functools.lru_cache(maxsize=8)
def rasterize_uv(body: Body, size: int) -> Fragments:
    """Which triangle covers each texel of a size x size texture → Fragments of (1, size, size)."""
    u, v = body.uvs.unbind(-1)
    points = torch.stack([u * size, (1 - v) * size, torch.ones_like(u)], dim=-1)
    return _rasterize_points(points[None], body.uv_faces, size, size, back_faces=True)


def _rasterize_points(points: Tensor, faces: Tensor, height: int, width: int, back_faces: bool) -> Fragments:
    """points: (N, V, 3) pixel x, pixel y, depth.

    Cuts each triangle into the spans of pixels that its rows cover, and keeps the nearest in each pixel. A pixel is
    covered when its centre is; an edge shared by two triangles gives both the same crossing, so that none is missed.
    """
    triangles = _visible_triangles(points, faces, height, width, back_faces)
    spans = _cut_into_spans(triangles, width)
    if int(spans.count.sum()) > MAX_CANDIDATES and len(points) > 1:
        halves = [_rasterize_points(half, faces, height, width, back_faces) for half in points.tensor_split(2)]
        return _join(*halves)
    view, row, column, triangle = _nearest_triangles(triangles, spans, len(points))
    pixel = (view * height + row) * width + column
    barycentrics, depth = _surface(triangles, triangle, column + 0.5, row + 0.5)
    face, area = _take(triangles.face, triangle), _take(triangles.doubled_area.abs() / 2, triangle)
    return Fragments((len(points), height, width), pixel, face, barycentrics, depth, area)


@dataclass(frozen=True)
class _Triangles:
    """T triangles on the screen. view, face: (T,) int64. x, y, inverse_depth: (3, T), of the corners. doubled_area:
    (T,), negative for the front, as y is down. first_row, last_row: (T,) the pixel rows covered are first .. last - 1.
    """

    view: Tensor
    face: Tensor
    x: Tensor
    y: Tensor
    inverse_depth: Tensor
    doubled_area: Tensor
    first_row: Tensor
    last_row: Tensor


@dataclass(frozen=True)
class _Spans:
    """S runs of pixels. owner: (S,) the triangle; row, start: (S,) pixel row and first column; count: (S,) pixels."""

    owner: Tensor
    row: Tensor
    start: Tensor
    count: Tensor


def _visible_triangles(points: Tensor, faces: Tensor, height: int, width: int, back_faces: bool) -> _Triangles:
    """Those that cover a pixel centre, perhaps, in front of the camera."""
    index = faces.T[:, None] + torch.arange(len(points), device=points.device)[:, None] * points.shape[1]
    # Each coordinate apart, (3, N * F): one corner after the other.
    x, y, depth = (_take(part, index.flatten()).view(3, -1) for part in points.flatten(0, 1).unbind(-1))
    doubled_area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
    first_column, first_row = ((part.amin(0) - 0.5).ceil().clamp(min=0) for part in (x, y))
    last_column, last_row = ((part.amax(0) - 0.5).ceil().clamp(max=end) for part, end in ((x, width), (y, height)))
    usable = (first_column < last_column) & (first_row < last_row) & (depth.amin(0) > NEAR)
    usable &= (x + y + depth).isfinite().all(0)
    usable &= (doubled_area != 0) if back_faces else (doubled_area < 0)
    kept = usable.nonzero()[:, 0]
    view = torch.div(kept, len(faces), rounding_mode="floor")
    x, y, depth = (part.index_select(1, kept) for part in (x, y, depth))
    rest = (_take(part, kept) for part in (doubled_area, first_row, last_row))
    return _Triangles(view, kept - view * len(faces), x, y, 1 / depth, *rest)


def _cut_into_spans(triangles: _Triangles, width: int) -> _Spans:
    """A span for each row of pixel centres in each triangle: from the edge between its highest and its lowest corner
    to the edge above, or below, the corner between."""
    (ax, ay), (bx, by), (cx, cy) = _downwards(triangles)
    device, rows = ax.device, (triangles.last_row - triangles.first_row).long()
    owner = torch.repeat_interleave(torch.arange(len(rows), device=device), rows)
    row = torch.arange(len(owner), device=device) + _take(triangles.first_row.long() - rows.cumsum(0) + rows, owner)
    slopes = ((cx - ax) / (cy - ay), (bx - ax) / (by - ay), (cx - bx) / (cy - by))
    ax, ay, bx, by, whole, upper, lower = (_take(part, owner) for part in (ax, ay, bx, by, *slopes))
    # Each edge from its upper end, so that the triangles on both its sides find the same crossing.
    below_a, below_b = row + 0.5 - ay, row + 0.5 - by
    one, other = ax + below_a * whole, torch.where(below_b < 0, ax + below_a * upper, bx + below_b * lower)
    start = (torch.minimum(one, other) - 0.5).ceil().clamp(min=0)
    count = ((torch.maximum(one, other) - 0.5).ceil().clamp(max=width) - start).clamp(min=0).long()
    kept = (count > 0).nonzero()[:, 0]
    return _Spans(*(_take(part, kept) for part in (owner, row, start, count)))


def _downwards(triangles: _Triangles) -> list[tuple[Tensor, Tensor]]:
    """(x, y) of the highest, the middle and the lowest corner on the screen, (T,) each."""
    corners = list(zip(triangles.x, triangles.y))
    for first, second in ((0, 1), (1, 2), (0, 1)):
        (ax, ay), (bx, by) = corners[first], corners[second]
        swapped = ay > by
        corners[first] = torch.where(swapped, bx, ax), torch.where(swapped, by, ay)
        corners[second] = torch.where(swapped, ax, bx), torch.where(swapped, ay, by)
    return corners


def _nearest_triangles(triangles: _Triangles, spans: _Spans, views: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """View, row and column (K,) of the pixels that see a triangle, in this order, and the nearest one (K,) there."""
    x, y, inverse = triangles.x, triangles.y, triangles.inverse_depth
    # 1 / depth is linear on the screen (Blinn 1992): its value at a span's first pixel and its step to the next.
    (ab, ac), rise = (x[1:] - x[0], y[1:] - y[0]), inverse[1:] - inverse[0]
    along_x = (rise[0] * ac[1] - rise[1] * ac[0]) / triangles.doubled_area
    along_y = (rise[1] * ab[0] - rise[0] * ab[1]) / triangles.doubled_area
    origin = inverse[0] - x[0] * along_x - y[0] * along_y
    along_x, along_y, origin, highest, view = (
        _take(part, spans.owner) for part in (along_x, along_y, origin, inverse.amax(0), triangles.view)
    )
    at_start = origin + (spans.start + 0.5) * along_x + (spans.row + 0.5) * along_y
    # Only the part of the pictures where something is, in any of them.
    top, left, height, width = _bounds(spans)
    first_place = (view * height + spans.row - top) * width + spans.start.long() - left

    # One integer holds 1 / depth above and the triangle below: positive floats sort like their bits.
    total, device = int(spans.count.sum()), x.device
    span = torch.repeat_interleave(torch.arange(len(spans.count), device=device), spans.count, output_size=total)
    step = torch.arange(total, device=device) - _take(spans.count.cumsum(0) - spans.count, span)
    nearness = _take(at_start, span) + step * _take(along_x, span)
    nearness = torch.minimum(nearness.nan_to_num(0).clamp(min=1e-12), _take(highest, span))  # slivers run away
    key = (nearness.view(torch.int32).long() << 32) | _take(spans.owner, span)
    buffer = torch.full((views * height * width,), -1, device=device)
    buffer.scatter_reduce_(0, _take(first_place, span) + step, key, "amax")
    place = (buffer >= 0).nonzero()[:, 0]
    row = torch.div(place, width, rounding_mode="floor")
    view = torch.div(row, height, rounding_mode="floor")
    return view, row - view * height + top, place - row * width + left, _take(buffer, place) & 0xFFFFFFFF


def _bounds(spans: _Spans) -> tuple[int, int, int, int]:
    """First row, first column, height and width of what the spans cover; 0 where there are none."""
    if not len(spans.row):
        return 0, 0, 0, 0
    ends = spans.row.min(), spans.start.min(), spans.row.max() + 1, (spans.start + spans.count).max()
    top, left, bottom, right = torch.stack([end.long() for end in ends]).tolist()
    return top, left, bottom - top, right - left


def _surface(triangles: _Triangles, triangle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Perspective-correct barycentrics (K, 3) and depth (K,) of the triangles (K,) at the points x, y (K,)."""
    (bx, cx), (by, cy) = triangles.x[1:] - triangles.x[0], triangles.y[1:] - triangles.y[0]
    # Barycentric coordinates are linear on the screen; over depth, they are those of the surface.
    slopes = (part / triangles.doubled_area for part in (cy, cx, by, bx))
    parts = (triangles.x[0], triangles.y[0], *slopes, *triangles.inverse_depth)
    ax, ay, b_along_x, b_along_y, c_along_x, c_along_y, *inverse_depth = (_take(part, triangle) for part in parts)
    x, y = x - ax, y - ay
    b, c = x * b_along_x - y * b_along_y, y * c_along_y - x * c_along_x
    weights = torch.stack([1 - b - c, b, c]).clamp(0, 1)  # a centre on an edge may lie out by a rounding
    total, weights = weights.sum(0), weights * torch.stack(inverse_depth)
    over_depth = weights.sum(0)
    return (weights / over_depth).T, total / over_depth


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values[index] along the first axis, faster than the brackets."""
    return values.index_select(0, index)


def _join(first: Fragments, second: Fragments) -> Fragments:
    """The pictures of both, the second's after the first's."""
    (views, height, width), offset = second.shape, math.prod(first.shape)
    second = replace(second, pixel=second.pixel + offset)
    parts = (torch.cat([getattr(part, name) for part in (first, second)]) for name in FRAGMENT_TENSORS)
    return Fragments((first.shape[0] + views, height, width), *parts)


FRAGMENT_TENSORS = ("pixel", "face", "barycentrics", "depth", "area")


def interpolate(fragments: Fragments, faces: Tensor, values: Tensor) -> Tensor:
    """Corner values (V, C) at each covered pixel → (K, C)."""
    return _blend_corners(fragments.barycentrics, _take(values[faces].flatten(1), fragments.face))


def _blend_corners(barycentrics: Tensor, corners: Tensor) -> Tensor:
    """barycentrics: (K, 3); corners: (K, 3 * C), the three corners' values side by side → (K, C)."""
    (a, b, c), weights = corners.chunk(3, dim=-1), barycentrics[..., None]
    return (a * weights[:, 0]).addcmul_(b, weights[:, 1]).addcmul_(c, weights[:, 2])


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Smooth unit normals, weighted by triangle area. vertices: (..., V, 3) → (..., V, 3)."""
    a, b, c = (vertices.index_select(-2, corner) for corner in faces.unbind(1))
    face_normals = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for corner in range(3):
        normals.index_add_(-2, faces[:, corner], face_normals)
    return F.normalize(normals, dim=-1)


@dataclass(frozen=True)
class Lights:
    """The light that falls on each side of a body, as a polynomial of the unit normal.

    coefficients: (N, 9, 3) of 1, x, y, z, xy, yz, zx, xx, yy in red, green and blue: the span of the spherical
    harmonics up to the second order, which holds any distant light on a matt surface to 1 % (Ramamoorthi and
    Hanrahan 2001).
    """

    coefficients: Tensor

    def at(self, normals: Tensor) -> Tensor:
        """Unit normals (V, 3) or (N, V, 3) → the light that falls there, (N, V, 3), not negative."""
        x, y, z = normals.unbind(-1)
        basis = torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, z * x, x * x, y * y], dim=-1)
        return (basis @ self.coefficients).clamp(min=0)

    def __add__(self, other: "Lights") -> "Lights":
        return Lights(self.coefficients + other.coefficients)


def ambient_light(colour: Tensor) -> Lights:
    """The same light from all sides. colour: (N, 3)."""
    return Lights(F.pad(colour[:, None], (0, 0, 0, 8)))


def directional_light(direction: Tensor, colour: Tensor) -> Lights:
    """Light from a direction, wrapped softly round the body: (0.5 + 0.5 n.d)^2 (half-Lambert, Valve 2004).

    direction: (N, 3) unit, towards the light; colour: (N, 3).
    """
    x, y, z = direction.unbind(-1)
    polynomial = torch.stack(
        [1 + z * z, 2 * x, 2 * y, 2 * z, 2 * x * y, 2 * y * z, 2 * z * x, x * x - z * z, y * y - z * z], dim=-1
    )
    return Lights(polynomial[..., None] / 4 * colour[:, None])


def from_camera(cameras: Cameras, azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit directions (N, 3) in the world, from angles (N,) in degrees seen from each camera: 0, 0 is behind it."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    towards = torch.stack(
        [azimuth.sin() * elevation.cos(), -elevation.sin(), -azimuth.cos() * elevation.cos()], dim=-1
    )  # camera axes: x right, y down, z forward
    return (towards[:, None] @ cameras.rotation)[:, 0]


def studio_lights(cameras: Cameras) -> Lights:
    """Soft light from above the camera's left shoulder, the same for every view."""
    count = torch.ones_like(cameras.focal)
    key = directional_light(from_camera(cameras, -19 * count, 23 * count), 0.6 * count[:, None].expand(-1, 3))
    return ambient_light(0.45 * count[:, None].expand(-1, 3)) + key


def sample_textures(textures: Tensor, uv: Tensor, texels_per_pixel: Tensor) -> Tensor:
    """Bilinear; a pixel wider than two texels takes the mean of samples a texel apart over all its width, so that none
    is skipped (wider than the last of SAMPLES_A_SIDE, over its middle).

    textures: (B, 3, S, S); uv: (K, 2); texels_per_pixel: (K,) along a side → (B, 3, K).
    """
    grid = torch.stack([uv[:, 0] * 2 - 1, 1 - uv[:, 1] * 2], dim=-1)
    out, wide = _sample_grid(textures, grid), (texels_per_pixel >= 2).nonzero()[:, 0]
    few = len(uv) // 50  # slanting pixels that are not worth a round of their own
    for samples in SAMPLES_A_SIDE:
        if len(wide) <= few:
            break
        is_wider = _take(texels_per_pixel, wide) >= samples + 1  # so many texels do the samples touch
        these, wide = (wide[~is_wider], wide[is_wider]) if is_wider.sum() > few else (wide, wide[:0])
        steps = (torch.arange(samples, device=grid.device) - (samples - 1) / 2) * (2 / textures.shape[-1])
        offsets = torch.cartesian_prod(steps, steps)
        for part in these.split(max(1, MAX_SAMPLED // (len(offsets) * len(textures)))):
            points = (_take(grid, part)[:, None] + offsets).flatten(0, 1)
            out[..., part] = _sample_grid(textures, points).unflatten(-1, (len(part), len(offsets))).mean(-1)
    return out


def _sample_grid(textures: Tensor, grid: Tensor) -> Tensor:
    """textures: (B, 3, S, S); grid: (K, 2) in [-1, 1] → (B, 3, K)."""
    # The CPU samples the rows of a batch at once: one texture's points go into as many rows as it has threads.
    rows = torch.get_num_threads() if len(textures) == 1 and grid.device.type == "cpu" else 1
    batch, count, length = max(rows, len(textures)), len(grid), -(-len(grid) // rows)
    grid = F.pad(grid, (0, 0, 0, rows * length - count)).view(rows, 1, length, 2)
    sampled = F.grid_sample(
        textures.expand(batch, -1, -1, -1), grid.expand(batch, -1, -1, -1), padding_mode="border", align_corners=False
    )[:, :, 0]
    return sampled if rows == 1 else sampled.transpose(0, 1).reshape(1, 3, -1)[..., :count]


@functools.lru_cache(maxsize=4)
def _uv_triangles(body: Body) -> tuple[Tensor, Tensor]:
    """Texture coordinates of each triangle's corners, (F * 3, 2), and the square root of its area there, (F,)."""
    corners = body.uvs[body.uv_faces]
    a, b, c = corners.unbind(1)
    (abx, aby), (acx, acy) = (b - a).unbind(-1), (c - a).unbind(-1)
    return corners.flatten(0, 1), ((abx * acy - acx * aby).abs() / 2).sqrt()


def shade(
    fragments: Fragments, body: Body, vertices: Tensor, textures: Tensor, lights: Lights, background: Tensor,
    supersample: int = 1,
) -> Tensor:  # fmt: skip
    """Pictures of a textured body from what `rasterize` saw.

    vertices: (V, 3) or (N, V, 3), the posed body. textures: (B, 3, S, S) in [0, 1], filled outside the UV islands so
    that none bleeds in (see `fill_outside`): one for all N views, one a view, or any number through a single view.
    background: (1 or N, 3) or (1 or N, 3, h, w). supersample: side of the block of fragments in a pixel
    → (max(B, N), 3, H / supersample, W / supersample) in [0, 1].
    """
    views, height, width = fragments.shape
    if 1 < views != len(textures) > 1:
        raise ValueError(f"{len(textures)} textures for {views} views; give one, one a view, or a single view")
    # What a triangle's corners carry, side by side: texture coordinates and light, (N, F, 3, 5). Light is smooth
    # enough to be worked out at the vertices.
    light = lights.at(vertex_normals(vertices, body.faces)).index_select(-2, body.faces.flatten())
    uvs, sides = _uv_triangles(body)
    carried = torch.cat([uvs.expand(len(light), -1, -1), light], dim=-1).view(-1, 15)
    corner = fragments.face if len(light) == 1 else fragments.view * len(body.faces) + fragments.face
    uv, light = _blend_corners(fragments.barycentrics, _take(carried, corner)).split([2, 3], dim=-1)
    density = _take(sides, fragments.face) * fragments.area.clamp(min=1e-6).rsqrt() * textures.shape[-1]
    if views == 1 or len(textures) == 1:
        colours = sample_textures(textures, uv, density)
    else:
        edges = torch.searchsorted(fragments.view, torch.arange(views + 1, device=uv.device)).tolist()
        parts = [
            sample_textures(texture[None], uv[start:end], density[start:end])
            for texture, start, end in zip(textures, edges, edges[1:])
        ]
        colours = torch.cat(parts, dim=-1)
    colours = (colours * light.T).clamp(0, 1)  # (1 or B, 3, K)

    # Each fragment is one of supersample^2 in its pixel; what none covers shows the background. (B, 3, N, h, w)
    size = (views, height // supersample, width // supersample)
    pixels, behind = math.prod(size), _full(background, *size)
    if supersample == 1:
        canvas = behind.expand(len(colours), *behind.shape[1:]).flatten(2).clone(memory_format=torch.contiguous_format)
        canvas.scatter_(2, fragments.pixel.expand_as(colours), colours)
    else:
        row, column = torch.div(fragments.pixel, width, rounding_mode="floor"), fragments.pixel % width
        row, column = (torch.div(part, supersample, rounding_mode="floor") for part in (row, column))
        pixel, share = row * size[2] + column, supersample**-2  # H divides, so that rows of two views stay apart
        uncovered = colours.new_ones(pixels).index_add_(0, pixel, colours.new_full((1,), -share).expand(len(pixel)))
        canvas = (behind.flatten(2) * uncovered).expand(len(colours), -1, -1).contiguous()
        for channel, values in zip(canvas.flatten(0, 1), (colours * share).flatten(0, 1)):
            channel.index_add_(0, pixel, values)  # by rows: adding along a later axis is many times slower
    canvas = canvas.view(len(colours), 3, *size)
    return canvas[:, :, 0] if views == 1 else canvas[0].transpose(0, 1)


def _full(background: Tensor, views: int, height: int, width: int) -> Tensor:
    """(1 or N, 3) or (1 or N, 3, height, width) → (1, 3, N, height, width)."""
    background = background[:, :, None, None] if background.dim() == 2 else background
    return background.expand(views, 3, height, width).transpose(0, 1)[None]


def render_views(
    body: Body, textures: Tensor, cameras: Cameras, height: int, width: int,
    lights: Lights | None = None, background: Tensor | None = None, supersample: int = 2,
    vertices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Anti-aliased pictures: drawn `supersample` times larger and averaged down → (N, 3, height, width) in [0, 1].

    textures: (1 or N, 3, S, S) in [0, 1], or any number for one camera. vertices: the posed body, (V, 3) or (N, V, 3);
    None: as it rests. Without lights or background: studio light on white.
    """
    lights = lights or studio_lights(cameras)
    vertices = body.vertices if vertices is None else vertices
    background = textures.new_ones(1, 3) if background is None else background
    fragments = rasterize(
        vertices, body.faces, cameras, height * supersample, width * supersample, back_faces=not body.is_closed
    )
    return shade(fragments, body, vertices, textures, lights, background, supersample)


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
