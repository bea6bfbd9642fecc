"""A rendered texture's pixels come back to their texels, and nobody else's do."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.spatial.transform import Rotation
from test_bodies import chumpy, write_model  # noqa: F401

from atlas_dataset.fits import FAR, fit_beside, read_fit
from atlas_dataset.views import frame_bodies, render_texture, view_lights
from common.errors import UserError
from common.pictures import image_from_pixels, pixels_from_image
from config.configuration import Render
from render.bodies import Body
from render.cameras import Cameras, orbit_cameras
from render.densepose import PARTS, SMPL_VERTICES, chart_places, read_iuv
from render.lights import Lights, ambient_light
from render.projection import Fit, aligned, blend_in, estimate_light, looks_like_background, merge, sight_fit, sight_map
from render.rasteriser import interpolate, rasterize, rasterize_uv
from render.rigs import load_rig
from render.shading import render_views
from render.smpl import load_model, model_files, read_arrays, split_spec
from render.uv_space import fill_outside, uv_mask

SIDE = 128


def checker(size: int, squares: int) -> torch.Tensor:
    """(3, size, size) in [-1, 1] of soft-edged squares in two colours."""
    wave = torch.sin(torch.arange(size) * squares * torch.pi / size)
    share = (wave[:, None] * wave[None] * 4).clamp(-1, 1) / 2 + 0.5
    return torch.tensor([0.2, -0.5, 0.6])[:, None, None] * share + torch.tensor([-0.4, 0.3, 0.1])[:, None, None]


def psnr(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    return float(-10 * ((a - b) / 2)[:, mask].square().mean().log10())


def shot(body, vertices, texture, azimuth=20.0, height=256, width=192, lights=None, background=(0.0, 1.0, 0.0)):
    """A picture (3, H, W) in [-1, 1] and the fit that it was made with."""
    angles = (torch.tensor([value]) for value in (azimuth, 10.0, 30.0))
    cameras = orbit_cameras(Body(vertices, body.faces, body.uvs, body.uv_faces), *angles, aspect=width / height)
    lights = lights or ambient_light(torch.ones(1, 3))
    scene = (cameras, height, width, lights, torch.tensor([background]))
    picture = render_views(body, (texture[None] + 1) / 2, *scene, vertices=vertices)[0]
    return picture * 2 - 1, Fit(vertices, cameras, lights)


@pytest.fixture(scope="module")
def anny():
    """The rig, one pose with an arm before the trunk, and its vertices."""
    rig = load_rig("anny")
    view = rig.named_pose("reaching", 3)
    view["shape"] = []
    return rig, view, rig.vertices([view])[0]


def test_a_checker_comes_back_from_an_exact_fit(anny):
    rig, _, vertices = anny
    texture = checker(SIDE, 12)
    picture, fit = shot(rig.body, vertices, texture, height=512, width=384)
    colours, sure = merge(rig.body, [picture], [sight_fit(rig.body, fit, 512, 384, SIDE)])
    seen = sure == 1
    assert 0.15 < (seen & uv_mask(rig.body, SIDE)).sum() / uv_mask(rig.body, SIDE).sum() < 0.6
    assert psnr(colours, texture, seen) >= 30
    assert not colours[:, sure == 0].any()


def test_neither_background_nor_limbs_behind_bleed_in(anny):
    """The arms alone are red, the rest gray, before bright green: no texel turns green, none of the trunk's red."""
    rig, _, vertices = anny
    fragments = rasterize_uv(rig.body, SIDE)
    places = interpolate(fragments, rig.body.faces, rig.body.vertices)  # metres, at rest
    aside = places[:, 0].abs()
    red_arms = torch.where(aside > 0.27, torch.tensor([[1.0], [-1.0], [-1.0]]), 0.0)
    texture = fill_outside(fragments.dense(red_arms.T)[0].permute(2, 0, 1), fragments.mask[0])
    far = fragments.dense((aside < 0.23) & (places[:, 1] > 0.5))[0]  # the shoes lie beside the hands in the texture
    for azimuth in (0.0, 60.0, 300.0):
        picture, fit = shot(rig.body, vertices, texture, azimuth)
        colours, sure = merge(rig.body, [picture], [sight_fit(rig.body, fit, 256, 192, SIDE)])
        seen = sure > 0
        red, green, _ = colours
        assert (green - torch.maximum(red, colours[2]))[seen].max() < 0.1, "the background bled in"
        assert (red - green)[seen & far].max() < 0.1, "an arm bled onto what is behind it"


