"""Tables of pictures on disk, memory-mapped: parquet files through a copy in Arrow's format, `save_to_disk` folders.

`datasets` opens both too, but takes their paths for patterns and URLs: `[`, `*`, `$` or `::` in the name of any folder
above them, and it reads other files or none.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from filelock import FileLock

from common.errors import UserError, reason
from common.files import check_writable, temporary_name
from common.text import parse_json, read_text

ROWS_AT_ONCE = 16  # bounds the memory of copying


def fingerprint(*parts) -> str:
    """A short hash of what a source is made of."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_parquet(files: list[Path], cache_dir: str | Path | None) -> datasets.Dataset:
    """The rows of parquet files, one file after the other, read from a copy in `cache_dir` (None: that of `datasets`)
    which is written when first wanted, by one process for all, and again when a file has changed.

    Raises UserError when a file cannot be read or the copy not be written.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    copy = folder / f"table-{fingerprint(states)}.arrow"
    if not copy.exists():
        check_writable(folder)
        with FileLock(folder / f".{copy.stem}.lock"):
            if not copy.exists():
                _copy_to_arrow(files, copy)
    return datasets.Dataset.from_file(str(copy))


def _copy_to_arrow(files: list[Path], copy: Path) -> None:
    batches = _batches(files)
    first = next(batches, None)
    if first is None:
        raise UserError(f"{files[0].parent} holds no rows")
    partial = temporary_name(copy)
    try:
        with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_stream(sink, first.schema) as writer:
            writer.write(first)
            for batch in batches:
                writer.write(batch)
        os.replace(partial, copy)
    except OSError as error:
        raise UserError(
            f"cannot write {copy}: {reason(error)}; make room or choose another place for the cache (data.cache_dir)"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _batches(files: list[Path]) -> Iterator[pyarrow.RecordBatch]:
    """The rows of all files, a few at a time, as the first file's schema has them."""
    schema = None
    for file in files:
        try:
            for batch in read_batches(file):
                schema = schema or batch.schema
                yield batch.cast(schema)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {file}: {reason(error)}; copy or build it again") from None


def read_batches(file: Path, columns: list[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a parquet file, a few at a time. Raises OSError or ArrowException when it cannot be read."""
    with pyarrow.memory_map(str(file)) as stored:
        yield from pyarrow.parquet.ParquetFile(stored).iter_batches(ROWS_AT_ONCE, columns=columns)


def open_saved(folder: Path) -> datasets.Dataset:
    """The rows that `save_to_disk` wrote into a folder. Raises OSError, ValueError or KeyError when it did not."""
    state = parse_json(read_text(folder / "state.json"))
    info = datasets.DatasetInfo.from_dict(parse_json(read_text(folder / "dataset_info.json")))
    names = [data_file["filename"] for data_file in state["_data_files"]]
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"state.json names {outside[0]!r}, which lies in another folder")
    files = [str(folder / name) for name in names]
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file, info) for file in files])


def picture_paths(table: datasets.Dataset, column: str) -> list[str | None]:
    """The path or file name that each row of a column of pictures keeps."""
    return pyarrow.compute.struct_field(table.data.column(column), "path").to_pylist()


def has_picture(table: datasets.Dataset, column: str) -> np.ndarray:
    """Whether each row of a column of pictures has bytes or a path → (rows) of bool. Decodes nothing."""
    pictures = table.data.column(column)
    filled = np.zeros(len(table), bool)
    for field in ("bytes", "path"):
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(pictures, field))
        filled |= lengths.fill_null(0).to_numpy() > 0
    return filled & pyarrow.compute.is_valid(pictures).to_numpy()


def stored_picture(picture: dict | None, *roots: Path) -> bytes | Path | None:
    """What a row of a column of pictures holds: bytes, or a file below one of `roots`; None for no picture.

    Raises UserError for a path that leads elsewhere: a table from others must not name what is on this machine.
    """
    if not picture or not (picture["bytes"] or picture["path"]):
        return None
    if picture["bytes"]:
        return picture["bytes"]
    for root in roots:
        with suppress(ValueError, TypeError, OSError):  # what is no path, symbolic links in a circle
            path = (root / picture["path"]).resolve()
            if path.is_relative_to(root.resolve()):
                return path
    raise UserError(
        f"{picture['path']!r}, which a row names as its picture, is not in {roots[0]}; put it there, or save the table "
        "with its pictures in it"
    )


def check_prompts(prompts: list, name: str, row_numbers: list[int] | None = None) -> None:
    """Raises UserError where a table's prompts lack one or hold something else; `name` is the table's, row_numbers
    those that the user knows, if not all."""
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            kind = "no prompt" if prompt is None else f"a prompt that is no text but {type(prompt).__name__}"
            number = row_numbers[row] if row_numbers is not None else row
            raise UserError(f"row {number} of {name} has {kind}; give each row its prompt, or leave it out")
