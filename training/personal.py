"""What the task "personal" has beside the others: a word and a LoRA of its own, a prior to keep, and its own end.

Two things are measured at fixed seeds every few steps: identity, how near textures of the word come to an example that
the last steps did not train on; and prior, how near textures of the class stay to the base's. Their product is the
score: the step with the highest is kept, and where it rises no more, training ends.
"""

import itertools
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import ATLASLarge
from atlas_dataset.examples import Examples
from common import processes
from common.errors import UserError
from common.files import write_whole
from common.pictures import encode_image
from config.configuration import Config, LoRA
from embedded.captions import with_article
from embedded.grammar import BOTTOMS, COLOURS, HAIR, TOPS, sample_outfit
from lora_utils import add_lora, bake_lora
from models.adapters import Adapter, add_word, noun_vector
from models.base import BaseModel
from models.checkpoints import RESUME_FILE, TrainedModel
from models.conditioning import encode_prompts, same_length
from models.diffusion import encode_posterior, sample_posterior
from models.generation import generate, prompt_condition, templated
from models.lora_files import load_lora
from render.bodies import Body
from render.cameras import orbit_cameras
from render.regions import region_mask
from render.shading import render_views

MEASURES_FILE = "measures.json"
PRIOR_PROMPTS, EDITS = 32, 36
# Regions that words may change: how such words begin, what is worn there, in which colours.
EDITED = {"top": ("in", TOPS, COLOURS), "bottom": ("in", BOTTOMS, COLOURS), "hair": ("with", ("hair",), HAIR)}
VIEWS, VIEW_SIZE = (0.0, 90.0, 180.0, 270.0), 64  # azimuths, pixels: what the measures look at
FIRST_SEED = 1_000  # of the measures
CURVE_SIZE, MARGIN = (640, 400), 40  # of the picture of the curve, in pixels


def adapter_of(cfg: Config) -> Adapter:
    personal = cfg.personal
    return Adapter(personal.word, personal.class_prompt, personal.checkpoint, personal.weights)


def add_personal(cfg: Config, base: BaseModel) -> list[dict]:
    """Makes the checkpoint's LoRA one with the base and adds the personal one and its word → the optimiser's groups."""
    personal = cfg.personal
    load_lora(base, Path(personal.checkpoint))
    bake_lora(base)
    settings = LoRA(r=personal.r, alpha=personal.alpha, target_modules=personal.target_modules)
    lora = add_lora(base.unet, settings)
    vector = add_word(base, personal.word, noun_vector(base, personal.class_prompt)).requires_grad_(True)
    rate = cfg.training.personal.word_learning_rate
    return [{"params": lora}, {"params": [vector], "lr": rate, "weight_decay": 0.0}]


def build_examples(cfg: Config, folder: str, size: int) -> Path:
    """A data set of textures in a folder, of the examples or of the class, in data.cache_dir → its folder."""
    is_class = folder == cfg.personal.class_images
    word = cfg.personal.class_prompt if is_class else cfg.personal.word
    source = Examples(folder, cfg.data.body or "anny", word, cfg.personal.class_prompt, *[None] * is_class)
    root = Path(cfg.data.cache_dir) / f"examples-{source.fingerprint()}"
    build_dataset(source, source.body, 0, root, size, size)
    processes.wait()
    return root


@dataclass
class Edit:
    """One thing that is told of the word besides: the prompt with the word; states (L, D) of the same with the class,
    of which the base says what it looks like; and share (h, w), 1 where that is to be seen."""

    prompt: str
    class_states: Tensor
    share: Tensor


@dataclass
class KindRows:
    """What rows of one kind are trained on: states (B, L, D), and latents (B, 4, h, w) whose noise is the target, but
    for a share (B, 1, h, w) of it where the base's own prediction for teacher_states (B, L, D) is."""

    states: Tensor
    latents: Tensor
    teacher_states: Tensor
    share: Tensor


