import math

import numpy as np
import pytest
import torch

from errors import UserError
from images import open_image
from render.render_turntable import main as turntable_main
from render.utils import (
    fill_outside,
    interpolate,
    load_body,
    look_at,
    orbit_cameras,
    rasterize,
    rasterize_uv,
    render_views,
    uv_mask,
    vertex_normals,
)


def embree_hits(body, cameras, height, width):
    """Each pixel's first hit by ray casting: triangle (H, W), -1 for none, and the UVs there (H, W, 2)."""
    from embreex import rtcore_scene
    from embreex.mesh_construction import TriangleMesh

    scene = rtcore_scene.EmbreeScene(robust=True)
    TriangleMesh(scene, body.vertices[body.faces].numpy().astype(np.float32))
    rotation, translation = cameras.rotation[0].double(), cameras.translation[0].double()
    columns, rows = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    focal = cameras.focal[0].double() * height
    rays = torch.stack([(columns - width / 2) / focal, (rows - height / 2) / focal, torch.ones(height, width)], -1)
    rays = (rays.double() @ rotation).view(-1, 3)
    origin = (-rotation.T @ translation).expand(len(rays), 3)
    result = scene.run(origin.numpy().astype(np.float32), rays.numpy().astype(np.float32), output=1)
    face = result["primID"].reshape(height, width).astype(np.int64)
    u, v = (torch.from_numpy(result[name].reshape(height, width)) for name in ("u", "v"))
    corners = body.uvs[body.uv_faces[torch.from_numpy(face).clamp(min=0)]]
    weights = torch.stack([1 - u - v, u, v], -1)
    return torch.from_numpy(face), (weights[..., None] * corners).sum(-2)


@pytest.mark.parametrize("azimuth,elevation", [(0.0, 0.0), (130.0, 20.0), (265.0, -10.0)])
def test_rasterizer_agrees_with_embree(azimuth, elevation):
    body, height, width = load_body("anny"), 384, 288
    cameras = orbit_cameras(
        body, torch.tensor([azimuth]), torch.tensor([elevation]), torch.tensor([32.0]), aspect=width / height
    )
    fragments = rasterize(body.vertices, body.faces, cameras, height, width)
    uv = interpolate(fragments, body.uv_faces, body.uvs)[0]
    face, expected_uv = embree_hits(body, cameras, height, width)
    mask = fragments.mask[0]
    assert mask.sum() > 5000

    differs = mask != (face >= 0)
    outline = torch.nn.functional.max_pool2d((face < 0).float()[None, None], 3, 1, 1)[0, 0].bool()
    outline &= torch.nn.functional.max_pool2d((face >= 0).float()[None, None], 3, 1, 1)[0, 0].bool()
    assert not (differs & ~outline).any(), "coverage differs away from the outline"
    assert differs.sum() <= 0.001 * mask.sum()

    same = mask & (fragments.face_index[0] == face)
    assert same.sum() > 0.995 * mask.sum()
    assert (uv - expected_uv)[same].abs().max() < 1e-4


def test_rasterizer_is_perspective_correct():
    """A floor that runs away from the camera: the texture's middle is at the middle in depth, not in the picture."""
    vertices = torch.tensor([[-1.0, 0, -1], [1, 0, -1], [1, 0, -9], [-1, 0, -9]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    cameras = look_at(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, -5.0]]), torch.tensor([60.0]))
    fragments = rasterize(vertices, faces, cameras, 101, 101)
    position = interpolate(fragments, faces, vertices)
    column = position[0, :, 50][fragments.mask[0, :, 50]]
    points = cameras.project(column, 101, 101)[0]
    rows = fragments.mask[0, :, 50].nonzero()[:, 0] + 0.5
    assert torch.allclose(points[:, 1], rows, atol=1e-3)
    assert torch.allclose(points[:, 2], fragments.depth[0, :, 50][fragments.mask[0, :, 50]], rtol=1e-5)


def test_nearest_triangle_wins_and_views_do_not_mix():
    near, far = [[-1.0, -1, 1], [1, -1, 1], [0, 1, 1]], [[-2.0, -2, 0], [2, -2, 0], [0, 2, 0]]
    vertices, faces = torch.tensor(near + far), torch.tensor([[3, 4, 5], [0, 1, 2]])
    eyes = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, -5.0]])
    cameras = look_at(eyes, torch.zeros(2, 3), torch.full((2,), 60.0))
    fragments = rasterize(vertices, faces, cameras, 65, 65)
    assert fragments.face_index[:, 32, 32].tolist() == [1, 0]
    assert fragments.depth[:, 32, 32].tolist() == pytest.approx([4.0, 5.0], rel=1e-5)
    one = rasterize(vertices, faces, look_at(eyes[1:], torch.zeros(1, 3), torch.full((1,), 60.0)), 65, 65)
    assert torch.equal(one.face_index[0], fragments.face_index[1])


def test_large_batches_are_split_without_a_trace(monkeypatch, mesh):
    body = load_body(f"obj:{mesh}")
    cameras = orbit_cameras(body, torch.arange(5) * 70.0, torch.zeros(5), torch.full((5,), 30.0))
    whole = rasterize(body.vertices, body.faces, cameras, 64, 64)
    monkeypatch.setattr("render.utils.MAX_CANDIDATES", 100)
    split = rasterize(body.vertices, body.faces, cameras, 64, 64)
    assert torch.equal(whole.face_index, split.face_index)
    assert torch.equal(whole.barycentrics, split.barycentrics)


