"""DensePose's IUV pictures on the SMPL template (Güler et al. 2018), by the table that its authors publish.

Each pixel has a part, 1 to 24 (0 beside the body), and a place U, V in 0 to 255 on this part's chart. The table,
`UV_Processed.mat`, says where the charts' triangles lie on SMPL's vertices.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat, whosmat
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from common.errors import UserError, reason
from common.pictures import open_image
from render.bodies import Body
from render.projection import Sighting, sight_map
from render.rasteriser import interpolate, rasterize_uv

PARTS = 24
LEVELS = 256  # of U and V
SMPL_VERTICES = 6890
LARGEST_TABLE = 1_000_000  # numbers; the original's largest array has 41,322
TABLE = "UV_Processed.mat"
SOURCE = "https://dl.fbaipublicfiles.com/densepose/densepose_uv_data.tar.gz"
NEEDED = ("All_FaceIndices", "All_Faces", "All_U_norm", "All_V_norm", "All_vertices")


def read_iuv(path: str | Path, table: str | Path | None, body: Body, height: int, width: int, size: int) -> Sighting:
    """Where a picture of height x width shows the texels of a size x size texture, from its IUV picture.

    Part, U and V are blue, green and red, as DensePose writes them with OpenCV; or red, green and blue, where blue
    holds what is no part. Raises UserError for a picture of another size or without parts, for a body that has not
    SMPL's vertices, and without a table.
    """
    if table is None:
        raise UserError(f"an IUV picture needs DensePose's table {TABLE}: fetch {SOURCE} and name it with --iuv-table")
    if len(body.vertices) != SMPL_VERTICES:
        raise UserError(
            f"an IUV picture is of SMPL's body of {SMPL_VERTICES} vertices; this one has {len(body.vertices)}"
        )
    red, green, blue = np.asarray(open_image(path).convert("RGB"), dtype=np.int64).transpose(2, 0, 1)
    if red.shape != (height, width):
        raise UserError(f"{path} has {red.shape[1]}x{red.shape[0]} pixels, its picture {width}x{height}")
    part, u, v = (blue, green, red) if blue.max() <= PARTS else (red, green, blue)
    if part.max() > PARTS:
        raise UserError(f"{path} has parts above {PARTS}, up to {part.max()}: it is no IUV picture of DensePose's")
    if not part.any():
        raise UserError(f"{path} shows no body: all of its pixels have part 0")
    places = chart_places(str(table), body)
    positions = places[torch.from_numpy(part).clamp(min=1) - 1, torch.from_numpy(v), torch.from_numpy(u)]
    return sight_map(body, positions, torch.from_numpy(part) > 0, size)


@functools.lru_cache(maxsize=1)
def chart_places(table: str, body: Body) -> Tensor:
    """For each part and each V and U that 8 bits hold the place on the resting body: (24, 256, 256, 3) metres. A place
    beside a chart is the nearest one on it. Raises UserError for a table that cannot be read."""
    parts, triangles, uvs, vertices = _read_table(table)
    texels = (uvs * (LEVELS - 1) + 0.5) / LEVELS  # a level is a texel's centre
    places = torch.empty(PARTS, LEVELS, LEVELS, 3)
    for number in range(PARTS):
        faces = triangles[parts == number + 1]
        if not len(faces):
            raise UserError(f"{table} has no chart for part {number + 1}; give the original {TABLE}")
        chart = Body(body.vertices, vertices[faces], texels, faces)
        fragments = rasterize_uv(chart, LEVELS)
        values = fragments.dense(interpolate(fragments, chart.faces, chart.vertices))[0]
        if not fragments.mask.any():
            raise UserError(f"{table} has an empty chart for part {number + 1}; give the original {TABLE}")
        outside = ~fragments.mask[0].numpy()
        row, column = distance_transform_edt(outside, return_distances=False, return_indices=True)
        places[number] = values[torch.from_numpy(row).long(), torch.from_numpy(column).long()].flip(0)  # v is up
    return places


def _read_table(table: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parts (F,), triangles (F, 3) into T corners, their uvs (T, 2) in [0, 1] and SMPL vertices (T,)."""
    try:
        sizes = {name: math.prod(shape) for name, shape, _ in whosmat(table, appendmat=False)}  # the headers alone
        if max(sizes.get(name, 0) for name in NEEDED) > LARGEST_TABLE:
            raise ValueError(f"it has arrays of more than {LARGEST_TABLE} numbers")
        arrays = loadmat(table, appendmat=False, variable_names=NEEDED)
        missing = [name for name in NEEDED if name not in arrays]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        parts, triangles, u, v, vertices = (np.asarray(arrays[name], dtype=np.float64) for name in NEEDED)
        triangles, vertices = triangles.astype(np.int64) - 1, vertices.ravel().astype(np.int64) - 1  # MATLAB's from 1
        uvs = np.stack([u.ravel(), v.ravel()], axis=1)
        if triangles.ndim != 2 or triangles.shape[1] != 3 or len(parts.ravel()) != len(triangles):
            raise ValueError(f"its triangles have shape {triangles.shape}")
        if len(uvs) != len(vertices) or triangles.min() < 0 or triangles.max() >= len(uvs):
            raise ValueError("its triangles name corners that it has not")
        if vertices.min() < 0 or vertices.max() >= SMPL_VERTICES or not (uvs >= 0).all() or not (uvs <= 1).all():
            raise ValueError("its corners lie outside the charts or the body")
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read {table}: {reason(error)}; give DensePose's {TABLE} ({SOURCE})") from None
    return (
        torch.from_numpy(parts.ravel().astype(np.int64)),
        torch.from_numpy(triangles),
        torch.from_numpy(uvs).float(),
        torch.from_numpy(vertices),
    )


def iuv_beside(folder: str | Path, picture: str | Path) -> Path:
    """The IUV picture of a picture in a folder: NAME_IUV.png, as DensePose names it, or NAME.png. Raises UserError."""
    names = [Path(folder) / f"{Path(picture).stem}{end}.png" for end in ("_IUV", "")]
    for name in names:
        if name.is_file() and name.resolve() != Path(picture).resolve():
            return name
    raise UserError(f"no IUV picture of {picture} in {folder}: put {names[0].name} there")
