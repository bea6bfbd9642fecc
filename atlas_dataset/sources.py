"""Textures to build a data set from, with their prompts: ATLAS, or any folder of pictures."""

from pathlib import Path

import datasets
from huggingface_hub.constants import HF_HUB_CACHE
from torch.utils.data import Dataset

from atlas_dataset.dataset import INFO_FILE
from atlas_dataset.prompts import LAYOUTS, PROMPT_COLUMNS, prompts_in_folder, read_prompts
from atlas_dataset.tables import check_prompts, fingerprint, open_parquet, open_saved, picture_paths, stored_picture
from common.errors import UserError, reason
from common.files import is_hidden, natural_order
from common.pictures import is_picture, picture_files


class HuggingFaceATLAS(Dataset):
    """Textures as encoded pictures with their prompts, row by row.

    source: a folder of pictures, in the natural order of their names; or ATLAS as on the hub: its hub name, a local
    copy of its parquet files, or its `save_to_disk` folder, with a column `image`. prompts: what `read_prompts` reads;
    None: what the folder carries itself, or the table's column of prompts. limit: only the first so many rows. A row
    is (encoded picture, prompt). Raises UserError for what cannot be read or paired.
    """

    def __init__(
        self,
        source: str,
        prompts: str | Path | None = None,
        cache_dir: str | None = None,
        limit: int | None = None,
    ):
        self.source, self.parquet_files = Path(source), train_files(Path(source))
        # Where pictures may be that a table names: in the folder itself, or where `datasets` keeps those of the hub.
        downloads = (cache_dir or datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
        self.roots = [self.source] if self.source.exists() else [Path(folder) for folder in downloads]
        self.rows = self._open_table(source, cache_dir)
        self.pictures = picture_files(source) if self.rows is None else None
        self.names = self._names()
        count = len(self.names or self.rows)
        if prompts is None and self.pictures:
            prompts = prompts_in_folder(self.source, self.names)
        if prompts is not None:
            folder = self.source if self.pictures else Path()
            self.prompts = read_prompts(Path(prompts), self.names, count, folder, limit)
        else:
            self.prompts = self._prompt_column()
        self.count = min(count, limit or count)

    def _open_table(self, source: str, cache_dir: str | None) -> datasets.Dataset | None:
        """The table that `source` is; None for a folder of pictures."""
        if (self.source / INFO_FILE).exists():
            raise UserError(f"{source} is a finished data set; --textures are the pictures that one is built from")
        try:
            if (self.source / "state.json").exists():
                rows = open_saved(self.source)
            elif self.parquet_files:
                rows = open_parquet(self.parquet_files, cache_dir)
            elif self.source.is_dir() and any(map(is_picture, self.source.iterdir())):
                return None
            elif self.source.is_dir() or (source.count("/") == 1 and not self.source.is_absolute()):
                rows = datasets.load_dataset(source, split="train", cache_dir=cache_dir)
            else:
                raise FileNotFoundError("no such folder")
        except UserError:
            raise
        except Exception as error:  # `datasets` raises many kinds
            raise UserError(
                f"no textures in {source} ({reason(error)}); give a folder of PNG files or a copy of ATLAS"
            ) from error
        if "image" not in rows.column_names:
            raise UserError(f"{source} has columns {rows.column_names}; ATLAS has 'image'")
        return rows.cast_column("image", datasets.Image(decode=False))

    def _names(self) -> list[str] | None:
        """The textures' file names; None for a table that does not keep them, each once."""
        if self.pictures:
            return [path.name for path in self.pictures]
        names = picture_paths(self.rows, "image")
        return names if all(names) and len(set(names)) == len(names) else None

    def _prompt_column(self) -> list[str]:
        columns = [] if self.rows is None else self.rows.column_names
        column = next((name for name in PROMPT_COLUMNS if name in columns), None)
        if column is None:
            raise UserError(f"{self.source} holds no prompts; give them with --prompts: {LAYOUTS}")
        prompts = self.rows[column][:]
        check_prompts(prompts, str(self.source))
        return prompts

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """Changes with the prompts, and with the names and sizes of the files or the table they are in."""
        files = (self.pictures or [])[: self.count] or self.parquet_files
        state: list | tuple = [(path.name, path.stat().st_size) for path in files]
        if not state:
            state = (self.count, self.rows.info.dataset_size, self.rows.info.size_in_bytes)
        return fingerprint(state, self.prompts[: self.count])

    def name(self, index: int) -> str:
        """What a row's texture is called in messages."""
        return str(self.pictures[index]) if self.pictures else f"texture {index} ({self.prompts[index]})"

    def pair(self, index: int) -> str:
        """A row's texture and prompt, for people to see whether they belong together."""
        return f"{self.names[index] if self.names else f'texture {index}'}: {self.prompts[index]}"

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        if self.pictures:
            return self._read(self.pictures[index], index), self.prompts[index]
        picture = stored_picture(self.rows[index]["image"], *self.roots)
        return picture if isinstance(picture, bytes) else self._read(picture, index), self.prompts[index]

    def _read(self, path: str | Path | None, index: int) -> bytes:
        if path is None:
            raise UserError(f"cannot read {self.name(index)}: its row has no picture")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read picture {self.name(index)}: {reason(error)}") from None


def train_files(folder: Path) -> list[Path]:
    """The parquet files in a folder, hidden ones apart; those for training, where their names say so."""
    files = [path for path in folder.rglob("*.parquet") if not is_hidden(path.relative_to(folder))]
    files.sort(key=lambda path: natural_order(path.relative_to(folder)))
    return [path for path in files if "train" in str(path.relative_to(folder))] or files
