"""Bad input, rows H1 to H28: a client that misbehaves before the transmission phase.

Every test runs under the `unharmed` fixture: another client's verified I/O goes on, and both daemons live on.
"""

from __future__ import annotations

import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.lib import nbdwords as w
from tests.lib.facts import memory_kib, open_files
from tests.lib.pki import client_context
from tests.lib.procs import wait_until
from tests.lib.rawio import NbdError, Transmission, enter
from tests.lib.rawnbd import Closed, Haggle, OptionRefused, Stream, info_payload, meta_payload, option_bytes
from tests.lib.shared import ROOT_SIZE, VM1_EXPORTS, SharedFarm

pytestmark = [pytest.mark.usefixtures("unharmed"), pytest.mark.timeout(60)]
OPTION_BYTES_LIMIT = 65536
OPTIONS_LIMIT = 64
SILENCE_LIMIT_S = 10.0


@pytest.fixture
def haggle(shared: SharedFarm) -> Haggle:
    """A connection to vm1's socket after a good greeting."""
    return Haggle(shared.socket()).begin()


def still_good(haggle: Haggle) -> None:
    """After an error reply the same connection goes on to a working transmission phase."""
    with enter(haggle, "root") as nbd:
        assert nbd.size == ROOT_SIZE
        nbd.read(0, 4096)
        nbd.disconnect()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 64, b"\xff" * 64, bytes(range(64))])
def test_h1_wrong_magic(shared: SharedFarm, garbage: bytes) -> None:
    with Haggle(shared.socket()) as client:
        client.greeting()
        client.stream.send(garbage)
        client.stream.wait_closed(5)


def test_h2_silence_is_bounded(shared: SharedFarm) -> None:
    whole = option_bytes(w.OPT_GO, info_payload("root"))
    starts = [b"", b"\0\0", b"\0\0\0\3", b"\0\0\0\3" + whole[:7], b"\0\0\0\3" + whole[:18]]

    def wait(start: bytes) -> float:
        with Haggle(shared.socket()) as client:
            client.greeting()
            client.stream.send(start)
            begun = time.monotonic()
            client.stream.wait_closed(SILENCE_LIMIT_S + 10)
            return time.monotonic() - begun

    with ThreadPoolExecutor(len(starts)) as threads:
        took = list(threads.map(wait, starts))
    assert all(SILENCE_LIMIT_S - 1 <= seconds <= SILENCE_LIMIT_S + 3 for seconds in took), took


def test_h2_slow_but_steady_first_bytes_are_served(shared: SharedFarm) -> None:
    with Haggle(shared.socket()) as client:
        client.greeting()
        for byte in struct.pack(">I", 3) + option_bytes(w.OPT_STRUCTURED_REPLY):
            client.stream.send(bytes([byte]))
            time.sleep(0.02)
        assert client.reply(w.OPT_STRUCTURED_REPLY).type == w.REP_ACK


@pytest.mark.parametrize("flags", [4, 1 << 16, 1 << 31, 0xFFFFFFFF, 7])
def test_h3_unknown_client_flags(shared: SharedFarm, flags: int) -> None:
    with Haggle(shared.socket()) as client:
        client.greeting()
        client.client_flags(flags)
        assert client.stream.wait_closed(5) == b""


def test_h4_no_zeroes_agreed(shared: SharedFarm) -> None:
    with Haggle(shared.socket()) as client:
        client.begin(w.FLAG_FIXED_NEWSTYLE | w.FLAG_NO_ZEROES)
        facts = client.export_name("root")
        assert facts.size == ROOT_SIZE
        nbd = Transmission(client.stream, client.agreed)
        nbd.read(0, 512)
        nbd.disconnect()


def test_h5_zeroes_wanted(shared: SharedFarm) -> None:
    with Haggle(shared.socket()) as client:
        client.begin(w.FLAG_FIXED_NEWSTYLE)
        assert client.export_name("root", zeroes=True).size == ROOT_SIZE
        nbd = Transmission(client.stream, client.agreed)
        nbd.read(0, 512)
        nbd.disconnect()


def test_h5_go_never_pads(shared: SharedFarm) -> None:
    with Haggle(shared.socket()) as client:
        client.begin(w.FLAG_FIXED_NEWSTYLE)
        with enter(client, "root") as nbd:
            nbd.read(0, 512)
            nbd.disconnect()


@pytest.mark.parametrize("magic", [0, w.NBDMAGIC, w.IHAVEOPT ^ 1, w.OPTION_REPLY_MAGIC])
def test_h6_wrong_option_magic(haggle: Haggle, magic: int) -> None:
    haggle.send_option(w.OPT_LIST, magic=magic)
    assert haggle.stream.wait_closed(5) == b""


