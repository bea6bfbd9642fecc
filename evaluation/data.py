"""What is measured on: true textures with their prompts and pictures, and the textures that another system made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from atlas_dataset.dataset import ATLASLarge, data_set_source
from atlas_dataset.sources import HuggingFaceATLAS
from common.errors import UserError
from common.pictures import image_from_pixels, open_image, pixels_from_image
from config.configuration import Config
from embedded.sources import is_procedural, open_textures
from evaluation.procedural import SIZE, Judge, resized, view_of

PROCEDURAL, PROMPTS_ALONE = "procedural", "prompts without true textures"
LARGEST_SIDE = 8192


@dataclass(frozen=True)
class EvaluationSet:
    """Samples that textures are made from, and measured on.

    name: as reports call the set. body: the spec of the mesh whose UV layout the textures have. size: of the textures
    that are measured, in texels a side. names: of the samples, each once. The functions take a sample's number:
    truth → (3, size, size) in [0, 1], as stored; picture → a picture of the person; attributes, with a texture → a
    name → the share of right answers. None: the set has none. skipped: what could not be read, a sentence each.
    warnings: what a reader of its figures must know, a sentence each.
    """

    name: str
    body: str
    size: int
    names: list[str]
    prompts: list[str]
    truth: Callable[[int], Tensor] | None = None
    picture: Callable[[int], Image.Image] | None = None
    attributes: Callable[[int, Tensor], dict[str, float]] | None = None
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


def procedural_set(judge: Judge) -> EvaluationSet:
    """The held-out outfits that judge knows."""
    truths = judge.truths

    def picture(number: int) -> Image.Image:
        return view_of(truths[number][1], number)[0]

    return EvaluationSet(
        PROCEDURAL,
        "anny",
        SIZE,
        [f"{number:05d}" for number in range(len(truths))],
        [outfit.prompt for outfit in truths.outfits],
        lambda number: truths[number][1].texture[:3],
        picture,
        judge.shares,
        skipped=judge.lengths_that_do_not_count(),
    )


def stored_set(root: str, cfg: Config, size: int, with_pictures: bool, limit: int) -> EvaluationSet:
    """The first `limit` textures of a data set as `ATLASLarge` reads it, each with the first of its renders.

    What cannot be decoded is skipped. Raises UserError for what is no data set, says of no body, or leaves no sample.
    """
    dataset = ATLASLarge(root, with_pictures, size, cache_dir=str(Path(cfg.data.cache_dir) / "datasets"))
    body = cfg.data.body or dataset.body
    if body is None:
        raise UserError(f"data set {root} does not say which body it is for; set --data.body")
    has_pictures, first_render = dataset.renders is not None, {}
    if has_pictures:
        dataset.image_size = dataset.render_shape()
        for render, row in enumerate(dataset.texture_rows):
            first_render.setdefault(row, render)
    rows, skipped = [], []
    for row in range(min(limit, len(dataset.textures))):
        if has_pictures and row not in first_render:
            skipped.append(f"texture {row} of {root} has no render")
            continue
        try:
            dataset.texture(row)
            if has_pictures:
                dataset.image(first_render[row])
            rows.append(row)
        except UserError as error:
            skipped.append(str(error))
    if not rows:
        raise UserError(f"no texture of data set {root} can be read: {skipped[0]}")
    return EvaluationSet(
        str(root),
        body,
        size,
        [f"{row:05d}" for row in rows],
        [dataset.prompts[row] for row in rows],
        lambda number: (dataset.texture(rows[number]) + 1) / 2,
        (lambda number: image_from_pixels(dataset.image(first_render[rows[number]]))) if has_pictures else None,
        skipped=skipped,
    )


def training_warning(data: str, cfg: Config, native_resolution: int) -> str | None:
    """What to say of figures on `data` of a checkpoint that was trained on it; None where it was not, by all that its
    configuration tells: the data set's folder, or its name where the folder has been moved, or what was painted.

    native_resolution: of the checkpoint's base. Raises UserError for a procedural set that cannot be."""
    trained_on = cfg.data.dataset
    if is_procedural(trained_on):
        size = max(cfg.data.resolution or native_resolution, native_resolution)
        source = open_textures(trained_on, size=size, seed=cfg.training.seed).fingerprint()
        is_same = data_set_source(data) == source
    else:
        is_same = Path(data).resolve().name == Path(trained_on).resolve().name
    if not is_same:
        return None
    held_out = cfg.data.validation_textures
    seen = f"all but {held_out} of its textures, drawn at random," if held_out else "its textures"
    return f"this checkpoint was trained on {trained_on}: it has seen {seen}, and the figures tell what it remembers"


