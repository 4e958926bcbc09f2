"""Datastores on real files: opening, modes, locks between farms, files made whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.datastores import store_of
from nbdvvol.datastores.base import Store
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import DatastoreKind
from nbdvvol.model.link import DatastoreSpec

MIB = 1 << 20


def store(kind: str, path: Path, *, direct: bool = False, farm: str = "farm-a") -> Store:
    return store_of(DatastoreSpec(name="ds", kind=DatastoreKind(kind), path=str(path), direct=direct), farm)


@pytest.fixture
def fds() -> Iterator[list[int]]:
    held: list[int] = []
    yield held
    for fd in held:
        os.close(fd)


def refused(code: Code, *words: str) -> pytest.RaisesExc[NvError]:
    return pytest.RaisesExc(
        NvError, check=lambda error: error.code is code and all(word in str(error) for word in ("ds", *words))
    )


def test_a_file_is_created_allocated_and_grown_but_never_shortened(tmp_path: Path, fds: list[int]) -> None:
    path = tmp_path / "data" / "local.img"
    ds = store("file", path)
    with refused(Code.UNAVAILABLE, str(path), "is missing"):
        ds.open("")
    ds.prepare(4 * MIB)
    assert path.stat().st_size == 4 * MIB and path.stat().st_blocks * 512 >= 4 * MIB
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"x" * (4 * MIB))
    ds.prepare(6 * MIB)
    ds.prepare(2 * MIB)
    ds.prepare(0)
    assert path.read_bytes() == b"x" * (4 * MIB) + bytes(2 * MIB)
    found = ds.open("")
    fds.append(found.fd)
    assert (found.spec.size, found.spec.direct, found.spec.read_only, found.spec.align) == (6 * MIB, False, False, 1)
    assert not os.get_inheritable(found.fd)


def test_a_missing_tree_is_not_made(tmp_path: Path) -> None:
    with refused(Code.UNAVAILABLE, "is missing"):
        store("file", tmp_path / "not" / "mounted" / "x.img").prepare(MIB)
    with refused(Code.UNAVAILABLE, "is missing"):
        store("dir", tmp_path / "nas").prepare(0)


def test_no_space_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(Code.NO_SPACE, "full"):
        store("file", tmp_path / "x.img").prepare(MIB)
    with refused(Code.NO_SPACE, "full"):
        store("dir", tmp_path).create("leg", MIB)
    assert list(tmp_path.iterdir()) == []


def test_direct_mode_finds_the_alignment(tmp_path: Path, fds: list[int]) -> None:
    ds = store("file", tmp_path / "x.img", direct=True)
    ds.prepare(MIB)
    assert ds.direct_works()
    found = ds.open("")
    fds.append(found.fd)
    assert found.spec.direct and found.spec.align in (512, 4096)


def test_read_only_only_where_it_will_do(tmp_path: Path, fds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    real = os.open

    def read_only_disk(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "read-only")
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", read_only_disk)
    with refused(Code.DENIED, "read-only"):
        store("file", path).open("")
    found = store("file", path).open("", may_read_only=True)
    fds.append(found.fd)
    assert found.spec.read_only


@pytest.mark.parametrize(
    ("kind", "target", "word"),
    [("file", "/dev/null", "neither"), ("file", "/", "kind: dir"), ("block", "FILE", "no block device")],
)
def test_the_wrong_kind(tmp_path: Path, kind: str, target: str, word: str) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    with refused(Code.INVALID, word):
        store(kind, path if target == "FILE" else Path(target)).open("")


def test_two_farms_do_not_share_but_two_hosts_of_one_farm_do(tmp_path: Path, fds: list[int]) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    for _ in range(2):
        fds.append(store("file", path).open("").fd)
    other = store("file", path, farm="farm-b")
    with pytest.raises(NvError, match="another farm") as caught:
        other.open("")
    assert caught.value.code is Code.BUSY
    copy = os.dup(fds[0])  # the data plane's duplicate keeps the lock alive
    while fds:
        os.close(fds.pop())
    with pytest.raises(NvError, match="another farm"):
        other.open("")
    os.close(copy)
    fds.append(other.open("").fd)


def is_cached(fd: int) -> bool:
    """Whether a buffered file's first block is in the page cache."""
    try:
        return os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False


