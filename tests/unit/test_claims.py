"""Claims of legs: their words, who is let in and who is ended, and that the highest one outlives the process."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvvol.dataplane.types import ConnectionEnd
from nbdvvol.filter.claims import EPOCHS_FILE, ClaimBook, ExportGate
from nbdvvol.model.errors import NvError
from nbdvvol.nbd.claims import CLAIMS_MAX, EPOCH_CONTEXT, Claim, parse_claim, sort_out
from nbdvvol.nbd.client import Outclaimed, Wants
from nbdvvol.nbd.haggle import Drop, Haggle, Then
from nbdvvol.nbd.provider import Claims, Facts, Opened, ReplyError
from tests.unit.filter_words import uuid_of
from tests.unit.test_nbd_client import HELLO, granted, reply, talk
from tests.unit.test_nbd_haggle import FLAGS, INVALID, META, POLICY, SIZE, Client, Exports, meta, named, parse

MIRROR, OURS = uuid_of(7), uuid_of(1)
READ_ONLY, TRIM = 2, 32


def claim(epoch: int, leg: int = 2, attempt: int = 0) -> Claim:
    return Claim(MIRROR, leg, epoch, attempt)


# ---- words ----


@given(st.integers(1, (1 << 32) - 1), st.integers(1, (1 << 63) - 1), st.integers(0, 10**9 - 1))
def test_a_claim_is_read_as_it_is_written(leg: int, epoch: int, attempt: int) -> None:
    one = Claim(MIRROR, leg, epoch, attempt)
    assert parse_claim(str(one)) == one


@pytest.mark.parametrize(
    "text",
    [
        f"{MIRROR}:2",
        f"{MIRROR}:0:1",
        f"{MIRROR}:2:0",
        f"{MIRROR}:2:01",
        f"{MIRROR}:2:1:0",
        f"{MIRROR}:2:1:1:1",
        f"{MIRROR}:{1 << 32}:1",
        f"{MIRROR}:2:{1 << 63}",
        f"{MIRROR[:-1]}G:2:1",
        f"{MIRROR}:2:-1",
        f"{MIRROR}:2:1 ",
        "",
    ],
)
def test_what_is_no_claim_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a claim is"):
        parse_claim(f"{EPOCH_CONTEXT}:{text}")


def test_queries_are_sorted_out() -> None:
    asked = sort_out(["base:allocation", str(claim(3)), EPOCH_CONTEXT, str(claim(3)), "x-nbdvvol:epochs"])
    assert (asked.aware, asked.claims, asked.rest) == (True, (claim(3),), ("base:allocation", "x-nbdvvol:epochs"))
    assert not sort_out(["base:allocation"]).aware
    with pytest.raises(ValueError, match="claimed twice"):
        sort_out([str(claim(3)), str(claim(4))])
    with pytest.raises(ValueError, match="the limit"):
        sort_out([str(claim(3, leg)) for leg in range(1, CLAIMS_MAX + 2)])


# ---- the book and the gate ----


class Visits:
    """Connections of one export."""

    def __init__(self, gate: ExportGate) -> None:
        self.gate = gate
        self.hung_up: list[str] = []
        self.ends: dict[str, asyncio.Future[ConnectionEnd]] = {}

    def enter(self, name: str, claims: Claims, *, read_only: bool = False) -> None:
        self.gate.admit(claims, read_only=read_only)
        end = self.ends[name] = asyncio.get_running_loop().create_future()
        self.gate.entered(claims, end, lambda: self.hung_up.append(name), read_only=read_only)

    def drained(self, name: str) -> None:
        self.ends[name].set_result(ConnectionEnd(0))


@pytest.fixture
async def visits(tmp_path: Path) -> Visits:
    return Visits(ExportGate(OURS, ClaimBook(tmp_path)))


async def test_a_higher_claim_is_answered_once_lower_ones_have_drained(visits: Visits, tmp_path: Path) -> None:
    await visits.gate.claim((claim(1),))
    for name in ("one", "two"):
        visits.enter(name, (claim(1),))
    visits.enter("other leg", (claim(1, leg=3),))
    taking = asyncio.create_task(visits.gate.claim((claim(2),)))
    await asyncio.sleep(0.1)
    assert sorted(visits.hung_up) == ["one", "two"] and not taking.done()
    with pytest.raises(ReplyError, match="under epoch 2"):  # at once, not only when it was answered
        visits.enter("late", (claim(1),))
    visits.drained("one")
    await asyncio.sleep(0.05)
    assert not taking.done()
    visits.drained("two")
    await asyncio.wait_for(taking, 1)
    written = json.loads((tmp_path / EPOCHS_FILE).read_text())
    assert written["exports"] == {OURS: {claim(1).key: [2, 0]}}
    visits.enter("new", (claim(2),))
    visits.enter("new too", (claim(2),))
    assert sorted(visits.hung_up) == ["one", "two"]


async def test_another_attempt_of_an_epoch_ends_the_one_before(visits: Visits) -> None:
    await visits.gate.claim((claim(4, attempt=1),))
    visits.enter("first", (claim(4, attempt=1),))
    taking = asyncio.create_task(visits.gate.claim((claim(4, attempt=2),)))
    await asyncio.sleep(0.05)
    assert visits.hung_up == ["first"]
    visits.drained("first")
    await taking
    with pytest.raises(ReplyError, match="epoch 4 \\(attempt 2\\) now, not 4 \\(attempt 1\\)"):
        visits.enter("first again", (claim(4, attempt=1),))


async def test_the_highest_claim_outlives_the_process(visits: Visits, tmp_path: Path) -> None:
    await visits.gate.claim((claim(5), claim(9, leg=3)))
    later = ExportGate(OURS, ClaimBook(tmp_path))
    assert later.claimed and not ExportGate(uuid_of(2), ClaimBook(tmp_path)).claimed
    with pytest.raises(ReplyError, match="under epoch 5"):
        await later.claim((claim(4),))
    await later.claim((claim(5),))


async def test_who_knows_nothing_of_claims_may_read_what_was_claimed(visits: Visits) -> None:
    visits.enter("writer", None)
    visits.enter("reader", None, read_only=True)
    taking = asyncio.create_task(visits.gate.claim((claim(1),)))
    await asyncio.sleep(0.05)
    assert visits.hung_up == ["writer"]
    visits.drained("writer")
    await taking
    visits.enter("reader too", None, read_only=True)
    visits.enter("aware", ())
    with pytest.raises(ReplyError, match="may only be read"):
        visits.enter("writer again", None)


async def test_a_claim_that_cannot_be_written_down_is_refused(visits: Visits, tmp_path: Path) -> None:
    (tmp_path / "epochs.new").mkdir()
    with pytest.raises(ReplyError, match="cannot be made durable"):
        await visits.gate.claim((claim(6),))
    (tmp_path / "epochs.new").rmdir()
    await visits.gate.claim((claim(6),))
    assert json.loads((tmp_path / EPOCHS_FILE).read_text())["exports"][OURS] == {claim(6).key: [6, 0]}


def test_a_damaged_book_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / EPOCHS_FILE).write_text('{"exports": {"x": 1}}')
    with pytest.raises(NvError, match="which epochs were claimed"):
        ClaimBook(tmp_path)


# ---- the server's haggling ----


class Gated(Exports):
    """Exports of which "disk" has a gate."""

    def __init__(self, gate: ExportGate) -> None:
        super().__init__()
        self.gate = gate

    def _facts(self, name: str) -> Facts:
        facts = super()._facts(name)
        return Facts(facts.name, SIZE, FLAGS, "a disk", 512, 4096, 1 << 25, claimed=self.gate.claimed)

    async def open(self, name: str) -> Opened:
        return Opened(self._facts(name), 7, self.gate)


class Talk(Client):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.haggle = Haggle(Gated(ExportGate(OURS, ClaimBook(folder))))
        self.haggle.client_flags(b"\0\0\0\3")
        self.send(8)

    def set(self, *queries: str) -> list[str]:
        replies = self.replies(10, meta(b"disk", *(query.encode() for query in queries)))
        return [body[4:].decode() for kind, body in replies if kind == META]

    def flags(self) -> int:
        answer = self.send(7, named(b"disk"))
        assert answer.then is Then.ENTER
        return int(struct.unpack(">HQH", parse(7, answer.data)[0][1])[2])


def test_a_claim_is_a_meta_context(tmp_path: Path) -> None:
    talker = Talk(tmp_path)
    assert talker.set("base:allocation", EPOCH_CONTEXT, str(claim(3))) == [
        "base:allocation",
        EPOCH_CONTEXT,
        str(claim(3)),
    ]
    answer = talker.send(7, named(b"disk"))
    assert answer.enter is not None and answer.enter.claims == (claim(3),)
    assert [one.name for one in answer.enter.params.contexts] == ["base:allocation"]
    assert not answer.enter.params.read_only
    assert Talk(tmp_path).error(10, meta(b"disk", str(claim(2)).encode())) == POLICY
    assert Talk(tmp_path).error(10, meta(b"disk", f"{EPOCH_CONTEXT}:2".encode())) == INVALID
    assert Talk(tmp_path).flags() & READ_ONLY and not Talk(tmp_path).flags() & TRIM
    aware = Talk(tmp_path)
    assert aware.set(EPOCH_CONTEXT) == [EPOCH_CONTEXT] and not aware.flags() & READ_ONLY


def test_claims_are_forgotten_with_the_contexts(tmp_path: Path) -> None:
    talker = Talk(tmp_path)
    talker.set(str(claim(3)))
    talker.set("base:allocation")
    assert talker.flags() & READ_ONLY


async def test_a_claim_that_is_outdated_at_go_does_not_enter(tmp_path: Path) -> None:
    book = ClaimBook(tmp_path)
    haggle = Haggle(Gated(ExportGate(OURS, book)))
    haggle.client_flags(b"\0\0\0\3")
    await haggle.option(8, b"")
    await haggle.option(10, meta(b"disk", str(claim(3)).encode()))
    await ExportGate(OURS, book).claim((claim(4),))
    answer = await haggle.option(7, named(b"disk"))
    assert [kind for kind, _ in parse(7, answer.data)] == [POLICY]
    with pytest.raises(Drop, match="under epoch 4"):
        await haggle.option(1, b"disk")


# ---- the client's haggling ----


def context(number: int, name: str) -> bytes:
    return reply(10, 4, struct.pack(">I", number) + name.encode())


def test_the_client_claims_and_learns_whether_that_counts() -> None:
    wants = Wants(structured=True, claim=claim(3))
    told = context(1, "base:allocation") + context(2, EPOCH_CONTEXT)
    agreed = HELLO + reply(11, 1)
    sent, info, _ = talk(agreed + told + context(3, str(claim(3))) + reply(10, 1) + granted(7), wants=wants)
    assert info.fences and info.allocation == 1 and str(claim(3)).encode() in sent
    _, info, _ = talk(agreed + context(1, "base:allocation") + reply(10, 1) + granted(7), wants=wants)
    assert not info.fences and info.allocation == 1
    with pytest.raises(Outclaimed, match="epoch 9 now"):
        talk(agreed + reply(10, POLICY, b"epoch 9 now"), wants=wants)
    minds = reply(10, INVALID, b"what?") + context(5, "base:allocation") + reply(10, 1)
    _, info, _ = talk(agreed + minds + granted(7), wants=wants)
    assert not info.fences and info.allocation == 5