def read_texture(source: str | Path | bytes, size: int, name: str | None = None) -> Tensor:
    """A texture as it was written, whatever its alpha says → (3, size, size) in [0, 1]. Raises UserError for what
    cannot be read, or is no square."""
    image = open_image(source, name)
    if image.width != image.height or image.width > LARGEST_SIDE:
        sides = f"{image.width} x {image.height} texels"
        raise UserError(f"texture {name or source} has {sides}; give a square of at most {LARGEST_SIDE}")
    pixels = (pixels_from_image(image.convert("RGB")) + 1) / 2
    return pixels if image.width == size else resized(pixels[None], size)[0]


def foreign_textures(
    folder: str, prompts: str | None, body: str, size: int | None, truths: EvaluationSet | None, limit: int
) -> tuple[EvaluationSet, Callable[[int], Tensor]]:
    """The textures that another system made → their samples, and number → (3, size, size) in [0, 1].

    prompts: as of `read_prompts`; None: what the folder carries. size: at which they are measured; None: the first
    one's own. truths: a data set with the same prompts, whose
    samples they then are; the second texture of a prompt goes with its second sample. What cannot be read, or has no
    such sample, is skipped. Raises UserError when none is left.
    """
    source = HuggingFaceATLAS(folder, prompts, limit=limit)
    skipped, rows, samples, size = [], [], [], truths.size if truths else size
    waiting: dict[str, list[int]] = {}
    for sample, prompt in enumerate(truths.prompts if truths else ()):
        waiting.setdefault(prompt, []).append(sample)
    for row in range(len(source)):
        try:
            encoded, prompt = source[row]
            side = open_image(encoded, source.name(row)).width
            read_texture(encoded, side, source.name(row))
        except UserError as error:
            skipped.append(str(error))
            continue
        if truths and not waiting.get(prompt):
            skipped.append(f"{source.name(row)}: its prompt is none of {truths.name}'s samples, or once too often")
            continue
        size = size or side
        if side != size:
            print(f"{source.name(row)} has {side} texels a side and is measured at {size}", flush=True)
        samples.append(waiting[prompt].pop(0) if truths else row)
        rows.append(row)
    if not rows:
        raise UserError(f"no texture in {folder} can be measured: {skipped[0]}")

    def texture(number: int) -> Tensor:
        return read_texture(source[rows[number]][0], size, source.name(rows[number]))

    if truths:
        return _chosen(truths, samples, skipped), texture
    names = [source.names[row] if source.names else f"{row:05d}" for row in rows]
    return EvaluationSet(
        PROMPTS_ALONE, body, size, names, [source.prompts[row] for row in rows], skipped=skipped
    ), texture


def _chosen(samples: EvaluationSet, numbers: list[int], skipped: list[str]) -> EvaluationSet:
    """Some samples of a set, in the order of their numbers."""

    def renumbered(function: Callable | None) -> Callable | None:
        return function and (lambda number, *arguments: function(numbers[number], *arguments))

    return EvaluationSet(
        samples.name,
        samples.body,
        samples.size,
        [samples.names[number] for number in numbers],
        [samples.prompts[number] for number in numbers],
        renumbered(samples.truth),
        renumbered(samples.picture),
        renumbered(samples.attributes),
        samples.skipped + skipped,
        samples.warnings,
    )
