"""Remakes the README's gallery from the embedded checkpoint: assets/gallery/.

python assets/make_gallery.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from atlas_dataset.views import render_texture
from common.pictures import encode_image, image_from_pixels, open_image
from config.configuration import Render
from embedded.sources import ProceduralTextures
from models.base import load_base
from models.checkpoints import EMBEDDED_CHECKPOINT, TrainedModel, load_checkpoint
from models.generation import finish_texture, generate, picture_condition, prompt_condition
from render.rigs import load_rig
from render.turntable import save_turntable, turntable_frames
from render.uv_space import texture_pixels

OUT = Path(__file__).with_name("gallery")
PROMPTS = (
    "An elderly woman with white hair, in pink sweater and striped jeans",
    "A Middle Eastern young boy with auburn hair wearing gray shirt and green pants",
    "A white man with brown hair wearing blue blazer and khaki pants",
    "Elder woman with auburn hair, wearing floral jacket and gray pants",
    "A mixed race elder man with white hair, wearing gray shirt and khaki shorts",
    "a woman in a yellow dress",
)
PICTURES, FRAMES, SIDE, SEED = 3, 24, 256, 0


def main():
    OUT.mkdir(exist_ok=True)
    trained = load_checkpoint(EMBEDDED_CHECKPOINT)
    base = TrainedModel(load_base(trained.cfg.model.pretrained_model), None, trained.cfg)
    rig = load_rig("anny")

    def textures(model: TrainedModel, **conditions) -> Image.Image:
        image = conditions.get("image")
        states = picture_condition(model, [image]) if image else prompt_condition(model, conditions["prompt"])
        settings = model.cfg.inference
        steps, negative = settings.num_inference_steps, settings.negative_prompt
        generated = generate(model, states, negative, [SEED], steps, settings.guidance_scale)
        return finish_texture(generated[0], rig.body, seam_fix=True)

    before_after = []
    for number, prompt in enumerate(PROMPTS, 1):
        texture = textures(trained, prompt=prompt)
        (OUT / f"text-{number}.png").write_bytes(encode_image(shrunk(texture), format="PNG", optimize=True))
        pixels = (texture_pixels(texture, texture.width) + 1) / 2
        frames = turntable_frames(rig.body, pixels, FRAMES, height=SIDE, width=SIDE * 3 // 4)
        save_turntable(frames, OUT / f"text-{number}.gif")
        before_after.append((textures(base, prompt=prompt), texture))
    save_sheet([[on_white(pair[row]) for pair in before_after] for row in (0, 1)], "before-after.png")

    held_out, rows = ProceduralTextures(PICTURES, 512, seed=3, held_out=True), []
    for index in range(PICTURES):
        truth = texture_pixels(open_image(held_out[index][0]), 512)
        render = Render(full_body=1, azimuth=[-40, 40], elevation=[0, 15], fill=[0.9, 0.95])

        def view(pixels, render=render, index=index):
            picture, _ = render_texture(rig, pixels, render, 3, index, [0], SIDE, SIDE * 3 // 4)[0]
            return image_from_pixels(picture)

        texture = textures(trained, image=view(truth))
        pixels = texture_pixels(texture, texture.width)
        rows.append([view(truth), on_white(texture), view(pixels), on_white(image_from_pixels(truth))])
    save_sheet(rows, "images.png")


def shrunk(texture: Image.Image) -> Image.Image:
    return texture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def on_white(texture: Image.Image) -> Image.Image:
    canvas, small = Image.new("RGB", (SIDE, SIDE), "white"), shrunk(texture)
    canvas.paste(small, mask=small if small.mode == "RGBA" else None)
    return canvas


def save_sheet(rows: list[list[Image.Image]], name: str, gap: int = 6) -> None:
    """Pictures of one height in rows, on white."""
    width = sum(picture.width + gap for picture in rows[0]) - gap
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + gap) - gap), "white")
    for number, row in enumerate(rows):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, number * (SIDE + gap)))
            left += picture.width + gap
    (OUT / name).write_bytes(encode_image(sheet, format="PNG", optimize=True))


if __name__ == "__main__":
    with torch.no_grad():
        main()