def test_a_camera_that_is_off_is_moved_to_the_outline_and_no_other(anny):
    rig, _, vertices = anny
    texture = checker(SIDE, 6)
    picture, fit = shot(rig.body, vertices, texture, height=384, width=288, background=(0.9, 0.9, 0.9))
    assert aligned(rig.body, fit, picture) is fit
    assert aligned(rig.body, fit, torch.zeros_like(picture)) is fit, "nothing to go by"
    shift = torch.tensor([[0.05, -0.04, 0.0]])  # metres
    off = Fit(
        vertices, Cameras(fit.cameras.rotation, fit.cameras.translation + shift, fit.cameras.focal * 1.03), fit.lights
    )
    scores = []
    for tried in (off, aligned(rig.body, off, picture)):
        colours, sure = merge(rig.body, [picture], [sight_fit(rig.body, tried, 384, 288, SIDE)])
        scores.append(psnr(colours, texture, sure == 1))
    assert scores[1] > scores[0] + 6 and scores[1] > 20


def test_what_is_of_the_backgrounds_colour_near_the_outline_is_no_body():
    """A fit five pixels too far to the right, on a red body before green."""
    picture = torch.tensor([-0.8, 0.8, -0.8])[:, None, None].repeat(1, 200, 150)
    picture[:, 20:180, 40:100] = torch.tensor([0.8, -0.8, -0.8])[:, None, None]
    is_body = torch.zeros(200, 150, dtype=torch.bool)
    is_body[20:180, 45:105] = True
    dropped = looks_like_background(picture, is_body)
    assert dropped[30:170, 101:105].all() and not dropped[:, :99].any()
    assert not looks_like_background(torch.zeros(3, 200, 150), is_body).any(), "a body of its background's colour"


def test_known_light_is_divided_out_and_unknown_light_estimated(anny):
    rig, _, vertices = anny
    coefficients = torch.zeros(1, 9, 3)
    coefficients[0, 0], coefficients[0, 1], coefficients[0, 3] = 0.6, 0.35, torch.tensor([0.1, 0.15, 0.2])
    texture = checker(SIDE, 3) * 0.5
    picture, fit = shot(rig.body, vertices, texture, height=512, width=384, lights=Lights(coefficients))
    known = sight_fit(rig.body, fit, 512, 384, SIDE)
    unknown = sight_fit(rig.body, Fit(fit.vertices, fit.cameras), 512, 384, SIDE)
    exact, sure = merge(rig.body, [picture], [known])
    assert psnr(exact, texture, sure == 1) > 28
    left_in, _ = merge(rig.body, [picture], [known], relight=False)
    assert psnr(left_in, texture, sure == 1) < 20

    colours = (left_in.flatten(1)[:, unknown.texel].T + 1) / 2
    estimated = estimate_light(colours, unknown)
    ratio = (estimated / known.light).log()
    before = known.light.log()
    assert (ratio - ratio.mean(0)).std() < 0.5 * (before - before.mean(0)).std()


def test_two_pictures_show_more_than_one_and_the_better_view_wins(anny):
    rig, _, vertices = anny
    texture = checker(SIDE, 8)
    shots = [shot(rig.body, vertices, texture, azimuth) for azimuth in (0.0, 180.0)]
    sightings = [sight_fit(rig.body, fit, 256, 192, SIDE) for _, fit in shots]
    _, one = merge(rig.body, [shots[0][0]], sightings[:1])
    colours, both = merge(rig.body, [picture for picture, _ in shots], sightings)
    assert (both > 0).sum() > 1.6 * (one > 0).sum()
    assert psnr(colours, texture, both == 1) > 25
    _, mirrored = merge(rig.body, [shots[0][0]], sightings[:1], mirror=True)
    assert (mirrored > 0).sum() >= (one > 0).sum() and torch.equal(mirrored[one == 1], one[one == 1])


