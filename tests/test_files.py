"""Files that are cut off, altered, in the way or too large for the disk, and servers that send something else."""

import http.server
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

import utils


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A folder with files of CIFAR-10's form, ten images each, that count as the true ones; and no way to fetch any."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for listed in ("train_list", "test_list"):
        found = []
        for seed, (name, _) in enumerate(getattr(CIFAR10, listed)):
            pixels = np.random.default_rng(seed).integers(0, 256, (10, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
            found.append([name, calculate_md5(folder / name)])
        monkeypatch.setattr(CIFAR10, listed, found)
    monkeypatch.setattr(utils, "fetch_cifar10", lambda root: (_ for _ in ()).throw(OSError("no network")))
    return folder


def test_whole_files_are_read(few, cpu):
    data = utils.load_data(cpu, "cifar10", few.parent)
    assert data.images.shape == (50, 32, 32, 3)
    assert data.test_labels.tolist() == list(range(10))


def cut_off(folder):
    path = folder / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def altered(folder):
    path = folder / "test_batch"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    return path


def swapped(folder):
    first, second = folder / "data_batch_1", folder / "data_batch_2"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    return first


def replaced_by_a_folder(folder):
    path = folder / "data_batch_5"
    path.unlink()
    path.mkdir()
    return path


def emptied(folder):
    path = folder / "data_batch_4"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("damage", [cut_off, altered, swapped, replaced_by_a_folder, emptied])
@pytest.mark.parametrize("source", ["auto", "cifar10"])
def test_damage_is_named_with_a_way_out(few, cpu, damage, source):
    path = damage(few)
    with pytest.raises(OSError, match=r"^[^\n]+$") as error:
        utils.load_data(cpu, source, few.parent)
    assert str(error.value).startswith(f"{path} is damaged (its MD5 is wrong): delete it, then download ")
    assert path.exists()


@pytest.mark.parametrize("source", ["auto", "cifar10"])
def test_a_file_is_missing_beside_others(few, cpu, source):
    (few / "data_batch_3").unlink()
    with pytest.raises(OSError, match="data_batch_3 is missing, others are there: download"):
        utils.load_data(cpu, source, few.parent)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that answers every request with 200 and a page, as a proxy's log-in does."""

    class Page(http.server.BaseHTTPRequestHandler):
        promised = None  # bytes that the header tells of, if not the page's

        def do_GET(self):
            page = b"<html>Please log in</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(self.promised or len(page)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(page)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{running.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Page
    running.shutdown()


@pytest.mark.parametrize("promised", [None, 170_498_071])  # a page, and a download that breaks off
def test_a_page_instead_of_the_archive(server, tmp_path, cpu, capsys, promised):
    server.promised = promised
    for _ in range(2):  # the first try leaves nothing that the second trips over
        assert not utils.load_data(cpu, "auto", tmp_path).real
        assert "can't be fetched" in capsys.readouterr().out
        assert not list(tmp_path.rglob("*cifar*"))
    with pytest.raises(OSError, match="can't be fetched"):
        utils.load_data(cpu, "cifar10", tmp_path)


FULL = """
import resource, signal, sys; sys.path.insert(0, {root!r})
from pathlib import Path
import matplotlib.pyplot as plt, torch, utils
path, kind = Path({path!r}), {kind!r}
net = utils.build("NetA", utils.Settings())
figure = plt.figure()
figure.text(0.1, 0.1, "text " * 50)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    if kind == "rows":
        utils.put_rows(path, [{{"seed": seed, "test_accuracy": 1.0}} for seed in range(1000)])
    elif kind == "weights":
        utils.save(path, lambda temporary: torch.save(net.state_dict(), temporary))
    else:
        utils.save(path, lambda temporary: figure.savefig(temporary))
except Exception as error:
    print("failed:", error)
"""


@pytest.mark.parametrize(("kind", "name"), [("rows", "runs.csv"), ("weights", "NetA.pt"), ("figure", "a.png")])
def test_a_full_disk_leaves_the_old_file(tmp_path, kind, name):
    """The process may write 2,000 bytes a file, as if the disk were full then."""
    path = tmp_path / name
    path.write_text("seed,test_accuracy\n7,2.0\n")
    code = FULL.format(root=str(ROOT), path=str(path), kind=kind)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("failed:"), done.stdout + done.stderr
    assert path.read_text() == "seed,test_accuracy\n7,2.0\n"
    assert {file.name for file in tmp_path.iterdir()} <= {name, f".{name}.lock"}
