"""Farm files: the catalogue's rows C1..C10, C12, C13 and everything else that must be told with a position."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nbdvvol import farmfile
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import CacheConfig, Farm, QosConfig

ROOT = Path(__file__).parents[2]
GOOD = "datastores:\n  local: {kind: file, path: d.img, size: 1GiB}\n"


def parse(text: str, base: Path = Path("/farm")) -> Farm:
    return farmfile.parse(text.encode(), file="f.yaml", base=base)


def problems(text: str, base: Path = Path("/farm")) -> list[str]:
    with pytest.raises(farmfile.FarmFileError) as caught:
        parse(text, base)
    return caught.value.message.splitlines()


@pytest.mark.parametrize("name", [file.name for file in (ROOT / "configs").glob("*.yaml")])
def test_every_shipped_config_parses(name: str) -> None:
    assert farmfile.load(ROOT / "configs" / name).vms


def test_c1_duplicate_key_is_an_error_with_both_places() -> None:
    assert problems("datastores:\n  a: {kind: dir, path: x}\n  a: {kind: dir, path: y}\n") == [
        "f.yaml:3:3: duplicate key a; it is already there in line 2"
    ]


def test_c2_tab_is_an_error_with_position() -> None:
    assert problems("datastores:\n\tlocal: {}\n") == [
        "f.yaml:2:1: a tab in the indentation; YAML is indented with spaces"
    ]


def test_c3_c4_c6_words_stay_words() -> None:
    farm = parse(
        GOOD + "hosts: {on: {}}\nvms:\n  no:\n    host: on\n    vvols: {yes: {size: 1MiB, description: 12:30}}\n"
    )
    assert farm.vms["no"].host == "on"
    assert farm.vms["no"].vvols["yes"].description == "12:30"


@pytest.mark.parametrize(("text", "value"), [("0o10", 8), ("0x10", 16), ("010", 10), ("16", 16)])
def test_c5_integers_are_yaml_1_2(text: str, value: int) -> None:
    assert parse(f"hosts: {{a: {{spin_us: {text}}}}}").hosts["a"].spin_us == value


def test_c5_a_bare_mode_is_refused_not_converted() -> None:
    found = problems(GOOD + "vms: {a: {socket: {mode: 0660}}}")
    assert found == [
        "f.yaml:3:26: vms.a.socket.mode: write the mode in quotes, "  # noqa: ISC004
        'such as "0660"; a bare 660 is read as a decimal number'
    ]


def test_c7_alias_bomb_is_bounded() -> None:
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    (found,) = problems(text)
    assert "aliases unfold to more than" in found


def test_an_alias_that_contains_itself() -> None:
    assert problems("vms: &a {x: *a}") == ["f.yaml:1:6: an alias that contains itself"]


def test_an_alias_may_be_used() -> None:
    farm = parse(GOOD + "vms:\n  a: &vm {vvols: {root: {size: 1MiB}}}\n  b: *vm\n")
    assert farm.vms["a"] == farm.vms["b"]


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "[" * 900 + "]" * 900, "{" * 3000])
def test_deep_nesting_is_an_error(text: str) -> None:
    assert len(problems(text)) == 1


def test_c8_unknown_keys_name_the_nearest() -> None:
    assert problems(
        "datastoers: {}\nvms: {a: {vvols: {r: {size: 1MiB, profil: x}}}}\ndatastores: {a: {kind: dir, path: /x}}"
    ) == [
        "f.yaml:1:1: datastoers: unknown key; did you mean datastores?",
        "f.yaml:2:35: vms.a.vvols.r.profil: unknown key; did you mean profile?",
    ]


def test_c8_unknown_key_with_nothing_near_lists_what_is_known() -> None:
    assert problems("vms: {a: {xyzzy: 1}}") == [
        "f.yaml:1:11: vms.a.xyzzy: unknown key; known here: host, socket, vvols"
    ]


@pytest.mark.parametrize("size", ["-4GiB", "-1", "4 GiBs", "1.5", "[1]", "0"])
def test_c9_bad_sizes(size: str) -> None:
    (found,) = problems(GOOD + f"vms:\n  a:\n    vvols:\n      r: {{size: {size}}}\n")
    assert found.startswith("f.yaml:6:17: vms.a.vvols.r.size: ")


def test_c10_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NvError, match=r"cannot read the farm file .*/none.yaml: No such file") as caught:
        farmfile.load(tmp_path / "none.yaml")
    assert caught.value.code is Code.CONFIG
    assert "configs/" in caught.value.hint
    with pytest.raises(NvError, match="Is a directory"):
        farmfile.load(tmp_path)


def test_c12_same_path_twice() -> None:
    (found,) = problems("datastores:\n  a: {kind: file, path: x/d}\n  b: {kind: file, path: ./x/../x/d}\n")
    assert found.startswith("f.yaml:3:25: datastores.b.path: /farm/x/d is the same place as datastore a's path")


@pytest.mark.parametrize("link", ["symlink", "hardlink", "parent"])
def test_c13_same_path_through_a_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "d").write_bytes(b"")
    other = "link"
    if link == "symlink":
        (tmp_path / "link").symlink_to("real/d")
    elif link == "hardlink":
        (tmp_path / "link").hardlink_to(tmp_path / "real" / "d")
    else:
        (tmp_path / "dir").symlink_to("real")
        other = "dir/d"
    text = f"datastores:\n  a: {{kind: file, path: real/d}}\n  b: {{kind: file, path: {other}}}\n"
    (found,) = problems(text, tmp_path)
    assert "is the same place as datastore a's path" in found


REMOTE = "datastores:\n  far: {kind: nbd, uri: "


def test_a_remote_export_has_a_uri_and_its_own_keys() -> None:
    farm = parse(
        REMOTE + "nbds+unix:///a%20b?socket=run/s.sock, connections: 2, timeout: 5s, hold: 0s, write-through: true,\n"
        "        tls: {certs: pki, hostname: far.example}}\n"
    )
    far = farm.datastores["far"]
    assert far.uri == "nbds+unix:///a%20b?socket=/farm/run/s.sock", "paths start at the farm file"
    assert (far.connections, far.timeout, far.hold, far.write_through) == (2, 5.0, 0.0, True)
    assert far.tls is not None and (far.tls.certs, far.tls.hostname, far.tls.verify) == (
        "/farm/pki",
        "far.example",
        True,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datastores:\n  far: {kind: nbd}\n", "2:3: datastores.far: kind nbd needs a uri"),
        (REMOTE + "far.example}\n", "2:25: datastores.far.uri: NBD URI 'far.example': scheme ''"),
        (REMOTE + "nbd://x/y, path: /z}\n", "path: kind nbd has a uri, not a path"),
        (REMOTE + "nbd://x/y, io: direct}\n", "io: io: direct is for files and devices"),
        (REMOTE + "nbd://x/y, size: 1GiB}\n", "size is for kind file"),
        (REMOTE + "nbd://x/y, connections: 17}\n", "datastores.far.connections: 17"),
        (REMOTE + "nbd://x/y, timeout: 0s}\n", "timeout: 0 s is not in 1..600 s"),
        (REMOTE + "'nbds://x/y?tls-verify-peer=0'}\n", "TLS parameters of a datastore are written under `tls:`"),
        (REMOTE + "nbd://x/y, tls: {certs: /pki}}\n", "the uri says nbd, without TLS"),
        (REMOTE + "nbds://x/y, tls: {psk: /keys}}\n", "psk and identity belong together"),
        (REMOTE + "'nbds+unix:///y?socket=/s'}\n", "over a unix socket TLS needs tls.hostname"),
        (REMOTE + "'nbds+unix:///y?socket=/s', tls: {certs: /pki}}\n", "a unix socket has no name"),
        ("datastores:\n  a: {kind: dir, path: d, write-through: true}\n", "kind dir has no write-through"),
        (REMOTE + "nbd://x/y}\n  two: {kind: nbd, uri: 'nbd://x:10809/y'}\n", "3:25: datastores.two.uri: nbd://x/y is"),
    ],
)
def test_what_a_remote_export_cannot_be_is_told_with_its_place(text: str, says: str) -> None:
    (found,) = problems(text)
    assert says in found, found


def test_same_path_on_different_hosts_is_two_places() -> None:
    farm = parse(
        "hosts: {x: {}, y: {}}\ndatastores:\n"
        "  a: {kind: block, path: /dev/vdz, hosts: [x]}\n  b: {kind: block, path: /dev/vdz, hosts: [y]}\n"
    )
    assert len(farm.datastores) == 2


def test_every_error_at_once() -> None:
    found = problems(
        "datastores:\n"
        "  a: {kind: floppy, path: 7}\n"
        "  b: {path: /b}\n"
        "profiles:\n"
        "  gold: {datastore: c}\n"
        "vms:\n"
        "  v:\n"
        "    host: mars\n"
        "    vvols:\n"
        "      r: {size: 1MiB, profile: golf}\n"
        "      s: {size: big, profile: gold}\n"
        "      t: {profile: gold}\n"
    )
    assert [line.partition(": ")[0] for line in found] == [
        "f.yaml:2:13",
        "f.yaml:2:27",
        "f.yaml:3:3",
        "f.yaml:5:21",
        "f.yaml:8:11",
        "f.yaml:10:32",
        "f.yaml:11:17",
        "f.yaml:12:7",
    ], found


def test_names_that_fail_elsewhere_are_not_called_undeclared() -> None:
    found = problems("datastores:\n  a: {kind: floppy}\nvms: {v: {vvols: {r: {size: 1MiB, datastore: a}}}}")
    assert len(found) == 1 and "datastores.a.kind" in found[0]


def test_a_mirror_may_have_a_log() -> None:
    log = "log: {path: logs, size: 1MiB, bypass: 0, age: 250ms, destage-rate: 50MiB/s, deadline: 0}"
    found = parse(GOOD + "profiles: {gold: {mirror: {legs: [local]}, cache: {mode: writeback, " + log + "}}}")
    assert found.profiles["gold"].logging is not None
    assert found.profiles["gold"].logging.destage_rate == 50 << 20
    words = found.profiles["gold"].logging.words()
    assert words.startswith("log 1MiB, in /")
    assert words.endswith("/logs, bypass 0, age 250ms, destage-rate 50MiB/s, deadline 0")
    none = "profiles: {gold: {mirror: {legs: [local]}, cache: {mode: writeback, log: {path: logs, size: 1MiB}}}}"
    logging = parse(GOOD + none).profiles["gold"].logging
    assert logging is not None and logging.destage_rate is None and "destage" not in logging.words()


def test_limits_are_read() -> None:
    text = "profiles: {gold: {qos: {iops: 20000, bandwidth: 400MiB/s, burst: 250ms, iops_size: 256KiB, shares: 300}}}"
    qos = parse(GOOD + text).profiles["gold"].qos
    assert qos is not None
    assert (qos.iops, qos.bandwidth, qos.burst, qos.iops_size, qos.shares) == (20000, 400 << 20, 0.25, 256 << 10, 300)
    assert qos.words() == "iops 20000, bandwidth 400MiB/s, burst 250ms, iops_size 256KiB, shares 300"
    assert QosConfig().words() == "shares 100"


@pytest.mark.parametrize(
    ("qos", "where", "says"),
    [
        ("iops: 0", "qos.iops", "greater than or equal to 1"),
        ("iops: many", "qos.iops", "integer"),
        ("bandwidth: 400Mbit", "qos.bandwidth", "such as 400MiB/s"),
        ("bandwidth: 1KiB/s", "qos.bandwidth", "greater than or equal to 65536"),
        ("burst: 10us", "qos.burst", "such as 30s"),
        ("burst: 0.1ms", "qos.burst", "greater than or equal to 0.001"),
        ("iops_size: 512", "qos.iops_size", "greater than or equal to 4096"),
        ("shares: 0", "qos.shares", "greater than or equal to 1"),
        ("iop: 5", "qos.iop", "iops"),
    ],
)
def test_bad_limits_are_told_where_they_stand(qos: str, where: str, says: str) -> None:
    (found,) = problems(GOOD + f"profiles: {{gold: {{qos: {{{qos}}}}}}}")
    assert where in found and says in found


def test_caches_are_read() -> None:
    cache = "profiles: {p: {cache: {mode: read, ram: 64MiB, read-ahead: 0}}}"
    farm = parse(f"{GOOD}hosts: {{local: {{cache: 1GiB}}}}\n{cache}")
    assert farm.hosts["local"].cache == 1 << 30
    assert farm.profiles["p"].caching == CacheConfig(mode="read", ram=64 << 20, read_ahead=0)
    plain = parse(GOOD + "profiles: {p: {cache: {mode: writethrough}}, q: {cache: {mode: none}}}")
    assert plain.hosts["local"].cache == 256 << 20, "untouched while it is unused"
    assert plain.profiles["p"].caching == CacheConfig(mode="writethrough", ram=0, read_ahead=512 << 10)
    assert plain.profiles["q"].cache and plain.profiles["q"].caching is None
    assert parse(GOOD + "hosts: {local: {cache: 0}}").hosts["local"].cache == 0


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("hosts: {local: {cache: 4KiB}}", "hosts.local.cache", "4KiB is not in 1MiB..4TiB; 0 is no cache"),
        ("hosts: {local: {cache: 5TiB}}", "hosts.local.cache", "5TiB is not in 1MiB..4TiB"),
        ("profiles: {p: {cache: {ram: 1MiB}}}", "profiles.p.cache", "the key mode is missing"),
        ("profiles: {p: {cache: {mode: fast}}}", "profiles.p.cache.mode", "'read', 'writethrough'"),
        ("profiles: {p: {cache: {mode: read, ram: 5TiB}}}", "profiles.p.cache.ram", "less than or equal to"),
        ("profiles: {p: {cache: {mode: read, read-ahead: 8MiB}}}", "profiles.p.cache.read-ahead", "4194304"),
        ("profiles: {p: {cache: {mode: read, readahead: 8MiB}}}", "profiles.p.cache.readahead", "read-ahead"),
        ("profiles: {p: {cache: {mode: read, log: {path: x, size: 1GiB}}}}", "profiles.p.cache.log", "mode writeback"),
        ("profiles: {p: {cache: {mode: none, ram: 1GiB}}}", "profiles.p.cache.ram", "choose mode read"),
        ("profiles: {p: {cache: {mode: writeback}}}", "profiles.p.cache.log", "needs a log: say how large"),
        (
            "profiles: {p: {cache: {mode: writeback, log: {path: x}}}}",
            "profiles.p.cache.log",
            "the key size is missing",
        ),
        (
            "profiles: {p: {cache: {mode: writeback, log: {path: x, size: 64KiB}}}}",
            "profiles.p.cache.log.size",
            "1048576",
        ),
        (
            "profiles: {p: {cache: {mode: writeback, log: {path: x, size: 1048577}}}}",
            "profiles.p.cache.log.size",
            "1048577 bytes are not a multiple of 4096",
        ),
        (
            "profiles: {p: {cache: {mode: writeback, log: {path: x, size: 1GiB, bypass: 1MiB}}}}",
            "profiles.p.cache.log.bypass",
            "524288",
        ),
        (
            "profiles: {p: {cache: {mode: writeback, log: {path: x, size: 1GiB, age: 0}}}}",
            "profiles.p.cache.log.age",
            "0.1",
        ),
        (
            "profiles: {p: {cache: {mode: writeback, log: {path: x, size: 1GiB, destage-rate: 1KiB/s}}}}",
            "profiles.p.cache.log.destage-rate",
            "greater than or equal to 65536",
        ),
        (
            """
