"""The load generator and the ceiling: they count exactly, and the generator notices wrong bytes and lost replies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perf import counts, generators, profile, usage

SIZE = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ceiling(tools: Path, folder: Path) -> Iterator[tuple[Path, int]]:
    path = folder / "s"
    with subprocess.Popen([tools / "ceiling", "--unix", path, "--size", str(SIZE)]) as process:
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield path, process.pid
        process.send_signal(signal.SIGTERM)


def load(tools: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [tools / "loadgen", "--unix", path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


class Responder:
    """A small NBD server in Python over a bytearray; `spoil` may change a reply's bytes before they leave."""

    def __init__(self, path: Path, spoil: Callable[[int, bytes], bytes] = lambda number, reply: reply) -> None:
        self.store = bytearray(SIZE)
        self.spoil = spoil
        self.answered = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._client, args=(client,), daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    @staticmethod
    def _read(client: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = client.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def _client(self, client: socket.socket) -> None:
        with client:
            try:
                self._haggle(client)
                while self._request(client):
                    pass
            except (EOFError, OSError):
                return

    def _haggle(self, client: socket.socket) -> None:
        client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        self._read(client, 4)
        while True:
            option, size = struct.unpack(">8xII", self._read(client, 16))
            self._read(client, size)
            head = struct.pack(">QI", 0x3E889045565A9, option)
            if option == 7:
                info = struct.pack(">HQH", 0, SIZE, 0x6D)
                client.sendall(head + struct.pack(">II", 3, 12) + info + head + struct.pack(">II", 1, 0))
                return
            client.sendall(head + struct.pack(">II", 0x80000001, 0))

    def _request(self, client: socket.socket) -> bool:
        _, _, command, cookie, offset, length = struct.unpack(">IHH8sQI", self._read(client, 28))
        payload = b""
        if command == 1:
            self.store[offset : offset + length] = self._read(client, length)
        elif command == 0:
            payload = bytes(self.store[offset : offset + length])
        elif command == 6:
            self.store[offset : offset + length] = bytes(length)
        elif command == 2:
            return False
        self.answered += 1
        client.sendall(self.spoil(self.answered, struct.pack(">II8s", 0x67446698, 0, cookie) + payload))
        return True


@pytest.mark.parametrize("block", ["4k", "256k"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_the_ceiling_with_a_file_keeps_what_is_written(tools: Path, folder: Path, transport: str, block: str) -> None:
    """Short writes are taken out of what was received, long ones received where they belong."""
    file, path = folder / "f", folder / "s"
    size = 4 * SIZE
    file.write_bytes(bytes(size))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--unix", str(path)] if transport == "unix" else ["--tcp", str(port)]
    with subprocess.Popen([tools / "ceiling", *where, "--size", str(size), "--file", str(file)]) as process:
        client = ["--unix", str(path)] if transport == "unix" else ["--tcp", f"127.0.0.1:{port}"]
        work = ["--block", block, "--depth", "3", "--mix", "read=30,write=70", "--count", "400", "--verify"]
        for _ in range(500):
            done = subprocess.run(
                [tools / "loadgen", *client, *work], capture_output=True, text=True, timeout=60, check=False
            )
            if "Connection refused" not in done.stderr and "No such file" not in done.stderr:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert report(done)["verified"] > 0
    assert file.read_bytes() != bytes(size)


def test_it_counts_every_request_and_the_servers_cpu(tools: Path, ceiling: tuple[Path, int]) -> None:
    path, pid = ceiling
    out = report(load(tools, path, "--depth", "32", "--count", "3200", "--connections", "3", "--pid", str(pid)))
    assert out["requests"] == 9600 == out["latency"]["read"]["count"]
    assert out["latency"]["all"]["p50_ns"] <= out["latency"]["all"]["p99_ns"] <= out["latency"]["all"]["max_ns"]
    assert out["server"]["cpu_ns"] > 0 and out["server"]["rss_bytes"] > 0 and out["server"]["threads"] == 2


def test_lockstep_sends_a_whole_batch_at_once(tools: Path, ceiling: tuple[Path, int]) -> None:
    out = report(load(tools, ceiling[0], "--depth", "32", "--count", "3200", "--lockstep"))
    assert out["client"]["sends"] == 100


def test_a_mix_is_what_was_asked_for(tools: Path, ceiling: tuple[Path, int]) -> None:
    mix = "read=50,write=20,trim=10,zero=10,flush=10"
    out = report(load(tools, ceiling[0], "--depth", "16", "--count", "20000", "--mix", mix))
    share = {name: block["count"] / 20000 for name, block in out["latency"].items() if name != "all"}
    assert share == pytest.approx({"read": 0.5, "write": 0.2, "trim": 0.1, "zero": 0.1, "flush": 0.1}, abs=0.02)


def test_the_same_seed_asks_the_same(tools: Path, ceiling: tuple[Path, int]) -> None:
    arguments = ("--depth", "4", "--count", "1000", "--mix", "read=50,write=50", "--seed", "9")
    first, second = (report(load(tools, ceiling[0], *arguments))["latency"]["read"]["count"] for _ in range(2))
    assert first == second


def test_blocks_larger_than_the_receive_buffer(tools: Path, ceiling: tuple[Path, int]) -> None:
    out = report(
        load(tools, ceiling[0], "--block", "512k", "--depth", "4", "--count", "40", "--mix", "read=50,write=50")
    )
    assert out["requests"] == 40


def test_verify_is_content_with_an_honest_server(tools: Path, folder: Path) -> None:
    server = Responder(folder / "s")
    mix = "read=40,write=40,zero=15,flush=5"
    arguments = ("--verify", "--mix", mix, "--depth", "8", "--count", "600", "--connections", "2", "--block", "1k")
    out = report(load(tools, folder / "s", *arguments))
    server.close()
    assert out["verified"] > 300


def test_verify_notices_one_flipped_bit(tools: Path, folder: Path) -> None:
    def flip(number: int, reply: bytes) -> bytes:
        return reply if number < 700 or len(reply) == 16 else reply[:-1] + bytes([reply[-1] ^ 1])

    server = Responder(folder / "s", flip)
    done = load(tools, folder / "s", "--verify", "--mix", "read=50,write=50", "--depth", "8", "--count", "2000")
    server.close()
    assert done.returncode == 1
    assert "VERIFY FAILED" in done.stderr and "at byte 4088" in done.stderr


def test_verify_notices_a_lost_write(tools: Path, folder: Path) -> None:
    server = Responder(folder / "s")
    lost = 0

    def forget(number: int, reply: bytes) -> bytes:
        nonlocal lost
        if number == 900:
            lost += 1
            server.store[:] = bytes(SIZE)
        return reply

    server.spoil = forget
    done = load(tools, folder / "s", "--verify", "--mix", "read=50,write=50", "--depth", "8", "--count", "2000")
    server.close()
    assert lost == 1 and done.returncode == 1 and "VERIFY FAILED" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda n, r: r if n != 20 else r[:8] + b"\xff" * 8 + r[16:], "cookie that is not in flight"),
        (lambda n, r: r if n != 20 else r + r, "cookie that is not in flight"),
        (lambda n, r: r if n != 20 else b"\0\0\0\x01" + r[4:], "not a reply"),
        (lambda n, r: r if n != 20 else r[:4] + b"\0\0\0\x05" + r[8:], "error 5"),
    ],
    ids=["cookie", "twice", "magic", "error"],
)
def test_a_broken_reply_ends_the_run(
    tools: Path, folder: Path, spoil: Callable[[int, bytes], bytes], says: str
) -> None:
    server = Responder(folder / "s", spoil)
    done = load(tools, folder / "s", "--depth", "1", "--count", "100")
    server.close()
    assert done.returncode == 1 and says in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--depth", "0"), "--depth 0"),
        (("--block", "4x"), "not a size"),
        (("--mix", "read=50"), "add up to 50"),
        (("--mix", "lick=100"), "unknown"),
        (("--verify", "--block", "12"), "multiple of 8"),
        (("--threads", "2"), "not above --connections"),
        (("--verify", "--block", "64k", "--depth", "16"), "too small"),
    ],
)
def test_bad_options_are_named(tools: Path, ceiling: tuple[Path, int], arguments: tuple[str, ...], says: str) -> None:
    done = load(tools, ceiling[0], *arguments)
    assert done.returncode == 1 and says in done.stderr


