"""A guest's file system under load: files written and made durable one after another, each with its checksum kept."""

from __future__ import annotations

import time

from tests.vm.guest import Guest

FILE_BYTES = 192 << 10


class Writer:
    """Writes files to a mounted directory of the guest, in its background, until `stop`.

    The checksum of a file is taken from its source and noted (outside the disk) only after fsync of the file
    returned: from then on it must never be lost."""

    def __init__(self, guest: Guest, folder: str) -> None:
        self.guest = guest
        self.folder = folder
        self.notes = f"/run/{folder.strip('/').replace('/', '-')}.sums"
        self._log = self.notes.replace(".sums", ".log")
        script = (
            f"i=0; while [ ! -e {self.notes}.stop ]; do i=$((i+1)); "
            f"head -c {FILE_BYTES} /dev/urandom >{self.notes}.source || exit 1; "
            f"dd if={self.notes}.source of={folder}/file$i bs=64k conv=fsync 2>&1 || exit 1; "
            f'sum=$(sha256sum <{self.notes}.source); echo "${{sum%% *}}  {folder}/file$i" >>{self.notes}; '
            "done; echo ended well"
        )
        guest.check(f": >{self.notes}")
        self._pid = guest.background(script, self._log)

    def count(self) -> int:
        """How many files are durable."""
        return int(self.guest.check(f"wc -l <{self.notes}"))

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until so many files are durable; fails at once when the writer has failed."""
        deadline = time.monotonic() + timeout_s
        while self.count() < count:
            assert self.guest.run(f"kill -0 {self._pid}").status == 0, self.guest.check(f"cat {self._log}")
            assert time.monotonic() < deadline, f"{count} files took longer than {timeout_s} s"
            time.sleep(0.2)

    def stop(self) -> None:
        """End it after the file at hand; fails if any write or fsync failed."""
        self.guest.check(f"touch {self.notes}.stop")
        self.guest.wait(f"! kill -0 {self._pid}", 60)
        assert self.guest.check(f"tail -n1 {self._log}").strip() == "ended well", self.guest.check(f"cat {self._log}")

    def verify(self) -> int:
        """Compare every noted file with its checksum, from the device if it was just mounted; return how many."""
        self.guest.check(f"sha256sum --quiet -c {self.notes}", 60)
        return self.count()


def make_file_system(guest: Guest, device: str, folder: str) -> None:
    """Make ext4 on a device and mount it."""
    guest.check(f"mkfs.ext4 -q {device}; mkdir -p {folder}; mount {device} {folder}", 60)


def remount(guest: Guest, device: str, folder: str) -> None:
    """Unmount, check the file system without repairing anything, drop every cached byte, mount again."""
    guest.check(f"umount {folder}; e2fsck -fn {device}", 60)
    guest.check(f"blockdev --flushbufs {device}; echo 3 >/proc/sys/vm/drop_caches; mount {device} {folder}")


def assert_no_io_errors(guest: Guest) -> None:
    """The guest's kernel saw no failed I/O and no damaged file system."""
    log = guest.check("dmesg")
    bad = [line for line in log.splitlines() if "I/O error" in line or "EXT4-fs error" in line]
    assert not bad, "\n".join(bad)
