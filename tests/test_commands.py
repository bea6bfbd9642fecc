"""Every command, started from another folder as a user starts it: --help, and a mistake in one line."""

import importlib
import os
import runpy
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from common.files import PROJECT_ROOT
from tests.faults.tally import count

# A command → arguments that are wrong, of things that are not there or out of range.
COMMANDS = {
    ("joint.py",): ["--data.dataset=nowhere"],
    ("t2uv.py",): ["--training.t2uv.batchsize=1"],
    ("i2uv.py",): ["--resume", "nowhere", "--training.seed=-1"],
    ("infer_uv.py",): ["--prompt", "a man", "--checkpoint", "nowhere"],
    ("studio.py",): ["--port", "65536"],
    ("personalise.py",): ["--examples", "nowhere", "--name", "sks", "--class", "a man"],
    ("distill.py",): ["--checkpoint", "nowhere"],
    ("evaluate.py",): ["--limit", "0"],
    ("lora_utils.py", "export"): ["nowhere", "--format", "kohya", "--out", "lora"],
    ("-m", "models.publish"): ["--checkpoint", "nowhere", "--licence", "mit", "--out", "hub"],
    ("-m", "atlas_dataset.build_atlas_large"): ["--textures", "nowhere", "--out", "built"],
    ("atlas_dataset/build_atlas_large.py",): ["--textures", "procedural:2", "--views", "-1", "--out", "built"],
    ("render/render_turntable.py",): ["--texture", "nowhere.png", "--out", "turntable.gif"],
    ("-m", "embedded.pretrain"): ["--stage", "unet", "--out", "base"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Command → the result of its mistake, the folder it ran in; a few at a time."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: tuple[str, ...], arguments: list[str]):
        program = [*command] if command[0] == "-m" else [str(PROJECT_ROOT / command[0]), *command[1:]]
        folder = tmp_path_factory.mktemp("elsewhere")
        options = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        return subprocess.run([sys.executable, *program, *arguments], **options), folder

    with ThreadPoolExecutor(4) as pool:
        runs = {command: pool.submit(run, command, mistake) for command, mistake in COMMANDS.items()}
        return {key: future.result() for key, future in runs.items()}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command, tmp_path, monkeypatch, capsys):
    """In this process, which has its imports; that they do from elsewhere is seen of the mistakes."""
    script, *arguments = command if command[0] != "-m" else command[1:]
    monkeypatch.setattr("sys.argv", [script, *arguments, "--help"])
    monkeypatch.chdir(tmp_path)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            if command[0] == "-m":
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(PROJECT_ROOT / script), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, interrupt)
    printed = capsys.readouterr()
    assert end.value.code == 0 and printed.out.startswith("usage: ") and printed.err == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_mistake_is_one_line_and_writes_nothing(command, results):
    result, folder = results[command]
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("script", ["joint.py", "personalise.py", "distill.py", "evaluate.py"])
def test_help_waits_for_no_slow_import(script):
    run = (
        f"import runpy, sys\nsys.argv = [{script!r}, '--help']\ntry: runpy.run_path({script!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", run + "finally: print('torch' in sys.modules, file=sys.stderr)"]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == "False\n"


