"""What an accelerator makes of it: the `gpu` tests and the benchmarks of RandAugment, pruning and the Distiller.

    python -m benchmarks.gpu                          # or make bench-gpu
    KERAS_BACKEND=jax python -m benchmarks.gpu

Ends in under ten minutes, whatever is done by then, and writes one file, benchmarks/gpu_<backend>.json: where it was
run, and of each part its command, its seconds, its exit code, its tables and the end of what it printed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 570  # seconds, for all parts
PARTS = {  # the part, and what it may take of the time
    "tests": (["-m", "pytest", "-q", "-m", "gpu", "tests"], 90),
    "RandAugment": (["benchmarks/randaugment.py", "--arms=ours,resnet", "--turns=3", "--seconds=0.5"], 130),
    "pruning": (["benchmarks/pruning.py", "--repetitions=5"], 150),
    # not ResNet-110, which takes long to compile; memory is that of the host
    "Distiller": (["benchmarks/distiller.py", "--teacher=56", "--no-memory"], 200),
}
WHERE = "import json; from experiments import runs; print(json.dumps(runs.provenance() if runs.on_gpu() else None))"
# Several processes share the accelerator; each takes what it needs, and not all there is.
SHARED = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def accelerator(environment):
    """Returns where this runs, or ends with a message: asked in a process of its own, which lets the device go."""
    answer = subprocess.run([sys.executable, "-c", WHERE], cwd=ROOT, env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"Keras could not be asked for an accelerator:\n{answer.stderr[-2000:]}")
    found = json.loads(answer.stdout.splitlines()[-1])
    if found is None:
        backend = environment.get("KERAS_BACKEND", "tensorflow")
        raise SystemExit(
            f"No accelerator: the {backend} backend sees processors only, so there is nothing to measure here. On a "
            "machine with a GPU, install a build that uses it (pip install 'jax[cuda12]', or 'tensorflow[and-cuda]') "
            "and choose the backend, such as KERAS_BACKEND=jax make bench-gpu."
        )
    return found


def tables(text):
    """Returns the tables of a Markdown text, each a list of rows {column: entry}."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            header, _, *body = rows
            found.append([dict(zip(header, row, strict=False)) for row in body])
            rows = []
    return found


def run_part(command, seconds, environment):
    """Returns what became of one part."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, text = f"stopped after {seconds:.0f} s", (error.stdout or b"").decode(errors="replace")
    return {
        "command": " ".join(["python", *command]),
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": code,
        "tables": tables(text),
        "output": text[-3000:],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="default: benchmarks/gpu_<backend>.json")
    args = parser.parse_args()
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | SHARED | {"PYTHONPATH": os.pathsep.join(path)}
    found = accelerator(environment)
    out = pathlib.Path(args.out or ROOT / "benchmarks" / f"gpu_{found['versions']['backend']}.json")
    started, report = time.monotonic(), {"where": found, "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (command, seconds) in PARTS.items():
            command = [*command, f"--out={scratch}/chart"] if name == "RandAugment" else command
            seconds = min(seconds, LIMIT - (time.monotonic() - started))
            report["parts"][name] = part = run_part(command, seconds, environment)
            print(f"{name}: {part['seconds']} s, exit code {part['exit_code']}", flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{out}: {sum(len(table) for part in report['parts'].values() for table in part['tables'])} rows")
    if any(part["exit_code"] != 0 for part in report["parts"].values()):
        raise SystemExit("Not all parts came to their end; the file holds what they printed.")


if __name__ == "__main__":
    main()
