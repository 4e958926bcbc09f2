"""The API's client: the only way the command line talks to a farm.

Finds control's unix socket (or the https address in $NBDVVOL_CONTROL), turns every failure into an NvError,
and repeats what is safe to repeat while control restarts: each change carries an idempotency key.
"""

from __future__ import annotations

import os
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import TypeAdapter, ValidationError

from nbdvvol.cli.options import SYSTEM_RUN
from nbdvvol.model.errors import Code, ErrorBody, NvError
from nbdvvol.model.farm import Farm
from nbdvvol.model.observe import HostCounters, Trace
from nbdvvol.model.resources import (
    AddLeg,
    ApplyRequest,
    ApplyResult,
    BindVVol,
    CreateVVol,
    Event,
    ExportUri,
    ForceRisks,
    ResizeVVol,
    ResyncLeg,
    Status,
    Task,
    TaskRef,
    TaskState,
    VerifyMirror,
    VVol,
)

TIMEOUT_S = 30.0
RETRY_S = 15.0
"""How long a request is repeated while control is away in the middle of something."""
RETRY_FIRST_S = 2.0
"""The same for one that never answered: it may be starting, or not be there at all."""
POLL_S = 0.1
DONE = frozenset({TaskState.SUCCESS, TaskState.ERROR, TaskState.CANCELLED})


def find_socket(run: Path | None) -> Path:
    """Control's unix socket: in `run`, $NBDVVOL_RUN, ./run or the system's. Raises NvError(NOT_RUNNING)."""
    named = run or (Path(os.environ["NBDVVOL_RUN"]) if os.environ.get("NBDVVOL_RUN") else None)
    candidates = [named] if named else [Path("run"), SYSTEM_RUN]
    for candidate in candidates:
        if (candidate / "control.sock").is_socket():
            return candidate / "control.sock"
    looked = " and ".join(str(candidate / "control.sock") for candidate in candidates)
    raise NvError(
        Code.NOT_RUNNING,
        f"no farm runs here (no {looked})",
        "start one with `nbdvvol up -f FILE`, or name it: --run DIR",
    )