@pytest.mark.parametrize("option", [w.OPT_GO, w.OPT_INFO])
def test_h7_no_data_where_data_is_required(haggle: Haggle, option: int) -> None:
    assert haggle.refused(option).type == w.REP_ERR_INVALID
    still_good(haggle)


@pytest.mark.parametrize("option", [w.OPT_SET_META_CONTEXT, w.OPT_LIST_META_CONTEXT])
def test_h7_no_data_where_meta_data_is_required(haggle: Haggle, option: int) -> None:
    haggle.structured()
    assert haggle.refused(option).type == w.REP_ERR_INVALID
    haggle.facts(w.OPT_GO, "root")


@pytest.mark.parametrize("option", [w.OPT_EXPORT_NAME, w.OPT_GO, w.OPT_LIST, 0x7654321])
def test_h8_largest_length(shared: SharedFarm, haggle: Haggle, option: int) -> None:
    before = memory_kib(shared.filter_pid())
    haggle.send_option(option, length=0xFFFFFFFF)
    assert haggle.stream.wait_closed(5) == b""
    assert memory_kib(shared.filter_pid()) - before < 16 << 10


@pytest.mark.parametrize("option", [w.OPT_GO, 0x7654321])
def test_h9_just_above_our_limit(haggle: Haggle, option: int) -> None:
    haggle.stream.send(option_bytes(option, length=OPTION_BYTES_LIMIT + 1))
    assert haggle.stream.wait_closed(5) == b""


def test_h9_at_our_limit(haggle: Haggle) -> None:
    assert haggle.refused(0x7654321, bytes(OPTION_BYTES_LIMIT)).type == w.REP_ERR_UNSUP
    still_good(haggle)


@pytest.mark.parametrize("option", [0, w.OPT_PEEK_EXPORT, 12, 0x7654321, 0xFFFFFFFF])
@pytest.mark.parametrize("payload", [b"", b"some data"])
def test_h10_unknown_option(haggle: Haggle, option: int, payload: bytes) -> None:
    refusal = haggle.refused(option, payload)
    assert refusal.type == w.REP_ERR_UNSUP
    assert str(option) in refusal.text
    still_good(haggle)


def test_h11_longest_name(shared: SharedFarm, haggle: Haggle) -> None:
    name = "n" * w.STRING_MAX
    for option in (w.OPT_INFO, w.OPT_GO):
        assert haggle.refused(option, info_payload(name)).type == w.REP_ERR_UNKNOWN
    still_good(haggle)
    with Haggle(shared.socket()) as other, pytest.raises(Closed) as caught:
        other.begin().export_name(name)
    assert caught.value.partial == b""


def test_h12_name_too_long(shared: SharedFarm, haggle: Haggle) -> None:
    name = "n" * (w.STRING_MAX + 1)
    for option in (w.OPT_INFO, w.OPT_GO):
        refusal = haggle.refused(option, info_payload(name))
        assert refusal.type == w.REP_ERR_INVALID
        assert "4097" in refusal.text and "4096" in refusal.text, refusal.text
    still_good(haggle)
    with Haggle(shared.socket()) as other, pytest.raises(Closed) as caught:
        other.begin().export_name(name)
    assert caught.value.partial == b""


NOT_UTF8 = b"ro\xff\xfeot"


@pytest.mark.parametrize("name", [NOT_UTF8, b"ro\0ot", b"root\0"], ids=["not UTF-8", "NUL inside", "NUL at the end"])
def test_h13_h14_name_that_is_no_text(shared: SharedFarm, haggle: Haggle, name: bytes) -> None:
    for option in (w.OPT_INFO, w.OPT_GO):
        assert haggle.refused(option, info_payload(name)).type == w.REP_ERR_INVALID
    still_good(haggle)
    with Haggle(shared.socket()) as other, pytest.raises(Closed):
        other.begin().export_name(name)


def test_h15_empty_name_with_many_exports(haggle: Haggle) -> None:
    refusal = haggle.refused(w.OPT_GO, info_payload(""))
    assert refusal.type == w.REP_ERR_UNKNOWN
    assert refusal.text
    still_good(haggle)


def test_h15_empty_name_with_one_export(shared: SharedFarm) -> None:
    with Haggle(shared.socket("vm3")) as client:
        client.begin()
        assert list(client.list_exports()) == ["only"]
        assert client.facts(w.OPT_GO, "", [w.INFO_NAME]).name == "only"


