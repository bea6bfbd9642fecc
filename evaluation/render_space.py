"""Textures on the body: the same four views for all, and what is measured on them.

TexDreamer's protocol: the body in its neutral pose, seen level from azimuths 0, 90, 180 and 270. Pictures go through an
`Extractor`; similarities to a prompt or to another picture are of its features, as are `distances` between two sets.
"""

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from evaluation.extractors import Extractor, features_of, unit
from evaluation.texture_space import compare_textures
from evaluation.uncertainty import too_few
from render.bodies import Body
from render.cameras import Cameras, look_at, orbit_cameras
from render.lights import studio_lights
from render.rasteriser import Fragments, rasterize
from render.regions import measure
from render.shading import shade

AZIMUTHS = (0.0, 90.0, 180.0, 270.0)
SIDE = 512  # of a render, in pixels
FIELD_OF_VIEW = 28.0  # degrees
SUPERSAMPLE = 2
FACE_FILL = 0.8  # share of a face's picture that the head takes
RANKING_TIE = 1e-6


@functools.lru_cache(maxsize=4)
def _views(body: Body, side: int) -> tuple[Cameras, Fragments]:
    """The four views, which are the same for every texture."""
    azimuth = torch.tensor(AZIMUTHS, device=body.vertices.device)
    cameras = orbit_cameras(
        body, azimuth, torch.zeros_like(azimuth), torch.full_like(azimuth, FIELD_OF_VIEW), fill=0.94
    )
    return cameras, _seen(body, cameras, side)


def _seen(body: Body, cameras: Cameras, side: int) -> Fragments:
    large = side * SUPERSAMPLE
    return rasterize(body.vertices, body.faces, cameras, large, large, back_faces=not body.is_closed)


def render_four_views(body: Body, texture: Tensor, side: int = SIDE) -> Tensor:
    """texture (3, S, S) in [0, 1], filled outside the islands → (4, 3, side, side) in [0, 1], in studio light on white.

    body: as it rests, which is SMPL's T and Anny's A.
    """
    cameras, fragments = _views(body, side)
    white = texture.new_ones(1, 3)
    renders = shade(fragments, body, body.vertices, texture[None], studio_lights(cameras), white, SUPERSAMPLE)
    return renders.clamp(0, 1)  # shares of a pixel add up to 1 but for roundings


def silhouettes(body: Body, side: int = SIDE) -> Tensor:
    """Pixels of `render_four_views` that show the body alone → (4, side, side) bool."""
    return F.avg_pool2d(_views(body, side)[1].mask.float(), SUPERSAMPLE) == 1


def view_features(
    body: Body, textures: Iterable[Tensor], extractors: list[Extractor], side: int = SIDE
) -> dict[str, Tensor]:
    """Each extractor's name → the features of the four views of N textures, (N, 4, D).

    textures: (3, S, S) in [0, 1] each, filled outside the islands; one at a time, so that memory holds four renders
    and all features, whatever N.
    """
    features: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    for texture in textures:
        renders = render_four_views(body, texture, side)
        for extractor in extractors:
            features[extractor.name].append(features_of(extractor, renders).cpu())
    return {name: torch.stack(rows) for name, rows in features.items()}


def compare_renders(
    body: Body, textures: Iterable[Tensor], references: Iterable[Tensor], side: int = SIDE
) -> dict[str, Tensor | str]:
    """The measures of `compare_textures` inside the silhouettes of the four views, averaged over them.

    textures, references: N of (3, S, S) in [0, 1] each, filled outside the islands → a name → (N,), or what it needs.
    Raises UserError when there are none.
    """
    masks, values = silhouettes(body, side), {}
    for texture, reference in zip(textures, references, strict=True):
        views = zip(render_four_views(body, texture, side), render_four_views(body, reference, side), masks)
        by_view = [compare_textures(ours[None], truth[None], mask, fill=False) for ours, truth, mask in views]
        for name, value in by_view[0].items():
            if isinstance(value, str):
                values[name] = value
            else:
                values.setdefault(name, []).append(torch.cat([view[name] for view in by_view]).mean())
    if not values:
        raise UserError("there are no textures to render; give at least one")
    return {name: value if isinstance(value, str) else torch.stack(value) for name, value in values.items()}


