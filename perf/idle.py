"""What a farm of many bound, idle exports costs, one connection each: processors and memory of all its processes.

By TCP: a VM's socket takes fewer connections. The figures are of the whole farm (`up`, control and the filter): what
is idle must cost nothing anywhere.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from perf.bars import IDLE_EXPORTS, IDLE_LOAD, PROCESSORS, RESIDENT
from perf.generators import loadgen_json
from perf.model import Count
from perf.peers import OURS, ROOT
from perf.run import Options
from perf.servers import Place, Plan, free_port, running

Say = Callable[[str], None]
EXPORT_BYTES = 1 << 20
SETTLE_S = 10.0
"""The aftermath of a thousand connections is not idleness."""
WATCH_S = 10.0
START_LIMIT_S = 300.0


def plan(place: Place, exports: int) -> Plan:
    """A farm of that many small VVols of one VM, behind the host's TCP listener; the process is `up`."""
    farm = {
        "datastores": {"store": {"kind": "file", "path": str(place.file), "size": f"{2 * exports + 64}MiB"}},
        "profiles": {"plain": {"datastore": "store"}},
        "hosts": {"local": {"listen": {"address": f"127.0.0.1:{place.port}", "tls": "none"}}},
        "vms": {"idle": {"vvols": {f"d{i}": {"size": "1MiB", "profile": "plain"} for i in range(exports)}}},
    }
    path = place.folder / "farm.yaml"
    path.write_text(json.dumps(farm))
    folders = ["--state", str(place.file.with_name("state")), "--run", str(place.folder / "run")]
    command = [sys.executable, "-m", "nbdvvol", "up", "-f", str(path), *folders]
    return Plan(command, "idle/d%u", environment={"PYTHONPATH": str(ROOT)}, ready="\nready\n", limit_s=START_LIMIT_S)


def measure(options: Options, say: Say, exports: int = IDLE_EXPORTS) -> list[Count]:
    """The two figures. Raises ServerError, PointError."""
    with (
        tempfile.TemporaryDirectory(prefix="nv", dir="/tmp") as name,
        tempfile.TemporaryDirectory(prefix="nbdvvol-perf-", dir=options.tmpfs) as store,
    ):
        file = Path(store) / "store.img"
        place = Place(Path(name), "tmpfs", "tcp", file, EXPORT_BYTES, free_port(), options.build, spin_us=50)
        with running(plan(place, exports), place) as server:
            watch = 2.0 if options.quick else WATCH_S
            arguments = ["--connections", str(exports), "--idle", str(watch), "--warmup", str(SETTLE_S)]
            out = loadgen_json(options.build / "loadgen", server, arguments, limit_s=300)["server"]
    each = (out["rss_bytes"] - out["rss_before_bytes"]) / exports
    say(
        f"  {exports} bound, idle exports: {out['cpu_fraction']:.3%} of a processor, {each / 1024:.1f} KiB a connection"
    )
    return [
        Count(peer=OURS, work=IDLE_LOAD, name=PROCESSORS, value=out["cpu_fraction"], tolerance=1.0),
        Count(peer=OURS, work=IDLE_LOAD, name=RESIDENT, value=each, tolerance=0.1),
    ]
