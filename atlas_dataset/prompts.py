"""Which prompt belongs to which texture: prompts that name their textures, or lines in the textures' order."""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.text import one_line, parse_json, read_lines, read_text

FILE_COLUMNS = ("file_name", "file", "image")
PROMPT_COLUMNS = ("prompt", "text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")  # of the imagefolder layout of `datasets`
LAYOUTS = (
    "a CSV or JSONL file with file_name and prompt, a folder with NAME.txt for each NAME.png, or a text file with a "
    "line for each texture"
)


def prompts_in_folder(folder: Path, names: list[str]) -> Path | None:
    """The prompts that a folder of pictures carries itself: its metadata file, or the folder, where it has NAME.txt
    for a NAME.png (the layout of kohya's scripts)."""
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    has_texts = any((folder / name).with_suffix(".txt").is_file() for name in names)
    return metadata or (folder if has_texts else None)


def read_prompts(
    prompts: Path, names: list[str] | None, count: int, folder: Path = Path(), limit: int | None = None
) -> list[str]:
    """The prompt of each of `count` textures, in their order.

    prompts: what LAYOUTS says. names: the textures' file names in `folder`; None where they have none. Raises UserError
    for a texture without prompt, a prompt whose texture is missing, and a texture named twice; and for plain lines
    when they are not `count`, unless only the first `limit` are wanted.
    """
    kind = prompts.suffix.lower()
    if prompts.is_dir():
        return _prompts_of_text_files(prompts, names)
    if kind not in (".csv", ".tsv", ".jsonl"):
        return _plain_lines(prompts, names, count, limit)
    if names is None:
        raise UserError(f"{prompts} names textures, but these have no names; give a text file with a line for each")
    return _match(_json_lines(prompts) if kind == ".jsonl" else _csv_rows(prompts), prompts, names, folder)


def _match(named: Iterator[tuple[int, str, str]], prompts: Path, names: list[str], folder: Path) -> list[str]:
    """(line, file, prompt) in any order → the prompt of each name. A file is found from the pictures' folder or from
    that of the prompts file."""
    index_of = {_place(folder, name): index for index, name in enumerate(names)}
    lines: dict[int, int] = {}
    prompt_of: dict[int, str] = {}
    for line, file, prompt in named:
        place = next((p for p in (_place(folder, file), _place(prompts.parent, file)) if p in index_of), None)
        if place is None:
            is_there = any(os.path.isfile(place / file) for place in (folder, prompts.parent))  # also of no file's name
            why = "is no texture that can be read here: not of these, or of another kind" if is_there else "is missing"
            raise UserError(f"{prompts} line {line}: {file!r} {why} (textures are looked for in {folder})")
        index = index_of[place]
        if index in lines:
            raise UserError(f"{prompts} line {line}: {file!r} is named a second time, first in line {lines[index]}")
        if not one_line(prompt):
            raise UserError(f"{prompts} line {line}: the prompt of {file!r} is empty")
        lines[index], prompt_of[index] = line, one_line(prompt)
    unnamed = [name for index, name in enumerate(names) if index not in lines]
    if unnamed:
        raise UserError(f"{prompts} has no prompt for {_first(unnamed)}; add a line for each texture, or move it away")
    return [prompt_of[index] for index in range(len(names))]


def _place(folder: Path, file: str) -> str:
    """macOS decomposes accented letters in the names of files, tables compose them."""
    return unicodedata.normalize("NFC", os.path.abspath(folder / file))


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _columns(header: list[str]) -> tuple[str, str] | None:
    """The names of the columns of files and prompts."""
    file = next((name for name in FILE_COLUMNS if name in header), None)
    prompt = next((name for name in PROMPT_COLUMNS if name in header), None)
    return (file, prompt) if file and prompt else None


def _csv_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    text = read_text(path)
    for delimiter in ",;\t":  # spreadsheets write semicolons where the comma is in numbers
        try:
            header = next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
        except csv.Error as error:
            raise UserError(f"{path} line 1: {error}") from None
        header = [name.strip().lower() for name in header]
        if columns := _columns(header):
            break
    else:
        raise UserError(
            f"{path} line 1 must name its columns: one of {', '.join(FILE_COLUMNS)} and one of "
            f"{', '.join(PROMPT_COLUMNS)}"
        )
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        next(reader)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path} line {reader.line_num} has {len(cells)} cells, line 1 has {len(header)}; put a prompt "
                    f'with a {delimiter!r} in it between "quotes"'
                )
            file, prompt = (cells[header.index(name)] for name in columns)
            yield reader.line_num, file.strip(), prompt
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in read_lines(path):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        columns = _columns(list(record)) if isinstance(record, dict) else None
        if not columns or not all(isinstance(record[column], str) for column in columns):
            raise UserError(f'{path} line {number} must be like {{"file_name": "1.png", "prompt": "a man in red"}}')
        yield number, *(record[column] for column in columns)


def _prompts_of_text_files(folder: Path, names: list[str] | None) -> list[str]:
    """The one line of NAME.txt for each NAME.png."""
    if names is None:
        raise UserError(
            f"{folder} is a folder, but these textures have no names; give a text file with a line for each"
        )
    texts = [(folder / Path(name).name).with_suffix(".txt") for name in names]
    prompts, owners = [], {}
    for name, text in zip(names, texts):
        if text in owners:
            raise UserError(f"{owners[text]} and {name} have one prompt, {text}; give each texture its own name")
        owners[text] = name
        if not text.is_file():
            raise UserError(f"texture {name} has no prompt: {text} is missing")
        lines = read_lines(text)
        if len(lines) != 1:
            raise UserError(f"{text} holds {len(lines)} lines; write one, the prompt of {name}")
        prompts.append(lines[0][1])
    return prompts


def _plain_lines(path: Path, names: list[str] | None, count: int, limit: int | None) -> list[str]:
    """A prompt a line; blank lines may only end the file."""
    if path.suffix.lower() == ".json":
        raise UserError(f"prompts {path}: give {LAYOUTS}")
    lines, known_names = read_lines(path), set(names or ())
    for expected, (number, line) in enumerate(lines, 1):
        if number != expected:
            raise UserError(f"prompts {path}: line {expected} is empty; each line is one texture's prompt")
        if re.split(r"[\s,;|]|: ", line, maxsplit=1)[0].strip("\"'") in known_names or line.startswith('{"'):
            raise UserError(f"prompts {path}: line {number} names its texture; give {LAYOUTS}")
    if len(lines) != count and not (limit and limit <= min(len(lines), count)):
        raise UserError(
            f"{count} textures but {len(lines)} prompts in {path}; plain lines must be as many as the textures: "
            f"give {LAYOUTS}, or --limit for the first of both"
        )
    return [line for _, line in lines][:count]
