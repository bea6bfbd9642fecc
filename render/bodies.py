"""Bodies: triangle meshes with texture coordinates, from files or from Anny.

Axes: the world is in metres, y up, a body looks along +z. UV coordinates are in [0, 1] with v up: texel row 0 of a
texture is v = 1.
"""

import contextlib
import functools
import gzip
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.text import read_text

EXPECTED = "give an OBJ mesh with UVs (v, vt and f a/b)"
LARGEST_INDEX = 1 << 31  # of what stands in a mesh, above or below a face
OVERHANG = 1e-3  # of a UV square, a texel of 1024: rounded or padded UVs may stand out by so much


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

        with contextlib.nullcontext() if _anny_is_kept() else _first_load():
            return anny.Anny(skinning_method="lbs").eval()


def _anny_is_kept() -> bool:
    """Whether Anny finds on this machine what it computes when it is first loaded."""
    from anny.models.model_data import CURRENT_DATA_VERSION
    from anny.paths import get_anny_cache_path

    kept = get_anny_cache_path()
    return kept is not None and any((Path(kept) / f"v{CURRENT_DATA_VERSION}").glob("build_compact_model_data_*"))


@contextlib.contextmanager
def _first_load() -> Iterator[None]:
    """Inside, Anny reads its 1136 blend shapes as tables: by itself a line and a tensor at a time, for most of a
    minute. They are the very same numbers in a fraction of the time. And it keeps on the disk the model alone, not the
    780 MB of the two stages before it, which nothing asks for again."""
    import anny.models as stages
    import anny.models.full_model as builder  # with a mesh library: not to be loaded each time

    meanwhile = [
        (builder, "load_blend_shape", _read_blend_shape),
        (builder, "load_data", builder.load_data.__wrapped__),  # without the decorator that keeps its result
        (stages, "build_model_data", stages.build_model_data.__wrapped__),
    ]
    with contextlib.ExitStack() as as_before:
        for module, name, function in meanwhile:
            as_before.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield


def _read_blend_shape(filename, vertices_count: int, world_transformation, dtype: torch.dtype) -> Tensor:
    """What anny.models.full_model.load_blend_shape reads: lines of a vertex and its offset → (V, 3)."""
    from pyarrow import csv  # the fastest reader of numbers at hand; not to be loaded each time

    offsets = torch.zeros((vertices_count, 3), dtype=torch.float64)
    lines = gzip.decompress(Path(filename).read_bytes())
    if lines.strip():
        table = csv.read_csv(
            io.BytesIO(lines),
            csv.ReadOptions(column_names=["vertex", "x", "y", "z"]),
            csv.ParseOptions(delimiter=" "),
            csv.ConvertOptions(column_types={"vertex": "int64", "x": "float64", "y": "float64", "z": "float64"}),
        )
        vertices, *columns = (column.to_numpy() for column in table.columns)
        if not 0 <= vertices.min() <= vertices.max() < vertices_count:
            raise ValueError(f"{filename} has vertices beyond the mesh's {vertices_count}")
        offsets[torch.from_numpy(vertices.copy())] = torch.from_numpy(np.stack(columns, axis=1))
    return world_transformation.apply(offsets.to(dtype))


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
    normals and hides which texels face each other across a seam. UVs that all lie in one other square than
    [0, 1] are moved there by whole numbers, as textures repeat. Raises UserError for what cannot be read and
    for UVs in several squares.
    """
    try:
        text = read_text(path, errors="replace")  # names and comments may be in any encoding
    except UserError as error:
        raise UserError(f"cannot read mesh {str(error).removeprefix('cannot read ')}; {EXPECTED}") from None
    vertices, uvs, faces, uv_faces = [], [], [], []
    for number, line in _obj_lines(text):
        kind, *fields = line.split() or [""]
        try:
            if kind == "v":  # colours or a weight may follow
                vertices.append(_numbers(fields, 3))
            elif kind == "vt":  # a depth may follow
                uvs.append(_numbers(fields, 2))
            elif kind == "f":
                corners = [_corner(field, len(vertices), len(uvs)) for field in fields]
                if len(corners) < 3:
                    raise ValueError(f"a face of {len(corners)} corners")
                for a, b in pairwise(corners[1:]):
                    triangle = (corners[0], a, b)
                    faces.append([vertex for vertex, _ in triangle])
                    uv_faces.append([uv for _, uv in triangle])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; {EXPECTED}") from None
    if not faces:
        raise UserError(f"{path} holds no faces; {EXPECTED}")
    faces, uv_faces = torch.tensor(faces), torch.tensor(uv_faces)
    vertices, uvs = torch.tensor(vertices), torch.tensor(uvs, dtype=torch.float64)
    for indices, points, name in ((faces, vertices, "vertex"), (uv_faces, uvs, "UV")):
        if indices.min() < 0 or indices.max() >= len(points):
            raise UserError(f"{path} has a face whose {name} index is outside the {len(points)} in the file")
        if not points.isfinite().all():
            raise UserError(f"{path} has a {name} that is not a finite number")
    return Body(vertices, faces, _in_unit_square(uvs, uv_faces, path).float(), uv_faces)


def _obj_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without comments; one that ends in a backslash goes on in the next."""
    lines = enumerate((line.partition("#")[0].rstrip() for line in text.split("\n")), 1)
    for number, line in lines:
        while line.endswith("\\"):
            _, continuation = next(lines, (0, ""))
            line = f"{line[:-1]} {continuation}"
        yield number, line


