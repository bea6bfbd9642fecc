"""Bodies that can be posed: Anny, the users' own SMPL files, AMASS motions."""

import pickle
import sys
import types
from pathlib import Path

import anny
import anny.models.full_model as builder
import numpy as np
import pytest
import roma
import scipy.sparse
import torch
from scipy.spatial.transform import Rotation

from common.errors import UserError
from render.bodies import _read_blend_shape, load_anny, read_obj
from render.poses import (
    FAMILIES,
    HANGING,
    JOINT_LIMITS,
    JOINTS,
    SIDED,
    SMPL_JOINTS,
    anny_vertices,
    rotation,
    sample_phenotype,
    sample_pose,
    smpl_pose,
)
from render.rigs import load_body, load_rig
from render.smpl import FRAMES_PER_SECOND, load_model, model_files, motion_files, read_amass, read_arrays

JOINT_COUNT = {"smpl": 24, "smplh": 52, "smplx": 55}
SHAPE_COUNT = {"smpl": 10, "smplh": 16, "smplx": 400}


def model_arrays(kind: str, mesh) -> dict:
    """The arrays of a model file of that kind, for the box; each joint holds one corner, and turns it."""
    box, joints, rng = read_obj(str(mesh)), JOINT_COUNT[kind], np.random.default_rng(0)
    corners = len(box.vertices)
    weights = np.zeros((corners, joints))
    weights[:, 0] = 1
    weights[1] = np.eye(joints)[1]  # the second corner follows the left hip
    regressor = scipy.sparse.csc_matrix(np.full((joints, corners), 1 / corners))
    arrays = {
        "v_template": box.vertices.numpy().astype(np.float64),
        "f": box.faces.numpy().astype(np.uint32),
        "weights": weights,
        "J_regressor": regressor,
        "posedirs": np.zeros((corners, 3, 9 * (joints - 1))),
        "shapedirs": rng.normal(0, 0.01, (corners, 3, SHAPE_COUNT[kind])),
        "kintree_table": np.array([[2**32 - 1, *[0] * (joints - 1)], range(joints)], dtype=np.int64),
    }
    if kind != "smpl":
        arrays.update(hands_meanl=np.zeros(45), hands_meanr=np.zeros(45))
        arrays["joint2num"] = np.array({f"joint{index}": index for index in range(joints)}, dtype=object)
    return arrays


@pytest.fixture()
def chumpy(monkeypatch):
    """A stand-in for the package whose arrays the original pickles hold: only to write them."""
    module = types.ModuleType("chumpy.ch")

    class Ch:
        def __init__(self, x):
            self.x = x

    Ch.__module__, Ch.__qualname__ = "chumpy.ch", "Ch"
    module.Ch = Ch
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
    monkeypatch.setitem(sys.modules, "chumpy.ch", module)
    return Ch


def write_model(folder, kind: str, suffix: str, mesh, chumpy) -> str:
    """A model file of that kind and its UV template → the body's spec."""
    folder.mkdir(exist_ok=True)
    arrays, path = model_arrays(kind, mesh), folder / f"model{suffix}"
    if suffix == ".npz":
        np.savez(path, **{**arrays, "J_regressor": arrays["J_regressor"].toarray()})
    else:
        arrays["shapedirs"] = chumpy(arrays["shapedirs"])
        path.write_bytes(pickle.dumps(arrays, protocol=2))
    name = "smplx_uv.obj" if kind == "smplx" else "smpl_uv.obj"
    (folder / name).write_bytes(mesh.read_bytes())
    return f"{kind}:{path}"


@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
@pytest.mark.parametrize("kind", list(JOINT_COUNT))
def test_smpl_family_loads_poses_and_keeps_its_uvs(kind, suffix, tmp_path, mesh, chumpy):
    spec = write_model(tmp_path / "model", kind, suffix, mesh, chumpy)
    box, body = load_body(f"obj:{mesh}"), load_body(spec)
    assert torch.allclose(body.vertices, box.vertices, atol=1e-6) and torch.equal(body.uv_faces, box.uv_faces)

    rig = load_rig(spec)
    pose = rig.named_pose("rest", 0)
    turned = {**pose, "pose": [0.0] * 3 + [0.0, 0.0, np.pi] + [0.0] * 150}  # the left hip by half a turn about z
    rest, moved = rig.vertices([pose, turned])
    assert torch.allclose(rest, box.vertices, atol=1e-6)
    centre = box.vertices.mean(0)
    expected = torch.tensor([-1.0, -1, 1]) * (box.vertices[1] - centre) + centre
    assert torch.allclose(moved[1], expected, atol=1e-5) and torch.allclose(moved[2], rest[2], atol=1e-6)
    shapes = [rig.sample(np.random.default_rng(index)) for index in range(2)]
    assert (rig.vertices(shapes)[0] - rig.vertices(shapes)[1]).abs().max() > 1e-3, "each has a shape of its own"


