"""Textures to build a data set from, with their prompts: ATLAS, or any folder of pictures."""

import hashlib
import json
from pathlib import Path

import datasets
from torch.utils.data import Dataset

from common.errors import UserError, reason
from common.pictures import is_picture


def fingerprint(*parts) -> str:
    """A short hash of what a source is made of."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; the last line may lack its line break."""
    try:
        prompts = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts {path}: {reason(error)}; give a text file with a prompt a line") from None
    empty = next((number for number, prompt in enumerate(prompts, 1) if not prompt.strip()), None)
    if empty:
        raise UserError(f"prompts {path}: line {empty} is empty; each line is one texture's prompt")
    return [prompt.strip() for prompt in prompts]


class HuggingFaceATLAS(Dataset):
    """ATLAS textures as encoded pictures with their prompts, row by row.

    source: a folder of pictures (in the order of their names), or ATLAS as on the hub: its hub name, or a local
    copy of its parquet files, or its `save_to_disk` folder, with one column `image`. prompts: text file, a prompt
    a line, in row order. A row is (encoded picture, prompt).
    """

    def __init__(self, source: str, prompts: str | Path | None, cache_dir: str | None = None):
        folder = Path(source)
        pictures = sorted(path for path in folder.glob("*") if is_picture(path)) if folder.is_dir() else []
        self.rows = pictures or self._open_atlas(source, cache_dir)
        if prompts is None:
            raise UserError("ATLAS keeps its prompts apart; give their file with --prompts")
        self.prompts = read_prompts(prompts)
        if len(self.rows) > len(self.prompts):
            raise UserError(
                f"{len(self.rows)} textures in {source} but {len(self.prompts)} prompts in {prompts}; "
                "give a line for each texture"
            )

    @staticmethod
    def _open_atlas(source: str, cache_dir: str | None) -> datasets.Dataset:
        folder = Path(source)
        try:
            if (folder / "state.json").exists():
                rows = datasets.load_from_disk(source)
            elif folder.is_dir() or (source.count("/") == 1 and not folder.is_absolute() and not folder.exists()):
                rows = datasets.load_dataset(source, split="train", cache_dir=cache_dir)
            else:
                raise FileNotFoundError("no such folder")
        except Exception as error:  # `datasets` raises many kinds
            raise UserError(
                f"no textures in {source} ({reason(error)}); give a folder of PNG files or a copy of ATLAS"
            ) from error
        if "image" not in rows.column_names:
            raise UserError(f"{source} has columns {rows.column_names}; ATLAS has 'image'")
        return rows.cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def limit(self, count: int | None) -> None:
        """Keeps the first `count` rows; None keeps all."""
        if count is not None and count < len(self):
            self.rows = self.rows[:count] if isinstance(self.rows, list) else self.rows.select(range(count))

    def fingerprint(self) -> str:
        """Changes with the prompts, and with the names and sizes of the files or the table they are in."""
        if isinstance(self.rows, list):
            rows = [(path.name, path.stat().st_size) for path in self.rows]
        else:
            rows = (self.rows.num_rows, self.rows.info.dataset_size, self.rows.info.size_in_bytes)
        return fingerprint(rows, self.prompts[: len(self)])

    def name(self, index: int) -> str:
        """What a row's texture is called in messages."""
        return str(self.rows[index]) if isinstance(self.rows, list) else f"texture {index} ({self.prompts[index]})"

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        if isinstance(self.rows, list):
            return self._read(self.rows[index], index), self.prompts[index]
        picture = self.rows[index]["image"] or {"bytes": None, "path": None}
        return picture["bytes"] or self._read(picture["path"], index), self.prompts[index]

    def _read(self, path: str | Path | None, index: int) -> bytes:
        try:
            return Path(path).read_bytes()
        except (OSError, TypeError) as error:
            raise UserError(f"cannot read picture {self.name(index)}: {reason(error)}") from None
