"""The users' own SMPL, SMPL+H and SMPL-X model files and AMASS motions, read without running anything they name.

SMPL: Loper et al. 2015. SMPL+H: Romero et al. 2017. SMPL-X: Pavlakos et al. 2019. AMASS: Mahmood et al. 2019.
"""

import functools
import io
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, reason
from render.bodies import Body, read_obj

KINDS = ("smpl", "smplh", "smplx")
NEEDED = ("v_template", "f", "weights", "shapedirs", "posedirs", "J_regressor", "kintree_table")
EXTRA = ("hands_meanl", "hands_meanr", "joint2num")
GENDERS = ("neutral", "female", "male")
# What a pickle may name: arrays, sparse matrices, and chumpy's, which becomes a placeholder.
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
    ("copy_reg", "_reconstructor"),
    ("copyreg", "_reconstructor"),
    ("__builtin__", "object"),
    ("builtins", "object"),
    ("collections", "OrderedDict"),
}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
FRAMES_PER_SECOND = 2  # of a motion: nearer frames are near-copies


class ChumpyArray:
    """Stands for chumpy's arrays, whose package does not install any more."""

    def __setstate__(self, state):
        if "x" in state:
            self.data = np.asarray(state["x"])
        elif "a" in state and "idxs" in state:
            whole = state["a"].data if isinstance(state["a"], ChumpyArray) else np.asarray(state["a"])
            self.data = whole.reshape(-1)[np.asarray(state["idxs"], dtype=np.int64)]
            self.data = self.data.reshape(tuple(state.get("preferred_shape", self.data.shape)))
        else:
            raise pickle.UnpicklingError("a chumpy array of an unknown kind")


class SparseArray:
    """Stands for scipy's sparse matrices, whose own code trusts the indices in the file."""

    def __setstate__(self, state):
        shape = tuple(int(side) for side in state.get("_shape", state.get("shape")))
        if len(shape) != 2 or not 0 < shape[0] * shape[1] < 100_000_000:
            raise pickle.UnpicklingError(f"a sparse matrix of shape {shape}")
        major, minor = self.places(state)
        self.data = np.zeros(shape)
        np.add.at(self.data, (major, minor) if self.by_rows else (minor, major), np.asarray(state["data"]))

    by_rows = False

    def places(self, state):
        """Compressed: each value's column (or row), and its place in it."""
        ends, minor = np.asarray(state["indptr"], np.int64), np.asarray(state["indices"], np.int64)
        return np.repeat(np.arange(len(ends) - 1), np.diff(ends)), _not_negative(minor)


class SparseRows(SparseArray):
    by_rows = True


class SparsePlaces(SparseArray):
    by_rows = True

    def places(self, state):
        rows, columns = state["coords"] if "coords" in state else (state["row"], state["col"])
        return _not_negative(np.asarray(rows, np.int64)), _not_negative(np.asarray(columns, np.int64))


def _not_negative(index: np.ndarray) -> np.ndarray:
    if (index < 0).any():
        raise pickle.UnpicklingError("a sparse matrix with a negative index")
    return index


SPARSE = {"csc_matrix": SparseArray, "csr_matrix": SparseRows, "coo_matrix": SparsePlaces}


class ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and containers; whatever else a file names is refused and not run."""

    def find_class(self, module, name):
        if module.split(".")[0] == "chumpy":
            return ChumpyArray
        if module.startswith("scipy.sparse") and name in SPARSE:
            return SPARSE[name]
        if (module, name) in ALLOWED:
            return super().find_class(module.replace("copy_reg", "copyreg").replace("__builtin__", "builtins"), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no body model needs")


def _plain(value):
    return value.data if isinstance(value, ChumpyArray | SparseArray) else value


def read_arrays(path: Path) -> dict:
    """The arrays of a .npz or .pkl file. Raises UserError; runs nothing."""
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                loaded = ArraysOnly(file, encoding="latin1").load()
            if not isinstance(loaded, dict):
                raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}, not a dictionary of arrays")
            return {key: _plain(value) for key, value in loaded.items()}
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                data = io.BytesIO(archive.read(name))
                read_header = HEADERS[np.lib.format.read_magic(data)]
                _, _, dtype = read_header(data)
                if dtype.hasobject:  # a pickle inside
                    value = ArraysOnly(data, encoding="latin1").load()
                else:
                    data.seek(0)
                    value = np.lib.format.read_array(data, allow_pickle=False)
                arrays[name.removesuffix(".npy")] = value
        return arrays
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"cannot read {path}: {reason(error)}; give the original .npz or .pkl file") from None


def model_files(path: Path) -> dict[str, Path]:
    """Gender → model file. path: one file, for every gender, or a folder with one for each."""
    if path.is_file():
        return {gender: path for gender in GENDERS}
    files = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else []:
        if file.suffix in (".npz", ".pkl"):
            words = str(file.relative_to(path)).lower().replace("female", "f_gender").replace("_f_", "f_gender")
            gender = "female" if "f_gender" in words else "male" if "male" in words or "_m_" in words else "neutral"
            files.setdefault(gender, file)
    if not files:
        raise UserError(f"no body model at {path}; give a .npz or .pkl file, or a folder of them")
    return {gender: files.get(gender, next(iter(files.values()))) for gender in GENDERS}


@functools.lru_cache(maxsize=4)
def load_model(kind: str, path: Path):
    """A body-models model of a file whose contents were checked first."""
    from body_models.smpl.torch import SMPL
    from body_models.smplh.torch import SMPLH
    from body_models.smplx.torch import SMPLX

    arrays = read_arrays(path)
    missing = [key for key in NEEDED if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; give the original {kind} model file")
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "model.npz"  # this library unpickles what it reads: let it read only this
        try:
            np.savez(clean, **{key: np.asarray(arrays[key]) for key in (*NEEDED, *EXTRA) if key in arrays})
            if kind == "smpl":
                return SMPL(model_path=clean).eval()
            # AMASS holds hand poses whole, not as differences from a mean.
            return {"smplh": SMPLH, "smplx": SMPLX}[kind](model_path=clean, flat_hand_mean=True).eval()
        except Exception as error:
            raise UserError(f"{path} is not a {kind} model ({reason(error)})") from error


def split_spec(spec: str) -> tuple[str, Path, Path]:
    """ "smpl:MODEL" or "smpl:MODEL,UVS.obj" → kind, model path, UV template's path."""
    kind, _, paths = spec.partition(":")
    commas = [index for index, letter in enumerate(paths) if letter == ","]
    path, uvs = paths, ""
    if commas and not Path(paths).exists():  # a folder's name may have commas too
        splits = [(paths[:comma], paths[comma + 1 :]) for comma in commas]
        path, uvs = max(splits, key=lambda split: (Path(split[0]).exists(), Path(split[1]).is_file()))
    model = Path(path)
    folder = model.parent if model.is_file() else model
    name = "smplx_uv.obj" if kind == "smplx" else "smpl_uv.obj"
    return kind, model, Path(uvs) if uvs else folder / name


@functools.lru_cache(maxsize=4)
def load_smpl_body(spec: str) -> Body:
    """The neutral body at rest, with the texture coordinates of the user's UV template."""
    kind, path, template = split_spec(spec)
    if not template.is_file():
        raise UserError(f"no UV template {template}; put it there or write {kind}:{path},UV_TEMPLATE.obj")
    uvs = read_obj(str(template))
    vertices = smpl_vertices(spec, np.zeros((1, 156), np.float32), np.zeros((1, 10), np.float32), ["neutral"])[0]
    faces = torch.as_tensor(np.asarray(load_model(kind, model_files(path)["neutral"]).faces)).long()
    if len(vertices) != len(uvs.vertices) or not torch.equal(faces.sort(1).values, uvs.faces.sort(1).values):
        raise UserError(
            f"{template} is not the UV template of {path}: {len(uvs.vertices)} vertices and {len(uvs.faces)} faces "
            f"for {len(vertices)} and {len(faces)}"
        )
    return Body(vertices, uvs.faces, uvs.uvs, uvs.uv_faces)


