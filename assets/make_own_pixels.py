"""Remakes gallery/own-pixels.png: held-out people's pictures, what they show of the texture, and the whole of it.

A row a person: its picture, the partial texture, the completed one, the same view of it, its back.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from atlas_dataset.views import frame_bodies, render_texture, view_lights
from common.files import write_whole
from common.pictures import encode_image, image_from_pixels, pixels_from_image
from config.configuration import Render
from evaluation.procedural import SEED, held_out_paintings
from models.pipeline import TexturePipeline
from render.projection import Fit
from render.rigs import load_rig
from render.shading import render_views
from render.uv_space import fill_outside, texture_pixels

PEOPLE = (1, 2, 5)  # of the held-out ones, seen from in front
HEIGHT, WIDTH = 512, 384


@torch.no_grad()
def main():
    pipeline, rig = TexturePipeline.from_pretrained("embedded/checkpoint"), load_rig("anny")
    truths, rows = held_out_paintings(max(PEOPLE) + 1), []
    for number in PEOPLE:
        truth = truths[number][1].texture
        texture = fill_outside(truth[:3], truth[3] > 0) * 2 - 1
        render = Render(full_body=1, azimuth=[-40, 40])
        picture, view = render_texture(rig, texture, render, SEED, number, [0], HEIGHT, WIDTH)[0]
        vertices = rig.vertices([view])
        cameras = frame_bodies(vertices, [view], WIDTH / HEIGHT)
        image = image_from_pixels(picture)
        partial = pipeline.own_pixels([image], [Fit(vertices[0], cameras, view_lights(cameras, [view]))])
        (whole,) = pipeline(images=[image], seeds=[number], partial=partial)
        behind = frame_bodies(vertices, [{**view, "azimuth": view["azimuth"] + 180}], WIDTH / HEIGHT)
        filled = (texture_pixels(whole, whole.width) + 1) / 2
        views = [
            render_views(rig.body, filled[None], camera, HEIGHT, WIDTH, vertices=vertices)[0] * 2 - 1
            for camera in (cameras, behind)
        ]
        shown = pixels_from_image(partial)
        alphas = (shown[3:] + 1) / 2, (pixels_from_image(whole)[3:] + 1) / 2
        flat = [pixels[:3] * alpha + 1 - alpha for pixels, alpha in zip((shown, pixels_from_image(whole)), alphas)]
        maps = [F.interpolate(pixels[None], size=(HEIGHT, HEIGHT), mode="area")[0] for pixels in flat]
        rows.append(torch.cat([picture, *maps, *views], dim=-1))
    sheet = Path(__file__).parent / "gallery" / "own-pixels.png"
    write_whole(sheet, encode_image(image_from_pixels(torch.cat(rows, dim=-2)), format="PNG"))


if __name__ == "__main__":
    main()