def test_fine_pictures_are_averaged_over_a_texel(anny):
    """Noise of one pixel's size, in a picture of many pixels a texel, comes to its mean."""
    rig, _, vertices = anny
    picture, fit = shot(rig.body, vertices, torch.zeros(3, SIDE, SIDE), height=768, width=576)
    noisy = picture + (torch.rand_like(picture[:1]) - 0.5)
    colours, sure = merge(rig.body, [noisy], [sight_fit(rig.body, fit, 768, 576, 64)])
    assert colours[:, sure == 1].std() < 0.1


def test_a_map_gives_the_texels_that_a_fit_gives(anny):
    rig, _, vertices = anny
    texture = checker(SIDE, 6)
    picture, fit = shot(rig.body, vertices, texture, height=512, width=384)
    fragments = rasterize(vertices, rig.body.faces, fit.cameras, 512, 384)
    places = fragments.dense(interpolate(fragments, rig.body.faces, rig.body.vertices))[0]
    sighting = sight_map(rig.body, places, fragments.mask[0], SIDE)
    exact = sight_fit(rig.body, fit, 512, 384, SIDE)
    colours, sure = merge(rig.body, [picture], [sighting], relight=False)
    assert psnr(colours, texture, sure == 1) > 25
    assert len(sighting.texel) > 0.7 * len(exact.texel)
    _, own, others = np.intersect1d(sighting.texel.numpy(), exact.texel.numpy(), return_indices=True)
    distance = torch.hypot(sighting.x[own] - exact.x[others], sighting.y[own] - exact.y[others])
    assert distance.median() < 0.5
    nothing = sight_map(rig.body, places, torch.zeros(512, 384, dtype=torch.bool), SIDE)
    assert len(nothing.texel) == 0


def test_unseen_texels_come_to_what_is_seen_beside_them(anny):
    rig, _, vertices = anny
    texture = torch.full((3, SIDE, SIDE), 0.5)
    picture, fit = shot(rig.body, vertices, texture)
    colours, sure = merge(rig.body, [picture], [sight_fit(rig.body, fit, 256, 192, SIDE)])
    generated = torch.zeros(3, SIDE, SIDE)
    blended = blend_in(rig.body, generated, colours, sure)
    unseen = (sure == 0) & uv_mask(rig.body, SIDE)
    assert blended[:, unseen].min() > -0.05 and blended[:, unseen].max() < 0.6
    assert blended[:, unseen].mean() > 0.1, "what is near takes the colour"
    assert blended[:, unseen].min() < 0.05, "what is far keeps its own"


# Files of fits: our own.


def test_our_own_fit_is_the_render_that_it_came_with(anny, tmp_path):
    rig = anny[0]
    texture = checker(SIDE, 8)
    render = Render(full_body=1, backgrounds={"plain": 1, "gradient": 0, "noise": 0, "pictures": 0, "white": 0})
    picture, view = render_texture(rig, texture, render, 5, 1, [0], 256, 192)[0]
    row = {**view, "texture_id": 1, "licence": "MIT", "body": "anny"}
    (tmp_path / "a.json").write_text(json.dumps(row))
    lights = np.array(view["lights"])
    np.savez(tmp_path / "b.npz", **{**{key: np.array(value) for key, value in view.items()}, "lights": lights})
    vertices = rig.vertices([view])
    cameras = frame_bodies(vertices, [view], 0.75)
    for name in ("a.json", "b.npz"):
        fit = read_fit(tmp_path / name, "anny", 256, 192)
        assert torch.allclose(fit.vertices, vertices[0], atol=1e-5)
        assert torch.allclose(fit.cameras.translation, cameras.translation, atol=1e-4)
        assert torch.allclose(fit.lights.coefficients, view_lights(cameras, [view]).coefficients, atol=1e-5)
        sighting = sight_fit(rig.body, fit, 256, 192, SIDE)
        colours, sure = merge(rig.body, [pixels_from_image(image_from_pixels(picture))], [sighting])
        assert psnr(colours, texture, sure == 1) > 24
    assert fit_beside(tmp_path, "elsewhere/a.png") == tmp_path / "a.json"
    with pytest.raises(UserError, match=r"no fit of c\.png"):
        fit_beside(tmp_path, "c.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fov_degrees": None}, "no whole camera: fov_degrees missing"),
        ({"azimuth": float("nan")}, "azimuth holds what is no number"),
        ({"body": "smpl:x"}, "fit of the body 'smpl:x'"),
        ({"pose": [0.0] * 156}, "a pose of 156 numbers"),
        ({"fill": 0.0}, "fill above 0"),
        ({"lights": [[0.0, 0.0, 1.0]]}, "holds what no fit holds"),
    ],
)
def test_bad_fits_of_ours(change, message, tmp_path):
    view = {"azimuth": 0.0, "elevation": 0.0, "fov_degrees": 30.0, "fill": 0.9, "bottom": 0.0, "pose": [], "shape": []}
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({**view, "ambient": [1.0, 1, 1], "lights": [], **change}))
    with pytest.raises(UserError, match=message) as error:
        read_fit(path, "anny", 64, 48)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{}", "no json", '{"pose": [0, 1]}'])
