"""Farm files: YAML to `model.farm.Farm`, with every error at once, each with file:line:column.

The reading is YAML 1.2's core schema (`no`, `on` and `12:30` are text, `0o10` is eight); duplicate keys,
tags of other schemas, cycles and files that unfold beyond a bound are errors. Relative paths are taken
from the farm file's directory. Writes nothing; looks at the file system only to see whether two
datastores are one place.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from nbdvvol.model.check import check_farm, place_of
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import ControlConfig, DatastoreConfig, DatastoreKind, Farm
from nbdvvol.model.uri import parse_uri

FILE_BYTES_MAX = 4 << 20
NODES_MAX = 200_000
DEPTH_MAX = 32
FINDINGS_SHOWN_MAX = 50

Loc = tuple[str, ...]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One error of a farm file; `line` and `column` count from 1."""

    line: int
    column: int
    message: str


class FarmFileError(NvError):
    """A farm file that cannot be used; `problems` holds each error with its position."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self.file = file
        self.problems = sorted(set(problems))
        shown = [f"{file}:{one.line}:{one.column}: {one.message}" for one in self.problems[:FINDINGS_SHOWN_MAX]]
        if len(self.problems) > FINDINGS_SHOWN_MAX:
            shown.append(f"... and {len(self.problems) - FINDINGS_SHOWN_MAX} more")
        super().__init__(Code.CONFIG, "\n".join(shown), "see docs/farm-file.md")


def load(path: str | Path) -> Farm:
    """Read a farm file. Raises NvError when it cannot be read, FarmFileError when it is wrong."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        hint = "name an existing farm file; configs/ holds some to start from"
        raise NvError(Code.CONFIG, f"cannot read the farm file {path}: {error.strerror}", hint) from None
    if len(raw) > FILE_BYTES_MAX:
        raise NvError(Code.CONFIG, f"the farm file {path} is larger than {FILE_BYTES_MAX} bytes")
    return parse(raw, file=str(path), base=path.absolute().parent)


def parse(raw: bytes, *, file: str, base: Path) -> Farm:
    """A farm from YAML bytes; `file` names it in errors, relative paths start at `base`. Raises FarmFileError."""
    tree = _Tree(file)
    data = tree.read(raw)
    farm, problems = _validate(data, tree)
    if farm is not None:
        _resolve_paths(farm, base, tree)
        problems += _same_place(farm, tree)
    if problems or farm is None:
        raise FarmFileError(file, problems)
    return farm


