"""What each render shows: pose, shape, camera, light and background, from (seed, texture, view) alone."""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.pictures import open_image, picture_files, pixels_from_image
from config.configuration import Render
from render.cameras import Cameras, from_camera, look_at, orbit_direction
from render.lights import Lights, ambient_light, directional_light
from render.rigs import StillRig
from render.shading import render_views

VIEWS_AT_ONCE = 4  # bounds the renderer's memory
background_files = functools.lru_cache(maxsize=4)(picture_files)  # listed once
WAIST, KNEES = 0.55, 0.28  # of a standing body's height


def sample_view(render: Render, rig: StillRig, seed: int, texture_id: int, view: int) -> dict:
    """One render's pose, camera, lights and background as plain numbers, from the last three arguments alone.

    pose, shape, gender: as of the rig. azimuth, elevation, fov_degrees: the camera's, degrees. bottom: share of the
    body's height below the picture's edge. fill: share of the picture's height that the rest takes. ambient: colour.
    lights: [azimuth, elevation, red, green, blue] of each, degrees as seen from the camera. background: its kind.
    """
    rng = np.random.default_rng([seed, texture_id, view])

    def colour(strength: float) -> list[float]:
        return (strength * (1 + render.tint * rng.uniform(-1, 1, 3))).tolist()

    def between(limits: list[float]) -> float:
        return float(rng.uniform(*limits))

    sampled = {key: between(getattr(render, key)) for key in ("azimuth", "elevation", "fov_degrees", "fill")}
    sampled["bottom"] = 0.0 if rng.uniform() < render.full_body else float(rng.uniform(KNEES, WAIST))
    if rng.uniform() < render.environment:
        sampled["ambient"] = colour(0.4 * between(render.ambient))
        count = int(rng.integers(4, 9))
        azimuths = rng.uniform(-180, 180, count).tolist()
        elevations = np.degrees(np.arcsin(rng.uniform(-0.4, 1, count))).tolist()
        strength = 2.6 * between(render.key) / count
        colours = (strength * rng.uniform(0.5, 1.5, (count, 3))).tolist()
        sampled["lights"] = [[*light, *rgb] for *light, rgb in zip(azimuths, elevations, colours)]
    else:
        sampled["ambient"] = colour(between(render.ambient))
        key = [between([-75, 75]), between([-5, 65]), *colour(between(render.key))]
        side = [between([60, 140]) * float(rng.choice([-1, 1])), between([-10, 40]), *colour(between(render.side))]
        sampled["lights"] = [key, side]
    kinds = render.backgrounds.model_dump()
    weights = np.array(list(kinds.values()))
    sampled["background"] = str(rng.choice(list(kinds), p=weights / weights.sum()))
    return {**sampled, **rig.sample(rng)}


def frame_bodies(vertices: Tensor, views: list[dict], aspect: float) -> Cameras:
    """Cameras that show each posed body (N, V, 3) as its view says: all its height, from head to feet or waist.

    Outstretched arms may leave the picture by a quarter of its width.
    """
    azimuth, elevation, fov, fill, bottom = (
        torch.tensor([view[key] for view in views], dtype=torch.float32)
        for key in ("azimuth", "elevation", "fov_degrees", "fill", "bottom")
    )
    direction = orbit_direction(azimuth, elevation)
    low, high = vertices.amin(1), vertices.amax(1)
    target = (low + high) / 2
    target[:, 1] = (low[:, 1] + bottom * (high - low)[:, 1] + high[:, 1]) / 2
    right = F.normalize(torch.linalg.cross(torch.tensor([[0.0, 1.0, 0.0]]).expand_as(direction), direction), dim=-1)
    across = ((vertices - target[:, None]) @ right[..., None])[..., 0].abs().amax(1)
    tall = (high - low)[:, 1] * (1 - bottom) / 2
    half = torch.maximum(tall / fill, torch.where(bottom > 0, tall, across / aspect * 0.75))
    nearest = ((vertices - target[:, None]) @ direction[..., None])[..., 0].amax(1)
    distance = half / torch.tan(torch.deg2rad(fov) / 2) + nearest * 0.6
    return look_at(target + direction * distance[:, None], target, fov)


