"""The haggling core against the protocol's tables: bytes in, exact bytes out (catalogue rows H3..H28)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvvol.nbd.constants import Reply
from nbdvvol.nbd.haggle import Answer, Drop, Haggle, Then, TlsRule, connection_flags, parse_header
from nbdvvol.nbd.provider import Facts, Listing, Opened, Provider, ReplyError, match_contexts

FIXED = b"\0\0\0\1"
BOTH = b"\0\0\0\3"
SIZE = 1 << 30
FLAGS = 0b0000_1101_1110_1101  # everything a filter offers, DF (bit 7) included
REP = 0x0003E889045565A9
ACK, SERVER, INFO, META = 1, 2, 3, 4
E = 1 << 31
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN, EXT_REQD = E + 1, E + 2, E + 3, E + 5, E + 6, E + 7, E + 10


class Exports(Provider):
    """Two exports; "" is the first; "secret" is refused."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def _facts(self, name: str) -> Facts:
        if name == "refused":
            raise ReplyError(Reply.ERR_POLICY, "not for you")
        names = {"": "disk", "disk": "disk", "vm/disk": "disk", "other": "other", "n" * 4096: "n" * 4096}
        if name not in names:
            raise ReplyError(Reply.ERR_UNKNOWN, f"no export {name!r}")
        return Facts(names[name], SIZE, FLAGS, "a disk", 512, 4096, 1 << 25)

    async def list(self) -> Sequence[Listing]:
        return [Listing("disk", "a disk"), Listing("other")]

    async def info(self, name: str) -> Facts:
        return self._facts(name)

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        return match_contexts(queries, self._facts(name).contexts)

    async def open(self, name: str) -> Opened:
        self.opened.append(name)
        return Opened(self._facts(name), 7)