def test_texture_is_upright_and_front_is_azimuth_zero(mesh):
    """The +z face of the box shows its own UV square: v up in the texture is up in the picture."""
    body = load_body(f"obj:{mesh}")
    size = 96
    texture = torch.zeros(1, 3, size, size)
    # face 6 of the box (z = +0.2) has the UV square at u 2/3.., v 1/2..: right column, upper row of the texture
    texture[0, 0, : size // 4, 2 * size // 3 :] = 1.0  # its upper half red
    texture[0, 1, size // 4 : size // 2, 2 * size // 3 :] = 1.0  # its lower half green
    cameras = orbit_cameras(body, torch.zeros(1), torch.zeros(1), torch.tensor([30.0]))
    picture = render_views(body, texture, cameras, 96, 96)[0]
    # The quad is (2, 6, 8, 4): bottom-left, bottom-right, top-right, top-left as seen from the front.
    assert picture[0, 25, 48] > 0.3 and picture[1, 25, 48] < 0.1
    assert picture[1, 70, 48] > 0.3 and picture[0, 70, 48] < 0.1


def test_normals_point_outwards_and_are_smooth(mesh):
    body = load_body("anny")
    normals = vertex_normals(body.vertices, body.faces)
    assert torch.allclose(normals.norm(dim=-1), torch.ones(len(normals)), atol=1e-4)
    chest = (body.vertices[:, 1] - 1.2).abs().lt(0.05) & body.vertices[:, 0].abs().lt(0.05)
    front = chest & (body.vertices[:, 2] > body.vertices[chest][:, 2].mean())
    assert normals[front][:, 2].mean() > 0.6


def test_fill_takes_the_nearest_colour_and_keeps_the_inside():
    texture, mask = torch.zeros(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[8:24, 8:24], mask[40:56, 40:56] = True, True
    texture[0, 8:24, 8:24], texture[1, 40:56, 40:56] = 1.0, 1.0
    filled = fill_outside(texture, mask)
    assert torch.equal(filled[:, mask], texture[:, mask])
    assert filled[0, 6, 12] > 0.9 and filled[1, 57, 50] > 0.9
    assert filled[:2].sum(0)[~mask].min() > 0.9, "black is left outside"
    assert torch.equal(fill_outside(texture, torch.zeros_like(mask)), texture)


def test_uv_mask_covers_the_islands(mesh):
    mask = uv_mask(load_body(f"obj:{mesh}"), 100)
    assert mask.float().mean() == pytest.approx(6 * 0.27 * 0.42, abs=0.02)
    assert not mask[:, 33].any() and mask[75, 15]
    fragments = rasterize_uv(load_body("anny"), 64)
    assert 0.4 < fragments.mask.float().mean() < 0.8


def test_anny_is_upright_in_metres():
    body = load_body("anny")
    low, high = body.vertices.amin(0), body.vertices.amax(0)
    assert low[1] == pytest.approx(0, abs=1e-5) and 1.4 < high[1] < 1.9
    assert body.uv_faces.max() < len(body.uvs) and body.faces.shape == body.uv_faces.shape
    assert high[2] > -low[2], "arms and feet reach forward, towards +z"


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "No such file"),
        ("", "holds no faces"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "no texture coordinates"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 9/1\n", "vertex index is outside"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/7\n", "UV index is outside"),
        ("v 0 nan 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\n", "not a finite number"),
        ("v 0 zero 0\n", "line 1"),
        ("v 0 0\nvt 0 0\nf 1/1 1/1 1/1\n", "without 3"),
    ],
)
def test_bad_meshes_are_refused(tmp_path, content, message):
    path = tmp_path / "mesh.obj"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_body(f"obj:{path}")


def test_obj_reads_polygons_and_negative_indices(tmp_path, mesh):
    assert len(load_body(f"obj:{mesh}").faces) == 12
    path = tmp_path / "mesh.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf -3/-3 -2/-2 -1/-1\n")
    assert load_body(f"obj:{path}").faces.tolist() == [[0, 1, 2]]


def test_unknown_body():
    with pytest.raises(UserError, match="anny"):
        load_body("smpl")


def test_turntable_turns(tmp_path, mesh, textures, run_script):
    from PIL import Image

    out = tmp_path / "turn.gif"
    arguments = ("--texture", textures / "0.png", "--body", f"obj:{mesh}", "--frames", 8, "--height", 64, "--width", 48)
    assert run_script(turntable_main, *arguments, "--out", out)[0] == 0
    with Image.open(out) as gif:
        assert gif.n_frames == 8 and gif.size == (48, 64) and gif.info["loop"] == 0
        frames = []
        for index in range(8):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    red = [(frame[..., 0] > frame[..., 1] + 60).mean() for frame in frames]
    assert min(red) > 0.03, "the body is in each frame, in its texture's colour"
    assert max(red) > 1.3 * min(red), "its outline changes as it turns"
    assert math.isclose(red[0], red[4], rel_tol=0.2)
    for bad in (("--out", tmp_path / "a.bmp"), ("--out", out, "--frames", 0)):
        status, _, error = run_script(turntable_main, *arguments[:4], *bad)
        assert status == 2 and error.count("\n") == 1
    missing = run_script(turntable_main, "--texture", tmp_path / "no.png", "--out", tmp_path / "b.gif")
    assert missing[0] == 2 and "no.png" in missing[2] and not (tmp_path / "b.gif").exists()


def test_open_image_turns_and_refuses(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"broken\.png"):
        open_image(tmp_path / "broken.png")
