"""Folders that take the place of others, whoever is killed or fails meanwhile."""

import os
import shutil

import pytest

from common.files import remove_folder, replace_folder


@pytest.fixture()
def folders(tmp_path):
    """A new folder and the one whose place it takes, of a file each."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    return tmp_path / "new", tmp_path / "old"


def killed(*arguments, **options):
    raise KeyboardInterrupt


def test_one_killed_before_the_old_is_deleted_leaves_the_new_whole(folders, tmp_path, monkeypatch):
    new, old = folders
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda path, **options: path.exists() and killed())
        replace_folder(new, old)
    assert (old / "weights").read_text() == "new" and not new.exists()
    shutil.copytree(old, new)
    replace_folder(new, old)  # and takes away what the other left
    assert os.listdir(tmp_path) == ["old"]


def test_one_that_fails_leaves_the_old_whole(folders, monkeypatch):
    def fail(*arguments):
        raise OSError("no room")

    new, old = folders
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(os, "replace", fail)
        replace_folder(new, old)
    assert (old / "weights").read_text() == "old" and (new / "weights").read_text() == "new"


def test_a_new_name(folders, tmp_path):
    new, _ = folders
    replace_folder(new, tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "old"]


def test_one_killed_while_deleting_leaves_no_half(folders, tmp_path, monkeypatch):
    new, old = folders
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda path, **options: path.exists() and killed())
        remove_folder(old)
    assert not old.exists() and (tmp_path / ".old.old" / "weights").read_text() == "old"
    remove_folder(new)
    assert not new.exists()


def test_a_link_stays_one_and_leads_to_the_new(folders, tmp_path):
    new, old = folders
    (tmp_path / "link").symlink_to(old)
    replace_folder(new, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (old / "weights").read_text() == "new"
