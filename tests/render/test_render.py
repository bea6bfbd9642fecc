import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.pictures import open_image
from render.bodies import vertex_normals
from render.cameras import Cameras, look_at, orbit_cameras
from render.lights import Lights, ambient_light, directional_light
from render.rasteriser import interpolate, rasterize, rasterize_uv
from render.render_turntable import main as turntable_main
from render.rigs import load_body
from render.shading import render_views, sample_textures
from render.uv_space import fill_outside, texture_pixels, uv_mask


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
    uv = fragments.dense(interpolate(fragments, body.uv_faces, body.uvs))[0]
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
    position, depth = fragments.dense(interpolate(fragments, faces, vertices)), fragments.dense(fragments.depth)
    column = position[0, :, 50][fragments.mask[0, :, 50]]
    points = cameras.project(column, 101, 101)[0]
    rows = fragments.mask[0, :, 50].nonzero()[:, 0] + 0.5
    assert torch.allclose(points[:, 1], rows, atol=1e-3)
    assert torch.allclose(points[:, 2], depth[0, :, 50][fragments.mask[0, :, 50]], rtol=1e-5)


def test_nearest_triangle_wins_and_views_do_not_mix():
    near, far = [[-1.0, -1, 1], [1, -1, 1], [0, 1, 1]], [[-2.0, -2, 0], [2, -2, 0], [0, 2, 0]]
    vertices, faces = torch.tensor(near + far), torch.tensor([[3, 4, 5], [0, 1, 2]])
    eyes = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, -5.0]])
    cameras = look_at(eyes, torch.zeros(2, 3), torch.full((2,), 60.0))
    fragments = rasterize(vertices, faces, cameras, 65, 65)
    assert fragments.face_index[:, 32, 32].tolist() == [1, 0]
    assert fragments.dense(fragments.depth)[:, 32, 32].tolist() == pytest.approx([4.0, 5.0], rel=1e-5)
    second_camera = look_at(eyes[1:], torch.zeros(1, 3), torch.full((1,), 60.0))
    second = rasterize(vertices, faces, second_camera, 65, 65)
    assert torch.equal(second.face_index[0], fragments.face_index[1])


def test_large_batches_are_split_without_a_trace(monkeypatch, mesh):
    body = load_body(f"obj:{mesh}")
    cameras = orbit_cameras(body, torch.arange(5) * 70.0, torch.zeros(5), torch.full((5,), 30.0))
    whole = rasterize(body.vertices, body.faces, cameras, 64, 64)
    monkeypatch.setattr("render.rasteriser.MAX_CANDIDATES", 100)
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
        ("v 0 0\nvt 0 0\nf 1/1 1/1 1/1\n", "line 1: 2 numbers, not 3"),
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
    arguments = ("--texture", textures / "0.png", "--body", f"obj:{mesh}", "--frames", 8, "--size", "64x48")
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
    for wrong_arguments in (
        ("--out", tmp_path / "a.bmp"), ("--out", out, "--frames", 0), ("--out", out, "--size", "64"),
        ("--out", out, "--background", "no colour"), ("--out", out, "--format", "mp4"),
        ("--out", out, "--pose", "walking"),
    ):  # fmt: skip
        status, _, error = run_script(turntable_main, *arguments[:4], *wrong_arguments)
        assert status == 2 and error.count("\n") == 1
    missing = run_script(turntable_main, "--texture", tmp_path / "no.png", "--out", tmp_path / "b.gif")
    assert missing[0] == 2 and "no.png" in missing[2] and not (tmp_path / "b.gif").exists()


