"""Makes UV textures from a prompt, a picture, or both.

python infer_uv.py --prompt "a woman in a green sweater and blue jeans"
python infer_uv.py --image person.jpg --turntable
python infer_uv.py --image person.jpg --fit person.json     # its own pixels kept, the rest made
python infer_uv.py --prompt "..." --image person.jpg --img-weight 0.5 --export glb,usdz
python infer_uv.py --prompts-file prompts.txt --out textures            # goes on where it was stopped
python infer_uv.py --settings outputs/texture.png --out again.png       # the same texture once more
"""

import signal

if __name__ == "__main__":  # while the imports take their seconds, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from atlas_dataset.fits import fit_beside, read_fit
from common import processes
from common.errors import INCOMPLETE, UserError, exit_on_user_error, reason
from common.files import check_writable, content_hash, write_whole
from common.pictures import encode_image, open_image, picture_files
from common.progress import progress
from common.text import parse_json, read_lines
from config.configuration import DEFAULT_CONFIG, DEFAULT_FAST_STEPS, FAST_STEPS, dotted_overrides
from models.adapters import parse_adapter, weights_hash
from models.diffusion import SAMPLERS
from models.fast import fast_weights_hash
from models.generation import check_takes_pictures, prompt_length
from models.pipeline import TexturePipeline, read_mask
from models.settings import (
    BLEND,
    MASKED_STRENGTH,
    GenerationSettings,
    check_ranges,
    encode_described,
    read_description,
    read_settings,
)
from render.densepose import SOURCE, TABLE, iuv_beside, read_iuv
from render.export import INFLUENCES, SUFFIXES, export_body
from render.regions import BODY_REGIONS
from render.rigs import load_rig
from render.turntable import contact_sheet, save_turntable, turntable_frames
from render.uv_space import texture_pixels

EXPORTS = (*(suffix[1:] for suffix in SUFFIXES), "gif", "mp4", "sheet", "partial")
AUTO = "auto"  # in place of a fit: the embedded body map tells where the body is
MANIFEST = "manifest.jsonl"
LONGEST_NAME = 60  # bytes of a prompt or a picture's name in a file's name
# A hash, and what names its files.
HASHED = {
    "weights": "checkpoint",
    "pictures": "images",
    "edited": "init_texture",
    "adapter_weights": "adapter",
    "fast_weights": "fast",
    "fitted": "fits",
}
ASKED = ("num_inference_steps", "sampler", "guidance_scale", "text_guidance", "image_guidance", "negative_prompt",
         "img_weight", "eta", "strength", "size", "seam_fix", "relight", "mirror_fill")  # fmt: skip
# What --fast decides.
SLOW = ("num_inference_steps", "sampler", "guidance_scale", "text_guidance", "image_guidance", "negative_prompt", "eta")
# Of --settings.
REPEATED = ("prompt", "seed", "init_texture", "mask", "checkpoint", "lora", "aligner", "adapter", "fast", "config")


@dataclass(frozen=True)
class Job:
    """One texture to be made, and where. fits: a file, or AUTO, for each image; or none."""

    prompt: str | None
    images: tuple[str, ...]
    seed: int
    path: Path
    fits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """What all textures of one call of this command share."""

    pipeline: TexturePipeline
    settings: GenerationSettings
    init_texture: Image.Image | None
    mask: str | Image.Image | None
    description: dict
    exports: list[str]
    pose: str
    bones: int
    is_list: bool
    iuv_table: str | None  # with it, the jobs' fits are IUV pictures


