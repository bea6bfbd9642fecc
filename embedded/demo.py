"""The main job on the embedded default: textures at once, joint training for some minutes, and what it learned.

Runs the commands a user would. First come people from the committed checkpoint, turning; then the same prompts and
picture before and after minutes of joint training on this machine, side by side with them in outputs/demo/overview.png.
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
from models.checkpoints import EMBEDDED_CHECKPOINT
from render.rigs import load_rig
from render.uv_space import texture_pixels

OUT = Path("outputs/demo")
PROMPTS = (  # combinations that `Outfit.held_out` keeps out of training
    "white, woman, floral sweater, blue jeans, auburn hair",
    "African American, man, striped long sleeve shirt, green pants, black hair",
    "Asian, young girl, green jacket, orange shorts, brown hair",
)
MINUTES = 11.0  # in all, after set-up, on any machine: training takes what the rest leaves
SMALL_SHARE = 0.6  # of training: on textures of half the size, whose steps take less than half the time
DATA = ("--data.dataset=procedural:400", "--data.views_per_texture=2", "--output.sample_every=100000")
SMALL = ("--data.resolution=128",)
LARGE = ("--training.joint.lr_scheduler=constant", "--training.joint.learning_rate=5e-4")
CHECKPOINTS = f"--output.out_dir={OUT}/checkpoints"
SIDE, VIEW, TEXT, HEAD = 224, 168, 250, 34  # pixels: of a texture, a view's width, a prompt's width, the titles' height


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


def make_people(name: str, inputs: list[str | Path], *model: str) -> list[Path]:
    """A texture and its turntable for each input, a prompt or a picture, under OUT/name."""
    paths = []
    for number, source in enumerate(inputs, 1):
        paths.append(OUT / name / f"{number}.png")
        kind = "--image" if isinstance(source, Path) else "--prompt"
        run("infer_uv.py", kind, str(source), "--out", str(paths[-1]), "--turntable", *model)
    return paths


def draw_input(sheet: Image.Image, top: int, source: str | Path) -> None:
    """A prompt's words or a picture at the left of the row that begins at `top`."""
    if isinstance(source, Path):
        with Image.open(source) as picture:
            picture.thumbnail((TEXT, SIDE))
            sheet.paste(picture, ((TEXT - picture.width) // 2, top + (SIDE - picture.height) // 2))
    else:
        words = "\n".join(textwrap.wrap(source, 25))
        font = ImageFont.load_default(18)
        ImageDraw.Draw(sheet).text((14, top + SIDE // 2), words, "black", font, anchor="lm", spacing=8)


def draw_person(sheet: Image.Image, corner: tuple[int, int], texture: Path) -> None:
    """A texture, and its turntable from the front and from the back."""
    left, top = corner
    with Image.open(texture) as picture:
        small = picture.resize((SIDE, SIDE))
        sheet.paste(small, corner, small.getchannel("A"))
    with Image.open(texture.with_suffix(".gif")) as turntable:
        for column, frame in enumerate((0, turntable.n_frames // 2)):
            turntable.seek(frame)
            sheet.paste(turntable.convert("RGB").resize((VIEW, SIDE)), (left + SIDE + column * VIEW, top))


def overview(inputs: list[str | Path], columns: dict[str, list[Path]]) -> Path:
    """One row an input, one column a model; a column may be shorter, as of a base that reads no pictures."""
    width = SIDE + 2 * VIEW + 16
    sheet = Image.new("RGB", (TEXT + width * len(columns), HEAD + SIDE * len(inputs)), "white")
    for row, source in enumerate(inputs):
        draw_input(sheet, HEAD + row * SIDE, source)
    for column, (title, textures) in enumerate(columns.items()):
        left = TEXT + column * width
        ImageDraw.Draw(sheet).text((left + 6, HEAD // 2), title, "black", ImageFont.load_default(19), anchor="lm")
        for row, texture in enumerate(textures):
            draw_person(sheet, (left, HEAD + row * SIDE), texture)
    path = OUT / "overview.png"
    sheet.save(path)
    return path


def main():
    began = time.monotonic()

    def minutes() -> float:
        return (time.monotonic() - began) / 60

    OUT.mkdir(parents=True, exist_ok=True)
    inputs = [*PROMPTS, held_out_person()]
    committed = make_people("committed", inputs, "--checkpoint", str(EMBEDDED_CHECKPOINT))
    a_person = minutes() / len(inputs)
    print(f"first pictures in {OUT / 'committed'} after {minutes():.1f} minutes: look at the .gif files", flush=True)
    before = make_people("before", list(PROMPTS), "--checkpoint", str(PROJECT_ROOT / "embedded" / "base"))

    for size in (SMALL, ()):
        run("joint.py", *DATA, *size, CHECKPOINTS, "--cache-only")
    training = max(1.0, MINUTES - minutes() - 1.2 * a_person * len(inputs))
    small_minutes = f"--training.joint.max_minutes={training * SMALL_SHARE:.2f}"
    large_minutes = f"--training.joint.max_minutes={training * (1 - SMALL_SHARE):.2f}"
    run("joint.py", *DATA, *SMALL, small_minutes, CHECKPOINTS)
    run("joint.py", *DATA, *LARGE, large_minutes, "--resume", "auto", CHECKPOINTS)
    after = make_people("after", inputs, CHECKPOINTS)

    columns = {
        "before joint training": before,
        f"after {training:.0f} minutes of it here": after,
        "the committed checkpoint": committed,
    }
    print(f"{overview(inputs, columns)} after {minutes():.1f} minutes")


if __name__ == "__main__":
    main()
