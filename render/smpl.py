"""The users' own SMPL, SMPL+H and SMPL-X model files and AMASS motions, read without running anything they name.

SMPL: Loper et al. 2015. SMPL+H: Romero et al. 2017. SMPL-X: Pavlakos et al. 2019. AMASS: Mahmood et al. 2019.
"""

import collections
import copyreg
import functools
import io
import itertools
import math
import pickle
import re
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
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
JOINT_COUNTS = {"smpl": 24, "smplh": 52, "smplx": 55}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LARGEST_ARRAYS = 1 << 30  # bytes of one file: SMPL-X's largest has 0.3 GB, AMASS' longest motions less
MOST_DICTIONARIES = 10_000  # in each other; fits have a few
LARGEST_ANGLE = 1e4  # radians, of an axis-angle; more is no pose
POSE_COLUMNS = (72, 156, 165)  # of AMASS, see read_amass
FRAMES_PER_SECOND = 2  # of a motion: nearer frames are near-copies


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands for _codecs.encode, which has encodings that look for a module, and some that compress."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands for bytes, which pickles call for empty ones alone; of a number it makes so many."""
    return b""


# What a pickle may name of the standard library; arrays and matrices of all kinds become placeholders.
ALLOWED = {("_codecs", "encode"): _encode, ("collections", "OrderedDict"): collections.OrderedDict}
for _builtins, _registry in (("__builtin__", "copy_reg"), ("builtins", "copyreg")):  # in Python 2, and since
    ALLOWED[_builtins, "bytes"], ALLOWED[_builtins, "object"] = _no_bytes, object
    ALLOWED[_registry, "_reconstructor"] = copyreg._reconstructor


class ArrayType:
    """Stands for numpy's dtype, which takes from a pickle what makes it read numbers as addresses."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>=|]?[?biufcSUO]\d*", str(code)):
            raise pickle.UnpicklingError(f"an array of type {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        _, byte_order, subarray, names, fields, *_ = state
        if subarray or names or fields:
            raise pickle.UnpicklingError("an array with fields")
        self.dtype = self.dtype.newbyteorder(byte_order)


class Array:
    """Stands for numpy's ndarray."""

    def __setstate__(self, state):
        _, shape, array_type, is_fortran, values = state
        if array_type.dtype.hasobject:
            self.data = np.empty(len(values), object)
            for index, value in enumerate(values):
                self.data[index] = _plain(value)
        else:
            self.data = _numbers(values, array_type)
        self.data = self.data.reshape(shape, order="F" if is_fortran else "C")

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype=dtype, copy=copy)


def _array_to_fill(*_) -> Array:
    return Array()


def _array_of_buffer(buffer, array_type, shape, order) -> np.ndarray:
    return _numbers(buffer, array_type).reshape(shape, order=order)


def _scalar(array_type, data):
    return _numbers(data, array_type)[0]


def _numbers(data, array_type: ArrayType) -> np.ndarray:
    """(N,) from bytes, which Python 2 wrote as what is read as Latin-1. Raises ValueError for objects."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return _checked_letters(np.frombuffer(data, array_type.dtype) if len(data) else np.empty(0, array_type.dtype))


def _checked_letters(array: np.ndarray) -> np.ndarray:
    """The array. Raises ValueError for text of numbers that no letter has, which Python fails to make a str of."""
    if array.dtype.kind == "U" and array.size:
        codes = np.frombuffer(array.tobytes(), np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if codes.size and codes.max() > sys.maxunicode:
            raise ValueError("text that is none")
    return array


NUMPY = {("numpy", "ndarray"): Array, ("numpy", "dtype"): ArrayType}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2 and since
    NUMPY[f"{_core}.multiarray", "_reconstruct"] = _array_to_fill
    NUMPY[f"{_core}.multiarray", "scalar"] = _scalar
    NUMPY[f"{_core}.numeric", "_frombuffer"] = _array_of_buffer  # protocol 5


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


class JoblibArray:
    """Stands for joblib's wrapper of an array, whose values follow it in the file."""

    def __setstate__(self, state):
        self.shape, self.order, self.array_type = state["shape"], state["order"], state["dtype"]
        self.alignment = state.get("numpy_array_alignment_bytes")

    def read(self, file) -> np.ndarray:
        if self.array_type.dtype.hasobject:
            raise pickle.UnpicklingError("an array of objects")
        if self.alignment is not None:  # a byte says how many of padding follow
            file.read(file.read(1)[0])
        size = int(np.prod(self.shape, dtype=np.int64)) * self.array_type.dtype.itemsize
        return _numbers(file.read(size), self.array_type).reshape(self.shape, order=self.order)