def parse_args(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and overrides of the configuration. arguments: None is the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_argument_group("what the person looks like")
    given.add_argument("--prompt")
    given.add_argument("--image", action="append", help="picture of a person; several times for several views of it")
    given.add_argument("--prompts-file", help="a text file with a prompt a line: a texture for each")
    given.add_argument("--images", help="a folder of pictures: a texture for each")
    given.add_argument(
        "--img-weight",
        type=float,
        help="with both: 0 is text alone, 1 image alone, in the middle both alike (default: 0.5)",
    )
    given.add_argument(
        "--text-guidance", type=float, help="with both, instead of --img-weight: how hard the text pulls"
    )
    given.add_argument("--image-guidance", type=float, help="and how hard the image pulls")
    given.add_argument("--settings", help="a texture's PNG, or what it says as a .json file: made once more, to the "
                                          "bit; what else is given here is changed")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", help="of any known layout (default: your newest one, or the embedded one)")
    model.add_argument("--lora", help="instead of --checkpoint: a LoRA file or a PEFT folder, with --config")
    model.add_argument("--aligner", help="with --lora: the aligner's .safetensors or .pth file")
    model.add_argument(
        "--adapter",
        action="append",
        metavar="DIR[:weight]",
        help="of personalise.py; several times for several",
    )
    model.add_argument("--config", help=f"names the base of weights that do not say theirs (default: {DEFAULT_CONFIG})")
    sampling = parser.add_argument_group("sampling (default: as the checkpoint says)")
    sampling.add_argument("--fast", type=int, nargs="?", const=DEFAULT_FAST_STEPS, choices=FAST_STEPS,
                          help="so few steps, without guidance, "
                          f"by its fast adapter (alone: {DEFAULT_FAST_STEPS}; see distill.py)")  # fmt: skip
    sampling.add_argument("--steps", type=int, dest="num_inference_steps", help="denoising steps")
    sampling.add_argument("--guidance-scale", type=float, help="1 is none")
    sampling.add_argument("--negative-prompt", help="what to keep away from")
    sampling.add_argument("--sampler", choices=("auto", *SAMPLERS))
    sampling.add_argument("--eta", type=float, help="share of fresh noise in DDIM, 0 to 1 (default: 0)")
    sampling.add_argument("--seed", type=int, help="seed of the first texture, the next ones count up (default: 0)")
    sampling.add_argument("--num", type=int, default=1, help="how many textures of each")
    sampling.add_argument("--batch-size", type=int, default=8, help="textures made at once (default: %(default)s)")
    edit = parser.add_argument_group("editing a texture")
    edit.add_argument("--init-texture", help="the texture to start from")
    edit.add_argument(
        "--strength", type=float, help="how much of it is made anew, 0 to 1 (default: 0.6; 1 with --mask)"
    )
    edit.add_argument("--mask", help=f"what alone is made anew: {', '.join(BODY_REGIONS)}, or a picture, white there")
    own = parser.add_argument_group("a picture's own pixels, kept where it shows the body")
    own.add_argument("--fit", action="append", help="how the body stands in each --image: a .json, .npz or .pkl file "
                                                    "(see README), or auto; with --images: their folder")  # fmt: skip
    own.add_argument("--iuv", action="append", help="instead: DensePose's IUV picture of each --image, on SMPL's body")
    own.add_argument("--iuv-table", help=f"with --iuv: DensePose's {TABLE} ({SOURCE})")
    own.add_argument("--relight", choices=("on", "off"), help="divide the picture's light out of them (default: on)")
    own.add_argument("--mirror-fill", action=argparse.BooleanOptionalAction,
                     help="fill what one side hides from what the other shows (default: no)")  # fmt: skip
    own.add_argument("--save-partial", action="store_true", help="also what was seen, alone: --export partial")
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", default="outputs", help="folder, or a .png file for one texture (default: outputs)")
    out.add_argument("--size", type=int, help="side in texels, above the model's own by bicubic (default: 1024)")
    out.add_argument("--seam-fix", action=argparse.BooleanOptionalAction,
                     help="bring colours on both sides of each UV seam together (default: yes)")  # fmt: skip
    out.add_argument("--turntable", action="store_true", help="also a GIF of the turning body: --export gif")
    out.add_argument("--export", default="", help=f"comma-separated, beside each texture: {', '.join(EXPORTS)}")
    out.add_argument(
        "--bones", type=int, choices=INFLUENCES, default=INFLUENCES[0],
        help="that move a vertex of a GLB, at most: all viewers read 4, few read 8 (default: %(default)s)",
    )  # fmt: skip
    out.add_argument("--pose", default="rest", help="of the exported body: rest, standing, walking, ...")
    args, unknown = parser.parse_known_args(arguments)
    args.exports = [name for name in args.export.split(",") if name] + ["gif"] * args.turntable
    args.exports += ["partial"] * args.save_partial
    args.relight = {None: None, "on": True, "off": False}[args.relight]
    return args, dotted_overrides(unknown)


def check(args: argparse.Namespace) -> None:
    if args.prompt is not None and not args.prompt.strip():
        args.prompt = None
    many = args.prompts_file or args.images
    both = (args.prompt or args.prompts_file) and (args.image or args.images)
    if args.settings and many:
        raise UserError("--settings repeats one texture: leave out --prompts-file and --images")
    if not (args.prompt or args.image or many):
        raise UserError("nothing to make a texture from: give --prompt, --image or both")
    if (args.prompt and args.prompts_file) or (args.image and args.images) or (args.prompts_file and args.images):
        raise UserError(
            "of prompts and of pictures give one or many: --prompts-file or --images goes with one of the other"
        )
    if args.img_weight is not None and not both:
        raise UserError("--img-weight blends a prompt with a picture: give both --prompt and --image")
    if args.img_weight is not None and (args.text_guidance is not None or args.image_guidance is not None):
        raise UserError("give --img-weight, or --text-guidance and --image-guidance, not both")
    if args.checkpoint and (args.lora or args.aligner):
        raise UserError("give --checkpoint, or --lora and --aligner, not both")
    if args.aligner and not args.lora:
        raise UserError("--aligner needs --lora; a --checkpoint brings its own aligner")
    check_ranges(vars(args), lambda name: f"--{name.removeprefix('num_inference_').replace('_', '-')}")
    if args.fast and (args.lora or any(getattr(args, name) is not None for name in SLOW)):
        options = ", ".join(f"--{name.removeprefix('num_inference_').replace('_', '-')}" for name in SLOW)
        raise UserError(f"--fast is a checkpoint's own way of sampling: leave out --lora, {options}")
    if min(args.num, args.batch_size) < 1:
        raise UserError("--num and --batch-size must be 1 or more")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed} is outside 0 to 2**62")
    if (args.strength is not None or args.mask) and not args.init_texture:
        raise UserError("--strength and --mask change a texture: give it with --init-texture")
    for name in args.exports:
        if name not in EXPORTS:
            raise UserError(f"--export {name!r} is unknown: use {', '.join(EXPORTS)}")
    check_fits(args)
    if args.out.endswith(".png") and (args.num > 1 or many):
        raise UserError("--out names one file but --num asks for more; give a folder")
    if not args.out.endswith(".png") and Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file; give a folder or a name that ends in .png")


