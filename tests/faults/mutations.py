"""Damage to small valid files: what a reader is given in the fuzz tests. All is drawn from one random.Random."""

import copy
import io
import json
import pickle
import random
import struct
import warnings
import zipfile
import zlib

import numpy as np
import safetensors.torch
import torch

WORDS = [
    "nan", "inf", "-inf", "1e999", "-1", "0", "1", "9" * 30, "-" + "9" * 30, "1e-320", "0x10", "1_0", "\ufeff",
    "\0", "é", "\u2028", "\u202e", "/", "//", "\\", "{", "}", "[", "]", '"', "'", ":", ",", ";", "\t", "\r", "\n",
    "null", "true", "no", "~", "!!python/name:os.system", "!a", "&a", "*a", "<<", "%", "#", "-", "--", "..", "../..",
    "|", ">", "?",
    "\x1b[2J", "\U0001f469", "9" * 5000, "[" * 200, "2001-01-01", "1:30",
    "=", "",
]  # fmt: skip
VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, -1e-320, float("nan"), float("inf"), 2**31, 2**63, 2**70, -(2**70),
    "", "a", "0", "1", "nan", "\0", "\ud800", "../x", "é" * 300, [], {}, [None], [1], [1, 2, 3], [[1], [2, 3]],
    [[1.0] * 3] * 3, [[[0.0]]], {"a": 1}, {"": {}}, [{}], ["a"], [1e308] * 3, [0] * 72, [[0.0] * 10] * 2,
]  # fmt: skip
BYTES = [0, 1, 2, 9, 10, 13, 32, 34, 46, 47, 92, 127, 128, 129, 254, 255]
DTYPES = ["<f4", "<f8", "<f2", ">f8", "<i4", "<i8", "|u1", "|b1", "<U4", "|S4", "<c16", "<u8"]
TENSOR_DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four bytes or runs changed, put in, taken out, doubled; or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        run = rng.choice((1, 1, 2, 4, 8, 32))
        if kind < 2:
            data[place : place + 1] = bytes([rng.choice(BYTES)])
        elif kind == 2 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[place:place] = bytes(rng.choice(BYTES) for _ in range(run))
        elif kind == 4:
            del data[place : place + run]
        elif kind == 5:
            data[place:place] = data[place : place + run]
        elif kind == 6:
            number = rng.choice((0, 1, 255, 1 << 15, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1))
            data[place : place + 8] = struct.pack(rng.choice("<>") + "Q", number)
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def damaged_text(rng: random.Random, text: str) -> str:
    """Words and lines changed, put in, taken out, doubled, brought into another order."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(7)
        lines = text.split("\n")
        line = rng.randrange(len(lines))
        words = lines[line].split(" ")
        word = rng.randrange(len(words))
        if kind < 2:
            words[word] = rng.choice(WORDS)
        elif kind == 2:
            words.insert(word, rng.choice(WORDS))
        elif kind == 3:
            del words[word]
        elif kind == 4:
            place = rng.randrange(len(words[word]) + 1)
            words[word] = words[word][:place] + rng.choice(WORDS) + words[word][place + rng.randrange(2) :]
        lines[line] = " ".join(words)
        if kind == 5:
            lines.insert(rng.randrange(len(lines) + 1), lines[line])
        elif kind == 6:
            del lines[line]
        text = "\n".join(lines)
        if not text:
            break
    return text


def encoded(rng: random.Random, text: str) -> bytes:
    """Mostly UTF-8, at times in another encoding or with damaged bytes."""
    how = rng.random()
    if how < 0.8:
        return text.encode("utf-8", "surrogatepass")
    if how < 0.9:
        return damaged_bytes(rng, text.encode("utf-8", "surrogatepass"))
    return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "utf-16-be")), "surrogatepass")


def damaged_value(rng: random.Random, value):
    """A copy of dictionaries and lists with one to three of its values or names changed, left out or put in."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder = value
        while isinstance(holder, dict | list) and holder:
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
                holder = holder[key]
                continue
            kind = rng.randrange(5)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[rng.choice(("", "a", "\0", "scale", "pose", "é"))] = holder.pop(key)
            else:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return value


def damaged_json(rng: random.Random, value) -> bytes:
    text = json.dumps(damaged_value(rng, value), ensure_ascii=rng.random() < 0.9)
    return encoded(rng, text if rng.random() < 0.8 else damaged_text(rng, text))


def damaged_array(rng: random.Random, array: np.ndarray):
    """The array with other numbers, another type, another shape; or something else."""
    kind = rng.randrange(7)
    if kind == 0 and array.size and array.dtype.kind == "f":
        array = array.copy()
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -1e300, 0, 1e-300))
        return array
    if kind == 1:
        try:
            return array.astype(rng.choice(DTYPES))
        except (ValueError, TypeError, OverflowError):
            return array
    if kind == 2:
        return array[: rng.randrange(len(array) + 1)] if array.ndim else array[None]
    if kind == 3:
        return array.reshape(-1) if rng.random() < 0.5 else array[None]
    if kind == 4:
        return np.array(rng.choice(VALUES), dtype=object)
    if kind == 5:
        return np.zeros(rng.choice(((), (0,), (1,), (0, 3), (3, 0), (2, 72), (1, 156))))
    return array * rng.choice((0.0, -1.0, 1e30)) if array.dtype.kind in "fiu" else array[..., None]