def test_files_that_are_no_fits(content, tmp_path):
    path = tmp_path / "fit.json"
    path.write_text(content)
    for name in (path, tmp_path / "nowhere.npz", tmp_path / "fit.txt"):
        with pytest.raises(UserError, match=name.name):
            read_fit(name, "anny", 64, 48)


# Of the SMPL family, from their published definitions.


def person(seed: int, joints: int) -> dict:
    """Rotations of the root (turned, as a camera sees it) and of so many joints, and a shape."""
    rng = np.random.default_rng(seed)
    root = Rotation.from_euler("xyz", [180, 20, 3], degrees=True)
    body = Rotation.from_rotvec(rng.normal(0, 0.2, (joints, 3)))
    return {"root": root, "body": body, "betas": rng.normal(0, 1, 10)}


def placed(spec: str, someone: dict) -> np.ndarray:
    """The same body's vertices by body-models itself, before any camera, (V, 3)."""
    kind, path, _ = split_spec(spec)
    model = load_model(kind, model_files(kind, path)["neutral"])
    body = torch.from_numpy(someone["body"].as_rotvec()).float()[None]
    inputs = {"body_pose": body, "pelvis_rotation": torch.from_numpy(someone["root"].as_rotvec()).float()[None]}
    inputs["shape"] = torch.from_numpy(someone["betas"]).float()[None]
    if kind != "smpl":
        inputs["hand_pose"] = torch.zeros(1, 30, 3)
    if kind == "smplx":
        inputs.update(head_pose=torch.zeros(1, 3, 3), expression=torch.zeros(1, 10))
    with torch.no_grad():
        return model.forward_vertices(**inputs)[0].double().numpy()


def pixels(fit: Fit, height: int, width: int) -> np.ndarray:
    return fit.cameras.project(fit.vertices, height, width)[0, :, :2].double().numpy()


def test_hmr2(tmp_path, mesh, chumpy):  # noqa: F811
    """Weak perspective in the crop: u = s (x + tx) in [-1, 1] of the crop; in the whole picture a camera with the focal
    length 5000 / 256 of its longer side (cam_crop_to_full)."""
    spec, someone = write_model(tmp_path / "m", "smpl", ".npz", mesh, chumpy), person(0, 23)
    height, width, scale, tx, ty, centre, size = 300, 400, 0.9, 0.05, 0.1, (180.0, 140.0), 220.0
    values = {
        "pred_cam": np.array([[scale, tx, ty]], np.float32),
        "box_center": np.array([centre], np.float32),
        "box_size": np.array([size], np.float32),
        "img_size": np.array([[width, height]], np.float32),
        "pred_smpl_params": {
            "global_orient": someone["root"].as_matrix()[None, None],
            "body_pose": someone["body"].as_matrix()[None],
            "betas": someone["betas"][None],
        },
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values))
    flat = {**values, **values["pred_smpl_params"]}
    del flat["pred_smpl_params"]
    np.savez(tmp_path / "b.npz", **flat)
    (tmp_path / "c.json").write_text(json.dumps({key: value.tolist() for key, value in flat.items()}))
    focal, vertices = 5000 / 256 * 400, placed(spec, someone)
    half = size * scale
    shift = np.array([tx + 2 * (centre[0] - width / 2) / half, ty + 2 * (centre[1] - height / 2) / half])
    moved = vertices + np.array([*shift, 2 * focal / half])
    expected = focal * moved[:, :2] / moved[:, 2:] + [width / 2, height / 2]
    for name in ("a.pkl", "b.npz", "c.json"):
        fit = read_fit(tmp_path / name, spec, height, width)
        assert np.abs(pixels(fit, height, width) - expected).max() < 0.02, name
    # Near the box's middle, where there is no perspective to speak of, the crop's own definition.
    crop = (vertices[:, :2] + [tx, ty]) * scale * size / 2 + centre
    assert np.abs(expected - crop).max() < 3
    with pytest.raises(UserError, match="of a picture of 400x300, not of 300x400"):
        read_fit(tmp_path / "b.npz", spec, 400, 300)
    with pytest.raises(UserError, match="cannot pose the body 'anny'"):
        read_fit(tmp_path / "b.npz", "anny", height, width)
    for lacking, message in (
        ("box_size", "add box_center and box_size"),
        ("pred_cam", "no camera"),
        ("betas", "betas"),
    ):
        np.savez(tmp_path / "d.npz", **{key: value for key, value in flat.items() if key != lacking})
        with pytest.raises(UserError, match=message):
            read_fit(tmp_path / "d.npz", spec, height, width)
    two = {key: np.concatenate([value, value]) for key, value in flat.items()}
    np.savez(tmp_path / "d.npz", **two)
    with pytest.raises(UserError, match="2 people or frames"):
        read_fit(tmp_path / "d.npz", spec, height, width)


