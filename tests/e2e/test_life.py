"""The life of a VVol end to end: create, resize, delete, adopt; nobody ever reads another's bytes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.e2e.test_kills import split_farm
from tests.lib.farm import ApiError, Farm, plain_spec, serves
from tests.lib.ledger import Ledger, Writer
from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import short_dir, wait_until

pytestmark = pytest.mark.timeout(180)
MakeFarm = Callable[..., Farm]


def fill(farm: Farm, name: str, seed: int) -> None:
    """Write pattern bytes all over a VVol."""
    with farm.open(name, wait_s=5) as nbd:
        for offset in range(0, nbd.size, 4 * MiB):
            nbd.write(offset, pattern(seed, 0, min(4 * MiB, nbd.size - offset)))
        nbd.flush()


def all_zero(farm: Farm, name: str) -> None:
    """Fail unless a VVol reads as zeros everywhere."""
    with farm.open(name, wait_s=10) as nbd:
        for offset in range(0, nbd.size, 8 * MiB):
            data = nbd.read(offset, min(8 * MiB, nbd.size - offset))
            if any(data):
                at = next(index for index, byte in enumerate(data) if byte)
                raise AssertionError(f"{name} holds another's bytes at {offset + at}: {data[at : at + 32].hex()}")


def test_a_new_vvol_never_shows_old_bytes(farms: MakeFarm) -> None:
    farm = farms(plain_spec("40MiB", {"root": {"size": "4MiB", "profile": "plain"}}))
    farm.start()
    for round_number in range(2):
        farm.create("vm1", "old", size="24MiB", profile="plain")
        fill(farm, "old", round_number)
        with pytest.raises(AssertionError, match="NO_SPACE"):
            farm.create("vm1", "more", size="24MiB", profile="plain")
        farm.delete("vm1/more")
        farm.delete("vm1/old")
        assert not serves(farm.socket(), "old")
        image = (farm.folder / "main.img").read_bytes()
        assert pattern(round_number, 0, 4 * MiB)[:4096] not in image, "freed bytes are zeroed before they are free"
        farm.create("vm1", "new", size="24MiB", profile="plain")
        all_zero(farm, "new")
        farm.delete("vm1/new")


def test_a_datastore_with_foreign_bytes_is_not_taken(farms: MakeFarm) -> None:
    """A file that holds something is formatted by `format: force` only; then its bytes are zeroed before hand-out."""
    folder = short_dir()
    (folder / "main.img").write_bytes(pattern(1, 0, 4 * MiB) * 10)
    spec = plain_spec("40MiB", {"root": {"size": "4MiB", "profile": "plain"}})
    farm = farms(spec, folder)
    farm.begin()
    wait_until("up says why it waits or ends", lambda: says(farm, "main") and "force" in farm.up.text(), 30)
    assert (folder / "main.img").read_bytes()[: 40 * MiB] == pattern(1, 0, 4 * MiB) * 10, "untouched"
    farm.kill_everything()
    spec["datastores"]["main"]["format"] = "force"
    farm.write_file(spec)
    farm.start()
    all_zero(farm, "root")
    farm.create("vm1", "rest", size="24MiB", profile="plain")
    all_zero(farm, "rest")


def says(farm: Farm, word: str) -> bool:
    """Whether `up` printed a word."""
    return farm.up is not None and word in farm.up.text()


@pytest.mark.parametrize("victim", ["filter", "control"])
def test_killed_in_the_middle_of_scrubbing(farms: MakeFarm, victim: str) -> None:
    farm = split_farm(farms)
    rng = random.Random(victim)
    for round_number in range(3):
        farm.create("vm1", "old", size="32MiB", profile="plain")
        fill(farm, "old", round_number)
        answer = farm.api("DELETE", "/v1/vvols/vm1/old")
        time.sleep(rng.uniform(0.0, 0.12))
        process = farm.filters["local"] if victim == "filter" else farm.control
        assert process is not None
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait(10)
        if victim == "filter":
            farm.start_filter()
        else:
            farm.start_control()
        farm.task(answer, timeout_s=60)
        farm.create("vm1", "new", size="32MiB", profile="plain")
        all_zero(farm, "new")
        farm.delete("vm1/new")


def test_delete_with_a_client_attached_drains_first(farms: MakeFarm) -> None:
    farm = farms(plain_spec())
    farm.start()
    farm.create("vm1", "busy", size="16MiB", profile="plain")
    writer = Writer(Ledger(3), farm.open("busy"))
    writer.progress()
    farm.delete("vm1/busy")
    writer.join()
    assert not serves(farm.socket(), "busy")
    farm.create("vm1", "next", size="32MiB", profile="plain")
    all_zero(farm, "next")


def test_live_resize(farms: MakeFarm) -> None:
    farm = farms(plain_spec())
    farm.start()
    ledger = Ledger(4)
    attached = farm.open("root")
    writer = Writer(ledger, attached)
    writer.progress()
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/resize", {"size": "24MiB"}))
    writer.progress(100)
    with farm.open("root") as nbd:
        assert nbd.size == 24 * MiB
        assert not any(nbd.read(16 * MiB, 8 * MiB))
        nbd.write(24 * MiB - 4096, pattern(1, 0, 4096))
        nbd.flush()
    writer.join()
    with farm.open("root") as nbd:
        ledger.verify(nbd)
        assert nbd.read(24 * MiB - 4096, 4096) == pattern(1, 0, 4096)
    with pytest.raises(ApiError) as caught:
        farm.api("POST", "/v1/vvols/vm1/root/resize", {"size": "8MiB"})
    assert caught.value.status in (400, 409)
    assert farm.vvol("vm1/root")["size"] == 24 * MiB
    farm.stop()
    farm.start()  # from the same file, which still says 16 MiB
    with farm.open("root") as nbd:
        assert nbd.size == 24 * MiB
        ledger.verify(nbd)


def test_resize_of_a_directory_file_and_of_a_grown_client(farms: MakeFarm) -> None:
    spec = plain_spec()
    spec["datastores"]["dir"] = {"kind": "dir", "path": "dir"}
    spec["profiles"]["files"] = {"datastore": "dir"}
    spec["vms"]["vm1"]["vvols"]["file"] = {"size": "4MiB", "profile": "files"}
    farm = farms(spec)
    (farm.folder / "dir").mkdir()
    farm.start()
    with farm.open("file") as nbd:
        nbd.write(0, pattern(2, 0, 4 * MiB))
        farm.task(farm.api("POST", "/v1/vvols/vm1/file/resize", {"size": "12MiB"}))
        nbd.size = 12 * MiB
        nbd.write(12 * MiB - 4096, pattern(3, 0, 4096))  # a client that learned of it need not reconnect
        assert nbd.read(12 * MiB - 4096, 4096) == pattern(3, 0, 4096)
        assert difference(pattern(2, 0, 4 * MiB), nbd.read(0, 4 * MiB)) == ""
        assert not any(nbd.read(4 * MiB, 8 * MiB - 4096))
    farm.delete("vm1/file")
    wait_until("its file is gone", lambda: not list((farm.folder / "dir").iterdir()), 5)
