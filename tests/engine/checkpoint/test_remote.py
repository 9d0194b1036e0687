"""Files in folders elsewhere, whatever the handler can and cannot do."""

import pytest
from iopath.common.file_io import PathHandler
from places import Bucket, BucketError, Disk

from jepa_kit.data.remote.fetch import path_manager
from jepa_kit.engine.checkpoint.remote import RemoteFolder, check_address
from jepa_kit.errors import RemoteError


@pytest.fixture(params=[Bucket, Disk])
def handler(request, tmp_path, monkeypatch):
    monkeypatch.setattr(path_manager, "_path_handlers", dict(path_manager._path_handlers))
    made = request.param(tmp_path / "elsewhere")
    path_manager.register_handler(made)
    return made


@pytest.fixture
def place(handler):
    return RemoteFolder(f"{handler.PREFIX}a/run/")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "here").write_bytes(b"x" * 1000)
    return tmp_path / "here"


def test_a_file_goes_there_and_comes_back(place, file, tmp_path):
    assert (place.names(), place.holds("b.pt")) == ([], False)
    place.put(file, "b.pt")
    place.put(file, "c/run.pt")
    assert (place.names(), place.names("c"), place.holds("c/run.pt")) == (["b.pt", "c"], ["run.pt"], True)
    place.get("c/run.pt", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == file.read_bytes()
    place.rename("b.pt", "d/e.pt")
    place.remove("c/run.pt")
    assert (place.names("c"), place.names("d"), place.holds("b.pt")) == ([], ["e.pt"], False)


def test_one_of_the_same_name_is_replaced(place, file):
    place.put(file, "b.pt")
    file.write_bytes(b"y")
    place.put(file, "b.pt")
    assert place.names() == ["b.pt"]
    place.get("b.pt", file)
    assert file.read_bytes() == b"y"


def test_a_copy_that_breaks_off_is_not_there_and_names_the_address(place, handler, file):
    place.put(file, "b.pt")
    handler.refuse = lambda address: "c.pt" in address
    with pytest.raises(RemoteError, match=rf"{handler.PREFIX}a/run/\S*c.pt\S* could not be written: (the b|No space)"):
        place.put(file, "c.pt")
    assert place.names() == ["b.pt"]


def test_it_has_its_name_when_it_is_whole(place, handler, file):
    place.put(file, "b.pt")
    parts = [".b.pt.part", ".probe_0.part"] if isinstance(handler, Disk) else [".probe_0.part", "b.pt"]
    assert sorted(address.rpartition("/")[2] for address in handler.written) == parts


def test_a_handler_that_answers_false(place, handler, file, monkeypatch):
    place.put(file, "b.pt")
    monkeypatch.setattr(handler, "_copy_from_local", lambda **_: False)
    with pytest.raises(RemoteError, match=r"c.pt\S* could not be written: its handler refused; its log says why"):
        place.put(file, "c.pt")
    monkeypatch.setattr(handler, "_copy", lambda *_, **__: False, raising=False)
    monkeypatch.setattr(place, "_renames", False)
    with pytest.raises(RemoteError, match=r"b.pt could not be copied to \S+d.pt: its handler refused; its log"):
        place.rename("b.pt", "d.pt")
    assert place.holds("b.pt")


@pytest.mark.parametrize(
    ("method", "do", "message"),
    [
        ("_ls", lambda p: p.names(), "a/run cannot be listed: BucketError"),
        ("_exists", lambda p: p.holds("b"), "a/run/b cannot be looked for: BucketError"),
        ("_rm", lambda p: p.remove("b"), "a/run/b could not be deleted: BucketError"),
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
        ("_exists", lambda p: p.holds("b"), "a/run/b cannot be looked for: its handler cannot do that"),
        ("_rm", lambda p: p.remove("b"), "a/run/b could not be deleted: its handler cannot do that"),
    ],
)
def test_a_handler_that_cannot(place, handler, monkeypatch, method, do, message):
    monkeypatch.setattr(handler, method, getattr(PathHandler(), method))  # which raises NotImplementedError
    for kind in (RemoteError, ValueError):  # the second is a mistake in the command
        with pytest.raises(kind, match=message):
            do(place)


def test_what_is_not_there(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*a/run/b.pt"):
        place.get("b.pt", tmp_path / "b")
    assert not list(tmp_path.glob("b*"))


def test_a_handler_that_only_reads(file):
    with pytest.raises(RemoteError, match=r"https://host/x/\S+ could not be written: its handler only reads"):
        RemoteFolder("https://host/x").put(file, "b")


def test_an_address_without_a_handler():
    check_address("x", "https://host")
    message = (
        r"x \(='bukcet://a'\) must be a folder, or begin with a prefix that iopath has a handler for \(.*https://.*\); "
        r"a file under `imports:` registers one: jepa_kit.data.remote.fetch.path_manager.register_handler"
    )
    with pytest.raises(ValueError, match=message):
        check_address("x", "bukcet://a")