def test_pymaf(tmp_path, mesh, chumpy):  # noqa: F811
    """`pose` (72) axis-angle; `orig_cam` sx, sy, tx, ty: u = sx (x + tx) in [-1, 1] of the whole picture, v alike; and
    the same from `pred_cam` and `bboxes` (centre and side)."""
    spec, someone = write_model(tmp_path / "m", "smpl", ".npz", mesh, chumpy), person(1, 23)
    height, width, (scale, tx, ty), (cx, cy, side) = 300, 400, (1.1, -0.1, 0.2), (150.0, 160.0, 180.0)
    pose = np.concatenate([someone["root"].as_rotvec()[None], someone["body"].as_rotvec()]).reshape(1, 72)
    sx, sy = scale * side / width, scale * side / height
    orig = [sx, sy, (cx / (width / 2) - 1) / sx + tx, (cy / (height / 2) - 1) / sy + ty]
    vertices = placed(spec, someone)
    expected = (vertices[:, :2] + orig[2:]) * [sx, sy]
    expected = (expected + 1) * [width / 2, height / 2]
    shared = {"pose": pose, "betas": someone["betas"][None], "pred_cam": np.array([[scale, tx, ty]])}
    for name, camera in (("a", {"orig_cam": np.array([orig])}), ("b", {"bboxes": np.array([[cx, cy, side, side]])})):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps({1: {**shared, **camera, "frame_ids": np.array([0])}}, protocol=4))
        fit = read_fit(path, spec, height, width)
        assert np.abs(pixels(fit, height, width) - expected).max() < 1.5 * width / FAR, name


def test_joblib_writes_arrays_beside_its_pickle(tmp_path):
    """PyMAF's tracker saves with joblib: a wrapper is pickled, and its array's bytes follow it in the file, after a
    byte that says how much padding there is."""

    class NumpyArrayWrapper:
        pass

    NumpyArrayWrapper.__module__, NumpyArrayWrapper.__qualname__ = "joblib.numpy_pickle", "NumpyArrayWrapper"
    array, path = np.arange(6.0).reshape(2, 3), tmp_path / "fit.pkl"

    class Pickler(pickle._Pickler):
        def save(self, thing, *options):
            if not isinstance(thing, np.ndarray):
                return super().save(thing, *options)
            wrapper = NumpyArrayWrapper()
            state = {"subclass": np.ndarray, "shape": thing.shape, "order": "C", "dtype": thing.dtype}
            wrapper.__dict__ = {**state, "allow_mmap": True, "numpy_array_alignment_bytes": 16}
            super().save(wrapper)
            self.framer.commit_frame(force=True)
            padding = 16 - (file.tell() + 1) % 16
            file.write(bytes([padding]) + b"\xff" * padding + thing.tobytes())

    module = types.ModuleType("joblib.numpy_pickle")
    module.NumpyArrayWrapper = NumpyArrayWrapper
    modules = {"joblib": types.ModuleType("joblib"), "joblib.numpy_pickle": module}
    with pytest.MonkeyPatch.context() as patch, path.open("wb") as file:
        for name, holder in modules.items():
            patch.setitem(sys.modules, name, holder)
        Pickler(file, protocol=4).dump({7: {"pose": array, "betas": array[0], "name": "x"}})
    read = read_arrays(path)
    assert np.array_equal(read[7]["pose"], array) and np.array_equal(read[7]["betas"], array[0])


