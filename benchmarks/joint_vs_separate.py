"""Does training both tasks together pay? Text alone, pictures alone, and both, each with the same UNet rows.

    python benchmarks/joint_vs_separate.py --steps 300

Joint training puts a row of each task through the UNet at every step. T2UV alone and I2UV alone take twice the steps,
so that each of the three runs costs the same; a second pair takes the same number of steps, so that the two together
cost what the joint run does. Each is measured by evaluate.py on held-out prompts and pictures.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REGIONS = ("top", "bottom", "hair", "skin")
OUT = ROOT / "outputs" / "joint_vs_separate"


def run(*command: str) -> str:
    print("$ python " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train_and_measure(task: str, steps: int, limit: int, overrides: list[str]) -> dict:
    out_dir, began = OUT / f"{task}-{steps}", time.perf_counter()
    folders = (f"--output.out_dir={out_dir}", f"--output.log_dir={out_dir / 'logs'}")
    once = (f"--output.save_every={steps}", f"--output.sample_every={steps}")
    run(f"{task}.py", f"--training.{task}.max_steps={steps}", *folders, *once, *overrides)
    seconds = time.perf_counter() - began
    printed = run("evaluate.py", f"--output.out_dir={out_dir}", f"--limit={limit}")
    measures = json.loads(printed.splitlines()[-1])
    return {"task": task, "steps": steps, "seconds": round(seconds), **measures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of joint training (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=100, help="prompts and pictures (default: %(default)s)")
    args, overrides = parser.parse_known_args()
    runs = [("joint", args.steps)]
    runs += [(task, steps) for task in ("t2uv", "i2uv") for steps in (2 * args.steps, args.steps)]
    rows = [train_and_measure(task, steps, args.limit, overrides) for task, steps in runs]
    regions = " / ".join(REGIONS)
    print(f"\n| run | steps | seconds | T2UV {regions} | pattern | length | I2UV {regions} | PSNR |\n|" + " --- |" * 8)
    for row in rows:
        cells = [row["task"], row["steps"], row["seconds"]]
        for task, measures in (("t2uv", ("color", "pattern", "length")), ("i2uv", ("color", "psnr"))):
            for name in measures:
                measured = task in row and row["task"] in ("joint", task)
                value = row[task][name] if measured else "-"
                if isinstance(value, dict):
                    value = " / ".join(f"{100 * value[region]:.0f}" for region in REGIONS)
                cells.append(value)
        print("| " + " | ".join(map(str, cells)) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
