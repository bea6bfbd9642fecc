"""Pinhole cameras: where they stand and what they see.

Cameras follow OpenCV (x right, y down, z forward). Pixel (row 0, column 0) covers [0, 1) x [0, 1), so its centre is
(0.5, 0.5). The world is in metres, y up, a body looks along +z.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from render.bodies import Body


@dataclass(frozen=True)
class Cameras:
    """N pinhole cameras. rotation: (N, 3, 3) world to camera; translation: (N, 3); focal: (N,) in image heights."""

    rotation: Tensor
    translation: Tensor
    focal: Tensor

    def to(self, device) -> "Cameras":
        return Cameras(self.rotation.to(device), self.translation.to(device), self.focal.to(device))

    def take(self, index: Tensor) -> "Cameras":
        """Those that index (M,) names, in its order."""
        return Cameras(self.rotation[index], self.translation[index], self.focal[index])

    def project(self, vertices: Tensor, height: int, width: int) -> Tensor:
        """vertices: (V, 3) or (N, V, 3) world → (N, V, 3): pixel x, pixel y, depth in metres."""
        points = vertices @ self.rotation.transpose(1, 2) + self.translation[:, None]
        depth = points[..., 2:]
        scale = self.focal[:, None, None] * height / depth
        centre = points.new_tensor([width / 2, height / 2])
        return torch.cat([points[..., :2] * scale + centre, depth], dim=-1)


def look_at(eye: Tensor, target: Tensor, fov_degrees: Tensor) -> Cameras:
    """Cameras at eye (N, 3) that look at target (N, 3), y up; fov_degrees: (N,) vertical field of view."""
    forward = F.normalize(target - eye, dim=-1)
    up = torch.tensor([[0.0, 1.0, 0.0]]).to(eye).expand_as(eye)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=1)
    translation = -(rotation @ eye[..., None])[..., 0]
    return Cameras(rotation, translation, 0.5 / torch.tan(torch.deg2rad(fov_degrees) / 2))


def orbit_direction(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Degrees (N,) → unit vectors (N, 3) from a body towards the camera; azimuth 0 is in front, 90 on its left."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    level = elevation.cos()
    return torch.stack([azimuth.sin() * level, elevation.sin(), azimuth.cos() * level], dim=-1)


def orbit_cameras(
    body: Body, azimuth: Tensor, elevation: Tensor, fov_degrees: Tensor, fill: float = 0.9, aspect: float = 1.0
) -> Cameras:
    """Cameras round a body at azimuth and elevation (N,) degrees; azimuth 0 sees the front, 90 its left side.

    fill: share of the picture, in height or in width, that the body takes from every side. aspect: width / height.
    """
    low, high = body.vertices.amin(0), body.vertices.amax(0)
    centre = (low + high) / 2
    radius = (body.vertices - centre)[:, [0, 2]].norm(dim=-1).amax()
    half_extent = torch.maximum((high - low)[1] / 2, radius / aspect)
    distance = half_extent / (torch.tan(torch.deg2rad(fov_degrees) / 2) * fill) + (high - low)[2] / 2
    direction = orbit_direction(azimuth, elevation)
    return look_at(centre + direction * distance[:, None], centre.expand_as(direction), fov_degrees)


def from_camera(cameras: Cameras, azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit directions (N, 3) in the world, from angles (N,) in degrees seen from each camera: 0, 0 is behind it."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    level = elevation.cos()
    # In the camera's axes: x right, y down, z forward.
    towards = torch.stack([azimuth.sin() * level, -elevation.sin(), -azimuth.cos() * level], dim=-1)
    return (towards[:, None] @ cameras.rotation)[:, 0]