class Client:
    """Drives a Haggle without an event loop: nothing in it waits."""

    def __init__(self, tls: TlsRule = TlsRule.OFF, flags: bytes = BOTH) -> None:
        self.provider = Exports()
        self.haggle = Haggle(self.provider, tls)
        self.haggle.client_flags(flags)

    def send(self, option: int, payload: bytes = b"") -> Answer:
        return asyncio.run(self.haggle.option(option, payload))

    def replies(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        return parse(option, self.send(option, payload).data)

    def error(self, option: int, payload: bytes = b"") -> int:
        """The one error reply, which must carry a readable sentence."""
        answer = self.send(option, payload)
        [(kind, text)] = parse(option, answer.data)
        assert kind & E and 0 < len(text.decode()) <= 4096
        assert answer.then is (Then.CLOSE if kind == SHUTDOWN else Then.CONTINUE)
        return kind


def parse(option: int, data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        magic, echoed, kind, length = struct.unpack_from(">QIII", data)
        assert (magic, echoed) == (REP, option) and len(data) >= 20 + length
        found.append((kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def named(name: bytes, infos: Sequence[int] = ()) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(name: bytes, *queries: bytes) -> bytes:
    parts = [struct.pack(">I", len(query)) + query for query in queries]
    return struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries)) + b"".join(parts)


EXPORT = struct.pack(">HQH", 0, SIZE, FLAGS & ~0x80)
EXPORT_DF = struct.pack(">HQH", 0, SIZE, FLAGS)


def test_hello_is_fixed_newstyle() -> None:
    assert Haggle(Exports()).hello() == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("flags", [4, 1 << 31, 7])
def test_h3_unknown_client_flags_drop(flags: int) -> None:
    with pytest.raises(Drop):
        Haggle(Exports()).client_flags(struct.pack(">I", flags))


@pytest.mark.parametrize(("flags", "padding"), [(BOTH, 0), (FIXED, 124), (b"\0\0\0\2", 0), (b"\0\0\0\0", 124)])
def test_h4_h5_export_name_padding(flags: bytes, padding: int) -> None:
    answer = Client(flags=flags).send(1, b"disk")
    assert answer.data == struct.pack(">QH", SIZE, FLAGS & ~0x80) + bytes(padding)
    assert answer.then is Then.ENTER and answer.enter is not None and answer.enter.opened.volume == 7


def test_h6_h8_h9_headers() -> None:
    assert parse_header(b"IHAVEOPT" + struct.pack(">II", 7, 65536)) == (7, 65536)
    for bad in (b"IHAVEOPS" + bytes(8), b"IHAVEOPT" + struct.pack(">II", 7, 65537), b"IHAVEOPT" + b"\xff" * 8):
        with pytest.raises(Drop):
            parse_header(bad)


@pytest.mark.parametrize("option", [6, 7, 9, 10])
def test_h7_empty_payload_where_data_is_required(option: int) -> None:
    client = Client()
    client.send(8)
    assert client.error(option) == INVALID


@pytest.mark.parametrize("option", [0, 4, 12, 0x7654321, 2**32 - 1])
def test_h10_unknown_option(option: int) -> None:
    client = Client()
    assert client.error(option, b"anything") == UNSUP
    assert client.replies(3)[-1] == (ACK, b"")


def test_h11_h12_name_limits() -> None:
    assert Client().send(1, b"n" * 4096).then is Then.ENTER
    with pytest.raises(Drop):
        Client().send(1, b"n" * 4097)
    assert Client().error(7, named(b"x" * 4097)) == INVALID
    assert Client().error(7, named(b"x" * 4096)) == UNKNOWN


@pytest.mark.parametrize("name", [b"\xff\xfe", b"di\0sk"])
def test_h13_h14_bad_names(name: bytes) -> None:
    with pytest.raises(Drop):
        Client().send(1, name)
    assert Client().error(6, named(name)) == INVALID
    assert Client().error(7, named(name)) == INVALID


def test_h15_empty_name_is_the_default_export() -> None:
    replies = Client().replies(7, named(b"", [1]))
    assert replies == [(INFO, EXPORT), (INFO, struct.pack(">H", 1) + b"disk"), (ACK, b"")]


@pytest.mark.parametrize(
    "payload",
    [
        named(b"disk")[:-1],
        named(b"disk") + b"\0",
        struct.pack(">I4sHH", 4, b"disk", 2, 0),
        struct.pack(">I4sHHH", 4, b"disk", 1, 0, 0),
        struct.pack(">I", 2**32 - 1) + b"disk\0\0",
        struct.pack(">I", 5) + b"disk\0\0",
    ],
)
@pytest.mark.parametrize("option", [6, 7])
def test_h16_malformed_info(option: int, payload: bytes) -> None:
    client = Client()
    assert client.error(option, payload) == INVALID
    assert client.replies(6, named(b"disk"))[-1] == (ACK, b"")


@pytest.mark.parametrize("option", [3, 5, 8, 11])
def test_h17_payload_where_none_belongs(option: int) -> None:
    assert Client(TlsRule.OFFERED).error(option, b"x") == INVALID


def test_list() -> None:
    disk = struct.pack(">I", 4) + b"disk" + b"a disk"
    other = struct.pack(">I", 5) + b"other"
    assert Client().replies(3) == [(SERVER, disk), (SERVER, other), (ACK, b"")]


@pytest.mark.parametrize("payload", [b"", b"ignored"])
@pytest.mark.parametrize("rule", list(TlsRule))
def test_abort(rule: TlsRule, payload: bytes) -> None:
    client = Client(rule)
    answer = client.send(2, payload)
    assert parse(2, answer.data) == [(ACK, b"")] and answer.then is Then.CLOSE
    with pytest.raises(Drop):
        client.send(3)


def test_info_and_go_give_the_same_facts() -> None:
    wanted = named(b"vm/disk", [3, 2, 1, 99])
    facts = [
        (INFO, EXPORT),
        (INFO, struct.pack(">H", 1) + b"disk"),
        (INFO, struct.pack(">H", 2) + b"a disk"),
        (INFO, struct.pack(">HIII", 3, 512, 4096, 1 << 25)),
        (ACK, b""),
    ]
    client = Client()
    assert client.replies(6, wanted) == facts
    assert client.provider.opened == []  # H23: INFO opens nothing
    answer = client.send(7, wanted)
    assert parse(7, answer.data) == facts and answer.then is Then.ENTER


def test_go_errors_leave_the_client_haggling() -> None:
    client = Client()
    assert client.error(7, named(b"nosuch")) == UNKNOWN
    assert client.error(7, named(b"refused")) == POLICY
    assert client.send(7, named(b"disk")).then is Then.ENTER
    for name in (b"nosuch", b"refused"):
        with pytest.raises(Drop):
            Client().send(1, name)


def test_df_only_after_structured_replies() -> None:
    client = Client()
    assert client.replies(6, named(b"disk"))[0] == (INFO, EXPORT)
    assert client.replies(8) == [(ACK, b"")]
    answer = client.send(7, named(b"disk"))
    assert parse(7, answer.data)[0] == (INFO, EXPORT_DF)
    assert answer.enter is not None
    params = answer.enter.params
    assert (params.structured, params.extended, params.read_only, params.tflags) == (True, False, False, FLAGS)
    assert (params.block_min, params.payload_max, params.contexts) == (512, 1 << 25, ())


def test_extended_headers() -> None:
    client = Client()
    client.send(8)
    assert client.replies(11) == [(ACK, b"")]
    assert client.error(8) == EXT_REQD
    answer = client.send(7, named(b"disk"))
    assert parse(7, answer.data)[0] == (INFO, struct.pack(">HQH", 0, SIZE, FLAGS | 1 << 12))
    assert answer.enter is not None and answer.enter.params.extended and answer.enter.params.structured


def test_export_name_is_forbidden_after_extended_headers() -> None:
    client = Client()
    client.send(11)
    with pytest.raises(Drop):
        client.send(1, b"disk")


def test_flags_never_promise_what_is_not_agreed() -> None:
    everything = 0xFFFF
    assert connection_flags(everything, structured=False, extended=False) & (1 << 7 | 1 << 9 | 1 << 12) == 0
    assert connection_flags(0, structured=True, extended=False) == 1
    assert connection_flags(0, structured=False, extended=True) == 1 | 1 << 12


@pytest.mark.parametrize("option", [9, 10])
def test_h25_meta_context_before_structured_replies(option: int) -> None:
    assert Client().error(option, meta(b"disk", b"base:allocation")) == INVALID


BASE = b"base:allocation"


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ((), 1, 0),  # H27
        ((BASE,), 1, 1),
        ((b"base:",), 1, 0),
        ((b"x-unknown:thing", b"qemu:dirty-bitmap:b"), 0, 0),  # H26
        ((b"nocolon", b""), 0, 0),
        ((BASE, b"x:", BASE), 1, 1),
        ((b"",) * 16000, 0, 0),  # H28: as many as fit in one option
    ],
)
def test_meta_queries(queries: tuple[bytes, ...], listed: int, selected: int) -> None:
    client = Client()
    client.send(8)
    assert client.replies(9, meta(b"disk", *queries)) == [(META, bytes(4) + BASE)] * listed + [(ACK, b"")]
    replies = client.replies(10, meta(b"disk", *queries))
    assert replies == [(META, b"\0\0\0\1" + BASE)] * selected + [(ACK, b"")]
    answer = client.send(7, named(b"disk"))
    assert answer.enter is not None
    assert [(context.id, context.name) for context in answer.enter.params.contexts] == [
        (1, "base:allocation")
    ] * selected


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">I", 4) + b"disk",
        struct.pack(">I", 400) + b"disk\0\0\0\0",
        struct.pack(">I4sI", 4, b"disk", 1),
        struct.pack(">I4sI", 4, b"disk", 2**32 - 1) + bytes(64),
        struct.pack(">I4sII", 4, b"disk", 1, 2**32 - 1) + b"base:",
        meta(b"disk", BASE) + b"x",
        meta(b"disk", b"base:\xff"),
        meta(b"disk", b"q" * 4097),
    ],
)
@pytest.mark.parametrize("option", [9, 10])
def test_malformed_meta(option: int, payload: bytes) -> None:
    client = Client()
    client.send(8)
    assert client.error(option, payload) == INVALID


