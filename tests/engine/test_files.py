"""Whole files: kills, full disks, permissions and links in the way, and folders that are no place for output."""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, as_nobody, child, refused

from engine import figures, files, records

OLD, NEW = b"old" * 50_000, b"new" * 50_000


def save(path, content=NEW):
    files.save(path, lambda temporary: temporary.write_bytes(content))


WRITE = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from engine import files
print("ready", flush=True)
sys.stdin.read()
with files.replacement(sys.argv[1]) as (target, temporary):
    temporary.write_bytes(pathlib.Path(target).read_bytes() + b" and theirs")
"""


def leftovers(folder):
    return [path.name for path in folder.rglob(".*.part*")]


@pytest.fixture
def open_folder():
    """A folder that every user may enter and write; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(1), OSError("no")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.png"
    path.write_bytes(OLD)

    def write(temporary):
        temporary.write_bytes(NEW[:100])
        raise failure

    with pytest.raises(type(failure)):
        files.save(path, write)
    assert path.read_bytes() == OLD
    assert not leftovers(tmp_path)


def test_what_another_process_writes_meanwhile_is_not_undone(tmp_path):
    path = tmp_path / "rows"
    save(path, OLD)
    other = subprocess.Popen([sys.executable, "-c", WRITE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def fail():
        with files.rollback_on_error([path]):
            save(path, b"ours")
            assert other.stdout.readline()
            other.stdin.close()
            time.sleep(0.5)
            raise OSError("full")

    refused(fail, OSError, "full")
    assert other.wait() == 0
    other.stdout.close()
    assert path.read_bytes() == OLD + b" and theirs"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_several_files_are_written_all_or_none(tmp_path, error):
    same, old, new = (tmp_path / name for name in ("same", "old", "new"))
    for path in (same, old):
        save(path, OLD)

    def write(error=None):
        with files.rollback_on_error([same, old, new]):
            for path in (old, new):
                save(path)
            if error:
                raise error

    with pytest.raises(type(error)):
        write(error)
    assert (same.read_bytes(), old.read_bytes(), new.exists()) == (OLD, OLD, False)
    same.chmod(0o444)
    with pytest.raises(OSError, match=r"same can't be written: .* is read-only"):
        write()
    assert not new.exists()
    same.chmod(0o644)
    write()
    assert (old.read_bytes(), new.read_bytes()) == (NEW, NEW)


def kill_at(stage):
    """Let this process be killed where `replacement` has got to `stage`."""

    def killing(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    owner, name = {"fsync": (os, "fsync"), "mode": (Path, "chmod"), "rename": (os, "replace")}[stage]
    setattr(owner, name, killing)


@pytest.mark.parametrize("stage", ["fsync", "mode", "rename"])
def test_killed_at_each_stage_of_saving(tmp_path, stage):
    path = tmp_path / "a.csv"
    path.write_bytes(OLD)
    pid = child(lambda: (kill_at(stage), save(path)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == OLD
    assert len(leftovers(tmp_path)) == 1
    save(path)  # neither the dead process's lock nor its file is in the way
    assert path.read_bytes() == NEW
    assert not leftovers(tmp_path)


def test_killed_at_random_moments_of_saving(tmp_path):
    path, generator, left = tmp_path / "a.csv", random.Random(0), 0
    save(path, OLD)

    def save_again_and_again():
        while True:
            save(path, OLD)
            save(path, NEW)

    for _ in range(25):
        pid = child(save_again_and_again)
        time.sleep(generator.uniform(0.01, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert path.read_bytes() in (OLD, NEW)
        left += len(leftovers(tmp_path))
        assert len(leftovers(tmp_path)) <= 1  # each process removes what the one before it left
    assert left, "no kill hit the moment of saving"


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (calls.append(name), true(*args))[1])
    save(tmp_path / "a.csv")
    assert calls == ["fsync", "replace"]


def test_two_processes_of_one_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """As two containers have on one folder."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    seen = []
    for _ in range(2):
        files.save(tmp_path / "a.png", lambda temporary: (seen.append(temporary), temporary.touch()))
    assert seen[0] != seen[1]
    assert {path.suffix for path in seen} == {".png"}


def test_stale_files_are_removed_and_other_files_are_not(tmp_path):
    number = "0123456789abcdef"
    stale = [f".a.csv.{number}.part.csv", f".a.csv.{number[::-1]}.part.csv"]
    others = [f".b.csv.{number}.part.csv", f".a.csv.csv.{number}.part.csv", ".a.csv.part", "a.csv.part.csv", ".a.csv"]
    for name in (*stale, *others):
        (tmp_path / name).touch()
    save(tmp_path / "a.csv")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a.csv", ".a.csv.lock"}


def test_git_ignores_locks_and_temporary_files():
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    names = [f"results/.runs.csv.{'0' * 16}.part.csv", f"weights/.NetA.pt.{'f' * 16}.part.pt", "img/.batch.png.lock"]
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.splitlines() == names


def test_a_second_writer_waits_and_does_not_remove_the_first_ones_file(tmp_path):
    path, started, finish = tmp_path / "a.csv", threading.Event(), threading.Event()

    def write(temporary):
        temporary.write_bytes(OLD)
        started.set()
        assert finish.wait(10)

    first = threading.Thread(target=files.save, args=(path, write))
    second = threading.Thread(target=save, args=(path,))
    first.start()
    assert started.wait(10)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert not path.exists()
    assert len(leftovers(tmp_path)) == 1
    finish.set()
    first.join(10)
    second.join(10)
    assert path.read_bytes() == NEW
    assert not leftovers(tmp_path)


def test_a_writer_that_is_stopped_is_not_waited_for_without_end(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_bytes(OLD)
    stopped = child(lambda: files.save(path, lambda temporary: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(stopped, os.WUNTRACED)
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.1)
    with pytest.raises(OSError, match=rf"\A{path} can't be written: [^\n]*lock[^\n]*\Z"):
        save(path)
    assert path.read_bytes() == OLD
    os.kill(stopped, signal.SIGKILL)
    os.waitpid(stopped, 0)
    save(path)
    assert path.read_bytes() == NEW


def test_two_processes_save_one_file_many_times(tmp_path):
    path, contents = tmp_path / "a.csv", [bytes([number]) * 100_000 for number in range(4)]
    pids = [child(lambda content=content: [save(path, content) for _ in range(30)]) for content in contents]
    while any([os.waitpid(pid, os.WNOHANG)[0] == 0 for pid in pids[-1:]]):
        with contextlib.suppress(FileNotFoundError):
            assert path.read_bytes() in contents
    for pid in pids[:-1]:
        os.waitpid(pid, 0)
    assert path.read_bytes() in contents
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks, permissions and links
# ---------------------------------------------------------------------------------------------------------------------

WEIGHTS = {"weight": torch.zeros(100_000)}


def figure_to(temporary):
    figure = plt.figure()
    figure.savefig(temporary)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "write",
    [lambda path: path.write_bytes(NEW), lambda path: torch.save(WEIGHTS, path), figure_to],
    ids=["bytes", "weights", "figure"],
)
def test_a_full_disk_is_named_with_the_file(tmp_path, write):
    path = tmp_path / "a.png"
    path.write_bytes(OLD)

    def write_to_full_disk(temporary):
        temporary.symlink_to("/dev/full")
        write(temporary)

    refused(
        lambda: files.save(path, write_to_full_disk), OSError, f"{path} can't be written: the disk at /", " is full"
    )
    assert path.read_bytes() == OLD
    assert not leftovers(tmp_path)
    plt.close("all")


def test_a_full_quota_is_named_like_a_full_disk(tmp_path):
    def write(temporary):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    refused(lambda: files.save(tmp_path / "a", write), OSError, tmp_path / "a", " is full")


def test_other_errors_of_torch_pass(tmp_path):
    def write(temporary):
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match=r"^CUDA error$"):
        files.save(tmp_path / "a.pt", write)


@pytest.mark.parametrize("kind", ["rows", "weights", "figure"])
def test_a_file_larger_than_allowed_leaves_the_old_one(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_text("seed\n7\n")
    figure, rows = plt.figure(), [{"seed": seed, "net": "NetA" * 10} for seed in range(1000)]
    figure.text(0.1, 0.1, "text " * 50)
    call = {
        "rows": lambda: records.upsert(path, rows),
        "weights": lambda: files.save(path, lambda temporary: torch.save(WEIGHTS, temporary)),
        "figure": lambda: figures.save_figure(path, figure),
    }[kind]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        refused(call, OSError, f"{path} can't be written: ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        plt.close("all")
    assert path.read_text() == "seed\n7\n"
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_open_gives_and_an_old_one_keeps_its_own(tmp_path, umask, mode):
    old, new = tmp_path / "old.png", tmp_path / "folder" / "new.png"
    old.write_bytes(OLD)
    old.chmod(0o664)
    figure = plt.figure()
    before = os.umask(umask)
    try:
        for path in (old, new):
            figures.save_figure(path, figure)
        for folder in (tmp_path, tmp_path / "folder"):
            records.upsert(folder / "runs.csv", [{"seed": 1}])
    finally:
        os.umask(before)
        plt.close(figure)
    assert stat.S_IMODE(old.stat().st_mode) == 0o664
    for path in (new, tmp_path / "runs.csv", tmp_path / "folder" / "runs.csv"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write another user's file and keep it theirs")
def test_the_owner_stays(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(OLD)
    os.chown(path, 1234, 2345)
    save(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "dangling"])
def test_links_are_written_through(tmp_path, there):
    target, link, chain = tmp_path / "elsewhere" / "runs.csv", tmp_path / "link.csv", tmp_path / "chain.csv"
    target.parent.mkdir()
    if there:
        target.write_bytes(OLD)
    link.symlink_to("elsewhere/runs.csv")
    chain.symlink_to(link)
    save(chain)
    assert link.is_symlink()
    assert chain.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == NEW
    (tmp_path / "folder").symlink_to("elsewhere")
    save(tmp_path / "folder" / "runs.csv", OLD)
    assert target.read_bytes() == OLD


def read_only_file(folder):
    (folder / "a.csv").touch()
    (folder / "a.csv").chmod(0o444)
    return folder / "a.csv"


def read_only_folder(folder):
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o555)
    return folder / "closed" / "new" / "a.csv"


def link_to_a_read_only_file(folder):
    (folder / "link.csv").symlink_to(read_only_file(folder))
    return folder / "link.csv"


@pytest.mark.parametrize("user", [lambda call: call(), as_nobody], ids=["owner", "nobody"])
@pytest.mark.parametrize("make", [read_only_file, read_only_folder, link_to_a_read_only_file])
def test_what_is_read_only_stays_as_it_is(open_folder, make, user):
    path = make(open_folder)
    before = {place: place.lstat().st_mode for place in open_folder.rglob("*")}
    refused(lambda: user(lambda: save(path)), OSError, f"{path} can't be written", "is read-only")
    assert {place: place.lstat().st_mode for place in open_folder.rglob("*")} == before
    assert not path.exists() or not path.read_bytes()
    for place in before:
        place.chmod(0o777)


def fifo(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [Path.mkdir, fifo, loop, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    path = tmp_path / "a.csv"
    make(path)
    before = path.lstat()
    refused(lambda: save(path), OSError, f"{path} can't be written", "no regular file")
    assert os.path.samestat(path.lstat(), before)


@pytest.mark.parametrize("name", ["x" * 300, "file/a.csv", "."])
def test_a_name_that_no_file_can_have_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    refused(lambda: save(name), OSError, "can't be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_is_a_link_destroys_nothing(tmp_path):
    (tmp_path / "precious").write_bytes(OLD)
    (tmp_path / ".a.csv.lock").symlink_to("precious")
    with contextlib.suppress(OSError):
        save(tmp_path / "a.csv")
    assert (tmp_path / "precious").read_bytes() == OLD


def test_reading_does_not_wait_and_takes_files_alone(tmp_path):
    assert files.read_bytes(tmp_path / "absent") is None
    (tmp_path / "a").write_bytes(NEW)
    (tmp_path / "link").symlink_to("a")
    assert files.read_bytes(tmp_path / "link") == NEW
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "folder", tmp_path / "fifo", Path("/dev/zero")):
        refused(lambda place=place: files.read_bytes(place), OSError, place)


@pytest.mark.parametrize("path", [True, 0, 1, 2.5, None, b"a"])
def test_what_is_no_path_is_refused_and_no_descriptor_is_closed(path):
    before = [os.fstat(number).st_ino for number in (0, 1, 2)]
    for call in (files.read_bytes, save, files.check_writable):
        refused(lambda call=call: call(path), TypeError, f"path is {path!r}; give a str or a Path")
    assert [os.fstat(number).st_ino for number in (0, 1, 2)] == before


def test_a_null_byte_is_named():
    for call in (files.read_bytes, save, files.check_writable):
        refused(lambda call=call: call("a\0b"), ValueError, r"path is 'a\x00b', with a null byte")


def test_a_path_without_a_name_is_refused():
    for call in (files.read_bytes, save, files.check_writable):
        refused(lambda call=call: call(""), ValueError, "path is ''; name a file or a folder")


def test_equal_tensors_are_saved_as_equal_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        files.save_tensors(tmp_path / name, {"weight": torch.arange(4.0), "bias": torch.ones(2)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert torch.load(tmp_path / "a.pt", weights_only=True)["weight"].tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Folders for output
# ---------------------------------------------------------------------------------------------------------------------

SUBFOLDERS = {"results", "img", "weights", "checkpoints"}


@pytest.fixture
def checkout(tmp_path):
    """Another checkout, with published results."""
    folder = tmp_path / "checkout"
    for name in ("results", "img", "weights", ".git/hooks", "out"):
        (folder / name).mkdir(parents=True)
    (folder / "results" / "runs.csv").write_text("net\nNetA\n")
    (folder / "models.py").touch()
    return folder


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("held", ["models.py", ".git"])
@pytest.mark.parametrize("way", ["checkout", "checkout/out/..", "link", "./checkout/"])
def test_a_checkout_is_no_output_folder(checkout, tmp_path, monkeypatch, held, way):
    (checkout / "models.py").unlink()
    shutil.rmtree(checkout / ".git")
    (checkout / held).touch()  # .git is a file in a worktree
    (tmp_path / "link").symlink_to("checkout")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    refused(lambda: files.output_folder(way), ValueError, f"{way!r} can't be the output folder", "choose another")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("way", [".git", ".git/hooks", ".git/new", ".GIT", "out/../.git"])
def test_nothing_goes_into_a_git_folder(checkout, monkeypatch, way):
    monkeypatch.chdir(checkout)
    before = snapshot(checkout)
    refused(lambda: files.output_folder(way), ValueError, repr(way), "choose another")
    assert snapshot(checkout) == before


@pytest.mark.parametrize(
    ("way", "named"), [(5, "5"), (None, "None"), (b"out", "b'out'"), ("", "''"), ("a\0b", r"'a\x00b'")]
)
def test_what_is_no_path_is_no_output_folder(way, named):
    refused(lambda: files.output_folder(way), ValueError, f"path is {named}", "can't be the output folder", "choose")


@pytest.mark.parametrize("way", ["/", "//", "~", "~/", "..", "../..", "../../other/.."])
def test_root_home_and_what_holds_this_checkout_are_no_output_folders(tmp_path, monkeypatch, way):
    root, home = tmp_path / "outer" / "inner" / "checkout", tmp_path / "home"
    root.mkdir(parents=True)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(files, "ROOT", root)
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: pytest.fail(f"{arguments[0]} was made"))
    monkeypatch.chdir(root)
    refused(lambda: files.output_folder(way), ValueError, repr(way), "choose another")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "link", ["results", "img/batch.png", "results/runs.csv", "weights/.NetA.pt.lock", "checkpoints"]
)
@pytest.mark.parametrize("end", ["results/runs.csv", "results", "out", "", "absent"])
def test_a_link_into_a_checkout_is_refused(checkout, tmp_path, link, end):
    folder = tmp_path / "mine"
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(checkout / end)
    before = snapshot(tmp_path)
    refused(lambda: files.output_folder(folder), ValueError, folder / link, checkout)
    assert snapshot(tmp_path) == before


def test_a_checkout_in_place_of_a_subfolder_is_refused(checkout, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    checkout.rename(folder / "results")
    refused(lambda: files.output_folder(folder), ValueError, folder / "results")


@pytest.mark.parametrize(
    "way", ["out", "checkout/out", "checkout/out/deep/er", "~/out", "with space", ".hidden", "out/"]
)
def test_other_folders_are_made_and_returned_resolved(checkout, tmp_path, monkeypatch, way):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = files.output_folder(way)
    assert folder == Path(way).expanduser().resolve()
    assert {path.name for path in folder.iterdir()} == SUBFOLDERS
    assert files.output_folder(way) == folder


def test_a_folder_is_checked_without_being_made(checkout, tmp_path):
    before = snapshot(tmp_path)
    refused(lambda: files.output_folder(checkout, create=False), ValueError, checkout, "choose another")
    assert files.output_folder(checkout / "out" / "new", create=False) == checkout / "out" / "new"
    assert snapshot(tmp_path) == before


def test_links_that_lead_elsewhere_are_allowed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "large disk").mkdir()
    (tmp_path / "mine" / "checkpoints").symlink_to(tmp_path / "large disk")
    files.output_folder(tmp_path / "mine")


def test_a_refused_folder_stays_as_it_is(tmp_path):
    (tmp_path / "weights").write_text("a file")
    refused(lambda: files.output_folder(tmp_path), ValueError, "weights is no folder")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("user", [lambda call: call(), as_nobody], ids=["owner", "nobody"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(open_folder, user):
    closed = open_folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    refused(lambda: user(lambda: files.output_folder(closed / "out")), ValueError, closed, "choose another")
    closed.chmod(0o755)
    (open_folder / "file").touch()
    (open_folder / "taken").mkdir()
    (open_folder / "taken" / "img").touch()
    for place in (open_folder / "file", open_folder / "file" / "out", open_folder / "taken"):
        refused(lambda place=place: files.output_folder(place), ValueError, place, "choose another")


# ---------------------------------------------------------------------------------------------------------------------
# Open figures
# ---------------------------------------------------------------------------------------------------------------------


def test_the_notebook_leaves_no_figure_open():
    """Each cell that draws shows its figures, which closes them in a notebook, and the last one closes what is left."""
    cells = json.loads((ROOT / "s8.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    drawing = [text for text in code if re.search(r"figures\.plot_\w+\(|plot_mistakes\(", text)]
    assert len(drawing) > 5
    for text in drawing:
        assert "plt.show()" in text
        for line in text.splitlines():
            if "plot_mistakes(" in line and "set_dpi" not in line:  # saved, not shown
                assert "plt.close(" in line
    assert code[-1].rstrip().endswith('plt.close("all")')
