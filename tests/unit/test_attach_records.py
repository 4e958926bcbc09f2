"""Attachment records, their locks, and what attach and detach say when they cannot."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from nbdvvol.filter import attachments as attachments_module
from nbdvvol.filter import nbdnetlink
from nbdvvol.filter.attach import other_ways, run_attach, run_detach
from nbdvvol.filter.attachments import Attachment, Attachments, Lock
from nbdvvol.filter.nbdnetlink import NbdMessage
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.uri import NbdUri

HOLD = """
import signal, sys
from pathlib import Path
from nbdvvol.filter.attachments import Attachments
if sys.argv[3] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
lock = Attachments(Path(sys.argv[1])).lock(sys.argv[2])
print("held", flush=True)
signal.pause()
"""


def record(identity: str = "id-1", vvol: str = "vm1/root", index: int = 0) -> Attachment:
    return Attachment(
        identity=identity, vvol=vvol, uri="nbd+unix:///root?socket=/run/s", device=f"/dev/nbd{index}", index=index,
        size=1 << 20, block_size=512, connections=2, dead_timeout_s=60, request_timeout_s=20, keeper_pid=1,
    )  # fmt: skip


def hold(run_dir: Path, identity: str, manner: str = "") -> subprocess.Popen[str]:
    """A process that holds an attachment's lock."""
    command = [sys.executable, "-c", HOLD, str(run_dir), identity, manner]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_record_is_found_by_every_name(tmp_path: Path) -> None:
    store = Attachments(tmp_path)
    store.save(record())
    store.save(record("id-2", "vm1/data", 1))
    store.save(record("id-3", "vm2/data", 2))
    for name in ("/dev/nbd1", "nbd1", "vm1/data", "id-2"):
        assert store.find(name).identity == "id-2"
    assert store.find("root").identity == "id-1"
    assert [found.index for found in store.all()] == [0, 1, 2]


@pytest.mark.parametrize("name", ["data", "nothing", ""])
def test_an_unknown_or_ambiguous_name_lists_what_is_attached(tmp_path: Path, name: str) -> None:
    store = Attachments(tmp_path)
    store.save(record("id-2", "vm1/data", 1))
    store.save(record("id-3", "vm2/data", 2))
    with pytest.raises(NvError) as refused:
        store.find(name)
    assert refused.value.code is Code.NOT_FOUND
    assert "vm1/data on /dev/nbd1" in refused.value.hint
    assert "vm2/data on /dev/nbd2" in refused.value.hint


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = Attachments(tmp_path)
    (store.dir / "id-1.json").write_text("{")
    with pytest.raises(NvError, match=r"id-1\.json"):
        store.load("id-1")


@pytest.mark.parametrize("identity", ["../x", "a/b", "", "x" * 65])
def test_an_identity_cannot_leave_the_directory(tmp_path: Path, identity: str) -> None:
    with pytest.raises(NvError, match="identity"):
        Attachments(tmp_path).load(identity)


def test_the_lock_is_held_by_one_process_and_names_it(tmp_path: Path) -> None:
    store = Attachments(tmp_path)
    child = hold(tmp_path, "id-1")
    try:
        assert store.lock("id-1") is None
        assert Lock.holder(store.dir / "id-1.lock") == child.pid
        assert store.lock("id-2") is not None
    finally:
        child.kill()
        child.communicate()
    assert Lock.holder(store.dir / "id-1.lock") is None
    lock = store.lock("id-1")
    assert lock is not None
    lock.release()


@pytest.mark.parametrize("manner", ["", "deaf"])
def test_a_keeper_is_stopped_even_if_it_does_not_listen(
    tmp_path: Path, manner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments_module, "KEEPER_STOP_LIMIT_S", 0.3 if manner else 5.0)
    child = hold(tmp_path, "id-1", manner)
    try:
        Attachments(tmp_path).stop_keeper("id-1").release()
        assert child.wait(5) == (-9 if manner else -15)
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without nbd, whatever this machine's has."""

    async def absent() -> None:
        raise OSError(errno.ENOENT, "no such family")

    monkeypatch.setattr(nbdnetlink.NetlinkKernel, "_bind", absent)
    monkeypatch.setattr(nbdnetlink, "load_driver", lambda: "Module nbd not found")