class Client:
    """A connection to one farm's control."""

    def __init__(self, http: httpx.Client, where: str, *, retry_s: float = RETRY_S) -> None:
        self._http = http
        self._where = where
        self._retry_s = retry_s
        self._answered = False

    @classmethod
    def connect(cls, run: Path | None = None) -> Client:
        """The farm that --run or the environment names. Raises NvError(NOT_RUNNING)."""
        url = os.environ.get("NBDVVOL_CONTROL", "")
        if run is None and url.startswith("https://"):
            return cls(_https(url), url)
        return cls.unix(find_socket(run))

    @classmethod
    def unix(cls, socket: Path, *, retry_s: float = RETRY_S) -> Client:
        """The farm behind a unix socket, which need not answer yet."""
        transport = httpx.HTTPTransport(uds=str(socket))
        http = httpx.Client(transport=transport, base_url="http://nbdvvol", timeout=TIMEOUT_S)
        return cls(http, str(socket), retry_s=retry_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._http.close()

    # ---- reading ----

    def status(self) -> Status:
        """Everything in one look."""
        return Status.model_validate(self._call("GET", "/v1/status"))

    def all(self, kind: str, model: Any) -> list[Any]:
        """All resources of a kind (`vvols`, `datastores`, ...), as `model`."""
        adapter: TypeAdapter[list[Any]] = TypeAdapter(list[model])
        return adapter.validate_python(self._call("GET", f"/v1/{kind}"))

    def vvol(self, name: str) -> VVol:
        """A VVol by its full name, its UUID or a unique short name. Raises NvError(NOT_FOUND or CONFLICT)."""
        return VVol.model_validate(self._call("GET", "/v1/resolve", params={"name": name}))

    def uri(self, name: str) -> ExportUri:
        """Where to attach a VVol."""
        return ExportUri.model_validate(self._call("GET", f"/v1/vvols/{self.resolve(name)}/uri"))

    def resolve(self, name: str) -> str:
        """`VM/NAME` of any name that `vvol` takes."""
        return name if "/" in name else self.vvol(name).full_name

    def events(self, *, after: int = 0, limit: int = 1000, wait_s: float = 0.0) -> list[Event]:
        """Events after an id; with `wait_s`, waits that long for the first."""
        params = {"after": after, "limit": limit, "wait": wait_s}
        answer = self._call("GET", "/v1/events", params=params, timeout=TIMEOUT_S + wait_s)
        return TypeAdapter(list[Event]).validate_python(answer)

    def task(self, number: int) -> Task:
        """A task by its number."""
        return Task.model_validate(self._call("GET", f"/v1/tasks/{number}"))

    def counters(self) -> list[HostCounters]:
        """What every host that answers has counted by now."""
        return TypeAdapter(list[HostCounters]).validate_python(self._call("GET", "/v1/counters"))

    def trace(self, name: str, *, seconds: float, count: int, every: int) -> Trace:
        """Trace a VVol's requests; takes up to `seconds`."""
        params = {"seconds": seconds, "count": count, "every": every}
        path = f"/v1/vvols/{self.resolve(name)}/trace"
        return Trace.model_validate(self._call("GET", path, params=params, timeout=TIMEOUT_S + seconds))

    # ---- changing ----

    def apply(self, farm: Farm, *, dry_run: bool = False) -> ApplyResult:
        """Make the farm what its file says."""
        body = ApplyRequest(farm=farm, dry_run=dry_run)
        return ApplyResult.model_validate(self._call("POST", "/v1/apply", body=body))

    def create(self, wanted: CreateVVol) -> TaskRef:
        """Create or adopt a VVol."""
        return TaskRef.model_validate(self._call("POST", "/v1/vvols", body=wanted))

    def delete(self, name: str) -> TaskRef:
        """Delete a VVol."""
        return TaskRef.model_validate(self._call("DELETE", f"/v1/vvols/{self.resolve(name)}"))

    def resize(self, name: str, size: int) -> TaskRef:
        """Grow a VVol to `size` bytes."""
        return self._act(name, "resize", ResizeVVol(size=size))

    def bind(self, name: str, host: str | None, *, force: bool = False) -> TaskRef:
        """Let a host serve a VVol."""
        return self._act(name, "bind", BindVVol(host=host, force=force))

    def unbind(self, name: str, *, force: bool = False) -> TaskRef:
        """Stop serving a VVol."""
        return self._act(name, "unbind", BindVVol(force=force))

    def drain_cache(self, name: str) -> TaskRef:
        """Write out what a VVol's host alone has of it."""
        return TaskRef.model_validate(self._call("POST", f"/v1/vvols/{self.resolve(name)}/cache/drain"))

    def discard_log(self, name: str) -> VVol:
        """Give up what any write-back log holds of a VVol."""
        return VVol.model_validate(self._call("POST", f"/v1/vvols/{self.resolve(name)}/cache/discard"))

    def recover_log(self, name: str) -> VVol:
        """Have the log replayed that the VVol's host has found."""
        return VVol.model_validate(self._call("POST", f"/v1/vvols/{self.resolve(name)}/cache/recover"))

    def risks(self, name: str) -> ForceRisks:
        """What taking a VVol by force would put at risk."""
        return ForceRisks.model_validate(self._call("GET", f"/v1/vvols/{self.resolve(name)}/risks"))

    def add_leg(self, name: str, datastore: str) -> TaskRef:
        """Give a VVol another copy."""
        return self._act(name, "legs", AddLeg(datastore=datastore))

    def remove_leg(self, name: str, leg: str) -> TaskRef:
        """Take a copy away, by its number or its datastore."""
        return TaskRef.model_validate(self._call("DELETE", f"/v1/vvols/{self.resolve(name)}/legs/{leg}"))

    def resync(self, name: str, leg: str, *, full: bool = False, stop: bool = False) -> VVol:
        """Copy to a leg that is not in sync, or stop that."""
        path = f"/v1/vvols/{self.resolve(name)}/legs/{leg}/resync"
        return VVol.model_validate(self._call("POST", path, body=ResyncLeg(full=full, stop=stop)))

    def verify(self, name: str, repair: bool | None) -> TaskRef:
        """Compare the copies that are in sync."""
        return self._act(name, "verify", VerifyMirror(repair=repair))

    def cancel(self, number: int) -> Task:
        """Cancel a task."""
        answer = self._call("POST", f"/v1/tasks/{number}/cancel")
        return Task.model_validate(answer.get("task", answer))

    def clear_fault(self, datastore: str) -> TaskRef:
        """Accept what failed syncs may have lost, so that FLUSH works again."""
        return TaskRef.model_validate(self._call("POST", f"/v1/datastores/{datastore}/clear-fault"))

    def wait(self, number: int, on_change: Callable[[Task], None] = lambda task: None) -> Task:
        """Wait until a task is over; outlives restarts of control. Raises NvError when it did not succeed."""
        for task in self.watch(number):
            on_change(task)
            if task.state in DONE:
                return _succeeded(task)
        raise AssertionError("watch ended before its task")

    def watch(self, number: int) -> Iterator[Task]:
        """A task each time it changed, until it is over."""
        before: Task | None = None
        while True:
            task = self.task(number)
            if task != before:
                yield task
            if task.state in DONE:
                return
            before = task
            time.sleep(POLL_S)

    def _act(self, name: str, verb: str, body: ResizeVVol | BindVVol | AddLeg | VerifyMirror) -> TaskRef:
        return TaskRef.model_validate(self._call("POST", f"/v1/vvols/{self.resolve(name)}/{verb}", body=body))

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: dict[str, Any] | None = None,
        timeout: float = TIMEOUT_S,
    ) -> Any:
        content = None if body is None else body.model_dump_json(by_alias=True)
        headers = {"Content-Type": "application/json"} if content is not None else {}
        if method != "GET":
            headers["Idempotency-Key"] = str(uuid.uuid4())
        deadline = time.monotonic() + (self._retry_s if self._answered else min(self._retry_s, RETRY_FIRST_S))
        while True:
            try:
                answer = self._http.request(
                    method, path, content=content, params=params, headers=headers, timeout=timeout
                )
            except httpx.TimeoutException:
                raise NvError(
                    Code.TIMEOUT, f"control at {self._where} did not answer within {timeout:g} s", "see its log"
                ) from None
            except httpx.TransportError as error:
                if time.monotonic() > deadline or _is_about_tls(error):
                    raise self._away(error) from None
                time.sleep(POLL_S)
                continue
            self._answered = True
            return _content(answer, self._where)

    def _away(self, error: Exception) -> NvError:
        hint = "is it running? `nbdvvol up -f FILE` starts a farm"
        return NvError(Code.NOT_RUNNING, f"control at {self._where} does not answer: {error}", hint)