def test_direct_mode_begins_without_cached_pages(tmp_path: Path, fds: list[int]) -> None:
    """A file that was copied here is cached, and each write with O_DIRECT would have to look for its pages."""
    path = tmp_path / "x.img"
    path.write_bytes(os.urandom(MIB))
    fds.append(os.open(path, os.O_RDWR))
    os.fsync(fds[0])
    assert is_cached(fds[0])
    fds.append(store("file", path).open("").fd)
    assert is_cached(fds[0])
    os.close(fds.pop())
    fds.append(store("file", path, direct=True).open("").fd)
    assert not is_cached(fds[0])


def test_files_of_a_directory(tmp_path: Path, fds: list[int]) -> None:
    ds = store("dir", tmp_path)
    ds.prepare(0)
    (tmp_path / ".leg.new").write_bytes(b"left by a crash")
    ds.create("leg", 2 * MIB)
    assert [entry.name for entry in tmp_path.iterdir()] == ["leg"]
    assert (tmp_path / "leg").read_bytes() == bytes(2 * MIB)
    assert (tmp_path / "leg").stat().st_blocks * 512 >= 2 * MIB
    (tmp_path / "leg").write_bytes(b"x" * (2 * MIB))
    ds.create("leg", 2 * MIB)
    assert (tmp_path / "leg").read_bytes() == b"x" * (2 * MIB)
    with refused(Code.EXISTS, "leg"):
        ds.create("leg", MIB)
    ds.grow("leg", 3 * MIB)
    ds.grow("leg", MIB)
    assert ds.size("leg") == 3 * MIB and (tmp_path / "leg").read_bytes()[:MIB] == b"x" * MIB
    found = ds.open("leg")
    fds.append(found.fd)
    assert found.spec.size == 3 * MIB
    ds.remove("leg")
    ds.remove("leg")
    with refused(Code.UNAVAILABLE, "is missing"):
        ds.size("leg")
    assert ds.direct_works()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\0b", "n" * 241])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    ds = store("dir", tmp_path)
    for act in (lambda: ds.create(name, 1), lambda: ds.remove(name), lambda: ds.size(name), lambda: ds.open(name)):
        with refused(Code.INVALID, "name"):
            act()


def test_links_are_not_followed_inside_a_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with refused(Code.INVALID, "symbolic link"):
        store("dir", tmp_path).open("link")


@pytest.mark.parametrize("kind", ["file", "block"])
def test_one_object_datastores_hold_no_files(tmp_path: Path, kind: str) -> None:
    ds = store(kind, tmp_path / "x")
    for act in (lambda: ds.create("x", 1), lambda: ds.grow("x", 1), lambda: ds.remove("x")):
        with refused(Code.UNSUPPORTED, "kind dir"):
            act()
    for look in (ds.open, ds.size):
        with refused(Code.INVALID, "one object"):
            look("x")
    with refused(Code.UNAVAILABLE, "is missing"):
        ds.size("")
    (tmp_path / "x").write_bytes(bytes(12345))
    assert ds.size("") == 12345


def test_a_remote_export_is_no_file() -> None:
    """Its bytes come through connections (datastores/nbd.py); what needs a path is refused."""
    spec = DatastoreSpec(name="ds", kind=DatastoreKind.NBD, path="nbd://far/x")
    ds = store_of(spec, "farm-a")
    ds.prepare(0)
    assert not ds.direct_works()
    for act in (lambda: ds.create("x", 1), lambda: ds.grow("x", 1), lambda: ds.remove("x"), lambda: ds.size("")):
        with refused(Code.UNSUPPORTED, "kind dir"):
            act()
    with refused(Code.INTERNAL, "no file descriptor"):
        ds.open("")