def attach(run_dir: Path, uri: str = "nbd+unix:///root?socket=/run/vms/vm1.sock", **changes: object) -> Attachment:
    arguments: dict[str, object] = {
        "identity": "id-1", "device": None, "connections": 2, "dead_timeout_s": 60, "request_timeout_s": 20,
        "run_dir": run_dir, "foreground": True,
    }  # fmt: skip
    return run_attach(uri, **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_driver")
def test_a_kernel_without_the_driver_gets_lines_that_work(tmp_path: Path) -> None:
    with pytest.raises(NvError, match="no nbd driver") as refused:
        attach(tmp_path)
    assert refused.value.code is Code.NO_KERNEL_NBD
    assert "Module nbd not found" in refused.value.message
    assert "server.type=unix,server.path=/run/vms/vm1.sock,export=root" in refused.value.hint
    assert "nbd-client -unix /run/vms/vm1.sock -N root /dev/nbd0" in refused.value.hint


@pytest.mark.usefixtures("no_driver")
def test_a_relative_socket_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NvError) as refused:
        attach(tmp_path, "nbd+unix:///root?socket=run/vms/vm1.sock")
    assert f"server.path={tmp_path}/run/vms/vm1.sock," in refused.value.hint


def test_the_lines_quote_what_a_shell_or_qemu_would_split() -> None:
    lines = other_ways(NbdUri("my disk,1", host="10.0.0.1", port=10810))
    assert "server.type=inet,server.host=10.0.0.1,server.port=10810,export=my disk,,1" in lines
    assert "nbd-client 10.0.0.1 10810 -N 'my disk,1' /dev/nbd0" in lines


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"connections": 0}, "connections: 0 is not within 1..16"),
        ({"connections": 17}, "connections: 17"),
        ({"request_timeout_s": 0}, "request time-out in seconds: 0 is not within 1..86400"),
        ({"dead_timeout_s": -1}, "-1"),
        ({"device": "/dev/sda"}, "'/dev/sda' is not /dev/nbdN"),
        ({"device": "/dev/nbd0p1"}, "nbd0p1"),
        ({"uri": "nbds://h/root"}, "does not speak TLS"),
        ({"uri": "http://h/root"}, "scheme 'http'"),
        ({"identity": "a/b"}, "identity 'a/b'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(NvError) as refused:
        attach(tmp_path, **changes)  # type: ignore[arg-type]
    assert said in refused.value.message


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("foreground", [True, False])
def test_an_attached_vvol_is_not_attached_again(tmp_path: Path, *, foreground: bool) -> None:
    Attachments(tmp_path).save(record())
    child = hold(tmp_path, "id-1")
    try:
        with pytest.raises(NvError, match="already attached as /dev/nbd0") as refused:
            attach(tmp_path, foreground=foreground)
        assert refused.value.code is Code.EXISTS
    finally:
        child.kill()
        child.communicate()


@pytest.mark.usefixtures("no_driver")
def test_detach_removes_the_record_of_a_device_that_is_gone(tmp_path: Path) -> None:
    store = Attachments(tmp_path)
    store.save(record(index=99999))
    child = hold(tmp_path, "id-1")
    try:
        assert run_detach(tmp_path, "vm1/root").device == "/dev/nbd99999"
        assert child.wait(5) == -15, "the keeper is told to end"
    finally:
        child.kill()
        child.communicate()
    assert store.all() == []
    with pytest.raises(NvError, match="attached: nothing"):
        run_detach(tmp_path, "vm1/root")


def test_messages_have_the_kernels_layout() -> None:
    message = NbdMessage()
    message["cmd"] = 3
    message["version"] = 1
    message["attrs"] = [
        ("NBD_ATTR_INDEX", 2),
        ("NBD_ATTR_SIZE_BYTES", 1 << 33),
        ("NBD_ATTR_SOCKETS", {"attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", 7)]})]}),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "ab"),
    ]
    message.encode()
    head, body = message.data[:16], bytes(message.data[16:])
    assert int.from_bytes(head[:4], sys.byteorder) == 16 + len(body)
    assert body.hex(" ", 4) == (
        "03010000 "  # command, version
        "08000100 02000000 "  # index
        "0c000200 00000000 02000000 "  # size
        "10000700 0c000100 08000100 07000000 "  # sockets: one item: its fd
        "07000a00 61620000"  # identifier with its NUL, padded
    )
