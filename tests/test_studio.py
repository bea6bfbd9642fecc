"""The studio over the tiny base: what it makes, what it refuses, whose textures are whose; and in a real browser."""

import contextlib
import http.client
import io
import json
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import infer_uv
import studio as studio_command
from atlas_dataset.fits import read_fit
from atlas_dataset.views import render_texture
from common.errors import UserError
from common.files import PROJECT_ROOT
from common.pictures import encode_image, image_from_pixels
from config.configuration import Render
from render.rigs import load_rig
from studio import LARGEST_FIT, LARGEST_UPLOAD, Order, Server, Studio

AXE = PROJECT_ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZE = 128  # texels of a texture's side
LONGEST = 120  # seconds that anything here may take


@pytest.fixture()
def studio(checkpoint, tmp_path):
    args, _ = infer_uv.parse_args(["--checkpoint", str(checkpoint)])
    pipeline = infer_uv.load_pipeline(args, [])
    pipeline.settings = pipeline.settings.changed(size=SIZE)
    studio = Studio(pipeline, args, [], tmp_path / "out")
    yield studio
    studio.close()


@pytest.fixture()
def server(studio):
    yield from serving(studio)


def serving(studio):
    server = Server("127.0.0.1", 0, studio)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture()
def bare_server(mesh, tmp_path):
    """A server whose studio has a body but no model: enough for uploads."""
    pipeline = SimpleNamespace(body_spec=f"obj:{mesh}", settings=None)
    yield from serving(Studio(pipeline, None, [], tmp_path / "out"))


@pytest.fixture()
def visitor(studio):
    return studio.admit()[1]


def finished(studio, visitor, **order):
    """The ids of an order's textures."""
    earlier = set(visitor.results)
    task = studio.start(visitor, Order(**order))
    wait_for(lambda: task not in studio.queue)
    assert task.state == "done", task.message
    return [key for key in visitor.results if key not in earlier]


