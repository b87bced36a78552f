"""Run the tests under another version of Python and of torch, and upsert a row into results/versions.csv.

    python tests/slow/versions.py python3.13 2.11.0    this interpreter, this torch, all other packages as pinned

The combination gets an environment of its own, some 6 GB, that is deleted afterwards. The tests run in a clone of the
committed files without CIFAR-10, so those that need it are skipped.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from engine import records  # noqa: E402

TORCHVISION = {"2.11.0": "0.26.0", "2.12.1": "0.27.1", "2.13.0": "0.28.0", "2.14.1": "0.29.1", "2.15.0": "0.29.2"}


def try_versions(python, torch, folder):
    """Install into `folder`, test there, and return the row."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder / "clone", capture_output=True, text=True, check=True
    ).stdout.strip()
    pins = "".join((folder / "clone" / name).read_text() for name in ("requirements.txt", "requirements-dev.txt"))
    for pattern, pin in (
        (r"^-r .*", ""),
        (r"^torch==.*", f"torch=={torch}"),
        (r"^torchvision==.*", f"torchvision=={TORCHVISION[torch]}"),
    ):
        pins = re.sub(pattern, pin, pins, flags=re.MULTILINE)
    (folder / "pins.txt").write_text(pins)
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    own = str(folder / "venv" / "bin" / "python")
    subprocess.run([own, "-m", "pip", "install", "-q", "-r", str(folder / "pins.txt")], check=True)
    version = subprocess.run([own, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    started = time.perf_counter()
    done = subprocess.run([own, "-m", "pytest", "-q"], cwd=folder / "clone", capture_output=True, text=True)
    print(done.stdout[-6000:], flush=True)
    assert done.returncode in (0, 1), f"pytest ended with {done.returncode}: {done.stderr[-3000:]}"
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    return {
        "python": version,
        "torch": torch,
        "torchvision": TORCHVISION[torch],
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        "seconds": round(time.perf_counter() - started),
        "commit": head,
    }


def main():
    if len(sys.argv) != 3 or sys.argv[2] not in TORCHVISION:
        raise SystemExit(f"{__doc__}\ntorch is one of {', '.join(TORCHVISION)}")
    with tempfile.TemporaryDirectory() as folder:
        row = try_versions(sys.argv[1], sys.argv[2], Path(folder))
    print(row)
    records.upsert(ROOT / "results" / "versions.csv", [row], key=["python", "torch"])


if __name__ == "__main__":
    main()
