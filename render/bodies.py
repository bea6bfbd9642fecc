"""Bodies: triangle meshes with texture coordinates, from files or from Anny.

Axes: the world is in metres, y up, a body looks along +z. UV coordinates are in [0, 1] with v up: texel row 0 of a
texture is v = 1.
"""

import functools
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError, reason


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
        """The same on another device; itself where it is there already."""
        if self.vertices.device == torch.device(device):
            return self
        return Body(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @functools.cached_property
    def is_closed(self) -> bool:
        """Each edge joins two triangles and the surface looks outwards: from outside, no back face is ever seen."""
        start, end = torch.cat([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]]).unbind(1)
        edges, reversed_edges = start * len(self.vertices) + end, end * len(self.vertices) + start
        a, b, c = self.vertices[self.faces].unbind(1)
        volume = (a * torch.linalg.cross(b, c)).sum()
        return torch.equal(edges.unique(), reversed_edges.sort().values) and volume.item() > 0


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


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Smooth unit normals, weighted by triangle area. vertices: (..., V, 3) → (..., V, 3)."""
    a, b, c = (vertices.index_select(-2, corner) for corner in faces.unbind(1))
    face_normals = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for corner in range(3):
        normals.index_add_(-2, faces[:, corner], face_normals)
    return F.normalize(normals, dim=-1)
