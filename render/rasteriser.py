"""A rasteriser in plain PyTorch: the nearest triangle in each pixel.

Pixel (row 0, column 0) covers [0, 1) x [0, 1), so its centre is (0.5, 0.5). UV coordinates are in [0, 1] with v up:
texel row 0 of a texture is v = 1.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from render.bodies import Body
from render.cameras import Cameras

NEAR = 0.05  # metres; triangles that reach nearer than this to the camera are not drawn
MAX_CANDIDATES = 30_000_000  # (triangle, pixel) pairs tested at once, about 1 GB


@dataclass(frozen=True)
class Fragments:
    """What the pixels of N pictures see: K of the N * H * W pixels see a triangle.

    pixel: (K,) int64, ascending, (view * H + row) * W + column. face: (K,) int64. area: (K,) of the triangle in
    pixels. The other pixels of a picture see nothing. barycentrics: (K, 3), perspective-correct, sum 1. depth: (K,)
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
    face, area = take(triangles.face, triangle), take(triangles.doubled_area.abs() / 2, triangle)
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
    view_starts = torch.arange(len(points), device=points.device)[:, None] * points.shape[1]
    index = (faces.T[:, None] + view_starts).flatten()
    # Each coordinate apart, (3, N * F): one corner after the other.
    x, y, depth = (take(values, index).view(3, -1) for values in points.flatten(0, 1).unbind(-1))
    doubled_area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
    first_column, first_row = ((values.amin(0) - 0.5).ceil().clamp(min=0) for values in (x, y))
    last_column = (x.amax(0) - 0.5).ceil().clamp(max=width)
    last_row = (y.amax(0) - 0.5).ceil().clamp(max=height)
    usable = (first_column < last_column) & (first_row < last_row) & (depth.amin(0) > NEAR)
    usable &= (x + y + depth).isfinite().all(0)
    usable &= (doubled_area != 0) if back_faces else (doubled_area < 0)
    kept = usable.nonzero()[:, 0]
    view = torch.div(kept, len(faces), rounding_mode="floor")
    x, y, depth = (values.index_select(1, kept) for values in (x, y, depth))
    doubled_area, first_row, last_row = (take(values, kept) for values in (doubled_area, first_row, last_row))
    return _Triangles(view, kept - view * len(faces), x, y, 1 / depth, doubled_area, first_row, last_row)


def _cut_into_spans(triangles: _Triangles, width: int) -> _Spans:
    """A span for each row of pixel centres in each triangle: from the edge between its highest and its lowest corner
    to the edge above, or below, the corner between."""
    (ax, ay), (bx, by), (cx, cy) = _downwards(triangles)
    device, rows = ax.device, (triangles.last_row - triangles.first_row).long()
    owner = torch.repeat_interleave(torch.arange(len(rows), device=device), rows)
    first_span = rows.cumsum(0) - rows
    row = torch.arange(len(owner), device=device) + take(triangles.first_row.long() - first_span, owner)
    slopes = ((cx - ax) / (cy - ay), (bx - ax) / (by - ay), (cx - bx) / (cy - by))
    ax, ay, bx, by, long, upper, lower = (take(values, owner) for values in (ax, ay, bx, by, *slopes))
    # Each edge from its upper end, so that the triangles on both its sides find the same crossing.
    below_a, below_b = row + 0.5 - ay, row + 0.5 - by
    on_long_edge = ax + below_a * long
    on_short_edge = torch.where(below_b < 0, ax + below_a * upper, bx + below_b * lower)
    start = (torch.minimum(on_long_edge, on_short_edge) - 0.5).ceil().clamp(min=0)
    end = (torch.maximum(on_long_edge, on_short_edge) - 0.5).ceil().clamp(max=width)
    count = (end - start).clamp(min=0).long()
    kept = (count > 0).nonzero()[:, 0]
    return _Spans(*(take(values, kept) for values in (owner, row, start, count)))


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
    of_triangles = (along_x, along_y, origin, inverse.amax(0), triangles.view)
    along_x, along_y, origin, highest, view = (take(values, spans.owner) for values in of_triangles)
    at_start = origin + (spans.start + 0.5) * along_x + (spans.row + 0.5) * along_y
    # Only the rows and columns of the pictures where something is, in any of them.
    top, left, height, width = _bounds(spans)
    first_place = (view * height + spans.row - top) * width + spans.start.long() - left

    # One integer holds 1 / depth above and the triangle below: positive floats sort like their bits.
    total, device = int(spans.count.sum()), x.device
    numbers = torch.arange(len(spans.count), device=device)
    span = torch.repeat_interleave(numbers, spans.count, output_size=total)
    step = torch.arange(total, device=device) - take(spans.count.cumsum(0) - spans.count, span)
    nearness = (take(at_start, span) + step * take(along_x, span)).nan_to_num(0)
    nearness = torch.minimum(nearness.clamp(min=1e-12), take(highest, span))  # slivers run away
    key = (nearness.view(torch.int32).long() << 32) | take(spans.owner, span)
    buffer = torch.full((views * height * width,), -1, device=device)
    buffer.scatter_reduce_(0, take(first_place, span) + step, key, "amax")
    place = (buffer >= 0).nonzero()[:, 0]
    row = torch.div(place, width, rounding_mode="floor")
    view = torch.div(row, height, rounding_mode="floor")
    return view, row - view * height + top, place - row * width + left, take(buffer, place) & 0xFFFFFFFF


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
    slopes = (difference / triangles.doubled_area for difference in (cy, cx, by, bx))
    b_along_x, b_along_y, c_along_x, c_along_y = (take(slope, triangle) for slope in slopes)
    inverse_depth = [take(values, triangle) for values in triangles.inverse_depth]
    x, y = x - take(triangles.x[0], triangle), y - take(triangles.y[0], triangle)
    b, c = x * b_along_x - y * b_along_y, y * c_along_y - x * c_along_x
    weights = torch.stack([1 - b - c, b, c]).clamp(0, 1)  # a centre on an edge may lie out by a rounding
    total, weights = weights.sum(0), weights * torch.stack(inverse_depth)
    over_depth = weights.sum(0)
    return (weights / over_depth).T, total / over_depth


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[index] along the first axis, faster than the brackets."""
    return values.index_select(0, index)


def _join(first: Fragments, second: Fragments) -> Fragments:
    """The pictures of both, the second's after the first's."""
    (views, height, width), offset = second.shape, math.prod(first.shape)
    second = replace(second, pixel=second.pixel + offset)
    tensors = (torch.cat([getattr(first, name), getattr(second, name)]) for name in FRAGMENT_TENSORS)
    return Fragments((first.shape[0] + views, height, width), *tensors)


FRAGMENT_TENSORS = ("pixel", "face", "barycentrics", "depth", "area")


def interpolate(fragments: Fragments, faces: Tensor, values: Tensor) -> Tensor:
    """Corner values (V, C) at each covered pixel → (K, C)."""
    return blend_corners(fragments.barycentrics, take(values[faces].flatten(1), fragments.face))


def blend_corners(barycentrics: Tensor, corners: Tensor) -> Tensor:
    """barycentrics: (K, 3); corners: (K, 3 * C), the three corners' values side by side → (K, C)."""
    (a, b, c), weights = corners.chunk(3, dim=-1), barycentrics[..., None]
    return (a * weights[:, 0]).addcmul_(b, weights[:, 1]).addcmul_(c, weights[:, 2])
