"""Files that are complete once they have their name, JSON Lines, digests, and locks."""

import hashlib
import os
import subprocess
import sys

import pytest

from jepa_kit.files import atomic_write, read_json_lines, sha256_of, write_json_lines
from jepa_kit.lock import LockedError, lock_file


@pytest.mark.parametrize("shared", [False, True])
def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path, shared):
    path = tmp_path / "file"
    path.write_text("old")

    def write_and_fail():
        with atomic_write(path, shared=shared) as part:
            part.write_text("ne")
            assert path.read_text() == "old"
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert path.read_text() == "old"
    with atomic_write(path, shared=shared) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_written_atomically(tmp_path):
    with atomic_write(tmp_path / "folder") as part:
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "file").write_text("x")
        assert not (tmp_path / "folder").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="strace-free check of fsync by its descriptor's path in /proc")
def test_content_and_name_are_flushed_in_order(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with atomic_write(tmp_path / "file") as part:
        part.write_text("x")
    assert flushed == [str(part), str(tmp_path)]


def test_json_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    write_json_lines(path, [{"a": 1}, [2]])
    assert path.read_text() == '{"a": 1}\n[2]\n'
    path.write_text(path.read_text() + '{"b"')  # cut short by a kill
    assert read_json_lines(path) == [{"a": 1}, [2]]
    path.write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(ValueError, match=r"lines.jsonl, line 2 is not JSON"):
        read_json_lines(path)


def test_digest_of_a_file_and_a_folder(tmp_path):
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    (tmp_path / "a").write_bytes(b"")
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a", "b")}
    assert sha256_of(tmp_path / "b") == digests["b"]
    text = "".join(f"{name} {digests[name]}\n" for name in ("a", "b"))
    assert sha256_of(tmp_path) == hashlib.sha256(text.encode()).hexdigest()


def test_a_lock_names_its_holder(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom jepa_kit.lock import lock_file\n"
        "with lock_file(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    file = tmp_path / "new" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=rf"is locked by process {process.pid} on ") as caught, lock_file(file):
            pass
        assert caught.value.holder.startswith(f"process {process.pid} ")
        process.communicate("")
    assert not file.exists()
    with lock_file(file):
        assert file.read_text().startswith(f"process {os.getpid()} on ")
