"""Bodies that can be posed: a rig samples poses and shapes and gives the vertices for them.

Every rig has `body`, the mesh at rest; `sample(rng)`, one pose as plain numbers; and `vertices(poses)`,
(N, V, 3) metres with the lowest point at y = 0. A pose is a dict of lists and strings, to be stored with a render.
"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError
from render.bodies import Body, load_anny_body, read_obj
from render.poses import FAMILIES, JOINTS, PHENOTYPE_AXES, anny_vertices, sample_phenotype, sample_pose, smpl_pose
from render.smpl import KINDS, is_readable_motion, load_smpl_body, motion, motion_files, smpl_vertices, split_spec


def load_body(spec: str) -> Body:
    """Body from a spec: "anny" (the free embedded body), "obj:PATH" (any mesh with UVs, y up), or the user's own
    "smpl:PATH", "smplh:PATH", "smplx:PATH" (a model file or a folder of them, its UV template beside it or after a
    comma).

    Raises UserError when the spec is unknown, a file is missing, or the mesh cannot carry a texture.
    """
    kind, _, path = spec.partition(":")
    if spec == "anny":
        return load_anny_body()
    if kind == "obj" and path:
        return read_obj(path)
    if kind in KINDS and path:
        return load_smpl_body(spec)
    raise UserError(f"unknown body {spec!r}: use anny, obj:PATH, smpl:PATH, smplh:PATH or smplx:PATH")


def absolute_spec(spec: str) -> str:
    """The same body, its files found from anywhere."""
    kind, _, path = spec.partition(":")
    if not path:
        return spec
    if kind not in KINDS or Path(path).exists():
        return f"{kind}:{Path(path).resolve()}"
    _, model, template = split_spec(spec)
    return f"{kind}:{model.resolve()},{template.resolve()}"


class StillRig:
    """A mesh that cannot be posed."""

    def __init__(self, spec: str):
        self.body = load_body(spec)

    def sample(self, rng: np.random.Generator) -> dict:
        return {"pose": [], "shape": [], "gender": ""}

    def named_pose(self, name: str, seed: int) -> dict:
        """The pose that a user names. Raises UserError when this body has none of that name."""
        if name != "rest":
            raise UserError(f"pose {name!r}: this body can only rest; anny and SMPL bodies can be posed")
        return {"pose": [], "shape": [], "gender": ""}

    def vertices(self, poses: list[dict]) -> Tensor:
        """(N, V, 3) for N poses; an empty pose rests."""
        return self.body.vertices.expand(len(poses), -1, -1)

    def posed(self, pose: dict) -> Body:
        """The body in a pose of `sample` or `named_pose`."""
        return replace(self.body, vertices=self.vertices([pose])[0])


class AnnyRig(StillRig):
    """pose: three angles in degrees for each of poses.JOINTS; shape: Anny's six phenotype axes in [0, 1]."""

    def sample(self, rng: np.random.Generator) -> dict:
        return {**_plain(sample_pose(rng)), "shape": list(sample_phenotype(rng).values())}

    def named_pose(self, name: str, seed: int) -> dict:
        if name == "rest":
            return super().named_pose(name, seed)
        if name not in FAMILIES:
            raise UserError(f"unknown pose {name!r}: use rest, {', '.join(FAMILIES)}")
        return _plain(sample_pose(np.random.default_rng(seed), name))

    def vertices(self, poses: list[dict]) -> Tensor:
        return anny_vertices(*self.parameters(poses))

    def parameters(self, poses: list[dict]) -> tuple[list[dict], list[dict]]:
        """Poses as bone → degrees, and shapes as axis → value."""
        angles = [dict(zip(JOINTS, np.array(pose["pose"]).reshape(-1, 3))) for pose in poses]
        return angles, [dict(zip(PHENOTYPE_AXES, pose["shape"])) for pose in poses]


def _plain(pose: dict[str, np.ndarray]) -> dict:
    """A pose of poses.sample_pose as one list, joint after joint."""
    angles = [angle for joint in JOINTS for angle in pose.get(joint, np.zeros(3)).tolist()]
    return {"pose": angles, "shape": [], "gender": ""}


SHAPE_COEFFICIENTS = 10  # of an SMPL body at rest; motions bring their own


def _resting(betas: list[float]) -> dict:
    return {"pose": [0.0] * 156, "shape": betas, "gender": "neutral"}


def _frame_of(file: Path, rng: np.random.Generator) -> dict:
    """One frame of an AMASS motion, drawn by rng."""
    frames, betas, gender = motion(file)
    return {"pose": frames[rng.integers(len(frames))].tolist(), "shape": betas.tolist(), "gender": gender}


class SmplRig(StillRig):
    """pose: (156,) axis-angle, root, body and hands; shape: betas. From AMASS, or Anny's poses or rest ("own", "rest")
    with shapes of their own."""

    def __init__(self, spec: str, poses: str):
        super().__init__(spec)
        self.spec, self.poses = spec, poses

    def sample(self, rng: np.random.Generator) -> dict:
        if self.poses in ("own", "rest"):
            resting = _resting(rng.normal(0, 1, SHAPE_COEFFICIENTS).clip(-2, 2).tolist())
            return resting if self.poses == "rest" else {**resting, "pose": smpl_pose(sample_pose(rng)).tolist()}
        files = list(motion_files(self.poses))
        while files:
            file = files[rng.integers(len(files))]
            if is_readable_motion(file):
                return _frame_of(file, rng)
            files.remove(file)
        raise UserError(f"no file in {self.poses} can be read as an AMASS motion")

    def named_pose(self, name: str, seed: int) -> dict:
        if name == "rest":
            return _resting([0.0] * SHAPE_COEFFICIENTS)
        if name in FAMILIES:
            pose = smpl_pose(sample_pose(np.random.default_rng(seed), name)).tolist()
            return {**_resting([0.0] * SHAPE_COEFFICIENTS), "pose": pose}
        return _frame_of(Path(name), np.random.default_rng(seed))

    def vertices(self, poses: list[dict]) -> Tensor:
        stacked = (np.array([pose[key] for pose in poses], np.float32) for key in ("pose", "shape"))
        return smpl_vertices(self.spec, *stacked, [pose["gender"] for pose in poses])


@functools.lru_cache(maxsize=4)
def load_rig(spec: str, poses: str = "own") -> StillRig:
    """A body's rig. poses: "rest", "own" (the body's own sampler), or a folder of AMASS motions (SMPL family).

    Raises UserError when the body cannot take such poses.
    """
    kind = spec.partition(":")[0]
    motions = None if poses in ("own", "rest") else poses
    if motions and kind not in KINDS:
        raise UserError(f"body {spec!r} cannot take the motions of {poses!r}; set data.render.poses to own or rest")
    if kind in KINDS:
        if motions:
            motion_files(motions)
        return SmplRig(spec, poses)
    return AnnyRig(spec) if spec == "anny" and poses == "own" else StillRig(spec)