@pytest.mark.parametrize(
    "payload",
    [
        info_payload("root")[:-2] + struct.pack(">H", 1),
        info_payload("root", [3])[:-1],
        info_payload("root", [3]) + b"\0",
        info_payload("root", [3]) + b"\0\3",
        info_payload("root")[:-1],
        struct.pack(">I", 0xFFFFFFFF) + b"root\0\0",
        struct.pack(">I", 5) + b"root\0\0",
        b"\0\0\0",
    ],
    ids=["one missing", "half", "half more", "one more", "no count", "huge name", "name eats count", "3 bytes"],
)
@pytest.mark.parametrize("option", [w.OPT_INFO, w.OPT_GO])
def test_h16_odd_info_counts(haggle: Haggle, option: int, payload: bytes) -> None:
    assert haggle.refused(option, payload).type == w.REP_ERR_INVALID
    still_good(haggle)


def test_h16_unknown_and_repeated_infos_are_ignored(haggle: Haggle) -> None:
    facts = haggle.facts(w.OPT_INFO, "root", [3, 3, 99, 0, 0xFFFF, 2])
    assert facts.block_sizes is not None and facts.description == "the first disk of vm1"
    still_good(haggle)


@pytest.mark.parametrize("option", [w.OPT_LIST, w.OPT_STARTTLS, w.OPT_STRUCTURED_REPLY, w.OPT_EXTENDED_HEADERS])
def test_h17_payload_where_none_belongs(haggle: Haggle, option: int) -> None:
    assert haggle.refused(option, b"root").type == w.REP_ERR_INVALID
    still_good(haggle)


def test_h18_abort_in_the_middle_of_an_option(shared: SharedFarm, haggle: Haggle) -> None:
    with Haggle(shared.socket()) as other:
        other.begin()
        other.stream.send(option_bytes(w.OPT_GO, info_payload("root"))[:20])
        other.stream.half_close()
        assert other.stream.wait_closed(5) == b""
    # ABORT's own bytes as a name: they are data, and no ABORT.
    assert haggle.refused(w.OPT_GO, info_payload(option_bytes(w.OPT_ABORT))).is_error
    haggle.abort()


def test_h18_abort_with_data_and_without_a_reader(haggle: Haggle, shared: SharedFarm) -> None:
    assert haggle.ask(w.OPT_ABORT, b"whatever")[-1].type == w.REP_ACK
    assert haggle.stream.wait_closed(5) == b""
    with Haggle(shared.socket()) as other:
        other.begin().send_option(w.OPT_ABORT)


def test_h19_plaintext_behind_starttls_is_never_used(shared: SharedFarm) -> None:
    for behind in (
        option_bytes(w.OPT_LIST),
        option_bytes(w.OPT_GO, info_payload("root")),
        b"\x16\x03\x01\x00\x05hello",
    ):
        with Haggle(shared.tcp) as client:
            client.begin()
            client.stream.send(option_bytes(w.OPT_STARTTLS) + behind)
            rest = client.stream.wait_closed(5)
            ack = struct.pack(">QIII", w.OPTION_REPLY_MAGIC, w.OPT_STARTTLS, w.REP_ACK, 0)
            assert rest in (b"", ack), rest.hex()


def test_h19_nothing_agreed_before_tls_survives_it(shared: SharedFarm, pki) -> None:
    with Haggle(shared.tcp) as client:
        client.begin()
        client.structured()
        client.meta(w.OPT_SET_META_CONTEXT, "vm1/root", ["base:allocation"])
        client.starttls(client_context(pki, "vm1"))
        facts = client.facts(w.OPT_GO, "root")
        assert not facts.flags & w.TFLAG_SEND_DF
        with Transmission(client.stream, client.agreed) as nbd:
            assert len(nbd.read(0, 4096)) == 4096  # a simple reply
            with pytest.raises(NbdError) as caught:
                nbd.call(w.CMD_BLOCK_STATUS, 0, 4096).check()
            assert caught.value.error == w.EINVAL


def test_h19_extended_headers_before_tls_are_forgotten(shared: SharedFarm, pki) -> None:
    with Haggle(shared.tcp) as client:
        client.begin()
        client.extended()
        client.starttls(client_context(pki, "vm1"))
        client.structured()
        with enter(client, "root", "simple") as nbd:
            nbd.read(0, 4096)
            nbd.disconnect()


