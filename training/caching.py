"""Caches on disk of what training never changes: posteriors of textures, text states, image tokens.

A tensor is found by a hash of what it was made from (the picture's own bytes, the prompt), in a folder named by a
hash of what made it (weights, resolution, precision). So an edited texture, another base or another resolution finds
nothing there and is made anew, and only what changed is. Shards are safetensors files, read through memory maps.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
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
from common import processes
from common.errors import UserError, one_line_errors, reason
from common.files import check_writable, temporary_name, write_whole
from config.configuration import Config
from models.base import BaseModel
from models.conditioning import encode_images, encode_prompts
from models.diffusion import autocast, encode_posterior

ROWS_AT_ONCE = 8
ROWS_PER_SHARD = 256  # whole batches, so that a build cut short goes on with the same ones
VERSION = 1  # raised when the code that makes an entry gives other numbers


class Cache:
    """The tensors in the shards of one folder, by their keys."""

    def __init__(self, folder: Path):
        """Raises UserError when a shard cannot be read."""
        self.shards = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                shard = safe_open(file, "pt")
                self.shards.update(dict.fromkeys(shard.keys(), shard))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cache file {file} is damaged ({reason(error)}); run again with --rebuild-cache"
                ) from None

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def __getitem__(self, key: str) -> Tensor:
        return self.shards[key].get_tensor(key)


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


def digest(*contents: bytes | str) -> str:
    """A short hash of the contents in their order."""
    hasher = hashlib.blake2b(digest_size=16)
    for content in contents:
        data = content.encode() if isinstance(content, str) else content
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """A hash of a module's weights and of its configuration."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    settings = {key: value for key, value in config.items() if not key.startswith("_")}  # such as where it lies
    state = module.state_dict()
    weights = (tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for tensor in state.values())
    weights_bytes = (weight.numpy().tobytes() for weight in weights)
    return digest(json.dumps(settings, sort_keys=True, default=str), *state, *weights_bytes)


def picture_keys(table, column: str, root: Path) -> list[str]:
    """A hash of each picture's bytes, remembered under the table's fingerprint, which changes with its files."""
    memo = root / f"keys-{table._fingerprint}-{column}.json"
    if memo.exists():
        return json.loads(memo.read_text())
    keys, all_inside = [], True
    for row in tqdm(table.select_columns(column), f"{column} keys", unit="row", leave=False):
        content = row[column]["bytes"]
        all_inside &= bool(content)
        keys.append(digest(content or Path(row[column]["path"]).read_bytes()))
    if all_inside:  # pictures outside the table may change without it
        write_whole(memo, json.dumps(keys).encode())
    return keys


def use_caches(
    cfg: Config, base: BaseModel, dataset: ATLASLarge, precision: torch.dtype | None, rebuild: bool = False
) -> None:
    """Builds what the configured caches lack, all processes together, and lets `dataset` read from them.

    Raises UserError when the disk is too small, a cache file is damaged, or what it holds is being trained.
    """
    if cfg.data.cache == "none":
        return
    if cfg.data.cache == "all" and cfg.model.lora.text_encoder_r:
        raise UserError(
            "model.lora.text_encoder_r trains the text encoder, so that its states cannot be cached; set data.cache "
            "to latents or none"
        )
    root = Path(cfg.data.cache_dir) / "encoded"
    check_writable(root)
    for encoding in _encodings(cfg, base, dataset, root, precision):
        folder = root / f"{encoding.name}-{encoding.maker}"
        if rebuild and processes.is_main():
            shutil.rmtree(folder, ignore_errors=True)
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


def _encodings(cfg: Config, base: BaseModel, dataset: ATLASLarge, root: Path, precision) -> list[Encoding]:
    """What data.cache asks for."""

    def encode_textures(pixels: Tensor) -> Tensor:  # (B, 2, 4, h, w)
        return torch.stack(encode_posterior(base.vae, pixels.to(base.device)), dim=1)

    def encode_pictures(pixels: Tensor) -> Tensor:  # (B, T, D')
        # Weights of half precision give tokens of half precision: nothing is lost in half the space.
        return encode_images(base, pixels).to(base.image_encoder.dtype)

    how = (str(VERSION), str(precision))
    maker = digest(weights_digest(base.vae), str(dataset.resolution), *how)
    keys = picture_keys(dataset.textures, "texture", root)
    encodings = [Encoding("posterior", maker, keys, dataset.texture, encode_textures)]
    if cfg.data.cache == "all":
        prompts = [cfg.model.prompt_template.format(prompt=prompt) for prompt in dataset.prompts]
        maker = digest(weights_digest(base.text_encoder), base.tokenizer.backend_tokenizer.to_str(), *how)
        keys = [digest(prompt) for prompt in prompts]
        encode_texts = partial(encode_prompts, base)  # (B, L, D)
        encodings.append(Encoding("text_states", maker, keys, prompts.__getitem__, encode_texts))
    if cfg.data.cache == "all" and dataset.renders is not None:
        settings = (*base.image_processor.image_mean, *base.image_processor.image_std, *dataset.image_size)
        maker = digest(weights_digest(base.image_encoder), *map(str, settings), *how)
        keys = picture_keys(dataset.renders, "image", root)
        encodings.append(Encoding("image_tokens", maker, keys, dataset.image, encode_pictures))
    return encodings


@torch.no_grad()
def _build(folder: Path, encoding: Encoding, missing: dict[str, int], num_workers: int) -> None:
    """Makes this process's shards of the missing entries, {key: row}."""
    check_writable(folder)
    keys = list(missing)
    shards = [keys[start : start + ROWS_PER_SHARD] for start in range(0, len(keys), ROWS_PER_SHARD)]
    is_main = processes.is_main()
    is_space_checked = not is_main
    name = f"cache of {encoding.name}"
    with tqdm(total=len(keys), desc=name, unit="row", disable=not is_main) as progress:
        for shard_keys in shards[processes.rank() :: processes.world_size()]:
            inputs = _Inputs(encoding.read, [missing[key] for key in shard_keys])
            entries = {}
            with one_line_errors():
                for batch in DataLoader(inputs, ROWS_AT_ONCE, num_workers=num_workers):
                    encoded = encoding.encode(batch).cpu()  # (B, ...)
                    if not is_space_checked:
                        _check_space(folder, len(keys), encoded[0], progress)
                        is_space_checked = True
                    for key, entry in zip(shard_keys[len(entries) :], encoded):
                        _check_finite(entry, f"{encoding.name} of row {missing[key]}")
                        entries[key] = entry.clone(memory_format=torch.contiguous_format)
                    progress.update(len(encoded))
            _write(folder / f"{digest(*shard_keys)}.safetensors", entries)


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


def _check_space(folder: Path, count: int, entry: Tensor, progress: tqdm) -> None:
    needed = count * entry.numel() * entry.element_size() / 1e6
    free = shutil.disk_usage(folder).free / 1e6
    progress.write(f"{folder} will take {needed:.1f} MB for {count} rows; {free:.0f} MB are free")
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
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {file}: {reason(error)}; make room: the shards so far are kept") from None
