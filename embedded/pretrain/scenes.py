"""Captioned renders and their labels: what every stage but the tokenizer learns from.

Scenes show dressed bodies, or their textures in UV layouts that are not Anny's own. Outfits are the image encoder's:
each in several poses, with captions that are nearly right, and where its regions are.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from atlas_dataset.building import prepare_renderer
from atlas_dataset.views import frame_bodies, render_texture, sample_view
from common import processes
from config.configuration import Render
from embedded import painter
from embedded.captions import sentence
from embedded.grammar import ETHNICITIES, HAIR, STYLES, Outfit, sample_outfit
from embedded.pretrain.stage import Run
from render.bodies import load_anny_body
from render.cameras import look_at, orbit_cameras
from render.lights import ambient_light, studio_lights
from render.rigs import load_rig
from render.shading import render_views
from render.uv_space import fill_outside

RESOLUTION = 256  # side in pixels of a picture
CLIP_RESOLUTION, CLIP_WIDTH = 256, 192  # height and width of the image encoder's
CAPTIONS = 6  # of a picture
LAYOUTS = 12  # other ways to unwrap the body; Anny's own is left to the joint training
VIEWS = 2  # of an outfit, for the image encoder
OUTFIT_RENDER = Render(fill=[0.5, 0.95])
REGIONS = (painter.TOP, painter.BOTTOM, painter.HAIR_REGION, painter.SKIN)
PHENOTYPES = {  # Anny's axes: gender 0 male to 1 female; age 1/3 child, 2/3 adult, 1 old
    "man": dict(gender=0.0, age=0.67),
    "woman": dict(gender=1.0, age=0.67),
    "young boy": dict(gender=0.0, age=0.42),
    "young girl": dict(gender=1.0, age=0.42),
    "elder man": dict(gender=0.0, age=0.92),
    "elder woman": dict(gender=1.0, age=0.92),
}


def captions_of(outfit: Outfit, rng: np.random.Generator) -> list[str]:
    """CAPTIONS ways to say it: the ATLAS form and sentences."""
    return [outfit.prompt, *(sentence(outfit, rng).text for _ in range(CAPTIONS - 1))]


def layout_words(number: int) -> str:
    """What a caption of a texture ends with: it says how the body is unwrapped."""
    return f", uv {number}"


def painted(outfit: Outfit, seed: int, layout: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The texture (3, 256, 256) in [0, 1], filled outside the islands, and its regions (256, 256)."""
    painting = painter.paint(outfit, seed, RESOLUTION, layout)
    return fill_outside(painting.texture[:3], painting.texture[3] > 0), painting.regions