def _numbers(fields: list[str], count: int) -> list[float]:
    if len(fields) < count:
        raise ValueError(f"{len(fields)} numbers, not {count}")
    return [float(field) for field in fields[:count]]


def _corner(field: str, vertex_count: int, uv_count: int) -> tuple[int, int]:
    """ "v/vt", "v/vt/vn" → indices from 0. In the file they count from 1, negative ones back from the last so far."""
    vertex, uv, *_ = (*field.split("/"), "")
    if not uv:
        holder = "a face of the mesh" if uv_count else "the mesh"
        raise ValueError(f"{holder} has no texture coordinates (f {field})")
    indices = []
    for index, count in ((int(vertex), vertex_count), (int(uv), uv_count)):
        if index == 0 or index < -count:
            raise ValueError(f"f {field} names what does not stand above it")
        if index > LARGEST_INDEX:
            raise ValueError(f"f {field} names what no mesh has")
        indices.append(index - 1 if index > 0 else count + index)
    return tuple(indices)


def _in_unit_square(uvs: Tensor, uv_faces: Tensor, path: str) -> Tensor:
    """uvs (T, 2) moved by whole numbers, so that those of the faces lie in [0, 1]; as they are if they do."""
    corners = uvs[uv_faces]
    low, high = corners.flatten(0, 1).amin(0), corners.flatten(0, 1).amax(0)
    square = (low + OVERHANG).floor()
    if (high <= square + 1 + OVERHANG).all():
        return uvs - square
    squares = (corners.amin(1) + OVERHANG).floor()
    if (corners.amax(1) <= squares + 1 + OVERHANG).all():
        count = len(squares.unique(dim=0))
        raise UserError(
            f"{path}: UDIM tiles (its UVs lie in {count} squares) are not supported: give a mesh whose UVs lie in one "
            "square"
        )
    (left, bottom), (right, top) = low.tolist(), high.tolist()
    raise UserError(
        f"{path}: its UVs run from {left:.3g} to {right:.3g} and from {bottom:.3g} to {top:.3g}, over the edge of a "
        "square: give a mesh whose UVs lie in one square"
    )


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Smooth unit normals, weighted by triangle area. vertices: (..., V, 3) → (..., V, 3)."""
    a, b, c = (vertices.index_select(-2, corner) for corner in faces.unbind(1))
    face_normals = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for corner in range(3):
        normals.index_add_(-2, faces[:, corner], face_normals)
    return F.normalize(normals, dim=-1)
