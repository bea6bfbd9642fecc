"""Building and reading ATLAS-Large at full size, from a folder of real textures.

    python benchmarks/bench_build.py DIR

DIR holds smpl_uv.obj, real_textures/*.png and real_textures/prompts.txt; the textures are taken again and again.
Measures rows a second after the first shard, megabytes a row, what JPEG costs, peak memory for 50 and for 500
textures, and rows a second read with 2 workers against a loader that decodes each row's pictures three times. The
last line is JSON.
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import numpy as np
import psutil
from torch.utils.data import DataLoader, Dataset

from atlas_dataset import building
from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import ATLASLarge
from atlas_dataset.sources import HuggingFaceATLAS
from common.errors import exit_on_user_error
from common.pictures import image_from_pixels, open_image, pixels_from_image, prepare_image
from config.configuration import Render
from render.uv_space import texture_pixels

VIEWS, HEIGHT, WIDTH = 5, 1024, 768


class Repeated(HuggingFaceATLAS):
    """The folder's textures again and again, `count` in all."""

    def __init__(self, folder: Path, count: int):
        super().__init__(str(folder / "real_textures"), folder / "real_textures" / "prompts.txt")
        rows, prompts = self.rows, self.prompts
        self.rows = [rows[index % len(rows)] for index in range(count)]
        self.prompts = [prompts[index % len(rows)] for index in range(count)]


class DecodesThreeTimes(Dataset):
    """A row as the seed's loader reads it: each column's access decodes both pictures of the row."""

    def __init__(self, root: Path, resolution: int, image_size: int):
        self.textures, self.renders = (
            datasets.load_dataset("parquet", data_files=str(root / name / "*.parquet"), split="train")
            for name in ("textures", "renders")
        )
        self.resolution, self.image_size = resolution, image_size

    def __len__(self):
        return len(self.renders)

    def row(self, index):
        render = self.renders[index]
        texture = self.textures[render["texture_id"]]
        texture["texture"].load(), render["image"].load()
        return {"image": render["image"], "texture": texture["texture"], "prompt": texture["prompt"]}

    def __getitem__(self, index):
        return {
            "image": prepare_image(self.row(index)["image"].convert("RGB"), self.image_size),
            "texture": texture_pixels(self.row(index)["texture"].convert("RGB"), self.resolution),
            "prompt": self.row(index)["prompt"],
        }


def peak_megabytes(command: list[str]) -> float:
    """Runs a command → the most memory that it and its processes held at once; what they share counts once."""
    process, peak = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        held = 0
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended
                held += member.memory_full_info().pss
        peak = max(peak, held)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak / 1e6


def build_speed(folder: Path, out: Path, textures: int) -> float:
    """Rows a second after the first shard."""
    first_shard = out / "renders" / "shard-00000.parquet"
    seen = {}

    def watch():
        while not first_shard.exists() and not seen.get("stop"):
            time.sleep(0.02)
        seen["at"] = time.perf_counter()

    watcher = threading.Thread(target=watch)
    watcher.start()
    build_dataset(Repeated(folder, textures), f"obj:{folder / 'smpl_uv.obj'}", VIEWS, out, HEIGHT, WIDTH)
    ended, seen["stop"] = time.perf_counter(), True
    watcher.join()
    return (textures - building.TEXTURES_PER_SHARD) * VIEWS / (ended - seen["at"])


def megabytes_a_row(folder: Path, out: Path) -> float:
    """Of each texture once and its renders; nothing is stored twice that would be shared."""
    count = len(sorted((folder / "real_textures").glob("*.png")))
    build_dataset(Repeated(folder, count), f"obj:{folder / 'smpl_uv.obj'}", VIEWS, out, HEIGHT, WIDTH)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / (count * VIEWS) / 1e6


def jpeg_cost(folder: Path) -> tuple[float, bool]:
    """The lowest PSNR of a stored render against its uncompressed frame; whether textures are stored as they were."""
    recipe = building.Recipe(f"obj:{folder / 'smpl_uv.obj'}", Render(), VIEWS, HEIGHT, WIDTH, seed=0)
    source, lowest, exact = Repeated(folder, 7), math.inf, True
    for texture_id, (encoded, prompt) in enumerate(source[index] for index in range(7)):
        row, renders = recipe.rows(texture_id, encoded, prompt, "")
        exact &= row["texture"]["bytes"] == encoded
        for (frame, _), stored in zip(recipe.frames(texture_id, open_image(encoded)), renders):
            frame = pixels_from_image(image_from_pixels(frame))
            error = (pixels_from_image(open_image(stored["image"]["bytes"])) - frame) / 2
            lowest = min(lowest, -10 * error.square().mean().log10().item())
    return lowest, exact


def read_speeds(root: Path, cache_dir: str, rows: int) -> dict[str, float]:
    """Rows a second with 2 workers, each in its training order, each loader in turn three times; medians."""
    ours, three_times = ATLASLarge(root, True, 512, 224, cache_dir), DecodesThreeTimes(root, 512, 224)
    loaders = {"ours": ours, "three times": three_times}
    speeds = {name: [] for name in loaders}
    for repetition in range(3):
        for name, dataset in loaders.items():
            rng = np.random.default_rng(repetition)
            order = dataset.shuffled(rng) if name == "ours" else rng.permutation(len(dataset))
            order = order[: rows + 8].tolist()
            loader = iter(DataLoader(dataset, batch_size=8, sampler=order, num_workers=2))
            next(loader)  # the workers have started
            began = time.perf_counter()
            read = sum(len(batch["prompt"]) for batch in loader)
            speeds[name].append(read / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--textures", type=int, default=128)
    parser.add_argument("--skip-memory", action="store_true", help="leave out the 50 and 500 textures")
    parser.add_argument("--memory-run", type=int, help=argparse.SUPPRESS)  # what the memory is measured of
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with exit_on_user_error(), tempfile.TemporaryDirectory() as work:
        if args.memory_run:
            body = f"obj:{args.folder / 'smpl_uv.obj'}"
            build_dataset(Repeated(args.folder, args.memory_run), body, 1, args.out, HEIGHT, WIDTH, workers=2)
            return
        root = Path(work) / "built"
        rows_per_second = build_speed(args.folder, root, args.textures)
        megabytes = megabytes_a_row(args.folder, Path(work) / "once")
        print(f"built        {rows_per_second:8.1f} rows/s after the first shard, {megabytes:.3f} MB a row")
        psnr, exact = jpeg_cost(args.folder)
        print(f"renders      {psnr:8.1f} dB at the lowest; textures stored bit for bit: {exact}")
        speeds = read_speeds(root, str(Path(work) / "cache"), 160)
        print(f"read         {speeds['ours']:8.1f} rows/s, decoding three times {speeds['three times']:.1f} rows/s")
        result = {
            "rows_per_second": round(rows_per_second, 1),
            "mb_per_row": round(megabytes, 3),
            "lowest_psnr": round(psnr, 1),
            "textures_bit_exact": exact,
            "read_speedup_vs_seed": round(speeds["ours"] / speeds["three times"], 2),
        }
        if not args.skip_memory:
            for count in (50, 500):
                out = ["--out", f"{work}/memory-{count}"]
                peak = peak_megabytes([sys.executable, __file__, str(args.folder), "--memory-run", str(count), *out])
                result[f"mb_building_{count}"] = round(peak)
                print(f"memory       {peak:8.0f} MB at the most, {count} textures")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