@dataclass
class Lessons:
    """What a personal run learns besides its examples.

    prior_states: (K, L, D) of prompts that are to stay what they are; prior_latents: (K, 4, h, w) of textures that show
    them, or None where the base itself says so, on the noisy examples. edits: parts of the word that other words may
    change. class_states: (1, L, D). outside: (h, w), 1 where the examples do not count, or None.
    """

    base: BaseModel
    prior_states: Tensor
    prior_latents: Tensor | None
    edits: list[Edit]
    class_states: Tensor
    outside: Tensor | None

    def kinds(self, conditions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(kind for kind in conditions if kind != "edit" or self.edits)

    def rows(self, kind: str, text_states: Tensor, latents: Tensor, draws) -> KindRows:
        """text_states (B, L, D), latents (B, 4, h, w): of the examples' rows. draws: `objective.RowDraws`."""
        share = latents.new_zeros(len(latents), 1, *latents.shape[2:])
        if kind == "text":
            outside = share if self.outside is None else share + self.outside
            return KindRows(text_states, latents, self.class_states.expand_as(text_states), outside)
        if kind == "edit":
            edits = [self.edits[number] for number in draws.integers(len(self.edits))]
            states = encode_prompts(self.base, [edit.prompt for edit in edits])
            teacher_states = torch.stack([edit.class_states for edit in edits])
            return KindRows(states, latents, teacher_states, torch.stack([edit.share for edit in edits])[:, None])
        numbers = draws.integers(len(self.prior_states))
        states = self.prior_states[numbers]
        if self.prior_latents is None:
            return KindRows(states, latents, states, share + 1)
        return KindRows(states, self.prior_latents[numbers], states, share)


def prior_prompts(class_prompt: str) -> list[str]:
    """The class by itself, dressed in words, everyone else, and nothing (which guidance takes for its other end)."""
    rng = np.random.default_rng(0)
    dressed = [f"{class_prompt}{words}" for _, words in edit_words(rng, PRIOR_PROMPTS // 4)]
    others = [sample_outfit(rng).prompt for _ in range(PRIOR_PROMPTS // 4)]
    alone = [class_prompt] * (PRIOR_PROMPTS - len(dressed) - len(others) - 2)
    return [*alone, *dressed, *others, "", ""]


def edit_words(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Regions of the body, each with words for another look of it that follow a name, as a sentence or as a list."""
    words = []
    for number, region in zip(range(count), itertools.cycle(EDITED)):
        preposition, nouns, colours = EDITED[region]
        look = f"{rng.choice(list(colours))} {rng.choice(nouns)}"
        worn = with_article(look) if region == "top" else look
        words.append((region, f" {preposition} {worn}" if number % 2 else f", {look}"))
    return words


@torch.no_grad()
def make_lessons(cfg: Config, base: BaseModel, body: Body, resolution: int) -> Lessons:
    """What a run learns besides: of class images where they are given, or else of the base."""
    trained, personal = TrainedModel(base, None, cfg), cfg.personal

    def states_of(prompts: list[str]) -> Tensor:  # the empty prompt stands for no prompt, and has no template
        return encode_prompts(base, [prompt and templated(trained, prompt) for prompt in prompts])

    def in_latents(region: str) -> Tensor:
        share = region_mask(body, region, resolution)[None, None]
        return F.avg_pool2d(share, base.vae_scale)[0, 0].to(base.device)

    prompts, latents = prior_prompts(personal.class_prompt), None
    if personal.class_images is not None:
        rows = ATLASLarge(build_examples(cfg, personal.class_images, resolution), False, resolution)
        posteriors = [encode_posterior(base.vae, rows.texture(row)[None].to(base.device)) for row in range(len(rows))]
        means = [sample_posterior(base.vae, mean, std, torch.zeros_like(mean)) for mean, std in posteriors]
        prompts, latents = rows.prompts, torch.cat(means)
    outside, edits = None if personal.region is None else 1 - in_latents(personal.region), []
    if personal.region is None:
        for region, words in edit_words(np.random.default_rng(1), EDITS):
            with suppress(UserError):  # a body without that region, or on which none are known
                class_states = states_of([personal.class_prompt + words])[0]
                edits.append(Edit(templated(trained, personal.word + words), class_states, in_latents(region)))
    class_states = states_of([personal.class_prompt])
    return Lessons(base, states_of(prompts), latents, edits, class_states, outside)


@dataclass
class Measure:
    """identity, prior: exp(-distance), 1 is none; so the highest score is where the sum of both distances is least."""

    step: int
    identity: float
    prior: float

    @property
    def score(self) -> float:
        return self.identity * self.prior


@dataclass
class Watch:
    """Measures a run every few steps, and says which step is the best and when it has been long enough ago."""

    trained: TrainedModel
    body: Body
    examples: Tensor  # (N, 3, R, R) in [0, 1]
    prompts: list[str]  # of each
    region: Tensor | None = None  # (R, R), 1 where the examples count; None: everywhere
    measures: list[Measure] = field(default_factory=list)

    @torch.no_grad()
    def __post_init__(self):
        """The base must be as it is without the adapter, which a new one is."""
        personal = self.trained.cfg.personal
        self.example_looks = self.looks(self.examples)  # (N, V, 3, S, S)
        self.base_looks = self.looks(self.textures([personal.class_prompt]))  # (seeds, V, 3, S, S)
        pairs = [(a, b) for a in range(len(self.base_looks)) for b in range(a)]
        spread = [distance(self.base_looks[a], self.base_looks[b]) for a, b in pairs]
        self.spread = sum(spread) / len(spread) if spread else 1.0
        self.base_distance = []  # of each example to what the base makes of its prompt with the class for the word
        textures_of_prompts = {}
        for number, prompt in enumerate(self.prompts):
            prompt = re.sub(rf"\b{personal.word}\b", lambda _: personal.class_prompt, prompt, flags=re.IGNORECASE)
            if prompt not in textures_of_prompts:
                textures_of_prompts[prompt] = self.textures([prompt])
            self.base_distance.append(self.distance_to(number, textures_of_prompts[prompt]))

    def distance_to(self, number: int, textures: Tensor) -> float:
        """Mean distance of textures (B, 3, R, R) to an example, where the examples count."""
        if self.region is not None:
            textures = torch.lerp(self.examples[number].expand_as(textures), textures, self.region)
        looks = self.looks(textures)
        return sum(distance(views, self.example_looks[number]) for views in looks) / len(looks)

    def textures(self, prompts: list[str]) -> Tensor:
        """Textures (prompts x seeds, 3, R, R) in [0, 1], from seeds that are the same at every measure."""
        trained, settings = self.trained, self.trained.cfg.inference
        seeds = [FIRST_SEED + number for number in range(trained.cfg.personal.seeds)]
        states = same_length(*(prompt_condition(trained, prompt) for prompt in prompts))
        states = torch.cat([row.expand(len(seeds), -1, -1) for row in states])
        steps = trained.cfg.personal.num_inference_steps
        negative, scale = settings.negative_prompt, settings.guidance_scale
        return (generate(trained, states, negative, seeds * len(prompts), steps, scale).cpu() + 1) / 2

    def looks(self, textures: Tensor) -> Tensor:
        """The body in textures (B, 3, R, R), seen from VIEWS: (B, V, 3, S, S) in [0, 1]."""
        azimuth = torch.tensor(VIEWS)
        cameras = orbit_cameras(self.body, azimuth, torch.zeros_like(azimuth), torch.full_like(azimuth, 30.0))
        views = [render_views(self.body, texture[None], cameras, VIEW_SIZE, VIEW_SIZE) for texture in textures.float()]
        return torch.stack(views)

    @torch.no_grad()
    def measure(self, step: int) -> Measure:
        """The model as it stands: how far the word is from an example, in units of the class's own distance to it, and
        how far the class has moved, in units of the distance between two of its textures. With three or more examples
        the measured one is that which the turn before the step held out (`ATLASLarge.hold_out_in_turn`)."""
        personal = self.trained.cfg.personal
        example = ((step - 1) // personal.measure_every) % len(self.examples)
        named, of_class = self.textures([self.prompts[example], personal.class_prompt]).chunk(2)
        near = self.distance_to(example, named) / self.base_distance[example]
        moved = sum(map(distance, self.looks(of_class), self.base_looks)) / len(of_class) / self.spread
        measure = Measure(step, math.exp(-near), math.exp(-moved))
        self.measures.append(measure)
        return measure

    @property
    def best(self) -> Measure:
        """What is kept: the highest score, the first of equal ones; or the last."""
        if not self.trained.cfg.personal.keep_best:
            return self.measures[-1]
        return max(self.measures, key=lambda measure: measure.score)

    @property
    def is_over(self) -> bool:
        """Whether the best is `patience` measures ago."""
        patience = self.trained.cfg.personal.patience
        since = [measure.step for measure in self.measures].index(self.best.step) if self.measures else 0
        return patience is not None and len(self.measures) - since > patience

    def finish(self, run_folder: Path) -> Path:
        """Writes the curve and its numbers into the best step's checkpoint, which needs no resuming → its folder."""
        folder = run_folder / f"step-{self.best.step:06d}"
        if processes.is_main():
            curve = draw_curve(self.measures, self.best.step)
            write_whole(folder / "curve.png", encode_image(curve, format="PNG"))
            measures = [asdict(measure) for measure in self.measures]
            write_whole(folder / MEASURES_FILE, json.dumps(measures, indent=1).encode())
            (folder / RESUME_FILE).unlink(missing_ok=True)
        processes.wait()
        return folder

    def state(self) -> list[list[float]]:
        return [[measure.step, measure.identity, measure.prior] for measure in self.measures]

    def restore(self, state: list[list[float]]) -> None:
        self.measures = [Measure(int(step), *values) for step, *values in state]


def make_watch(cfg: Config, base: BaseModel, body: Body, dataset: ATLASLarge) -> Watch:
    """The watch of a run whose data set are the examples."""
    examples = torch.stack([(dataset.texture(row) + 1) / 2 for row in range(len(dataset.prompts))])
    region = cfg.personal.region and region_mask(body, cfg.personal.region, dataset.resolution)
    return Watch(TrainedModel(base, None, cfg), body, examples, dataset.prompts, region)


def distance(a: Tensor, b: Tensor) -> float:
    """Root of the mean square of what two sets of views (V, 3, S, S) differ by, where either shows more than white."""
    shown = (torch.minimum(a, b) < 1).any(1, keepdim=True).expand_as(a)
    return float((a - b)[shown].square().mean().sqrt())


def draw_curve(measures: list[Measure], best_step: int) -> Image.Image:
    """Identity, prior and score over the steps, the kept step marked."""
    (width, height), left, low = CURVE_SIZE, MARGIN, CURVE_SIZE[1] - MARGIN
    picture = Image.new("RGB", CURVE_SIZE, "white")
    draw = ImageDraw.Draw(picture)
    last = max(measure.step for measure in measures)

    def point(step: float, value: float) -> tuple[float, float]:
        return left + (width - 2 * MARGIN) * step / last, low - (height - 2 * MARGIN) * min(max(value, 0), 1)

    for value in (0, 0.25, 0.5, 0.75, 1):
        draw.line([point(0, value), point(last, value)], fill="#dddddd")
        draw.text((6, point(0, value)[1] - 6), f"{value:g}", fill="#555555")
    for step in {0, best_step, last}:
        draw.text((point(step, 0)[0] - 8, low + 8), f"{step}", fill="#555555")
    draw.line([point(best_step, 0), point(best_step, 1)], fill="#888888", width=2)
    curves = {"identity": "#1f6fb4", "prior": "#d2691e", "score": "#2e8b3d"}
    for place, (name, colour) in enumerate(curves.items()):
        points = [point(measure.step, getattr(measure, name)) for measure in measures]
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((left + 90 * place, 12), name, fill=colour)
    draw.text((left + 90 * len(curves), 12), f"kept: step {best_step}", fill="#555555")
    return picture