def test_h20_starttls_twice(shared: SharedFarm, pki) -> None:
    with Haggle(shared.tcp) as client:
        client.begin()
        client.starttls(client_context(pki, "vm1"))
        assert client.refused(w.OPT_STARTTLS).type == w.REP_ERR_INVALID
        still_good(client)


def test_h20_tls_handshake_that_fails_is_dropped(shared: SharedFarm) -> None:
    with Haggle(shared.tcp) as client:
        client.begin()
        assert client.demand(w.OPT_STARTTLS) == []
        client.stream.send(option_bytes(w.OPT_LIST))
        client.stream.wait_closed(5)


@pytest.mark.parametrize("style", ["simple", "structured", "extended"])
def test_h21_option_after_go(haggle: Haggle, style) -> None:
    with enter(haggle, "root", style) as nbd:
        nbd.read(0, 512)
        nbd.stream.send(option_bytes(w.OPT_LIST, bytes(40), length=0))
        assert nbd.stream.wait_closed(5) == b""


def test_h22_too_many_options(haggle: Haggle) -> None:
    answered = 0
    with pytest.raises(Closed):
        for number in range(OPTIONS_LIMIT * 2):
            haggle.refused(0x1000 + number)
            answered += 1
    assert answered == OPTIONS_LIMIT


def test_h23_clients_that_vanish_leave_nothing_open(shared: SharedFarm) -> None:
    pid = shared.filter_pid()
    before = open_files(pid)
    starts = [b"", b"\0\0\0\3", b"\0\0\0\3" + option_bytes(w.OPT_STRUCTURED_REPLY), b"\0\0\0\3" + bytes(9)]
    for number in range(60):
        with Haggle(shared.socket() if number % 2 else shared.tcp) as client:
            if number % 3:
                client.greeting()
            client.stream.send(starts[number % len(starts)])
            if number % 5 == 0:
                client.stream.reset()
    wait_until("all files of vanished clients are closed", lambda: open_files(pid) <= before, 15)


def test_h24_commands_in_the_wrong_order(shared: SharedFarm) -> None:
    request = struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, 1, 0, 512)
    with Haggle(shared.socket()) as client:
        client.begin()
        client.stream.send(request)
        assert client.stream.wait_closed(5) == b""
    with Haggle(shared.socket()) as client:  # contexts of another export than GO's: no status
        client.begin().structured()
        client.meta(w.OPT_SET_META_CONTEXT, "bystander", ["base:allocation"])
        client.facts(w.OPT_GO, "root")
        with Transmission(client.stream, client.agreed) as nbd, pytest.raises(NbdError) as caught:
            nbd.call(w.CMD_BLOCK_STATUS, 0, 4096).check()
        assert caught.value.error == w.EINVAL
    with Haggle(shared.socket()) as client:
        client.begin().extended()
        assert client.refused(w.OPT_STRUCTURED_REPLY).type == w.REP_ERR_EXT_HEADER_REQD
        client.send_option(w.OPT_EXPORT_NAME, b"root")
        assert client.stream.wait_closed(5) == b""


def test_h24_a_failed_set_forgets_the_contexts(haggle: Haggle) -> None:
    haggle.structured()
    haggle.meta(w.OPT_SET_META_CONTEXT, "root", ["base:allocation"])
    assert haggle.refused(w.OPT_SET_META_CONTEXT, meta_payload("nobody", ["base:allocation"])).is_error
    haggle.facts(w.OPT_GO, "root")
    with Transmission(haggle.stream, haggle.agreed) as nbd, pytest.raises(NbdError) as caught:
        nbd.call(w.CMD_BLOCK_STATUS, 0, 4096).check()
    assert caught.value.error == w.EINVAL


@pytest.mark.parametrize("option", [w.OPT_SET_META_CONTEXT, w.OPT_LIST_META_CONTEXT])
def test_h25_meta_context_before_structured_replies(haggle: Haggle, option: int) -> None:
    assert haggle.refused(option, meta_payload("root", ["base:allocation"])).type == w.REP_ERR_INVALID
    still_good(haggle)


def test_h26_unknown_namespaces_and_names(haggle: Haggle) -> None:
    haggle.structured()
    unknown = ["x-nobody:thing", "qemu:dirty-bitmap:b", "base:nonsense", "nbd-server:x"]
    assert haggle.meta(w.OPT_SET_META_CONTEXT, "root", unknown) == {}
    assert haggle.meta(w.OPT_LIST_META_CONTEXT, "root", unknown) == {}
    found = haggle.meta(w.OPT_SET_META_CONTEXT, "root", [*unknown, "base:allocation", "base:allocation"])
    assert list(found) == ["base:allocation"]
    still_good(haggle)


