"""A lease that runs out while a mirror's write-back log holds data, on the real plane: nothing that was acknowledged is
lost, and nothing is carried or answered without the lease."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import nbdvvol.filter.exports as exports_module
from nbdvvol.model.farm import CacheLog
from nbdvvol.model.log import LogRecord, LogSpec
from tests.unit.filter_words import MIB
from tests.unit.mirror_rig import UUID_OF, MirrorRig
from tests.unit.plane_rig import eventually

BLOCK = 4096


def log_questions(rig: MirrorRig) -> list[object]:
    """What the log has asked and nobody has answered."""
    return [one for one in rig.registry.asked if not isinstance(one, str)]


def answer(rig: MirrorRig) -> None:
    """Control hears the log's question, and writes it down."""
    eventually("the log asks", lambda: log_questions(rig))
    [(change, answered)] = log_questions(rig)  # type: ignore[misc]
    assert change.wanted == "dirty"
    rig.registry.asked = [one for one in rig.registry.asked if isinstance(one, str)]
    rig.call(answered, LogRecord(id=change.id, vvol=change.vvol))


@pytest.mark.parametrize("told", [True, False])
def test_a_lease_that_runs_out_keeps_what_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """`told`: control has said since that this log holds data; else only the filter's own memory has it."""
    monkeypatch.setattr(exports_module, "RETRY_MIN_S", 0.05)
    monkeypatch.setattr(exports_module, "SETTLE_S", 0.1)
    rig = MirrorRig(tmp_path, lease_s=1.0)
    rig.registry.leases[UUID_OF] = 30.0
    log = LogSpec(folder=str(tmp_path / "logs"), log=CacheLog(size=MIB, age=3600))
    rig.serve(log=log)
    answer(rig)
    client, data = rig.client(), os.urandom(BLOCK)
    client.write(BLOCK, data)
    client.flush()
    if told:
        [file] = (tmp_path / "logs").iterdir()
        held = rig.registry.logs[-1]
        assert (held.state, held.file) == ("serving", str(file))
        identity = file.read_bytes()[4096 + 32 : 4096 + 48].hex()
        rig.want(rig.spec(log=log.model_copy(update={"held": identity, "file": str(file)})))
    del rig.registry.leases[UUID_OF]
    rig.call(rig.table._leases._leases[UUID_OF].ended)
    eventually("it stops", lambda: rig._volume() is None)
    client.ended()
    assert all(rig.bytes_of(leg)[BLOCK : 2 * BLOCK] == bytes(BLOCK) for leg in (1, 2)), "nothing is carried without it"
    rig.registry.leases[UUID_OF] = 30.0
    eventually("it serves again", lambda: rig._volume() is not None, 20)
    assert rig.client().read(BLOCK, BLOCK) == data, "what was acknowledged is there"
    rig.close()
