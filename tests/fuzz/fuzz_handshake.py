"""Coverage-guided fuzzing of the handshake (nbdvvol/nbd/) with atheris (libFuzzer for Python).

The input is what a client sends: one byte of settings, 4 flag bytes, then options as on the wire. Whatever comes, the
core must answer each option with well-formed replies that end in exactly one ACK or error, or drop the connection;
no other exception may come out, and nothing may grow beyond what the protocol allows.

Usage: fuzz_handshake.py [libFuzzer options] [corpus folders]; a finding is written to the current folder. With
NBDVVOL_FUZZ_CANARY=1 a bug is planted, which must be found: it proves that a finding is reported.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# An editable install brings a loader of its own, which atheris cannot instrument through: import from the tree.
sys.meta_path[:] = [finder for finder in sys.meta_path if "_editable_" not in type(finder).__module__]
with atheris.instrument_imports(include=["nbdvvol.nbd"]):
    from nbdvvol.nbd import haggle as h
    from nbdvvol.nbd import options, provider

FLAGS = 0b0000_1101_1110_1101
CANARY = os.environ.get("NBDVVOL_FUZZ_CANARY") == "1"
REPLY = struct.Struct(">QIII")
REPLY_MAGIC = 0x0003E889045565A9
ACK, SERVER, INFO, META, ERROR = 1, 2, 3, 4, 1 << 31
ERRORS = range(ERROR + 1, ERROR + 11)
EXPORT_NAME, ABORT, LIST, STARTTLS, LIST_META, SET_META = 1, 2, 3, 5, 9, 10
INFORMS = {LIST: SERVER, 6: INFO, 7: INFO, LIST_META: META, SET_META: META}
ANSWER_BYTES_MAX = 1 << 20


class Exports(provider.Provider):
    """A few exports, one refused."""

    def _facts(self, name: str) -> provider.Facts:
        if CANARY and name.startswith("d") and name != "disk":
            raise RuntimeError("the planted bug")
        if name == "refused":
            raise provider.ReplyError(h.Reply.ERR_POLICY, "not for you")
        if name not in ("", "disk", "vm/disk", "n" * 300):
            raise provider.ReplyError(h.Reply.ERR_UNKNOWN, f"no export {name!r}")
        return provider.Facts(name or "disk", 1 << 30, FLAGS, "a disk", 512, 4096, 1 << 25)

    async def list(self) -> Sequence[provider.Listing]:
        return [provider.Listing("disk", "a disk"), provider.Listing("vm/disk")]

    async def info(self, name: str) -> provider.Facts:
        return self._facts(name)

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        return provider.match_contexts(queries, self._facts(name).contexts)

    async def open(self, name: str) -> provider.Opened:
        return provider.Opened(self._facts(name), 7)


def run(coroutine: object) -> h.Answer:
    """Step a coroutine that never waits."""
    try:
        coroutine.send(None)  # type: ignore[attr-defined]
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("the core waited for something")


@atheris.instrument_func
def replies(data: bytes, option: int) -> list[int]:
    """Take an answer apart; the reply types in it."""
    kinds, at = [], 0
    while at < len(data):
        magic, answered, kind, length = REPLY.unpack_from(data, at)
        body = data[at + REPLY.size : at + REPLY.size + length]
        assert magic == REPLY_MAGIC and answered == option and len(body) == length
        if kind in ERRORS:
            assert len(body.decode("utf-8").encode()) <= 4096
        elif kind == META:
            assert 4 < length <= 4 + 4096
        else:
            assert kind in (ACK, SERVER, INFO) and (kind != ACK or length == 0)
        kinds.append(kind)
        at += REPLY.size + length
    return kinds


@atheris.instrument_func
def judge(option: int, payload: bytes, answer: h.Answer) -> None:
    """What must hold for any answer."""
    assert len(answer.data) <= ANSWER_BYTES_MAX
    if option == EXPORT_NAME:
        assert answer.then is h.Then.ENTER and len(answer.data) in (10, 134)
        return
    kinds = replies(answer.data, option)
    assert kinds and (kinds[-1] == ACK or kinds[-1] in ERRORS), "the last reply ends the option"
    assert all(kind == INFORMS.get(option) for kind in kinds[:-1]), "before it come only this option's own"
    assert (answer.enter is not None) == (answer.then is h.Then.ENTER)
    if option == ABORT:
        assert kinds == [ACK] and answer.then is h.Then.CLOSE
    if option in (LIST, STARTTLS) and payload:
        assert kinds[-1] in ERRORS, "data with an option that takes none"
    if answer.then is not h.Then.CONTINUE:
        assert kinds[-1] == ACK
    if answer.enter is not None:
        ids = [context.id for context in answer.enter.params.contexts]
        assert len(set(ids)) == len(ids)


@atheris.instrument_func
def one_client(data: bytes) -> None:
    """A whole handshake."""
    if len(data) < 5:
        return
    rules = (h.TlsRule.OFF, h.TlsRule.OFFERED, h.TlsRule.REQUIRED)
    machine = h.Haggle(Exports(), rules[data[0] % 3])
    assert len(machine.hello()) == 18
    machine.client_flags(data[1:5])
    at = 5
    while len(data) - at >= 16:
        option, length = h.parse_header(data[at : at + 16])
        payload = data[at + 16 : at + 16 + length]
        if len(payload) < length:
            return
        at += 16 + length
        answer = run(machine.option(option, payload))
        judge(option, payload, answer)
        if answer.then is h.Then.START_TLS:
            machine.started_tls(Exports())
        elif answer.then is not h.Then.CONTINUE:
            return


@atheris.instrument_func
def repaired(data: bytes) -> bytes:
    """Half of the inputs get right magic numbers and lengths, so that the search is about what they frame."""
    if len(data) < 6 or data[0] & 0x80:
        return data
    out, at = bytearray(data[:1] + b"\0\0\0" + bytes([data[4] & 3])), 5
    while at + 2 <= len(data):
        option, length = data[at], data[at + 1]
        payload = data[at + 2 : at + 2 + length]
        out += options.option_request(option % 13, payload)
        at += 2 + length
    return bytes(out)


def test_one_input(data: bytes) -> None:
    """libFuzzer's entry."""
    try:
        one_client(repaired(data))
    except h.Drop:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
