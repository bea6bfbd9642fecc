"""One frame, rasterised and shaded, against the primary rays of Embree alone.

    python benchmarks/bench_render.py            # needs embreex, as the tests do

Medians over repetitions in turn, in one process; the last line is JSON. `speedup_vs_embree` compares one sample a
pixel with one ray a pixel.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from common.processes import keep_freed_memory
from render.cameras import orbit_cameras
from render.lights import studio_lights
from render.rasteriser import rasterize
from render.rigs import load_body
from render.shading import render_views, shade

HEIGHT, WIDTH = 1024, 768
IN_A_ROW = 6


def embree_frame(body, cameras):
    """A function that casts a frame's primary rays at a scene built beforehand."""
    from embreex import rtcore_scene
    from embreex.mesh_construction import TriangleMesh

    scene = rtcore_scene.EmbreeScene(robust=True)
    TriangleMesh(scene, body.vertices[body.faces].numpy().astype(np.float32))
    columns, rows = torch.meshgrid(torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT) + 0.5, indexing="xy")
    focal = cameras.focal[0] * HEIGHT
    rays = torch.stack([(columns - WIDTH / 2) / focal, (rows - HEIGHT / 2) / focal, torch.ones(HEIGHT, WIDTH)], -1)
    rays = (rays @ cameras.rotation[0]).view(-1, 3).numpy()
    eye = -cameras.rotation[0].T @ cameras.translation[0]
    origins = eye.expand(len(rays), 3).contiguous().numpy()
    return lambda: scene.run(origins, rays)


def medians(variants: dict, repetitions: int) -> dict[str, float]:
    """Milliseconds of each variant, run in turn, several times in a row: the first of them finds the caches cold."""
    times = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, frame in variants.items():
            for place in range(IN_A_ROW):
                began = time.perf_counter()
                frame()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if place:
                    times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=21)
    args = parser.parse_args()
    keep_freed_memory()
    body = load_body("anny")
    azimuth, elevation, fov = torch.tensor([30.0]), torch.tensor([5.0]), torch.tensor([30.0])
    cameras = orbit_cameras(body, azimuth, elevation, fov, aspect=WIDTH / HEIGHT)
    texture, background = torch.rand(1, 3, 1024, 1024), torch.ones(1, 3)
    fragments = rasterize(body.vertices, body.faces, cameras, HEIGHT, WIDTH, back_faces=False)
    variants = {
        "Embree, primary rays": embree_frame(body, cameras),
        "rasterised": lambda: rasterize(body.vertices, body.faces, cameras, HEIGHT, WIDTH, back_faces=False),
        "shaded": lambda: shade(fragments, body, body.vertices, texture, studio_lights(cameras), background),
        "rasterised and shaded": lambda: render_views(body, texture, cameras, HEIGHT, WIDTH, supersample=1),
        "the same, 4 samples a pixel": lambda: render_views(body, texture, cameras, HEIGHT, WIDTH, supersample=2),
    }
    milliseconds_of = medians(variants, args.repetitions)
    covered = len(fragments.pixel) / HEIGHT / WIDTH
    print(f"Anny, {WIDTH}x{HEIGHT}, {covered:.0%} covered, {torch.get_num_threads()} threads")
    for name, milliseconds in milliseconds_of.items():
        print(f"{name:<30}{milliseconds:8.1f} ms {1000 / milliseconds:8.1f} frames/s")
    frame = milliseconds_of["rasterised and shaded"]
    result = {
        "speedup_vs_embree": round(milliseconds_of["Embree, primary rays"] / frame, 2),
        "frames_per_second": round(1000 / frame, 1),
        "frames_per_second_antialiased": round(1000 / milliseconds_of["the same, 4 samples a pixel"], 1),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        views = 16
        azimuth, elevation, fov = torch.arange(views) * 22.5, torch.full((views,), 5.0), torch.full((views,), 30.0)
        cuda_cameras = orbit_cameras(body, azimuth, elevation, fov, aspect=WIDTH / HEIGHT).to("cuda")
        cuda_body, cuda_texture = body.to("cuda"), texture.cuda()
        mesh = (cuda_body.vertices, cuda_body.faces)
        cuda_variants = {
            "raster": lambda: rasterize(*mesh, cuda_cameras, HEIGHT, WIDTH, back_faces=False),
            "all": lambda: render_views(cuda_body, cuda_texture, cuda_cameras, HEIGHT, WIDTH, supersample=1),
        }
        on_cuda = medians(cuda_variants, args.repetitions)
        result["cuda_frames_per_second"] = round(1000 * views / on_cuda["all"], 1)
        result["cuda_raster_share"] = round(on_cuda["raster"] / on_cuda["all"], 2)
        print(f"{torch.cuda.get_device_name()}, batch {views}: {result['cuda_frames_per_second']} frames/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
