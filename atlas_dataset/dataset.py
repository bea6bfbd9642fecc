"""`ATLASLarge`: the rows that training reads, textures with their prompts and renders."""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from atlas_dataset.tables import check_prompts, has_picture, open_parquet, open_saved, stored_picture
from atlas_dataset.views import render_texture
from common import processes
from common.errors import UserError, reason
from common.files import is_hidden
from common.pictures import image_from_pixels, open_image, prepare_image
from common.text import parse_json
from config.configuration import Render
from render.rigs import load_rig
from render.uv_space import fill_outside, texture_pixels, uv_mask

INFO_FILE = "atlas_large.json"
TEXTURES_KEPT = 32


class ATLASLarge(Dataset):
    """Rows for training, each picture decoded once.

    root: a folder written by build_atlas_large.py, or the seed's layout (`load_from_disk` with columns `image`,
    `texture`, `prompt`). with_renders: a row for each render; without, for each texture.

    body is the spec of the mesh whose UV layout the textures have; None where the layout does not say.

    A row: texture (3, resolution, resolution) in [-1, 1], filled outside the islands; texture_id; prompt; and with
    renders image (3, *image_size) in [-1, 1], padded with black to that (height, width). Where `cached` (see
    training/caching.py) has them, a row holds posterior instead of texture, image_tokens instead of image, and
    text_states. Rows 0 .. len - 1 come again and again as rows len .. 2 len - 1 and so on: the same, but for renders
    that are made anew (see `render_online`).
    """

    def __init__(
        self,
        root: str | Path,
        with_renders: bool,
        resolution: int,
        image_size: int = 224,
        cache_dir: str | None = None,
    ):
        self.fresh_render: Callable[[int, int], Tensor] | None = None
        self.with_renders, self.resolution, self.image_size = with_renders, resolution, (image_size, image_size)
        self.root = root = Path(root)
        try:
            if (root / INFO_FILE).exists():
                self._open_built(root, cache_dir)
            elif (root / "state.json").exists():
                self._open_seed_layout(root)
            else:
                raise UserError(
                    f"no data set in {root}: neither {INFO_FILE} (build_atlas_large.py writes it) nor the seed's "
                    "state.json; build one with 'python -m atlas_dataset.build_atlas_large'"
                )
            self.prompts = self.textures["prompt"][:]
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read data set {root}: {reason(error)}; build it again") from error
        self.turn_length: int | None = None
        self.rows = np.arange(self._stored_rows())
        if not len(self):
            raise UserError(f"data set {root} has no rows")
        check_prompts(self.prompts, f"data set {root}", self.row_numbers)
        self.decoded: dict[int, Tensor] = {}
        self.cached: dict = {}  # name → row → tensor

    def _open_built(self, root: Path, cache_dir: str | None) -> None:
        info = parse_json((root / INFO_FILE).read_text())
        self.body = info["body"]
        if not info.get("complete"):
            raise UserError(
                f"data set {root} is not finished; run its build command again, it goes on where it stopped"
            )

        def table(name):
            files = sorted(path for path in (root / name).glob("*.parquet") if not is_hidden(Path(path.name)))
            if not files:
                raise FileNotFoundError(f"{name}/*.parquet are missing")
            return open_parquet(files, cache_dir)

        self.row_numbers = None
        self.textures = table("textures").cast_column("texture", datasets.Image(decode=False))
        self.renders = None
        if self.with_renders and info["views"]:
            self.renders = table("renders").cast_column("image", datasets.Image(decode=False))
            position = {texture_id: row for row, texture_id in enumerate(self.textures["texture_id"])}
            self.texture_rows = [position[texture_id] for texture_id in self.renders["texture_id"]]

    def _open_seed_layout(self, root: Path) -> None:
        rows = open_saved(root)
        missing = {"texture", "prompt", *({"image"} if self.with_renders else ())} - set(rows.column_names)
        if missing:
            raise UserError(f"data set {root} lacks the columns {sorted(missing)}; it has {rows.column_names}")
        for column in {"texture", "image"} & set(rows.column_names):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        rows = self._leave_out_rows_without_picture(rows, root)
        self.textures = rows.remove_columns("image") if "image" in rows.column_names else rows
        self.renders = rows.remove_columns("texture") if self.with_renders else None
        self.texture_rows = range(len(rows))
        self.body = None

    def _leave_out_rows_without_picture(self, rows: datasets.Dataset, root: Path) -> datasets.Dataset:
        """The same rows are left out whenever the data set is opened, before any is numbered: what comes after them
        has the same order in each run. A picture that is there and cannot be decoded is an error instead."""
        whole = has_picture(rows, "texture")
        if self.with_renders:
            whole &= has_picture(rows, "image")
        self.row_numbers = np.flatnonzero(whole).tolist()
        missing = np.flatnonzero(~whole).tolist()
        if not missing:
            return rows
        columns = "'texture' or 'image'" if self.with_renders else "'texture'"
        if not self.row_numbers:
            raise UserError(f"no row of data set {root} has a picture in {columns}; build it again")
        if processes.is_main():
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            text = f"{len(missing)} of {len(rows)} rows of data set {root} have no picture in {columns}"
            print(f"{text} and are left out: {shown}", file=sys.stderr)
        return rows.select(self.row_numbers)

    def _number(self, row: int) -> int:
        """The number of a row in the data set as it is stored, for messages."""
        return self.row_numbers[row] if self.row_numbers is not None else row

    def render_online(self, render: Render, body: str, views_per_texture: int, seed: int) -> None:
        """From now on `views_per_texture` rows a texture, whose renders are made when they are read: no two epochs
        show the same. Stored renders are not read.
        """
        mask = uv_mask(load_rig(body, render.poses).body, self.resolution)
        self.renders = None
        self.texture_rows = [row for row in range(len(self.textures)) for _ in range(views_per_texture)]
        self.fresh_render = partial(self._fresh_render, render, body, mask, seed)  # not a closure: workers unpickle it
        self.rows = np.arange(self._stored_rows())

    def _fresh_render(
        self, render: Render, body: str, mask: Tensor, seed: int, texture_row: int, number: int
    ) -> Tensor:
        rig, height = load_rig(body, render.poses), self.image_size[0]
        texture, size = fill_outside(self.texture(texture_row), mask), (height, height * 3 // 4)
        picture, _ = render_texture(rig, texture, render, seed, texture_row, [number], *size)[0]
        return prepare_image(image_from_pixels(picture), self.image_size)

    def render_shape(self) -> tuple[int, int]:
        """(height, width) of the first stored render; a square where there is none."""
        if self.renders is None:
            return 1, 1
        return self._open(self.renders[0]["image"], f"image of row {self._number(0)}").size[::-1]

    def _stored_rows(self) -> int:
        """Renders where there are any, or else textures."""
        return len(self.texture_rows) if self._has_images else len(self.textures)

    @property
    def _has_images(self) -> bool:
        return self.renders is not None or self.fresh_render is not None

    def _texture_row(self, row: int) -> int:
        return self.texture_rows[row] if self._has_images else row

    def hold_out(self, count: int) -> "ATLASLarge":
        """Takes the rows of `count` textures out of this data set → one with the first render of each.

        They are the same for every run on the same rows. Raises UserError when none would be left.
        """
        if count >= len(self.textures):
            raise UserError(
                f"data.validation_textures {count} leaves none of {len(self.textures)} textures to train on; "
                "set it lower, 0 holds none out"
            )
        chosen = set(np.random.default_rng(0).permutation(len(self.textures))[:count].tolist())
        held_out, first_rows, kept_rows = copy.copy(self), {}, []
        for row in self.rows.tolist():
            if self._texture_row(row) in chosen:
                first_rows.setdefault(self._texture_row(row), row)
            else:
                kept_rows.append(row)
        held_out.rows = np.array(sorted(first_rows.values()), np.int64)
        self.rows = np.array(kept_rows, np.int64)
        return held_out

    def hold_out_in_turn(self, turn_length: int) -> None:
        """From now on an epoch is a turn for each row, of `turn_length` rows that are all but that one, as often as
        each other; with fewer than three rows, of all."""
        rows = len(self)
        turns = [np.delete(self.rows, turn) if rows > 2 else self.rows for turn in range(rows)]
        self.rows = np.concatenate([np.resize(np.roll(turn, -place), turn_length) for place, turn in enumerate(turns)])
        self.turn_length = turn_length

    def __len__(self) -> int:
        return len(self.rows)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """All rows in random order, the renders of a texture near each other: textures are drawn TEXTURES_KEPT at a
        time and their rows shuffled among themselves, so that each is decoded once an epoch and not once a render.
        """
        if self.turn_length:
            starts = range(0, len(self), self.turn_length)
            return np.concatenate([start + rng.permutation(self.turn_length) for start in starts])
        if not self._has_images:
            return rng.permutation(len(self))
        group = np.empty(len(self.textures), np.int64)  # of each texture
        group[rng.permutation(len(self.textures))] = np.arange(len(self.textures)) // TEXTURES_KEPT
        group_of_row = group[np.asarray(self.texture_rows)[self.rows]]
        return np.lexsort((rng.permutation(len(self)), group_of_row))

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        row = int(self.rows[index % len(self)])
        texture_row, cached = self._texture_row(row), self.cached
        sample = {"prompt": self.prompts[texture_row], "texture_id": texture_row}
        if "posterior" in cached:
            sample["posterior"] = cached["posterior"][texture_row]
        else:
            sample["texture"] = self.texture(texture_row)
        if "text_states" in cached:
            sample["text_states"] = cached["text_states"][texture_row]
        if "image_tokens" in cached:
            sample["image_tokens"] = cached["image_tokens"][row]
        elif self._has_images:
            sample["image"] = self.image(row, index)
        return sample

    def picture(self, index: int) -> Tensor:
        """The render that row `index` shows, cached or not: (3, *image_size) in [-1, 1]."""
        return self.image(int(self.rows[index]), index)

    def image(self, row: int, number: int = 0) -> Tensor:
        """Stored render `row`, or the fresh render number `number` of its texture."""
        if self.fresh_render:
            return self.fresh_render(self.texture_rows[row], number)
        image = self._open(self.renders[row]["image"], f"image of row {self._number(row)}", max(self.image_size))
        return prepare_image(image, self.image_size)

    def texture(self, row: int) -> Tensor:
        """Texture `row`, kept for the next of its renders: a small set is decoded once in all."""
        if row not in self.decoded:
            if len(self.decoded) >= TEXTURES_KEPT:
                del self.decoded[next(iter(self.decoded))]
            image = self._open(self.textures[row]["texture"], f"texture {self._number(row)}")
            self.decoded[row] = texture_pixels(image, self.resolution)
        return self.decoded[row]

    def _open(self, picture: dict | None, name: str, size: int | None = None) -> Image.Image:
        """A picture that is there and cannot be decoded ends the run: that is seen when it is met, and to go on
        without it would give other rows to each step after it, and to a resumed run."""
        encoded = stored_picture(picture, self.root)
        if encoded is None:
            raise UserError(f"{name} of data set {self.root} is missing; build it again")
        try:
            return open_image(encoded, f"{name} of data set {self.root}", size)
        except UserError as error:
            verify = f"python -m atlas_dataset.build_atlas_large --verify --out {self.root}"
            raise UserError(f"{error}; '{verify}' names all such pictures") from None


def data_set_source(root: str | Path) -> str | None:
    """The fingerprint of the textures that build_atlas_large.py wrote a data set from; None where none is said."""
    try:
        return parse_json((Path(root) / INFO_FILE).read_text()).get("source")
    except (OSError, ValueError, AttributeError):
        return None
