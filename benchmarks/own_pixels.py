"""How much of a person comes back from pictures whose own pixels are kept, and how wrong a fit may be.

    python benchmarks/own_pixels.py --limit 24                     # held-out procedural people, on Anny
    python benchmarks/own_pixels.py --textures DIR                 # also real textures on DIR's smpl_uv.obj

DIR as benchmarks/real_textures.py has it. Each figure stands beside today's, from the picture's tokens alone. The last
line is JSON: decibels; shares of right answers; seconds a picture. Seen texels are those of triangles of which the
picture shows any pixel, as evaluate.py counts them; kept ones, those that the partial texture is sure of.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atlas_dataset.fits import read_fit
from atlas_dataset.views import render_texture, sample_view
from common.errors import UserError, exit_on_user_error
from common.pictures import image_from_pixels, open_image, picture_files, pixels_from_image
from config.configuration import Render
from embedded.grammar import PATTERNS
from embedded.painter import BOTTOM, TOP
from evaluation.procedural import SEED, SIZE, Judge, Tally, colour_right, held_out_paintings, view_of
from models.body_map import load_body_map
from models.checkpoints import EMBEDDED_CHECKPOINT
from models.pipeline import TexturePipeline
from render.cameras import Cameras
from render.projection import Fit, Sighting, merge, sight_fit
from render.rasteriser import interpolate, rasterize
from render.rigs import load_rig
from render.uv_space import fill_outside, texture_pixels, uv_mask

HEIGHT, WIDTH = 512, 384
RENDER = Render(full_body=1)  # as `view_of` draws it
NOISE = (1, 2, 5)  # degrees on each joint's angles; per cent of the camera's focal length and of the body's place
LEAST_CLOTH = 300  # texels in view, to tell a pattern by
TEXTURE_SIZES = (512, 1024)  # of the real textures
STUDIO = Render(full_body=1, environment=0, backgrounds={"plain": 1, "gradient": 0, "noise": 0, "white": 0})


class Person:
    """A held-out person: its truth, its picture, and the fit that the picture was rendered with."""

    def __init__(self, number: int, outfit, painting):
        self.number, self.outfit, self.painting = number, outfit, painting
        self.image, self.seen = view_of(painting, number)
        self.inside = painting.texture[3] > 0

    def shot(self, view: int) -> tuple[Image.Image, dict]:
        """One more picture of it, and what was drawn for it."""
        texture = fill_outside(self.painting.texture[:3], self.inside) * 2 - 1
        rig = load_rig("anny")
        picture, sampled = render_texture(rig, texture, RENDER, SEED, self.number, [view], HEIGHT, WIDTH)[0]
        return image_from_pixels(picture), sampled


def written_fit(view: dict, body_spec: str = "anny", height: int = HEIGHT, width: int = WIDTH) -> Fit:
    """Through a file, as a user has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.json"
        path.write_text(json.dumps(view))
        return read_fit(path, body_spec, height, width)


def noisy_pose(view: dict, degrees: float, rng: np.random.Generator) -> dict:
    return {**view, "pose": (np.array(view["pose"]) + rng.normal(0, degrees, len(view["pose"]))).tolist()}


def noisy_camera(fit: Fit, per_cent: float, rng: np.random.Generator) -> Fit:
    """Its focal length, and the body's place across the picture in shares of the body's height."""
    height = np.ptp(fit.vertices[:, 1].numpy())
    zoom, across, down = rng.normal(0, per_cent / 100, 3)
    shift = torch.tensor([[across * height, down * height, 0.0]], dtype=torch.float32)
    cameras = Cameras(fit.cameras.rotation, fit.cameras.translation + shift, fit.cameras.focal * (1 + zoom))
    return replace(fit, cameras=cameras)


def decibels(error: Tensor, mask: Tensor) -> float:
    return float(-10 * error[mask].mean().clamp(min=1e-8).log10())


