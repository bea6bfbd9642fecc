"""Makes UV textures from a prompt, a picture, or both.

python infer_uv.py --prompt "a woman in a green sweater and blue jeans"
python infer_uv.py --image person.jpg --turntable
python infer_uv.py --prompt "..." --image person.jpg --img-weight 0.5 --export glb,usdz
python infer_uv.py --prompts-file prompts.txt --out textures            # goes on where it was stopped
"""

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from common import processes
from common.errors import UserError, exit_on_user_error, reason
from common.files import check_writable, write_whole
from common.pictures import encode_image, open_image, picture_files, texture_pixels
from config.configuration import DEFAULT_CONFIG, dotted_overrides
from models.diffusion import SAMPLERS
from models.generation import check_takes_pictures
from models.pipeline import TexturePipeline, read_mask
from render.export import SUFFIXES, export_body
from render.regions import BODY_REGIONS
from render.rigs import load_rig
from render.turntable import contact_sheet, save_turntable, turntable_frames

EXPORTS = (*(suffix[1:] for suffix in SUFFIXES), "gif", "mp4", "sheet")
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Job:
    """One texture to be made, and where."""

    prompt: str | None
    images: tuple[str, ...]
    seed: int
    path: Path


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_argument_group("what the person looks like")
    given.add_argument("--prompt")
    given.add_argument("--image", action="append", help="picture of a person; several times for several views of it")
    given.add_argument("--prompts-file", help="a text file with a prompt a line: a texture for each")
    given.add_argument("--images", help="a folder of pictures: a texture for each")
    given.add_argument("--img-weight", type=float, help="with both: 0 is text alone, 1 image alone (default: 0.5)")
    given.add_argument(
        "--text-guidance", type=float, help="with both, instead of --img-weight: how hard the text pulls"
    )
    given.add_argument("--image-guidance", type=float, help="and how hard the image pulls")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", help="of any known layout (default: your newest one, or the embedded one)")
    model.add_argument("--lora", help="instead of --checkpoint: a LoRA file or a PEFT folder, with --config")
    model.add_argument("--aligner", help="with --lora: the aligner's .safetensors or .pth file")
    model.add_argument("--config", default=DEFAULT_CONFIG, help="names the base of weights that do not say theirs")
    sampling = parser.add_argument_group("sampling (default: as the checkpoint says)")
    sampling.add_argument("--steps", type=int, help="denoising steps")
    sampling.add_argument("--guidance-scale", type=float, help="1 is none")
    sampling.add_argument("--negative-prompt", help="what to keep away from")
    sampling.add_argument("--sampler", choices=("auto", *SAMPLERS))
    sampling.add_argument("--eta", type=float, default=0.0, help="share of fresh noise in DDIM, 0 to 1")
    sampling.add_argument("--seed", type=int, default=0, help="seed of the first texture; the next ones count up")
    sampling.add_argument("--num", type=int, default=1, help="how many textures of each")
    sampling.add_argument("--batch-size", type=int, default=8, help="textures made at once (default: %(default)s)")
    edit = parser.add_argument_group("editing a texture")
    edit.add_argument("--init-texture", help="the texture to start from")
    edit.add_argument(
        "--strength", type=float, help="how much of it is made anew, 0 to 1 (default: 0.6; 1 with --mask)"
    )
    edit.add_argument("--mask", help=f"what alone is made anew: {', '.join(BODY_REGIONS)}, or a picture, white there")
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", default="outputs", help="folder, or a .png file for one texture (default: outputs)")
    out.add_argument("--size", type=int, default=1024, help="side in texels; above the model's own by bicubic")
    out.add_argument("--seam-fix", action="store_true", help="bring colours on both sides of each UV seam together")
    out.add_argument("--turntable", action="store_true", help="also a GIF of the turning body: --export gif")
    out.add_argument("--export", default="", help=f"comma-separated, beside each texture: {', '.join(EXPORTS)}")
    out.add_argument("--pose", default="rest", help="of the exported body: rest, standing, walking, ...")
    args, unknown = parser.parse_known_args()
    args.exports = [name for name in args.export.split(",") if name] + ["gif"] * args.turntable
    return args, dotted_overrides(unknown)