@torch.no_grad()
def smpl_vertices(spec: str, poses: np.ndarray, betas: np.ndarray, genders: list[str]) -> Tensor:
    """poses: (N, 156) axis-angle: root 3, body 63, hands 90; betas: (N, S) → (N, V, 3) metres, lowest point at y = 0.

    SMPL has no hands: they stay at rest.
    """
    kind, path, _ = split_spec(spec)
    files, bodies = model_files(path), []
    poses, betas = (torch.from_numpy(array).float() for array in (poses, betas))
    for pose, shape, gender in zip(poses, betas, genders):
        model = load_model(kind, files[gender])
        directions = model._assets.shapedirs.shape[-1]
        if kind == "smplx" and directions < 300:
            directions = 10  # files of the first release: ten of shape, then those of expression
        width = min(directions, model.NUM_SHAPE_COEFFS, len(shape))
        root, body, hands = pose[:3], pose[3:66].view(1, 21, 3), pose[66:].view(1, 30, 3)
        inputs = {"pelvis_rotation": root[None], "shape": shape[None, :width]}
        if kind == "smpl":
            inputs["body_pose"] = torch.cat([body, body.new_zeros(1, 2, 3)], dim=1)
        else:
            inputs.update(body_pose=body, hand_pose=hands)
        if kind == "smplx":
            inputs.update(head_pose=body.new_zeros(1, 3, 3), expression=body.new_zeros(1, 10))
        bodies.append(model.forward_vertices(**inputs)[0])
    vertices = torch.stack(bodies)
    vertices[..., 1] -= vertices[..., 1].amin(1, keepdim=True)
    return vertices


def read_amass(path: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
    """An AMASS file, thinned to FRAMES_PER_SECOND → poses (F, 156), betas (16,), gender.

    poses: root 3, body 63, hands 90, axis-angle, y up. Files have 156 columns (SMPL+H), 165 (SMPL-X: jaw and eyes are
    left out) or 72 (SMPL: no hands). Raises UserError for a file that is none of these or holds what is no number.
    """
    arrays = read_arrays(Path(path))
    if "poses" not in arrays:
        raise UserError(f"{path} holds no 'poses'; give an AMASS motion (shape files have none)")
    betas = np.zeros(16, np.float32)
    try:
        poses = np.asarray(arrays["poses"], dtype=np.float64)
        given = np.asarray(arrays.get("betas", betas), dtype=np.float32).reshape(-1)[:16]
        rate = float(np.asarray(arrays.get("mocap_framerate", arrays.get("mocap_frame_rate", 60))))
        gender = np.asarray(arrays.get("gender", "neutral")).item()
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds what no AMASS motion holds ({reason(error)}); leave it out") from None
    if poses.ndim != 2 or poses.shape[1] not in (72, 156, 165) or not len(poses):
        raise UserError(f"{path}: poses of shape {poses.shape}; AMASS has 72, 156 or 165 columns")
    betas[: len(given)] = given
    if not (np.isfinite(poses).all() and np.isfinite(betas).all() and np.isfinite(rate)):
        raise UserError(f"{path} holds poses or betas that are no numbers; leave it out")
    poses = poses[:: max(1, round(rate / FRAMES_PER_SECOND))]
    hands = {72: np.zeros((len(poses), 90)), 156: poses[:, 66:156], 165: poses[:, 75:165]}[poses.shape[1]]
    gender = gender.decode() if isinstance(gender, bytes) else str(gender)
    full = np.concatenate([_facing_front(poses[:, :3]), poses[:, 3:66], hands], axis=1).astype(np.float32)
    return full, betas, gender if gender in GENDERS else "neutral"


def _facing_front(root: np.ndarray) -> np.ndarray:
    """AMASS has z up and any heading: its root rotations (F, 3), axis-angle, with y up and the body's front at +z."""
    from scipy.spatial.transform import Rotation

    upright = Rotation.from_euler("x", -90, degrees=True) * Rotation.from_rotvec(root)
    front = upright.apply([0.0, 0.0, 1.0])
    heading = np.arctan2(front[:, 0], front[:, 2])
    return (Rotation.from_euler("y", -heading[:, None]) * upright).as_rotvec()


@functools.lru_cache(maxsize=8)
def motion_files(folder: str) -> tuple[Path, ...]:
    """The motions below a folder, in the order of their names; AMASS's shape files are left out."""
    files = sorted(Path(folder).rglob("*.npz"))
    files = [path for path in files if not path.stem.endswith(("shape", "_stagei"))]
    if not files:
        raise UserError(f"no AMASS motions (.npz) in {folder}")
    return tuple(files)


motion = functools.lru_cache(maxsize=64)(read_amass)
