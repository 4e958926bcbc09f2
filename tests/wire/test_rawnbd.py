"""The judge is judged: the raw client of these tests against nbdkit and qemu-nbd.

A test client that misreads the protocol would let the product misread it the same way.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.lib import nbdwords as w
from tests.lib.pattern import difference, pattern
from tests.lib.pki import client_context
from tests.lib.procs import nbdkit, qemu_nbd
from tests.lib.rawio import NbdError, Style, Transmission, enter, open_export
from tests.lib.rawnbd import Closed, Haggle, OptionRefused, info_payload

MiB = w.MiB
pytestmark = pytest.mark.timeout(60)


def exercise(nbd: Transmission, seed: int) -> None:
    """Random verified I/O against a model in memory."""
    rng = random.Random(seed)
    model = bytearray(nbd.size)
    assert nbd.read(0, nbd.size) == model
    for step in range(60):
        offset = rng.randrange(nbd.size - 1)
        length = rng.randint(1, min(200_000, nbd.size - offset))
        action = rng.choice(["write", "write", "read", "zero", "trim", "flush"])
        if action == "write":
            data = pattern(step, offset, length)
            nbd.write(offset, data, rng.choice([0, w.CMD_FLAG_FUA]))
            model[offset : offset + length] = data
        elif action == "read":
            assert difference(bytes(model[offset : offset + length]), nbd.read(offset, length)) == ""
        elif action in ("zero", "trim"):
            nbd.zero(offset, length, rng.choice([0, w.CMD_FLAG_NO_HOLE]))
            model[offset : offset + length] = bytes(length)
        else:
            nbd.flush()
    assert difference(bytes(model), nbd.read(0, nbd.size)) == ""


@pytest.mark.parametrize("style", ["simple", "structured"])
def test_nbdkit_io(style: Style) -> None:
    with nbdkit("memory", "4M") as socket, open_export(socket, "", style) as nbd:
        assert nbd.size == 4 * MiB
        exercise(nbd, 1)
        nbd.disconnect()


@pytest.mark.parametrize("style", ["simple", "structured"])
def test_qemu_nbd_io(style: Style, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(4 * MiB)
    with qemu_nbd("-f", "raw", "-x", "disk", image) as socket, open_export(socket, "disk", style) as nbd:
        exercise(nbd, 2)
        nbd.disconnect()


def test_block_status_and_errors() -> None:
    with nbdkit("memory", "4M") as socket, open_export(socket, "") as nbd:
        nbd.write(MiB, b"x" * 65536)
        extents = nbd.status(0, 4 * MiB)
        assert sum(length for length, _ in extents) == 4 * MiB
        assert extents[0][1] == w.STATE_HOLE | w.STATE_ZERO
        assert any(flags == 0 for _, flags in extents)
        assert len(nbd.status(0, 4 * MiB, w.CMD_FLAG_REQ_ONE)) == 1
        with pytest.raises(NbdError) as caught:
            nbd.read(4 * MiB - 1, 2)
        assert caught.value.error == w.EINVAL
        assert nbd.read(MiB, 4) == b"xxxx"


def test_haggling_pieces(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MiB))
    with qemu_nbd("-f", "raw", "-x", "disk", "-D", "some words", image) as socket:
        with Haggle(socket) as haggle:
            haggle.begin()
            assert haggle.list_exports() == {"disk": "some words"}
            assert haggle.refused(0x7654321, b"data").type == w.REP_ERR_UNSUP
            assert haggle.refused(w.OPT_GO, info_payload("nobody")).type == w.REP_ERR_UNKNOWN
            with pytest.raises(OptionRefused):
                haggle.facts(w.OPT_INFO, "nobody")
            facts = haggle.facts(w.OPT_INFO, "disk", [w.INFO_BLOCK_SIZE, w.INFO_DESCRIPTION, w.INFO_NAME])
            assert facts.size == MiB and facts.description == "some words" and facts.block_sizes is not None
            haggle.structured()
            assert "base:allocation" in haggle.meta(w.OPT_LIST_META_CONTEXT, "disk", [])
            haggle.abort()
        with Haggle(socket) as haggle:
            haggle.begin(w.FLAG_FIXED_NEWSTYLE)
            assert haggle.export_name("disk", zeroes=True).size == MiB
        with Haggle(socket) as haggle:
            haggle.begin()
            with pytest.raises(Closed):
                haggle.export_name("nobody")


def test_pipelined_requests_out_of_order() -> None:
    with nbdkit("memory", "4M") as socket, open_export(socket, "") as nbd:
        for block in range(64):
            nbd.write(block * 4096, pattern(9, block * 4096, 4096))
        cookies = [nbd.send(w.CMD_READ, block * 4096, 4096) for block in range(64)]
        for block in reversed(range(64)):
            assert nbd.wait(cookies[block]).check().data == pattern(9, block * 4096, 4096)


def test_tls_with_nbdkit(pki: Path) -> None:
    options = ["--tls=require", "--tls-verify-peer", f"--tls-certificates={pki}"]
    with nbdkit(*options, "memory", "1M") as socket, Haggle(socket) as haggle:
        haggle.begin()
        assert haggle.refused(w.OPT_LIST).type == w.REP_ERR_TLS_REQD
        haggle.starttls(client_context(pki, "vm1"))
        with enter(haggle, "") as nbd:
            nbd.write(5, b"secret")
            assert nbd.read(4, 8) == b"\0secret\0"