def check_fits(args: argparse.Namespace) -> None:
    fits = args.fit or args.iuv
    if args.fit and args.iuv:
        raise UserError("give --fit or --iuv, not both")
    if not fits:
        needing = {"--iuv-table": args.iuv_table, "--mirror-fill": args.mirror_fill, "--relight": args.relight is False,
                   "--save-partial": "partial" in args.exports}  # fmt: skip
        for option, is_given in needing.items():
            if is_given:
                raise UserError(f"{option} is for a picture whose pixels are kept: give its --fit or --iuv")
        return
    if args.iuv and not args.iuv_table:
        raise UserError(f"--iuv needs DensePose's table: fetch {SOURCE} and name its {TABLE} with --iuv-table")
    if args.init_texture:
        raise UserError("--fit and --iuv keep a picture's pixels, --init-texture a texture's: give one of them")
    if args.images:
        if len(fits) > 1 or not (fits == [AUTO] or Path(fits[0]).is_dir()):
            raise UserError(
                "with --images give the folder of their fits (NAME.json, .npz, .pkl; NAME_IUV.png), or auto"
            )
    elif not args.image:
        raise UserError("--fit and --iuv say how a body stands in a picture: give it with --image")
    elif fits != [AUTO] and len(fits) != len(args.image):
        raise UserError(f"{len(fits)} fits for {len(args.image)} pictures: give one for each --image, in their order")


def fits_of(args: argparse.Namespace, images: tuple[str, ...]) -> tuple[str, ...]:
    """The fit of each picture, in their order; () without any. Raises UserError where a folder lacks one."""
    fits = args.fit or args.iuv or ()
    if tuple(fits) == (AUTO,):
        return (AUTO,) * len(images)
    if fits and args.images:
        beside = fit_beside if args.fit else iuv_beside
        return tuple(str(beside(fits[0], image)) for image in images)
    return tuple(fits)


