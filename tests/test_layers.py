"""Which module may import which, and that to import one changes nothing."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Each module and what it may import of this project. A lower room never imports a higher one.
ENGINE = tuple(
    f"engine.{name}"
    for name in ("data", "muon", "fast", "files", "hashes", "records", "checkpoints", "trainer", "probe", "statistics")
)
MAY_IMPORT = {
    "models": (),
    "engine": (),
    "engine.download": (),
    "engine.files": (),
    "engine.muon": (),
    "engine.statistics": (),
    "engine.fast": ("models",),
    "engine.kernels": ("models", "engine.fast", "engine.muon"),
    "engine.tune": ("models", *ENGINE, "engine.kernels"),
    "engine.hashes": (),
    "engine.records": ("engine.files", "engine.hashes"),
    "engine.checkpoints": ("models", "engine.files", "engine.hashes", "engine.records"),
    "engine.data": ("models", "engine.download"),
    "engine.trainer": ("models", "engine.data", "engine.muon", "engine.fast", "engine.kernels"),
    "engine.probe": ("models", "engine.data"),
    "engine.figures": ("models", "engine.data", "engine.probe", "engine.files", "engine.records"),
    "utils": ("models", *ENGINE, "engine.figures"),
    "experiments": ("models", *ENGINE, "engine.figures", "utils", "experiments", "hubconf"),
    "hubconf": ("models",),
}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("experiments/*.py")])
OURS = {path.stem for path in ROOT.glob("*.py")} | {"engine", "experiments", "tests", "conftest"}


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(source, package=""):
    """List the modules of this project that Python source names in an import, at the top or within a function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            whole = [f"{base}.{alias.name}" for alias in node.names]
            found += [name if (ROOT / f"{name.replace('.', '/')}.py").exists() else base for name in whole]
    return [name for name in found if name.split(".")[0] in OURS]


def test_the_walk_sees_imports_of_every_form():
    source = """
import torch, models
import engine.data as data
from engine import fast, records
from utils import Settings
from . import probe
from .muon import Muon
def later():
    from experiments.run import main
"""
    expected = ["models", "engine.data", "engine.fast", "engine.records", "utils", "engine.probe", "engine.muon"]
    assert imports(source, "engine") == [*expected, "experiments.run"]


@pytest.mark.parametrize("path", FILES, ids=map(module_of, FILES))
def test_no_room_imports_a_higher_one(path):
    name = module_of(path)
    room = "experiments" if name.startswith("experiments") else name
    assert room in MAY_IMPORT, f"say in MAY_IMPORT what {name} may import"
    for imported in imports(path.read_text(encoding="utf-8"), package=name.rpartition(".")[0]):
        allowed = imported in MAY_IMPORT[room] or (room == "experiments" and imported.startswith("experiments."))
        assert allowed, f"{name} imports {imported}"


SIDE_EFFECTS = """
import contextlib, ctypes, importlib, io, logging, os, signal, sys, warnings
import matplotlib, matplotlib.pyplot, nbformat, numpy, pandas, scipy.stats, torch, torchvision, tqdm
from torchvision import datasets, transforms

def state():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return {
        "matplotlib": {name: matplotlib.rcParams._get(name) for name in matplotlib.rcParams},
        "figures": matplotlib.pyplot.get_fignums(),
        "cudnn": [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cuda.matmul.allow_tf32],
        "torch": [torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.cuda.is_initialized()],
        "random": [torch.get_rng_state().tolist(), str(numpy.random.get_state())],
        "pandas": [pandas.options.display.max_rows, pandas.options.display.precision],
        "warnings": list(map(str, warnings.filters)),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": list(logging.getLogger().handlers),
        "path": list(sys.path),
        "folder": sorted(os.listdir()),
    }

libraries = []
open_library = ctypes.CDLL
ctypes.CDLL = lambda *arguments, **options: (libraries.append(arguments), open_library(*arguments, **options))[1]
for name in sys.argv[1:]:
    before, output = state(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        importlib.import_module(name)
    after = state()
    problems = [what for what in before if before[what] != after[what]]
    problems += ["output"] * bool(output.getvalue()) + ["C libraries"] * bool(libraries)
    libraries.clear()
    if problems:
        print(name, "changes", ", ".join(problems))
print("done")
"""


def test_imports_print_nothing_and_change_nothing(tmp_path):
    """Neither PyTorch's nor Matplotlib's settings, nor the allocator's; three modules of the test's own do."""
    (tmp_path / "switching.py").write_text("import torch; torch.backends.cudnn.deterministic = True")
    (tmp_path / "drawing.py").write_text("import matplotlib; matplotlib.rcParams['font.size'] = 20; print('drawing')")
    (tmp_path / "keeping.py").write_text("import ctypes; ctypes.CDLL(None)")
    modules = [
        module_of(path) for path in FILES if path.name not in ("kernels.py", "tune.py")
    ]  # Triton is not everywhere
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; sys.dont_write_bytecode = True\n"
    command = [sys.executable, "-c", code + SIDE_EFFECTS, *modules, "switching", "drawing", "keeping"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    expected = ["switching changes cudnn", "drawing changes matplotlib, output", "keeping changes C libraries", "done"]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