def test_h26_meta_of_an_unknown_export(haggle: Haggle) -> None:
    haggle.structured()
    for option in (w.OPT_SET_META_CONTEXT, w.OPT_LIST_META_CONTEXT):
        assert haggle.refused(option, meta_payload("nobody", ["base:allocation"])).type == w.REP_ERR_UNKNOWN


def test_h27_no_queries(haggle: Haggle) -> None:
    haggle.structured()
    assert list(haggle.meta(w.OPT_LIST_META_CONTEXT, "root", [])) == ["base:allocation"]
    assert list(haggle.meta(w.OPT_LIST_META_CONTEXT, "root", ["base:"])) == ["base:allocation"]
    assert haggle.meta(w.OPT_SET_META_CONTEXT, "root", ["base:"]) == {}
    assert haggle.meta(w.OPT_SET_META_CONTEXT, "root", []) == {}
    haggle.facts(w.OPT_GO, "root")
    with Transmission(haggle.stream, haggle.agreed) as nbd, pytest.raises(NbdError) as caught:
        nbd.call(w.CMD_BLOCK_STATUS, 0, 4096).check()
    assert caught.value.error == w.EINVAL


def test_h28_very_many_queries(shared: SharedFarm, haggle: Haggle) -> None:
    haggle.structured()
    claim = struct.pack(">I", 4) + b"root" + struct.pack(">I", 1 << 16) + struct.pack(">I", 3) + b"a:b"
    assert haggle.refused(w.OPT_SET_META_CONTEXT, claim).type == w.REP_ERR_INVALID
    fitting = ["a:"] * ((OPTION_BYTES_LIMIT - 12) // 6)
    begun = time.monotonic()
    assert haggle.meta(w.OPT_SET_META_CONTEXT, "root", fitting) == {}
    assert time.monotonic() - begun < SILENCE_LIMIT_S - 2
    still_good(haggle)
    with Haggle(shared.socket()) as other:
        other.begin().structured()
        whole = option_bytes(w.OPT_SET_META_CONTEXT, meta_payload("root", ["a:b"] * (1 << 16)))
        with pytest.raises(Closed):
            other.stream.send(whole)
            other.stream.recv(20)


def test_h28_inner_length_beyond_the_option(haggle: Haggle) -> None:
    haggle.structured()
    good = meta_payload("root", ["base:allocation"])
    for bad in (good[:-1], good + b"\0", struct.pack(">I", 0xFFFFFFFF) + good[4:], good[:12] + b"\xff" * 4 + good[16:]):
        assert haggle.refused(w.OPT_SET_META_CONTEXT, bad).type == w.REP_ERR_INVALID
    still_good(haggle)


def test_many_silent_clients_do_not_lock_others_out(shared: SharedFarm) -> None:
    silent = [Stream.connect(shared.socket()) for _ in range(50)]
    try:
        begun = time.monotonic()
        with shared.open("root") as nbd:
            nbd.read(0, 4096)
        assert time.monotonic() - begun < SILENCE_LIMIT_S - 2
    finally:
        for stream in silent:
            stream.close()


def test_a_flood_on_one_vms_socket_is_no_other_vms_trouble(shared: SharedFarm) -> None:
    pid = shared.filter_pid()
    before = open_files(pid)
    flood = []
    try:
        for _ in range(600):
            try:
                flood.append(Stream.connect(shared.socket("vm3"), timeout_s=0.2))
            except OSError:
                break  # the queue is full: that is push-back, too
        begun = time.monotonic()
        with shared.open("root", vm="vm2") as nbd, shared.open("root") as other:
            nbd.write(0, b"calm")
            assert nbd.read(0, 4) == b"calm" and len(other.read(0, 4096)) == 4096
        assert time.monotonic() - begun < SILENCE_LIMIT_S - 2
    finally:
        for stream in flood:
            stream.close()
    with shared.open("only", vm="vm3", wait_s=15) as nbd:
        nbd.read(0, 4096)
    wait_until("all files of the flood are closed", lambda: open_files(pid) <= before + 2, 15)


def test_exports_of_another_vm_are_unknown(haggle: Haggle) -> None:
    for name in ("private", "vm2/private", "vm2/root", "../vm2/private"):
        with pytest.raises(OptionRefused) as caught:
            haggle.facts(w.OPT_GO, name)
        assert caught.value.reply.type == w.REP_ERR_UNKNOWN
    assert set(haggle.list_exports()) == VM1_EXPORTS
    still_good(haggle)
