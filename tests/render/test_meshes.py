"""OBJ files as people's tools write them (Wavefront's format, appendix B1), and the square that their UVs lie in."""

import pytest
import torch

from common.errors import UserError
from render.bodies import read_obj
from render.rigs import absolute_spec
from render.smpl import split_spec
from render.uv_space import uv_mask


def assert_same_body(path, mesh) -> None:
    body, expected = read_obj(str(path)), read_obj(str(mesh))
    assert torch.equal(body.vertices, expected.vertices) and torch.equal(body.faces, expected.faces)
    assert torch.equal(body.uv_faces, expected.uv_faces)
    assert torch.allclose(body.uvs, expected.uvs, atol=1e-6)
    assert uv_mask(body, 64).equal(uv_mask(expected, 64)), "its texture is where the plain one's is"


def with_continued_lines(text: str) -> str:
    return "\n".join(line.replace(" ", " \\\n  ", 1) for line in text.splitlines())


def with_colours(text: str) -> str:
    return "".join(f"{line} 0.5 0.25 1\n" if line.startswith("v ") else f"{line}\n" for line in text.splitlines())


def with_groups(text: str) -> str:
    """Faces that each follow a new object, with indices that count back from the last."""
    lines, corners = [], {"v": 0, "vt": 0}
    for line in text.splitlines():
        kind, *fields = line.split()
        if kind == "f":
            pairs = [map(int, field.split("/")) for field in fields]
            fields = [f"{v - 1 - corners['v']}/{vt - 1 - corners['vt']}/1" for v, vt in pairs]
            lines += [f"o part {len(lines)}", "g side", "usemtl skin", "s off"]
        else:
            corners[kind] += 1
        lines.append(" ".join([kind, *fields]))
    return "\n".join(lines)


VARIANTS = {
    "comments behind values": lambda text: text.replace("\n", " # a comment\n"),
    "a comment that ends in a backslash": lambda text: "# C:\\meshes\\\n" + text,
    "continued lines": with_continued_lines,
    "tabs and spaces": lambda text: text.replace(" ", "  \t"),
    "a third UV number": lambda text: "".join(
        f"{line} 0.5\n" if line.startswith("vt") else f"{line}\n" for line in text.splitlines()
    ),
    "colours": with_colours,
    "weights": lambda text: with_colours(text).replace(" 0.5 0.25 1\n", " 1.0\n"),
    "groups and negative indices": with_groups,
    "separators of Unicode in a comment": lambda text: f"# one\u2028f 1 2 3\x0c\x85\n{text}",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_mesh_written_another_way(variant, mesh, tmp_path):
    path = tmp_path / "variant.obj"
    path.write_text(VARIANTS[variant](mesh.read_text()), encoding="utf-8", newline="")
    assert path.read_bytes() != mesh.read_bytes()
    assert_same_body(path, mesh)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: b"# caf\xe9\n" + text.encode(),
    ],
    ids=["BOM", "UTF-16", "CRLF", "CR", "Latin-1 comment"],
)
def test_the_same_mesh_encoded_another_way(encode, mesh, tmp_path):
    path = tmp_path / "variant.obj"
    path.write_bytes(encode(mesh.read_text()))
    assert_same_body(path, mesh)


TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"