class ArraysOnly(pickle._Unpickler):
    """Unpickles arrays and containers; whatever else a file names is refused and not run.

    In Python: C's keeps room for as many objects as a file says that it remembers, and does not say where it is in it,
    which the arrays that `joblib.dump` wrote beside its pickle, uncompressed, need.
    """

    def __init__(self, file):
        super().__init__(file, encoding="latin1")
        self.file = file

    def find_class(self, module, name):
        if (module, name) == ("joblib.numpy_pickle", "NumpyArrayWrapper"):
            return JoblibArray
        if module.split(".")[0] == "chumpy":
            return ChumpyArray
        if module.startswith("scipy.sparse") and name in SPARSE:
            return SPARSE[name]
        if (module, name) in NUMPY:
            return NUMPY[module, name]
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no body model needs")

    def load_build(self):
        super().load_build()
        if isinstance(self.stack[-1], JoblibArray):
            self.stack[-1] = self.stack[-1].read(self.file)

    def load_bytearray8(self):
        """Python's makes room for as many bytes as the file claims."""
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self.file.getbuffer().nbytes:
            raise pickle.UnpicklingError("it claims more bytes than it holds")
        data = bytearray(length)
        self.readinto(data)
        self.append(data)

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _plain(value, counter: Iterator[int] | None = None):
    """A numpy array for what stands for one. counter: of the dictionaries that are met, each as often as it is named,
    which in a small file can be for ever. Raises UnpicklingError for more than MOST_DICTIONARIES."""
    if isinstance(value, Array | ChumpyArray | SparseArray):
        return value.data
    if not isinstance(value, dict):
        return value
    counter = counter or itertools.count(1)
    if next(counter) > MOST_DICTIONARIES:
        raise pickle.UnpicklingError(f"more than {MOST_DICTIONARIES} dictionaries in each other")
    return {key: _plain(item, counter) for key, item in value.items()}


def _check_unpacked_size(archive: zipfile.ZipFile) -> None:
    """Raises ValueError for more than LARGEST_ARRAYS; zipfile reads no more of an entry than its size says."""
    size = sum(entry.file_size for entry in archive.infolist())
    if size > LARGEST_ARRAYS:
        raise ValueError(f"it unpacks to {size / 1e9:.1f} GB, more than {LARGEST_ARRAYS / 1e9:.1f}")


def read_arrays(path: Path) -> dict:
    """The arrays of a .npz or .pkl file. Raises UserError; runs nothing."""
    try:
        if path.suffix == ".pkl":
            # From memory: a file that claims to go on is cut at its end, and no room is made for what it claims.
            loaded = ArraysOnly(io.BytesIO(path.read_bytes())).load()
            if not isinstance(loaded, dict):
                raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}, not a dictionary of arrays")
            return _plain(loaded)
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            _check_unpacked_size(archive)
            for name in archive.namelist():
                data = io.BytesIO(archive.read(name))
                shape, dtype = _read_header(data)
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize > len(data.getvalue()) - data.tell():
                    raise ValueError(f"{name} claims more numbers than it holds")
                if dtype.hasobject:  # a pickle inside
                    value = _plain(ArraysOnly(data).load())
                else:
                    data.seek(0)
                    value = _checked_letters(np.lib.format.read_array(data, allow_pickle=False))
                arrays[name.removesuffix(".npy")] = value
        return arrays
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"cannot read {path}: {reason(error)}; give the original .npz or .pkl file") from None


