"""Makes the textures that are measured: written as PNG files that say how they were made, so that a run goes on."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common import processes
from common.errors import UserError
from common.files import content_hash, write_whole
from common.pictures import image_from_pixels
from common.progress import progress
from evaluation.data import EvaluationSet
from evaluation.procedural import ROWS_AT_ONCE, SEED, SENTENCES, blend_name, blends, sentences_name
from models.adapters import weights_hash
from models.base import resolve_source
from models.checkpoints import TrainedModel
from models.diffusion import autocast, resolve_precision
from models.generation import conditions_of, generate_guided, joined, prompt_length, shares_of
from models.settings import BLEND, GenerationSettings, encode_described, read_description


@dataclass(frozen=True)
class Job:
    """A texture to be made: folder/number.png, from a prompt, a picture, or both by img_weight."""

    folder: str
    number: int
    prompt: str | None
    picture: Callable[[int], Image.Image] | None = None
    picture_number: int = 0
    img_weight: float = 1.0

    def path(self, out: Path) -> Path:
        return texture_path(out, self.folder, self.number)


def texture_path(out: Path, folder: str, number: int) -> Path:
    return out / "textures" / folder / f"{number:05d}.png"


def jobs_for(samples: EvaluationSet, tasks: list[str], is_procedural: bool) -> list[Job]:
    """tasks: of "t2uv", "i2uv". The procedural set also has sentences and blends of the next person's picture."""
    numbers, jobs = range(len(samples)), []
    if "t2uv" in tasks:
        jobs += [Job("t2uv", number, samples.prompts[number]) for number in numbers]
    if "i2uv" in tasks:
        jobs += [Job("i2uv", number, None, samples.picture, number) for number in numbers]
    if is_procedural and "t2uv" in tasks:
        for name, sentences in SENTENCES.items():
            folder = sentences_name(name)
            jobs += [Job(folder, number, sentence) for number, (sentence, _) in enumerate(sentences)]
    if is_procedural and len(tasks) == 2:
        for weight, number in blends(len(samples)):
            other = (number + 1) % len(samples)
            jobs.append(Job(blend_name(weight), number, samples.prompts[number], samples.picture, other, weight))
    return jobs


def model_description(trained: TrainedModel, checkpoint: Path | None) -> dict:
    """What all textures of one model share."""
    cfg, settings = trained.cfg, trained.cfg.inference
    base = resolve_source(cfg.model.pretrained_model)
    return {
        "checkpoint": None if checkpoint is None else weights_hash(checkpoint),
        "base": weights_hash(base) if Path(base).is_dir() else base,
        "image_encoder": cfg.model.image_encoder,
        "image_size": cfg.model.image_size,
        "prompt_template": cfg.model.prompt_template,
        "zero_terminal_snr": cfg.model.zero_terminal_snr,
        "resolution": cfg.data.resolution or trained.base.native_resolution,
        "num_inference_steps": settings.num_inference_steps,
        "negative_prompt": settings.negative_prompt,
        "mixed_precision": str(resolve_precision(cfg.training.mixed_precision, trained.base.device)),
    }


@torch.no_grad()
def make_textures(trained: TrainedModel, jobs: list[Job], out: Path, description: dict) -> int:
    """Writes what is not there yet, or was made otherwise; each process its share → how many this one made.

    Returns when all processes are done. Raises UserError when a texture cannot be written.
    """
    mine, count = jobs[processes.rank() :: processes.world_size()], 0

    def alike(job: Job) -> tuple[str, int]:  # with prompts of one length, so that none is padded to another
        return job.folder, prompt_length(trained, job.prompt) if job.prompt else 0

    for (folder, _), group in itertools.groupby(sorted(mine, key=alike), alike):
        group = list(group)
        starts = range(0, len(group), ROWS_AT_ONCE)
        for start in progress(starts, folder):
            chunk = group[start : start + ROWS_AT_ONCE]
            pictures = [job.picture(job.picture_number) if job.picture else None for job in chunk]
            described = [_described(trained, *pair, description) for pair in zip(chunk, pictures)]
            waiting = [row for row, job in enumerate(chunk) if not is_made(job.path(out), described[row])]
            if waiting:
                textures = make_batch(trained, [chunk[row] for row in waiting], [pictures[row] for row in waiting])
                for row, texture in zip(waiting, textures):
                    write_texture(chunk[row].path(out), texture, described[row])
                count += len(waiting)
    processes.wait()
    return count


def _described(trained: TrainedModel, job: Job, picture: Image.Image | None, description: dict) -> dict:
    settings = GenerationSettings.of(trained.cfg.inference)
    is_blend = picture is not None and job.prompt is not None
    blend = {"blend": BLEND, "image_guidance": settings.image_guidance} if is_blend else {}
    return {
        **description,
        "prompt": job.prompt,
        "picture": None if picture is None else content_hash(str(picture.size).encode(), picture.tobytes()),
        "img_weight": job.img_weight if is_blend else None,
        "guidance_scale": settings.text_guidance if job.prompt else settings.image_guidance,
        **blend,
        "seed": SEED + job.number,
    }


def is_made(path: Path, description: dict) -> bool:
    """Whether a whole texture is there and says that it was made so."""
    try:
        told = read_description(path)
        with Image.open(path) as image:
            image.load()
    except Exception:  # missing, half of one, or another program's picture
        return False
    return told == description


def write_texture(path: Path, texture: Tensor, description: dict) -> None:
    """texture: (3, R, R) in [-1, 1], as decoded: nothing is filled or enlarged."""
    write_whole(path, encode_described(image_from_pixels(texture), description))


def make_batch(trained: TrainedModel, jobs: list[Job], pictures: list[Image.Image | None]) -> Tensor:
    """Jobs of one folder → (B, 3, R, R) in [-1, 1], each from its own seed."""
    settings = GenerationSettings.of(trained.cfg.inference).changed(img_weight=jobs[0].img_weight)
    pairs = zip(jobs, pictures)
    rows = [conditions_of(trained, job.prompt, [picture] if picture else [], settings) for job, picture in pairs]
    conditions = joined(rows)
    seeds, device = [SEED + job.number for job in jobs], trained.base.device
    with autocast(device, resolve_precision(trained.cfg.training.mixed_precision, device)):
        textures = generate_guided(
            trained,
            conditions,
            settings.negative_prompt,
            seeds,
            settings.num_inference_steps,
            sampler=settings.sampler,
            shares=shares_of(conditions, settings),
        )
    textures = textures.float().cpu()
    if not textures.isfinite().all():
        raise UserError(f"{jobs[0].folder}: the model made textures that hold no numbers; its weights are damaged")
    return textures
