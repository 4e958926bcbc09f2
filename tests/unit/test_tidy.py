"""The style guide as a test: sizes, banned calls, leftovers, head notes, and that docs name what exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from nbdvvol.model.farm import Farm

ROOT = Path(__file__).parents[2]
FILE_LINES_MAX = 700
PYTHON_FUNCTION_LINES_MAX = 60
C_FUNCTION_LINES_MAX = 75
SKIP = {".venv", "build", ".git", "run", "state", "data", "dist"}
LEFTOVERS = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b")
BANNED_C = re.compile(r"\b(strcpy|strcat|sprintf|vsprintf|gets|alloca|strtok|atoi|atol|rand|system)\s*\(")
URING = re.compile(r"#\s*include\s*<liburing|\bio_uring_[a-z_]+\s*\(")


def files(*suffixes: str) -> list[Path]:
    found = (path for path in ROOT.rglob("*") if path.suffix in suffixes and path.is_file())
    return sorted(path for path in found if not SKIP & set(path.relative_to(ROOT).parts))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = files(".py")
PRODUCT = [path for path in PYTHON if path.is_relative_to(ROOT / "nbdvvol")]
C = [path for path in files(".c", ".h") if path.is_relative_to(ROOT / "native")]


def test_files_are_of_one_purpose() -> None:
    long = {name(path): lines for path in PYTHON + C if (lines := path.read_text().count("\n")) > FILE_LINES_MAX}
    assert not long, f"files of more than {FILE_LINES_MAX} lines: {long}"


def span(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def test_python_functions_fit_a_screen() -> None:
    long = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)][1:]
                lines = span(node) - sum(map(span, inner))
                if lines > PYTHON_FUNCTION_LINES_MAX:
                    long.append(f"{name(path)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, long


def c_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first line and length of each function: in this style a body is `{` ... `}` at column 0."""
    start, head = 0, ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("{") and "(" in head:
            start = number
        elif line.rstrip().endswith("{") and re.match(r"[A-Za-z].*\)\s*\{$", line):
            start, head = number, line
        elif line.startswith("}") and start:
            yield head.split("(")[0].split()[-1].lstrip("*"), start, number - start + 1
            start = 0
        if line and not line.startswith((" ", "\t", "{", "}", "/", "*", "#")):
            head = line


def test_c_functions_fit_a_screen() -> None:
    long = [
        f"{name(path)}:{line} {function}: {lines} lines"
        for path in C
        for function, line, lines in c_functions(path)
        if lines > C_FUNCTION_LINES_MAX
    ]
    assert not long, long


def test_the_c_reader_sees_functions() -> None:
    seen = [function for path in C for function, _, _ in c_functions(path)]
    assert len(seen) > 50 and "nv_tls_new" in seen


def test_no_leftovers() -> None:
    everything = [*files(".py", ".c", ".h", ".md", ".yaml", ".toml", ".sh", ".txt"), ROOT / "Makefile"]
    found = [
        f"{name(path)}:{number}"
        for path in everything
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if LEFTOVERS.search(line)
    ]
    assert not found, found


def test_no_skipped_tests() -> None:
    words = re.compile(r"pytest\.(mark\.)?(ski[p]|xfai[l])|importorski[p]|unittest\.ski[p]")
    found = [name(path) for path in PYTHON if path.is_relative_to(ROOT / "tests") and words.search(path.read_text())]
    assert not found, found


def test_processes_are_signalled_by_system_calls() -> None:
    """By os.kill and os.killpg only. The kill command may read `-INT -1234` as pid -1, every process there is;
    pkill and killall choose by name, and so may choose somebody else's."""
    command = re.compile(r"""["'](?:/usr)?(?:/bin/)?(?:kill|pkill|killall)["' ]""")
    assert command.search('["kill", "-INT"]') and command.search("'pkill -f x'")
    # A guest of tests/vm has processes of its own, and busybox's kill.
    here = [path for path in PYTHON if path != Path(__file__) and not path.is_relative_to(ROOT / "tests" / "vm")]
    found = [name(path) for path in here if command.search(path.read_text())]
    assert not found, found


def test_banned_c_calls() -> None:
    found = [
        f"{name(path)}:{number} {match[0]}"
        for path in C
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := BANNED_C.search(line)) and not line.lstrip().startswith(("*", "/"))
    ]
    assert not found, found


def test_only_the_io_port_calls_liburing() -> None:
    users = {name(path) for path in C if URING.search(path.read_text())}
    assert users, "the pattern finds nobody"
    assert all(user.startswith("native/io/") for user in users), users


def test_every_c_file_says_what_it_is() -> None:
    mute = [name(path) for path in C if not path.read_text().lstrip().startswith("/*")]
    assert not mute, mute


def test_every_python_module_says_what_it_is() -> None:
    mute = [
        name(path)
        for path in PRODUCT
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert not mute, mute


def test_no_bare_excepts_that_hide() -> None:
    found = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{name(path)}:{node.lineno}")
    assert not found, found


def farm_models(model: type[BaseModel], seen: dict[type[BaseModel], None]) -> dict[type[BaseModel], None]:
    if model not in seen:
        seen[model] = None
        for field in model.model_fields.values():
            for part in flat(field.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    farm_models(part, seen)
    return seen


def flat(annotation: object) -> Iterator[object]:
    if get_origin(annotation) is None:
        yield annotation
    for part in get_args(annotation):
        yield from flat(part)


MODELS = list(farm_models(Farm, {}))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_of_the_farm_file_is_documented(model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "farm-file.md").read_text()
    keys = [field.alias or key for key, field in model.model_fields.items()]
    missing = [key for key in keys if not re.search(rf"`{re.escape(key)}`", text)]
    assert not missing, f"docs/farm-file.md does not tell about {missing} of {model.__name__}"


def test_the_readme_names_files_that_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_the_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"run", "test"} <= named <= targets
