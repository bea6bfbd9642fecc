"""Remakes the tables of docs/results.md: this project's figures, with their ceiling and floor.

    python benchmarks/results_table.py --limit 200 --t2uv DIR --i2uv DIR --data DIR --data-checkpoint DIR

Runs evaluate.py for each row, which goes on where it was stopped, and measures true textures under shuffled prompts,
the floor. --t2uv and --i2uv are checkpoints of t2uv.py and i2uv.py, --joint another of joint.py than the committed one;
--data is a data set of the user's own, such as that of benchmarks/real_textures.py --keep, with the checkpoint trained
on it. A row without its checkpoint is named below the tables. Other arguments go to evaluate.py, such as
--extractor clip. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError, exit_on_user_error
from common.files import PROJECT_ROOT, write_whole
from common.text import read_text
from evaluation.data import procedural_set
from evaluation.extractors import load_extractor
from evaluation.measuring import measure, observe, rolled
from evaluation.procedural import Judge, held_out_paintings
from evaluation.report import RESULTS, results_of, shown

CHECKPOINT = "embedded/checkpoint"
OUT = Path("outputs/results")
NETWORK = "embedded image encoder"
# Rows of the tables on the procedural set: title, run, task.
SYSTEMS = (
    ("true textures (ceiling)", "checkpoint", "truth"),
    ("true textures, prompts shuffled (floor)", "shuffled", "shuffled"),
    ("base before joint training, from prompts", "base", "t2uv"),
    ("T2UV alone, from prompts", "t2uv", "t2uv"),
    ("I2UV alone, from pictures", "i2uv", "i2uv"),
    ("another joint checkpoint, from prompts", "joint", "t2uv"),
    ("another joint checkpoint, from pictures", "joint", "i2uv"),
    ("committed checkpoint, from prompts", "checkpoint", "t2uv"),
    ("committed checkpoint, from pictures", "checkpoint", "i2uv"),
)
OWN_SYSTEMS = (
    ("true textures (ceiling)", "data", "truth"),
    ("trained on them, from prompts", "data", "t2uv"),
    ("trained on them, from pictures", "data", "i2uv"),
)
# A run of these rows → what makes it.
NEEDED = {
    "t2uv": "`--t2uv DIR`, a checkpoint of `python t2uv.py`",
    "i2uv": "`--i2uv DIR`, a checkpoint of `python i2uv.py`",
    "joint": "`--joint DIR`, a checkpoint of `python joint.py`",
    "data": "`--data DIR --data-checkpoint DIR`, of `python benchmarks/real_textures.py DIR --keep DIR`",
}
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
    """The results of evaluate.py in a process of its own. Raises UserError where it ends with a mistake."""
    command = [sys.executable, str(PROJECT_ROOT / "evaluate.py"), f"--limit={limit}", f"--out={OUT / name}", *arguments]
    print(" ".join(command[1:]), flush=True)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the row {name} could not be measured; its command is above")
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


def rows_of(systems: tuple, results: dict[str, dict], columns: tuple) -> list[str]:
    """The lines of one table, without rows that no run has."""
    heads = " | ".join(head for head, _ in columns)
    lines = [f"| textures | {heads} |", "| --- |" + " --- |" * len(columns)]
    for system, run, task in systems:
        if task in results.get(run, {"tasks": {}})["tasks"]:
            figures = results[run]["tasks"][task]["figures"]
            lines.append(f"| {system} | {' | '.join(cell(figures.get(name)) for _, name in columns)} |")
    return lines


def described(results: dict, limit: int) -> str:
    count, texels, body = len(results["samples"]), results["texels"], Path(results["body"]).name
    return f"**`--limit {limit}`**: {count} samples of {Path(results['data']).name}, {texels} texels, the body {body}."


def tables(results: dict[str, dict], limit: int) -> str:
    lines = [described(results["checkpoint"], limit), ""]
    for title, columns in TABLES:
        lines += [f"## {title}", "", *rows_of(SYSTEMS, results, columns), ""]
    if "data" in results:
        lines += ["## On textures of the user's own", "", described(results["data"], limit), ""]
        folder = str(results["data"]["data"])  # somebody's own: its name is enough for a page
        warnings = [warning.replace(folder, Path(folder).name) for warning in results["data"]["warnings"]]
        lines += [f"**Warning:** {warning}.\n" for warning in warnings]
        for _, columns in TABLES:
            shown = rows_of(OWN_SYSTEMS, results, columns)
            if any(set(row.split(" | ")[1:]) - {"–", "– |"} for row in shown[2:]):
                lines += [*shown, ""]
    reasons = {}
    for name, figure in results["checkpoint"]["tasks"]["t2uv"]["figures"].items():
        if isinstance(figure, str):
            reasons.setdefault(figure, []).append(f"`{name}`")
    lines += ["## Not measured", ""]
    titles = {run: title for title, run, _ in (*SYSTEMS, *OWN_SYSTEMS)}
    titles["data"] = "textures of the user's own, as the seven real ones"
    lines += [f"- {titles[run].partition(',')[0]}: needs {what}." for run, what in NEEDED.items() if run not in results]
    lines += [f"- {', '.join(names)}: {why}." for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="prompts, and pictures (default: %(default)s)")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="of the row 'committed' (default: %(default)s)")
    for run in ("t2uv", "i2uv", "joint"):
        parser.add_argument(f"--{run}", metavar="DIR", help=f"a checkpoint of {run}.py")
    parser.add_argument("--data", metavar="DIR", help="a data set of the user's own")
    parser.add_argument("--data-checkpoint", metavar="DIR", help="the checkpoint trained on --data")
    parser.add_argument("--page", type=Path, default=PROJECT_ROOT / "docs" / "results.md", help="default: %(default)s")
    args, more = parser.parse_known_args()
    with exit_on_user_error():
        remake(args, more)


def remake(args: argparse.Namespace, more: list[str]) -> None:
    if bool(args.data) != bool(args.data_checkpoint):
        raise UserError("--data and --data-checkpoint belong together")
    before, *others = read_text(args.page).split(START)
    if len(others) != 1 or END not in others[0]:
        raise UserError(f"{args.page} lacks the lines {START.strip()} and {END.strip()}, between which tables stand")
    after = others[0].split(END)[1]
    checkpoints = {run: getattr(args, run) for run in ("t2uv", "i2uv", "joint") if getattr(args, run)}
    results = {
        "checkpoint": run_evaluation("checkpoint", args.limit, f"--checkpoint={args.checkpoint}", *more),
        "base": run_evaluation("base", args.limit, "--base", "--task=t2uv", *more),
        "shuffled": measure_floor(args.limit),
    }
    for run, folder in checkpoints.items():
        task = "both" if run == "joint" else run
        results[run] = run_evaluation(run, args.limit, f"--checkpoint={folder}", f"--task={task}", *more)
    if args.data:
        own = (f"--checkpoint={args.data_checkpoint}", f"--data={args.data}")
        results["data"] = run_evaluation("data", args.limit, *own, *more)
    write_whole(args.page, f"{before}{START}{tables(results, args.limit)}{END}{after}".encode())
    print(json.dumps({
        f"{run}.{task}": measures["figures"]
        for run, result in results.items()
        for task, measures in result["tasks"].items()
    }))  # fmt: skip


if __name__ == "__main__":
    main()