def fill_from_settings(args: argparse.Namespace) -> dict:
    """Takes from --settings what was not given by hand → what that file says; {} without one."""
    earlier = read_settings(args.settings) if args.settings else {}
    if earlier:
        if args.lora or args.checkpoint:  # another model: its own files alone
            earlier |= dict.fromkeys(("checkpoint", "lora", "aligner", "adapter"))
        for name in REPEATED:
            if getattr(args, name) is None:
                setattr(args, name, earlier.get(name))
        if not (args.image or args.fit or args.iuv or args.init_texture):  # other pictures have fits of their own
            args.iuv_table = args.iuv_table or earlier.get("iuv_table")
            setattr(args, "iuv" if earlier.get("iuv_table") else "fit", earlier.get("fits") or None)
        args.image = args.image or earlier["images"]
    args.seed = 0 if args.seed is None else args.seed
    return earlier


def read_prompts_file(path: str) -> list[str]:
    prompts = [line for _, line in read_lines(path)]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one a line")
    return prompts


def file_name(text: str) -> str:
    """What a text may be called as a file. Where letters are lost, its hash stands for them, so that no two texts
    have one name."""
    words = " ".join(text.split())
    name = re.sub(r"\W+", "-", words).encode()[:LONGEST_NAME].decode(errors="ignore").strip("-")
    return name if name.replace("-", " ") == words else f"{name}-{content_hash(text.encode())[:8]}".lstrip("-")


def picture_name(images: tuple[str, ...]) -> str:
    """Of one picture its name and kind; of several views their number and hash too."""
    first = Path(images[0])
    name = f"{file_name(first.stem)}-{first.suffix[1:]}"
    return name if len(images) == 1 else f"{name}-{len(images)}-{content_hash(*map(str.encode, images))[:8]}"


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """All textures that the arguments ask for. Names follow from the input and the seed alone, so that they are the
    same when a list is run again."""
    prompts = read_prompts_file(args.prompts_file) if args.prompts_file else [args.prompt]
    pictures = [(str(path),) for path in picture_files(args.images)] if args.images else [tuple(args.image or ())]
    jobs = []
    for (number, prompt), images in itertools.product(enumerate(prompts), pictures):
        names = [f"{number:05d}"] if args.prompts_file else []
        names += [file_name(prompt.lower())] if prompt else []
        names += ["with"] if prompt and images else []
        names += [picture_name(images)] if images else []
        fits = fits_of(args, images)
        for seed in range(args.seed, args.seed + args.num):
            path = Path(args.out)
            if path.suffix != ".png":
                path /= f"{'-'.join([*names, str(seed)])}.png"
            jobs.append(Job(prompt, images, seed, path, fits))
    return jobs


def load_pipeline(args: argparse.Namespace, overrides: list[str]) -> TexturePipeline:
    if processes.world_size() > 1 and torch.cuda.is_available():
        overrides = [*overrides, f"training.device=cuda:{processes.local_rank()}"]
    config = args.config or DEFAULT_CONFIG
    pipeline = TexturePipeline.from_pretrained(
        args.checkpoint, config, overrides, args.lora, args.aligner, args.adapter or (), args.fast
    )
    if args.images or args.image:
        check_takes_pictures(pipeline.trained)
    if args.exports:
        load_rig(pipeline.body_spec).named_pose(args.pose, 0)  # fails here, not after the sampling
    return pipeline


def resolve_settings(args: argparse.Namespace, earlier: dict, pipeline: TexturePipeline) -> GenerationSettings:
    """The checkpoint's own settings, or those of --settings, changed by what was given by hand."""
    asked = {name: getattr(args, name) for name in ASKED}
    masked_before = earlier.get("fits") if args.fit or args.iuv else earlier or not args.mask
    if asked["strength"] is None and not masked_before:
        asked["strength"] = MASKED_STRENGTH
    settings = earlier.get("settings", pipeline.settings).changed(**asked)
    if args.fast:
        own = pipeline.settings
        settings = settings.changed(
            num_inference_steps=own.num_inference_steps, sampler=own.sampler, guidance_scale=own.guidance_scale
        )
    if settings.num_inference_steps > pipeline.trained.base.noise_scheduler.config.num_train_timesteps:
        raise UserError(f"--steps {settings.num_inference_steps} is more than the base's noise schedule has")
    return settings