def test_turntable_formats(tmp_path, mesh, textures, run_script):
    """A folder of textures in one call, in each format; frames and sheets show what the GIF shows."""
    from PIL import Image

    arguments = ("--texture", textures, "--body", f"obj:{mesh}", "--frames", 4, "--size", "64x48")
    for chosen, name in {"webp": "0.webp", "mp4": "0.mp4", "frames": "0/0003.png", "sheet": "0.png"}.items():
        out = tmp_path / chosen
        status, printed, _ = run_script(turntable_main, *arguments, "--format", chosen, "--out", out)
        assert status == 0 and len(printed.split()) == 4 and (out / name).stat().st_size > 100, chosen
    with Image.open(tmp_path / "webp" / "0.webp") as webp:
        assert webp.n_frames == 4 and webp.size == (48, 64)
    with Image.open(tmp_path / "sheet" / "0.png") as sheet:
        assert sheet.size == (4 * 48, 64)
        front = np.asarray(sheet)[:, :48]
    with Image.open(tmp_path / "frames" / "0" / "0000.png") as frame:
        assert np.array_equal(np.asarray(frame), front)
    import imageio.v2 as imageio

    video = imageio.mimread(tmp_path / "mp4" / "0.mp4")
    assert len(video) == 4 and np.abs(video[0].astype(int) - front.astype(int)).mean() < 6
    blue = ("--out", tmp_path / "blue.png", "--background", "#0000ff")
    assert run_script(turntable_main, "--texture", textures / "0.png", *arguments[2:], *blue)[0] == 0
    with Image.open(tmp_path / "blue.png") as sheet:
        assert sheet.convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    empty = tmp_path / "empty"
    empty.mkdir()
    status, _, error = run_script(turntable_main, "--texture", empty, "--out", tmp_path / "x")
    assert status == 2 and "no pictures in" in error


def test_anny_turns_in_a_pose(tmp_path, textures, run_script):
    from PIL import Image

    sheets = []
    for pose in ("rest", "sitting"):
        out = tmp_path / f"{pose}.png"
        arguments = ("--texture", textures / "0.png", "--size", "64x48", "--pose", pose, "--out", out)
        assert run_script(turntable_main, *arguments)[0] == 0
        with Image.open(out) as sheet:
            sheets.append(np.asarray(sheet).astype(int))
    assert np.abs(sheets[0] - sheets[1]).mean() > 3


@pytest.mark.parametrize("light", ["one", "two"])
def test_light_is_the_half_lambert_polynomial(light):
    """Lights.at equals the formula it stands for; lights add up; only what a picture's own light sees counts."""
    normals = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    directions = torch.nn.functional.normalize(torch.randn(2, 3), dim=-1)
    colours = torch.rand(2, 3)
    lights = ambient_light(torch.full((2, 3), 0.2)) + directional_light(directions, colours)
    view = torch.arange(200) // 100
    expected = 0.2 + (0.5 + 0.5 * (normals * directions[view]).sum(-1, keepdim=True)) ** 2 * colours[view]
    if light == "one":
        lights, view = Lights(lights.coefficients[:1]), torch.zeros(100, dtype=torch.int64)
        normals, expected = normals[:100], expected[:100]
    light_there = lights.at(normals)[view, torch.arange(len(view))]
    assert torch.allclose(light_there, expected, atol=1e-5)


def test_a_fine_pattern_seen_from_afar_is_gray_not_noise():
    """Minification: a one-texel checkerboard averages out, at every size of the picture."""
    body = load_body("anny")
    checks = (torch.arange(1024)[:, None] + torch.arange(1024)) % 2
    texture = checks.float().expand(1, 3, -1, -1)
    cameras = orbit_cameras(body, torch.zeros(1), torch.zeros(1), torch.tensor([30.0]))
    even = ambient_light(torch.ones(1, 3))
    picture = render_views(body, texture, cameras, 96, 96, even, torch.zeros(1, 3))[0]
    solid = render_views(body, torch.ones(1, 3, 8, 8), cameras, 96, 96, even, torch.zeros(1, 3))[0] == 1
    assert solid.sum() > 500
    assert (picture[solid] - 0.5).abs().max() < 0.02


def test_many_textures_through_one_view_and_one_a_view(mesh):
    body, textures = load_body(f"obj:{mesh}"), torch.rand(3, 3, 32, 32)
    cameras = orbit_cameras(body, torch.tensor([0.0, 120, 240]), torch.zeros(3), torch.full((3,), 30.0))
    first = Cameras(cameras.rotation[:1], cameras.translation[:1], cameras.focal[:1])
    for supersample in (1, 2):
        many = render_views(body, textures, first, 48, 48, supersample=supersample)
        each = render_views(body, textures, cameras, 48, 48, supersample=supersample)
        for index in range(3):
            alone = render_views(body, textures[index : index + 1], first, 48, 48, supersample=supersample)
            assert torch.allclose(many[index], alone[0], atol=1e-5)
        assert torch.allclose(each[0], many[0], atol=1e-5) and not torch.allclose(each[1], many[1], atol=0.1)
    with pytest.raises(ValueError, match="2 textures for 3 views"):
        render_views(body, textures[:2], cameras, 48, 48)