def schema() -> dict[str, Any]:
    """The farm file's JSON Schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Farm.model_json_schema(by_alias=True)}


# ---- YAML to plain values, remembering where each stood ----

_CORE = {
    "tag:yaml.org,2002:null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "tag:yaml.org,2002:bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_STR, _SEQ, _MAP = "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"


class _Loader(yaml.CSafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema, not by 1.1's."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(_tag, _pattern, None)


class _Tree:
    """One file's YAML tree as plain values, with a position for every key and value."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.keys: dict[Loc, tuple[int, int]] = {}
        self.values: dict[Loc, tuple[int, int]] = {(): (1, 1)}
        self.mappings: set[Loc] = set()
        self.problems: list[Problem] = []
        self._nodes = 0

    def read(self, raw: bytes) -> dict[str, Any]:
        """The file's top mapping. Raises FarmFileError when it is not sound YAML or not a mapping."""
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
            raise FarmFileError(self.file, [Problem(line, column, "not UTF-8 text")]) from None
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            raise FarmFileError(self.file, [_syntax_problem(error, text)]) from None
        except yaml.YAMLError as error:
            # A character that YAML forbids; the reader knows its offset only.
            at = int(getattr(error, "position", 0) or 0)
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            raise FarmFileError(self.file, [Problem(line, column, "a character that YAML does not allow")]) from None
        value = {} if node is None else self._value(node, (), frozenset())
        if self.problems:
            raise FarmFileError(self.file, self.problems)
        if not isinstance(value, dict):
            raise FarmFileError(self.file, [Problem(1, 1, "a farm file is a mapping of sections, such as `vms:`")])
        return value

    def position(self, loc: Loc, *, key: bool = False) -> tuple[int, int]:
        """Line and column of what is at `loc` (its key for a mapping), or of the nearest thing around it."""
        if loc in self.keys and (key or loc in self.mappings):
            return self.keys[loc]
        return self.values[self.known(loc)]

    def known(self, loc: Loc) -> Loc:
        """`loc` without the parts (pydantic's names of union members) that the file does not have."""
        while loc not in self.values:
            loc = loc[:-1]
        return loc

    def places_within(self, loc: Loc) -> set[tuple[int, int]]:
        """Positions of everything at and below `loc`."""
        both = (*self.values.items(), *self.keys.items())
        return {place for path, place in both if path[: len(loc)] == loc}

    def problem(self, loc: Loc, message: str, *, key: bool = False) -> Problem:
        """An error at `loc`, with the dotted path in front of it."""
        line, column = self.position(loc, key=key)
        return Problem(line, column, f"{'.'.join(loc)}: {message}" if loc else message)

    def _fail(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(node.start_mark.line + 1, node.start_mark.column + 1, message))

    def _value(self, node: yaml.Node, loc: Loc, inside: frozenset[int]) -> Any:
        self._nodes += 1
        if self._nodes > NODES_MAX:
            message = f"aliases unfold to more than {NODES_MAX} values"
            raise FarmFileError(self.file, [Problem(node.start_mark.line + 1, node.start_mark.column + 1, message)])
        self.values.setdefault(loc, (node.start_mark.line + 1, node.start_mark.column + 1))
        if id(node) in inside or len(inside) >= DEPTH_MAX:
            why = "an alias that contains itself" if id(node) in inside else f"nested deeper than {DEPTH_MAX} levels"
            self._fail(node, why)
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        within = inside | {id(node)}
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            return [self._value(item, (*loc, str(index)), within) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            self.mappings.add(loc)
            return self._mapping(node, loc, within)
        self._fail(node, f"the tag {node.tag} has no meaning in a farm file")
        return None

    def _mapping(self, node: yaml.MappingNode, loc: Loc, within: frozenset[int]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail(key_node, "a key must be a plain word")
                continue
            # Keys are names and are never converted: `no:` and `12:` are the words no and 12.
            key = key_node.value
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if key in result:
                first = self.keys[(*loc, key)]
                self._fail(key_node, f"duplicate key {key}; it is already there in line {first[0]}")
                continue
            if key == "<<" and key_node.style is None:
                self._fail(key_node, "merge keys (<<) belong to YAML 1.1; write the keys out")
                continue
            self.keys.setdefault((*loc, key), place)
            result[key] = self._value(value_node, (*loc, key), within)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        if node.tag == _STR:
            return text
        if node.tag not in _CORE or not _CORE[node.tag].match(text):
            self._fail(node, f"{text[:40]!r} cannot be read as {node.tag}")
            return None
        kind = node.tag.rpartition(":")[2]
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        try:
            return _integer(text) if kind == "int" else _float(text)
        except ValueError:
            self._fail(node, f"the number {text[:20]}... has too many digits")
            return None


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2])
    return int(text[2:], base) if base else int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _syntax_problem(error: yaml.MarkedYAMLError, text: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message = " ".join(filter(None, (error.context, error.problem))) or "not YAML"
    lines = text.splitlines()
    here = lines[line - 1] if line <= len(lines) else ""
    indent = here[: len(here) - len(here.lstrip())]
    if "\t" in indent:
        return Problem(line, indent.index("\t") + 1, "a tab in the indentation; YAML is indented with spaces")
    return Problem(line, column, message)


# ---- values to the model ----


def _validate(data: dict[str, Any], tree: _Tree) -> tuple[Farm | None, list[Problem]]:
    """The farm and its problems.

    What is wrong is cut out and the rest is validated again, so that a typing error in one line does not
    hide a wrong reference in another."""
    declared = {(section, name) for section, names in data.items() if isinstance(names, dict) for name in names}
    problems: list[Problem] = []
    cut: set[Loc] = set()
    for _ in range(DEPTH_MAX):
        try:
            farm = Farm.model_validate(data)
            break
        except ValidationError as error:
            for one in error.errors(include_url=False):
                loc = _plain(one["loc"])
                problems += [] if one["type"] == "missing" and loc in cut else _describe(one, tree)
                _cut(data, loc)
                cut.add(loc)
    else:
        return None, problems
    told = {(one.line, one.column) for one in problems}
    for finding in check_farm(farm):
        if finding.missing not in declared and not tree.places_within(finding.loc) & told:
            problems.append(tree.problem(finding.loc, finding.message))
    return farm, problems


def _plain(loc: tuple[int | str, ...]) -> Loc:
    """A pydantic location without its `[key]` markers."""
    return tuple(str(part) for part in loc if part != "[key]")


def _describe(error: Any, tree: _Tree) -> Iterator[Problem]:
    loc = _plain(error["loc"])
    if error["type"] != "missing":
        loc = tree.known(loc)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = _fields_at(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        yield tree.problem(loc, f"unknown key; {hint}", key=True)
    elif kind == "missing":
        yield tree.problem(loc[:-1], f"the key {loc[-1]} is missing", key=True)
    elif error["loc"] and error["loc"][-1] == "[key]":
        yield tree.problem(loc, "a name has 1 to 63 letters, digits, . _ or -, the first a letter or digit", key=True)
    elif kind == "string_type":
        yield tree.problem(loc, f"{error['input']!r} is not text; write it in quotes if it is meant as such")
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        yield tree.problem(loc, f"a mapping belongs here, not {error['input']!r}")
    else:
        value = "" if kind == "value_error" else f"{error['input']!r}: "
        yield tree.problem(loc, f"{value}{message[0].lower()}{message[1:]}")


def _cut(data: dict[str, Any], loc: Loc) -> None:
    """Remove what is at `loc`; where it is missing, or inside a list, what should have held it."""
    here: Any = data
    found: tuple[dict[str, Any], str] | None = None
    for depth, part in enumerate(loc, 1):
        if not isinstance(here, dict):
            break
        if part not in here:
            if depth < len(loc):
                return  # an earlier cut took it along
            break
        found, here = (here, part), here[part]
    if found is not None:
        del found[0][found[1]]


def _fields_at(loc: Loc) -> list[str]:
    """Names of the keys that the model at `loc` takes."""
    kind: Any = Farm
    for part in loc:
        kind = _unwrap(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            by_name = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
            kind = by_name.get(part)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
    kind = _unwrap(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [field.alias or name for name, field in kind.model_fields.items()]
    return []


def _unwrap(kind: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next((one for one in typing.get_args(kind) if one is not type(None)), kind)
    return kind


# ---- paths ----


def _resolve_paths(farm: Farm, base: Path, tree: _Tree) -> None:
    """Make every path absolute, starting from the farm file's directory."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.normpath(base / Path(path).expanduser())

    control = farm.control
    if control.listen.startswith("unix:") and control.listen != ControlConfig().listen:
        control.listen = f"unix:{absolute(control.listen.removeprefix('unix:'))}"
    control.tokens = absolute(control.tokens)
    if control.tls is not None:
        control.tls.cert = absolute(control.tls.cert) or ""
        control.tls.key = absolute(control.tls.key) or ""
        control.tls.client_ca = absolute(control.tls.client_ca)
    if farm.tls is not None:
        farm.tls.certs, farm.tls.psk = absolute(farm.tls.certs), absolute(farm.tls.psk)
    for host in farm.hosts.values():
        host.token_file, host.logs = absolute(host.token_file), absolute(host.logs)
    for profile in farm.profiles.values():
        if profile.cache is not None and profile.cache.log is not None:
            profile.cache.log.path = absolute(profile.cache.log.path)
    for datastore in farm.datastores.values():
        datastore.path = absolute(datastore.path)
        datastore.uri = _resolve_socket(datastore.uri, base)
        if datastore.tls is not None:
            datastore.tls.certs, datastore.tls.psk = absolute(datastore.tls.certs), absolute(datastore.tls.psk)


def _resolve_socket(uri: str | None, base: Path) -> str | None:
    """A relative unix socket of a URI, from the farm file's directory."""
    try:
        parsed = parse_uri(uri or "")
    except NvError:
        return uri  # said already, or there is none
    if parsed.socket is None or parsed.has_tls_parameters:
        return uri
    return str(replace(parsed, socket=os.path.normpath(base / Path(parsed.socket).expanduser())))


def _same_place(farm: Farm, tree: _Tree) -> Iterator[Problem]:
    """Two datastores on one file, device or directory would each think the bytes are theirs."""
    seen: dict[object, str] = {}
    for name, datastore in farm.datastores.items():
        if datastore.kind is DatastoreKind.NBD:
            yield from _same_export(seen, name, datastore, tree)
            continue
        if datastore.path is None:
            continue
        real = Path(datastore.path).resolve()
        for key in _identities(real):
            other = seen.setdefault(key, name)
            if other == name:
                continue
            theirs = farm.datastores[other]
            if theirs.hosts and datastore.hosts and not set(theirs.hosts) & set(datastore.hosts):
                continue
            yield tree.problem(
                ("datastores", name, "path"),
                f"{datastore.path} is the same place as datastore {other}'s path ({real}); bytes have one owner",
            )
            break


def _same_export(seen: dict[object, str], name: str, datastore: DatastoreConfig, tree: _Tree) -> Iterator[Problem]:
    """One export by one name. (That two names lead to one server cannot be seen from here.)"""
    try:
        place = place_of(datastore)
    except NvError:
        return  # said already
    other = seen.setdefault(("export", place), name)
    if other != name:
        yield tree.problem(
            ("datastores", name, "uri"), f"{place} is the same export as datastore {other}'s uri; bytes have one owner"
        )


def _identities(real: Path) -> list[object]:
    """What tells a place from another: its path without links and, when it exists, its device or inode."""
    try:
        status = real.stat()
    except OSError:
        return [str(real)]
    device = ("device", status.st_rdev) if real.is_block_device() else ("inode", status.st_dev, status.st_ino)
    return [str(real), device]
