"""Renders each texture from random cameras and writes the data set that `ATLASLarge` reads.

Layout: `textures/*.parquet` (texture_id, texture, prompt), each texture once with its own bytes;
`renders/*.parquet` (texture_id, view, image and the camera); `atlas_large.json`; a data card. Shards are written
to a temporary name and renamed; running the same command again continues after the last whole shard.
"""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from atlas_dataset.dataset import INFO_FILE
from errors import UserError, reason
from files import check_writable, write_whole
from images import encode_image, image_from_pixels, open_image, texture_pixels
from render.utils import Body, Cameras, Lights, load_body, orbit_cameras, render_views

TEXTURES_PER_SHARD = 64
VIEWS_AT_ONCE = 4  # bounds the renderer's memory
VIEW_KEYS = ("azimuth", "elevation", "fov_degrees")

DATA_CARD = """---
configs:
- config_name: renders
  data_files: renders/*.parquet
  default: true
- config_name: textures
  data_files: textures/*.parquet
---
# UV textures and renders of them
{textures} textures in the UV layout of `{body}`, {views} renders of {height}x{width} pixels each.
`renders` has `texture_id`, `view`, `image` and its camera (degrees; azimuth 0 sees the front);
`textures` has `texture_id`, `texture` and `prompt`. The licence is that of the textures it was built from.
"""


def sample_view(seed: int, texture_id: int, view: int) -> dict[str, float]:
    """Camera, light and background of one render, from these three numbers alone. Angles in degrees."""
    rng = np.random.default_rng([seed, texture_id, view])
    return {
        "azimuth": rng.uniform(0, 360), "elevation": rng.uniform(-15, 25), "fov_degrees": rng.uniform(22, 45),
        "light_azimuth": rng.uniform(-70, 70), "light_elevation": rng.uniform(0, 60), "ambient": rng.uniform(0.4, 0.55),
        "strength": rng.uniform(0.45, 0.65), "red": rng.uniform(), "green": rng.uniform(), "blue": rng.uniform(),
    }  # fmt: skip


def view_lights(cameras: Cameras, views: dict[str, torch.Tensor]) -> Lights:
    """Directional lights, their azimuth and elevation (degrees) counted from each camera's own direction."""
    azimuth, elevation = torch.deg2rad(views["light_azimuth"]), torch.deg2rad(views["light_elevation"])
    towards = torch.stack(
        [azimuth.sin() * elevation.cos(), -elevation.sin(), -azimuth.cos() * elevation.cos()], dim=-1
    )  # camera axes: x right, y down, z forward
    direction = F.normalize((towards[:, None] @ cameras.rotation)[:, 0], dim=-1)
    return Lights(direction, views["ambient"], views["strength"])


def render_texture(
    body: Body, texture: torch.Tensor, views: list[dict[str, float]], height: int, width: int
) -> list[torch.Tensor]:
    """texture: (3, S, S) in [-1, 1] → a picture (3, height, width) in [-1, 1] for each view."""
    pictures = []
    for start in range(0, len(views), VIEWS_AT_ONCE):
        chunk = views[start : start + VIEWS_AT_ONCE]
        columns = {
            key: torch.tensor([view[key] for view in chunk], dtype=torch.float32).to(texture.device) for key in chunk[0]
        }
        cameras = orbit_cameras(body, *(columns[key] for key in VIEW_KEYS), aspect=width / height)
        background = torch.stack([columns[channel] for channel in ("red", "green", "blue")], dim=-1)
        rendered = render_views(
            body, (texture[None] + 1) / 2, cameras, height, width, view_lights(cameras, columns), background
        )
        pictures.extend(rendered * 2 - 1)
    return pictures


def build_dataset(
    source, body_spec: str, views: int, out: str | Path, height: int = 1024, width: int = 768, seed: int = 0
) -> Path:
    """Renders `views` pictures of each row of source, a sequence of (encoded texture, prompt) → out.

    Raises UserError when a texture cannot be read, or when out holds a data set built with other settings.
    """
    out = Path(out)
    kind, _, path = body_spec.partition(":")
    if path:  # the data set is read from anywhere
        body_spec = f"{kind}:{Path(path).resolve()}"
    info = {"body": body_spec, "textures": len(source), "views": views, "height": height, "width": width, "seed": seed}
    if not len(source):
        raise UserError("there are no textures to build from")
    body = load_body(body_spec)
    check_writable(out)
    info_file = out / INFO_FILE
    if info_file.exists():
        _refuse_other_settings(info_file, info)
        if json.loads(info_file.read_text())["complete"]:
            return out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = body.to(device)
    with tqdm(total=len(source) * views, desc="renders", unit="row") as progress:
        for shard, start in enumerate(range(0, len(source), TEXTURES_PER_SHARD)):
            texture_ids = range(start, min(start + TEXTURES_PER_SHARD, len(source)))
            textures_file, renders_file = (
                out / name / f"shard-{shard:05d}.parquet" for name in ("textures", "renders")
            )
            if renders_file.exists():  # written last, so both are whole
                progress.update(len(texture_ids) * views)
                continue
            textures, renders = [], []
            for texture_id in texture_ids:
                encoded, prompt = source[texture_id]
                image = open_image(encoded, f"texture {texture_id} ({prompt})")
                texture = texture_pixels(image, max(image.size)).to(device)
                sampled = [sample_view(seed, texture_id, view) for view in range(views)]
                stored = {"texture": {"bytes": encoded, "path": None}, "prompt": prompt}
                textures.append({"texture_id": texture_id, **stored})
                for view, picture in enumerate(render_texture(body, texture, sampled, height, width)):
                    jpeg = encode_image(image_from_pixels(picture), format="JPEG", quality=95, subsampling=0)
                    stored = {"image": {"bytes": jpeg, "path": None}, **{key: sampled[view][key] for key in VIEW_KEYS}}
                    renders.append({"texture_id": texture_id, "view": view, **stored})
                progress.update(views)
            _write_info(info_file, {**info, "complete": False})  # not before a first shard is sure
            _write_parquet(textures, "texture", textures_file)
            _write_parquet(renders, "image", renders_file)
    write_whole(out / "README.md", DATA_CARD.format(**info).encode())
    _write_info(info_file, {**info, "complete": True})
    return out


def _write_parquet(rows: list[dict], picture_column: str, file: Path) -> None:
    features = datasets.Dataset.from_list(rows[:1]).features
    features[picture_column] = datasets.Image()
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(buffer)
    write_whole(file, buffer.getvalue())


def _write_info(file: Path, info: dict) -> None:
    write_whole(file, (json.dumps(info) + "\n").encode())


def _refuse_other_settings(file: Path, info: dict) -> None:
    """Raises UserError when the data set that `file` describes was built with other settings than info."""
    try:
        earlier = json.loads(file.read_text())
        changed = [key for key in info if earlier[key] != info[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} ({reason(error)}); choose another --out or delete that folder") from None
    if changed:
        key = changed[0]
        raise UserError(
            f"{file.parent} was built with {key} {earlier[key]}, not {info[key]}; choose another --out or delete it"
        )