@pytest.mark.parametrize("bad", [meta(b"nosuch", BASE), b"junk", meta(b"disk"), meta(b"refused", BASE)])
def test_set_meta_replaces_the_previous_set_even_on_failure(bad: bytes) -> None:
    client = Client()
    client.send(8)
    client.send(10, meta(b"disk", BASE))
    client.send(10, bad)
    answer = client.send(7, named(b"disk"))
    assert answer.enter is not None and answer.enter.params.contexts == ()


def test_contexts_count_only_for_the_export_that_go_enters() -> None:
    for go, count in ((b"other", 0), (b"disk", 1), (b"vm/disk", 1)):
        client = Client()
        client.send(8)
        client.send(10, meta(b"disk", BASE))
        answer = client.send(7, named(go))
        assert answer.enter is not None and len(answer.enter.params.contexts) == count


def test_contexts_survive_list_and_info() -> None:
    client = Client()
    client.send(8)
    client.send(10, meta(b"disk", BASE))
    client.send(9, meta(b"disk"))
    client.send(6, named(b"other"))
    client.send(3)
    answer = client.send(7, named(b"disk"))
    assert answer.enter is not None and len(answer.enter.params.contexts) == 1


def test_starttls_when_not_offered() -> None:
    assert Client(TlsRule.OFF).error(5) == POLICY


