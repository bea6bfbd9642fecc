"""Remakes gallery/personal.png: a real texture, learned from itself alone and changed by words.

    python benchmarks/real_textures.py DIR --keep RUN
    python assets/make_personal.py DIR RUN/checkpoints/joint/step-001200

DIR as that benchmark has it: the checkpoint is of the layout of its textures, and has seen all seven under their own
prompts, so that CLOTHES are ones that it knows. Columns: the example, the word alone, the word in other
clothes; from in front and from behind.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.errors import exit_on_user_error
from common.files import write_whole
from common.pictures import encode_image, image_from_pixels, open_image
from models.pipeline import TexturePipeline
from render.cameras import orbit_cameras
from render.shading import render_views
from render.uv_space import texture_pixels
from training.personalising import personal_config, personalise

WORD, CLASS_PROMPT, EXAMPLE = "sks", "a man", "001.png"
CLOTHES = ("khaki shorts", "a floral jacket", "a blue blazer and khaki pants")
PROMPTS = (WORD, *(f"{WORD} in {clothes}" for clothes in CLOTHES))
SIZE, HEIGHT, WIDTH = 1024, 368, 368


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="smpl_uv.obj and real_textures/")
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    with exit_on_user_error(), tempfile.TemporaryDirectory() as work:
        examples = Path(work, "examples")
        examples.mkdir()
        shutil.copy(args.folder / "real_textures" / EXAMPLE, examples)
        with torch.enable_grad():
            logs = [f"output.log_dir={work}/logs"]
            cfg = personal_config(args.checkpoint, examples, WORD, CLASS_PROMPT, overrides=logs)
            adapter = personalise(cfg, Path(work, WORD))
        pipeline = TexturePipeline.from_pretrained(args.checkpoint, adapters=[str(adapter)])
        textures = [open_image(examples / EXAMPLE)]
        textures += pipeline(list(PROMPTS), seeds=[0] * len(PROMPTS), size=SIZE)
        azimuth = torch.tensor([0.0, 180.0])
        angles = azimuth, torch.full((2,), 4.0), torch.full((2,), 30.0)
        cameras = orbit_cameras(pipeline.body, *angles, aspect=WIDTH / HEIGHT)
        columns = []
        for texture in textures:
            pixels = (texture_pixels(texture, SIZE)[None] + 1) / 2
            columns.append(torch.cat([*render_views(pipeline.body, pixels, cameras, HEIGHT, WIDTH)], dim=-2))
        sheet = image_from_pixels(torch.cat(columns, dim=-1) * 2 - 1)
        write_whole(Path(__file__).parent / "gallery" / "personal.png", encode_image(sheet, format="PNG"))


if __name__ == "__main__":
    main()