def test_a_hostile_pickle_runs_nothing(tmp_path, mesh):
    """In a .pkl and inside a .npz: refused by name, and the command is not run."""
    trace = tmp_path / "it ran"

    class Hostile:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    arrays = {**model_arrays("smpl", mesh), "extra": Hostile()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(arrays, protocol=2))
    np.savez(tmp_path / "model.npz", extra=np.array(Hostile(), dtype=object))
    np.savez(tmp_path / "motion.npz", poses=np.array([Hostile()], dtype=object))
    assert not trace.exists()
    (tmp_path / "smpl_uv.obj").write_bytes(mesh.read_bytes())
    for read, name in ((load_body, "model.pkl"), (load_body, "model.npz"), (read_amass, "motion.npz")):
        source = f"smpl:{tmp_path / name}" if read is load_body else tmp_path / name
        with pytest.raises(UserError, match=r"it names (io|_io)\.open"):
            read(source)
    assert not trace.exists()


@pytest.mark.parametrize(
    "protocol,home", [(2, "numpy.core"), (2, "numpy._core"), (4, "numpy._core"), (5, "numpy._core")]
)
def test_pickles_of_any_protocol_and_numpy(protocol, home, tmp_path, mesh):
    """With numpy's scalars, and arrays by columns, of other byte orders, empty and of objects."""
    arrays = model_arrays("smpl", mesh)
    extras = {
        "scalar": np.float64(1.5),
        "count": np.int32(7),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "swapped": np.arange(4, dtype=">i4"),
        "empty": np.zeros((0, 3)),
        "flags": np.array([True, False]),
        "words": np.array(["left", "right"]),
        "objects": np.array({"pelvis": np.int64(0), "lists": [1, 2]}, dtype=object),
    }
    data = pickle.dumps({**arrays, **extras}, protocol=protocol)
    if protocol == 2:  # numpy 1's names or 2's; later protocols count their letters
        data = data.replace(f"{np._core.__name__}.".encode(), f"{home}.".encode())
        assert f"{home}.multiarray\nscalar".encode() in data
    (tmp_path / "model.pkl").write_bytes(data)
    loaded = read_arrays(tmp_path / "model.pkl")
    for key, value in {**arrays, **extras}.items():
        expected = value.toarray() if key == "J_regressor" else value
        if key == "objects":
            assert loaded[key].shape == () and loaded[key].item() == expected.item()
        else:
            assert np.array_equal(loaded[key], expected) and np.shape(loaded[key]) == np.shape(expected), key
    assert load_body(f"smpl:{tmp_path / 'model.pkl'},{mesh}").vertices.shape == (8, 3)


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "numpy load",
        "numpy fromfile",
        "numpy.core.multiarray fromfile",
        "numpy._core.multiarray _reconstruct.__globals__",
        "numpy._core.numeric fromfile",
        "numpy.lib.npyio load",
        "render.smpl read_arrays",
    ],
)
def test_a_pickle_names_numpys_arrays_and_nothing_else(name, tmp_path):
    module, _, attribute = name.partition(" ")
    path = tmp_path / "model.pkl"
    texts = (f"\x8c{chr(len(text))}{text}".encode("latin1") for text in (module, attribute))
    for pickled in (f"c{module}\n{attribute}\n.".encode(), b"\x80\x04" + b"".join(texts) + b"\x93."):
        path.write_bytes(pickled)
        with pytest.raises(UserError, match=f"it names {module}.{attribute}"):
            read_arrays(path)


class OfAddresses:
    """An array of objects whose type says that it holds none: numpy would follow the bytes as addresses."""

    def __init__(self, fields):
        self.fields = fields

    def __reduce__(self):
        kind = TypeWithoutFlags("V8" if self.fields else "O8", self.fields)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, b"A" * 8)


