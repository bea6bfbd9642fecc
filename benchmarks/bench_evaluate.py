"""What the measures cost, besides generation: textures with four renders each, and their distance from references.

    python benchmarks/bench_evaluate.py              # 200 textures of 512 texels, on as many threads as torch takes

Measures textures of the procedural set against others of their kind, in texture space, on renders, and for UV
consistency, with the embedded encoders. Each size of set runs in a process of its own, whose peak memory is compared.
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
from evaluation.consistency import consistency
from evaluation.distances import frechet_distance, kernel_distance, set_distances
from evaluation.extractors import load_extractor, text_features_of
from evaluation.procedural import SEED
from evaluation.render_space import clip_score, compare_renders, image_similarity, retrieval, view_features
from evaluation.texture_space import compare_textures
from evaluation.uncertainty import mean_figure, share_figure
from render.bodies import load_anny_body
from render.uv_space import fill_outside, uv_mask


def painted(index: int, size: int):
    """A texture (3, size, size) on black, and its prompt; each painted when it is asked for, and then let go."""
    outfit = sample_outfit(np.random.default_rng([SEED, index]), held_out=True)
    return paint(outfit, SEED + index, size).texture[:3], outfit.prompt


def measure(count: int, size: int) -> dict[str, float]:
    """Seconds of each family of measures, without painting, and the peak memory of this process in MB."""
    body, extractor = load_anny_body(), load_extractor("embedded")
    mask, seconds, on_processor = uv_mask(body, size), {}, 0.0
    rows: dict[str, list] = {"textures": [], "renders": [], "consistency": [], "features": [], "references": []}

    def timed(name: str, function, *arguments):
        nonlocal on_processor
        began, began_on_processor = time.perf_counter(), time.process_time()
        result = function(*arguments)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        on_processor += time.process_time() - began_on_processor
        return result

    prompts = []
    for index in range(count):
        (texture, prompt), (reference, _) = painted(index, size), painted(index + count, size)
        prompts.append(prompt)
        filled, truth = (fill_outside(side, mask) for side in (texture, reference))
        rows["textures"].append(timed("texture space", compare_textures, texture[None], reference[None], mask))
        rows["renders"].append(timed("renders", compare_renders, body, [filled], [truth]))
        rows["consistency"].append(timed("consistency", consistency, body, [texture]))
        for name, side in (("features", filled), ("references", truth)):
            rows[name].append(timed("features", view_features, body, [side], [extractor])[extractor.name])

    features, references = (torch.cat(rows[name]) for name in ("features", "references"))
    keys = timed("similarities", text_features_of, extractor, prompts)
    values = {
        "clip_score": clip_score(features, keys), "retrieval": retrieval(features, keys, prompts),
        "image_similarity": image_similarity(features, references),
    }  # fmt: skip
    for family in ("textures", "renders", "consistency"):
        for name, first in rows[family][0].items():
            values[f"{family}.{name}"] = (
                first if isinstance(first, str) else torch.cat([row[name] for row in rows[family]])
            )
    figures = timed("set distances", set_distances, features, references)
    for name, value in values.items():
        figures[name] = timed("intervals", share_figure if name == "retrieval" else mean_figure, name, value)
    for name, figure in figures.items():
        told = figure if isinstance(figure, str) else f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]"
        print(f"{name:<34}{told}")
    seconds["all"] = sum(seconds.values())
    seconds["on the processor"] = on_processor  # more than all with several threads, less on a busy machine
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