def check(args: argparse.Namespace) -> None:
    if args.prompt is not None and not args.prompt.strip():
        args.prompt = None
    many = args.prompts_file or args.images
    both = (args.prompt or args.prompts_file) and (args.image or args.images)
    if not (args.prompt or args.image or many):
        raise UserError("nothing to make a texture from: give --prompt, --image or both")
    if (args.prompt and args.prompts_file) or (args.image and args.images) or (args.prompts_file and args.images):
        raise UserError(
            "of prompts and of pictures give one or many: --prompts-file or --images goes with one of the other"
        )
    if args.img_weight is not None and not both:
        raise UserError("--img-weight blends a prompt with a picture: give both --prompt and --image")
    if args.img_weight is not None and not 0 <= args.img_weight <= 1:
        raise UserError(f"--img-weight {args.img_weight} is outside 0 to 1")
    if args.img_weight is not None and (args.text_guidance is not None or args.image_guidance is not None):
        raise UserError("give --img-weight, or --text-guidance and --image-guidance, not both")
    if args.checkpoint and (args.lora or args.aligner):
        raise UserError("give --checkpoint, or --lora and --aligner, not both")
    if args.aligner and not args.lora:
        raise UserError("--aligner needs --lora; a --checkpoint brings its own aligner")
    if min(args.num, args.size, args.batch_size) < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--num, --steps, --size and --batch-size must be 1 or more")
    if args.guidance_scale is not None and args.guidance_scale < 1:
        raise UserError(f"--guidance-scale {args.guidance_scale} is below 1 (1 is no guidance)")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta {args.eta} is outside 0 to 1")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed} is outside 0 to 2**62")
    if (args.strength is not None or args.mask) and not args.init_texture:
        raise UserError("--strength and --mask change a texture: give it with --init-texture")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"--strength {args.strength} is outside 0 to 1")
    for name in args.exports:
        if name not in EXPORTS:
            raise UserError(f"--export {name!r} is unknown: use {', '.join(EXPORTS)}")
    if args.out.endswith(".png") and (args.num > 1 or many):
        raise UserError("--out names one file but --num asks for more; give a folder")
    if not args.out.endswith(".png") and Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file; give a folder or a name that ends in .png")


def read_prompts_file(path: str) -> list[str]:
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give a text file with a prompt a line") from None
    if not any(prompts):
        raise UserError(f"{path} holds no prompts; write one a line")
    return [prompt for prompt in prompts if prompt]


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """All textures that the arguments ask for. Names follow from the input and the seed alone, so that they are the
    same when a list is run again."""
    prompts = read_prompts_file(args.prompts_file) if args.prompts_file else [args.prompt]
    pictures = [(str(path),) for path in picture_files(args.images)] if args.images else [tuple(args.image or ())]
    jobs, numbered = [], args.prompts_file is not None
    for number, prompt in enumerate(prompts):
        for images in pictures:
            stem = re.sub(r"[^a-z0-9]+", "-", (prompt or Path(images[0]).stem).lower()).strip("-")[:60].strip("-")
            stem = f"{number:05d}-{stem}" if numbered else stem or "texture"
            if prompt and images:
                stem = f"{stem}-with-{Path(images[0]).stem}"
            elif args.images:
                stem = Path(images[0]).name.replace(".", "-")
            for seed in range(args.seed, args.seed + args.num):
                path = Path(args.out) if args.out.endswith(".png") else Path(args.out) / f"{stem}-{seed}.png"
                jobs.append(Job(prompt, images, seed, path))
    return jobs


def settings_of(args: argparse.Namespace, pipeline: TexturePipeline) -> dict:
    """What every texture of this call shares, as it is written into the files."""
    defaults = pipeline.trained.cfg.inference
    return {
        "negative_prompt": defaults.negative_prompt if args.negative_prompt is None else args.negative_prompt,
        "steps": args.steps or defaults.num_inference_steps,
        "guidance_scale": args.guidance_scale or defaults.guidance_scale, "text_guidance": args.text_guidance,
        "image_guidance": args.image_guidance, "sampler": args.sampler or defaults.sampler, "eta": args.eta,
        "img_weight": args.img_weight, "init_texture": args.init_texture, "strength": args.strength, "mask": args.mask,
        "size": args.size, "seam_fix": args.seam_fix, "checkpoint": pipeline.origin, "body": pipeline.body_spec,
        "base": pipeline.trained.cfg.model.pretrained_model,
    }  # fmt: skip


