"""Remakes assets/renders.png: what training sees.

python assets/make_renders.py DIR       # DIR holds smpl_uv.obj and real_textures/*.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from atlas_dataset.views import render_texture
from common.pictures import image_from_pixels, open_image
from config.configuration import Render
from embedded.sources import ProceduralTextures
from render.rigs import load_rig
from render.uv_space import texture_pixels


def main():
    folder, size, columns = Path(sys.argv[1]), (288, 216), 7
    procedural = ProceduralTextures(12, 512, seed=4)
    rows, numbers, anny = [], list(range(columns)), load_rig("anny")
    for index, texture_id in enumerate((1, 5, 9)):
        texture = texture_pixels(open_image(procedural[texture_id][0]), 512)
        rows.append(render_texture(anny, texture, Render(), 4, index, numbers, *size))
    real = texture_pixels(open_image(folder / "real_textures" / "003.png"), 1024)
    smpl = load_rig(f"obj:{folder / 'smpl_uv.obj'}")
    rows.append(render_texture(smpl, real, Render(), 4, 3, numbers, *size))
    sheet = torch.cat([torch.cat([picture for picture, _ in row], dim=-1) for row in rows], dim=-2)
    image_from_pixels(sheet).save(Path(__file__).with_name("renders.png"))


if __name__ == "__main__":
    main()