class TypeWithoutFlags:
    def __init__(self, code, fields):
        self.code, self.state = code, (3, "|", None, None, None, -1, -1, 0)
        if fields:
            self.state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


class ScalarOfAddresses:
    def __reduce__(self):
        return np._core.multiarray.scalar, (np.dtype("O"), b"A" * 8)


@pytest.mark.parametrize("hostile", [OfAddresses(False), OfAddresses(True), ScalarOfAddresses()])
def test_a_pickle_cannot_make_objects_of_bytes(hostile, tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"v_template": hostile}))
    with pytest.raises(UserError, match="cannot read"):
        read_arrays(tmp_path / "model.pkl")


def test_a_folder_with_other_files_beside_the_model(tmp_path, mesh, chumpy):
    """As SMPL-X comes: lists of vertices whose names sort first, and models of the other kinds."""
    folder = tmp_path / "models"
    spec = write_model(folder, "smplx", ".npz", mesh, chumpy)
    expected = load_body(spec)
    (folder / "model.npz").rename(folder / "SMPLX_NEUTRAL.npz")
    (folder / "MANO_SMPLX_vertex_ids.pkl").write_bytes(pickle.dumps({"left_hand": np.arange(3)}))
    (folder / "A_broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError) as error:
        load_body(f"smplh:{folder},{mesh}")
    message = str(error.value)
    assert message.startswith(f"no smplh body model at {folder} (passed over: A_broken.npz (cannot read")
    assert "MANO_SMPLX_vertex_ids.pkl (lacks v_template)" in message
    assert "SMPLX_NEUTRAL.npz (weights of shape (8, 55))" in message
    model_files.cache_clear()
    write_model(folder, "smplh", ".pkl", mesh, chumpy)
    (folder / "model.pkl").rename(folder / "SMPLH_NEUTRAL.pkl")
    assert torch.equal(load_body(f"smplx:{folder}").vertices, expected.vertices)
    assert model_files("smplh", folder)["female"].name == "SMPLH_NEUTRAL.pkl"
    assert model_files("smplx", folder)["female"].name == "SMPLX_NEUTRAL.npz"


def test_smpl_files_that_do_not_fit(tmp_path, mesh, chumpy):
    with pytest.raises(UserError, match="no smpl body model at"):
        load_body(f"smpl:{tmp_path / 'nowhere.npz'},{mesh}")
    spec = write_model(tmp_path / "model", "smpl", ".npz", mesh, chumpy)
    (tmp_path / "model" / "smpl_uv.obj").unlink()
    with pytest.raises(UserError, match=r"no UV template .*smpl_uv\.obj"):
        load_body(spec)
    assert torch.equal(load_body(f"{spec},{mesh}").uv_faces, load_body(f"obj:{mesh}").uv_faces)
    other = tmp_path / "other.obj"
    other.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n")
    with pytest.raises(UserError, match="is not the UV template"):
        load_body(f"{spec},{other}")
    np.savez(tmp_path / "half.npz", v_template=np.zeros((3, 3)))
    with pytest.raises(UserError, match="lacks f, weights"):
        load_body(f"smpl:{tmp_path / 'half.npz'},{mesh}")
    (tmp_path / "torn.pkl").write_bytes(b"\x80\x02}q\x00(U\x01f")
    with pytest.raises(UserError, match=r"cannot read .*torn\.pkl"):
        read_arrays(tmp_path / "torn.pkl")


def test_a_folder_holds_a_model_for_each_gender(tmp_path, mesh, chumpy):
    folder = tmp_path / "models"
    write_model(folder, "smpl", ".npz", mesh, chumpy)
    for name, scale in (("SMPL_MALE", 2.0), ("SMPL_FEMALE", 3.0), ("SMPL_NEUTRAL", 1.0)):
        arrays = model_arrays("smpl", mesh)
        arrays["v_template"] = arrays["v_template"] * scale
        arrays["J_regressor"] = arrays["J_regressor"].toarray()
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "model.npz").unlink()
    rig = load_rig(f"smpl:{folder}")
    poses = [{**rig.named_pose("rest", 0), "gender": gender} for gender in ("neutral", "male", "female")]
    heights = rig.vertices(poses)[..., 1].amax(1)
    assert torch.allclose(heights, torch.tensor([1.6, 3.2, 4.8]), atol=1e-5)