profiles: {p: {datastore: local, cache: {mode: writeback, log: {size: 1GiB}}}}
vms: {v: {vvols: {d: {size: 1GiB, profile: p}}}}
""",
            "vms.v.vvols.d.profile",
            "say hosts.local.logs",
        ),
        (
            """
hosts: {local: {cache: 0}}
profiles: {p: {datastore: local, cache: {mode: read}}}
vms: {v: {vvols: {d: {size: 1GiB, profile: p}}}}
""",
            "vms.v.vvols.d.profile",
            "host local has `cache: 0`",
        ),
    ],
)
def test_bad_caches_are_told_where_they_stand(text: str, where: str, says: str) -> None:
    (found,) = problems(GOOD + text)
    assert f" {where}: " in found and says in found


def test_defaults_with_one_host_and_one_datastore() -> None:
    farm = parse(GOOD + "vms: {a: {vvols: {r: {size: 1MiB}}}}")
    assert list(farm.hosts) == ["local"]


def test_two_hosts_need_a_choice() -> None:
    assert problems(GOOD + "hosts: {x: {}, y: {}}\nvms: {a: {}}") == [
        "f.yaml:4:7: vms.a: say which host it runs on: x, y"
    ]


def test_two_datastores_need_a_choice() -> None:
    (found,) = problems(GOOD + "  two: {kind: dir, path: t}\nvms: {a: {vvols: {r: {size: 1MiB}}}}")
    assert "say which datastore it lives on" in found


def test_adoption_rules() -> None:
    text = (
        "datastores:\n  dev: {kind: block, path: /dev/vdz}\n  dir: {kind: dir, path: /d}\nvms:\n  v:\n    vvols:\n"
        "      a: {adopt: {datastore: dev, offset: 0, length: 1GiB}}\n"
        "      b: {adopt: {datastore: dev, offset: 512MiB}}\n"
        "      c: {adopt: {datastore: dir}}\n"
        "      d: {adopt: {datastore: dir, file: ../x}}\n"
        "      e: {adopt: {datastore: dir, file: x, offset: 7}}\n"
        "      f: {size: 1MiB, datastore: dev}\n"
        "      g: {size: 1MiB, adopt: {datastore: dir, file: y}}\n"
    )
    found = problems(text)
    assert [line.split(": ")[1] + ": " + line.split(": ", 2)[2][:30] for line in found] == [
        "vms.v.vvols.a.adopt: datastore dev holds adopted by",
        "vms.v.vvols.b.adopt: overlaps what v/a adopts",
        "vms.v.vvols.c.adopt: datastore dir is a directory: ",
        "vms.v.vvols.d.adopt.file: ../x is not a plain file name ",
        "vms.v.vvols.e.adopt.offset: 7 is not a multiple of 512 byt",
        "vms.v.vvols.g: a VVol has either a size or so",
    ]


def test_a_listener_that_shows_everything_must_be_meant() -> None:
    text = "hosts: {a: {listen: {address: '0.0.0.0:10809', tls: none}}}"
    assert "say `plaintext: true`" in problems(text)[0]
    assert parse(text.replace("tls: none", "tls: none, plaintext: true"))
    assert parse(text.replace("0.0.0.0", "127.0.0.1"))
    assert "needs the section `tls`" in problems(text.replace("none", "required"))[0]


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "::1:10809", "[::1:10809", "x:y"])
def test_bad_listen_addresses(address: str) -> None:
    assert "is not ADDRESS:PORT" in problems(f"hosts: {{a: {{listen: {{address: '{address}', tls: none}}}}}}")[0]


def test_https_needs_an_identity_and_a_secret() -> None:
    assert [line.split(": ", 2)[2][:18] for line in problems("control: {listen: 'https://0.0.0.0:8443'}")] == [
        "https needs contro",
        "https needs contro",
    ]


def test_paths_start_at_the_farm_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "farm.yaml"
    file.write_text("datastores: {a: {kind: file, path: ../d.img}}\ntls: {certs: pki}\nhosts: {h: {token_file: t}}\n")
    farm = farmfile.load(file)
    assert farm.datastores["a"].path == str(tmp_path / "d.img")
    assert farm.tls is not None and farm.tls.certs == str(tmp_path / "sub" / "pki")
    assert farm.hosts["h"].token_file == str(tmp_path / "sub" / "t")


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"a: \x01", "1:4"),
        (b"ab: \xff\n", "1:5"),
        (b"x: 1\n---\ny: 2\n", "2:1"),
        (b"- a\n", "1:1"),
        (b"vms: {a: !!python/object:os.system x}", "1:10"),
        (b"? [a]\n: b\n", "1:3"),
        (b"vms: {<<: {}}", "1:7"),
        (b"vms: {a: *nobody}", "1:10"),
        (b"hosts: {a: {spin_us: " + b"9" * 5000 + b"}}", "1:22"),
    ],
)
def test_what_is_not_a_farm_file_is_told_with_its_place(raw: bytes, place: str) -> None:
    with pytest.raises(farmfile.FarmFileError) as caught:
        farmfile.parse(raw, file="f.yaml", base=Path("/"))
    assert caught.value.message.startswith(f"f.yaml:{place}: "), caught.value.message


def test_an_empty_file_is_an_empty_farm() -> None:
    assert not parse("# nothing yet\n").vms


def test_too_large_a_file(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_bytes(b"#" * (farmfile.FILE_BYTES_MAX + 1))
    with pytest.raises(NvError, match="larger than"):
        farmfile.load(file)


def test_no_file_reaches_python_objects() -> None:
    # The loader's own resolvers are replaced, not added to: the stock loader must still read YAML 1.1.
    assert yaml.safe_load("no") is False
    assert parse("vms: {no: {}}").vms


def test_the_schema_takes_sizes_as_text() -> None:
    size = farmfile.schema()["$defs"]["VVolConfig"]["properties"]["size"]
    kinds = {kind["type"] for kind in size["anyOf"][0].get("anyOf", [size["anyOf"][0]])} | {
        kind.get("type") for kind in size["anyOf"]
    }
    assert {"integer", "string"} <= kinds