def test_idle_connections_are_held_and_weighed(tools: Path, ceiling: tuple[Path, int]) -> None:
    path, pid = ceiling
    out = report(load(tools, path, "--connections", "50", "--idle", "0.2", "--warmup", "0.1", "--pid", str(pid)))
    assert out["connections"] == 50
    assert out["server"]["rss_bytes"] > out["server"]["rss_before_bytes"]


def test_the_histogram_is_within_its_promised_error(tmp_path: Path) -> None:
    source = tmp_path / "check.c"
    source.write_text(
        '#include "histogram.h"\n#include <stdio.h>\nint main(void) {\n'
        "  for (uint64_t v = 1; v < 1ull << 38; v += v / 37 + 1) {\n"
        "    uint64_t got = histogram_value(histogram_index(v)), off = got > v ? got - v : v - got;\n"
        '    if (off * 64 > v) { printf("%llu: %llu", (unsigned long long)v, (unsigned long long)got); return 1; }\n'
        "  }\n"
        "  static struct histogram h;\n"
        "  for (uint64_t v = 1; v <= 1000; v++) histogram_add(&h, v * 1000);\n"
        "  uint64_t p99 = histogram_quantile(&h, 0.99);\n"
        "  return h.count == 1000 && h.max_ns == 1000000 && p99 > 980000 && p99 < 1005000 ? 0 : 2;\n}\n"
    )
    program = tmp_path / "check"
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{generators.NATIVE}", "-o", program, source]
    subprocess.run(command, check=True, timeout=60)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_usage_counts_a_process_and_its_children() -> None:
    script = "import subprocess,sys,time; subprocess.Popen(['sleep','9']); print('up',flush=True); time.sleep(9)"
    with subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = usage.read(process.pid)
        assert found.threads == 2 and found.cpu_ns > 0 and found.rss_anon_bytes > 0
        for child in usage.children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
    assert usage.read(process.pid) == usage.Usage(0, 0, 0, 0)