def clip_score(features: Tensor, text_features: Tensor) -> Tensor:
    """100 max(cos, 0) of each view and the texture's own prompt, averaged over views (Hessel et al. 2021, as
    torchmetrics scales it). features: (N, V, D); text_features: (N, D) → (N,)."""
    return 100 * (unit(features) * unit(text_features)[:, None]).sum(-1).clamp(min=0).mean(1)


def image_similarity(features: Tensor, references: Tensor) -> Tensor:
    """100 max(cos, 0) of each view and the same view of the true texture, averaged over views. (N, V, D) → (N,)."""
    return 100 * (unit(features) * unit(references)).sum(-1).clamp(min=0).mean(1)


def retrieval(features: Tensor, keys: Tensor, names: list[str]) -> Tensor | str:
    """R-precision with R = 1 among N (Xu et al. 2018; with CLIP, Park et al. 2021): is a texture's own key the nearest?

    features: (N, V, D), whose unit views are averaged; keys: (N, D), of prompts or of the pictures that textures were
    made from; names: N, such as the prompts: keys of one name are equally right → (N,) in [0, 1], a tie counted by its
    right share; or the reason. By chance it is the mean share of keys that have a row's own name.
    """
    if len(set(names)) < 2:
        return too_few("retrieval", len(set(names)), 2, "different prompts or pictures")
    similarity = unit(unit(features).mean(1)) @ unit(keys).T
    nearest = similarity >= similarity.amax(1, keepdim=True) - RANKING_TIE
    numbers = torch.tensor([names.index(name) for name in names])
    right = numbers[:, None] == numbers[None]
    return (nearest & right).sum(1) / nearest.sum(1)


@functools.lru_cache(maxsize=2)
def _face_view(body: Body, side: int) -> tuple[Cameras, Fragments] | str:
    shape = measure(body)
    if not shape.has_head:
        return "face similarity needs a body with a head"
    is_head = torch.from_numpy(shape.points[shape.triangles.ravel()][:, 1] > shape.neck)
    head = body.vertices[body.faces].view(-1, 3)[is_head.to(body.vertices.device)]
    low, high = head.amin(0), head.amax(0)
    centre, half = (low + high) / 2, (high - low)[:2].amax() / 2
    distance = half / (math.tan(math.radians(FIELD_OF_VIEW) / 2) * FACE_FILL) + (high - low)[2] / 2
    eye = centre.clone()
    eye[2] += distance
    cameras = look_at(eye[None], centre[None], eye.new_tensor([FIELD_OF_VIEW]))
    return cameras, _seen(body, cameras, side)


def render_face(body: Body, texture: Tensor, side: int = 256) -> Tensor | str:
    """The head from in front → (1, 3, side, side) in [0, 1], or the reason. texture: as of `render_four_views`. Raises
    UserError for a body that does not stand upright."""
    view = _face_view(body, side)
    if isinstance(view, str):
        return view
    cameras, fragments = view
    white = texture.new_ones(1, 3)
    return shade(fragments, body, body.vertices, texture[None], studio_lights(cameras), white, SUPERSAMPLE).clamp(0, 1)


def face_similarity(
    body: Body, textures: Iterable[Tensor], references: Iterable[Tensor], extractor: Extractor | str | None
) -> Tensor | str:
    """100 max(cos, 0) of the embeddings of both faces → (N,), or what it needs. extractor: of `load_face_model`."""
    if extractor is None:
        return "face similarity needs a face embedding model"
    if isinstance(extractor, str):
        return extractor
    values = []
    for texture, reference in zip(textures, references, strict=True):
        faces = [render_face(body, side) for side in (texture, reference)]
        if isinstance(faces[0], str):
            return faces[0]
        ours, truth = (features_of(extractor, face).cpu()[:, None] for face in faces)
        values.append(image_similarity(ours, truth))
    return torch.cat(values)