@pytest.mark.parametrize("columns", [72, 156, 165])
def test_amass_layouts(columns, tmp_path):
    """Columns end up where they belong; SMPL's hand joints are not taken for finger joints; frames are thinned."""
    rate, frames = 60, 120
    poses = np.tile(np.arange(columns) / 1000, (frames, 1))
    poses[:, :3] = (np.pi / 2, 0, 0)  # upright in a world with z up
    np.savez(tmp_path / "motion.npz", poses=poses, betas=np.ones(16), gender="female", mocap_framerate=rate)
    thinned, betas, gender = read_amass(tmp_path / "motion.npz")
    assert thinned.shape == (frames * FRAMES_PER_SECOND // rate, 156) and betas.tolist() == [1.0] * 16
    assert gender == "female"
    assert np.allclose(thinned[:, :3], 0, atol=1e-6), "upright with y up"
    assert np.allclose(thinned[:, 3:66], poses[:4, 3:66])
    hands = {72: np.zeros((4, 90)), 156: poses[:4, 66:156], 165: poses[:4, 75:165]}[columns]
    assert np.allclose(thinned[:, 66:], hands)


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"betas": np.zeros(16)}, "holds no 'poses'"),
        ({"poses": np.full((4, 156), np.nan)}, "no numbers"),
        ({"poses": np.zeros((4, 99))}, "72, 156 or 165"),
        ({"poses": np.zeros((0, 156))}, "72, 156 or 165"),
    ],
)
def test_bad_motions_are_refused_by_name(arrays, message, tmp_path):
    np.savez(tmp_path / "walk.npz", **arrays)
    with pytest.raises(UserError, match=rf"walk\.npz.*{message}|{message}"):
        read_amass(tmp_path / "walk.npz")


@pytest.mark.parametrize(
    "stored,gender",
    [
        (np.array("female"), "female"),
        (np.array(["Female"]), "female"),
        (np.array(b"male"), "male"),
        (np.array("MALE", dtype=object), "male"),
        (np.array("unknown"), "neutral"),
    ],
)
@pytest.mark.parametrize("rate_key", ["mocap_framerate", "mocap_frame_rate"])
def test_rates_and_genders_in_arrays(rate_key, stored, gender, tmp_path):
    arrays = {"poses": np.zeros((240, 165)), "gender": stored, rate_key: np.array([120.0]), "betas": np.ones((1, 16))}
    np.savez(tmp_path / "walk.npz", surface_model_type="smplx", **arrays)
    poses, betas, read_gender = read_amass(tmp_path / "walk.npz")
    assert len(poses) == 240 * FRAMES_PER_SECOND // 120 and betas.tolist() == [1.0] * 16 and read_gender == gender


def test_a_motion_in_pieces(tmp_path):
    whole = np.random.default_rng(0).normal(0, 0.3, (30, 156))
    pieces = {"root_orient": whole[:, :3], "pose_body": whole[:, 3:66], "pose_hand": whole[:, 66:]}
    np.savez(tmp_path / "whole.npz", poses=whole, mocap_frame_rate=30)
    np.savez(tmp_path / "pieces.npz", **pieces, mocap_frame_rate=30)
    assert np.array_equal(read_amass(tmp_path / "pieces.npz")[0], read_amass(tmp_path / "whole.npz")[0])
    del pieces["pose_hand"]
    np.savez(tmp_path / "pieces.npz", **pieces, mocap_frame_rate=30)
    poses = read_amass(tmp_path / "pieces.npz")[0]
    assert np.array_equal(poses[:, :66], read_amass(tmp_path / "whole.npz")[0][:, :66]) and not poses[:, 66:].any()


def write_walk(folder, name: str, seed: int) -> None:
    poses = np.random.default_rng(seed).normal(0, 0.3, (60, 156))
    np.savez(folder / name, poses=poses, betas=np.zeros(16), mocap_framerate=30)