def wait_for(condition):
    end = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def ask(server, method: str, path: str, body: bytes | None = None, token: str = "", **headers: str):
    """A request as it stands, its path not tidied → (status, headers, contents)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=LONGEST)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        named["Cookie"] = f"studio-{server.server_port}={token}"
    try:
        connection.putrequest(method, path, skip_host="Host" in named)
        for name, value in ({"Content-Length": str(len(body or b""))} | named).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("given", [("text",), ("picture",), ("text", "picture")], ids=" and ".join)
def test_a_texture_and_its_settings_repeat_it_to_the_bit(given, studio, visitor, textures, tmp_path, run_script):
    order = {"seed": 5}
    if "text" in given:
        order |= {"prompt": "a man in red", "guidance_scale": 3.0, "steps": 3}
    if "picture" in given:
        order["pictures"] = [studio.add_picture(visitor, (textures / "2.png").read_bytes(), "2.png")["id"]]
        order["img_weight"] = 0.7
    (key,) = finished(studio, visitor, **order)
    _, picture = studio.file(visitor, key, "png", "rest")
    name, settings = studio.file(visitor, key, "json", "rest")
    assert json.loads(settings) == studio.description(visitor, key)
    (tmp_path / name).write_bytes(settings)
    again = tmp_path / "again.png"
    status, _, error = run_script(infer_uv.main, "--settings", tmp_path / name, "--out", again)
    assert status == 0, error
    assert np.array_equal(pixels(again.read_bytes()), pixels(picture)) and pixels(picture).shape == (SIZE, SIZE, 4)
    told = json.loads(settings)
    assert told["seed"] == 5 and (told["prompt"] is None) == ("text" not in given)


def test_several_textures_have_the_next_seeds_and_none_is_overwritten(studio, visitor):
    first = finished(studio, visitor, prompt="a man", seed=7, number=2)
    second = finished(studio, visitor, prompt="a man", seed=7, steps=3)
    told = [studio.description(visitor, key) for key in (*first, *second)]
    assert [each["seed"] for each in told] == [7, 8, 7]
    assert [each["num_inference_steps"] for each in told] == [2, 2, 3]
    assert len({visitor.results[key].job.path for key in (*first, *second)}) == 3


def test_cancel_stops_within_a_step_and_the_next_order_runs(studio, visitor, monkeypatch):
    make_batch, begun = infer_uv.make_batch, []

    def cancelling(*arguments):
        *others, on_step, on_preview = arguments

        def cancel_in_the_second():
            begun.append(1)
            if len(begun) == 2:
                studio.cancel(visitor)
            on_step()

        return make_batch(*others, cancel_in_the_second, on_preview)

    monkeypatch.setattr(infer_uv, "make_batch", cancelling)
    task = studio.start(visitor, Order(prompt="a man", steps=50, number=3))
    wait_for(lambda: task not in studio.queue)
    assert task.state == "cancelled" and len(begun) == 2 and not visitor.results
    assert not list(visitor.folder.rglob("*.png"))
    finished(studio, visitor, prompt="a man")


def test_a_region_is_made_anew_and_nothing_else(studio, visitor):
    (first,) = finished(studio, visitor, prompt="a man in red")
    (second,) = finished(studio, visitor, prompt="a man in blue", seed=3, edited=first, region="feet")
    before, after = (pixels(studio.file(visitor, key, "png", "rest")[1]) for key in (first, second))
    changed = (before != after).any(2)
    anew = studio.pipeline.mask("feet", SIZE).numpy() > 0
    assert changed.any() and not changed[~anew].any()
    assert studio.description(visitor, second)["mask"] == "feet"
    with pytest.raises(UserError, match="no texels for the region 'face'"):  # the body is a box
        studio.start(visitor, Order(prompt="a man", edited=first, region="face"))


def painted(side: int, box: tuple[int, int, int, int]) -> bytes:
    """A mask as the page draws it: white on nothing."""
    mask = Image.new("RGBA", (side, side))
    mask.paste("white", box)
    return encode_image(mask, format="PNG")


def test_a_painted_region_of_an_uploaded_texture_is_made_anew(studio, visitor, tmp_path, run_script):
    texture = Image.new("RGB", (SIZE, SIZE), "orange")
    given = studio.add_texture(visitor, encode_image(texture, format="PNG"), "mine.png")["id"]
    assert studio.description(visitor, given) == {"uploaded": "mine.png"}
    mask = studio.add_mask(visitor, painted(64, (4, 8, 12, 30)))["id"]
    (key,) = finished(studio, visitor, prompt="a man in blue", edited=given, mask=mask, sampler="ddim")
    worn = pixels(studio.file(visitor, key, "png", "rest")[1])
    changed = (worn[..., :3] != np.asarray(texture)).any(2)
    assert changed[20:56, 10:22].any()
    changed[12:64, 4:28] = False  # enlarged, the mask has soft edges
    assert not (changed & (worn[..., 3] == 255)).any()
    assert studio.description(visitor, key)["sampler"] == "ddim"
    (tmp_path / "settings.json").write_bytes(studio.file(visitor, key, "json", "rest")[1])
    status, _, error = run_script(infer_uv.main, "--settings", tmp_path / "settings.json", "--out", tmp_path / "a.png")
    assert status == 0, error
    assert np.array_equal(pixels((tmp_path / "a.png").read_bytes()), worn)

    unused = studio.add_mask(visitor, painted(64, (0, 0, 9, 9)))["id"]
    later = studio.add_mask(visitor, painted(64, (0, 0, 5, 5)))["id"]
    assert set(visitor.masks) == {mask, later} and unused not in visitor.masks
    other = studio.add_texture(visitor, encode_image(texture, format="PNG"), "unused.png")["id"]
    paths = {each: visitor.results[each].job.path for each in (given, other)}
    studio.close()
    assert paths[given].exists() and not paths[other].exists()
    assert [path.stem for path in (visitor.folder / "pictures").iterdir()] == [mask]


@pytest.mark.parametrize("message, name, data", [
    ("nothing is painted", "masks", painted(16, (0, 0, 0, 0))),
    ("16 x 8", "masks", encode_image(Image.new("L", (16, 8), 255), format="PNG")),
    ("16 x 8", "results", encode_image(Image.new("L", (16, 8), 255), format="PNG")),
    ("transparent everywhere", "results", encode_image(Image.new("RGBA", (8, 8)), format="PNG")),
    ("cannot read picture of the painted region", "masks", b"<svg/>"),
    ("cannot read picture evil.png", "results?name=../../evil.png", b"no picture"),
    ("pixels are more than", "results", encode_image(Image.new("1", (4200, 4200)), format="PNG")),
])  # fmt: skip
def test_edits_uploads_are_checked(message, name, data, bare_server):
    token, visitor = bare_server.studio.admit()
    status, _, contents = ask(bare_server, "POST", f"/api/{name}", data, token)
    assert status == 400 and message in json.loads(contents)["error"]
    assert not (visitor.masks or visitor.results or visitor.folder.exists())


def test_a_visitor_keeps_so_many_uploads(bare_server, monkeypatch):
    studio = bare_server.studio
    token, visitor = studio.admit()
    monkeypatch.setattr(studio_command, "MOST_UPLOADS", 1)
    data = encode_image(Image.new("RGB", (8, 8), "red"), format="PNG")
    for name in ("pictures", "results"):
        statuses = [ask(bare_server, "POST", f"/api/{name}", data, token)[0] for _ in range(2)]
        assert statuses == [200, 400], name
    status, _, _ = ask(bare_server, "POST", "/api/fits/x", b"", token, Content_Length=str(LARGEST_FIT + 1))
    assert status == 413
    assert len(visitor.pictures) == len(visitor.results) == 1 and len(list(visitor.folder.rglob("*.png"))) == 2


@pytest.fixture()
def person(mesh):
    """A picture of a red box and how the box stands in it: a PNG and a JSON file's contents."""
    rig = load_rig(f"obj:{mesh}")
    red = torch.tensor([0.6, -0.5, -0.5])[:, None, None].expand(3, 64, 64)
    backgrounds = {"plain": 0, "gradient": 0, "noise": 0, "pictures": 0, "white": 1}
    picture, view = render_texture(rig, red, Render(full_body=1, backgrounds=backgrounds), 3, 0, [0], 128, 96)[0]
    return encode_image(image_from_pixels(picture), format="PNG"), json.dumps(view).encode()


