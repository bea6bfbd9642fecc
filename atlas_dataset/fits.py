"""Files that say how a body stands in a user's picture: our own renders' columns, and what fitters of SMPL write.

Ours: what `views.sample_view` draws for a render, as JSON or npz. SMPL family: HMR2 (4D-Humans, Goel et al. 2023) and
TokenHMR (Dwivedi et al. 2024): rotation matrices, `pred_cam` in a crop (`box_center`, `box_size`); PyMAF (Zhang et al.
2021) and VIBE: `pose`, `orig_cam`, or `pred_cam` and `bboxes`; SMPLify-X (Pavlakos et al. 2019): axis-angle,
`camera_translation`. Their cameras are OpenCV's, as ours are. Nothing in a file is run.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from atlas_dataset.views import frame_bodies, view_lights
from common.errors import UserError, reason
from common.text import parse_json, read_text
from render.cameras import Cameras
from render.projection import Fit
from render.rigs import AnnyRig, SmplRig, load_rig
from render.smpl import GENDERS, KINDS, MOST_DICTIONARIES, posed_vertices, read_arrays

FIT_SUFFIXES = (".json", ".npz", ".pkl")
CAMERA = ("azimuth", "elevation", "fov_degrees", "fill", "bottom")  # of our own fits
LIGHT = ("ambient", "lights")
ROOTS = ("global_orient", "root_orient")
WHOLE_POSES = ("pose", "poses", "full_pose", "pred_pose", "pred_rotmat", "smpl_thetas")
SHAPES = ("betas", "pred_betas", "pred_shape", "smpl_betas", "shape")
TRANSLATIONS = ("pred_cam_t_full", "cam_t_full", "camera_translation", "cam_t")
FOCAL_LENGTHS = ("scaled_focal_length", "focal_length", "camera_focal_length")
CROP_CAMERAS = ("pred_cam", "camera_bbox", "cam")
HMR2_FOCAL, HMR2_CROP = 5000.0, 256.0  # pixels, in a crop of so many: HMR2's EXTRA.FOCAL_LENGTH and MODEL.IMAGE_SIZE
SMPLIFYX_FOCAL = 5000.0  # pixels of the picture, where its file does not say otherwise
FAR = 500.0  # picture heights: a camera with this focal length sees as good as without perspective
SMPLX_ALONE = ("jaw_pose", "leye_pose", "reye_pose", "expression")
BODY_JOINTS = {"smpl": (23, 21), "smplh": (23, 21), "smplx": (21,)}  # a fit of SMPL poses SMPL-H too, but its hands


def read_fit(path: str | Path, body_spec: str, height: int, width: int) -> Fit:
    """How the body of `body_spec` stands in a picture of height x width pixels, from a .json, .npz or .pkl file.

    Raises UserError, one line with the path, for a file of another body, without a camera, of several people, or with
    what is no number.
    """
    path = Path(path)
    read_values = _read_values(path)
    try:
        values = _flat(read_values, itertools.count(1))
    except (RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"{path} holds what no fit holds ({reason(error)}); give one of README's kinds") from None
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds what is no number; fit the picture again")
    try:
        if values.keys() & {"azimuth", "fov_degrees"}:
            return _own_fit(values, body_spec, width / height)
        return _smpl_fit(values, body_spec, height, width)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path} holds what no fit holds ({reason(error)}); give one of README's kinds") from None


def find_fit(folder: str | Path, picture: str | Path) -> Path | None:
    """The fit of a picture in a folder: NAME.json, NAME.npz or NAME.pkl; None where there is none."""
    return next(filter(Path.is_file, _names_of_fits(folder, picture)), None)


def fit_beside(folder: str | Path, picture: str | Path) -> Path:
    """The same. Raises UserError when there is none."""
    if fit := find_fit(folder, picture):
        return fit
    names = ", ".join(name.name for name in _names_of_fits(folder, picture))
    raise UserError(f"no fit of {picture} in {folder}: put one of {names} there")


def _names_of_fits(folder: str | Path, picture: str | Path) -> list[Path]:
    return [Path(folder) / f"{Path(picture).stem}{suffix}" for suffix in FIT_SUFFIXES]


def _read_values(path: Path) -> dict:
    if path.suffix in (".npz", ".pkl"):
        if not path.is_file():
            raise UserError(f"no fit at {path}; give a .json, .npz or .pkl file")
        return read_arrays(path)
    if path.suffix != ".json":
        raise UserError(f"{path} is no fit; give a .json, .npz or .pkl file")
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; give a JSON object") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not an object with a fit's names")
    return values


def _flat(values: dict, counter: Iterator[int]) -> dict:
    """Dictionaries inside (`pred_smpl_params`; a tracker's only person) opened, lists and scalars as arrays.

    counter: of the dictionaries, as in render/smpl.py. Raises ValueError for more than MOST_DICTIONARIES.
    """
    if next(counter) > MOST_DICTIONARIES:
        raise ValueError(f"more than {MOST_DICTIONARIES} dictionaries in each other")
    flat = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 0:
            value = value.item()
        if isinstance(value, dict):
            flat |= _flat(value, counter)
        elif isinstance(value, (list, tuple, int, float)) and str(name) != "lights":
            flat[str(name)] = np.asarray(value, dtype=None if value else float)
        else:
            flat[str(name)] = value
    return flat


def _numbers(values: dict, name: str, *shapes: tuple[int, ...]) -> np.ndarray:
    """values[name] in the first of `shapes` that it has the size of. Raises UserError for none, and several people."""
    array = np.asarray(values[name], dtype=np.float64)
    for shape in shapes:
        if array.size == np.prod(shape, dtype=int):
            return array.reshape(shape)
    sizes = [int(np.prod(shape, dtype=int)) for shape in shapes]
    if array.ndim > 1 and any(array[0].size == size for size in sizes):
        raise UserError(f"{name} is of {len(array)} people or frames; save the fit of one")
    raise UserError(f"{name} has shape {array.shape}; it needs {' or '.join(map(str, sizes))} numbers")


def _first(values: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if values.get(name) is not None), None)


# Ours.


def _own_fit(values: dict, body_spec: str, aspect: float) -> Fit:
    rig, kind = load_rig(body_spec), body_spec.partition(":")[0]
    told = str(values.get("body") or kind)
    if told.partition(":")[0] != kind:
        raise UserError(f"it is a fit of the body {told!r}, not of {body_spec!r}")
    missing = [name for name in CAMERA if values.get(name) is None]
    if missing:
        raise UserError(f"it has no whole camera: {', '.join(missing)} missing")
    view = {name: float(_numbers(values, name, ())) for name in CAMERA}
    for name in ("pose", "shape"):
        view[name] = np.asarray(values.get(name, []), dtype=np.float64).reshape(-1).tolist()
    view["gender"] = str(values.get("gender") or "neutral")
    sizes = (len(view["pose"]), len(view["shape"]))
    if not _fits(rig, view):
        raise UserError(f"a pose of {sizes[0]} numbers and a shape of {sizes[1]} are not of the body {body_spec!r}")
    if not 0 < view["fov_degrees"] < 179 or not view["fill"] > 0 or not 0 <= view["bottom"] < 1:
        raise UserError("fov_degrees is to be in 0 to 179, fill above 0, bottom in 0 to 1")
    vertices = rig.vertices([view])
    cameras = frame_bodies(vertices, [view], aspect)
    lights = None
    if all(values.get(name) is not None for name in LIGHT):
        view["ambient"] = _numbers(values, "ambient", (3,)).tolist()
        view["lights"] = np.array(list(values["lights"]), dtype=np.float64).reshape(-1, 5).tolist()
        if not np.isfinite(view["lights"]).all():
            raise UserError("lights holds what is no number")
        lights = view_lights(cameras, [view])
    return Fit(vertices[0], cameras, lights)


def _fits(rig, view: dict) -> bool:
    """Whether a pose and a shape have as many numbers as the rig takes."""
    pose, shape = len(view["pose"]), len(view["shape"])
    if isinstance(rig, SmplRig):
        return pose == 156 and shape > 0 and view["gender"] in GENDERS
    if isinstance(rig, AnnyRig):
        drawn = rig.sample(np.random.default_rng(0))
        return pose in (0, len(drawn["pose"])) and shape in (0, len(drawn["shape"]))
    return pose == shape == 0


# The SMPL family.


def _smpl_fit(values: dict, body_spec: str, height: int, width: int) -> Fit:
    kind = body_spec.partition(":")[0]
    whole, root = _first(values, WHOLE_POSES), _first(values, ROOTS)
    if whole is None and (root is None or values.get("body_pose") is None):
        raise UserError(f"it holds no pose and camera, but {', '.join(list(values)[:6]) or 'nothing'}")
    if kind not in KINDS:
        raise UserError(f"it is a fit of the SMPL family and cannot pose the body {body_spec!r}")
    if root is not None and values.get("body_pose") is not None:
        rotations = np.concatenate([_rotations(values, root, (1,)), _body_pose(values)])
    else:
        rotations = _rotations(values, whole, (24, 52, 55))
    is_smplx = len(rotations) == 55 or any(values.get(name) is not None for name in SMPLX_ALONE)
    joints = {24: 23, 22: 21, 52: 21, 55: 21}[len(rotations)]
    if joints not in BODY_JOINTS[kind] or is_smplx != (kind == "smplx"):
        other = "SMPL-X" if is_smplx else "SMPL" if joints == 23 else "SMPL-H"
        raise UserError(f"it is a fit of {other}, not of the body {body_spec!r}")
    pose, head = np.zeros(156), np.zeros((3, 3))
    pose[:66] = rotations[:22].ravel()
    if len(rotations) > 24:
        pose[66:] = rotations[-30:].ravel()
    elif kind != "smpl":
        pose[66:] = np.concatenate([_hand(values, side) for side in ("left", "right")]).ravel()
    if kind == "smplx":
        if len(rotations) == 55:
            head = rotations[22:25]
        else:
            names = [name for name in SMPLX_ALONE[:3] if values.get(name) is not None]
            for name in names:
                head[SMPLX_ALONE.index(name)] = _rotations(values, name, (1,))[0]
    smpl_hands = rotations[22:24] if joints == 23 else None
    expression = None
    if kind == "smplx" and values.get("expression") is not None:
        expression = np.zeros(10)
        told = np.asarray(values["expression"], dtype=np.float64).reshape(-1)[:10]
        expression[: len(told)] = told
    shape = _first(values, SHAPES)
    if shape is None:
        raise UserError("it holds no shape (betas)")
    betas = np.asarray(values[shape], dtype=np.float64)
    if betas.ndim > 1 and len(betas) > 1:
        raise UserError(f"{shape} is of {len(betas)} people or frames; save the fit of one")
    vertices = posed_vertices(body_spec, pose, betas.reshape(-1), _gender(values), smpl_hands, head, expression)
    if values.get("transl") is not None:
        vertices = vertices + torch.from_numpy(_numbers(values, "transl", (3,))).float()
    return Fit(vertices, _smpl_camera(values, height, width))


def _rotations(values: dict, name: str, counts: tuple[int, ...]) -> np.ndarray:
    """values[name], matrices or axis-angle, of one of so many joints → (J, 3) axis-angle."""
    sizes = [(count, *tail) for count in counts for tail in ((3,), (3, 3))]
    rotations = _numbers(values, name, *sizes)
    if rotations.ndim == 2:
        return rotations
    if np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() > 0.01:
        raise UserError(f"{name} holds matrices that are no rotations")
    return Rotation.from_matrix(rotations).as_rotvec()


def _body_pose(values: dict) -> np.ndarray:
    size = np.asarray(values["body_pose"]).size
    if size == 32:
        raise UserError("body_pose has 32 numbers: VPoser's code, not a pose; save VPoser's decoded pose in its place")
    return _rotations(values, "body_pose", (23, 21))


def _hand(values: dict, side: str) -> np.ndarray:
    """(15, 3) axis-angle; at rest where the fit has none, or has it in components that only its own model knows."""
    name = f"{side}_hand_pose"
    if values.get(name) is None:
        return np.zeros((15, 3))
    if 0 < np.asarray(values[name]).size < 45:
        print(f"warning: {name} is given in components of its model: the hand is left at rest", file=sys.stderr)
        return np.zeros((15, 3))
    return _rotations(values, name, (15,))


def _gender(values: dict) -> str:
    told = np.ravel(values.get("gender", "neutral"))[0]
    told = (told.decode() if isinstance(told, bytes) else str(told)).lower()
    gender = {"m": "male", "f": "female", "n": "neutral"}.get(told, told)
    if gender not in GENDERS:
        raise UserError(f"gender {told!r} is none of {', '.join(GENDERS)}")
    return gender


def _smpl_camera(values: dict, height: int, width: int) -> Cameras:
    """One camera. Raises UserError when the fit has none, or one of a crop without the crop's box."""
    translation, crop = _first(values, TRANSLATIONS), _first(values, CROP_CAMERAS)
    _check_picture_size(values, height, width)
    if translation is not None:
        focal = _focal(values)
        if focal is None and translation != "camera_translation":
            raise UserError(f"it holds {translation} but no focal_length, in pixels of the picture")
        if focal is None:
            focal = SMPLIFYX_FOCAL
            print(f"warning: a fit without focal_length: SMPLify-X's {focal:.0f} pixels are taken", file=sys.stderr)
        rotation = np.eye(3)
        if values.get("camera_rotation") is not None:
            rotation = _numbers(values, "camera_rotation", (3, 3))
        return _camera(rotation, _numbers(values, translation, (3,)), focal, height)
    if values.get("orig_cam") is not None:
        scale_x, _, x, y = _numbers(values, "orig_cam", (4,))
        return _distant(scale_x * width / 2, x, y, height)
    if crop is None:
        raise UserError(f"it holds no camera: {', '.join(TRANSLATIONS[:3])}, orig_cam or pred_cam")
    scale, x, y = _numbers(values, crop, (3,))
    if not scale > 0:
        raise UserError(f"{crop} has the scale {scale:.3g}, which is not above 0")
    if values.get("box_center") is not None and values.get("box_size") is not None:
        (centre_x, centre_y), size = _numbers(values, "box_center", (2,)), float(_numbers(values, "box_size", ()))
        is_distant = False
    elif box := _first(values, ("bboxes", "bbox")):
        centre_x, centre_y, size, *_ = _numbers(values, box, (4,), (3,))
        is_distant = True
    else:
        raise UserError(f"{crop} is a camera of a crop: add box_center and box_size, in pixels of the picture")
    if not size > 0:
        raise UserError(f"the crop's box has the size {size:.3g}, which is not above 0")
    # Half a crop is 1 / scale metres: the body's origin is off the picture's middle by the crop's centre and its shift.
    pixels_per_metre = size * scale / 2
    x, y = x + (centre_x - width / 2) / pixels_per_metre, y + (centre_y - height / 2) / pixels_per_metre
    if is_distant:
        return _distant(pixels_per_metre, x, y, height)
    focal = values.get("scaled_focal_length")
    focal = HMR2_FOCAL / HMR2_CROP * max(height, width) if focal is None else float(np.ravel(focal)[0])
    return _camera(np.eye(3), np.array([x, y, focal / pixels_per_metre]), focal, height)


def _focal(values: dict) -> float | None:
    name = _first(values, FOCAL_LENGTHS)
    if name is None:
        return None
    numbers = np.ravel(np.asarray(values[name], dtype=np.float64))
    if not len(numbers) or np.ptp(numbers) > 0.01 * abs(numbers[0]) or not numbers[0] > 0:
        raise UserError(f"{name} {numbers.tolist()} is not one length above 0")
    return float(numbers[0])


def _check_picture_size(values: dict, height: int, width: int) -> None:
    if values.get("img_size") is not None:
        told = _numbers(values, "img_size", (2,)).round().astype(int).tolist()  # width, height
        if told != [width, height]:
            raise UserError(f"it is of a picture of {told[0]}x{told[1]}, not of {width}x{height}")
    if values.get("camera_center") is not None:
        centre = _numbers(values, "camera_center", (2,))
        if np.abs(centre - np.array([width, height]) / 2).max() > 0.01 * max(width, height):
            raise UserError("its camera_center is not the picture's middle: give the whole picture that was fitted")


def _camera(rotation: np.ndarray, translation: np.ndarray, focal: float, height: int) -> Cameras:
    """focal: pixels."""
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01 or not translation[2] > 0:
        raise UserError("its camera is no rotation, or stands behind the body")
    arrays = (rotation[None], translation[None], np.array([focal / height]))
    return Cameras(*(torch.from_numpy(array).float() for array in arrays))


def _distant(pixels_per_metre: float, x: float, y: float, height: int) -> Cameras:
    """A camera without perspective, near enough; x, y: metres from the picture's middle to the body's origin."""
    if not pixels_per_metre > 0:
        raise UserError(f"its camera has the scale {pixels_per_metre:.3g}, which is not above 0")
    focal = FAR * height
    return _camera(np.eye(3), np.array([x, y, focal / pixels_per_metre]), focal, height)
