"""Remakes the tables of docs/results.md: this project's figures, with their ceiling and floor.

    python benchmarks/results_table.py --limit 200      # the embedded checkpoint and its base

Runs evaluate.py for both, which goes on where it was stopped, and measures true textures under shuffled prompts, the
floor. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import PROJECT_ROOT, write_whole
from evaluation.data import procedural_set
from evaluation.extractors import load_extractor
from evaluation.measuring import measure, observe, rolled
from evaluation.procedural import Judge, held_out_paintings
from evaluation.report import RESULTS, results_of, shown

CHECKPOINT = "embedded/checkpoint"
OUT = Path("outputs/results")
NETWORK = "embedded image encoder"
SYSTEMS = (
    ("true textures (ceiling)", "checkpoint", "truth"),
    ("true textures, prompts shuffled (floor)", "shuffled", "shuffled"),
    ("base before joint training, from prompts", "base", "t2uv"),
    ("joint checkpoint, from prompts", "checkpoint", "t2uv"),
    ("joint checkpoint, from pictures", "checkpoint", "i2uv"),
)
NOT_MEASURED = (
    ("trained on prompts alone", "needs a training run of its own: `python t2uv.py`, then `evaluate.py --task t2uv`"),
    ("trained on pictures alone", "needs a training run of its own: `python i2uv.py`, then `evaluate.py --task i2uv`"),
    ("trained on the seven real textures", "needs a training run of its own, and the textures, which are not included"),
)
TABLES = (
    ("Against the true textures", (
        ("PSNR ↑", "texture.psnr"), ("SSIM ↑", "texture.ssim"), ("MS-SSIM ↑", "texture.ms_ssim"),
        ("MSE ↓", "texture.mse"), ("renders: PSNR ↑", "render.psnr"), ("MS-SSIM ↑", "render.ms_ssim"),
    )),
    ("By the embedded encoders", (
        ("score with the prompt ↑", f"render.{NETWORK}.clip_score"),
        ("similarity to the true renders ↑", f"render.{NETWORK}.image_similarity"),
        ("KID ↓", f"render.{NETWORK}.kid"), ("CMMD ↓", f"render.{NETWORK}.cmmd"),
        ("finds its prompt ↑", f"follows.retrieval.{NETWORK}"),
        ("finds its picture ↑", f"follows.picture_retrieval.{NETWORK}"),
    )),
    ("What was asked for, share right", (
        ("top's colour", "follows.color.top"), ("bottom's", "follows.color.bottom"), ("hair's", "follows.color.hair"),
        ("skin's", "follows.color.skin"), ("pattern", "follows.pattern"), ("lengths", "follows.length"),
    )),
    ("UV consistency (read against the true textures)", (
        ("seam error ↓", "uv.seam_error"), ("bleeding of islands", "uv.bleeding_islands"),
        ("mirror difference", "uv.mirror_difference"), ("sharpness", "uv.sharpness"), ("noise", "uv.noise"),
        ("baked light", "uv.baked_light"),
    )),
)  # fmt: skip
START, END = "<!-- measured: -->\n", "<!-- :measured -->\n"  # what lies between is remade


def run_evaluation(name: str, limit: int, *arguments: str) -> dict:
    command = [sys.executable, str(PROJECT_ROOT / "evaluate.py"), f"--limit={limit}", f"--out={OUT / name}", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((OUT / name / RESULTS).read_text())


def measure_floor(limit: int) -> dict:
    """True textures, each under the prompt, the picture and the truth of the sample before it."""
    judge, extractors = Judge(held_out_paintings(limit)), {"embedded": load_extractor("embedded")}
    samples = procedural_set(judge)
    truth, textures = observe(samples, samples.truth, extractors, "truth"), rolled(samples.truth, limit)
    observed = observe(samples, textures, extractors, "shuffled")
    measured = {"shuffled": measure(samples, textures, extractors, observed, truth)}
    return results_of(samples, measured, {"textures": "shuffled"}, {})


def cell(figure: dict | str | None) -> str:
    if not isinstance(figure, dict):
        return "–"
    return f"{shown(figure['value'])} [{shown(figure['low'])}, {shown(figure['high'])}]"


def tables(results: dict[str, dict], limit: int) -> str:
    lines = [
        f"**`--limit {limit}`**: {limit} held-out procedural prompts and pictures, 256 texels, the body Anny.",
        "",
    ]
    for title, columns in TABLES:
        heads = " | ".join(head for head, _ in columns)
        lines += [f"## {title}", "", f"| textures | {heads} |", "| --- |" + " --- |" * len(columns)]
        for system, run, task in SYSTEMS:
            figures = results[run]["tasks"][task]["figures"]
            lines.append(f"| {system} | {' | '.join(cell(figures.get(name)) for _, name in columns)} |")
        lines.append("")
    reasons = {}
    for name, figure in results["checkpoint"]["tasks"]["t2uv"]["figures"].items():
        if isinstance(figure, str):
            reasons.setdefault(figure, []).append(f"`{name}`")
    lines += ["## Not measured", "", *(f"- {system}: {why}." for system, why in NOT_MEASURED)]
    lines += [f"- {', '.join(names)}: {why}." for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="prompts, and pictures (default: %(default)s)")
    args = parser.parse_args()
    results = {
        "checkpoint": run_evaluation("checkpoint", args.limit, f"--checkpoint={CHECKPOINT}"),
        "base": run_evaluation("base", args.limit, "--base"),
        "shuffled": measure_floor(args.limit),
    }
    path = PROJECT_ROOT / "docs" / "results.md"
    before, after = path.read_text().split(START)[0], path.read_text().split(END)[1]
    write_whole(path, f"{before}{START}{tables(results, args.limit)}{END}{after}".encode())
    tasks = {f"{run}.{task}": results[run]["tasks"][task]["figures"] for _, run, task in SYSTEMS}
    print(json.dumps(tasks))


if __name__ == "__main__":
    main()