def test_pictures_keep_their_own_pixels_where_each_has_a_fit(studio, visitor, person, monkeypatch, tmp_path):
    picture, fit = person
    keys = [studio.add_picture(visitor, picture, "box.png")["id"] for _ in range(2)]
    for key in keys:
        studio.add_fit(visitor, key, fit, "box.json")
    (plain,) = finished(studio, visitor, pictures=keys)
    (own,) = finished(studio, visitor, pictures=keys, fits=["file", "file"])
    told = studio.description(visitor, own)
    assert told["fits"] == [str(visitor.fits[key]) for key in keys] and not studio.description(visitor, plain)["fits"]
    worn = pixels(studio.file(visitor, own, "png", "rest")[1]).astype(int)
    is_red = (worn[..., 0] > worn[..., 2] + 60) & (worn[..., 3] == 255)
    assert is_red.sum() > 0.1 * (worn[..., 3] == 255).sum()

    sightings = []
    sighted = read_fit(visitor.fits[keys[0]], studio.pipeline.body_spec, 128, 96)
    monkeypatch.setattr(studio.pipeline, "find_body", lambda image, size: sightings.append(size) or sighted)
    for order, message in (
        ({"fits": ["file"]}, "each needs its fit"),
        ({"fits": ["auto", "file"]}, "finds no body"),
        ({"fits": ["file", "file"], "edited": own}, "choose one of them"),
    ):
        with pytest.raises(UserError, match=message):
            studio.start(visitor, Order(pictures=keys, **order))
    monkeypatch.setattr(Studio, "finds_bodies", True)
    (looked_for,) = finished(studio, visitor, pictures=keys, fits=["auto", "file"])
    assert sightings == [SIZE] and studio.description(visitor, looked_for)["fits"][0] == infer_uv.AUTO

    monkeypatch.setattr(studio.pipeline, "find_body", lambda image, size: studio.cancel(visitor) or sighted)
    monkeypatch.setattr("models.pipeline.merge", lambda *given: pytest.fail("it went on after the first picture"))
    task = studio.start(visitor, Order(pictures=keys, fits=["auto", "file"]))
    wait_for(lambda: task not in studio.queue)
    assert task.state == "cancelled" and task.step == 0