def test_a_hostile_fit_runs_nothing(tmp_path):
    trace = tmp_path / "it ran"

    class Hostile:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    for wrapper in (b"", b"NumpyArrayWrapper"):  # C's unpickler, and joblib's
        (tmp_path / "fit.pkl").write_bytes(pickle.dumps({wrapper: 1, "pose": Hostile()}))
        with pytest.raises(UserError, match=r"it names (io|_io)\.open"):
            read_fit(tmp_path / "fit.pkl", "anny", 64, 48)
    assert not trace.exists()


def test_smplify_x(tmp_path, mesh, chumpy, capsys):  # noqa: F811
    """Axis-angle, a camera's rotation and translation: pixel = 5000 x / z + middle, or the focal length it tells."""
    spec, someone = write_model(tmp_path / "m", "smplx", ".npz", mesh, chumpy), person(2, 21)
    height, width, translation = 240, 320, np.array([0.1, -0.2, 40.0])
    turn = Rotation.from_euler("z", 4, degrees=True)
    result = {
        "camera_rotation": turn.as_matrix()[None].astype(np.float32),
        "camera_translation": translation[None].astype(np.float32),
        "betas": someone["betas"][None],
        "global_orient": someone["root"].as_rotvec()[None],
        "body_pose": someone["body"].as_rotvec().reshape(1, 63),
        "left_hand_pose": np.zeros((1, 12)),
        "right_hand_pose": np.zeros((1, 45)),
        "jaw_pose": np.zeros((1, 3)),
        "leye_pose": np.zeros((1, 3)),
        "reye_pose": np.zeros((1, 3)),
        "expression": np.zeros((1, 10)),
    }
    path = tmp_path / "000.pkl"
    path.write_bytes(pickle.dumps(result, protocol=2))
    seen = turn.apply(placed(spec, someone)) + translation
    for focal, told in ((5000.0, {}), (1500.0, {"focal_length": np.array([1500.0, 1500.0])})):
        path.write_bytes(pickle.dumps({**result, **told}, protocol=2))
        expected = focal * seen[:, :2] / seen[:, 2:] + [width / 2, height / 2]
        assert np.abs(pixels(read_fit(path, spec, height, width), height, width) - expected).max() < 0.02
        warnings = capsys.readouterr().err
        assert "left_hand_pose is given in components" in warnings and ("5000 pixels" in warnings) == (not told)
    moved = {**result, "transl": np.array([[0.5, 0.0, 0.0]])}
    path.write_bytes(pickle.dumps(moved, protocol=2))
    expected = read_fit(path, spec, height, width).vertices.numpy() - [0.5, 0, 0]
    assert np.abs(expected - placed(spec, someone)).max() < 1e-5
    for change, message in (
        ({"body_pose": np.zeros((1, 32))}, "VPoser"),
        ({"camera_rotation": np.ones((1, 3, 3))}, "no rotation"),
        ({"camera_translation": np.array([[0, 0, -1.0]])}, "behind the body"),
        ({"gender": "other"}, "gender 'other'"),
        ({"betas": np.full((1, 10), np.nan)}, "betas holds what is no number"),
    ):
        path.write_bytes(pickle.dumps({**result, **change}, protocol=2))
        with pytest.raises(UserError, match=message):
            read_fit(path, spec, height, width)
    other = write_model(tmp_path / "h", "smplh", ".npz", mesh, chumpy)
    path.write_bytes(pickle.dumps(result, protocol=2))
    with pytest.raises(UserError, match="fit of SMPL-X"):
        read_fit(path, other, height, width)


# DensePose.