STEPPED = r"""
#include <stdlib.h>
#include <unistd.h>
char from[4096], to[4096];
__attribute__((noinline)) void turn(volatile int *x) { ++*x; }
__attribute__((noinline)) void copy(void)
{
    char *s = from, *d = to;
    long n = sizeof to;
    __asm__ volatile("rep movsb" : "+S"(s), "+D"(d), "+c"(n) : : "memory");
}
int main(void)
{
    volatile int x = 0;
    char c;
    while (read(0, &c, 1) == 1) {
        copy();
        void *volatile memory = malloc(100);
        free(memory);
        for (int i = 0; i < 50; i++) turn(&x);
        if (write(1, "k", 1) != 1) return 1;
    }
    return 7;
}
"""


def test_steps_counts_every_instruction_of_a_thread_and_lets_it_live(tools: Path, tmp_path: Path) -> None:
    source = tmp_path / "loop.c"
    source.write_text(STEPPED)
    program, out = tmp_path / "loop", tmp_path / "out"
    subprocess.run(["gcc", "-O1", "-o", program, source], check=True, timeout=60)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as traced:
        assert traced.stdin is not None and traced.stdout is not None
        with subprocess.Popen([tools / "steps", str(traced.pid), out], stdout=subprocess.PIPE) as counter:
            assert counter.stdout is not None and counter.stdout.readline() == b"counting\n"
            for _ in range(3):
                traced.stdin.write(b"x")
                assert traced.stdout.read(1) == b"k"
            where = profile.mappings(Path(f"/proc/{traced.pid}/maps").read_text())
            counter.terminate()
        found = profile.parse(out.read_text(), where)
        turns = [count for name, count in found.own.items() if name == "loop:turn"]
        assert turns and turns[0] % 150 == 0 and turns[0] > 0
        assert 0 < found.own["loop:copy"] < 3 * 20, "a rep instruction is one"
        assert counts.allocations(found) == 3
        traced.stdin.write(b"x")
        assert traced.stdout.read(1) == b"k"
        traced.stdin.close()
    assert traced.returncode == 7
