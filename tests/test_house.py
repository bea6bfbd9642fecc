"""The rooms and who may call whom: imports go down the floors only, and no two rooms import each other."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from common.files import PROJECT_ROOT

# From the ground up. The design names two commands that lie in rooms; they stand on the floor of the commands.
FLOORS = (
    {"common"},
    {"config", "lora_utils", "render"},
    {"atlas_dataset", "models"},
    {"training", "evaluation", "embedded"},
    {"commands"},
    {"benchmarks", "assets", "examples", "tests"},
)
COMMANDS = {"atlas_dataset/build_atlas_large.py", "render/render_turntable.py", "models/publish.py"}
ROOT_FILES = {
    "joint.py", "t2uv.py", "i2uv.py", "infer_uv.py", "studio.py", "evaluate.py", "lora_utils.py", "personalise.py",
    "distill.py",
}  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(file: str) -> str:
    if file in COMMANDS or ("/" not in file and file != "lora_utils.py"):
        return "commands"
    return file.partition("/")[0].removesuffix(".py")


def project_files() -> list[str]:
    folders = [folder for folder in FLOOR if (PROJECT_ROOT / folder).is_dir()]
    files = [path for folder in folders for path in (PROJECT_ROOT / folder).rglob("*.py")]
    files += PROJECT_ROOT.glob("*.py")
    return sorted(str(path.relative_to(PROJECT_ROOT)) for path in files if "node_modules" not in path.parts)


def imported_files(file: str) -> set[str]:
    """The project's own files that a file imports, wherever in it the import stands."""
    imported = set()
    for node in ast.walk(ast.parse((PROJECT_ROOT / file).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = Path(*name.split(".")).with_suffix(".py")
            if (PROJECT_ROOT / path).is_file():
                imported.add(str(path))
    return imported


IMPORTS = {file: imported_files(file) for file in project_files()}


def test_the_root_holds_the_commands_and_their_helper():
    assert {path.name for path in PROJECT_ROOT.glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("file", IMPORTS)
def test_imports_go_down(file):
    for imported in IMPORTS[file]:
        assert FLOOR[room_of(imported)] <= FLOOR[room_of(file)], f"{file} imports {imported}, which lies above it"


def test_no_two_rooms_import_each_other():
    rooms = {room: set() for room in FLOOR}
    for file, imported in IMPORTS.items():
        rooms[room_of(file)] |= {room_of(other) for other in imported} - {room_of(file)}
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        pytest.fail(f"rooms in a circle: {' → '.join(error.args[1])}")


def test_no_file_imports_itself_through_others():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"files in a circle: {' → '.join(error.args[1])}")


def test_nobody_imports_a_command():
    allowed = {"infer_uv.py", "tests/"}  # infer_uv offers TexturePipeline, as its documentation says
    for file, imported in IMPORTS.items():
        commands = {other for other in imported if room_of(other) == "commands"} - {"infer_uv.py"}
        assert not commands or file.startswith(tuple(allowed)), f"{file} imports {commands}"


def test_rank_and_world_size_are_read_in_one_place():
    for file in IMPORTS:
        if file not in ("common/processes.py", "tests/test_house.py") and not file.startswith(
            ("tests/", "benchmarks/")
        ):
            text = (PROJECT_ROOT / file).read_text()
            assert not any(name in text for name in ('"RANK"', "WORLD_SIZE", "LOCAL_RANK")), file


def test_the_tour_names_what_is_there():
    """Each `file.py` of docs/tour.md exists, and the names after it, up to the next file, are defined there."""
    file, checked = "", 0
    for word in re.findall(r"`([^`\s]+)`", (PROJECT_ROOT / "docs" / "tour.md").read_text()):
        if word.endswith(".py"):
            file = word
        elif file and re.match(r"[A-Za-z_.]+($|[\[(])", word):
            source = (PROJECT_ROOT / file).read_text()
            for name in re.split(r"[\[(]", word)[0].split("."):
                assert re.search(rf"^ *(def|class) {name}\b|^{name} = ", source, re.M), f"{file} has no {name}"
                checked += 1
    assert checked > 40


def test_the_guarantees_name_tests_that_are_there():
    names = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (PROJECT_ROOT / "docs" / "guarantees.md").read_text())
    assert len(names) > 20
    for file, name in names:
        assert f"\ndef {name}(" in (PROJECT_ROOT / "tests" / file).read_text(), f"{file}::{name}"
