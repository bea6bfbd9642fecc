"""Anny in plausible poses and shapes: standing, walking, sitting, reaching, arms out.

A pose is a dict of bone label → (3,) rotation in degrees about the body's own left (x), up (y) and front (z) axes,
applied in the order z, y, x at the joint, relative to the resting pose. Angles stay within JOINT_LIMITS.
"""

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from render.bodies import load_anny

# Degrees about x, y, z for the left side; the right side mirrors y and z. At rest the arms hang 45 degrees outwards.
JOINT_LIMITS = {
    "upperarm01": ((-120, 40), (-40, 40), (-38, 100)),  # x < 0 swings forward, z > 0 raises sideways
    "lowerarm01": ((-120, 5), (-30, 30), (-10, 10)),
    "wrist": ((-40, 40), (-20, 20), (-30, 30)),
    "upperleg01": ((-105, 25), (-30, 30), (-8, 40)),
    "lowerleg01": ((0, 125), (-5, 5), (-5, 5)),
    "foot": ((-25, 35), (-15, 15), (-10, 10)),
    "spine05": ((-10, 25), (-12, 12), (-10, 10)),
    "spine03": ((-10, 25), (-15, 15), (-12, 12)),
    "spine01": ((-10, 20), (-15, 15), (-10, 10)),
    "neck01": ((-20, 25), (-25, 25), (-12, 12)),
    "head": ((-20, 25), (-30, 30), (-12, 12)),
}
SIDED = ("upperarm01", "lowerarm01", "wrist", "upperleg01", "lowerleg01", "foot")
SIDES = {joint: (".L", ".R") if joint in SIDED else ("",) for joint in JOINT_LIMITS}
JOINTS = tuple(joint + side for joint, sides in SIDES.items() for side in sides)
# Of the shapes drawn: gender 0 male to 1 female; age 1/3 child, 2/3 adult, 1 old.
PHENOTYPE_RANGES = {
    "gender": (0, 1),
    "age": (0.4, 1.0),
    "muscle": (0.3, 0.7),
    "weight": (0.2, 0.8),
    "height": (0.3, 0.7),
    "proportions": (0.3, 0.7),
}
PHENOTYPE_AXES = tuple(PHENOTYPE_RANGES)
FAMILIES = {"standing": 0.35, "walking": 0.25, "reaching": 0.15, "sitting": 0.10, "arms out": 0.15}


def sample_pose(rng: np.random.Generator, family: str | None = None) -> dict[str, np.ndarray]:
    """One pose of a family (drawn by FAMILIES when None)."""
    family = family or str(rng.choice(list(FAMILIES), p=list(FAMILIES.values())))
    pose: dict[str, np.ndarray] = {}

    def turn(bone: str, x: float = 0, y: float = 0, z: float = 0, spread: float = 5):
        joint = bone.removesuffix(".L").removesuffix(".R")
        low, high = np.array(JOINT_LIMITS[joint]).T
        angles = np.clip(np.array([x, y, z]) + rng.normal(0, spread, 3), low, high)
        pose[bone] = angles * ((1, -1, -1) if bone.endswith(".R") else (1, 1, 1))

    for bone in ("spine05", "spine03", "spine01", "neck01"):
        turn(bone, spread=3)
    turn("head", y=rng.normal(0, 12))
    stride = rng.uniform(12, 30) * rng.choice([-1, 1]) if family == "walking" else 0
    for side, sign in ((".L", 1), (".R", -1)):
        forward = sign * stride
        # Legs.
        if family == "sitting":
            turn("upperleg01" + side, x=-88, z=rng.uniform(0, 15))
            turn("lowerleg01" + side, x=rng.uniform(70, 95))
        else:
            bend = max(0.0, 8 - forward) * rng.uniform(0.5, 1.2) if stride else rng.uniform(0, 8)
            turn("upperleg01" + side, x=-forward - bend / 2, z=rng.uniform(0, 8), spread=3)
            turn("lowerleg01" + side, x=bend, spread=2)
        turn("foot" + side, spread=3)
        # Arms.
        if family == "arms out":
            turn("upperarm01" + side, z=rng.uniform(20, 50), spread=6)
            turn("lowerarm01" + side, x=rng.uniform(-10, 0))
        elif family == "reaching":
            turn("upperarm01" + side, x=rng.uniform(-110, -10), z=rng.uniform(-20, 70), spread=8)
            turn("lowerarm01" + side, x=rng.uniform(-70, 0))
        elif family == "sitting":
            turn("upperarm01" + side, x=-25, z=-25)
            turn("lowerarm01" + side, x=-45)
        else:
            turn("upperarm01" + side, x=forward * 0.9, z=rng.uniform(-36, -8))
            turn("lowerarm01" + side, x=-rng.uniform(0, 45))
        turn("wrist" + side, spread=6)
    return pose


