"""Joint training on a folder of real textures: does each prompt, and each unseen view, give back its own texture?

    python benchmarks/real_textures.py DIR

DIR holds smpl_uv.obj, real_textures/*.png and real_textures/prompts.txt. Trains on 40 renders of each texture, then
generates from each prompt and from one further render of each. A hit: of the real textures, the nearest to what was

"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F

from atlas_dataset.building import build_dataset
from atlas_dataset.sources import HuggingFaceATLAS
from atlas_dataset.views import render_texture
from common.errors import exit_on_user_error
from common.pictures import image_from_pixels, open_image
from config.configuration import DEFAULT_CONFIG, Render, dotted_overrides, load_config
from evaluation.texture_space import psnr
from models.checkpoints import load_checkpoint
from models.diffusion import autocast, resolve_precision
from models.generation import generate, picture_condition, prompt_condition
from render.rigs import load_rig
from render.uv_space import texture_pixels, uv_mask
from training.loop import train

# A studio, with white light: some of the textures differ in a shade of gray, and 280 renders are too few to learn that
# a colour beside the body says nothing about it.
STUDIO = {"plain": 0, "gradient": 0, "noise": 0, "white": 1}
VIEWS, HEIGHT, WIDTH, SIDE, SEED = 40, 256, 192, 64, 0


def nearest(generated: Tensor, real: Tensor, mask: Tensor) -> tuple[list[int], Tensor]:
    """generated: (B, 3, R, R), real: (K, 3, 64, 64) in [-1, 1] → nearest index, all errors (B, K) on [0, 1]."""
    small = F.interpolate(generated, size=(SIDE, SIDE), mode="area")
    error = ((small[:, None] - real[None]) / 2).square().mean(2)[..., mask].mean(-1)
    return error.argmin(1).tolist(), error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument(
        "--keep", type=Path, help="folder for the data set, checkpoint and textures (default: thrown away)"
    )
    args, unknown = parser.parse_known_args()
    datasets.disable_progress_bars()
    began, work = time.perf_counter(), args.keep or Path(tempfile.mkdtemp())

    with exit_on_user_error():
        body_spec = f"obj:{args.folder / 'smpl_uv.obj'}"
        source = HuggingFaceATLAS(str(args.folder / "real_textures"), args.folder / "real_textures" / "prompts.txt")
        render = Render(full_body=1, fill=[0.9, 0.95], tint=0, environment=0, backgrounds=STUDIO)
        dataset = build_dataset(source, body_spec, VIEWS, work / "data", HEIGHT, WIDTH, SEED, render)
        settings = [
            f"data.dataset={dataset}",
            f"data.body={body_spec}",
            f"data.cache_dir={work / 'cache'}",
            "data.validation_textures=0",
            f"output.out_dir={work / 'checkpoints'}",
            f"output.log_dir={work / 'logs'}",
            "output.sample_every=1000000",
            "output.save_every=1000000",
            f"training.seed={SEED}",
            f"training.joint.max_steps={args.steps}",
            "training.joint.batch_size=7",
            "training.joint.effective_batch_size=7",
            "training.joint.learning_rate=3e-3",
            "training.joint.aligner_learning_rate=5e-4",
            "training.joint.gamma=20",  # few renders: what a picture says is learned from its prompt
        ]
        cfg = load_config(DEFAULT_CONFIG, [*settings, *dotted_overrides(unknown)])
        trained = load_checkpoint(train(cfg, "joint"))
        device = trained.base.device
        rig = load_rig(body_spec)
        textures = [open_image(encoded) for encoded, _ in (source[row] for row in range(len(source)))]
        real = torch.stack([texture_pixels(texture, SIDE) for texture in textures])
        mask = uv_mask(rig.body, SIDE)
        prompts = source.prompts[: len(source)]
        views = []
        for row, texture in enumerate(textures):
            pixels = texture_pixels(texture, 1024)
            picture, _ = render_texture(rig, pixels, render, SEED, row, [VIEWS], HEIGHT, WIDTH)[0]  # the next view
            views.append(image_from_pixels(picture))
        generated, inference = {}, cfg.inference
        seeds, steps = [SEED] * len(source), inference.num_inference_steps
        with torch.no_grad(), autocast(device, resolve_precision(cfg.training.mixed_precision, device)):
            states_of = {
                "text": torch.cat([prompt_condition(trained, prompt) for prompt in prompts]),
                "image": torch.cat([picture_condition(trained, [view]) for view in views]),
            }
            for name, states in states_of.items():
                pixel_values = generate(
                    trained, states, inference.negative_prompt, seeds, steps, inference.guidance_scale
                )
                generated[name] = pixel_values.cpu()
        seconds = time.perf_counter() - began

    nearest_to = {name: nearest(pictures, real, mask) for name, pictures in generated.items()}
    (text, text_error), (image, image_error) = nearest_to["text"], nearest_to["image"]
    print(f"{'texture':<9}{'by text':<9}{'error':<9}{'by image':<10}{'error':<9}prompt")
    for row, prompt in enumerate(prompts):
        by_text = f"{text[row]:<9}{text_error[row, row]:<9.4f}"
        by_image = f"{image[row]:<10}{image_error[row, row]:<9.4f}"
        print(f"{row:<9}{by_text}{by_image}{prompt}")
    side = generated["text"].shape[-1]
    full = torch.stack([texture_pixels(texture, side) for texture in textures])
    if args.keep:
        rows = [full, generated["text"], generated["image"]]
        image_from_pixels(torch.cat([torch.cat([*row], dim=-1) for row in rows], dim=-2)).save(work / "textures.png")
    else:
        shutil.rmtree(work)
    hits = {}
    for name, (indices, _) in nearest_to.items():
        hits[f"{name}_hits"] = sum(index == row for row, index in enumerate(indices))
        decibels = psnr((generated[name].float().clamp(-1, 1) + 1) / 2, (full + 1) / 2, uv_mask(rig.body, side))
        hits[f"{name}_psnr"] = round(decibels.mean().item(), 2)
    print(json.dumps({**hits, "textures": len(source), "seconds": round(seconds)}))


if __name__ == "__main__":
    main()
