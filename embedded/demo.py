"""The main job on the embedded default: joint training, then textures of people it was never shown.

Runs the commands a user would, and puts their pictures side by side in outputs/demo/overview.png.
"""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from atlas_dataset.views import render_texture
from common.files import PROJECT_ROOT
from common.pictures import image_from_pixels, open_image
from config.configuration import Render
from embedded.sources import ProceduralTextures
from render.rigs import load_rig
from render.uv_space import texture_pixels

OUT = Path("outputs/demo")
PROMPTS = (  # combinations that `Outfit.held_out` keeps out of training
    "white, woman, floral sweater, blue jeans, auburn hair",
    "African American, man, striped long sleeve shirt, green pants, black hair",
    "Asian, young girl, green jacket, orange shorts, brown hair",
)
# As the embedded checkpoint was trained, with less data and fewer steps, so that all is done in a quarter of an hour:
# first on textures of half the size, whose steps take less than half the time.
DATA = ("--data.dataset=procedural:600", "--data.views_per_texture=2", "--output.sample_every=2000")
SMALL = ("--data.resolution=128", "--training.joint.max_steps=1200")
FURTHER_STEPS = ("--training.joint.max_steps=1350", "--training.joint.lr_scheduler=constant")
LARGE = ("--resume", "auto", *FURTHER_STEPS, "--training.joint.learning_rate=5e-4")
CHECKPOINTS = f"--output.out_dir={OUT}/checkpoints"
ROW, TEXT, VIEW = 256, 230, 192  # pixels: a row's height, and the width of its text and of each of its views


def run(*command: str) -> None:
    """A script of the project, in the current directory, with arguments; its failure is this one's."""
    script, arguments = PROJECT_ROOT / command[0], command[1:]
    print("$ python " + " ".join(f'"{word}"' if " " in word else word for word in command), flush=True)
    status = subprocess.run([sys.executable, str(script), *arguments]).returncode
    if status:
        sys.exit(status)


def held_out_person() -> Path:
    """A render of a dressed body that training never sees."""
    encoded, prompt = ProceduralTextures(1, 256, seed=1, held_out=True)[0]
    texture = texture_pixels(open_image(encoded), 256)
    render = Render(azimuth=[20, 20], elevation=[5, 5], full_body=1)
    path = OUT / "person.png"
    ((picture, _),) = render_texture(load_rig("anny"), texture, render, 1, 0, [0], 512, 384)
    image_from_pixels(picture).save(path)
    print(f"{path}: {prompt}")
    return path


def overview(rows: list[tuple[str | Path, Path]]) -> Path:
    """One row a texture: what it was made from, the texture, and four views of the turntable."""
    font = ImageFont.load_default(17)
    sheet = Image.new("RGB", (TEXT + ROW + 4 * VIEW, ROW * len(rows)), "white")
    for index, (source, texture) in enumerate(rows):
        top = index * ROW
        if isinstance(source, Path):
            picture = Image.open(source)
            picture.thumbnail((TEXT - 20, ROW))
            sheet.paste(picture, ((TEXT - picture.width) // 2, top))
        else:
            text = "\n".join(textwrap.wrap(source, 24))
            ImageDraw.Draw(sheet).text((12, top + ROW // 2), text, "black", font, anchor="lm", spacing=7)
        with Image.open(texture) as picture:
            small = picture.resize((ROW, ROW))
            sheet.paste(small, (TEXT, top), small.getchannel("A"))
        with Image.open(texture.with_suffix(".gif")) as turntable:
            for view in range(4):
                turntable.seek(view * turntable.n_frames // 4)
                frame = turntable.convert("RGB").resize((VIEW, ROW))
                sheet.paste(frame, (TEXT + ROW + view * VIEW, top))
    path = OUT / "overview.png"
    sheet.save(path)
    return path


def main():
    began = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    run("joint.py", *DATA, *SMALL, CHECKPOINTS)
    run("joint.py", *DATA, *LARGE, CHECKPOINTS)
    rows = []
    for number, prompt in enumerate(PROMPTS, 1):
        path = OUT / f"text-{number}.png"
        run("infer_uv.py", "--prompt", prompt, "--out", str(path), "--turntable", CHECKPOINTS)
        rows.append((prompt, path))
    person, path = held_out_person(), OUT / "image.png"
    run("infer_uv.py", "--image", str(person), "--out", str(path), "--turntable", CHECKPOINTS)
    rows.append((person, path))
    print(f"{overview(rows)} after {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