def test_files_that_are_no_motions_are_passed_over_once(tmp_path, mesh, chumpy, capsys):
    spec, motions = write_model(tmp_path / "model", "smplh", ".npz", mesh, chumpy), tmp_path / "motions"
    motions.mkdir()
    write_walk(motions, "b.npz", 0)
    write_walk(motions, "d.npz", 1)
    poses = [load_rig(spec, str(motions)).sample(np.random.default_rng(seed)) for seed in range(12)]
    np.savez(motions / "a.npz", betas=np.zeros(16), gender="female")
    np.savez(motions / "c.npz", poses=np.zeros((4, 99)))
    (motions / "e.npz").write_bytes(b"PK torn")
    assert capsys.readouterr().err == ""
    motion_files.cache_clear()
    load_rig.cache_clear()
    rig = load_rig(spec, str(motions))
    assert [rig.sample(np.random.default_rng(seed)) for seed in range(12)] == poses, "drawn among the motions alone"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"warning: 3 of 5 files in {motions} are passed over" in warning
    assert "a.npz (holds no poses)" in warning and "c.npz (poses of shape (4, 99))" in warning
    assert "e.npz (cannot read" in warning
    for name in ("b.npz", "d.npz"):
        (motions / name).unlink()
    motion_files.cache_clear()
    with pytest.raises(UserError, match=r"no AMASS motions .*a\.npz \(holds no poses\)"):
        load_rig(spec, f"{motions}/")


def test_a_motion_of_no_numbers_is_passed_over_when_it_is_drawn(tmp_path, mesh, chumpy, capsys):
    spec, motions = write_model(tmp_path / "model", "smplh", ".npz", mesh, chumpy), tmp_path / "motions"
    motions.mkdir()
    np.savez(motions / "a.npz", poses=np.full((60, 156), np.nan))
    write_walk(motions, "b.npz", 0)
    rig = load_rig(spec, str(motions))
    drawn = [[rig.sample(np.random.default_rng(seed)) for seed in seeds] for seeds in (range(12), range(11, -1, -1))]
    assert drawn[0] == drawn[1][::-1], "whatever was drawn before"
    assert np.isfinite([pose["pose"] for pose in drawn[0]]).all()
    assert capsys.readouterr().err.count("a.npz holds poses or betas that are no numbers") == 1
    (motions / "b.npz").unlink()
    motion_files.cache_clear()
    with pytest.raises(UserError, match="can be read as an AMASS motion"):
        rig.sample(np.random.default_rng(0))


