"""Kills the builder again and again, and compares what it ends with to an undisturbed run, byte for byte.

    python benchmarks/kill_build.py DIR --kills 10

DIR holds smpl_uv.obj, real_textures/*.png and real_textures/prompts.txt. Then the same set is built by two processes.
The last line is JSON.
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

COPIES, VIEWS = 6, 2


def run(command: list[str], kill_after: float | None = None, **environment: str) -> float | None:
    """Seconds from the first file it wrote to its end; None when it was killed, with its workers, kill_after seconds
    after that first file. The last word of command is its output folder."""
    environment, started = {**os.environ, **environment}, time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=environment
    )
    while process.poll() is None and not is_writing(Path(command[-1]), started):
        time.sleep(0.01)
    began = time.perf_counter()
    try:
        _, error = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        raise SystemExit(error.decode())
    return time.perf_counter() - began


def is_writing(out: Path, since: float) -> bool:
    """Whether a shard was begun in out since that time; what earlier kills left does not count."""
    for path in out.rglob(".shard-*.partial"):
        try:
            if path.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # finished while we looked
            return True
    return False


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    args = parser.parse_args()
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        # Small shards, so that the kills fall before, into, between and after them.
        textures, prompts = Path(work) / "textures", args.folder / "real_textures" / "prompts.txt"
        textures.mkdir()
        pictures = sorted((args.folder / "real_textures").glob("*.png"))
        for copy in range(COPIES):
            for picture in pictures:
                (textures / f"{copy}-{picture.name}").symlink_to(picture.resolve())
        lines = prompts.read_text(encoding="utf-8").splitlines()[: len(pictures)]
        (textures / "prompts.txt").write_text("\n".join(lines * COPIES) + "\n")
        starter = Path(work) / "build.py"
        starter.write_text(
            f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})\n"
            "from atlas_dataset import building\n"
            "from atlas_dataset.build_atlas_large import main\n"
            "building.TEXTURES_PER_SHARD = 4\n"
            "if __name__ == '__main__':\n"
            "    main()\n"
        )
        sources = ["--textures", str(textures), "--prompts", str(textures / "prompts.txt")]
        body = ["--body", f"obj:{args.folder / 'smpl_uv.obj'}"]
        options = ["--views", str(VIEWS), "--height", "512", "--width", "384", "--workers", "1"]
        command = [sys.executable, str(starter), *sources, *body, *options, "--out"]
        took = run([*command, f"{work}/whole"])
        print(f"undisturbed: {took:.0f} s of rendering")
        kills, shards, last = 0, [], -(-len(pictures) * COPIES // 4)
        while kills < args.kills:
            kills += run([*command, f"{work}/killed"], kill_after=moments.uniform(took / 4, took)) is None
            done = sorted(Path(work, "killed").glob("renders/shard-*.parquet"))
            shards.append(len(done))
            if len(done) == last and kills < args.kills:
                for path in moments.sample(done, last // 2):  # it came to its end early: half of them again
                    path.unlink()
        run([*command, f"{work}/killed"])
        print(f"killed {kills} times, with {shards} shards of {last} finished")
        for rank in ("1", "0"):
            run([*command, f"{work}/two"], RANK=rank, WORLD_SIZE="2")
        whole = contents(Path(work) / "whole")
        result = {
            "kills": kills,
            "between_shards": sum(0 < count < last for count in shards),
            "files": len(whole),
            "identical_after_kills": contents(Path(work) / "killed") == whole,
            "identical_for_two_processes": contents(Path(work) / "two") == whole,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