def test_a_fit_is_checked_when_it_comes(bare_server, person):
    studio = bare_server.studio
    (token, visitor), (other_token, _) = studio.admit(), studio.admit()
    picture, fit = person
    key = studio.add_picture(visitor, picture, "box.png")["id"]
    assert ask(bare_server, "POST", f"/api/fits/{key}?name=box.json", fit, token)[0] == 200
    first = visitor.fits[key]
    runs = b"cos\nsystem\n(S'exit 1'\ntR."  # a pickle that calls os.system
    for name, data in (
        ("a.json", b"{}"),
        ("a.txt", fit),
        ("a.pkl", runs),
        ("a.npz", b"PK"),
        ("..%2f..%2fa.json", b"["),
    ):
        status, _, contents = ask(bare_server, "POST", f"/api/fits/{key}?name={name}", data, token)
        message = json.loads(contents)["error"]
        assert status == 400 and "a." in message and str(studio.out) not in message and ".." not in message, name
    assert ask(bare_server, "POST", f"/api/fits/{key}?name=box.json", fit, other_token)[0] == 400
    assert ask(bare_server, "POST", "/api/fits/..%2f..?name=box.json", fit, token)[0] == 400
    assert visitor.fits == {key: first} and len(list((visitor.folder / "pictures").iterdir())) == 2
    studio.remove_picture(visitor, key)
    assert not first.exists() and not visitor.fits


def test_previews_lead_to_the_texture_and_change_nothing(studio, visitor, monkeypatch):
    monkeypatch.setattr(studio_command, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(studio_command, "PREVIEW_SHARE", 1e9)
    with pytest.raises(UserError, match="no preview"):
        studio.preview(visitor)
    assert studio.state(visitor)["task"] is None
    (key,) = finished(studio, visitor, prompt="a man in red", steps=6)
    assert studio.state(visitor)["task"]["previews"] == 6
    last, texture = pixels(studio.preview(visitor)), Image.open(visitor.results[key].job.path)
    worn = np.asarray(texture.resize(last.shape[:2], Image.Resampling.BOX))
    inside = worn[..., 3] == 255
    assert np.abs(last[inside].astype(int) - worn[inside][:, :3]).mean() < 20
    monkeypatch.setattr(studio_command, "PREVIEW_SECONDS", 1e9)
    (same,) = finished(studio, visitor, prompt="a man in red", steps=6)
    assert studio.state(visitor)["task"]["previews"] == 1
    assert np.array_equal(*(pixels(visitor.results[each].job.path.read_bytes()) for each in (key, same)))


def test_each_download_is_what_it_says(studio, visitor, tmp_path):
    (key,) = finished(studio, visitor, prompt="a man in red")
    texture = pixels(studio.file(visitor, key, "png", "rest")[1])
    name, data = studio.file(visitor, key, "glb", "rest")
    (body,) = trimesh.load(io.BytesIO(data), file_type="glb").geometry.values()
    assert name.endswith(".glb") and len(body.faces) == 12
    worn, inside = np.asarray(body.visual.material.baseColorTexture)[..., :3], texture[..., 3] == 255
    assert np.array_equal(worn[inside], texture[..., :3][inside])
    _, data = studio.file(visitor, key, "obj", "rest")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)
        assert sorted(Path(file).suffix for file in archive.namelist()) == [".mtl", ".obj", ".png"]
        (obj,) = (tmp_path / file for file in archive.namelist() if file.endswith(".obj"))
    assert len(trimesh.load(obj, process=False).faces) == 12
    _, data = studio.file(visitor, key, "usdz", "rest")
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    with Image.open(io.BytesIO(studio.file(visitor, key, "gif", "rest")[1])) as turntable:
        assert turntable.n_frames == 36
    for wrong in (("exe", "rest"), ("glb", "sitting")):
        with pytest.raises(UserError, match="there is no"):
            studio.file(visitor, key, *wrong)
    assert len(list(visitor.folder.rglob("*.*"))) == 2  # the texture and the manifest: exports leave nothing