def _read_header(data) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array in an open .npy file, which is then at the array's values."""
    shape, _, dtype = HEADERS[np.lib.format.read_magic(data)](data)
    return shape, dtype


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in a .npz file, without reading them, or in a .pkl. Raises UserError."""
    if path.suffix == ".pkl":
        return {key: np.shape(value) for key, value in read_arrays(path).items()}
    try:
        shapes = {}
        with zipfile.ZipFile(path) as archive:
            _check_unpacked_size(archive)
            for name in archive.namelist():
                with archive.open(name) as data:
                    shapes[name.removesuffix(".npy")], _ = _read_header(data)
        return shapes
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read {path}: {reason(error)}; give the original .npz file") from None


@functools.lru_cache(maxsize=8)
def model_files(kind: str, path: Path) -> dict[str, Path]:
    """Gender → model file. path: one file, for every gender, or a folder with one for each.

    In a folder, files that hold something else than a model of that kind are passed over. Raises UserError,
    with what is wrong with each, when no file is left.
    """
    if path.is_file():
        return {gender: path for gender in GENDERS}
    files, faults = {}, []
    for file in sorted(path.rglob("*")) if path.is_dir() else []:
        gender = _gender_of(str(file.relative_to(path)).lower())
        if file.suffix not in (".npz", ".pkl") or gender in files:
            continue
        if fault := _model_fault(kind, file):
            faults.append(f"{file.relative_to(path)} ({fault})")
        else:
            files[gender] = file
    if not files:
        passed_over = f" (passed over: {', '.join(faults)})" if faults else ""
        raise UserError(f"no {kind} body model at {path}{passed_over}; give a .npz or .pkl file, or a folder of them")
    return {gender: files.get(gender, next(iter(files.values()))) for gender in GENDERS}


def _gender_of(name: str) -> str:
    """As the files of the models' authors are named: SMPL_FEMALE.pkl, basicmodel_f_lbs_10_207_0_v1.1.0.pkl."""
    if "female" in name or "_f_" in name:
        return "female"
    return "male" if "male" in name or "_m_" in name else "neutral"


def _model_fault(kind: str, file: Path) -> str:
    """Why a file holds no model of that kind; "" if it does."""
    try:
        shapes = read_shapes(file)
    except UserError as error:
        return str(error)
    missing = [key for key in NEEDED if key not in shapes]
    if missing:
        return f"lacks {missing[0]}"
    joints = shapes["weights"][-1:]
    return "" if joints == (JOINT_COUNTS[kind],) else f"weights of shape {shapes['weights']}"


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
    faces = torch.as_tensor(np.asarray(load_model(kind, model_files(kind, path)["neutral"]).faces)).long()
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
    vertices = torch.stack([posed_vertices(spec, *person) for person in zip(poses, betas, genders)])
    vertices[..., 1] -= vertices[..., 1].amin(1, keepdim=True)
    return vertices


@torch.no_grad()
def posed_vertices(
    spec: str,
    pose: np.ndarray,
    betas: np.ndarray,
    gender: str,
    smpl_hands: np.ndarray | None = None,
    head: np.ndarray | None = None,
    expression: np.ndarray | None = None,
) -> Tensor:
    """One body where its model puts it, (V, 3) metres. pose: (156,) as of `smpl_vertices`; betas: (S,).

    smpl_hands: (2, 3) axis-angle of the two hand joints that SMPL alone has. head: (3, 3) of jaw and eyes, expression:
    (10,), which SMPL-X alone has. None: at rest.
    """
    kind, path, _ = split_spec(spec)
    model = load_model(kind, model_files(kind, path)[gender])

    def row(values, *shape: int) -> Tensor:
        values = np.zeros(shape) if values is None else values
        return torch.from_numpy(np.array(values, np.float32)).view(1, *shape)

    directions = model._assets.shapedirs.shape[-1]
    if kind == "smplx" and directions < 300:
        directions = 10  # files of the first release: ten of shape, then those of expression
    width = min(directions, model.NUM_SHAPE_COEFFS, len(betas))
    inputs = {"pelvis_rotation": row(pose[:3], 3), "shape": row(betas[:width], width)}
    body, hands = row(pose[3:66], 21, 3), row(pose[66:], 30, 3)
    if kind == "smpl":
        inputs["body_pose"] = torch.cat([body, row(smpl_hands, 2, 3)], dim=1)
    else:
        inputs.update(body_pose=body, hand_pose=hands)
    if kind == "smplx":
        inputs.update(head_pose=row(head, 3, 3), expression=row(expression, 10))
    return model.forward_vertices(**inputs)[0]


