"""Caches on disk of what training never changes: posteriors of textures, text states, image tokens.

A tensor is found by a hash of what it was made from (the picture's own bytes, the prompt), in a folder named by a
hash of what made it (weights, resolution, precision). So an edited texture, another base or another resolution finds
nothing there and is made anew, and only what changed is. Shards are safetensors files, read through memory maps.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from atlas_dataset.dataset import ATLASLarge
from atlas_dataset.tables import stored_picture
from common import processes
from common.errors import UserError, one_line_errors, reason
from common.files import check_writable, content_hash, temporary_name, write_whole
from common.progress import progress
from config.configuration import Config
from models.base import BaseModel
from models.conditioning import encode_images, encode_prompts
from models.diffusion import autocast, encode_posterior
from training.stopping import leave_signals_to_the_main_process

ROWS_AT_ONCE = 8
ROWS_PER_SHARD = 256  # whole batches, so that a build cut short goes on with the same ones
VERSION = 1  # raised when the code that makes an entry gives other numbers


class Cache:
    """The tensors in the shards of one folder, by their keys.

    Pickled, as for the workers of a loader, it holds no open file: each process opens its own.
    """

    def __init__(self, folder: Path):
        """Raises UserError when a shard cannot be read."""
        self.open_shards = {}
        self.file_of = {}  # key → shard
        for file in sorted(folder.glob("*.safetensors")):
            self.file_of.update(dict.fromkeys(self._shard(file).keys(), file))

    def _shard(self, file: Path) -> safe_open:
        if file not in self.open_shards:
            try:
                self.open_shards[file] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cache file {file} is damaged ({reason(error)}); run again with --rebuild-cache"
                ) from None
        return self.open_shards[file]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "open_shards": {}}

    def __contains__(self, key: str) -> bool:
        return key in self.file_of

    def __getitem__(self, key: str) -> Tensor:
        return self._shard(self.file_of[key]).get_tensor(key)


@dataclass
class CachedRows:
    """Row numbers → tensors of a cache."""

    cache: Cache
    keys: list[str]

    def __getitem__(self, row: int) -> Tensor:
        return self.cache[self.keys[row]]


@dataclass
class Encoding:
    """One kind of entry: of which rows, and how each is made."""

    name: str
    maker: str  # hash of the weights and settings
    keys: list[str]  # of each row
    read: Callable[[int], object]  # row → what is encoded
    encode: Callable[[object], Tensor]  # a batch of those → entries (B, ...)


def weights_digest(module: torch.nn.Module) -> str:
    """A hash of a module's weights and of its configuration."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    settings = {key: value for key, value in config.items() if not key.startswith("_")}  # such as where it lies
    state = module.state_dict()
    weights = (tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for tensor in state.values())
    weights_bytes = (weight.numpy().tobytes() for weight in weights)
    return content_hash(json.dumps(settings, sort_keys=True, default=str), *state, *weights_bytes)


def picture_keys(table, column: str, folder: Path, root: Path, rebuild: bool = False) -> list[str]:
    """A hash of each picture's bytes, remembered in `root` as long as the table's files are the same. folder: of the
    table, in which a picture may be a file. Raises UserError when one cannot be read."""
    memo = root / f"keys-{files_digest(table)}-{column}.json"
    if not rebuild and memo.exists():
        with suppress(ValueError):  # damaged: made anew
            keys = json.loads(memo.read_bytes())
            if len(keys) == len(table):
                return keys
    keys, is_inside = [], bool(table.cache_files)
    for row in progress(table.select_columns(column), f"{column} keys", unit="row", leave=False):
        content = stored_picture(row[column], folder)
        if content is None:
            raise UserError(f"row {len(keys)} of {folder} has no picture; build it again")
        is_inside &= isinstance(content, bytes)
        keys.append(content_hash(content if isinstance(content, bytes) else _read_picture(content)))
    if is_inside:  # pictures outside the table may change without it
        write_whole(memo, json.dumps(keys).encode())
    return keys