class Bench:
    def __init__(self, pipeline: TexturePipeline, people: list[Person]):
        self.pipeline, self.people, self.tally = pipeline, people, Tally()
        self.judge = Judge([(person.outfit, person.painting) for person in people], pipeline.trained)
        self.seconds: dict[str, list[float]] = {"fit": [], "projection": [], "sampling": []}

    def timed(self, name: str, make):
        start = time.perf_counter()
        result = make()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def own(self, person: Person, images: list[Image.Image], fits: list[Fit | Sighting]) -> tuple[Tensor, Tensor]:
        """Partial texture's sureness (SIZE, SIZE), and the whole texture (3, SIZE, SIZE) in [0, 1]."""
        partial = self.timed("projection", lambda: self.pipeline.own_pixels(images, fits, size=SIZE))
        seeds = [SEED + person.number]
        make = lambda: self.pipeline(images=[images], seeds=seeds, partial=partial, size=SIZE)  # noqa: E731
        (texture,) = self.timed("sampling", make)
        return (pixels_from_image(partial)[3] + 1) / 2, (pixels_from_image(texture)[:3] + 1) / 2

    def today(self, person: Person) -> Tensor:
        (texture,) = self.pipeline(images=[[person.image]], seeds=[SEED + person.number], size=SIZE)
        return (pixels_from_image(texture)[:3] + 1) / 2

    def score(self, name: str, person: Person, texture: Tensor, sure: Tensor | None = None) -> None:
        truth, inside = person.painting.texture[:3], person.inside
        error = (texture - truth).square().mean(0)
        self.tally.add(f"{name}.psnr", decibels(error, inside))
        self.tally.add(f"{name}.psnr_seen", decibels(error, inside & person.seen))
        self.tally.add(f"{name}.psnr_hidden", decibels(error, inside & ~person.seen))
        if sure is not None and (sure == 1).any():
            self.tally.add(f"{name}.psnr_kept", decibels(error, inside & (sure == 1)))
            self.tally.add(f"{name}.kept", float((sure[inside] == 1).float().mean()))
        colours = Tally()
        colour_right(colours, "picture", person.outfit, person.painting, texture)
        for region, answers in colours.answers.items():
            self.tally.add(f"{name}.{region.rpartition('.')[2]}", answers[0])
        for style, region in ((person.outfit.top_style, TOP), (person.outfit.bottom_style, BOTTOM)):
            cloth = (person.painting.regions == region) & person.seen
            if style and cloth.sum() >= LEAST_CLOTH:
                pattern = style if style in PATTERNS else "plain"
                self.tally.add(f"{name}.pattern_seen", self.judge.classifier(texture, cloth) == pattern)

    def exact(self) -> None:
        for person in self.people:
            view = sample_view(RENDER, load_rig("anny"), SEED, person.number, 0)
            fit = self.timed("fit", lambda view=view: written_fit(view))
            sure, texture = self.own(person, [person.image], [fit])
            self.score("exact", person, texture, sure)
            self.score("today", person, self.today(person))
            trained = self.pipeline.trained
            if partial_input := trained.partial_input:  # the same weights without their channels for partial textures
                trained.partial_input = None
                self.score("reimposed", person, self.own(person, [person.image], [fit])[1])
                trained.partial_input = partial_input

    def noisy(self) -> None:
        for person in self.people:
            view = sample_view(RENDER, load_rig("anny"), SEED, person.number, 0)
            for strength in NOISE:
                rng = np.random.default_rng([SEED, person.number, strength])
                for kind, fit in (
                    ("pose", written_fit(noisy_pose(view, strength, rng))),
                    ("camera", noisy_camera(written_fit(view), strength, rng)),
                ):
                    sure, texture = self.own(person, [person.image], [fit])
                    self.score(f"noise.{kind}_{strength}", person, texture, sure)

    def views(self) -> None:
        for person in self.people:
            shots = [person.shot(view) for view in range(4)]
            for count in (1, 2, 4):
                images, fits = [image for image, _ in shots[:count]], [written_fit(view) for _, view in shots[:count]]
                _, texture = self.own(person, images, fits)
                error = (texture - person.painting.texture[:3]).square().mean(0)
                self.tally.add(f"views.{count}", decibels(error, person.inside))

    def predicted(self) -> None:
        """By the body map: the textures, and how far off on the body the places are that it tells."""
        body = self.pipeline.body
        for person in self.people:
            sighting = self.timed("fit", lambda person=person: self.pipeline.find_body(person.image, SIZE))
            try:
                sure, texture = self.own(person, [person.image], [sighting])
            except UserError:  # next to nothing found
                self.tally.add("predicted.failed", 1)
                continue
            self.score("predicted", person, texture, sure)
            fit = written_fit(sample_view(RENDER, load_rig("anny"), SEED, person.number, 0))
            shown = rasterize(fit.vertices, body.faces, fit.cameras, HEIGHT, WIDTH)
            places = interpolate(shown, body.faces, body.vertices)
            told, is_body, _ = self.pipeline.body_map.read(person.image)
            told, found = told.flatten(0, 1)[shown.pixel], is_body.flatten()[shown.pixel]
            if found.any():
                error = (told - places).norm(dim=-1)[found]
                self.tally.add("predicted.error_cm", 100 * error.median().item())
            self.tally.add("predicted.found", found.float().mean().item())