def read_amass(path: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
    """An AMASS file, thinned to FRAMES_PER_SECOND → poses (F, 156), betas (16,), gender.

    poses: root 3, body 63, hands 90, axis-angle, y up. Files have 156 columns (SMPL+H), 165 (SMPL-X: jaw and eyes are
    left out) or 72 (SMPL: no hands). Raises UserError for a file that is none of these or holds what is no number.
    """
    arrays = read_arrays(Path(path))
    betas = np.zeros(16, np.float32)
    try:
        poses = _whole_poses(arrays)
        given = np.asarray(arrays.get("betas", betas), dtype=np.float32).reshape(-1)[:16]
        # Rates and genders are 0-dimensional or arrays of one.
        rate = float(np.ravel(arrays.get("mocap_framerate", arrays.get("mocap_frame_rate", 60)))[0])
        gender = np.ravel(arrays.get("gender", "neutral"))[0]
        gender = (gender.decode(errors="replace") if isinstance(gender, bytes) else str(gender)).lower()
    except KeyError:
        raise UserError(f"{path} holds no 'poses'; give an AMASS motion (shape files have none)") from None
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path} holds what no AMASS motion holds ({reason(error)}); leave it out") from None
    if poses.ndim != 2 or poses.shape[1] not in POSE_COLUMNS or not len(poses):
        raise UserError(f"{path}: poses of shape {poses.shape}; AMASS has 72, 156 or 165 columns")
    betas[: len(given)] = given
    if not (np.abs(poses).max() < LARGEST_ANGLE and np.isfinite(betas).all() and np.isfinite(rate)):
        raise UserError(f"{path} holds poses or betas that are no numbers; leave it out")
    poses = poses[:: max(1, round(rate / FRAMES_PER_SECOND))]
    hands = {72: np.zeros((len(poses), 90)), 156: poses[:, 66:156], 165: poses[:, 75:165]}[poses.shape[1]]
    full = np.concatenate([_facing_front(poses[:, :3]), poses[:, 3:66], hands], axis=1).astype(np.float32)
    return full, betas, gender if gender in GENDERS else "neutral"


def _whole_poses(arrays: dict) -> np.ndarray:
    """(F, 72, 156 or 165): `poses` or, in files that have it in pieces only, root, body and hands.

    Raises KeyError when there are neither, ValueError when the pieces do not fit.
    """
    if "poses" in arrays:
        return np.asarray(arrays["poses"], dtype=np.float64)
    root, body = (np.asarray(arrays[name], dtype=np.float64) for name in ("root_orient", "pose_body"))
    hands = np.asarray(arrays.get("pose_hand", np.zeros((len(root), 90))), dtype=np.float64)
    return np.concatenate([root, body, hands], axis=1)


def _facing_front(root: np.ndarray) -> np.ndarray:
    """AMASS has z up and any heading: its root rotations (F, 3), axis-angle, with y up and the body's front at +z."""
    from scipy.spatial.transform import Rotation

    upright = Rotation.from_euler("x", -90, degrees=True) * Rotation.from_rotvec(root)
    front = upright.apply([0.0, 0.0, 1.0])
    heading = np.arctan2(front[:, 0], front[:, 2])
    return (Rotation.from_euler("y", -heading[:, None]) * upright).as_rotvec()


@functools.lru_cache(maxsize=8)
def motion_files(folder: str) -> tuple[Path, ...]:
    """The motions below a folder, in the order of their names; AMASS's shape files are left out.

    Files that are no motions by what they hold are passed over, with one warning on stderr. Raises UserError
    when none is left.
    """
    files = sorted(Path(folder).rglob("*.npz"))
    files = [path for path in files if not path.stem.endswith(("shape", "_stagei"))]
    faults = {path: _motion_fault(path) for path in files}
    motions = tuple(path for path in files if not faults[path])
    passed_over = [f"{path.relative_to(folder)} ({fault})" for path, fault in faults.items() if fault]
    if not motions:
        reasons = f": {', '.join(passed_over)}" if passed_over else ""
        raise UserError(f"no AMASS motions (.npz) in {folder}{reasons}")
    if passed_over:
        count = f"{len(passed_over)} of {len(files)}"
        print(f"warning: {count} files in {folder} are passed over: {', '.join(passed_over)}", file=sys.stderr)
    return motions


def _motion_fault(path: Path) -> str:
    """Why a file is no motion, from the shapes of its arrays alone; "" if it is one."""
    try:
        shapes = read_shapes(path)
    except UserError as error:
        return str(error)
    if "poses" not in shapes:
        return "" if {"root_orient", "pose_body"} <= shapes.keys() else "holds no poses"
    is_usual = len(shapes["poses"]) == 2 and shapes["poses"][0] and shapes["poses"][1] in POSE_COLUMNS
    return "" if is_usual else f"poses of shape {shapes['poses']}"


@functools.cache
def is_readable_motion(file: Path) -> bool:
    """Whether `read_amass` takes it; if not, says so on stderr, once."""
    try:
        motion(file)
    except UserError as error:
        print(f"warning: {error}; it is passed over", file=sys.stderr)
        return False
    return True


motion = functools.lru_cache(maxsize=64)(read_amass)