def shared_description(args: argparse.Namespace, overrides: list[str], settings: GenerationSettings, pipeline) -> dict:
    """What every texture of this call shares, as it is written into the files; `read_settings` reads it back."""
    is_blend = (args.prompt or args.prompts_file) and (args.image or args.images) and settings.img_weight is not None
    return {
        **asdict(settings),
        **({"blend": BLEND} if is_blend else {}),
        "init_texture": args.init_texture,
        "mask": args.mask,
        "edited": files_hash([name for name in (args.init_texture, args.mask) if name not in (None, *BODY_REGIONS)]),
        "checkpoint": None if args.lora else pipeline.origin,
        "weights": weights_hash(args.lora or pipeline.origin),
        "lora": args.lora,
        "aligner": args.aligner,
        "adapter": args.adapter,
        "adapter_weights": adapters_hash(args.adapter),
        "fast": args.fast,
        "fast_weights": args.fast and fast_weights_hash(Path(pipeline.origin)),
        "config": args.config,
        "iuv_table": args.iuv_table,
        "overrides": overrides,
        "body": pipeline.body_spec,
        "base": pipeline.trained.cfg.model.pretrained_model,
    }


def check_is_the_same(earlier: dict, description: dict, is_weight_given: bool) -> None:
    """Raises UserError where a texture that is to be repeated would come from other weights or pictures unseen, or be
    blended by another rule, unless its weight is given anew."""
    was_blend = earlier["prompt"] and earlier["images"] and earlier["settings"].img_weight is not None
    if was_blend and "blend" in description and description["blend"] != earlier.get("blend") and not is_weight_given:
        raise UserError(
            "the texture of --settings was blended as an earlier version did it: it cannot be repeated; give "
            "--img-weight by hand to make another one"
        )
    for name, source in HASHED.items():
        if description[source] == earlier.get(source) and description[name] != earlier.get(name):
            raise UserError(f"{description[source]} is no longer what the texture of --settings was made from: it "
                            f"cannot be repeated; give --{source.removesuffix('s').replace('_', '-')} by hand to make "
                            "another one")  # fmt: skip


def adapters_hash(adapters: list[str] | None) -> str | None:
    """Of the weights of --adapter; None without one, as in files of versions that knew none."""
    return adapters and content_hash(*(weights_hash(parse_adapter(text)[0]) for text in adapters))


def files_hash(paths: Sequence[str]) -> str:
    """Of the files' contents; of one that cannot be read, of nothing: it is skipped later."""
    return content_hash(*(Path(path).read_bytes() if os.access(path, os.R_OK) else b"" for path in paths))


def export_names(job: Job, exports: list[str]) -> dict[str, Path]:
    """Format → the file beside the texture."""
    ends = {name: f"-{name}.png" if name in ("sheet", "partial") else f".{name}" for name in exports}
    return {name: job.path.with_name(f"{job.path.stem}{end}") for name, end in ends.items()}


def is_done(job: Job, description: dict, exports: list[str]) -> bool:
    """Whether the texture is there, says that it was made so and not otherwise, and has its exports beside it."""
    if not all(path.exists() for path in (job.path, *export_names(job, exports).values())):
        return False
    try:
        earlier = read_description(job.path)
    except (UserError, OSError, ValueError):  # another program's picture, or half of one
        return False
    return all(earlier.get(key) == value for key, value in description.items())


def export(job: Job, texture: Image.Image, partial: Image.Image | None, call: Call) -> list[Path]:
    """Writes the textured body, and what was seen of it, beside job.path in each of the formats."""
    rig, files = load_rig(call.pipeline.body_spec), export_names(job, call.exports)
    sampled = rig.named_pose(call.pose, job.seed)
    body, filled = rig.posed(sampled), (texture_pixels(texture, texture.width) + 1) / 2
    for name, path in files.items():
        if name == "sheet":
            write_whole(path, encode_image(contact_sheet(body, filled), format="PNG"))
        elif name == "partial":
            write_whole(path, encode_image(partial, format="PNG"))
        elif name in ("gif", "mp4"):
            save_turntable(turntable_frames(body, filled), path)
        else:
            export_body(path, rig, sampled, texture, influences=call.bones)
    return list(files.values())


def write_texture(path: Path, texture: Image.Image, description: dict) -> None:
    """The PNG with how it was made in its text chunks."""
    write_whole(path, encode_described(texture, description))