@pytest.mark.parametrize(
    "faces,message",
    [
        ("vn 0 0 1\nf 1//1 2//1 3//1\n", r"line 5: the mesh has no texture coordinates \(f 1//1\)"),
        ("f 1 2 3\n", r"line 4: the mesh has no texture coordinates \(f 1\)"),
        ("vt 0 0\nf 1/1 2/ 3/1\n", "line 5: a face of the mesh has no texture coordinates"),
        ("vt 0 0\nf 1/1 2/0 3/1\nvt 0 1\n", "line 5: f 2/0 names what does not stand above it"),
        ("vt 0 0\nf 1/1 2/-2 3/1\n", "line 5: f 2/-2 names what does not stand above it"),
        ("vt 0 0\nf 1/1 2/1\n", "line 5: a face of 2 corners"),
        ("vt 0\nf 1/1 2/1 3/1\n", "line 4: 1 numbers, not 2"),
        ("vt 0 0\nf 1/1 \\\n2/1 x/1\n", "line 5: invalid literal"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(faces, message, tmp_path):
    path = tmp_path / "wrong.obj"
    path.write_text(TRIANGLE + faces)
    with pytest.raises(UserError, match=message):
        read_obj(str(path))


def moved_uvs(mesh, move) -> str:
    """The mesh with move(number, u, v) in place of each of its UVs."""
    lines, number = [], 0
    for line in mesh.read_text().splitlines():
        if line.startswith("vt"):
            u, v = move(number, *map(float, line.split()[1:]))
            line, number = f"vt {u} {v}", number + 1
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("square", [(-2, -1), (1, 0), (0, 3), (-7, 12)])
def test_uvs_in_another_square_are_moved_to_the_first(square, mesh, tmp_path):
    path = tmp_path / "moved.obj"
    path.write_text(moved_uvs(mesh, lambda _, u, v: (u + square[0], v + square[1])))
    assert_same_body(path, mesh)


def test_uvs_stay_to_the_bit_where_they_lie_in_the_first_square(mesh, tmp_path):
    path = tmp_path / "edges.obj"
    for u, v in ((1, 1), (1.0005, -0.0005)):  # the far corner; rounded a little over it
        path.write_text(f"{TRIANGLE}vt 0 0\nvt {u} {v}\nvt 0.1 1\nvt 9 9\nf 1/1 2/2 3/3\n")
        assert torch.equal(read_obj(str(path)).uvs[:3], torch.tensor([[0, 0], [u, v], [0.1, 1]]))


def test_udim_and_uvs_over_an_edge_are_refused(mesh, tmp_path):
    path = tmp_path / "tiles.obj"
    path.write_text(moved_uvs(mesh, lambda number, u, v: (u + number // 12, v)))
    with pytest.raises(
        UserError, match=r"UDIM tiles .*2 squares.* are not supported: give a mesh whose UVs lie in one"
    ):
        read_obj(str(path))
    path.write_text(moved_uvs(mesh, lambda _, u, v: (u + 0.5, v)))
    with pytest.raises(UserError, match=r"UVs run from 0\.53 to 1\.47 .*give a mesh whose UVs lie in one square"):
        read_obj(str(path))
    path.write_text(moved_uvs(mesh, lambda _, u, v: (4 * u, v)))
    with pytest.raises(UserError, match="over the edge of a square"):
        read_obj(str(path))


def test_commas_in_the_names_of_folders(tmp_path):
    folder = tmp_path / "a, b" / "c,d"
    folder.mkdir(parents=True)
    model, template = folder / "model,1.npz", folder / "uv,2.obj"
    model.touch()
    template.touch()
    assert split_spec(f"smpl:{model}") == ("smpl", model, folder / "smpl_uv.obj")
    assert split_spec(f"smplx:{folder}") == ("smplx", folder, folder / "smplx_uv.obj")
    assert split_spec(f"smpl:{model},{template}") == ("smpl", model, template)
    assert split_spec(f"smpl:{folder},{template}") == ("smpl", folder, template)
    kind, path, _ = split_spec("smpl:nowhere.npz,none.obj")
    assert (kind, path.name) == ("smpl", "nowhere.npz"), "what is not there is named as it was given"


def test_specs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a, b"
    folder.mkdir()
    for name in ("box.obj", "uv.obj"):
        (folder / name).write_text("")
    (folder / "model").mkdir()
    assert absolute_spec("anny") == "anny"
    assert absolute_spec("obj:a, b/box.obj") == f"obj:{folder / 'box.obj'}"
    assert absolute_spec("smpl:a, b/model") == f"smpl:{folder / 'model'}"
    assert absolute_spec("smplh:a, b/model,a, b/uv.obj") == f"smplh:{folder / 'model'},{folder / 'uv.obj'}"
