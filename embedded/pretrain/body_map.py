"""The body map: where on the body each pixel of a render lies, and in which light."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from atlas_dataset.views import frame_bodies, render_texture, view_lights
from config.configuration import Render
from embedded.pretrain.scenes import load_renders, outfit_of, painted
from embedded.pretrain.stage import Run, train_stage
from models.body_map import CENTRE, FOLDER, MAP_SIZE, SCALE, BodyMap
from models.diffusion import autocast
from render.bodies import vertex_normals
from render.rasteriser import interpolate, rasterize
from render.rigs import load_rig

BATCH = 16  # pictures
VIEWS = 2  # of an outfit
SEED = 7  # of its renders: others than the encoders'
PLACE_WEIGHT, LIGHT_WEIGHT = 4.0, 1.0
STEPS = 65_535  # of 16 bits, in which a render's answer is kept
LEAST, GREATEST = -2.5, 2.5  # what these hold, of places in SCALE and of the light's logarithm


@torch.no_grad()
def render_answer(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """An outfit in VIEWS views → (VIEWS, 16, 192, 144) uint8: the picture (3), whether it is body, and the place on the
    resting body (3) and the light there (3) in 16 bits: their upper halves, then their lower ones."""
    outfit, rig = outfit_of(seed, index), load_rig("anny")
    texture, _ = painted(outfit, index)
    rendered = render_texture(rig, texture * 2 - 1, Render(), seed, index, list(range(VIEWS)), *MAP_SIZE)
    views = [view for _, view in rendered]
    vertices = rig.vertices(views)
    cameras = frame_bodies(vertices, views, MAP_SIZE[1] / MAP_SIZE[0])
    lights = view_lights(cameras, views).at(vertex_normals(vertices, rig.body.faces))
    answers = []
    for row, (picture, _) in enumerate(rendered):
        fragments = rasterize(vertices[row], rig.body.faces, cameras.take(torch.tensor([row])), *MAP_SIZE)
        place = (interpolate(fragments, rig.body.faces, rig.body.vertices) - torch.tensor(CENTRE)) / SCALE
        light = interpolate(fragments, rig.body.faces, lights[row]).clamp(min=0.08).log()
        answer = fragments.dense(torch.cat([place, light], dim=1))[0].permute(2, 0, 1)
        levels = ((answer - LEAST) / (GREATEST - LEAST)).clamp(0, 1).mul(STEPS).round().long()
        planes = [(picture + 1) * 127.5, fragments.mask * 255.0, levels // 256, levels % 256]
        answers.append(torch.cat([plane.round().to(torch.uint8) for plane in planes]))
    return torch.stack(answers).numpy(), {}


def unpacked(rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """rows (B, 16, H, W) of `render_answer` → pictures (B, 3, H, W) in [-1, 1], is_body (B, 1, H, W), and place and
    light (B, 6, H, W) as the network tells them."""
    planes = torch.from_numpy(np.ascontiguousarray(rows)).float()
    levels = planes[:, 4:10] * 256 + planes[:, 10:]
    return planes[:, :3] / 127.5 - 1, planes[:, 3:4] / 255, levels / STEPS * (GREATEST - LEAST) + LEAST


def mirrored(pictures: Tensor, is_body: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As seen in a mirror: left is right, on the body too."""
    pictures, is_body, answers = (planes.flip(-1) for planes in (pictures, is_body, answers))
    signs = torch.tensor([-1.0, 1, 1, 1, 1, 1], device=answers.device)[:, None, None]
    return pictures, is_body, answers * signs


def map_loss(told: Tensor, is_body: Tensor, answers: Tensor) -> Tensor:
    """told: (B, 7, H, W) of BodyMap. Places by Huber's loss: few pixels that could be left or right pull little."""
    inside = is_body.sum().clamp(min=1) * 3
    place = F.smooth_l1_loss(told[:, 1:4], answers[:, :3], reduction="none", beta=0.05)
    light = (told[:, 4:] - answers[:, 3:]).abs()
    silhouette = F.binary_cross_entropy_with_logits(told[:, :1], is_body)
    return silhouette + (PLACE_WEIGHT * (place * is_body).sum() + LIGHT_WEIGHT * (light * is_body).sum()) / inside


def train_body_map(run: Run, steps: int) -> dict:
    """Needs no other stage; writes out/body_map."""
    rows, _ = load_renders(run.work, "answers", render_answer, run.outfits // 2, seed=SEED)
    torch.manual_seed(4)
    network = BodyMap().to(run.device)

    batch_size = BATCH * run.batch_scale

    def loss_fn(step):
        rng = np.random.default_rng([8, step])
        numbers, views = rng.integers(0, len(rows), batch_size), rng.integers(0, VIEWS, batch_size)
        batch = unpacked(np.stack([rows[number, view] for number, view in zip(numbers, views)]))
        if rng.uniform() < 0.5:
            batch = mirrored(*batch)
        pictures, is_body, answers = (planes.to(run.device) for planes in batch)
        if rng.uniform() < 0.3:  # colours of any kind: the light's are turned with them
            order = torch.from_numpy(rng.permutation(3)).to(run.device)
            pictures, answers = pictures[:, order], torch.cat([answers[:, :3], answers[:, 3:][:, order]], dim=1)
        with autocast(run.device, run.precision):
            told = network(pictures)
        return map_loss(told.float(), is_body, answers)

    summary = train_stage(FOLDER, run.work, {"network": network}, loss_fn, steps, lr=2e-3)
    network.half().save_pretrained(run.out / FOLDER)
    return summary
