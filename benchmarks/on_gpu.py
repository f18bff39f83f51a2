"""All that wants a GPU, by one command, what is worth most first: each part by itself, within its time.

    python benchmarks/on_gpu.py --list                        the parts, their seconds and their commands
    python benchmarks/on_gpu.py --minutes 9.5                 as many as that takes; the last line says how to go on
    python benchmarks/on_gpu.py --results out/gpu speed large these parts alone
    python benchmarks/on_gpu.py --dry                         here, tiny, without a GPU: does each part start and end?

A part is a command of its own: one that fails, hangs or takes the GPU down with it leaves the others their turn. Its
figures (PART.json), what it printed (PART.log, written as it is printed) and `parts.json`, rewritten after each, lie in
`--results`, so that whoever is cut off keeps what was measured. `parts.json` alone holds all figures too: fetch that
one from a machine that gives few files back; `benchmarks/gpu_tables.py --take` puts it beside what is committed.

Nothing needs to be installed: the folders of this repository are put on the path, and plugins named by NIBS_PLUGINS.
Peers lie in out/peers, or are installed:

    python -m pip install --no-deps --target out/peers inf-cl==1.2.1 memeff==0.3.1 siglip-kernel==0.1.2 \\
        cut-cross-entropy open_clip_torch

It ends with 1 if a part failed or was not begun.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [".", "conformance", *(f"backends/nibs-{name}" for name in ("numpy", "torch", "jax", "cupy")), "out/peers"]
PLUGINS = "nibs_numpy.plugin,nibs_torch.plugin,nibs_jax.plugin,nibs_cupy.plugin"
VECTORS = "backends/nibs-cupy/nibs_cupy/kernels/vectors"
SUITE = "-m pytest -q -p nibs_conformance.plugin --pyargs nibs_conformance"
# Most of the suite's time on a GPU is one thread's: compilers, and the truth in float64. With pytest-xdist, a dozen's.
WORKERS = "-p xdist.plugin -n 12" if importlib.util.find_spec("xdist") else ""
TINY = "--device cpu --n 48 --d 16 --rows 24 --copies 2 --repeats 1"
WORTH = 0.5  # of a part's seconds: with less left, it would be cut off for little, and is for another call
GRACE = 10  # seconds in which an interrupted part may write down what it has


@dataclass(frozen=True)
class Part:
    """arguments: of Python; {out} is its JSON, and file that one's name. dry: the same without a GPU.

    leaves: files that it writes elsewhere (a pattern), and what they are called among the results.
    """

    name: str
    seconds: int
    arguments: str
    dry: str
    leaves: tuple[tuple[str, str], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    file: str = ""


def torch_part(name: str, seconds: int, parts: str) -> Part:
    """Of benchmarks/gpu.py."""
    command = f"benchmarks/gpu.py --parts {parts} --output {{out}}"
    return Part(name, seconds, f"{command} --seconds {seconds - GRACE}", f"{command} {TINY}")


def cupy_part(name: str, seconds: int, steps: str) -> Part:
    """Of benchmarks/gpu_cupy.py, whose files have fixed places."""
    command = f"benchmarks/gpu_cupy.py {steps}"
    leaves = (("out/gpu-cupy.json", f"{name}.json"), (f"{VECTORS}/*.npz", "vectors/{name}"))
    return Part(name, seconds, command, f"{command} --dry", leaves)


PARTS = [
    torch_part("check", 90, "check"),
    torch_part("speed", 240, "speed"),
    cupy_part("cupy-speed", 280, "check speed"),
    torch_part("large", 240, "large"),
    torch_part("tune", 180, "tune"),
    torch_part("speed-tuned", 200, "speed"),
    torch_part("ring", 120, "ring"),
    Part(
        "jax",
        200,
        "benchmarks/gpu_jax.py --output {out}",
        "benchmarks/gpu_jax.py --n 48 --d 16 --turns 1 --output {out}",
        environment=(("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),),
    ),
    Part(
        "torch-suite",
        570,
        f"{SUITE} {WORKERS} --nibs-backend torch --nibs-device cuda --nibs-dtypes float32,bfloat16,float16",
        f"{SUITE} --nibs-backend torch --nibs-dtypes float32 --nibs-cases symmetric -k test_loss",
        environment=(("NIBS_TORCH_KERNEL", "triton"),),
    ),
    Part(
        "peers",
        500,
        "benchmarks/run.py --device cuda --turns 2 --patience 60 --results {folder}",
        "benchmarks/run.py --device cpu --n 48 --widths --turns 1 --no-memory --dtypes float32 --results {folder}",
        environment=(("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),),
        file="cuda.json",
    ),
    cupy_part("cupy-kernels", 200, "ceilings kernels"),
    cupy_part("cupy-suite", 570, "record suite"),
]


def environment(part: Part, *, dry: bool) -> dict[str, str]:
    """Of a part: this checkout first, and what is not installed named."""
    path = [str(ROOT / folder) for folder in FOLDERS] + [os.environ.get("PYTHONPATH", "")]
    words = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    words["NIBS_PLUGINS"] = os.environ.get("NIBS_PLUGINS", PLUGINS)
    own = {} if dry and part.name == "torch-suite" else dict(part.environment)
    return {**os.environ, **words, **own}


def command(part: Part, results: Path, *, dry: bool) -> list[str]:
    """What is run."""
    words = shlex.split(part.dry if dry else part.arguments)
    return [sys.executable, *(word.format(out=results / f"{part.name}.json", folder=results) for word in words)]


def run(part: Part, results: Path, limit: float, *, dry: bool) -> dict[str, object]:
    """The part, as long as it may take; what came of it."""
    words = command(part, results, dry=dry)
    begun, since = time.monotonic(), time.time() - 1  # clocks of files are coarse
    with (results / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(part, dry=dry),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {limit:.0f} s"
        finally:
            end(process)
    for pattern, name in part.leaves:
        for left in ROOT.glob(pattern):
            if left.stat().st_mtime >= since:
                kept = results / name.format(name=left.name)
                kept.parent.mkdir(exist_ok=True)
                shutil.copy(left, kept)
    printed = (results / f"{part.name}.log").read_text(errors="replace").strip().splitlines()
    record = {
        "part": part.name,
        "outcome": outcome,
        "seconds": round(time.monotonic() - begun, 1),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *words[1:]]),  # without the path of this machine's
        "last words": printed[-3 if outcome == "done" else -30 :],
    }
    figures = results / (part.file or f"{part.name}.json")
    if figures.is_file() and figures.stat().st_mtime >= since:
        with contextlib.suppress(ValueError):  # cut off while it wrote
            record.update(file=figures.name, figures=json.loads(figures.read_text()))
    return record


def end(process: subprocess.Popen[bytes]) -> None:
    """A part and all that it started: as Ctrl-C would, then for good."""
    for how, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"in this order: {', '.join(names)}; default: all")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of them; default: 9.5")
    parser.add_argument("--results", type=Path, default=Path("out/gpu"), help="a folder; default: out/gpu")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    parser.add_argument("--dry", action="store_true", help="tiny, and without a GPU")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.parts if name not in names]:
        parser.error(f"no part {unknown[0]!r}: expected some of {', '.join(names)}")
    results = asked.results.resolve()
    chosen = [part for part in PARTS if not asked.parts or part.name in asked.parts]
    if asked.list:
        for part in chosen:
            print(f"{part.name:14}{part.seconds:4} s  python {shlex.join(command(part, results, dry=asked.dry)[1:])}")
        return 0
    results.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * asked.minutes
    record = results / "parts.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    later = []
    for part in chosen:
        left = until - time.monotonic() - GRACE
        if left < WORTH * part.seconds:
            later.append(part)
            continue
        limit = min(part.seconds, left)
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        found[part.name] = run(part, results, limit, dry=asked.dry)
        record.write_text(json.dumps(found, indent=1) + "\n")
        outcome, taken = found[part.name]["outcome"], found[part.name]["seconds"]
        print(f"{part.name}: {outcome}, {taken} s", *found[part.name]["last words"], sep="\n    ", flush=True)
    if later:
        words = ["python", "benchmarks/on_gpu.py", *(part.name for part in later), "--results", str(asked.results)]
        print(f"no time left; to go on: {shlex.join(words)}")
    done = [part for part in chosen if part not in later and found[part.name]["outcome"] == "done"]
    return 0 if len(done) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