def plates() -> tuple[Body, dict]:
    """A body of SMPL's number of vertices: 24 upright squares beside each other, each a part; and its charts' table."""
    vertices, faces, corners, parts, uvs = torch.zeros(SMPL_VERTICES, 3), [], [], [], []
    for number in range(PARTS):
        first, left = 4 * number, number % 6 * 0.25
        low = number // 6 * 0.4
        for corner, (x, y) in enumerate(((0, 0), (0.2, 0), (0.2, 0.35), (0, 0.35))):
            vertices[first + corner] = torch.tensor([left + x, low + y, 0.0])
            uvs.append((corner in (1, 2), corner in (2, 3)))
            corners.append(first + corner + 1)
        faces += [(first, first + 1, first + 2), (first, first + 2, first + 3)]
        parts += [number + 1] * 2
    faces = torch.tensor(faces)
    places = vertices[:, :2].clone()
    places[:, 0] /= 1.5
    places[:, 1] /= 1.6
    body = Body(vertices, faces, places * 0.98 + 0.01, faces)
    table = {
        "All_FaceIndices": np.array(parts, np.uint8)[:, None],
        "All_Faces": faces.numpy().astype(np.uint32) + 1,
        "All_U_norm": np.array([u for u, _ in uvs], float)[:, None],
        "All_V_norm": np.array([v for _, v in uvs], float)[:, None],
        "All_vertices": np.array([corners], np.uint32),
    }
    return body, table


def test_an_iuv_picture_leads_to_the_texels_of_its_parts(tmp_path):
    body, table = plates()
    savemat(tmp_path / "UV_Processed.mat", table)
    places = chart_places(str(tmp_path / "UV_Processed.mat"), body)
    assert torch.allclose(places[0, 0, 255], body.vertices[1], atol=2e-3), "u runs to the right"
    assert torch.allclose(places[7, 255, 0], body.vertices[4 * 7 + 3], atol=2e-3), "v runs up"
    # Part 9 fills the picture's middle, upright as it stands.
    height, width, part = 80, 60, 9
    iuv = np.zeros((height, width, 3), np.uint8)
    row, column = np.mgrid[10:70, 10:50]
    iuv[10:70, 10:50, 0] = part
    iuv[10:70, 10:50, 1] = (column - 10) / 39 * 255
    iuv[10:70, 10:50, 2] = (69 - row) / 59 * 255
    picture = torch.full((3, height, width), -1.0)
    picture[0, 10:70, 10:50] = torch.from_numpy((column - 10) / 39 * 2 - 1)
    for name, order in (("bgr.png", iuv[..., ::-1]), ("rgb.png", iuv)):  # as OpenCV writes it; as others do
        Image.fromarray(np.ascontiguousarray(order)).save(tmp_path / name)
        sighting = read_iuv(tmp_path / name, tmp_path / "UV_Processed.mat", body, height, width, 64)
        colours, sure = merge(body, [picture], [sighting], relight=False)
        seen = (sure == 1).nonzero()
        assert len(seen) > 30
        u = (seen[:, 1] + 0.5) / 64
        x = ((u - 0.01) / 0.98 * 1.5 - (part - 1) % 6 * 0.25) / 0.2
        assert ((x > -0.1) & (x < 1.1)).all(), "texels of that part alone"
        assert (colours[0, seen[:, 0], seen[:, 1]] - (x * 2 - 1)).abs().max() < 0.25


def test_bad_iuv_pictures(tmp_path):
    body, table = plates()
    good = tmp_path / "UV_Processed.mat"
    savemat(good, table)
    savemat(tmp_path / "other.mat", {key: value for key, value in table.items() if key != "All_vertices"})
    (tmp_path / "broken.mat").write_bytes(b"no table")
    Image.new("RGB", (60, 80), (40, 30, 40)).save(tmp_path / "above.png")
    Image.new("RGB", (60, 80), (0, 0, 0)).save(tmp_path / "empty.png")
    Image.new("RGB", (60, 80), (9, 9, 3)).save(tmp_path / "iuv.png")
    for name, table_file, size, message in (
        ("above.png", good, (80, 60), "parts above 24, up to 40"),
        ("empty.png", good, (80, 60), "shows no body"),
        ("iuv.png", good, (80, 61), "60x80 pixels, its picture 61x80"),
        ("iuv.png", None, (80, 60), "densepose_uv_data"),
        ("iuv.png", tmp_path / "other.mat", (80, 60), "lacks All_vertices"),
        ("iuv.png", tmp_path / "broken.mat", (80, 60), "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            read_iuv(tmp_path / name, table_file, body, *size, 64)
    box = Body(body.vertices[:96], body.faces, body.uvs, body.uv_faces)
    with pytest.raises(UserError, match="6890 vertices; this one has 96"):
        read_iuv(tmp_path / "iuv.png", good, box, 80, 60, 64)