def files_digest(table) -> str:
    """A hash of a table's fingerprint and of its files' names, sizes and times.

    The fingerprint alone says how a table was made: it stays when the same code reads other pictures. The time of the
    last change of an inode (st_ctime) cannot be set back, as a modification time can.
    """
    identities = []
    for file in table.cache_files:
        status = os.stat(file["filename"])
        identities.append(f"{file['filename']} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return content_hash(table._fingerprint, *identities)


def _read_picture(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read picture {path}: {reason(error)}") from None


def use_caches(
    cfg: Config, base: BaseModel, dataset: ATLASLarge, precision: torch.dtype | None, rebuild: bool = False
) -> None:
    """Builds what the configured caches lack, all processes together, and lets `dataset` read from them.

    Raises UserError when the disk is too small, a cache file is damaged, or what it holds is being trained.
    """
    if cfg.data.cache == "none":
        return
    trained_encoders = {"text": cfg.model.lora.text_encoder_r}
    if dataset.renders is not None:
        trained_encoders["image"] = cfg.model.lora.image_encoder_r
    for kind, rank in trained_encoders.items():
        if cfg.data.cache == "all" and rank:
            raise UserError(
                f"model.lora.{kind}_encoder_r trains the {kind} encoder, so that what it gives cannot be cached; set "
                "data.cache to latents or none"
            )
    root = Path(cfg.data.cache_dir) / "encoded"
    check_writable(root)
    for encoding in _encodings(cfg, base, dataset, root, precision, rebuild):
        folder = root / f"{encoding.name}-{encoding.maker}"
        if rebuild and processes.is_main():
            _remove(folder)
        processes.wait()
        cache = Cache(folder)
        missing = {key: row for row, key in enumerate(encoding.keys) if key not in cache}
        processes.wait()  # all have looked before any writes
        if missing:
            with autocast(base.device, precision):
                _build(folder, encoding, missing, cfg.data.num_workers)
            processes.wait()
            cache = Cache(folder)
        dataset.cached[encoding.name] = CachedRows(cache, encoding.keys)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot delete {folder}: {reason(error)}; delete it by hand") from None


def _encodings(
    cfg: Config, base: BaseModel, dataset: ATLASLarge, root: Path, precision: torch.dtype | None, rebuild: bool
) -> list[Encoding]:
    """What data.cache asks for."""

    def encode_textures(pixels: Tensor) -> Tensor:  # (B, 2, 4, h, w)
        return torch.stack(encode_posterior(base.vae, pixels.to(base.device)), dim=1)

    def encode_pictures(pixels: Tensor) -> Tensor:  # (B, T, D')
        # Weights of half precision give tokens of half precision: nothing is lost in half the space.
        return encode_images(base, pixels).to(base.image_encoder.dtype)

    how = (str(VERSION), str(precision))
    maker = content_hash(weights_digest(base.vae), str(dataset.resolution), *how)
    keys = picture_keys(dataset.textures, "texture", dataset.root, root, rebuild)
    encodings = [Encoding("posterior", maker, keys, dataset.texture, encode_textures)]
    if cfg.data.cache == "all":
        prompts = [cfg.model.prompt_template.format(prompt=prompt) for prompt in dataset.prompts]
        maker = content_hash(weights_digest(base.text_encoder), base.tokenizer.backend_tokenizer.to_str(), *how)
        keys = [content_hash(prompt) for prompt in prompts]
        encode_texts = partial(encode_prompts, base)  # (B, L, D)
        encodings.append(Encoding("text_states", maker, keys, prompts.__getitem__, encode_texts))
    if cfg.data.cache == "all" and dataset.renders is not None:
        settings = (*base.image_processor.image_mean, *base.image_processor.image_std, *dataset.image_size)
        maker = content_hash(weights_digest(base.image_encoder), *map(str, settings), *how)
        keys = picture_keys(dataset.renders, "image", dataset.root, root, rebuild)
        encodings.append(Encoding("image_tokens", maker, keys, dataset.image, encode_pictures))
    return encodings


@torch.no_grad()
def _build(folder: Path, encoding: Encoding, missing: dict[str, int], num_workers: int) -> None:
    """Makes this process's shards of the missing entries, {key: row}."""
    check_writable(folder)
    keys = list(missing)
    shards = [keys[start : start + ROWS_PER_SHARD] for start in range(0, len(keys), ROWS_PER_SHARD)]
    is_space_checked = not processes.is_main()
    with progress(total=len(keys), desc=f"cache of {encoding.name}", unit="row") as bar:
        for shard_keys in shards[processes.rank() :: processes.world_size()]:
            inputs = _Inputs(encoding.read, [missing[key] for key in shard_keys])
            loader = DataLoader(
                inputs, ROWS_AT_ONCE, num_workers=num_workers, worker_init_fn=leave_signals_to_the_main_process
            )
            entries = {}
            with one_line_errors():
                for batch in loader:
                    encoded = encoding.encode(batch).cpu()  # (B, ...)
                    if not is_space_checked:
                        _check_space(folder, len(keys), encoded[0], bar)
                        is_space_checked = True
                    for key, entry in zip(shard_keys[len(entries) :], encoded):
                        _check_finite(entry, f"{encoding.name} of row {missing[key]}")
                        entries[key] = entry.clone(memory_format=torch.contiguous_format)
                    bar.update(len(encoded))
            _write(folder / f"{content_hash(*shard_keys)}.safetensors", entries)


class _Inputs(torch.utils.data.Dataset):
    """What `read` gives for some rows."""

    def __init__(self, read: Callable[[int], object], rows: list[int]):
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.read(self.rows[index])


def _check_finite(entry: Tensor, name: str) -> None:
    if not entry.isfinite().all():
        raise UserError(f"{name} is not finite; set training.mixed_precision to bf16 or no")


def _check_space(folder: Path, count: int, entry: Tensor, bar: tqdm) -> None:
    needed = count * entry.numel() * entry.element_size() / 1e6
    free = shutil.disk_usage(folder).free / 1e6
    bar.write(f"{folder} will take {needed:.1f} MB for {count} rows; {free:.0f} MB are free")
    if needed > free:
        raise UserError(
            f"{folder} needs {needed:.1f} MB but {free:.0f} MB are free; set data.cache_dir to another disk or "
            "data.cache to none"
        )


def _write(file: Path, entries: dict[str, Tensor]) -> None:
    partial = temporary_name(file)
    try:
        safetensors.torch.save_file(entries, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file}: {reason(error)}; make room: the shards so far are kept") from None
    finally:  # Ctrl-C too
        partial.unlink(missing_ok=True)
