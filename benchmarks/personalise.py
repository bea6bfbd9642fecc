"""Personal adapters on people whose truth is painted: are they found again, do they follow edits, what do they cost?

    python benchmarks/personalise.py --people 5 --examples 1,3,5

Each person is an outfit that training never saw, painted N times. Trains an adapter as personalise.py does, but to the
last step: the measures tell where it would have stopped and which step it would have kept; where that is not the best
of all, the adapter is trained once more, with the stop. The same without preservation, for as many steps, to compare
what bleeds into the class. The last line is JSON, means over people, of the first number of examples; the table has
all.

identity_map: mean average precision of textures of the word among three more paintings of the person and 50 of others.
edit_follows, edit_keeps: share of named colours, and of the other regions' own ones, right in textures of "WORD in a
COLOUR TOP" and the like. bleed_ratio: mean change of the class's textures over that without preservation. stop_within:
share of the sweep's best score that the kept step lacks. copy_paste: how far an edited region stays the example's, 0 to
1. both_found: two people's words with both adapters, each nearest to its own person. seconds: of one training, to its
stop.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import exit_on_user_error
from common.files import write_whole
from common.pictures import encode_image, image_from_pixels
from config.configuration import Config, dotted_overrides
from embedded.captions import with_article
from embedded.grammar import COLOURS, Outfit, sample_outfit
from embedded.painter import BOTTOM, TOP, Painting, paint
from evaluation.procedural import (
    REGIONS,
    SIZE,
    colours_named,
    lab,
    nearest_word,
    pattern_features,
    region_colour,
    words_for,
)
from models.checkpoints import EMBEDDED_CHECKPOINT
from models.pipeline import TexturePipeline
from render.uv_space import texture_pixels
from training.personal import Watch
from training.personalising import personal_config, personalise

WORDS = ("sks", "ohwx", "zwx", "qxv", "wrtq")
SEED, DISTRACTORS, TRUTHS, SEEDS = 7_001, 50, 3, (11, 12, 13, 14)
EDITED_COLOURS = ("red", "green", "yellow", "purple", "white")
MEASURES = ("identity_map", "edit_follows", "edit_keeps", "bleed_ratio", "stop_within", "copy_paste", "seconds",
            "megabytes", "step")  # fmt: skip


@dataclass(frozen=True)
class Person:
    """An outfit in plain colours and the word for it; `painting(n)` is the person painted with another hand."""

    word: str
    outfit: Outfit

    def painting(self, number: int) -> Painting:
        return paint(self.outfit, SEED + number, SIZE)


def people(count: int) -> list[Person]:
    rng, outfits = np.random.default_rng(SEED), []
    while len(outfits) < count:
        outfit = sample_outfit(rng, held_out=True)
        if outfit.bottom and {outfit.top_style, outfit.bottom_style} <= COLOURS.keys():
            outfits.append(outfit)
    return [Person(word, outfit) for word, outfit in zip(WORDS, outfits)]


def embedding(texture: Tensor) -> Tensor:
    """texture (3, SIZE, SIZE) in [0, 1] → low-resolution colours inside the islands, and patterns of top and bottom."""
    neutral = paint(Outfit("white", "man", "white", "t-shirt", "black", "shorts", "black"), SEED, SIZE)
    mask = neutral.texture[3:]
    colours = F.avg_pool2d((texture * mask)[None], 16)[0] / F.avg_pool2d(mask[None], 16)[0].clamp(min=0.05)
    patterns = [pattern_features(texture, neutral.regions == region) for region in (TOP, BOTTOM)]
    return torch.cat([lab(colours.permute(1, 2, 0)).flatten() / 100 / 16, *(features / 4 for features in patterns)])


def average_precision(query: Tensor, relevant: list[Tensor], others: list[Tensor]) -> float:
    """Mean of the precision at each relevant one, all sorted by their distance to the query."""
    distances = torch.stack([(query - each).norm() for each in [*relevant, *others]])
    places = (distances.argsort() < len(relevant)).nonzero()[:, 0]
    return float(((torch.arange(len(relevant)) + 1) / (places + 1)).mean())


def generate(pipeline: TexturePipeline, prompts: list[str], seeds: tuple[int, ...]) -> list[Tensor]:
    """(3, SIZE, SIZE) in [0, 1] of each prompt with each seed."""
    every = [(prompt, seed) for prompt in prompts for seed in seeds]
    textures = []
    for start in range(0, len(every), 8):
        given_prompts, given_seeds = zip(*every[start : start + 8])
        textures += pipeline(list(given_prompts), seeds=given_seeds, size=SIZE, seam_fix=False)
    return [(texture_pixels(texture, SIZE) + 1) / 2 for texture in textures]


def edits(person: Person) -> list[tuple[str, str, Outfit]]:
    """Region, prompt and the outfit that it tells of."""
    outfit, told = person.outfit, []
    for colour in EDITED_COLOURS:
        if colour != outfit.top_style:
            top = replace(outfit, top_style=colour)
            told.append(("top", f"{person.word} in a {colour} {outfit.top}", top))
        if colour != outfit.bottom_style:
            bottom = replace(outfit, bottom_style=colour)
            told.append(("bottom", f"{person.word} in {colour} {outfit.bottom}", bottom))
    return told


def score_edits(person: Person, pipeline: TexturePipeline) -> dict[str, float]:
    told, painting = edits(person), person.painting(0)
    follows, keeps, pasted = [], [], []
    for (region, _, outfit), texture in zip(told, generate(pipeline, [prompt for _, prompt, _ in told], SEEDS[:1])):
        for name, word in colours_named(outfit).items():
            colour = region_colour(texture, painting, REGIONS[name])
            if colour is not None:
                is_right = nearest_word(colour, words_for(name)) == word
                (follows if name == region else keeps).append(is_right)
        edited, example, target = (
            lab(region_colour(pixels, painting, REGIONS[region]))
            for pixels in (texture, painting.texture[:3], paint(outfit, SEED, SIZE).texture[:3])
        )
        pasted.append(float((1 - (edited - example).norm() / (target - example).norm()).clamp(0, 1)))
    return {name: float(np.mean(values)) for name, values in
            {"edit_follows": follows, "edit_keeps": keeps, "copy_paste": pasted}.items()}  # fmt: skip


def bleed(base: list[Tensor], pipeline: TexturePipeline, class_prompt: str, mask: Tensor) -> float:
    adapted = generate(pipeline, [class_prompt], SEEDS)
    return float(torch.stack([(a - b).abs()[:, mask].mean() for a, b in zip(adapted, base)]).mean())


def score(entry: dict) -> float:
    return entry["identity"] * entry["prior"]


def stop_of(measures: list[dict], patience: int | None) -> int:
    """How many of the measures are taken before training would stop by itself; with None it does not."""
    for count in range(1, len(measures) + 1):
        best = max(range(count), key=lambda number: score(measures[number]))
        if patience is not None and count - best > patience:
            return count
    return len(measures)


@contextmanager
def clock_of_measures() -> Iterator[dict[int, float]]:
    """Inside, when each step had been measured."""
    measured_at, original = {}, Watch.measure

    def measure(watch: Watch, step: int):
        taken = original(watch, step)
        measured_at[step] = time.perf_counter()
        return taken

    Watch.measure = measure
    try:
        yield measured_at
    finally:
        Watch.measure = original


def measure(person: Person, count: int, distractors: list[Tensor], work: Path, args, overrides: list[str]) -> dict:
    """Trains on `count` examples of a person → MEASURES, those left out None."""
    class_prompt, folder = with_article(person.outfit.person), work / f"{person.word}-{count}"
    for number in range(count):
        picture = image_from_pixels(person.painting(number).texture * 2 - 1)
        write_whole(folder / f"{number}.png", encode_image(picture, format="PNG"))

    def config(*changes: str, **options) -> Config:
        given = [f"output.log_dir={work / 'logs'}", *overrides, *changes]
        return personal_config(args.base_checkpoint, folder, person.word, class_prompt, overrides=given, **options)

    def train(name: str, *changes: str, **options) -> tuple[Path, list[dict]]:
        out = personalise(config(*changes, **options), work / f"{person.word}-{count}-{name}")
        return out, json.loads((out / "measures.json").read_text())

    def pipeline(*adapters: Path) -> TexturePipeline:
        return TexturePipeline.from_pretrained(args.base_checkpoint, adapters=[str(adapter) for adapter in adapters])

    began = time.perf_counter()
    with clock_of_measures() as measured_at:
        adapter, measures = train("sweep", "personal.patience=null") if args.sweep else train("kept")
    ended, results = time.perf_counter(), dict.fromkeys(MEASURES)
    until_stop = measures[: stop_of(measures, config().personal.patience)]
    best = max(until_stop, key=score)
    seconds_after_stop = measured_at[measures[-1]["step"]] - measured_at[until_stop[-1]["step"]]
    results["seconds"] = ended - began - seconds_after_stop
    if args.sweep:
        results["stop_within"] = 1 - score(best) / max(map(score, measures))
    if score(best) < max(map(score, measures)):
        adapter, _ = train("kept")
    files = [adapter / name for name in ("pytorch_lora_weights.safetensors", f"{person.word}.safetensors")]
    results["megabytes"] = sum(file.stat().st_size for file in files) / 1e6
    results["step"] = best["step"]
    adapted = pipeline(adapter)
    truths = [embedding(person.painting(count + number).texture[:3]) for number in range(TRUTHS)]
    queries = [embedding(texture) for texture in generate(adapted, [person.word], SEEDS)]
    results["identity_map"] = float(np.mean([average_precision(query, truths, distractors) for query in queries]))
    results |= score_edits(person, adapted)
    if not args.no_bleed:
        mask, base = person.painting(0).texture[3] > 0, generate(pipeline(), [class_prompt], SEEDS)
        without, _ = train("without", "training.personal.beta=0", steps=best["step"])
        with_prior, alone = (bleed(base, each, class_prompt, mask) for each in (adapted, pipeline(without)))
        results["bleed_ratio"] = with_prior / alone
    return results


def kept_adapter(work: Path, person: Person, count: int) -> Path:
    kept, sweep = (work / f"{person.word}-{count}-{name}" for name in ("kept", "sweep"))
    return kept if kept.exists() else sweep


def both_found(pair: list[Person], distractors: list[Tensor], work: Path, args) -> float:
    """Share of textures of two words, both adapters put together, that are nearest to their own person's paintings."""
    count = args.examples[0]
    adapters = [str(kept_adapter(work, person, count)) for person in pair]
    pipeline = TexturePipeline.from_pretrained(args.base_checkpoint, adapters=adapters)
    gallery = [embedding(person.painting(count).texture[:3]) for person in pair] + distractors
    hits = []
    for number, person in enumerate(pair):
        for texture in generate(pipeline, [person.word], SEEDS):
            distances = torch.stack([(embedding(texture) - each).norm() for each in gallery])
            hits.append(int(distances.argmin()) == number)
    return float(np.mean(hits))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=1, choices=range(1, len(WORDS) + 1))
    parser.add_argument("--examples", type=lambda text: [int(each) for each in text.split(",")], default=[1, 3])
    parser.add_argument("--base-checkpoint", default=EMBEDDED_CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--no-bleed", action="store_true", help="leave out the run without preservation")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="stop by itself, and measure no stop")
    parser.add_argument("--keep", type=Path, help="folder for examples and adapters (default: thrown away)")
    args, unknown = parser.parse_known_args()
    datasets.disable_progress_bars()
    work, subjects = args.keep or Path(tempfile.mkdtemp()), people(args.people)
    rng, others = np.random.default_rng(SEED + 1), []
    while len(others) < DISTRACTORS:
        outfit = sample_outfit(rng)
        if outfit not in [person.outfit for person in subjects]:
            others.append(embedding(paint(outfit, SEED, SIZE).texture[:3]))
    with exit_on_user_error():
        rows = {}
        for count in args.examples:
            results = [measure(person, count, others, work, args, dotted_overrides(unknown)) for person in subjects]
            given = {name: [row[name] for row in results if row[name] is not None] for name in MEASURES}
            rows[count] = {name: round(float(np.mean(values)), 3) if values else None for name, values in given.items()}
        together = both_found(subjects[:2], others, work, args) if len(subjects) > 1 else None
    print("| examples | " + " | ".join(MEASURES) + " |")
    for count, row in rows.items():
        print(f"| {count} | " + " | ".join("" if value is None else f"{value:g}" for value in row.values()) + " |")
    if not args.keep:
        shutil.rmtree(work)
    print(json.dumps({**rows[args.examples[0]], "both_found": together, "people": len(subjects)}))


if __name__ == "__main__":
    main()