TRAINING = [
    "--config nowhere.yaml",
    "--config folder",
    "--config noise",
    "--config picture.png",
    "--training.seed=x",
    "--training.seed=-1",
    "--training.seed=1.5",
    "--training.device=tpu",
    "--nonsense",
    "--nonsense.key=1",
    "--output.out_dir",
    "picture.png",
    "--data.dataset=folder",
    "--data.dataset=file",
    "--model.pretrained_model=nowhere",
    "--model.pretrained_model=folder",
    "--resume nowhere",
    "--resume folder",
    "--output.out_dir=file/folder",
    "--output.out_dir=file",
    "--output.log_dir=file",
]
# A module → calls that a user gets wrong, in a folder with a text file, a file of noise, a picture and a folder.
BAD_CALLS = {
    "joint": TRAINING,
    "t2uv": [*TRAINING[:5], "--training.t2uv.max_steps=many"],
    "i2uv": [*TRAINING[:5], "--training.i2uv.max_steps=many"],
    "infer_uv": [
        "",
        "--nonsense",
        "--num many",
        "--prompt a --num 0",
        "--prompt a --batch-size 0",
        "--prompt a --size 0",
        "--prompt a --steps -1",
        "--prompt a --guidance-scale nan",
        "--prompt a --seed -1",
        "--prompt a --export nonsense",
        "--prompt a --sampler nonsense",
        "--prompt a --bones 5",
        "--prompt a --fast 3",
        "--prompt a --fast --steps 8",
        "--prompt a --fast --guidance-scale 2",
        "--prompt a --fast --lora file",
        "--prompt a --prompts-file file",
        "--prompts-file nowhere.txt",
        "--prompts-file folder",
        "--prompts-file noise",
        "--prompts-file empty",
        "--images folder",
        "--images file",
        "--image file",
        "--image folder",
        "--image noise",
        "--prompt a --checkpoint folder",
        "--prompt a --checkpoint file",
        "--prompt a --lora noise",
        "--prompt a --config nowhere.yaml",
        "--prompt a --config noise",
        "--prompt a --adapter nowhere",
        "--prompt a --adapter folder",
        "--prompt a --mask hair",
        "--prompt a --init-texture file",
        "--prompt a --init-texture picture.png --mask nonsense",
        "--prompt a --fit auto",
        "--image picture.png --fit auto --iuv auto",
        "--image picture.png --fit auto --fit auto",
        "--image picture.png --iuv picture.png",
        "--prompt a --relight off",
        "--settings nowhere.png",
        "--settings picture.png",
        "--settings file",
        "--settings folder",
        "--settings noise",
        "--prompt a --out file",
        "--prompt a --out file/folder",
        "--prompt a --out file/texture.png",
        "--prompt a --inference.sampler=nonsense",
    ],
    "studio": [
        "--port many",
        "--port -1",
        "--nonsense",
        "--nonsense.key=1",
        "--checkpoint nowhere",
        "--checkpoint folder",
        "--checkpoint file",
        "--adapter folder",
        "--config nowhere.yaml",
        "--config noise",
        "--training.seed=x",
        "--out file",
        "--out file/folder",
        "--port 0 --host 192.0.2.1",  # of no machine: an address for documents, RFC 5737
    ],
    "personalise": [
        "",
        "--examples folder",
        "--examples folder --name sks --class 'a man' --steps 0",
        "--examples folder --name sks --class 'a man' --steps many",
        "--examples folder --name sks --class 'a man'",
        "--examples file --name sks --class 'a man'",
        "--examples folder --name 'two words' --class 'a man'",
        "--examples folder --name sks --class 'a man' --base-checkpoint nowhere",
        "--examples folder --name sks --class 'a man' --base-checkpoint file",
        "--examples folder --name sks --class 'a man' --nonsense",
        "--examples folder --name sks --class 'a man' --personal.r=many",
    ],
    "distill": [
        "--nonsense",
        "--checkpoint nowhere",
        "--checkpoint folder",
        "--checkpoint file",
        "--fast.windows=0",
        "--training.fast.max_steps=many",
    ],
    "evaluate": [
        "--limit 0",
        "--fast 3",
        "--base --fast 4",
        "--limit many",
        "--task nonsense",
        "--nonsense",
        "--nonsense.key=1",
        "--base --checkpoint folder",
        "--base --task i2uv",
        "--textures folder --base",
        "--prompts file",
        "--textures folder --prompts file",
        "--textures file",
        "--checkpoint folder",
        "--checkpoint file",
        "--out file",
        "--out file/folder",
        "--compare folder folder",
        "--compare file noise",
        "--compare folder",
    ],
    "lora_utils": [
        "",
        "export folder --format nonsense --out out",
        "export folder --format kohya --out out",
        "export file --format kohya --out out",
        "export noise --format peft --out out",
        "export noise.safetensors --format peft --out out",
    ],
    "models.publish": [
        "",
        "--licence mit --checkpoint folder --out out",
        "--licence mit --checkpoint file --out out",
        "--licence mit --metrics nowhere --out out",
        "--licence mit --metrics noise --out out",
        "--licence mit --metrics empty --out out",
    ],
    "atlas_dataset.build_atlas_large": [
        "",
        "--out out",
        "--out out --textures nowhere",
        "--out out --textures folder",
        "--out out --textures file",
        "--out out --textures procedural:0",
        "--out out --textures procedural:many",
        "--out out --textures procedural:2 --views -1",
        "--out out --textures procedural:2 --views many",
        "--out out --textures procedural:2 --height 0",
        "--out out --textures procedural:2 --seed -1",
        "--out out --textures procedural:2 --limit 0",
        "--out out --textures procedural:2 --workers -1",
        "--out out --textures procedural:2 --body nonsense",
        "--out out --textures procedural:2 --config nowhere.yaml",
        "--out out --textures procedural:2 --data.render.fill=x",
        "--out out --textures procedural:2 --nonsense",
        "--out out --textures pictures --prompts nowhere.txt",
        "--out out --textures pictures --prompts empty",
        "--out out --textures pictures --prompts noise",
        "--out out --textures pictures --prompts file --body obj:noise",
        "--out out --textures pictures --prompts file --body obj:nowhere.obj",
        "--out out --textures pictures --prompts file --body smpl:folder",
        "--out file --textures procedural:2",
        "--out folder --verify",
        "--out nowhere --verify",
    ],
    "render.render_turntable": [
        "",
        "--texture nowhere.png --out x.gif",
        "--texture file --out x.gif",
        "--texture noise --out x.gif",
        "--texture folder --out out",
        "--texture picture.png --out x.txt",
        "--texture picture.png --out x.png --format gif",
        "--texture picture.png --out x.gif --format nonsense",
        "--texture picture.png --out x.gif --size 5",
        "--texture picture.png --out x.gif --size 0x0",
        "--texture picture.png --out x.gif --background nonsense",
        "--texture picture.png --out x.gif --frames 0",
        "--texture picture.png --out x.gif --frames many",
        "--texture picture.png --out x.gif --seed -1",
        "--texture picture.png --out x.gif --pose nonsense",
        "--texture picture.png --out x.gif --body nonsense",
        "--texture picture.png --out x.gif --body obj:noise",
        "--texture picture.png --out x.gif --body smpl:noise",
        "--texture picture.png --out file/x.png --size 8x8 --frames 1",
        "--texture picture.png --out file/x.gif --size 8x8 --frames 1",
        "--texture picture.png --out file/frames --size 8x8 --frames 1",
    ],
    "embedded.pretrain.__main__": [
        "--stage nonsense",
        "--device nonsense --stage tokenizer",
        "--unet-steps many",
        "--nonsense",
        "--out out --work work --stage unet",
    ],
}
BAD_CALLS["infer_uv"] += ["--images nowhere", "--image picture.png --fit nowhere", "--prompt a --lora nowhere"]
LONG = "n" * 300  # longer than a file's name can be
for calls in BAD_CALLS.values():
    calls += [call.replace("nowhere", LONG) for call in calls if "nowhere" in call]
