"""The files of the data sets: read once, checked, and downloaded whole or not at all.

Bytes that are checked are the bytes that are loaded, and no pickle can run code. CIFAR-10's files are the exception:
torchvision checks their MD5 and unpickles them.
"""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import pickletools
import shutil
import sys
import tarfile
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

CIFAR100_SHA256 = {  # of pixels and fine labels, a byte each, one after the other
    "train": "4e50520a1125d045fade68001374cf6c74e360819dc08b7ecffe4e6c79e9b419",
    "test": "dc66669533e5da36cbeb472b8e2af54edcb17f1d9736fdbd5fede79d08f46b2f",
}
ARRAY_PARTS = (("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"))
TIMEOUT = 5  # seconds without an answer after which a server counts as absent
STALL_SECONDS, MIN_BYTES = 30, 300_000  # a server that sends fewer bytes in so many seconds is given up


def read(dataset, root):
    """Read images (N, 32, 32, 3) uint8 and labels (N,) of the training, then of the test split: four NumPy arrays.

    Raises FileNotFoundError if no file is there, another OSError that names the first one damaged or missing.
    """
    check, listed = read_cifar100, dataset.train_list + dataset.test_list
    if dataset is CIFAR10:  # torchvision wants the file with the classes' names, too
        check, listed = check_integrity, [*listed, (dataset.meta["filename"], dataset.meta["md5"])]
    files = {root / dataset.base_folder / name: md5 for name, md5 in listed}
    found = {path: check(path, md5) for path, md5 in files.items() if path.exists()}
    absent = [path for path in files if path not in found]
    damaged = [path for path, content in found.items() if not content]
    if absent and (archive := root / dataset.filename).exists() and not check_integrity(archive, dataset.tgz_md5):
        damaged.append(archive)
    if damaged:
        raise OSError(f"{damaged[0]} is damaged (its checksum is wrong): delete it, then")
    if absent:
        raise (OSError if found else FileNotFoundError)(f"{absent[0]} is missing, others are there:")
    splits = found.values()
    if dataset is CIFAR10:  # torchvision checks each MD5 again before it unpickles a file
        splits = [(split.data, split.targets) for split in (CIFAR10(root, train=True), CIFAR10(root, train=False))]
    return [array for images, labels in splits for array in (np.ascontiguousarray(images), np.array(labels))]


class ArrayPart:
    """Keep the state of an array or a dtype: NumPy itself can be crashed by a forged one."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle arrays, as `ArrayPart`, and plain values, and refuse every other name, so that a file runs no code."""

    def find_class(self, module, name):
        if (module.replace("._core", ".core"), name) in ARRAY_PARTS:
            return ArrayPart
        if (module, name) == ("_codecs", "encode"):  # by which pickles of protocol 2 hold bytes
            return encode_latin1
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def encode_latin1(text, encoding):
    """Encode as Latin-1 alone: by other codecs, such as hex, a small file could grow without bound."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"{encoding} is not what an array needs")
    return text.encode("latin1")


def check_pickle(content):
    """Raise UnpicklingError for a pickle that could crash or fill the process before it is found to be forged.

    Those are tuples in tuples in tuples, whose hash recurses, and a memo with an index that its length can't explain.
    """
    tuples = 0
    for operation, argument, _ in pickletools.genops(content):
        tuples += operation.name.startswith(("TUPLE", "FROZENSET"))
        if tuples > 1000 or ("PUT" in operation.name and int(argument) > len(content)):
            raise pickle.UnpicklingError(f"{operation.name} is not what an array needs")


def read_cifar100(path, md5=None):
    """Read a file of CIFAR-100 once: images and fine labels as `read` returns them, or None if it is damaged.

    Pixels and fine labels are checked by themselves; the file's MD5 is also of what is not used.
    """
    content = path.read_bytes() if path.is_file() else b""  # a pipe would be waited for
    try:
        check_pickle(content)
        content = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        pixels, labels = content["data"].state[-1], bytes(list(content["fine_labels"]))
        pixels = pixels.encode("latin1") if isinstance(pixels, str) else pixels  # a text from Python 2
    except Exception:  # damage ends in many ways
        return None
    if hashlib.sha256(pixels + labels).hexdigest() != CIFAR100_SHA256[path.name]:
        return None
    pixels, labels = np.frombuffer(pixels, np.uint8), np.frombuffer(labels, np.uint8)
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def fetch(dataset, root):
    """Download and unpack what is missing, then `read` it. Raises whatever network, server or disk cause."""
    archive = root / dataset.filename
    with download_lock(root):
        with contextlib.suppress(OSError):
            return read(dataset, root)  # another process has fetched it while this one waited
        if not check_integrity(archive, dataset.tgz_md5):
            download(dataset.url, archive, "md5", dataset.tgz_md5)
        (root / dataset.base_folder).mkdir(exist_ok=True)
        with tarfile.open(archive) as members:
            for member in members:
                folder, _, name = member.name.rpartition("/")
                if folder == dataset.base_folder and member.isfile():  # so that none ends up in another folder
                    (root / folder / name).write_bytes(members.extractfile(member).read())
        return read(dataset, root)


def download_lock(root):
    """Return the lock of all downloads into the folder `root`, which is made: torchrun's processes take turns."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".download.lock")


def download(url, path, algorithm, checksum):
    """Download `url` to `path`, or raise and leave `path` as it was. The caller holds `download_lock`.

    algorithm, checksum  "md5" or "sha256", and the hexadecimal digest that the content must have

    Raises whatever network, server or disk cause, and OSError for other content.
    """
    for stale in path.parent.glob(".download-*"):  # of a process that was killed: only this one downloads now
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        with open(part, "w+b") as file:
            receive(url, file, path.name)
            file.seek(0)
            if hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest() != checksum:
                raise OSError(f"{url} sends something else")
        os.replace(part, path)


def receive(url, file, label):
    """Write what `url` sends to `file`. Raises whatever network and disk cause, and OSError for a slow server.

    It is received in a thread: a server that sends its headers byte by byte can't be given up otherwise.
    """
    failures = []

    def work():
        try:
            # The timeout holds for connecting and for each read; for looking up the name, the system has its own.
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                parts = itertools.islice(iter(lambda: response.read(10**5), b""), 2000)  # the largest has 170 MB
                with tqdm(desc=label, unit="B", unit_scale=True, file=sys.stdout) as bar:
                    for part in parts:
                        bar.update(file.write(part))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        before = file.tell()
        thread.join(STALL_SECONDS)
        if thread.is_alive() and file.tell() - before < MIN_BYTES:  # the closed file ends the thread
            raise OSError(f"{url} sends less than {MIN_BYTES:,} bytes in {STALL_SECONDS} seconds")
    for failure in failures:
        raise failure