def damaged_arrays(rng: random.Random, arrays: dict) -> dict:
    arrays = dict(arrays)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(arrays))
        if rng.random() < 0.15:
            del arrays[name]
        elif isinstance(arrays[name], np.ndarray):
            arrays[name] = damaged_array(rng, arrays[name])
        else:
            arrays[name] = copy.deepcopy(rng.choice(VALUES))
        if not arrays:
            break
    return arrays


def damaged_npz(rng: random.Random, arrays: dict) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        damaged = damaged_arrays(rng, arrays)
        lists = {name: np.array(value, dtype=object) for name, value in damaged.items() if isinstance(value, list)}
        np.savez(file, **{**damaged, **lists})
    return file.getvalue() if rng.random() < 0.6 else damaged_zip(rng, file.getvalue())


def damaged_zip(rng: random.Random, data: bytes) -> bytes:
    """Damage inside an entry, whose checksum is right again; or in the archive itself."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, data)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, "w") as copied:
        names = archive.namelist()
        if not names:
            return damaged_bytes(rng, data)
        chosen = rng.choice(names)
        for name in names:
            content = archive.read(name)
            copied.writestr(name, damaged_bytes(rng, content) if name == chosen else content)
    return file.getvalue()


def damaged_pickle(rng: random.Random, content: dict) -> bytes:
    if rng.random() < 0.5:
        return damaged_bytes(rng, pickle.dumps(content, rng.choice((0, 2, 4, 5))))
    return pickle.dumps(damaged_arrays(rng, content), rng.choice((0, 2, 4, 5)))


def damaged_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    kind = rng.randrange(6)
    if kind == 0:
        return tensor.to(rng.choice(TENSOR_DTYPES))
    if kind == 1:
        return tensor[: rng.randrange(len(tensor) + 1)].contiguous() if tensor.ndim else tensor[None]
    if kind == 2:
        return tensor.flatten()
    if kind == 3:
        return tensor[None]
    if kind == 4:
        return torch.zeros(rng.choice(((), (0,), (1,), (0, 3), (3, 0), (4, 4), (2, 3, 1, 1))))
    return tensor * rng.choice((float("nan"), float("inf"), 0, 1e38))


def damaged_tensors(rng: random.Random, tensors: dict) -> dict:
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not tensors:
            break
        name = rng.choice(list(tensors))
        tensor, kind = tensors.pop(name), rng.randrange(6)
        if kind == 0:
            continue
        if kind == 1:
            place = rng.randrange(len(name) + 1)
            name = name[:place] + rng.choice(("", ".", "_", "a", "é", "lora_", ".alpha", "\0")) + name[place + 1 :]
        elif kind < 5:
            tensor = damaged_tensor(rng, tensor)
        tensors[name] = tensor
        if kind == 5:
            tensors[name + rng.choice((".alpha", ".dora_scale", "x", ".diff"))] = tensor.clone()
    return tensors


def damaged_safetensors(rng: random.Random, tensors: dict, metadata: dict[str, str] | None = None) -> bytes:
    """Other tensors; another header, whose length is right again; or damaged bytes."""
    how = rng.random()
    if how < 0.5:
        metadata = {
            name: damaged_text(rng, text) if rng.random() < 0.3 else text for name, text in (metadata or {}).items()
        }
        return safetensors.torch.save(damaged_tensors(rng, tensors), metadata)
    data = safetensors.torch.save(tensors, metadata)
    if how < 0.75:
        return damaged_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = json.dumps(damaged_value(rng, header)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damaged_torch_file(rng: random.Random, content) -> bytes:
    file = io.BytesIO()
    if isinstance(content, dict) and rng.random() < 0.4:
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        content = {**content, **damaged_tensors(rng, tensors)}
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    data = file.getvalue()
    return damaged_zip(rng, data) if data[:2] == b"PK" else damaged_bytes(rng, data)


def damaged_png(rng: random.Random, data: bytes) -> bytes:
    """Damage inside a chunk, whose checksum is right again (PNG's specification, 5.3)."""
    place, chunks = 8, []
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += 12 + length
    chunk = rng.choice(chunks)
    kind = rng.randrange(4)
    if kind == 0:
        chunks.append(list(chunk))
    elif kind == 1:
        chunks.remove(chunk)
    else:
        chunk[1] = damaged_bytes(rng, chunk[1])
    written = [struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
               for name, content in chunks]  # fmt: skip
    return data[:8] + b"".join(written)


def damaged_picture(rng: random.Random, data: bytes) -> bytes:
    is_png = data.startswith(b"\x89PNG")
    return damaged_png(rng, data) if is_png and rng.random() < 0.6 else damaged_bytes(rng, data)
