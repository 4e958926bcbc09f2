"""The farm that the wire tests share: one VVol of every sort.

vm1: root (64 MiB), bystander (used by the `unharmed` fixture alone), hard (O_DIRECT, block size > 1), indir (a file
in a directory), cached (likewise; half of it fits into the host's cache), ro (adopted, read-only), odd (adopted, a
size that is no multiple of 512), huge (adopted, sparse, 6 GiB). vm2: root, private. vm3: only.
The TCP listener takes plaintext and TLS.
"""

from __future__ import annotations

from pathlib import Path

from tests.lib.farm import Farm, free_port
from tests.lib.nbdwords import MiB
from tests.lib.pattern import pattern
from tests.lib.procs import short_dir

ROOT_SIZE = 64 * MiB
HARD_SIZE = 16 * MiB
INDIR_SIZE = 16 * MiB
RO_SIZE = 4 * MiB
ODD_SIZE = 3 * MiB + 1234
RO_SEED = 77
ODD_SEED = 78
HUGE_SIZE = 6 << 30
VM1_EXPORTS = {"root", "bystander", "hard", "indir", "ro", "odd", "huge", "cached"}


class SharedFarm(Farm):
    """See the module."""

    def __init__(self, pki: Path) -> None:
        folder = short_dir()
        self.tcp = ("127.0.0.1", free_port())
        (folder / "dir").mkdir()
        (folder / "ro.img").write_bytes(pattern(RO_SEED, 0, RO_SIZE))
        (folder / "odd.img").write_bytes(pattern(ODD_SEED, 0, ODD_SIZE))
        with (folder / "huge.img").open("wb") as file:
            file.truncate(HUGE_SIZE)
        super().__init__(
            {
                "hosts": {
                    "local": {
                        "reactors": 2,
                        "cache": "8MiB",
                        "listen": {"address": f"{self.tcp[0]}:{self.tcp[1]}", "tls": "optional"},
                    }
                },
                "tls": {"certs": str(pki), "psk": str(pki / "psk.keys")},
                "datastores": {
                    "main": {"kind": "file", "path": "main.img", "size": "160MiB"},
                    "hard": {"kind": "file", "path": "hard.img", "size": "32MiB", "io": "direct"},
                    "dir": {"kind": "dir", "path": "dir"},
                    "ro": {"kind": "file", "path": "ro.img"},
                    "odd": {"kind": "file", "path": "odd.img"},
                    "huge": {"kind": "file", "path": "huge.img"},
                },
                "profiles": {
                    "plain": {"datastore": "main"},
                    "direct": {"datastore": "hard"},
                    "files": {"datastore": "dir"},
                    "cached": {"datastore": "dir", "cache": {"mode": "writethrough", "ram": "2MiB"}},
                },
                "vms": {
                    "vm1": {
                        "vvols": {
                            "root": {"size": ROOT_SIZE, "profile": "plain", "description": "the first disk of vm1"},
                            "bystander": {"size": "2MiB", "profile": "plain"},
                            "hard": {"size": HARD_SIZE, "profile": "direct"},
                            "indir": {"size": INDIR_SIZE, "profile": "files"},
                            "ro": {"adopt": {"datastore": "ro"}, "profile": "plain", "read_only": True},
                            "odd": {"adopt": {"datastore": "odd"}, "profile": "plain"},
                            "huge": {"adopt": {"datastore": "huge"}, "profile": "plain"},
                            "cached": {"size": INDIR_SIZE, "profile": "cached"},
                        }
                    },
                    "vm2": {
                        "vvols": {
                            "root": {"size": "8MiB", "profile": "plain"},
                            "private": {"size": "4MiB", "profile": "plain"},
                        }
                    },
                    "vm3": {"vvols": {"only": {"size": "2MiB", "profile": "plain"}}},
                },
            },
            folder,
        )

    def __enter__(self) -> SharedFarm:
        return self
