"""Regions of an upright body, found from its resting shape alone, whatever its arms do.

All lengths here are in body heights: the soles at y = 0, the crown at 1, x from the middle, left
positive. Arms are measured along the surface from the fingertips, so that an arm that hangs, stands
out or is level is cut at the same places. Heights are measured from the crotch and the neck, which
move with age and build. The shares in the code are those that agree best with Anny's bones, over
ages, builds and poses of the arms.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import max_pool2d

from common.errors import UserError
from render.bodies import Body
from render.rasteriser import interpolate, rasterize_uv

BODY_REGIONS = ("face", "hair", "top", "bottom", "arms", "legs", "feet")
MARGIN = 3  # texels around a region
# The way from the soles to the crown over a fingertip is longer by this, or there is no arm.
LEAST_DETOUR = 0.35
# Shares of that detour, from the fingertip to the wrist and to the middle of the shoulder.
HAND, ARM = 0.16, 0.54
ANKLE = 0.0575


@dataclass(frozen=True, eq=False)
class BodyShape:
    """points: (P, 3) without doubles. triangles: (F, 3) into points, in the order of the body's faces.
    arm: (P,) way to the nearer fingertip as a share of its detour (see ARM), inf without arms.
    lean: by how much the arm's cut grows with the height: it is upright however the arm hangs.
    crotch, neck: heights. nape: z behind the neck. has_head: the trunk narrows to a neck.
    """

    points: np.ndarray
    triangles: np.ndarray
    arm: np.ndarray
    lean: float
    crotch: float
    neck: float
    nape: float
    has_head: bool


def region_mask(body: Body, name: str, size: int) -> Tensor:
    """One of BODY_REGIONS and MARGIN texels around it → (size, size) float of 0 and 1, as body.uvs lie.

    The top has its sleeves but not the hands, the arms have the hands, the bottom ends above mid-shin
    and the legs at the ankles; hair is the head without the face. Raises UserError for another name,
    for a body that does not stand upright, and for a region of which the body has no texels.
    """
    if name not in BODY_REGIONS:
        names = ", ".join(BODY_REGIONS)
        raise UserError(f"unknown region {name!r}: use {names}, or a picture's file")
    shape, fragments = measure(body), rasterize_uv(body, size)
    values = torch.from_numpy(np.column_stack([shape.points[:, 1:], shape.arm.clip(max=2)])).float()
    values = interpolate(fragments, torch.from_numpy(shape.triangles), values)
    is_inside = _select(shape, name, *values.unbind(-1))
    if not is_inside.any():
        raise UserError(f"this body has no texels for the region {name!r}; give a mask picture")
    mask = fragments.dense(is_inside.float())
    return max_pool2d(mask, 2 * MARGIN + 1, stride=1, padding=MARGIN)[0]


def _select(shape: BodyShape, name: str, y: Tensor, z: Tensor, arm: Tensor) -> Tensor:
    """Which of K texels are in a region → (K,) bool. y, z, arm: (K,), as of BodyShape."""
    head_height, trunk_height = 1 - shape.neck, shape.neck - shape.crotch
    above_shoulder = (y - shape.neck + 0.1).clamp(-0.05, 0.05)
    is_arm, is_hand = arm < ARM + shape.lean * above_shoulder, arm < HAND
    is_foot = ~is_arm & (y < ANKLE)
    # The neck's cut falls towards the front, so that the chin is the head's.
    above_neck = y + 0.6 * (z - shape.nape) > shape.neck + 0.14 * head_height
    is_head = above_neck & ~is_arm & shape.has_head
    is_trunk = ~is_arm & ~is_head  # with the legs
    depth = z[is_head]
    back, front = (depth.min(), depth.max()) if len(depth) else (0, 0)
    in_front = (z > back + 0.435 * (front - back)) & (y < shape.neck + 0.755 * head_height)
    hip, waist = (shape.crotch + share * trunk_height for share in (0.15, 0.35))
    return {
        "face": is_head & in_front,
        "hair": is_head & ~in_front,
        "top": (is_trunk & (y > hip)) | (is_arm & ~is_hand),
        "bottom": is_trunk & (y < waist) & (y > 0.59 * shape.crotch),
        "arms": is_arm,
        "legs": is_trunk & (y < waist) & ~is_foot,
        "feet": is_foot,
    }[name]


@functools.lru_cache(maxsize=8)
def measure(body: Body) -> BodyShape:
    """Where the arms, crotch and neck are. Raises UserError for a body that does not stand upright."""
    corners = body.vertices[body.faces].view(-1, 3).double().numpy()
    width, height, depth = np.ptp(corners, axis=0)
    if depth > 0.5 * height or width > 1.3 * height:
        raise UserError(
            f"regions are known on a body that stands upright, y up; this one is {width:.2f} wide, "
            f"{height:.2f} high and {depth:.2f} deep; give a mask picture"
        )
    low, high = corners.min(0), corners.max(0)
    origin = np.array([(low[0] + high[0]) / 2, low[1], 0])
    # Files that split vertices along UV seams are whole again.
    points, index = np.unique(((corners - origin) / height).round(6), axis=0, return_inverse=True)
    triangles = index.reshape(-1, 3)
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    edges = np.unique(np.sort(edges), axis=0)
    edges = edges[edges[:, 0] < edges[:, 1]]
    arm = _ways_to_fingertips(points, _surface_graph(points, edges))

    middle = _crossings(points, edges, axis=0, at=1e-4)[:, 1]
    middle = middle[(middle > 0.38) & (middle < 0.55)]
    crotch = middle.min() if len(middle) else 0.47  # under a skirt
    trunk_edges = edges[(arm[edges] > ARM).all(1)]
    heights = np.arange(0.6, 0.92, 0.005)
    slices = [_crossings(points, trunk_edges, axis=1, at=height) for height in heights]
    widths = np.array([np.abs(crossings[:, 0]).max(initial=0) for crossings in slices])
    narrowest = np.where(widths > 0, widths, np.inf).argmin()
    has_head = bool(widths[narrowest] < 0.7 * widths[:narrowest].max(initial=0))
    neck, nape = (heights[narrowest], slices[narrowest][:, 2].min()) if has_head else (0.87, 0.0)
    lean = 0.5 + 1.6 * (neck - points[arm == 0, 1]).mean() if (arm == 0).any() else 0.0
    landmarks = (float(value) for value in (lean, crotch, neck, nape))
    return BodyShape(points, triangles, arm, *landmarks, has_head)


def _surface_graph(points: np.ndarray, edges: np.ndarray) -> csr_matrix:
    """(P, P) lengths of edges; a piece apart (eyes, clothes) is linked to the nearest of the largest."""
    count = len(points)

    def graph(pairs: np.ndarray) -> csr_matrix:
        lengths = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
        return coo_matrix((lengths.clip(1e-9), pairs.T), shape=(count, count)).tocsr()

    pieces = connected_components(graph(edges), directed=False)[1]
    largest = np.bincount(pieces).argmax()
    on_largest, apart = np.flatnonzero(pieces == largest), np.flatnonzero(pieces != largest)
    if not len(apart):
        return graph(edges)
    gap, nearest = cKDTree(points[on_largest]).query(points[apart])
    order = np.argsort(gap)
    linked = order[np.unique(pieces[apart[order]], return_index=True)[1]]  # each piece's nearest point
    links = np.stack([apart[linked], on_largest[nearest[linked]]], axis=1)
    return graph(np.concatenate([edges, links]))


def _ways_to_fingertips(points: np.ndarray, graph: csr_matrix) -> np.ndarray:
    """(P,) way along the surface to the nearer fingertip, as a share of its detour; inf without arms.

    A fingertip is where, on its side, the way from the soles to the crown is longest.
    """
    soles, crown = (np.flatnonzero(ends) for ends in (points[:, 1] < 0.02, points[:, 1] > 0.98))
    ways = sum(
        dijkstra(graph, directed=False, indices=ends, min_only=True)  # to the nearest of these points
        for ends in (soles, crown)
    )
    detours, shares = ways - ways.min(), np.full(len(points), np.inf)
    for side in (points[:, 0] > 0, points[:, 0] < 0):
        fingertip = np.where(side, detours, -1).argmax()
        if detours[fingertip] > LEAST_DETOUR:
            away = dijkstra(graph, directed=False, indices=fingertip) / detours[fingertip]
            shares = np.minimum(shares, away)
    return shares


def _crossings(points: np.ndarray, edges: np.ndarray, axis: int, at: float) -> np.ndarray:
    """Where edges cross a plane → (C, 3)."""
    start, end = points[edges[:, 0]], points[edges[:, 1]]
    crosses = (start[:, axis] < at) != (end[:, axis] < at)
    start, end = start[crosses], end[crosses]
    return start + ((at - start[:, axis]) / (end[:, axis] - start[:, axis]))[:, None] * (end - start)
