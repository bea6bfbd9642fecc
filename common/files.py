"""Writing to disk, whole files or none, and from there to the hub."""

import contextlib
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError, reason

PROJECT_ROOT = Path(__file__).resolve().parents[1]
# What ships with the project, by the names it had in configurations and commands of earlier versions.
MOVED = {"embedded_base": "embedded/base", "embedded_checkpoint": "embedded/checkpoint"}


def current_name(name: str) -> str:
    """Where MOVED says that `name` lies today, unless there is something of that name."""
    return MOVED[name] if name in MOVED and not Path(name).exists() else name


def content_hash(*contents: bytes | str) -> str:
    """A short hash of the contents in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        data = content.encode() if isinstance(content, str) else content
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def is_hidden(path: Path) -> bool:
    """Whether the path or a folder in it begins with a dot, as macOS's ._1.png beside 1.png. path: relative."""
    return any(name.startswith(".") and name not in (".", "..") for name in path.parts)


def natural_order(path: Path) -> tuple:
    """A key that sorts names by the numbers in them: 2.png before 10.png."""
    pieces = re.split(r"(\d+)", str(path))
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)], str(path)


def check_writable(path: str | os.PathLike) -> None:
    """Raises UserError unless folder `path` exists, or can be made, and can be written to; makes it."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {path}: {reason(error)}; choose another place") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to folder {path}; choose another place or change its permissions")


def check_can_be_made(path: str | os.PathLike) -> None:
    """Raises UserError where `check_writable` would for want of a folder or of permissions, and makes nothing."""
    above = Path(os.path.abspath(path))
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise UserError(f"cannot make folder {path}: {above} is a file; choose another place")
    if not os.access(above, os.W_OK):
        raise UserError(f"cannot write to folder {above}; choose another place or change its permissions")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes into a folder; what it had is free again when it ends, killed or not.

    Raises UserError, with the owner, when another process is inside. Where the file system has no locks, none is held.
    """
    lock, owner = (folder.with_name(f".{folder.name}.{kind}") for kind in ("lock", "owner"))
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(lock, timeout=0))
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            held.callback(owner.unlink, missing_ok=True)
        except Timeout:
            name = owner.read_text() if owner.is_file() else "another process"
            raise UserError(
                f"{folder} is being written by {name}; wait for its end, stop it, or choose another output.out_dir "
                f"(where there is no such process, delete {lock})"
            ) from None
        except (OSError, NotImplementedError):
            pass
        yield


def temporary_name(path: Path) -> Path:
    """Beside path, hidden, and of this process alone: two that write one file do not meet in it."""
    return path.with_name(f".{path.name}{_partial_suffix()}")


def _partial_suffix() -> str:
    return f".{socket.gethostname()}-{os.getpid()}.partial"


def remove_partial_files(folder: Path, of_all: bool = False) -> None:
    """Removes what lies under temporary names anywhere in a folder: of this process, or of all, such as were killed."""
    for path in folder.rglob(".*.partial"):
        if of_all or path.name.endswith(_partial_suffix()):
            path.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Renames folder `new` to `path`. What was there is moved aside and then deleted, so that whoever is killed leaves
    no half of either. Raises OSError, and what was there is there again."""
    path = path.resolve() if path.is_symlink() else path
    aside = _move_aside(path)
    try:
        os.replace(new, path)
    except BaseException:
        if aside:
            os.rename(aside, path)
        raise
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Deletes a folder; one who is killed meanwhile leaves it whole, or hidden. Raises OSError."""
    if aside := _move_aside(path):
        shutil.rmtree(aside)


def _move_aside(path: Path) -> Path | None:
    """Renames a folder to a hidden name beside it, and removes what one who was killed left there; None without one."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return None
    return aside


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it. Raises UserError when that fails."""
    path = Path(path)
    partial = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def push_folder(folder: Path, repository: str, repo_type: str) -> None:
    """Uploads a finished folder to the hub. repo_type: "model" or "dataset". Raises UserError when that fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, repo_type=repo_type, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, repo_type=repo_type, ignore_patterns=[".*"])
    except Exception as error:  # network, rights, names
        raise UserError(
            f"cannot push to {repository} ({reason(error)}); log in with 'hf auth login'; {folder} is whole"
        ) from None