def test_motions_pose_an_smpl_body(tmp_path, mesh, chumpy):
    spec = write_model(tmp_path / "model", "smplh", ".npz", mesh, chumpy)
    motions = tmp_path / "motions" / "subject"
    motions.mkdir(parents=True)
    poses = np.zeros((60, 156))
    poses[:, 0], poses[:, 5] = np.pi / 2, np.linspace(0, 1, 60)
    np.savez(motions / "walk_poses.npz", poses=poses, betas=np.zeros(16), gender="male", mocap_framerate=30)
    np.savez(motions / "shape.npz", betas=np.zeros(16))
    assert [path.name for path in motion_files(str(motions.parent))] == ["walk_poses.npz"]
    rig = load_rig(spec, str(motions.parent))
    drawn = [rig.sample(np.random.default_rng(index)) for index in range(8)]
    assert len({pose["pose"][5] for pose in drawn}) > 1 and {pose["gender"] for pose in drawn} == {"male"}
    assert rig.vertices(drawn).isfinite().all()
    with pytest.raises(UserError, match="no AMASS motions"):
        load_rig(spec, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot take the motions"):
        load_rig("anny", str(motions.parent))


def test_anny_poses_stay_within_the_joints_limits():
    rng = np.random.default_rng(0)
    poses = {family: [sample_pose(rng, family) for _ in range(20)] for family in FAMILIES}
    for pose in (pose for family in poses.values() for pose in family):
        assert set(pose) <= set(JOINTS)
        for joint, degrees in pose.items():
            name, right = joint.removesuffix(".L").removesuffix(".R"), joint.endswith(".R")
            assert (name in SIDED) == (joint[-2:] in (".L", ".R"))
            for angle, (low, high), mirror in zip(degrees, JOINT_LIMITS[name], (1, -1, -1)):
                assert low - 1e-6 <= angle * (mirror if right else 1) <= high + 1e-6
    adults = [{"gender": 0.5, "age": 0.67}]

    def height(family):
        return torch.stack([anny_vertices([pose], adults)[0, :, 1].max() for pose in poses[family][:4]]).mean()

    def reach(family):
        return torch.stack([anny_vertices([pose], adults)[0, :, 0].abs().max() for pose in poses[family][:4]]).mean()

    assert height("sitting") < 0.85 * height("standing")
    assert reach("arms out") > 1.2 * reach("standing")
    shapes = [sample_phenotype(rng) for _ in range(6)]
    heights = anny_vertices([poses["standing"][0]] * 6, shapes)[..., 1].amax(1)
    assert heights.max() - heights.min() > 0.1, "shapes differ"


def test_anny_rests_as_it_is_loaded():
    rig = load_rig("anny")
    assert torch.allclose(rig.vertices([rig.named_pose("rest", 0)])[0], rig.body.vertices, atol=1e-5)
    assert rig.body.is_closed
    with pytest.raises(UserError, match="unknown pose 'flying': use rest, standing"):
        rig.named_pose("flying", 0)


def test_the_same_model_is_read_once(tmp_path, mesh, chumpy):
    spec = write_model(tmp_path / "model", "smpl", ".npz", mesh, chumpy)
    load_body(spec)
    path = tmp_path / "model" / "model.npz"
    assert load_model("smpl", path) is load_model("smpl", path)


def test_annys_poses_turn_smpls_limbs_to_where_they_turn_annys():
    """SMPL's arms stand out at rest and Anny's hang: upper arm, forearm and hand are to point alike in both."""
    pose = sample_pose(np.random.default_rng(3), "reaching")
    turns = smpl_pose(pose)[3:66].reshape(21, 3)
    down = np.deg2rad(-HANGING)
    for side, outwards in ((".L", 1.0), (".R", -1.0)):
        hanging = np.array([outwards * np.cos(down), np.sin(down), 0.0])  # Anny's arm, at rest
        anny, smpl = np.eye(3), np.eye(3)
        for bone in ("upperarm01", "lowerarm01", "wrist"):
            anny = anny @ rotation(pose[bone + side]).double().numpy()
            smpl = smpl @ Rotation.from_rotvec(turns[SMPL_JOINTS[bone + side]]).as_matrix()
            assert np.allclose(anny @ hanging, smpl @ [outwards, 0, 0], atol=1e-5), bone + side
    knee = rotation(pose["lowerleg01.L"]).double().numpy()
    assert np.allclose(Rotation.from_rotvec(turns[SMPL_JOINTS["lowerleg01.L"]]).as_matrix(), knee, atol=1e-5)


def test_smpl_bodies_without_motions_take_annys_poses_or_rest(tmp_path, mesh, chumpy):
    spec = write_model(tmp_path / "model", "smpl", ".npz", mesh, chumpy)
    posed, resting = (load_rig(spec, poses).sample(np.random.default_rng(0)) for poses in ("own", "rest"))
    assert np.any(posed["pose"]) and not np.any(resting["pose"])
    assert len(posed["pose"]) == 156 and len(posed["shape"]) == len(resting["shape"])
    assert np.any(load_rig(spec).named_pose("sitting", 1)["pose"])


def test_anny_keeps_its_model_and_nothing_else(tmp_path, monkeypatch):
    """The first load on a machine: 50 MB instead of 830, and read again it is what was computed."""
    monkeypatch.setattr(anny.paths, "_ANNY_CACHE_DIR", [tmp_path])
    computed, read = (dict(load_anny.__wrapped__().named_buffers()) for _ in range(2))
    (kept,) = (file for file in tmp_path.rglob("*") if file.is_file())
    assert kept.name.startswith("build_compact_model_data_")
    assert {"template_vertices", "blendshapes"} <= computed.keys()
    assert all(torch.equal(computed[name], read[name]) for name in computed | read)
    assert torch.allclose(load_anny()()["vertices"], load_anny.__wrapped__()()["vertices"], atol=1e-6)


def test_blend_shapes_are_read_as_anny_reads_them():
    """Each 50th of those that the wheel ships, by Anny's own reader too."""
    files = sorted(Path(anny.__file__).parent.rglob("*.target.gz"))[::50]
    same = roma.Linear(torch.eye(3, dtype=torch.float64))[None]
    assert len(files) > 20
    for file in files:
        expected = builder.load_blend_shape(file, 19_158, same, torch.float64)
        assert torch.equal(_read_blend_shape(file, 19_158, same, torch.float64), expected), file
