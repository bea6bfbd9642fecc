"""What the measures cost, besides generation: textures with four renders each, and their distance from references.

    python benchmarks/bench_evaluate.py              # 200 textures of 512 texels, on as many threads as torch takes

Measures painted textures against others of their kind as evaluate.py does: in texture space, on renders, and for UV
consistency, both sides, with the embedded encoders. Each size of set runs in a process of its own, whose peak memory is
compared.
The last line is JSON: `seconds_200`, scaled from --count; `memory_growth`, the peak memory of --count textures over
that of a quarter of them; `max_reference_difference`, the largest difference of a measure from torchmetrics' on the
same pictures and features.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn import functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from common.processes import keep_freed_memory
from embedded.grammar import sample_outfit
from embedded.painter import paint
from evaluation import measuring
from evaluation.data import EvaluationSet
from evaluation.distances import frechet_distance, kernel_distance
from evaluation.extractors import load_extractor
from evaluation.procedural import SEED
from evaluation.texture_space import compare_textures


def painted(count: int, size: int, seed: int) -> tuple[list[str], Callable[[int], torch.Tensor]]:
    """Prompts, and number → a texture (3, size, size) on black, painted when it is asked for and then let go."""
    outfits = [sample_outfit(np.random.default_rng([seed, index]), held_out=True) for index in range(count)]
    return [outfit.prompt for outfit in outfits], lambda number: paint(outfits[number], seed + number, size).texture[:3]


class Stopwatch:
    """Seconds of each family of measures, wherever in evaluation/measuring.py it is called."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.inside = False  # of a family: what it calls counts as its own

    def watch(self, family: str, function: Callable) -> Callable:
        def timed(*arguments, **options):
            if self.inside:
                return function(*arguments, **options)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside = False
                self.seconds[family] = self.seconds.get(family, 0.0) + time.perf_counter() - began

        return timed


FAMILIES = {
    "compare_textures": "texture space", "compare_renders": "renders", "consistency": "consistency",
    "view_features": "features", "text_features_of": "similarities", "retrieval": "similarities",
    "clip_score": "similarities", "image_similarity": "similarities", "filled": "filling",
    "set_distances": "set distances", "mean_figure": "intervals", "share_figure": "intervals",
}  # fmt: skip


def measure(count: int, size: int) -> dict[str, float]:
    """Seconds of the measures, by family and in all but painting, and this process's peak memory in MB."""
    extractors, watch = {"embedded": load_extractor("embedded")}, Stopwatch()
    for name, family in FAMILIES.items():
        setattr(measuring, name, watch.watch(family, getattr(measuring, name)))
    prompts, textures = painted(count, size, SEED)
    _, references = painted(count, size, SEED + count)
    textures, references = (watch.watch("painting", side) for side in (textures, references))
    names = [f"{number:05d}" for number in range(count)]
    samples = EvaluationSet("painted", "anny", size, names, prompts, references)
    began, began_on_processor = time.perf_counter(), time.process_time()
    truth = measuring.observe(samples, references, extractors, "truth")
    observed = measuring.observe(samples, textures, extractors, "made")
    measures = measuring.measure(samples, textures, extractors, observed, truth)
    elapsed, seconds = time.perf_counter() - began, watch.seconds
    seconds["on the processor"] = time.process_time() - began_on_processor  # more than all with several threads
    seconds["all"] = elapsed - seconds.pop("painting")
    for name, figure in measures.figures.items():
        told = figure if isinstance(figure, str) else f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]"
        print(f"{name:<48}{told}")
    return {**seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


class Unchanged(torch.nn.Module):
    """An extractor for torchmetrics whose pictures are features."""

    num_features = 32

    def forward(self, features):
        return features


def reference_difference() -> float:
    """The largest difference of our measures from torchmetrics' on the same pictures and features."""
    generator = torch.Generator().manual_seed(0)
    truths = F.interpolate(torch.rand(4, 3, 16, 16, generator=generator), size=(256, 256), mode="bicubic").clamp(0, 1)
    pictures = (truths + 0.1 * torch.randn(truths.shape, generator=generator)).clamp(0, 1)
    everywhere, differences = torch.ones(256, 256, dtype=torch.bool), []
    values = compare_textures(pictures, truths, everywhere)
    for name, reference in (
        ("psnr", peak_signal_noise_ratio),
        ("ssim", structural_similarity_index_measure),
        ("ms_ssim", multiscale_structural_similarity_index_measure),
    ):
        theirs = [reference(picture[None], truth[None], data_range=1.0) for picture, truth in zip(pictures, truths)]
        differences.append((values[name] - torch.stack(theirs)).abs().max().item())
    sets = [torch.randn(200, 1, 32, generator=generator) * scale for scale in (1.0, 1.3)]
    for ours, metric in (
        (frechet_distance, FrechetInceptionDistance(feature=Unchanged())),
        (kernel_distance, KernelInceptionDistance(feature=Unchanged(), subsets=1, subset_size=200)),
    ):
        for side, real in zip(sets, (False, True)):
            metric.update(side[:, 0], real=real)
        computed = metric.compute()
        theirs = computed[0] if isinstance(computed, tuple) else computed
        differences.append(abs(ours(*sets) - theirs.item()))
    return max(differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--size", type=int, default=512, help="texels a side")
    parser.add_argument("--alone", action="store_true", help="measure --count textures in this process, as it does")
    args = parser.parse_args()
    keep_freed_memory()
    if args.alone:
        print(json.dumps(measure(args.count, args.size)))
        return
    runs = []
    for count in (max(2, args.count // 4), args.count):
        command = [sys.executable, __file__, "--alone", "--count", str(count), "--size", str(args.size)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
        if count == args.count:
            print(*output.splitlines()[:-1], sep="\n")
        print(f"{count} textures of {args.size}, {torch.get_num_threads()} threads: {runs[-1]['megabytes']:.0f} MB")
    for name, seconds in runs[-1].items():
        if name != "megabytes":
            print(f"{name:<16}{seconds:8.1f} s {1000 * seconds / args.count:8.1f} ms a texture")
    print(json.dumps({
        "seconds_200": round(runs[1]["all"] * 200 / args.count, 1),
        "memory_growth": round(runs[1]["megabytes"] / runs[0]["megabytes"], 3),
        "max_reference_difference": float(f"{reference_difference():.2g}"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