def view_lights(cameras: Cameras, views: list[dict]) -> Lights:
    """Each view's ambient and directional lights together."""
    rows = []
    for index, view in enumerate(views):
        azimuth, elevation, *colour = torch.tensor(view["lights"]).unbind(1)
        seen_from = cameras.take(torch.full((len(azimuth),), index))
        lights = directional_light(from_camera(seen_from, azimuth, elevation), torch.stack(colour, dim=-1))
        rows.append(ambient_light(torch.tensor([view["ambient"]])).coefficients + lights.coefficients.sum(0))
    return Lights(torch.cat(rows))


def make_background(kind: str, rng: np.random.Generator, height: int, width: int, folder: str | None) -> Tensor:
    """plain, gradient, noise, pictures or white → (3, height, width) in [0, 1]."""
    if kind == "white":
        return torch.ones(3, height, width)
    colours = torch.from_numpy(rng.uniform(0, 1, (2, 3, 1, 1))).float()
    if kind == "plain":
        return colours[0].expand(3, height, width)
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        x, y = torch.linspace(-0.5, 0.5, width)[None], torch.linspace(-0.5, 0.5, height)[:, None]
        share = (x * np.cos(angle) + y * np.sin(angle) + 0.5).clamp(0, 1)
        return colours[0] * (1 - share) + colours[1] * share
    if kind == "noise":
        field = torch.zeros(1, 1, max(1, height // 8), max(1, width // 8))  # smooth: an eighth of the size will do
        for octave in range(3):
            grid = torch.from_numpy(rng.uniform(-1, 1, (1, 1, 3 * 2**octave + 1, 2 * 2**octave + 1))).float()
            field += F.interpolate(grid, size=field.shape[-2:], mode="bicubic", align_corners=True) / 2**octave
        field = F.interpolate(field, size=(height, width), mode="bilinear", align_corners=True)
        share = (0.5 + 0.45 * field[0]).clamp(0, 1)
        return colours[0] * (1 - share) + colours[1] * share
    files = background_files(folder)
    image = open_image(files[rng.integers(len(files))]).convert("RGB")
    scale = max(height / image.height, width / image.width) * rng.uniform(1, 1.5)
    image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
    left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return (pixels_from_image(image.crop((left, top, left + width, top + height))) + 1) / 2


def render_texture(
    rig: StillRig,
    texture: Tensor,
    render: Render,
    seed: int,
    texture_id: int,
    views: list[int],
    height: int,
    width: int,
) -> list[tuple[Tensor, dict]]:
    """texture: (3, S, S) in [-1, 1], filled outside the islands → for each view number a picture (3, height, width)
    in [-1, 1] and what `sample_view` drew for it."""
    rendered = []
    body = rig.body.to(texture.device)
    for start in range(0, len(views), VIEWS_AT_ONCE):
        numbers = views[start : start + VIEWS_AT_ONCE]
        sampled = [sample_view(render, rig, seed, texture_id, number) for number in numbers]
        vertices = rig.vertices(sampled).cpu()
        cameras = frame_bodies(vertices, sampled, width / height)
        lights = view_lights(cameras, sampled)
        backgrounds = []
        for view, number in zip(sampled, numbers):
            rng = np.random.default_rng([seed, texture_id, number, 1])
            folder = render.background_folder
            backgrounds.append(make_background(view["background"], rng, height, width, folder))
        device = texture.device
        cameras, lights = cameras.to(device), Lights(lights.coefficients.to(device))
        scene = (cameras, height, width, lights, torch.stack(backgrounds).to(device))
        pictures = render_views(body, (texture[None] + 1) / 2, *scene, vertices=vertices.to(device))
        rendered.extend(zip(pictures * 2 - 1, sampled))
    return rendered
