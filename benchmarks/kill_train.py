"""Kills joint training again and again, and compares what it ends with to an undisturbed run, bit for bit.

    python benchmarks/kill_train.py --kills 20

Trains the embedded base on a handful of procedural textures, saving every other step. The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS, STOPPED = 40, 75
SETTINGS = (
    "--data.dataset=procedural:6",
    "--data.views_per_texture=2",
    "--data.validation_textures=1",
    "--model.lora.dropout=0.1",
    "--training.ema_decay=0.9",
    "--training.joint.batch_size=2",
    "--training.joint.effective_batch_size=4",
    f"--training.joint.max_steps={STEPS}",
    "--output.save_every=2",
    "--output.sample_every=100000",
    "--output.keep_last=2",
    "--output.validate_every=10",
)


def run(
    work: str, name: str, after: float | None = None, number: int = signal.SIGKILL, while_saving: bool = False
) -> int:
    """joint.py --resume auto, which gets signal `number` after so many seconds → its exit status.

    while_saving: and not before a checkpoint is being written.
    """
    out_dir = Path(work, name)
    folders = (f"--output.out_dir={out_dir}", f"--output.log_dir={work}/logs", f"--data.cache_dir={work}/cache")
    command = [sys.executable, str(ROOT / "joint.py"), "--resume", "auto", *SETTINGS, *folders]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, error = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        while while_saving and process.poll() is None and not half_saved(out_dir):
            time.sleep(0.0005)
        if process.poll() is None:
            os.killpg(process.pid, number)
        _, error = process.communicate()
    if process.returncode not in (0, STOPPED, -signal.SIGKILL, -signal.SIGTERM):
        raise SystemExit(error.decode())
    return process.returncode


def half_saved(out_dir: Path) -> list[Path]:
    """Checkpoints that are being written, or were when their process was killed."""
    return list((out_dir / "joint").glob(".step-*.partial"))


def equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        run(work, "warm-up")  # builds the data set
        began = time.perf_counter()
        run(work, "whole")
        took = time.perf_counter() - began
        print(f"undisturbed: {took:.0f} s for {STEPS} steps")
        final, statuses, kills, torn = f"joint/step-{STEPS:06d}", [], 0, 0
        while kills < args.kills:
            number, while_saving = signal.SIGTERM if kills % 4 == 3 else signal.SIGKILL, kills % 4 == 1
            statuses.append(run(work, "killed", moments.uniform(0.35, 0.55) * took, number, while_saving))
            torn += while_saving and bool(half_saved(Path(work, "killed")))
            kills += statuses[-1] != 0
            saved = sorted(Path(work, "killed", "joint").glob("step-*"))
            print(f"{kills:>3} status {statuses[-1]:>4} {saved[-1].name if saved else 'nothing saved'}", flush=True)
            if saved and saved[-1].name == f"step-{STEPS:06d}" and kills < args.kills:
                for folder in saved:  # it came to its end early: from the start again
                    subprocess.run(["rm", "-r", str(folder)], check=True)
        run(work, "killed")
        ends = [Path(work, name, final) for name in ("whole", "killed")]
        states = [torch.load(folder / "training_state.pt", weights_only=True) for folder in ends]
        identical = equal(*states) and all(
            equal(*(load_file(folder / name) for folder in ends))
            for name in ("pytorch_lora_weights.safetensors", "aligner.safetensors")
        )
        saved_on_sigterm = statuses.count(STOPPED)
    result = {"kills": kills, "saved_on_sigterm": saved_on_sigterm, "while_saving": torn, "identical": identical}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