@pytest.mark.parametrize("order", [
    {}, {"prompt": " "}, {"prompt": "a", "region": "feet"}, {"prompt": "a", "edited": "nothing"},
    {"pictures": ["../../etc/passwd"]}, {"prompt": "a", "steps": 2000}, {"prompt": "a", "sampler": "nonsense"},
    {"prompt": "a", "mask": "nothing"},
])  # fmt: skip
def test_orders_that_do_not_fit_are_refused(order, studio, visitor):
    with pytest.raises(ValueError):  # a UserError, or pydantic's
        studio.start(visitor, Order(**order))
    assert not studio.queue and visitor.task is None


def test_a_second_order_waits_for_the_first(studio, visitor, monkeypatch):
    go = threading.Event()
    make_batch = infer_uv.make_batch
    monkeypatch.setattr(infer_uv, "make_batch", lambda *given: go.wait(LONGEST) and make_batch(*given))
    other = studio.admit()[1]
    tasks = [studio.start(visitor, Order(prompt="a man")), studio.start(other, Order(prompt="a woman"))]
    wait_for(lambda: tasks[0].state == "running")
    assert studio.state(other)["task"]["ahead"] == 1 and tasks[1].state == "waiting"
    with pytest.raises(UserError, match="still being made"):
        studio.start(visitor, Order(prompt="a man"))
    monkeypatch.setattr(studio_command, "MOST_WAITING", 2)
    with pytest.raises(UserError, match="too many are waiting"):
        studio.start(studio.admit()[1], Order(prompt="a man"))
    go.set()
    wait_for(lambda: not studio.queue)
    assert [task.state for task in tasks] == ["done", "done"]
    (mine,), (theirs,) = visitor.results, other.results
    assert studio.description(visitor, mine)["prompt"] == "a man"
    assert studio.description(other, theirs)["prompt"] == "a woman"


def test_two_visitors_see_nothing_of_each_other(studio, server, textures):
    (token, mine), (other_token, other) = studio.admit(), studio.admit()
    (key,) = finished(studio, mine, prompt="a man")
    picture = studio.add_picture(mine, (textures / "2.png").read_bytes(), "2.png")["id"]
    assert ask(server, "GET", f"/api/results/{key}/png", token=token)[0] == 200
    for path in (f"/api/results/{key}/png", f"/api/results/{key}/json"):
        assert ask(server, "GET", path, token=other_token)[0] == 400
        assert ask(server, "GET", path)[0] == ask(server, "GET", path, token="guessed")[0] == 403
    assert ask(server, "DELETE", f"/api/pictures/{picture}", token=other_token)[0] == 400
    mask = studio.add_mask(mine, painted(16, (2, 2, 9, 9)))["id"]
    texture = studio.add_texture(mine, (textures / "2.png").read_bytes(), "2.png")["id"]
    theirs = studio.add_texture(other, (textures / "2.png").read_bytes(), "2.png")["id"]
    for order, missing in (({"edited": texture}, "texture"), ({"edited": theirs, "mask": mask}, "painted region")):
        with pytest.raises(UserError, match=f"this {missing} is not there"):
            studio.start(other, Order(prompt="a man", **order))
    assert ask(server, "GET", "/api/preview", token=token)[0] == 200
    assert ask(server, "GET", "/api/preview", token=other_token)[0] == 400
    assert json.loads(ask(server, "GET", "/api/state", token=other_token)[2]) == {"task": None, "results": [theirs]}
    with pytest.raises(UserError, match="this picture is not there"):
        studio.start(other, Order(pictures=[picture]))
    assert mine.pictures and list(other.results) == [theirs]


