"""The suites: YAML files beside their fio job files, read into points."""

from __future__ import annotations

import configparser
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perf.model import Backend, Generator, Transport

FOLDER = Path(__file__).with_name("suites")
RESYNC = "resync"
SPIN_US = 50
"""Server and load generator spin that long before they sleep, in points that measure rate and not latency."""


_NOT_ITS = {"resyncing", "warmup", "only", "group"}
"""Of a point, what the load generator is not told."""


class SuiteError(Exception):
    """A suite file that cannot be used, with the reason."""


class Load(BaseModel):
    """One point of the load generator: its command line without the leading dashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mix: str
    block: str
    depth: int = Field(ge=1, le=1024)
    connections: int = Field(default=1, ge=1, le=4096)
    threads: int = Field(default=1, ge=1, le=64)
    sequential: bool = False
    structured: bool = False
    fua: bool = False
    verify: bool = False
    lockstep: bool = False
    batch: int | None = None
    spin_us: int = SPIN_US
    warmup: float | None = Field(default=None, ge=0)
    """Seconds of it before what is measured, where that has to be longer than a moment."""
    only: tuple[str, ...] = ()
    """Only these of the suite's servers take part."""
    group: int | None = Field(default=None, ge=1, le=160)
    """What fio's storage ceiling does instead: a log's records of so many blocks and a head each, in sequence."""
    resyncing: bool = False
    """A mirror copies a whole leg meanwhile; servers that are none, or cannot be told to, do not take part."""

    def arguments(self) -> list[str]:
        """For perf/native/loadgen."""
        out: list[str] = []
        for name, value in self.model_dump(exclude_none=True, exclude=_NOT_ITS).items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                out.append(flag)
            elif value is not False:
                out += [flag, str(value)]
        return out

    @property
    def block_bytes(self) -> int:
        """The block size in bytes."""
        return bytes_of(self.block)


class Suite(BaseModel):
    """One suite file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: Generator
    backend: Backend
    transport: Transport
    points: dict[str, Load] = {}
    jobs: str | None = None
    peers: tuple[str, ...] = ()
    """Only these take part; all that serve the backend and the transport without it."""
    rounds_max: int = Field(default=99, ge=1)
    """Points that carry no bar need fewer rounds."""
    spin_us: int = SPIN_US
    """How long the servers that can spin do so before they sleep."""
    storage: bool = False
    """fio's io_uring engine takes part, on the file itself: what the storage can do without a server."""
    size: str | None = None
    """Bytes of each server's file, where the suite needs a certain size."""
    resync: bool = False
    """One more point, `resync`: a mirror copies a whole leg, with no client; fio does the same on its files."""
    shared_file: bool = False
    """All servers on one file: for loads that only read it, by servers that do not lock it."""
    own: bool = False
    """It is run by its name alone, and is no part of a complete run."""
    name: str = ""

    @property
    def job_file(self) -> Path:
        """The fio job file of a fio suite."""
        if self.jobs is None:
            raise SuiteError(f"suite {self.name}: generator fio needs `jobs:`, a file in {FOLDER}")
        return FOLDER / self.jobs

    def point_names(self) -> list[str]:
        """In file order."""
        own = list(self.points) if self.generator == "loadgen" else sections(self.job_file)
        return [*own, *([RESYNC] if self.resync else [])]

    def spec(self, point: str) -> dict[str, str]:
        """What the result file says about a point."""
        if self.resync and point == RESYNC:
            return {"one request": "a whole leg, read and written to the other"}
        if self.generator == "loadgen":
            return {k: str(v) for k, v in self.points[point].model_dump(exclude_defaults=True).items()}
        return {**_jobs(self.job_file)[point]}


def bytes_of(text: str) -> int:
    """`4k`, `256k`, `1m`, `2g` or plain bytes; binary multiples. Raises SuiteError."""
    shift = {"k": 10, "m": 20, "g": 30}.get(text[-1:].lower(), 0)
    digits = text[:-1] if shift else text
    if not digits.isdecimal():
        raise SuiteError(f"not a size: {text!r}; write digits and k, m or g")
    return int(digits) << shift


def _jobs(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, allow_no_value=True, comment_prefixes=("#", ";"))
    parser.read_string(path.read_text(), str(path))
    return parser


def sections(path: Path) -> list[str]:
    """The jobs of a fio job file, `global` left out."""
    return [section for section in _jobs(path).sections() if section != "global"]


def names() -> list[str]:
    """Every suite there is."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def complete() -> list[str]:
    """Every suite of a complete run."""
    return [name for name in names() if not load(name).own]


def load(name: str) -> Suite:
    """Read one suite. Raises SuiteError, which names the suites there are."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise SuiteError(f"no suite {name!r}; there are: {', '.join(names())}")
    try:
        return Suite.model_validate({**yaml.safe_load(path.read_text()), "name": name})
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise SuiteError(f"{path}: {error}") from error
