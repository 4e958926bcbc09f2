"""What a guest is booted from: the newest Debian cloud kernel, its modules, and the programs the harness calls.

Nothing here skips: a machine that lacks something gets an error that names the package to install.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "modprobe": "kmod",
}
VIRTIOFSD = (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))
GUEST_MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtiofs", "overlay")


class MissingPackageError(RuntimeError):
    """A program or file of a Debian package is absent."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} is missing: apt-get install {package}")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that guests boot: its release, its image and its module directory."""

    release: str
    image: Path
    modules: Path


def program(name: str) -> str:
    """Return the path of a program of `PACKAGES`; raises MissingPackageError."""
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise MissingPackageError(name, PACKAGES[name])
    return path


def virtiofsd() -> Path:
    """Return the daemon that shares the host's tree; raises MissingPackageError."""
    for path in VIRTIOFSD:
        if path.exists():
            return path
    raise MissingPackageError("virtiofsd", "qemu-system-common")


def find_kernel() -> Kernel:
    """Return the newest installed cloud kernel whose modules are there too; raises MissingPackageError."""
    found = [
        Kernel(image.name.removeprefix("vmlinuz-"), image, modules)
        for image in Path("/boot").glob("vmlinuz-*-cloud-amd64")
        if (modules := Path("/lib/modules") / image.name.removeprefix("vmlinuz-")).joinpath("modules.dep").exists()
    ]
    if not found:
        raise MissingPackageError("/boot/vmlinuz-*-cloud-amd64", "linux-image-cloud-amd64")
    return max(found, key=lambda kernel: [int(part) for part in kernel.release.replace("-", ".").split(".")[:4]])


def module_files(kernel: Kernel, names: tuple[str, ...] = GUEST_MODULES) -> list[Path]:
    """Return the module files that `names` need, each after those it depends on, built-in ones left out."""
    files: dict[Path, None] = {}
    for name in names:
        listing = subprocess.run(
            [program("modprobe"), "-S", kernel.release, "--show-depends", name],
            check=True, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        for line in listing.stdout.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "insmod":
                files.setdefault(Path(rest.split()[0]))
    return list(files)
