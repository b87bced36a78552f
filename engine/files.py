"""Whole files: what is written is there as a whole or not at all, and never over published results.

A problem is one line that names the file.
"""

import contextlib
import errno
import io
import os
import secrets
import signal
import stat
import threading
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
_held = {}  # locks, by process and file, see `lock`
LOCK_TIMEOUT = 300  # seconds to wait for another process that writes the same file


def save(path, write):
    """Call write(temporary path), then move that file to `path`; an older file stays whole whatever fails.

    Writes through symbolic links. An older file keeps its mode; a new one gets the mode that open() would give it.
    """
    with replacement(path) as (_, temporary):
        write(temporary)


def save_tensors(path, value):
    """Save what torch.load reads; equal values, in equal storages, give equal bytes."""
    content = io.BytesIO()  # torch.save puts the name of a file, here a random one, into its archive
    torch.save(value, content)
    save(path, lambda temporary: temporary.write_bytes(content.getvalue()))


def lock(target):
    """Return the lock of a file, which one process at a time holds: within `rollback_on_error` the one that it has."""
    held = _held.get((os.getpid(), target))
    return held or FileLock(target.with_name(f".{target.name}.lock"), timeout=LOCK_TIMEOUT)


@contextlib.contextmanager
def replacement(path):
    """Yield the file that `path` leads to, and the path of what replaces it. One process at a time gets past here."""
    check_path(path)
    target = Path(os.path.realpath(os.path.expanduser(path)))
    # Random, as two containers can share a process id. The suffix tells Matplotlib the format.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part{target.suffix}")
    try:
        _check_writable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target):
            for stale in target.parent.glob(".*.part*"):  # from killed processes: the living wait for the lock
                if stale.name.startswith(f".{target.name}.") and len(stale.name) == len(temporary.name):
                    stale.unlink()
            try:
                yield target, temporary
                with open(temporary, "r+b") as file:
                    os.fsync(file.fileno())  # else a power cut could leave the new name without its content
                if target.exists():
                    with contextlib.suppress(OSError, AttributeError):  # only root can keep another owner
                        os.chown(temporary, target.stat().st_uid, target.stat().st_gid)
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        torch_failed = "inline_container" in str(error)  # what torch.save says when the disk is full
        if isinstance(error, RuntimeError) and not torch_failed:
            raise
        disk = next(folder for folder in target.parents if os.path.ismount(folder))
        full = torch_failed or error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OSError(f"{path} can't be written: {f'the disk at {disk} is full' if full else error}") from None


@contextlib.contextmanager
def rollback_on_error(paths):
    """Put the files back when anything is raised inside, KeyboardInterrupt too. OSError if one can't be written.

    Other processes that would write one of them wait until this has ended, so that nothing of theirs is undone.
    """
    before = {}
    for path in paths:
        check_writable(path)
    with contextlib.ExitStack() as locks:
        for target in sorted({Path(os.path.realpath(path)) for path in paths}):  # in one order, so that none blocks
            target.parent.mkdir(parents=True, exist_ok=True)
            _held[os.getpid(), target] = locks.enter_context(lock(target))
            locks.callback(_held.pop, (os.getpid(), target), None)
        for path in paths:
            before[path] = read_bytes(path)
        try:
            yield
        except BaseException:
            for path, content in before.items():
                if content is None:
                    Path(path).unlink(missing_ok=True)
                elif read_bytes(path) != content:
                    save(path, lambda temporary, content=content: temporary.write_bytes(content))
            raise


@contextlib.contextmanager
def signals_deferred():
    """Hold back Ctrl-C, SIGTERM and SIGHUP until what is inside has ended. SIGKILL can't be held back."""
    caught, before = [], {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
            before[name] = signal.signal(getattr(signal, name), lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler or signal.SIG_DFL)
        for number in caught[:1]:
            signal.raise_signal(number)


def check_path(path):
    """Raise TypeError unless `path` is a str or a Path, which a number is not: it would be a file descriptor.

    ValueError for one that no file can have.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {path!r}; give a str or a Path")
    if not str(path):
        raise ValueError("path is ''; name a file or a folder")
    if "\0" in str(path):
        raise ValueError(f"path is {str(path)!r}, with a null byte; give another")


def check_writable(path):
    """Raise OSError, in one line, unless `path` could be saved now; change nothing."""
    check_path(path)
    try:
        _check_writable(Path(os.path.realpath(os.path.expanduser(path))))
    except OSError as error:
        raise OSError(f"{path} can't be written: {error}") from None


def _check_writable(target):
    if os.path.lexists(target) and not target.is_file():
        raise OSError("it is no regular file")
    folder = next(folder for folder in target.parents if folder.exists())
    if not folder.is_dir():
        raise OSError(f"{folder} is no folder")
    for place in (target, folder, target.with_name(f".{target.name}.lock")):
        # Root may write anything: the owner's permission tells what is meant to stay.
        if place.exists() and not (os.access(place, os.W_OK) and place.stat().st_mode & stat.S_IWUSR):
            raise OSError(f"{place} is read-only")


def read_bytes(path):
    """Return the bytes of a regular file, None when absent; raise OSError, without waiting, for a folder or a FIFO."""
    check_path(path)
    try:
        place = os.path.expanduser(path)
        with open(place, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(f"{path} is no regular file")
            return file.read()
    except FileNotFoundError:
        return None


def output_folder(path, create=True):
    """Create an output folder with subfolders results, img, weights and checkpoints, and return it, resolved.

    create  False checks the same and changes nothing

    ValueError when it can't be written, is a checkout (a folder in one, such as out/, is fine), holds this one, is the
    home folder or "/", is inside a .git, or links from it lead into a checkout; also when it is no str or Path.
    """

    def is_checkout(place):
        return (place / "models.py").exists() or (place / ".git").exists()

    try:
        check_path(path)
        folder, home = (Path(os.path.realpath(os.path.expanduser(place))) for place in (path, "~"))
        in_git = ".git" in map(str.lower, folder.parts)
        if in_git or is_checkout(folder) or folder in (folder.parent, home, *ROOT.parents):
            raise OSError(f"{folder} holds other things")
        subfolders = [folder / name for name in ("results", "img", "weights", "checkpoints")]
        for place in (*subfolders, *(file for subfolder in subfolders for file in subfolder.glob("*"))):
            end = Path(os.path.realpath(place))
            if is_checkout(end) or (end != place and any(map(is_checkout, end.parents))):
                raise OSError(f"{place} leads to {end}, in a checkout")
        for subfolder in subfolders:
            _check_writable(Path(os.path.realpath(subfolder / "file")))
        if create:
            for subfolder in subfolders:
                subfolder.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} can't be the output folder: {error}; choose another, such as 'out'") from None
    return folder