def _https(url: str) -> httpx.Client:
    """A client of an https control: $NBDVVOL_TOKEN_FILE, $NBDVVOL_CA, $NBDVVOL_CERT and $NBDVVOL_KEY."""
    try:
        context = ssl.create_default_context(cafile=os.environ.get("NBDVVOL_CA"))
        if os.environ.get("NBDVVOL_CERT"):
            context.load_cert_chain(os.environ["NBDVVOL_CERT"], os.environ.get("NBDVVOL_KEY"))
        words = (
            Path(os.environ["NBDVVOL_TOKEN_FILE"]).read_text().split() if os.environ.get("NBDVVOL_TOKEN_FILE") else []
        )
    except OSError as error:
        hint = "see $NBDVVOL_TOKEN_FILE, $NBDVVOL_CA, $NBDVVOL_CERT and $NBDVVOL_KEY"
        raise NvError(Code.DENIED, f"cannot use the credentials for {url}: {error}", hint) from None
    # The token alone, or a line of control's own file, `NAME TOKEN`.
    headers = {"Authorization": f"Bearer {words[-1]}"} if words else {}
    return httpx.Client(base_url=url, verify=context, headers=headers, timeout=TIMEOUT_S)


def _is_about_tls(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _content(answer: httpx.Response, where: str) -> Any:
    try:
        content: Any = answer.json() if answer.content else None
        if answer.is_success:
            return content
        error = ErrorBody.model_validate(content["error"])
    except (ValueError, KeyError, TypeError, ValidationError):
        raise NvError(
            Code.INTERNAL, f"control at {where} answered HTTP {answer.status_code} without a reason"
        ) from None
    raise NvError(error.code, error.message, error.hint)


def _succeeded(task: Task) -> Task:
    if task.state is TaskState.SUCCESS:
        return task
    what = f"task {task.id} ({task.kind} {task.subject})"
    if task.state is TaskState.CANCELLED:
        raise NvError(Code.CONFLICT, f"{what} was cancelled")
    word, _, reason = task.error.partition(": ")
    if word in Code.__members__:
        raise NvError(Code(word), f"{what} failed: {reason}")
    raise NvError(Code.INTERNAL, f"{what} failed: {task.error}", "see `nbdvvol status`")