def test_back_faces_are_left_out_without_a_trace():
    body = load_body("anny")
    cameras = orbit_cameras(body, torch.tensor([40.0, 200.0]), torch.full((2,), 8.0), torch.full((2,), 30.0))
    both = rasterize(body.vertices, body.faces, cameras, 200, 200)
    front = rasterize(body.vertices, body.faces, cameras, 200, 200, back_faces=False)
    assert torch.equal(both.mask, front.mask) and (both.face_index != front.face_index).sum() <= 2
    open_mesh = replace(body, faces=body.faces[:-1], uv_faces=body.uv_faces[:-1])
    inside_out = replace(body, faces=body.faces.flip(1))
    assert body.is_closed and not open_mesh.is_closed and not inside_out.is_closed


def test_open_image_turns_converts_and_refuses(tmp_path, monkeypatch):
    from PIL import Image

    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    deep = np.asarray(open_image(tmp_path / "deep.png"))[..., 0]
    assert np.abs(deep.astype(int) - ramp // 257).max() <= 1, "16 bits are scaled, not cut"
    for mode in ("CMYK", "P", "L", "1"):
        path = tmp_path / f"{mode}.tif"
        picture.convert(mode).save(path)
        assert open_image(path).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "two.gif").getpixel((0, 0))[:3] == (255, 0, 0)
    assert texture_pixels(Image.new("RGB", (1, 1), "red"), 8).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UserError, match=r"turned\.jpg.*too large|turned\.jpg.*exceeds"):
        open_image(tmp_path / "turned.jpg")
    monkeypatch.undo()
    whole = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"torn\.jpg"):
        open_image(tmp_path / "torn.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"broken\.png"):
        open_image(tmp_path / "broken.png")


@pytest.mark.parametrize("texels", [3.0, 5.5, 7.9, 15.0])
def test_a_wide_pixel_is_the_mean_of_all_its_texels(texels):
    size, generator = 256, torch.Generator().manual_seed(0)
    bars = (torch.rand(size // 4, generator=generator) > 0.5).float()
    row = bars.repeat_interleave(4)  # so that each is 4 texels wide or more
    textures, centre = row.expand(1, 3, size, size), torch.rand(400, generator=generator) * 200 + 28
    uv = torch.stack([centre / size, torch.full_like(centre, 0.5)], dim=-1)
    sampled = sample_textures(textures, uv, torch.full_like(centre, texels))[0, 0]
    area = torch.cat([torch.zeros(1), row.cumsum(0)])  # what lies left of each texel's edge

    def up_to(x):
        return torch.lerp(area[x.long()], area[x.long() + 1], x % 1)

    mean = (up_to(centre + texels / 2) - up_to(centre - texels / 2)) / texels
    assert (sampled - mean).abs().max() < 0.25 and (sampled - mean).abs().mean() < 0.08


def test_one_texture_is_sampled_alike_by_any_number_of_threads_and_parts(monkeypatch):
    textures, uv = torch.rand(1, 3, 32, 32), torch.rand(101, 2)
    density = torch.full((101,), 5.0)
    several = sample_textures(textures, uv, density)
    monkeypatch.setattr("render.shading.torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("render.shading.MAX_SAMPLED", 50)
    assert torch.allclose(sample_textures(textures, uv, density), several, atol=1e-6)
    monkeypatch.setattr("render.shading.torch.get_num_threads", lambda: 3)
    assert torch.allclose(sample_textures(textures, uv, density), several, atol=1e-6)


def test_a_body_out_of_sight_leaves_the_background_as_it_was(mesh):
    body = load_body(f"obj:{mesh}")
    away = look_at(torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.0, 1.0, 20.0]]), torch.tensor([30.0]))
    background = torch.rand(1, 3, 16, 12)
    assert torch.equal(render_views(body, torch.zeros(1, 3, 8, 8), away, 16, 12, background=background), background)
    near = orbit_cameras(body, torch.zeros(1), torch.zeros(1), torch.tensor([30.0]))
    kept = background.clone()
    render_views(body, torch.zeros(1, 3, 8, 8), near, 16, 12, background=background, supersample=1)
    assert torch.equal(background, kept)
