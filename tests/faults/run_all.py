"""Every fault test, the long sets too: `make test-faults`. The last line is JSON of what was counted where it happened.

kills: processes that were killed. disks_filled: writes that met a full disk. hostile_refused: hostile files refused.
fuzz_inputs, option_pairs (of values, in option_rows trainings), bad_calls, layouts_read and layouts_refused of LoRA
files. lost: what a kill or a full disk took that should have stayed. executed: programs in files that ran. Exit status
1 when a test failed, something was lost or something ran.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tally import TALLY

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("kills", "disks_filled", "hostile_refused", "fuzz_inputs", "option_pairs", "bad_calls", "layouts_read",
           "lost", "executed")  # fmt: skip
TESTS = (
    "tests/faults",
    "tests/test_commands.py",
    "tests/models/test_lora_layouts.py",
    "tests/training/test_resume.py",
    "tests/training/test_stopping.py",
    "tests/atlas_dataset/test_stopped_builds.py",
)
KILLS = {"kill_train.py": 12, "kill_build.py": 10}
SIDE, PICTURES = 256, 8


def write_sources(folder: Path) -> None:
    """What kill_build.py builds from: a box with UVs, and pictures with their prompts."""
    corners = [(x, y, z) for x in (-0.4, 0.4) for y in (0, 1.6) for z in (-0.2, 0.2)]
    quads = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]
    lines = [f"v {x} {y} {z}" for x, y, z in corners]
    for index in range(len(quads)):
        left, low = index % 3 / 3, index // 3 / 2
        lines += [f"vt {left + u} {low + v}" for u, v in ((0.03, 0.04), (0.3, 0.04), (0.3, 0.46), (0.03, 0.46))]
    for index, quad in enumerate(quads):
        lines.append("f " + " ".join(f"{corner}/{4 * index + turn + 1}" for turn, corner in enumerate(quad)))
    (folder / "smpl_uv.obj").write_text("\n".join(lines) + "\n")
    pictures, draws = folder / "real_textures", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(PICTURES):
        Image.fromarray(draws.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(pictures / f"{number}.png")
    (pictures / "prompts.txt").write_text("".join(f"a man, {number}\n" for number in range(PICTURES)))


def last_line(process: subprocess.Popen, name: str) -> dict:
    """What a script of benchmarks/ says at its end. Raises SystemExit where it failed."""
    output, _ = process.communicate()
    print(output, flush=True)
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}")
    return json.loads(output.splitlines()[-1])


def kill(work: Path, environment: dict[str, str]) -> Counter:
    """Both storms at once, each on a core."""
    write_sources(work)
    storms = {}
    for name, kills in KILLS.items():
        sources = [str(work)] if name == "kill_build.py" else []
        command = [sys.executable, str(ROOT / "benchmarks" / name), *sources, "--kills", str(kills)]
        storms[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    counts = Counter()
    for name, process in storms.items():
        told = last_line(process, name)
        counts["kills"] += told["kills"]
        counts["lost"] += sum(not value for key, value in told.items() if key.startswith("identical"))
    return counts


def main() -> None:
    began, counts = time.perf_counter(), Counter(dict.fromkeys(FIGURES, 0))
    with tempfile.TemporaryDirectory() as work:
        tally = Path(work) / "tally.jsonl"
        tally.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", TALLY: str(tally)}
        pytest = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", *TESTS]
        failed = subprocess.run(pytest, cwd=ROOT, env=environment).returncode
        counts.update(kill(Path(work), environment))
        for line in tally.read_text().splitlines():
            counts.update(json.loads(line))
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes")
    print(json.dumps(counts))
    sys.exit(bool(failed or counts["lost"] or counts["executed"]))


if __name__ == "__main__":
    main()