def test_nothing_but_the_page_and_ones_own_textures_is_read(studio, server):
    token, visitor = studio.admit()
    (key,) = finished(studio, visitor, prompt="a man")
    manifest = next(visitor.folder.rglob("manifest.jsonl")).relative_to(studio.out)
    paths = [
        "/../studio.py", "/studio.py", "/assets/studio/index.html", "/%2e%2e/studio.py", "/..%2fstudio.py",
        "//etc/passwd", "/etc/passwd", "/static/../../README.md", "/index.html/../../../README.md",
        f"/{manifest}", f"/out/{manifest}", f"/api/results/{key}/../../../{manifest}",
        f"/api/results/{key}/manifest.jsonl",
        f"/api/results/{key}/..%2fmanifest.jsonl", "/api/results/..%2f..%2fREADME.md/png", "/api/results/../png",
        f"/api/results/{key}/png/x", "/api/results", "/api/pictures", "/api/", "/api",
    ]  # fmt: skip
    for path in paths:
        status, _, contents = ask(server, "GET", path, token=token)
        assert status in (400, 404) and set(json.loads(contents)) == {"error"}, path
    poses = ask(server, "GET", f"/api/results/{key}/glb?pose=../../x", token=token)
    assert poses[0] == 400


def test_uploads_are_checked_by_content_and_size(studio, server, visitor):
    token, visitor = studio.admit()
    wide = io.BytesIO()
    Image.new("1", (8000, 7000)).save(wide, "PNG")  # a few kilobytes that are 56 megapixels
    for data in (b"<svg onload='alert(1)'/>", b"", b"\x89PNG\r\n\x1a\n" + b"0" * 99, wide.getvalue()):
        status, _, contents = ask(server, "POST", "/api/pictures", data, token)
        assert status == 400 and json.loads(contents)["error"].startswith("cannot read picture"), data[:20]
    assert "pixels are more than" in json.loads(contents)["error"]
    status, _, _ = ask(server, "POST", "/api/pictures", b"", token, Content_Length=str(LARGEST_UPLOAD + 1))
    assert status == 413
    status, _, _ = ask(server, "POST", "/api/pictures", b"", token, Content_Length="-1")
    assert status == 411
    assert not visitor.pictures and not visitor.folder.exists()


def test_an_upload_keeps_its_pixels_alone(studio, visitor, tmp_path):
    tags = Image.Exif()
    tags[0x010E] = "where I live"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg", exif=tags)
    kept = visitor.pictures[studio.add_picture(visitor, (tmp_path / "photo.jpg").read_bytes(), "photo.jpg")["id"]]
    assert b"where I live" not in kept.read_bytes()
    assert np.array_equal(pixels(kept.read_bytes()), np.asarray(Image.open(tmp_path / "photo.jpg")))


def test_uploads_that_nothing_was_made_from_are_removed(studio, textures):
    visitor, idle = studio.admit()[1], studio.admit()[1]
    data = (textures / "2.png").read_bytes()
    used, unused, removed = (studio.add_picture(visitor, data, "2.png")["id"] for _ in range(3))
    studio.add_picture(idle, data, "2.png")
    paths = {key: visitor.pictures[key] for key in (used, unused, removed)}
    finished(studio, visitor, pictures=[used])
    studio.remove_picture(visitor, removed)
    assert not paths[removed].exists() and paths[unused].exists()
    studio.close()
    assert paths[used].exists() and not paths[unused].exists() and not idle.folder.exists()


def test_other_sites_are_refused(studio, server):
    token, _ = studio.admit()
    order = json.dumps({"prompt": "a man"}).encode()
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403  # a name that was pointed here
    assert ask(server, "POST", "/api/textures", order, token, Origin="http://evil.example")[0] == 403
    assert not studio.queue and studio_command.is_loopback(server.server_address[0])
    status, headers, _ = ask(server, "GET", "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    status, _, contents = ask(server, "POST", "/api/textures", b'{"prompt": "a", "steps": 0}', token)
    assert status == 400 and json.loads(contents)["error"].startswith("steps: ")


def test_a_port_that_is_taken_is_one_line(studio):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot open 127.0.0.1:{port}"):
            Server("127.0.0.1", port, studio)


@pytest.fixture()
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    graphics = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *graphics])
        yield browser
        browser.close()