# Joints of SMPL's body pose, without the root, which each of ours turns.
SMPL_JOINTS = {
    "upperleg01.L": 0, "upperleg01.R": 1, "spine05": 2, "lowerleg01.L": 3, "lowerleg01.R": 4, "spine03": 5,
    "foot.L": 6, "foot.R": 7, "spine01": 8, "neck01": 11, "head": 14, "upperarm01.L": 15, "upperarm01.R": 16,
    "lowerarm01.L": 17, "lowerarm01.R": 18, "wrist.L": 19, "wrist.R": 20,
}  # fmt: skip
HANGING = 45  # degrees below SMPL's, at rest: SMPL's arms stand out


def smpl_pose(pose: dict[str, np.ndarray]) -> np.ndarray:
    """A pose of `sample_pose` for SMPL's joints: (156,) axis-angle, root 3, body 63, hands 90, in radians."""
    body = np.zeros((21, 3))
    for bone, degrees in pose.items():
        turned = rotation(degrees).double().numpy()
        if bone.startswith(("upperarm", "lowerarm", "wrist")):
            hanging = rotation(np.array([0, 0, HANGING if bone.endswith(".R") else -HANGING])).double().numpy()
            turned = turned @ hanging if bone.startswith("upperarm") else hanging.T @ turned @ hanging
        body[SMPL_JOINTS[bone]] = Rotation.from_matrix(turned).as_rotvec()
    return np.concatenate([np.zeros(3), body.reshape(-1), np.zeros(90)]).astype(np.float32)


def sample_phenotype(rng: np.random.Generator) -> dict[str, float]:
    """A body shape: a value in its range for each of PHENOTYPE_AXES."""
    return {axis: float(rng.uniform(low, high)) for axis, (low, high) in PHENOTYPE_RANGES.items()}


def rotation(degrees: np.ndarray) -> Tensor:
    """(3,) degrees about x, y, z → (3, 3), z first."""
    x, y, z = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    one, zero = torch.ones(()), torch.zeros(())

    def matrix(*entries):
        return torch.stack(entries).view(3, 3)

    about_x = matrix(one, zero, zero, zero, x.cos(), -x.sin(), zero, x.sin(), x.cos())
    about_y = matrix(y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos())
    about_z = matrix(z.cos(), -z.sin(), zero, z.sin(), z.cos(), zero, zero, zero, one)
    return about_x @ about_y @ about_z


def _anny(poses: list[dict[str, np.ndarray]], phenotypes: list[dict[str, float]]) -> tuple[dict, Tensor]:
    """Anny's own output for poses and shapes, and the rotation (3, 3) that takes its axes to ours."""
    model = load_anny()
    # Ours (left, up, front) in Anny's axes: z up, front along -y.
    axes = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    transforms = torch.eye(4).repeat(len(poses), len(model.bone_labels), 1, 1)
    for row, pose in enumerate(poses):
        for bone, degrees in pose.items():
            transforms[row, model.bone_labels.index(bone), :3, :3] = axes @ rotation(degrees) @ axes.T
    shapes = {axis: [phenotype.get(axis, 0.5) for phenotype in phenotypes] for axis in PHENOTYPE_AXES}
    shapes = {axis: torch.tensor(values) for axis, values in shapes.items()}
    return model(pose_parameters=transforms, phenotype_kwargs=shapes), axes.T


@torch.no_grad()
def anny_vertices(poses: list[dict[str, np.ndarray]], phenotypes: list[dict[str, float]]) -> Tensor:
    """Poses and shapes → (N, V, 3) metres, y up, looking along +z, the lowest point at y = 0."""
    output, to_ours = _anny(poses, phenotypes)
    vertices = output["vertices"].float() @ to_ours.T
    vertices[..., 1] -= vertices[..., 1].amin(1, keepdim=True)
    return vertices


@torch.no_grad()
def anny_in_our_axes(poses: list[dict[str, np.ndarray]], phenotypes: list[dict[str, float]]) -> tuple[dict, Tensor]:
    """Anny's output for one pose and shape, and the (4, 4) that takes it to metres, y up, the posed body's lowest
    point at y = 0."""
    output, to_ours = _anny(poses, phenotypes)
    matrix = torch.eye(4)
    matrix[:3, :3] = to_ours
    matrix[1, 3] = -(output["vertices"][0].float() @ to_ours.T)[:, 1].min()
    return output, matrix