def write_texture(job: Job, texture: Image.Image, settings: dict, exports: list[str], pose: str) -> list[Path]:
    """The PNG with its settings in its text chunks, and what is exported beside it; the PNG last, so that what has one
    is whole."""
    written = []
    if exports:
        rig = load_rig(settings["body"])
        posed = rig.named_pose(pose, job.seed)
        filled = (texture_pixels(texture, texture.width) + 1) / 2
        for name in exports:
            path = (
                job.path.with_suffix(f".{name}")
                if name != "sheet"
                else job.path.with_name(f"{job.path.stem}-sheet.png")
            )
            if name in ("gif", "mp4", "sheet"):
                body = rig.body if pose == "rest" else type(rig.body)(
                    rig.vertices([posed])[0], rig.body.faces, rig.body.uvs, rig.body.uv_faces)  # fmt: skip
                if name == "sheet":
                    write_whole(path, encode_image(contact_sheet(body, filled), format="PNG"))
                else:
                    save_turntable(turntable_frames(body, filled), path)
            else:
                export_body(path, rig, posed, texture)
            written.append(path)
    chunks = PngInfo()
    chunks.add_text("Software", "TexDreamer Joint")
    told = {"prompt": job.prompt, "image": job.images[0] if job.images else None, "images": list(job.images)}
    chunks.add_itxt("parameters", json.dumps({**told, **settings, "seed": job.seed}, ensure_ascii=False))
    write_whole(job.path, encode_image(texture, format="PNG", pnginfo=chunks))
    return [job.path, *written]


def main():
    with exit_on_user_error():
        args, overrides = parse_args()
        check(args)
        processes.keep_freed_memory()
        jobs = list_jobs(args)
        is_list = bool(args.prompts_file or args.images)
        if not is_list:
            for image in args.image or ():
                open_image(image)
        init_texture = open_image(args.init_texture) if args.init_texture else None
        mask = read_mask(args.mask)
        if processes.world_size() > 1 and torch.cuda.is_available():
            overrides = [*overrides, f"training.device=cuda:{os.environ.get('LOCAL_RANK', 0)}"]
        pipeline = TexturePipeline.from_pretrained(args.checkpoint, args.config, overrides, args.lora, args.aligner)
        if args.images or args.image:
            check_takes_pictures(pipeline.trained)
        settings = settings_of(args, pipeline)
        if settings["steps"] > pipeline.trained.base.noise_scheduler.config.num_train_timesteps:
            raise UserError(f"--steps {settings['steps']} is more than the base's noise schedule has")
        if args.exports:
            load_rig(pipeline.body_spec).named_pose(args.pose, 0)
        check_writable(jobs[0].path.parent)
        mine = jobs[processes.rank() :: processes.world_size()]
        waiting = [job for job in mine if not (is_list and job.path.exists())]
        if len(waiting) < len(mine):
            print(f"{len(mine) - len(waiting)} of {len(mine)} textures are there already")

        progress = tqdm(total=len(waiting), desc="textures", unit="texture", disable=not is_list)
        for start in range(0, len(waiting), args.batch_size):
            group = waiting[start : start + args.batch_size]
            steps = tqdm(total=settings["steps"], desc="denoising", unit="step", disable=is_list)
            opened = {paths: [open_image(path) for path in paths] for paths in {job.images for job in group}}
            textures = pipeline(
                [job.prompt for job in group], [opened[job.images] for job in group], args.img_weight,
                args.guidance_scale, args.text_guidance, args.image_guidance, args.negative_prompt, args.steps,
                [job.seed for job in group], args.sampler, args.eta, init_texture,
                args.strength or (1.0 if mask else 0.6), mask, args.size, args.seam_fix, steps.update,
            )  # fmt: skip
            steps.close()
            for job, texture in zip(group, textures):
                written = write_texture(job, texture, settings, args.exports, args.pose)
                if is_list:
                    note(Path(args.out), job, settings, written)
                else:
                    print(*written, sep="\n")
            progress.update(len(group))
        progress.close()


def note(folder: Path, job: Job, settings: dict, written: list[Path]) -> None:
    """Adds a line to the manifest; each process has its own, so that no two write to one file."""
    name = MANIFEST if processes.world_size() == 1 else f"manifest-{processes.rank()}.jsonl"
    line = {"file": job.path.name, "prompt": job.prompt, "images": list(job.images), "seed": job.seed, **settings,
            "exports": [path.name for path in written[1:]]}  # fmt: skip
    with (folder / name).open("a", encoding="utf-8") as manifest:
        manifest.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