def open_page(browser, server, **options):
    """A page of a new visitor, that asks and errs nothing unseen: lists of foreign addresses and of faults."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(LONGEST * 1000)
    page.foreign, page.faults = [], []
    ours = (server.address, f"blob:{server.address}")
    page.on("request", lambda request: request.url.startswith(ours) or page.foreign.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.faults.append(message.text))
    page.goto(server.address)
    page.wait_for_selector("#examples button")
    return page


def make(page):
    """Presses the button and waits until the body wears the new texture."""
    before = page.get_attribute("#body", "data-shows") or ""
    page.click("#make")
    page.wait_for_function("before => (document.querySelector('#body').dataset.shows || '') !== before", arg=before)
    page.wait_for_selector("#make:not([disabled])")


def axe_findings(page) -> list[str]:
    """What axe-core finds of the page as it stands; [] too where it is not installed."""
    if not AXE.exists():
        return []
    page.evaluate(AXE.read_text())
    violations = page.evaluate("axe.run().then(result => result.violations)")
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in violations]


def test_edits_in_a_browser(browser, server, person, tmp_path):
    page = open_page(browser, server, viewport={"width": 1440, "height": 900})
    page.wait_for_function("() => document.querySelector('#hint').textContent.startsWith('Describe')")
    (visitor,) = server.studio.visitors.values()
    for name, data in zip(("box.png", "box.json"), person):
        (tmp_path / name).write_bytes(data)
    page.set_input_files("#pictures", tmp_path / "box.png")
    page.wait_for_selector("#uploads img")
    assert page.locator("#own option[value=auto]").count() == 0, "this base has no body map"
    page.select_option("#own", "file")
    page.click("#make")
    page.wait_for_function("() => document.querySelector('#fault').textContent.startsWith('Each picture needs')")
    page.set_input_files("#uploads .fit input", tmp_path / "box.json")
    page.wait_for_selector("#uploads .fit:has-text('box.json')")
    page.evaluate("document.querySelector('details').open = true")
    page.select_option("#sampler", "ddim")
    make(page)
    assert "kept" in page.inner_text("#settings") and "ddim" in page.inner_text("#settings")
    page.click("#uploads button")
    page.wait_for_selector("#uploads li", state="detached")

    orange = Image.new("RGB", (SIZE, SIZE), "orange")
    orange.save(tmp_path / "mine.png")
    page.set_input_files("#own-texture", tmp_path / "mine.png")
    page.wait_for_function("() => document.querySelector('#settings').textContent.includes('mine.png')")
    assert page.input_value("#region") == "whole" and page.is_visible("#strength")
    page.select_option("#region", "painted")
    page.fill("#prompt", "a man in blue")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.querySelector('#fault').textContent.startsWith('Nothing is painted')")
    areas = []

    def painted_area() -> int:
        return page.evaluate(
            "() => { const {width, height} = document.querySelector('#paint'), pen = document.querySelector('#paint')"
            ".getContext('2d'); return pen.getImageData(0, 0, width, height).data.filter((value, index) => "
            "index % 4 === 3 && value > 127).length; }"
        )

    page.wait_for_selector("#body[data-shows]")
    bare = page.locator("#body").screenshot()
    box = page.locator("#body").bounding_box()
    centre = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*centre)
    page.mouse.down()  # on the turned body
    page.mouse.move(centre[0] + 30, centre[1] + 20, steps=3)
    page.mouse.up()
    areas.append(painted_area())
    assert page.locator("#body").screenshot() != bare, "the body shows what is painted"
    page.locator("#paint").hover(position={"x": 60, "y": 60})  # on the texture
    page.mouse.down()
    page.mouse.move(*[each + 20 for each in page.locator("#paint").bounding_box().values()][:2], steps=3)
    page.mouse.up()
    areas.append(painted_area())
    page.focus("#paint")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")  # by the keyboard
    areas.append(painted_area())
    page.check("input[value=erase]")
    page.keyboard.press("Space")
    page.focus("#paint")
    page.keyboard.press("Space")
    areas.append(painted_area())
    assert 0 < areas[0] < areas[1] < areas[2] and areas[3] < areas[2], areas
    assert axe_findings(page) == []
    make(page)
    assert "what was painted" in page.inner_text("#settings")
    result = list(visitor.results.values())[-1]
    worn = np.asarray(Image.open(result.job.path))
    changed = (worn[..., :3] != np.asarray(orange)).any(2) & (worn[..., 3] == 255)
    share = np.asarray(result.call.mask.resize((SIZE, SIZE), Image.Resampling.BOX).convert("L")) > 0
    assert changed.any() and (changed & share).sum() > 0.8 * changed.sum()

    page.click("#gallery li:last-child .quiet")  # beside the first
    page.wait_for_selector("#other-body[data-shows]")
    bodies = [page.locator(name) for name in ("#body", "#other-body")]
    before = [body.screenshot() for body in bodies]
    assert page.locator("#settings .differs").count() and page.is_visible("#other-texture")
    page.focus("#other-body")
    page.keyboard.press("ArrowRight")
    assert all(body.screenshot() != seen for body, seen in zip(bodies, before)), "both turn"
    assert axe_findings(page) == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#view-picture")
    page.wait_for_selector("#uploads img")
    assert [fault for fault in page.faults if "400" not in fault] == [] and page.foreign == []


def test_in_a_browser(browser, server, textures, tmp_path):
    page, other = open_page(browser, server, viewport={"width": 1440, "height": 900}), open_page(browser, server)
    page.fill("#prompt", "a man in red")
    make(page)  # text
    page.set_input_files("#pictures", textures / "1.png")
    page.wait_for_selector("#uploads img")
    assert page.is_visible("#weight")
    make(page)  # both
    page.fill("#prompt", "")
    assert not page.is_visible("#weight")
    make(page)  # picture
    page.select_option("#region", "feet")
    make(page)
    assert page.locator("#gallery li").count() == 4 and "feet" in page.inner_text("#settings")

    seen = page.locator("#body").screenshot()
    page.focus("#body")
    page.keyboard.press("ArrowRight")
    assert np.ptp(pixels(seen)[..., :3].astype(int)) > 60 and page.locator("#body").screenshot() != seen, "it turns"
    page.check("#show-outlines")
    assert page.is_visible("#outlines")
    for name in ("PNG", "GLB", "OBJ", "USDZ", "Settings"):
        with page.expect_download() as download:
            page.click(f"#downloads a:text-is('{name}')")
        assert Path(download.value.path()).stat().st_size > 100

    (tmp_path / "no.png").write_text("no picture")
    page.set_input_files("#pictures", tmp_path / "no.png")
    page.wait_for_function("() => document.querySelector('#fault').textContent.startsWith('Cannot read picture')")
    assert [fault for fault in page.faults if "400" not in fault] == [] and len(page.faults) == 1
    assert page.foreign == other.foreign == [] and other.locator("#gallery li").count() == 0

    other.fill("#prompt", "a woman")
    other.evaluate("document.querySelector('details').open = true")
    other.fill("#steps", "200")
    other.select_option("#number", "4")
    other.click("#make")
    other.wait_for_function("() => /^Step [1-9]/.test(document.querySelector('#status').textContent)")
    other.wait_for_function("() => document.querySelector('#hint').textContent.startsWith('Preview after')")
    other.click("#cancel")
    other.wait_for_function("() => document.querySelector('#status').textContent === 'Cancelled.'")
    assert other.is_enabled("#make")

    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    if not AXE.exists():
        pytest.skip("all but accessibility passed, which needs axe-core: npm ci --prefix tests")
    assert axe_findings(page) == []