def render_scene(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """Picture `index` → (3, 256, 256) uint8 and its captions; the same for the same (seed, index).

    One in four is a render; the others are textures in LAYOUTS layouts that are not Anny's own, which captions name.
    """
    rng = np.random.default_rng([seed, index])
    outfit = sample_outfit(rng)
    label = {"captions": captions_of(outfit, rng)}
    if index % 4:
        layout = int(rng.integers(LAYOUTS))
        label["captions"] = [caption + layout_words(layout) for caption in label["captions"]]
        picture, _ = painted(outfit, index, layout)
        return (picture * 255).round().to(torch.uint8).numpy(), label
    texture, _ = painted(outfit, index)
    body = load_anny_body(**PHENOTYPES[outfit.person], weight=float(rng.choice([0.3, 0.5, 0.7])))

    width = RESOLUTION if rng.uniform() < 0.5 else RESOLUTION * 3 // 4
    azimuth, elevation = torch.tensor([rng.uniform(0, 360)]), torch.tensor([rng.uniform(-12, 25)])
    fov, fill = torch.tensor([rng.uniform(20, 45)]), rng.uniform(0.75, 0.95)
    cameras = orbit_cameras(body, azimuth, elevation, fov, fill=fill, aspect=width / RESOLUTION)
    if rng.uniform() < 0.45:  # nearer, to a height between knees and face
        eye = -(cameras.rotation.transpose(1, 2) @ cameras.translation[..., None])[..., 0]
        height = body.vertices[:, 1].max()
        target = torch.tensor([[0.0, rng.uniform(0.35, 0.92), 0.0]]) * height
        cameras = look_at(target + (eye - target) * rng.uniform(0.3, 0.7), target, fov)
    background = torch.tensor(rng.uniform(0, 1, (1, 3)), dtype=torch.float32)
    size, lights = (RESOLUTION, width), studio_lights(cameras)
    with torch.no_grad():
        picture = render_views(body, texture[None], cameras, *size, lights, background, supersample=2)
    bars = (RESOLUTION - width) // 2  # portraits are padded to a square with black, as at inference
    picture = F.pad(picture[0], (bars, bars)) * 255
    return picture.round().to(torch.uint8).numpy(), label


def outfit_of(seed: int, index: int) -> Outfit:
    """The one that `render_outfit` shows."""
    return sample_outfit(np.random.default_rng([seed, index, 1]))


def recoloured(texture: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Less saturated, its channels in another order, its contrast and tint changed: (3, H, W) in [0, 1]."""
    gray, tint = texture.mean(0, keepdim=True), torch.from_numpy(rng.uniform(0.55, 1.1, (3, 1, 1))).float()
    texture = (gray + (texture - gray) * rng.uniform(0.2, 1.0))[torch.from_numpy(rng.permutation(3))]
    return (texture ** rng.uniform(0.7, 1.8) * tint).clamp(0, 1)


@torch.no_grad()
def render_outfit(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """One outfit on VIEWS posed bodies of any shape → (VIEWS, 3, 256, 192) uint8 and its label.

    The label: captions; confusions, the captions of outfits that differ by who wears which colour; colours, the medians
    of REGIONS (None where there is none). Every fourth outfit is recoloured beyond the grammar's colours and has no
    captions.
    """
    rng = np.random.default_rng([seed, index, 1])
    outfit = sample_outfit(rng)  # as outfit_of has it
    texture, regions = painted(outfit, index)
    label = {"captions": [], "confusions": []}
    if index % 4 == 3:
        texture = recoloured(texture, rng)
    else:
        label["captions"] = captions_of(outfit, rng)
        label["confusions"] = [confused(outfit, rng) for _ in range(CAPTIONS)]
    masks = [regions == region for region in REGIONS]
    label["colours"] = [texture[:, mask].median(1).values.tolist() if mask.sum() > 40 else None for mask in masks]
    size, rig = (CLIP_RESOLUTION, CLIP_WIDTH), load_rig("anny")
    views = render_texture(rig, texture * 2 - 1, OUTFIT_RENDER, seed, index, list(range(VIEWS)), *size)
    pictures = torch.stack([picture for picture, _ in views])
    return ((pictures + 1) * 127.5).round().to(torch.uint8).numpy(), label


@torch.no_grad()
def render_regions(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """Where `render_outfit` shows REGIONS: each 8x8 pixels' share → (VIEWS, REGIONS, 32, 24) uint8, 255 is all."""
    _, regions = painted(outfit_of(seed, index), index)
    masks = torch.stack([regions == region for region in REGIONS]).float()
    rig = load_rig("anny")
    views = [sample_view(OUTFIT_RENDER, rig, seed, index, number) for number in range(VIEWS)]
    vertices = rig.vertices(views)
    cameras, light = frame_bodies(vertices, views, CLIP_WIDTH / CLIP_RESOLUTION), ambient_light(torch.ones(1, 3))
    size, black = (CLIP_RESOLUTION // 2, CLIP_WIDTH // 2), torch.zeros(1, 3)
    first_three, fourth = (
        render_views(rig.body, texture[None], cameras, *size, light, black, vertices=vertices)
        for texture in (masks[:3], masks[3:].expand(3, -1, -1))  # a picture has three channels
    )
    shares = F.avg_pool2d(torch.cat([first_three, fourth[:, :1]], 1), 4)
    return (shares.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), {}


def confused(outfit: Outfit, rng: np.random.Generator) -> str:
    """A caption that is nearly right: top and bottom have changed colours, or one colour is another (as the hard
    negatives of Yuksekgonul et al. 2023)."""
    if outfit.bottom and outfit.top_style != outfit.bottom_style and rng.uniform() < 0.5:
        changed = replace(outfit, top_style=outfit.bottom_style, bottom_style=outfit.top_style)
        names = {"top_style", "bottom_style"}
    else:
        hair = ["hair"] if outfit.hair_cut != "bald" else []
        name = str(rng.choice(["top_style", "ethnicity", *hair, *(["bottom_style"] if outfit.bottom else [])]))
        others = {"hair": HAIR, "ethnicity": ETHNICITIES}.get(name, STYLES)
        changed = replace(outfit, **{name: str(rng.choice([word for word in others if word != getattr(outfit, name)]))})
        names = {name}
    caption = sentence(changed, rng)
    return caption.text if names <= caption.told else changed.prompt


def load_renders(work: Path, name: str, scene: Callable, count: int, seed: int) -> tuple[np.ndarray, list[dict]]:
    """scene(seed, 0 .. count - 1): pictures (count, ...) uint8, memory-mapped, and labels; goes on if stopped.

    scene: a function of a module, for processes of their own import it.
    """
    pictures, labels = work / f"{name}_{count}.npy", work / f"{name}_{count}.jsonl"
    done = len(labels.read_text().splitlines()) if labels.exists() else 0
    if done < count:
        shape = (count, *scene(seed, 0)[0].shape)
        array = np.lib.format.open_memmap(pictures, "r+" if done else "w+", np.uint8, shape)
        with processes.worker_pool(processes.cores(), prepare_renderer) as pool, labels.open("a") as lines:
            scenes = pool.map(partial(scene, seed), range(done, count), chunksize=32)
            for index, (picture, label) in enumerate(tqdm(scenes, name, initial=done, total=count), done):
                array[index] = picture
                print(json.dumps(label), file=lines, flush=True)
        array.flush()
    return np.load(pictures, mmap_mode="r"), [json.loads(line) for line in labels.read_text().splitlines()]


def load_scenes(run: Run) -> tuple[np.ndarray, list[dict]]:
    """run.renders pictures (N, 3, 256, 256) and labels of `render_scene`."""
    return load_renders(run.work, "renders", render_scene, run.renders, seed=0)


def load_outfits(run: Run) -> tuple[np.ndarray, list[dict]]:
    """run.outfits pictures (N, VIEWS, 3, 256, 192) and labels of `render_outfit`."""
    return load_renders(run.work, "outfits", render_outfit, run.outfits, seed=0)


def load_regions(run: Run) -> tuple[np.ndarray, list[dict]]:
    """Shares (N, VIEWS, REGIONS, 32, 24) of `render_regions`."""
    return load_renders(run.work, "regions", render_regions, run.outfits, seed=0)
