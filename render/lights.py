"""Distant light on matt surfaces, as polynomials of the normal."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from render.cameras import Cameras, from_camera


@dataclass(frozen=True)
class Lights:
    """The light that falls on each side of a body, as a polynomial of the unit normal.

    coefficients: (N, 9, 3) of 1, x, y, z, xy, yz, zx, xx, yy in red, green and blue: the span of the spherical
    harmonics up to the second order, which holds any distant light on a matt surface to 1 % (Ramamoorthi and
    Hanrahan 2001).
    """

    coefficients: Tensor

    def at(self, normals: Tensor) -> Tensor:
        """Unit normals (V, 3) or (N, V, 3) → the light that falls there, (N, V, 3), not negative."""
        return (polynomial(normals) @ self.coefficients).clamp(min=0)

    def __add__(self, other: "Lights") -> "Lights":
        return Lights(self.coefficients + other.coefficients)


def polynomial(normals: Tensor) -> Tensor:
    """Unit normals (..., 3) → (..., 9): 1, x, y, z, xy, yz, zx, xx, yy, which `Lights` are made of."""
    x, y, z = normals.unbind(-1)
    return torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, z * x, x * x, y * y], dim=-1)


def ambient_light(colour: Tensor) -> Lights:
    """The same light from all sides. colour: (N, 3)."""
    return Lights(F.pad(colour[:, None], (0, 0, 0, 8)))


def directional_light(direction: Tensor, colour: Tensor) -> Lights:
    """Light from a direction, wrapped softly round the body: (0.5 + 0.5 n.d)^2 (half-Lambert, Valve 2004).

    direction: (N, 3) unit, towards the light; colour: (N, 3).
    """
    x, y, z = direction.unbind(-1)
    # z * z is 1 - x * x - y * y on the unit sphere.
    linear, mixed = (2 * x, 2 * y, 2 * z), (2 * x * y, 2 * y * z, 2 * z * x)
    squares = (x * x - z * z, y * y - z * z)
    polynomial = torch.stack([1 + z * z, *linear, *mixed, *squares], dim=-1)
    return Lights(polynomial[..., None] / 4 * colour[:, None])


def studio_lights(cameras: Cameras) -> Lights:
    """Soft light from above the camera's left shoulder, the same for every view."""
    one = torch.ones_like(cameras.focal)
    white = one[:, None].expand(-1, 3)
    direction = from_camera(cameras, -19 * one, 23 * one)
    return ambient_light(0.45 * white) + directional_light(direction, 0.6 * white)
