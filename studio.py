"""Opens a local page that makes UV textures from a prompt, a picture, or both, and turns the textured body in 3D.

python studio.py                                     # then open the address that it prints
python studio.py --checkpoint checkpoints/joint/step-004400 --port 8000

Everything stays on this machine: the page asks nobody else for anything. Textures lie under --out, in a folder for each
visitor, and are made by the functions of infer_uv.py, whose --settings repeats them to the bit.
"""

import argparse
import contextlib
import io
import json
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import infer_uv
from atlas_dataset.fits import FIT_SUFFIXES, read_fit
from common.errors import UserError, exit_on_user_error, reason
from common.files import PROJECT_ROOT, check_writable, write_whole
from common.pictures import encode_image, open_image
from config.configuration import DEFAULT_FAST_STEPS, FAST_STEPS, dotted_overrides
from models.base import resolve_source
from models.body_map import has_body_map
from models.diffusion import SAMPLERS
from models.pipeline import TexturePipeline, read_mask
from models.settings import GenerationSettings, encode_described, read_description
from render.export import INFLUENCES
from render.poses import FAMILIES
from render.regions import BODY_REGIONS
from render.rigs import AnnyRig, SmplRig, load_rig

# The only files that are served: address → file of assets/studio, and its kind.
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/studio.css": ("studio.css", "text/css; charset=utf-8"),
    "/studio.js": ("studio.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
# Format → kind of the file that is downloaded.
FORMATS = {
    "png": "image/png",
    "json": "application/json",
    "glb": "model/gltf-binary",
    "obj": "application/zip",
    "usdz": "model/vnd.usdz+zip",
    "gif": "image/gif",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LARGEST_UPLOAD = 32 * 2**20  # bytes
LARGEST_FIT = 8 * 2**20  # bytes
LARGEST_ORDER = 2**16  # bytes of JSON
MOST_PIXELS = 50_000_000  # of a picture
LARGEST_TEXTURE = 4096  # texels of an upload's side
MOST_PICTURES = 8  # views of a person
MOST_UPLOADS = 64  # pictures that a visitor keeps at once, and as many textures
LONGEST_NAME = 120  # letters of an upload's name
MOST_TEXTURES = 4  # of one order
MOST_WAITING = 16  # orders, of all visitors
MOST_VISITORS = 200
IDLE_SECONDS = 60  # until a connection that says nothing is closed
PREVIEW_SHARE = 0.1  # of a texture's time, that its previews take at most
PREVIEW_SECONDS = 0.4  # between two of them, at least
PREVIEW_SIDE = 512  # pixels, at most
BLANK = (196, 192, 186)  # of the body before anything is made for it


class Cancelled(Exception):
    """A visitor cancelled what is being made; raised between two steps."""


class Order(BaseModel):
    """What the page asks for. pictures, mask: ids of uploads; fits: for each picture the file that came with it, or the
    body map, or none at all; edited: a result's id, made anew in a region of BODY_REGIONS, where the mask is white, or
    everywhere."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field("", max_length=2000)
    negative_prompt: str | None = Field(None, max_length=2000)
    pictures: list[str] = Field([], max_length=MOST_PICTURES)
    fits: list[Literal["auto", "file"]] = Field([], max_length=MOST_PICTURES)
    img_weight: float | None = Field(None, ge=0, le=1)
    guidance_scale: float | None = Field(None, ge=1, le=30)
    seed: int = Field(0, ge=0, lt=2**53)  # that JavaScript's numbers hold exactly
    steps: int | None = Field(None, ge=1, le=200)
    sampler: Literal["auto", *SAMPLERS] | None = None
    number: int = Field(1, ge=1, le=MOST_TEXTURES)
    edited: str | None = None
    region: str | None = None
    mask: str | None = None
    strength: float | None = Field(None, ge=0.01, le=1)


@dataclass(frozen=True)
class Result:
    """A texture that is there. is_uploaded: to be edited, not made here."""

    job: infer_uv.Job
    call: infer_uv.Call
    is_uploaded: bool = False


@dataclass(eq=False)
class Task:
    """An order on its way. state: waiting, running, done, cancelled or failed; step counts over all its textures;
    preview: a JPEG of where the texture is going, the previews counted."""

    jobs: list[infer_uv.Job]
    call: infer_uv.Call
    state: str = "waiting"
    step: int = 0
    message: str = ""
    preview: bytes | None = None
    previews: int = 0
    preview_due: float = 0.0  # of time.monotonic
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def steps(self) -> int:
        return self.call.settings.num_inference_steps * len(self.jobs)


@dataclass(eq=False)
class Visitor:
    """One browser: what it uploaded and what was made for it, by ids that mean nothing to another visitor. A fit has
    its picture's id."""

    folder: Path
    pictures: dict[str, Path] = field(default_factory=dict)
    fits: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    task: Task | None = None
    orders: int = 0

    def uses(self, path: Path) -> bool:
        """Whether a texture was made, or is being made, from an upload."""
        sources = [(result.job, result.call) for result in self.results.values()]
        sources += [(job, self.task.call) for job in self.task.jobs] if self.task else []
        edits = [call.description.get(name) for _, call in sources for name in ("init_texture", "mask")]
        return str(path) in edits or any(str(path) in (*job.images, *job.fits) for job, _ in sources)


class Studio:
    """The model, its visitors, and one queue for all: a single texture is made at a time."""

    def __init__(self, pipeline: TexturePipeline, args: argparse.Namespace, overrides: list[str], out: Path):
        """args: of `infer_uv.parse_args`, with the model that pipeline was loaded from."""
        self.pipeline, self.args, self.overrides, self.out = pipeline, args, overrides, out.resolve()
        self.visitors: dict[str, Visitor] = {}
        self.queue: list[Task] = []
        self.lock, self.exporting = threading.RLock(), threading.Lock()
        self.worker = ThreadPoolExecutor(1)

    def admit(self) -> tuple[str, Visitor]:
        """A new visitor and the token that it is known by. Raises UserError when there are too many."""
        with self.lock:
            if len(self.visitors) >= MOST_VISITORS:
                raise UserError("too many visitors: start the studio again")
            token, name = secrets.token_urlsafe(24), f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            self.visitors[token] = Visitor(self.out / name)
            return token, self.visitors[token]

    def add_picture(self, visitor: Visitor, data: bytes, name: str) -> dict:
        """Keeps an upload, decoded and written anew, so that nothing but its pixels stays. Raises UserError for what
        is no picture, and for one too many."""
        image = open_image(data, name, most_pixels=MOST_PIXELS)
        with self.lock:
            if len(visitor.pictures) >= MOST_UPLOADS:
                raise UserError(f"{MOST_UPLOADS} pictures are the most: remove some")
        key = secrets.token_hex(8)
        path = visitor.folder / "pictures" / f"{key}.png"
        write_whole(path, encode_image(image, format="PNG"))
        visitor.pictures[key] = path
        return {"id": key, "width": image.width, "height": image.height}

    def remove_picture(self, visitor: Visitor, key: str) -> None:
        """Forgets an upload; its file goes too unless a texture was made from it, which could not be repeated."""
        with self.lock:
            self.owned(visitor.pictures, key, "picture")
            for uploaded in filter(None, (visitor.pictures.pop(key), visitor.fits.pop(key, None))):
                if not visitor.uses(uploaded):
                    uploaded.unlink(missing_ok=True)

    def add_fit(self, visitor: Visitor, key: str, data: bytes, name: str) -> None:
        """Keeps how the body stands in an upload, in place of what was said of it before. Raises UserError for what is
        no fit of this picture and body."""
        picture, suffix = self.owned(visitor.pictures, key, "picture"), Path(name).suffix.lower()
        if suffix not in FIT_SUFFIXES:
            raise UserError(f"{name} is no fit: give a file that ends in {', '.join(FIT_SUFFIXES)}")
        path = picture.with_name(f"{secrets.token_hex(8)}{suffix}")
        write_whole(path, data)
        try:
            with Image.open(picture) as image:
                read_fit(path, self.pipeline.body_spec, image.height, image.width)
        except UserError as error:
            path.unlink()
            raise UserError(str(error).replace(str(path), name)) from None
        with self.lock:
            earlier, visitor.fits[key] = visitor.fits.get(key), path
            if earlier and not visitor.uses(earlier):
                earlier.unlink(missing_ok=True)

    def add_mask(self, visitor: Visitor, data: bytes) -> dict:
        """Keeps a painted region, white on black or on nothing; one that nothing was made from goes. Raises UserError
        for what is no square picture, and for one where nothing is painted."""
        image = open_image(data, "of the painted region", most_pixels=LARGEST_TEXTURE**2)
        check_square(image)
        painted = image.convert("L")
        if image.mode == "RGBA":
            painted = ImageChops.multiply(painted, image.getchannel("A"))
        if not painted.getextrema()[1]:
            raise UserError("nothing is painted: paint what is to be made anew")
        key = secrets.token_hex(8)
        path = visitor.folder / "pictures" / f"{key}.png"
        write_whole(path, encode_image(painted, format="PNG"))
        with self.lock:
            self.forget(visitor, visitor.masks)
            visitor.masks[key] = path
        return {"id": key}

    def add_texture(self, visitor: Visitor, data: bytes, name: str) -> dict:
        """Keeps a texture to be edited, which shows among the results. Raises UserError for what is no texture, and for
        one too many."""
        image = open_image(data, name, most_pixels=LARGEST_TEXTURE**2)
        check_square(image)
        if image.mode == "RGBA" and not image.getchannel("A").getextrema()[1]:
            raise UserError(f"{name} is transparent everywhere: give a texture that shows something")
        with self.lock:
            if sum(result.is_uploaded for result in visitor.results.values()) >= MOST_UPLOADS:
                raise UserError(f"{MOST_UPLOADS} uploaded textures are the most: start the studio again")
        key, description = secrets.token_hex(8), {"uploaded": name}
        path = visitor.folder / "textures" / f"{key}.png"
        write_whole(path, encode_described(image, description))
        job, call = infer_uv.Job(None, (), 0, path), self.call(self.pipeline.settings, description)
        with self.lock:
            visitor.results[key] = Result(job, call, is_uploaded=True)
        return {"id": key}

    @staticmethod
    def forget(visitor: Visitor, uploads: dict[str, Path]) -> None:
        """Removes those uploads from which nothing was made."""
        for key, path in list(uploads.items()):
            if not visitor.uses(path):
                uploads.pop(key)
                path.unlink(missing_ok=True)

    def call(
        self, settings: GenerationSettings, description: dict, init_texture: Image.Image | None = None, mask=None
    ) -> infer_uv.Call:
        # As of a list: written to the visitor's manifest, nothing printed.
        shared = ([], "rest", INFLUENCES[0], True, None)
        return infer_uv.Call(self.pipeline, settings, init_texture, mask, description, *shared)

    @property
    def finds_bodies(self) -> bool:
        """Whether the base has a body map, which finds the body in a picture without a fit."""
        base = resolve_source(self.pipeline.trained.cfg.model.pretrained_model)
        return self.pipeline.body_spec == "anny" and has_body_map(base)

    def start(self, visitor: Visitor, order: Order) -> Task:
        """Puts an order into the queue. Raises UserError for what does not fit together, and for a second one."""
        task = self.prepare(visitor, order)
        with self.lock:
            if visitor.task and visitor.task in self.queue:
                raise UserError("your last textures are still being made: wait for them or cancel")
            if len(self.queue) >= MOST_WAITING:
                raise UserError("too many are waiting: try again in a while")
            visitor.task = task
            self.queue.append(task)
        self.worker.submit(self.make, visitor, task)
        return task

    def prepare(self, visitor: Visitor, order: Order) -> Task:
        """The textures of an order as infer_uv.py would be asked for them."""
        args = argparse.Namespace(**vars(self.args))
        args.prompt = order.prompt.strip() or None
        args.image = [str(self.owned(visitor.pictures, key, "picture")) for key in order.pictures] or None
        if not (args.prompt or args.image):
            raise UserError("describe the person, add a picture, or both")
        args.fit = self.asked_fits(visitor, order)
        if order.edited is None and not order.region is order.mask is None:
            raise UserError("a region is made anew on a texture: choose one first")
        if order.region is not None and order.mask is not None:
            raise UserError("choose a region by name or paint one, not both")
        if order.edited is not None and args.fit:
            raise UserError("a fit keeps a picture's pixels, an edit a texture's: choose one of them")
        args.img_weight = order.img_weight if args.prompt and args.image else None
        args.negative_prompt, args.guidance_scale = order.negative_prompt, order.guidance_scale
        args.num_inference_steps, args.seed, args.num = order.steps, order.seed, order.number
        args.sampler = order.sampler
        if order.edited is not None:
            args.init_texture = str(self.owned(visitor.results, order.edited, "texture").job.path)
            args.mask, args.strength = order.region, order.strength
            if order.mask is not None:
                args.mask = str(self.owned(visitor.masks, order.mask, "painted region"))
        with self.lock:
            visitor.orders += 1
            args.out = str(visitor.folder / f"{visitor.orders:04d}")
        infer_uv.check(args)
        if args.image:
            infer_uv.check_takes_pictures(self.pipeline.trained)
        init_texture, mask = open_image(args.init_texture) if args.init_texture else None, read_mask(args.mask)
        if mask is not None:
            self.pipeline.mask(mask, self.pipeline.settings.size)  # fails here, not after the queue
        settings = infer_uv.resolve_settings(args, {}, self.pipeline)
        description = infer_uv.shared_description(args, self.overrides, settings, self.pipeline)
        return Task(infer_uv.list_jobs(args), self.call(settings, description, init_texture, mask))

    def asked_fits(self, visitor: Visitor, order: Order) -> list[str] | None:
        """Of each picture, as --fit names it. Raises UserError where one has none."""
        if not order.fits:
            return None
        if len(order.fits) != len(order.pictures):
            raise UserError("of several pictures each needs its fit, or none has one")
        if "auto" in order.fits and not self.finds_bodies:
            raise UserError("this base finds no body in a picture: give the file of its fit")
        sources = zip(order.fits, order.pictures)
        return [infer_uv.AUTO if fit == "auto" else str(self.owned(visitor.fits, key, "fit")) for fit, key in sources]

    @staticmethod
    def owned(things: dict, key: str, kind: str):
        if key not in things:
            raise UserError(f"this {kind} is not there")
        return things[key]

    def make(self, visitor: Visitor, task: Task) -> None:
        """Makes and writes the textures of a task, one after the other, so that the first is there soon; in the
        queue's thread."""

        def check_cancelled():
            if task.cancelled.is_set():
                raise Cancelled

        def on_step():
            task.step += 1
            check_cancelled()

        def on_preview(latents: Tensor):
            start = time.monotonic()
            if start < task.preview_due:
                return
            preview = self.pipeline.preview(latents[:1])
            preview.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
            task.preview = encode_image(preview, format="JPEG", quality=85)
            task.previews += 1
            end = time.monotonic()
            task.preview_due = end + max(PREVIEW_SECONDS, (end - start) / PREVIEW_SHARE)

        try:
            check_cancelled()
            task.state, first = "running", task.jobs[0]
            opened = {path: open_image(path) for path in first.images}  # the same pictures for all seeds
            partial = infer_uv.partial_of(first, opened, task.call, check_cancelled) if first.fits else None
            for number, job in enumerate(task.jobs, 1):
                partials = {job: partial} if partial else {}
                (texture,) = infer_uv.make_batch([job], opened, partials, None, task.call, on_step, on_preview)
                infer_uv.write_job(job, texture, partial, (0, 1), task.call)
                task.step = task.call.settings.num_inference_steps * number  # an edit takes a share of them
                with self.lock:
                    visitor.results[secrets.token_hex(8)] = Result(job, task.call)
            task.state = "done"
        except Cancelled:
            task.state = "cancelled"
        except Exception as error:  # the queue goes on
            if not isinstance(error, UserError):
                traceback.print_exc()
            task.message, task.state = reason(error), "failed"
        finally:
            with self.lock:
                self.queue.remove(task)

    def cancel(self, visitor: Visitor) -> None:
        if visitor.task:
            visitor.task.cancelled.set()

    def description(self, visitor: Visitor, key: str) -> dict:
        """What a texture's own file says of how it was made."""
        return read_description(self.owned(visitor.results, key, "texture").job.path)

    def preview(self, visitor: Visitor) -> bytes:
        if visitor.task is None or visitor.task.preview is None:
            raise UserError("there is no preview")
        return visitor.task.preview

    def blank_body(self, pose: str) -> bytes:
        """The body without a texture, as a GLB."""
        result = Result(infer_uv.Job(None, (), 0, Path("body.png")), self.call(self.pipeline.settings, {}))
        return self.exported(result, Image.new("RGB", (8, 8), BLANK), "glb", pose)[1]

    def file(self, visitor: Visitor, key: str, name: str, pose: str) -> tuple[str, bytes]:
        """A texture in one of FORMATS, the body in a pose → the file's name and contents. An OBJ comes in a .zip with
        its .mtl and .png. Raises UserError for another format or pose."""
        result = self.owned(visitor.results, key, "texture")
        path = result.job.path
        if name not in FORMATS:
            raise UserError(f"there is no {name!r}: use {', '.join(FORMATS)}")
        if name == "png":
            return path.name, path.read_bytes()
        if name == "json":
            text = json.dumps(read_description(path), ensure_ascii=False, indent=2)
            return f"{path.stem}.json", text.encode()
        return self.exported(result, open_image(path), name, pose)

    def exported(self, result: Result, texture: Image.Image, name: str, pose: str) -> tuple[str, bytes]:
        if pose not in self.poses():
            raise UserError(f"there is no pose {pose!r}: use {', '.join(self.poses())}")
        call = replace(result.call, exports=[name], pose=pose)
        with self.exporting, tempfile.TemporaryDirectory() as folder:
            job = replace(result.job, path=Path(folder) / result.job.path.name)
            (exported,) = infer_uv.export(job, texture, None, call)
            if name != "obj":
                return exported.name, exported.read_bytes()
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(Path(folder).iterdir()):
                    archive.write(file, file.name)
            return f"{job.path.stem}-obj.zip", packed.getvalue()

    def poses(self) -> list[str]:
        return ["rest", *FAMILIES] if isinstance(load_rig(self.pipeline.body_spec), AnnyRig | SmplRig) else ["rest"]

    def defaults(self) -> dict:
        """What the page shows before anything is asked for."""
        settings = self.pipeline.settings
        return {
            "fast": self.args.fast,
            "steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "negative_prompt": settings.negative_prompt,
            "sampler": settings.sampler,
            "samplers": ["auto", *SAMPLERS],
            "regions": BODY_REGIONS,
            "poses": self.poses(),
            "takes_pictures": self.pipeline.trained.aligner is not None,
            "finds_bodies": self.finds_bodies,
            "fit_suffixes": FIT_SUFFIXES,
            "most_textures": MOST_TEXTURES,
            "most_pictures": MOST_PICTURES,
            "largest_upload": LARGEST_UPLOAD,
            "largest_fit": LARGEST_FIT,
        }

    def state(self, visitor: Visitor) -> dict:
        """What the page shows now: the visitor's own task and textures, oldest first."""
        with self.lock:
            task, results = visitor.task, list(visitor.results)
            ahead = self.queue.index(task) if task in self.queue else 0
        shown = task and {
            "state": task.state,
            "step": min(task.step, task.steps),
            "steps": task.steps,
            "message": task.message,
            "ahead": ahead,
            "cancelled": task.cancelled.is_set(),
            "previews": task.previews,
        }
        return {"task": shown, "results": results}

    def close(self) -> None:
        """Ends what is being made, and removes uploads from which nothing was made."""
        for visitor in self.visitors.values():
            self.cancel(visitor)
        self.worker.shutdown()
        for visitor in self.visitors.values():
            visitor.task = None
            uploaded = {key: each.job.path for key, each in visitor.results.items() if each.is_uploaded}
            for uploads in (visitor.pictures, visitor.fits, visitor.masks, uploaded):
                self.forget(visitor, uploads)
            for folder in (visitor.folder / "pictures", visitor.folder / "textures", visitor.folder):
                with contextlib.suppress(OSError):  # not empty, or never made
                    folder.rmdir()


class Refusal(Exception):
    """What is not served, by its HTTP status."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One connection. Nothing in an address is ever used as a path: it is looked up in STATIC or among the visitor's
    own ids."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "studio", ""
    timeout = IDLE_SECONDS

    @property
    def studio(self) -> Studio:
        return self.server.studio

    def do_GET(self):
        routes = {
            "state": self.get_state,
            "defaults": self.get_defaults,
            "preview": self.get_preview,
            "body": self.get_body,
        }
        self.answer({name: (route, 0) for name, route in routes.items()} | {"results": (self.get_result, 2)})

    def do_POST(self):
        uploads = {"pictures": self.post_picture, "masks": self.post_mask, "results": self.post_texture}
        routes = uploads | {"textures": self.post_order, "cancel": self.post_cancel}
        self.answer({name: (route, 0) for name, route in routes.items()} | {"fits": (self.post_fit, 1)})

    def do_DELETE(self):
        self.answer({"pictures": (self.delete_picture, 1)})

    def answer(self, routes: dict) -> None:
        """Serves a static file or /api/NAME/ID/... routes: name → method, and how many ids it takes."""
        try:
            self.check_sender()
            address = urlsplit(self.path)
            if self.command == "GET" and address.path in STATIC:
                self.send_static(address.path)
                return
            name, *ids = address.path.removeprefix("/api/").split("/")
            route, count = routes.get(name, (None, None))
            if route is None or len(ids) != count:
                raise Refusal(HTTPStatus.NOT_FOUND, "there is nothing here")
            visitor = self.studio.visitors.get(self.token())
            if visitor is None:
                raise Refusal(HTTPStatus.FORBIDDEN, "the studio was started anew: reload the page")
            route(visitor, *ids)
        except Refusal as refusal:
            self.refuse(refusal.status, str(refusal))
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, fault["loc"])) or "order"
            self.refuse(HTTPStatus.BAD_REQUEST, f"{name.replace('_', ' ')}: {fault['msg'].lower()}")
        except UserError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # what the request still sends is not read
        self.send_json({"error": message}, status)

    def check_sender(self) -> None:
        """Raises Refusal for a page of another site, under its own name or under ours (DNS rebinding)."""
        host = self.headers.get("Host", "")
        if self.server.is_local and host not in self.server.own_names:
            raise Refusal(HTTPStatus.FORBIDDEN, f"open {self.server.address}")
        if self.command != "GET" and self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise Refusal(HTTPStatus.FORBIDDEN, "another site asked for this")

    @property
    def cookie(self) -> str:
        return f"studio-{self.server.server_port}"  # browsers share cookies among all ports of a host

    def token(self) -> str | None:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(self.cookie)
        except CookieError:
            return None
        return morsel and morsel.value

    def body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if int(length) > most:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"this is larger than {most / 2**20:g} MB")
        return self.rfile.read(int(length))

    def send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **HEADERS, **named}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_json(self, value: dict, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send(json.dumps(value).encode(), "application/json", status)

    def send_static(self, path: str) -> None:
        name, kind = STATIC[path]
        headers = {}
        if path == "/" and self.token() not in self.studio.visitors:
            token, _ = self.studio.admit()
            headers["Set_Cookie"] = f"{self.cookie}={token}; HttpOnly; SameSite=Strict; Path=/"
        self.send((PROJECT_ROOT / "assets" / "studio" / name).read_bytes(), kind, **headers)

    def get_state(self, visitor: Visitor) -> None:
        self.send_json(self.studio.state(visitor))

    def get_defaults(self, visitor: Visitor) -> None:
        self.send_json(self.studio.defaults())

    def get_preview(self, visitor: Visitor) -> None:
        self.send(self.studio.preview(visitor), "image/jpeg")

    def get_body(self, visitor: Visitor) -> None:
        self.send(self.studio.blank_body(self.asked("pose", "rest")), FORMATS["glb"])

    def asked(self, name: str, default: str = "") -> str:
        """A value of the address's query."""
        return parse_qs(urlsplit(self.path).query).get(name, [default])[0]

    def upload_name(self) -> str:
        """What the visitor's file is called, for messages."""
        name = self.asked("name", "that you gave").replace("\\", "/").rpartition("/")[2]
        return "".join(letter for letter in name if letter.isprintable())[-LONGEST_NAME:]

    def get_result(self, visitor: Visitor, key: str, name: str) -> None:
        file, data = self.studio.file(visitor, key, name, self.asked("pose", "rest"))
        is_saved = bool(self.asked("save"))
        headers = {"Content_Disposition": f'attachment; filename="{download_name(file)}"'} if is_saved else {}
        self.send(data, FORMATS[name], **headers)

    def post_picture(self, visitor: Visitor) -> None:
        self.send_json(self.studio.add_picture(visitor, self.body(LARGEST_UPLOAD), self.upload_name()))

    def post_fit(self, visitor: Visitor, key: str) -> None:
        self.studio.add_fit(visitor, key, self.body(LARGEST_FIT), self.upload_name())
        self.send_json({})

    def post_mask(self, visitor: Visitor) -> None:
        self.send_json(self.studio.add_mask(visitor, self.body(LARGEST_UPLOAD)))

    def post_texture(self, visitor: Visitor) -> None:
        self.send_json(self.studio.add_texture(visitor, self.body(LARGEST_UPLOAD), self.upload_name()))

    def delete_picture(self, visitor: Visitor, key: str) -> None:
        self.studio.remove_picture(visitor, key)
        self.send_json({})

    def post_order(self, visitor: Visitor) -> None:
        self.studio.start(visitor, Order.model_validate_json(self.body(LARGEST_ORDER)))
        self.send_json(self.studio.state(visitor), HTTPStatus.ACCEPTED)

    def post_cancel(self, visitor: Visitor) -> None:
        self.body(0)
        self.studio.cancel(visitor)
        self.send_json({})

    def log_message(self, format: str, *arguments) -> None:
        """Says nothing: who looks at what is nobody's business."""


def check_square(image: Image.Image) -> None:
    if image.width != image.height:
        raise UserError(f"this is {image.width} x {image.height} pixels: a UV texture is as wide as it is high")


def download_name(name: str) -> str:
    """A file's name as a header may hold it: ASCII, without quotes."""
    return name.encode("ascii", "replace").decode().replace("?", "-").replace('"', "-")


class Server(ThreadingHTTPServer):
    """Serves one studio at an address. Raises UserError where it cannot be opened."""

    daemon_threads = True

    def __init__(self, host: str, port: int, studio: Studio):
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot open {host}:{port}: {reason(error)}; choose another --port or --host") from None
        self.studio = studio
        self.is_local = is_loopback(host)
        self.own_names = {f"{name}:{self.server_port}" for name in (host, "127.0.0.1", "localhost")}
        self.address = f"http://{host}:{self.server_port}/"

    def server_bind(self) -> None:
        """Without HTTPServer's question, to a name server, whose this address is."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:
        """A visitor who left in the middle of an answer is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of any known layout (default: your newest one, or the embedded one)")
    parser.add_argument("--config", help="names the base of weights that do not say theirs")
    parser.add_argument("--adapter", action="append", metavar="DIR[:weight]", help="of personalise.py; several times")
    parser.add_argument("--fast", type=int, nargs="?", const=DEFAULT_FAST_STEPS, choices=FAST_STEPS,
                        help="so few steps, without guidance, "
                        f"by its fast adapter (alone: {DEFAULT_FAST_STEPS}; see distill.py)")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="another lets others in, unasked (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/studio"), help="folder (default: %(default)s)")
    args, unknown = parser.parse_known_args()
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: give 0 to {2**16 - 1}")
    return args, dotted_overrides(unknown)


def open_studio(args: argparse.Namespace, overrides: list[str]) -> Studio:
    """Loads the model and the body. Raises UserError for what cannot be loaded."""
    asked, _ = infer_uv.parse_args([])
    asked.checkpoint, asked.config, asked.adapter = args.checkpoint, args.config, args.adapter
    asked.fast = args.fast
    pipeline = infer_uv.load_pipeline(asked, overrides)
    load_rig(pipeline.body_spec)
    check_writable(args.out)
    return Studio(pipeline, asked, overrides, args.out)


def main():
    with exit_on_user_error():
        args, overrides = parse_args()
        studio = open_studio(args, overrides)
        server = Server(args.host, args.port, studio)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ending", flush=True)
        finally:
            server.server_close()
            studio.close()


if __name__ == "__main__":
    main()
