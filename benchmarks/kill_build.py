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


def run(command: list[str], kill_after: float | None = None, **environment: str) -> bool:
    """Whether the command came to its end; after kill_after seconds it and its workers are killed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        _, error = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(error.decode())
    return True


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
        lines = prompts.read_text().splitlines()[: len(pictures)]
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
        command = [sys.executable, str(starter), "--textures", str(textures), "--prompts",
                   str(textures / "prompts.txt"), "--body", f"obj:{args.folder / 'smpl_uv.obj'}",
                   "--views", str(VIEWS), "--height", "512", "--width", "384", "--workers", "1", "--out"]  # fmt: skip
        began = time.perf_counter()
        run([*command, f"{work}/whole"])
        took = time.perf_counter() - began
        print(f"undisturbed: {took:.0f} s")
        kills, shards = 0, []
        while kills < args.kills:
            if not run([*command, f"{work}/killed"], kill_after=moments.uniform(0.3, 0.55) * took):
                kills += 1
            shards.append(len(list(Path(work, "killed").glob("renders/shard-*.parquet"))))
            if shards[-1] == -(-len(pictures) * COPIES // 4) and kills < args.kills:
                Path(work, "killed", f"renders/shard-{moments.randrange(shards[-1]):05d}.parquet").unlink()
        run([*command, f"{work}/killed"])
        print(f"killed {kills} times, with {shards} shards finished")
        for rank in ("1", "0"):
            run([*command, f"{work}/two"], RANK=rank, WORLD_SIZE="2")
        whole = contents(Path(work) / "whole")
        result = {
            "kills": kills, "files": len(whole), "identical_after_kills": contents(Path(work) / "killed") == whole,
            "identical_for_two_processes": contents(Path(work) / "two") == whole,
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
