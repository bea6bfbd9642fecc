"""Renders each texture as `views.sample_view` says and writes the data set that `ATLASLarge` reads.

Layout: `textures/*.parquet` (texture_id, texture, prompt, licence), each texture once with its own bytes;
`renders/*.parquet` (texture_id, view, image and all that was drawn for it); `atlas_large.json`; a data card; and
`skipped.json`, the textures that could not be read. A shard is written under a temporary name and renamed, so that
the same command goes on after the last whole one. Several processes (accelerate launch) share the shards: the rows
are the same for any number of processes and workers.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from tqdm import tqdm

from atlas_dataset.dataset import INFO_FILE
from atlas_dataset.tables import has_picture, open_saved, read_batches, stored_picture
from atlas_dataset.views import render_texture
from common import processes
from common.errors import UserError, reason
from common.files import check_writable, is_hidden, remove_partial_files, temporary_name, write_whole
from common.pictures import encode_image, image_from_pixels, open_image
from common.text import parse_json
from config.configuration import Render
from render.rigs import absolute_spec, load_rig
from render.uv_space import body_pixels

TEXTURES_PER_SHARD = 32
ROWS_PER_GROUP = 16  # of a shard's rows, the unit that is written and read at once
JPEG = dict(format="JPEG", quality=86, subsampling=0)
JPEG_BYTES = 0.11  # a pixel, for the estimate of the disk space

INTEGER, NUMBER, TEXT = (datasets.Value(dtype) for dtype in ("int64", "float32", "string"))
NUMBERS, PICTURE = datasets.Sequence(NUMBER), datasets.Image()
CAMERA = dict.fromkeys(("azimuth", "elevation", "fov_degrees", "fill", "bottom"), NUMBER)
SCENE = {"ambient": NUMBERS, "lights": datasets.Sequence(NUMBERS), "background": TEXT}
POSED_BODY = {"pose": NUMBERS, "shape": NUMBERS, "gender": TEXT}
TEXTURE_FEATURES = datasets.Features(texture_id=INTEGER, texture=PICTURE, prompt=TEXT, licence=TEXT)
RENDER_FEATURES = datasets.Features(
    texture_id=INTEGER, view=INTEGER, image=PICTURE, **CAMERA, **SCENE, **POSED_BODY, licence=TEXT
)

DATA_CARD = """---
configs:
- config_name: renders
  data_files: renders/*.parquet
  default: true
- config_name: textures
  data_files: textures/*.parquet
---
# UV textures and renders of them
{textures} textures in the UV layout of `{body}`, {views} renders of {height}x{width} pixels each.

| columns of `renders` | |
| --- | --- |
| `texture_id`, `view` | which texture, and the number of its render |
| `image` | the render |
| `azimuth`, `elevation`, `fov_degrees` | of the camera, in degrees; azimuth 0 sees the front |
| `fill`, `bottom` | share of the picture's height that is body; share of the body below the picture's edge |
| `ambient`, `lights` | colours; each light is azimuth and elevation as seen from the camera, red, green, blue |
| `background` | plain, gradient, noise, pictures or white |
| `pose`, `shape`, `gender` | of the body; empty for a mesh that cannot be posed |
| `licence` | of the texture, and so of its renders: {licence} |

`textures` has `texture_id`, `texture`, `prompt` and `licence`. Every render follows from the seed ({seed}),
`texture_id` and `view` alone. Textures that could not be read are in `skipped.json`.
"""


@dataclass(frozen=True)
class Recipe:
    """What is the same for all textures of a data set."""

    body: str
    render: Render
    views: int
    height: int
    width: int
    seed: int
    licence: str = "unknown"
    device: str = "cpu"

    def frames(self, texture_id: int, image: Image.Image) -> list[tuple[torch.Tensor, dict]]:
        """A texture's renders, (3, height, width) in [-1, 1], with what was drawn for each."""
        rig = load_rig(self.body, self.render.poses)
        texture = body_pixels(image, rig.body, min(max(image.size), 4096)).to(self.device)
        return render_texture(
            rig, texture, self.render, self.seed, texture_id, list(range(self.views)), self.height, self.width
        )

    def rows(self, texture_id: int, encoded: bytes, prompt: str, name: str) -> tuple[dict, list[dict]] | dict:
        """A texture's row and its renders' rows; or what is wrong with it."""
        try:
            image = open_image(encoded, name)
        except UserError as error:
            return {"texture_id": texture_id, "name": name, "reason": str(error)}
        shared = {"texture_id": texture_id, "licence": self.licence}
        texture_row = {**shared, "texture": {"bytes": encoded, "path": None}, "prompt": prompt}
        render_rows = []
        for view, (picture, sampled) in enumerate(self.frames(texture_id, image)):
            jpeg = encode_image(image_from_pixels(picture), **JPEG)
            render_rows.append({**shared, "view": view, "image": {"bytes": jpeg, "path": None}, **sampled})
        return texture_row, render_rows


def build_dataset(
    source, body_spec: str, views: int, out: str | Path, height: int = 1024, width: int = 768, seed: int = 0,
    render: Render | None = None, licence: str = "unknown", workers: int | None = None,
) -> Path:  # fmt: skip
    """Renders `views` pictures of each row of source, a sequence of (encoded texture, prompt) → out.

    workers: processes that render beside this one; None: one a core where the set is worth it, none on CUDA.
    Raises UserError when out holds a data set built otherwise, when the disk is too small, or when nothing is left.
    """
    out, render = Path(out), render or Render()
    body_spec = absolute_spec(body_spec)  # the data set is read from anywhere
    info = {
        "body": body_spec, "textures": len(source), "views": views, "height": height, "width": width, "seed": seed,
        "render": render.model_dump(), "licence": licence, "source": source.fingerprint(),
    }  # fmt: skip
    if not len(source):
        raise UserError("there are no textures to build from")
    load_rig(body_spec, render.poses)  # fails here, not in a worker; and builds Anny's cache once
    check_writable(out)
    was_complete = (out / INFO_FILE).exists() and _check_same_settings(out / INFO_FILE, info)["complete"]

    device = f"cuda:{processes.local_rank()}" if torch.cuda.is_available() else "cpu"
    shards = range(-(-len(source) // TEXTURES_PER_SHARD))
    missing = [shard for shard in shards if not all(file.exists() for file in _shard_files(out, shard)[:2])]
    if not missing and was_complete:
        return out
    _check_space(source, len(missing) / len(shards), views, out, height, width)
    own_shards = [shard for shard in missing if shard % processes.world_size() == processes.rank()]
    if workers is None:
        is_small = len(own_shards) * TEXTURES_PER_SHARD * views < 200
        workers = 0 if device != "cpu" or is_small else processes.cores()
    recipe = Recipe(body_spec, render, views, height, width, seed, licence, device)
    total = len(source) * views
    others = min((len(shards) - len(own_shards)) * TEXTURES_PER_SHARD * views, total)
    progress = tqdm(total=total, initial=others, desc="renders", unit="row")
    try:
        with progress, _renderers(workers) as pool:
            for shard in own_shards:
                first = shard * TEXTURES_PER_SHARD
                texture_ids = range(first, min(first + TEXTURES_PER_SHARD, len(source)))
                results = _in_turn(pool, recipe.rows, source, texture_ids, ahead=2 * workers)
                _write_shard(out, shard, results, progress, views, info)
    except BaseException:  # Ctrl-C too, which comes at any line
        remove_partial_files(out)
        raise
    if all(_shard_files(out, shard)[1].exists() for shard in shards):
        _finish(out, info, shards)
    return out


def _shard_files(out: Path, shard: int) -> tuple[Path, Path, Path]:
    """A shard's textures, its renders (renamed last of the two, so that both are whole), and what it skipped."""
    name = f"shard-{shard:05d}"
    return out / "textures" / f"{name}.parquet", out / "renders" / f"{name}.parquet", out / f".skipped-{name}.json"


@contextmanager
def _renderers(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes of one thread each: as fast as the cores, and each picture's bytes depend on nothing around it."""
    if workers:
        with processes.worker_pool(workers, prepare_renderer) as pool:
            yield pool
        return
    threads = torch.get_num_threads()
    prepare_renderer()
    try:
        yield None
    finally:
        torch.set_num_threads(threads)


def prepare_renderer() -> None:
    """One thread a process, which keeps the memory of a frame for the next."""
    torch.set_num_threads(1)
    processes.keep_freed_memory()


def _in_turn(pool, task, source, texture_ids, ahead: int) -> Iterator:
    """task(...) for each texture in order; with a pool, no more than `ahead` are read before they are wanted."""
    futures: deque = deque()
    for texture_id in texture_ids:
        name = source.name(texture_id)
        try:
            arguments = (texture_id, *source[texture_id], name)
        except UserError as error:  # the file itself cannot be read
            while futures:
                yield futures.popleft().result()
            yield {"texture_id": texture_id, "name": name, "reason": str(error)}
            continue
        if pool is None:
            yield task(*arguments)
            continue
        futures.append(pool.submit(task, *arguments))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _write_shard(out: Path, shard: int, results: Iterator, progress: tqdm, views: int, info: dict) -> None:
    textures_file, renders_file, skipped_file = _shard_files(out, shard)
    skipped, writers = [], []
    try:
        for file, features in ((textures_file, TEXTURE_FEATURES), (renders_file, RENDER_FEATURES)):
            writers.append(_ParquetWriter(file, features))
        textures, renders = writers
        for result in results:
            if isinstance(result, dict):
                skipped.append(result)
                progress.write(f"skipped: {result['reason']}")
            else:
                texture_row, render_rows = result
                textures.add([texture_row])
                renders.add(render_rows)
            progress.update(views)
        textures.close()
        renders.close()
        if skipped:
            _write_json(skipped_file, skipped)
        else:
            skipped_file.unlink(missing_ok=True)  # of an earlier start, before the picture was mended
        if not (out / INFO_FILE).exists():  # before the first shard, and not before that is sure
            _write_json(out / INFO_FILE, {**info, "complete": False})
        textures.publish()
        renders.publish()
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {reason(error)}; make room or choose another place: the same command goes on"
        ) from None
    except BrokenProcessPool:
        raise UserError("a rendering process died, of too little memory perhaps; use fewer --workers") from None
    finally:
        for writer in writers:
            writer.discard()


class _ParquetWriter:
    """Rows → a parquet file that `datasets` reads with its features; under a temporary name until `publish`."""

    def __init__(self, file: Path, features: datasets.Features):
        self.file, self.features, self.rows = file, features, []
        self.partial = temporary_name(file)
        check_writable(file.parent)
        self.sink = pyarrow.OSFile(str(self.partial), "wb")  # a path with :: in it would be taken for a URL
        # Pictures are compressed already.
        self.writer = pyarrow.parquet.ParquetWriter(
            self.sink, features.arrow_schema, compression="none", use_dictionary=False
        )

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        if len(self.rows) >= ROWS_PER_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        columns = {name: [row[name] for row in self.rows] for name in self.features}
        self.writer.write_table(pyarrow.Table.from_pydict(columns, schema=self.features.arrow_schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._write_rows()
        self.writer.close()
        self.sink.close()

    def publish(self) -> None:
        os.replace(self.partial, self.file)

    def discard(self) -> None:
        """Removes what was not published."""
        with suppress(OSError):
            self.writer.close()
        with suppress(OSError):
            self.sink.close()
        self.partial.unlink(missing_ok=True)


def _check_space(source, share: float, views: int, out: Path, height: int, width: int) -> None:
    """Prints what the share of the data set that is missing will take. Raises UserError when the disk has less."""
    sizes = []
    for index in range(0, len(source), max(1, len(source) // 8)):
        with suppress(UserError):  # one that cannot be read is skipped later
            sizes.append(len(source[index][0]))
    mean_size = sum(sizes) / max(1, len(sizes))
    needed = share * len(source) * (mean_size + views * height * width * JPEG_BYTES)
    free = shutil.disk_usage(out).free
    print(f"{out} will take about {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free")
    if needed > free:
        raise UserError(
            f"{out} needs about {needed / 1e9:.2f} GB but {free / 1e9:.2f} GB are free; choose another disk"
        )


def _finish(out: Path, info: dict, shards: range) -> None:
    skipped = []
    for shard in shards:
        file = _shard_files(out, shard)[2]
        if file.exists():
            skipped += json.loads(file.read_text())
    _write_json(out / "skipped.json", skipped)
    if len(skipped) == info["textures"]:
        raise UserError(f"no texture could be read; the first: {skipped[0]['reason']}")
    write_whole(out / "README.md", DATA_CARD.format(**info).encode())
    remove_partial_files(out, of_all=True)
    _write_json(out / INFO_FILE, {**info, "complete": True})


def _write_json(file: Path, content) -> None:
    write_whole(file, (json.dumps(content) + "\n").encode())


def _check_same_settings(file: Path, info: dict) -> dict:
    """What `file` holds. Raises UserError when that data set was built with other settings than info."""
    try:
        earlier = parse_json(file.read_text())
        earlier["render"] = Render(**earlier["render"]).model_dump()  # keys that came later have their defaults
        changed = [key for key in info if earlier[key] != info[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} ({reason(error)}); choose another --out or delete that folder") from None
    if changed:
        key = changed[0]
        difference = f"{key} {json.dumps(earlier[key])}, not {json.dumps(info[key])}"
        if key == "source":
            difference = "other textures or prompts"
        raise UserError(f"{file.parent} was built with {difference}; choose another --out or delete it")
    return earlier


def verify_dataset(root: str | Path) -> dict[str, int]:
    """Decodes every picture of a finished data set, or of one in the seed's layout → rows of each table. Raises
    UserError naming what is damaged."""
    root = Path(root)
    if not (root / INFO_FILE).exists() and (root / "state.json").exists():
        return _verify_seed_layout(root)
    try:
        info = parse_json((root / INFO_FILE).read_text())
        textures, views, complete = int(info["textures"]), int(info["views"]), info["complete"]
        skipped_file = root / "skipped.json"
        skipped = len(parse_json(skipped_file.read_text())) if skipped_file.exists() else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no data set in {root} ({reason(error)})") from None
    counts = {}
    for table, column in (("textures", "texture"), ("renders", "image")):
        counts[table] = 0
        files = [file for file in sorted((root / table).glob("*.parquet")) if not is_hidden(Path(file.name))]
        for file in tqdm(files, table, unit="shard"):
            try:
                for batch in read_batches(file, [column]):
                    for picture in batch.column(column).to_pylist():
                        open_image(picture["bytes"], f"row {counts[table]}")
                        counts[table] += 1
            except (OSError, KeyError, TypeError, pyarrow.ArrowException, UserError) as error:
                raise UserError(
                    f"{file} is damaged ({reason(error)}); delete it and the same shard's other file, then build again"
                ) from None
    expected = textures - skipped
    if not complete or counts != {"textures": expected, "renders": expected * views}:
        raise UserError(f"{root} is not finished: {counts}; run its build command again")
    return counts


def _verify_seed_layout(root: Path) -> dict[str, int]:
    try:
        rows = open_saved(root)
        columns = [column for column in ("texture", "image") if column in rows.column_names]
        for column in columns:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        whole = {column: int(has_picture(rows, column).sum()) for column in columns}
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read data set {root}: {reason(error)}") from None
    damaged = []
    for number, row in enumerate(tqdm(rows.select_columns(columns), "rows", unit="row")):
        for column in columns:
            try:
                if encoded := stored_picture(row[column], root):  # without a picture the row is left out
                    open_image(encoded, f"{column} of row {number}")
            except UserError as error:
                damaged.append(str(error))
    if damaged:
        raise UserError(f"{len(damaged)} pictures of {root} cannot be read: {' / '.join(damaged[:20])}")
    return {"textures": whole.get("texture", 0), "renders": whole.get("image", 0)}