def test_starttls_forgets_what_was_agreed() -> None:
    client = Client(TlsRule.OFFERED)
    client.send(11)
    client.send(10, meta(b"disk", BASE))
    answer = client.send(5)
    assert parse(5, answer.data) == [(ACK, b"")] and answer.then is Then.START_TLS
    with pytest.raises(Drop):
        client.send(3)  # H19: nothing counts between the acknowledgement and TLS
    client.haggle.started_tls(client.provider)
    assert client.error(5) == INVALID  # H20
    assert client.error(10, meta(b"disk", BASE)) == INVALID
    answer = client.send(7, named(b"disk"))
    assert answer.enter is not None
    params = answer.enter.params
    assert (params.structured, params.extended, params.contexts) == (False, False, ())


@pytest.mark.parametrize("option", [0, 3, 4, 6, 7, 8, 9, 10, 11, 99])
def test_required_tls_refuses_everything_else(option: int) -> None:
    client = Client(TlsRule.REQUIRED)
    assert client.error(option, named(b"disk")) == TLS_REQD
    assert client.send(5).then is Then.START_TLS
    client.haggle.started_tls(client.provider)
    assert client.send(7, named(b"disk")).then is Then.ENTER


def test_required_tls_drops_export_name() -> None:
    with pytest.raises(Drop):
        Client(TlsRule.REQUIRED).send(1, b"disk")


def test_h22_too_many_options() -> None:
    client = Client()
    for _ in range(64):
        client.send(3)
    with pytest.raises(Drop):
        client.send(3)


def test_h21_nothing_after_go() -> None:
    client = Client()
    client.send(7, named(b"disk"))
    with pytest.raises(Drop):
        client.send(3)


def test_a_client_without_fixed_newstyle_may_only_name_its_export() -> None:
    with pytest.raises(Drop):
        Client(flags=b"\0\0\0\0").send(3)


@pytest.mark.parametrize("option", [3, 6, 7, 8, 99])
def test_stopping(option: int) -> None:
    client = Client()
    client.haggle.stopping = True
    assert client.error(option, named(b"disk")) == SHUTDOWN
    client = Client()
    client.haggle.stopping = True
    assert client.send(2).then is Then.CLOSE
    with pytest.raises(Drop):
        other = Client()
        other.haggle.stopping = True
        other.send(1, b"disk")


def test_long_texts_are_cut_between_characters() -> None:
    class Chatty(Exports):
        async def list(self) -> Sequence[Listing]:
            return [Listing("disk", "ä" * 4000)]

        async def info(self, name: str) -> Facts:
            raise ReplyError(Reply.ERR_POLICY, "é" * 5000)

    client = Client()
    client.haggle._provider = Chatty()
    assert len(client.replies(3)[0][1]) == 4 + 4 + 4096
    [(_, text)] = client.replies(6, named(b"disk"))
    assert text == "é".encode() * 2048


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(TlsRule)),
    st.lists(
        st.tuples(st.integers(0, 13), st.binary(max_size=40) | st.sampled_from([named(b"disk"), meta(b"", BASE)]))
    ),
)
def test_any_sequence_answers_or_drops(rule: TlsRule, sequence: list[tuple[int, bytes]]) -> None:
    """H24: any order of any options yields whole replies that end in ACK or one error, or a drop."""
    client = Client(rule)
    for option, payload in sequence:
        try:
            answer = client.send(option, payload)
        except Drop:
            return
        if option != 1:
            kinds = [kind for kind, _ in parse(option, answer.data)]
            assert kinds[-1] == ACK or (len(kinds) == 1 and kinds[0] & E)
        assert (answer.enter is not None) == (answer.then is Then.ENTER)
        if answer.then is not Then.CONTINUE:
            return