BAD_CALLS["infer_uv"] += [f"--prompt a --out {LONG}.png", f"--prompt a --out {LONG}/texture.png"]
BAD_CALLS["joint"] = [*TRAINING, f"--data.dataset={LONG}", f"--output.out_dir={LONG}", f"--output.log_dir={LONG}"]


@pytest.mark.parametrize("module", BAD_CALLS)
def test_bad_calls(module, tmp_path, monkeypatch, run_script):
    """What a user gets wrong is status 2 and one line, which argparse puts behind its usage; no file is written."""
    main = importlib.import_module(module).main
    (tmp_path / "folder").mkdir()
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / "1.png")
    for name, content in {"file": b"a man\n", "noise": bytes(range(256)), "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def files() -> set:
        return {path for path in tmp_path.rglob("*") if path.is_file()}

    before, faults = files(), []
    for call in BAD_CALLS[module]:
        try:
            status, _, error = run_script(main, *shlex.split(call))
        except Exception as failure:  # a traceback, to the user
            faults.append(f"{call}: {failure!r}")
            continue
        is_argparses = error.startswith("usage: ") and ": error: " in error.splitlines()[-1]
        is_one_line = error.splitlines()[-1:] and error.splitlines()[-1].startswith("error: ")
        if status != 2 or "Traceback" in error or not (is_argparses or is_one_line):
            faults.append(f"{call}: {status} {error[:300]}")
        if files() != before:
            faults.append(f"{call}: wrote {files() - before}")
            before = files()
    count(bad_calls=len(BAD_CALLS[module]))
    assert not faults, "\n".join(faults)
