"""Local and remote storage: the same operations, whatever a handler can and cannot do."""

import pytest
from iopath.common.file_io import PathHandler
from places import Bucket, BucketError, Disk

from jepa_kit.data.remote.fetch import path_manager
from jepa_kit.engine.checkpoint.storage import LocalStorage, RemoteStorage, open_storage
from jepa_kit.errors import RemoteError


@pytest.fixture(params=[Bucket, Disk])
def handler(request, tmp_path, monkeypatch):
    monkeypatch.setattr(path_manager, "_path_handlers", dict(path_manager._path_handlers))
    made = request.param(tmp_path / "elsewhere")
    path_manager.register_handler(made)
    return made


@pytest.fixture
def place(handler):
    return RemoteStorage(f"{handler.PREFIX}a/run/")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "here").write_bytes(b"x" * 1000)
    return tmp_path / "here"


@pytest.fixture(params=["remote", "local"])
def storage(request, place, tmp_path):
    return place if request.param == "remote" else LocalStorage(tmp_path / "storage" / "run")


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint: files of one, two, ... bytes."""
    (tmp_path / "shards").mkdir()
    for size, name in enumerate(("run.pt", ".metadata", "__0_0.distcp"), start=1):
        (tmp_path / "shards" / name).write_bytes(b"x" * size)
    return tmp_path / "shards"


def test_a_file_is_written_fetched_renamed_and_deleted(storage, file, tmp_path):
    (tmp_path / "storage" / "run").mkdir(parents=True)
    assert (storage.names(), storage.exists("b.pt")) == ([], False)
    storage.write(file, "b.pt")
    storage.rename("b.pt", "c.pt")
    assert (storage.names(), storage.exists("b.pt"), storage.exists("c.pt")) == (["c.pt"], False, True)
    assert storage.complete("c.pt")
    assert storage.fetch("c.pt", tmp_path / "new").read_bytes() == file.read_bytes()
    storage.delete("c.pt")
    assert storage.names() == []


def test_a_folder_is_written_fetched_renamed_and_deleted(storage, folder, tmp_path):
    (tmp_path / "storage" / "run").mkdir(parents=True)
    storage.write(folder, "c_1")
    storage.rename("c_1", "c_2")
    assert storage.complete("c_2")
    fetched = storage.fetch("c_2", tmp_path / "new")
    assert {f.name: f.stat().st_size for f in fetched.iterdir()} == {"run.pt": 1, ".metadata": 2, "__0_0.distcp": 3}
    storage.delete("c_2")
    assert not storage.exists("c_2/run.pt")
    assert not storage.exists("c_2/.metadata")


def test_the_header_is_written_last_and_deleted_first(place, handler, folder, monkeypatch):
    place.write(folder, "c_1")
    assert handler.written[-1].rpartition("/")[2].removeprefix(".").removesuffix(".part") == "run.pt"
    deleted = []
    monkeypatch.setattr(handler, "_rm", lambda path, **_: deleted.append(path.rpartition("/")[2]))
    place.delete("c_1")
    assert deleted[0] == "run.pt"
    assert len(deleted) == 3


def test_a_folder_without_its_header_is_incomplete(place, folder):
    (folder / "run.pt").unlink()
    place.write(folder, "c_1")
    assert place.names() == ["c_1"]
    assert not place.complete("c_1")


def test_one_of_the_same_name_is_replaced(place, file):
    place.write(file, "b.pt")
    file.write_bytes(b"y")
    place.write(file, "b.pt")
    assert place.names() == ["b.pt"]
    assert place.fetch("b.pt", file.parent / "new").read_bytes() == b"y"


def test_a_copy_that_breaks_off_is_not_there_and_names_the_address(place, handler, file):
    place.write(file, "b.pt")
    handler.refuse = lambda address: "c.pt" in address
    with pytest.raises(RemoteError, match=rf"{handler.PREFIX}a/run/\S*c.pt\S* could not be written: (the b|No space)"):
        place.write(file, "c.pt")
    assert place.names() == ["b.pt"]


def test_only_the_file_itself_is_written(place, handler, file):
    """No probe. A handler that can rename gets a temporary name first."""
    place.write(file, "b.pt")
    wanted = [".b.pt.part"] if isinstance(handler, Disk) else ["b.pt"]
    assert [address.rpartition("/")[2] for address in handler.written] == wanted
    assert place.names() == ["b.pt"]


@pytest.mark.parametrize("handler", [Disk], indirect=True)
def test_a_handler_that_refuses_to_rename_after_all(place, handler, file, monkeypatch):
    """As one that wraps several stores, of which some cannot."""

    def unable(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(Disk, "_mv", unable)
    for name in ("b.pt", "c.pt"):
        place.write(file, name)
    assert [address.rpartition("/")[2] for address in handler.written] == [".b.pt.part", "b.pt", "c.pt"]
    place.rename("c.pt", "d.pt")
    assert place.names() == ["b.pt", "d.pt"]


def test_a_handler_that_answers_false(place, handler, file, monkeypatch):
    place.write(file, "b.pt")
    monkeypatch.setattr(handler, "_copy_from_local", lambda **_: False)
    with pytest.raises(RemoteError, match=r"c.pt\S* could not be written: its handler refused; its log says why"):
        place.write(file, "c.pt")
    monkeypatch.setattr(handler, "_copy", lambda *_, **__: False, raising=False)
    monkeypatch.setattr(place, "_renames", False)
    with pytest.raises(RemoteError, match=r"b.pt could not be copied to \S+d.pt: its handler refused; its log"):
        place.rename("b.pt", "d.pt")
    assert place.exists("b.pt")


@pytest.mark.parametrize(
    ("method", "do", "message"),
    [
        ("_ls", lambda p: p.names(), "a/run cannot be listed: BucketError"),
        ("_exists", lambda p: p.exists("b"), "a/run/b cannot be looked for: BucketError"),
        ("_rm", lambda p: p.delete("b.pt"), "a/run/b.pt could not be deleted: BucketError"),
    ],
)
def test_an_error_of_the_handlers_own_kind(place, handler, monkeypatch, method, do, message):
    def fail(*args, **kwargs):
        raise BucketError

    monkeypatch.setattr(handler, method, fail)
    with pytest.raises(RemoteError, match=message):
        do(place)


@pytest.mark.parametrize(
    ("method", "do", "message"),
    [
        ("_ls", lambda p: p.names(), "a/run cannot be listed: its handler cannot do that"),
        ("_exists", lambda p: p.exists("b"), "a/run/b cannot be looked for: its handler cannot do that"),
        ("_rm", lambda p: p.delete("b.pt"), "a/run/b.pt could not be deleted: its handler cannot do that"),
    ],
)
def test_a_handler_that_cannot(place, handler, monkeypatch, method, do, message):
    monkeypatch.setattr(handler, method, getattr(PathHandler(), method))  # which raises NotImplementedError
    for kind in (RemoteError, ValueError):  # the second is a mistake in the command
        with pytest.raises(kind, match=message):
            do(place)


def test_what_is_not_there(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*a/run/b.pt"):
        place.fetch("b.pt", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_handler_that_only_reads(file):
    with pytest.raises(RemoteError, match=r"https://host/x/\S+ could not be written: its handler only reads"):
        RemoteStorage("https://host/x").write(file, "b")


def test_a_url_without_a_handler():
    assert str(open_storage("x", "https://host")) == "https://host"
    message = (
        r"x \(='bukcet://a'\) must be a folder, or begin with a prefix that iopath has a handler for \(.*https://.*\); "
        r"a file under `imports:` registers one: jepa_kit.data.remote.fetch.path_manager.register_handler"
    )
    with pytest.raises(ValueError, match=message):
        open_storage("x", "bukcet://a")