def real_textures(folder: Path) -> dict:
    """Each texture on the SMPL template from one unseen view and from two, front and back, by its partial texture
    alone: decibels of its kept texels, and how many are nearest to their own."""
    body_spec = f"obj:{folder / 'smpl_uv.obj'}"
    rig, measures = load_rig(body_spec), {}
    files = picture_files(folder / "real_textures")
    for size in TEXTURE_SIZES:
        real = torch.stack([texture_pixels(open_image(file), size) for file in files])
        inside = uv_mask(rig.body, size)
        for views in (1, 2):
            errors, hits = [], 0
            for number, texture in enumerate(real):
                pictures, sightings = [], []
                for view in range(views):
                    facing = {1: [20, 40], 2: [[-15, 15], [165, 195]][view]}[views]
                    render = STUDIO.model_copy(update={"azimuth": facing})
                    shot, sampled = render_texture(rig, texture, render, SEED, number, [view], 1024, 768)[0]
                    fit = written_fit(sampled, body_spec, 1024, 768)
                    pictures.append(pixels_from_image(image_from_pixels(shot)))
                    sightings.append(sight_fit(rig.body, fit, 1024, 768, size))
                colours, sure = merge(rig.body, pictures, sightings)
                kept = (sure == 1) & inside
                distances = ((real - colours) / 2).square().mean(1)[:, kept].mean(1)
                errors.append(float(-10 * distances[number].log10()))
                hits += int(distances.argmin()) == number
            measures[f"{views}_at_{size}"] = {"psnr_kept": round(sum(errors) / len(errors), 2), "nearest": hits}
    return {**measures, "textures": len(files)}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--limit", type=int, default=24, help="people (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=["exact", "noisy", "views", "predicted"], help="of all four")
    parser.add_argument("--body-map", type=Path, help="a base's folder with another body map than the checkpoint's")
    parser.add_argument("--textures", type=Path, help="a folder of real textures with smpl_uv.obj")
    args = parser.parse_args()
    with exit_on_user_error():
        pipeline = TexturePipeline.from_pretrained(args.checkpoint)
        people = [Person(number, *truth) for number, truth in enumerate(held_out_paintings(args.limit))]
        if args.body_map:
            pipeline.body_map = load_body_map(str(args.body_map), pipeline.trained.base.device)
        bench = Bench(pipeline, people)
        for name in args.only:
            getattr(bench, name)()
            print(name, json.dumps(bench.tally.nested()), flush=True)
        measures = bench.tally.nested()
        if args.textures:
            measures["real"] = real_textures(args.textures)
        seconds = {name: round(sum(taken) / len(taken), 2) for name, taken in bench.seconds.items() if taken}
        print(json.dumps({**measures, "seconds": seconds}))


if __name__ == "__main__":
    main()