def append_to_manifest(folder: Path, description: dict) -> None:
    """Adds a line to the manifest; each process has its own, so that no two write to one file."""
    name = MANIFEST if processes.world_size() == 1 else f"manifest-{processes.rank()}.jsonl"
    try:
        with (folder / name).open("a", encoding="utf-8") as manifest:
            manifest.write(json.dumps(description, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder / name}: {reason(error)}; make room: the same command goes on") from None


def complete_manifest(done: list[Job], exports: list[str]) -> None:
    """Adds the lines of textures that are there, but that no manifest names: killed between the two."""
    if not done:
        return
    folder, names = done[0].path.parent, set()
    for manifest in folder.glob("manifest*.jsonl"):
        for line in manifest.read_bytes().splitlines():
            with contextlib.suppress(ValueError, AttributeError):  # half a line, of a full disk
                names.add(parse_json(line).get("file"))
    for job in done:
        if job.path.name not in names:
            files = {"file": job.path.name, "exports": [path.name for path in export_names(job, exports).values()]}
            append_to_manifest(folder, files | read_description(job.path))


def batches(jobs: list[Job], batch_size: int, pipeline: TexturePipeline) -> Iterator[list[Job]]:
    """Jobs to be made at once: up to batch_size that follow each other and whose prompts are of one length to the UNet,
    so that none is padded to another."""

    def length(job: Job) -> int:
        return prompt_length(pipeline.trained, job.prompt) if job.prompt else 0

    for _, group in itertools.groupby(jobs, length):
        alike = list(group)
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def make_batch(
    jobs: list[Job],
    opened: dict[str, Image.Image],
    partials: dict[Job, Image.Image],
    earlier_batch: tuple[int, int] | None,
    call: Call,
    on_step,
    on_preview=None,
) -> list[Image.Image]:
    """The textures of some jobs. opened: path → picture; partials: of the jobs with fits. earlier_batch:
    (row, rows) that a texture to be repeated had in its batch: how a row's sums are rounded depends on the rows beside
    it."""
    row, rows = earlier_batch or (0, 1)
    batch = jobs * rows if earlier_batch else jobs
    textures = call.pipeline(
        [job.prompt for job in batch],
        [[opened[path] for path in job.images] for job in batch],
        [job.seed for job in batch],
        call.init_texture,
        call.mask,
        call.settings,
        on_step,
        [partials[job] for job in batch] if partials else None,
        on_preview,
    )
    return [textures[row]] if earlier_batch else textures


def job_description(job: Job, call: Call) -> dict:
    """How a job's texture is made: equal for two that are the same."""
    return {
        "prompt": job.prompt,
        "images": list(job.images),
        "pictures": files_hash(job.images),
        "seed": job.seed,
        "fits": list(job.fits),
        "fitted": files_hash(job.fits),
        **call.description,
    }


def open_pictures(jobs: list[Job]) -> tuple[list[Job], dict[str, Image.Image], list[str]]:
    """The jobs whose pictures can be read, path → picture, and what is wrong with the others'."""
    opened, damaged = {}, {}
    for path in {path for job in jobs for path in job.images}:
        try:
            opened[path] = open_image(path)
        except UserError as error:
            damaged[path] = str(error)
    usable = [job for job in jobs if not damaged.keys() & set(job.images)]
    return usable, opened, list(damaged.values())


def keep_own_pixels(
    jobs: list[Job], opened: dict[str, Image.Image], call: Call
) -> tuple[list[Job], dict[Job, Image.Image], list[str]]:
    """The jobs whose fits can be used, what their pictures show, and what is wrong with the others' fits.

    Raises UserError for a fit of the one texture that is asked for.
    """
    usable, partials, faults = [], {}, []
    for job in jobs:
        try:
            if job.fits:
                partials[job] = partial_of(job, opened, call)
            usable.append(job)
        except UserError as error:
            if not call.is_list:
                raise
            faults.append(str(error))
    return usable, partials, faults


def partial_of(job: Job, opened: dict[str, Image.Image], call: Call, on_step=lambda: None) -> Image.Image:
    pipeline, size, sightings = call.pipeline, call.settings.size, []
    for path, fit in zip(job.images, job.fits):
        image = opened[path]
        if fit == AUTO:
            sightings.append(pipeline.find_body(image, size))
        elif call.iuv_table:
            sightings.append(read_iuv(fit, call.iuv_table, pipeline.body, image.height, image.width, size))
        else:
            sightings.append(read_fit(fit, pipeline.body_spec, image.height, image.width))
    pictures = [opened[path] for path in job.images]
    return pipeline.own_pixels(pictures, sightings, size, call.settings.relight, call.settings.mirror_fill, on_step)


def make_all(jobs: list[Job], call: Call, earlier_batch: tuple[int, int] | None, batch_size: int) -> list[str]:
    """Makes and writes the textures → what is wrong with the pictures that were left out."""
    skipped, written = [], []
    bar = progress(total=len(jobs), desc="textures", unit="texture", hidden=not call.is_list)
    with ThreadPoolExecutor(1) as writer:  # files are written, and bodies exported, while the next batch is made
        for group in batches(jobs, batch_size, call.pipeline):
            usable, opened, damaged = open_pictures(group)
            usable, partials, misfits = keep_own_pixels(usable, opened, call)
            damaged += misfits
            skipped += damaged
            for message in damaged:
                bar.write(f"skipped: {message}", file=sys.stderr)
            if usable:
                count = call.settings.num_inference_steps
                steps = progress(total=count, desc="denoising", unit="step", hidden=call.is_list)
                textures = make_batch(usable, opened, partials, earlier_batch, call, steps.update)
                steps.close()
                finish_writing(written)
                for row, (job, texture) in enumerate(zip(usable, textures)):
                    batch = earlier_batch or (row, len(usable))
                    written.append(writer.submit(write_job, job, texture, partials.get(job), batch, call))
            bar.update(len(group))
        finish_writing(written)
    bar.close()
    return skipped


def finish_writing(written: list[Future]) -> None:
    """Waits for files on their way; raises what went wrong with one."""
    while written:
        written.pop(0).result()


def write_job(job: Job, texture: Image.Image, partial: Image.Image | None, batch: tuple[int, int], call: Call) -> None:
    """Writes a texture and what is exported with it."""
    exported = export(job, texture, partial, call) if call.exports else []
    description = job_description(job, call) | {"batch": batch}
    write_texture(job.path, texture, description)  # last: what has one is whole
    if call.is_list:
        names = {"file": job.path.name, "exports": [path.name for path in exported]}
        append_to_manifest(job.path.parent, names | description)
    else:
        print(job.path, *exported, sep="\n")


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with exit_on_user_error():
        args, overrides = parse_args()
        by_hand, earlier = argparse.Namespace(**vars(args)), fill_from_settings(args)
        overrides = [*earlier.get("overrides", []), *overrides]
        check(args)
        processes.keep_freed_memory()
        jobs = list_jobs(args)
        for picture in args.image or ():
            open_image(picture)  # fails here, not after the model is loaded
        init_texture, mask = open_image(args.init_texture) if args.init_texture else None, read_mask(args.mask)
        pipeline = load_pipeline(args, overrides)
        settings = resolve_settings(args, earlier, pipeline)
        description = shared_description(args, overrides, settings, pipeline)
        is_list = bool(args.prompts_file or args.images)
        shared = (args.exports, args.pose, args.bones, is_list, args.iuv_table)
        call = Call(pipeline, settings, init_texture, mask, description, *shared)
        check_writable(jobs[0].path.parent)
        mine = jobs[processes.rank() :: processes.world_size()]
        waiting = [job for job in mine if not (is_list and is_done(job, job_description(job, call), args.exports))]
        if is_list:
            report_done(mine, waiting)
            to_make = set(waiting)
            complete_manifest([job for job in mine if job not in to_make], args.exports)
        replaced = (by_hand.checkpoint, by_hand.image, by_hand.init_texture, by_hand.fit, by_hand.iuv)
        if earlier and not (args.lora or any(replaced)):
            check_is_the_same(earlier, job_description(jobs[0], call), by_hand.img_weight is not None)
        earlier_batch = tuple(earlier["batch"]) if earlier and len(jobs) == 1 else None
        skipped = make_all(waiting, call, earlier_batch, args.batch_size)
        if skipped:
            print(f"{len(skipped)} pictures could not be read and were left out", file=sys.stderr)
            sys.exit(INCOMPLETE)


def report_done(jobs: list[Job], waiting: list[Job]) -> None:
    otherwise = sum(job.path.exists() for job in waiting)
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} textures are there already")
    if otherwise:
        print(f"{otherwise} of {len(jobs)} textures were made otherwise, or not to the end, and are made anew")


if __name__ == "__main__":
    main()
