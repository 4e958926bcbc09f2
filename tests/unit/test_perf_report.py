"""Result files, the report, its charts, and the block that README.md and docs/performance.md show."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from PIL import Image

from perf import readme, report, results
from perf.bars import IDLE_LOAD, PROCESSORS, RESIDENT
from perf.model import Count, Result
from perf.readme import PAGES, Page, ReadmeError
from tests.unit.perf_results import point, result, sample, steady

ROOT = Path(__file__).parents[2]
COUNTS = (
    Count(peer="nbdvvol", work="read-4k-qd32", name="instructions", value=312.5, tolerance=0.01),
    Count(peer="nbdvvol", work=IDLE_LOAD, name=PROCESSORS, value=0.002, tolerance=1.0),
    Count(peer="nbdvvol", work=IDLE_LOAD, name=RESIDENT, value=100_000.0, tolerance=0.1),
)


def small() -> Result:
    """A run of one core point and one disk point, with counts."""
    core = steady("randread-4k-qd32", "core", {"nbdvvol": 80_000, "ceiling": 100_000, "nbdkit-file": 100_000})
    disk = steady("randread-4k-qd32", "disk", {"nbdvvol": 100_000, "storage": 100_000})
    disk = disk.model_copy(update={"backend": "disk"})
    scaling = steady("randread-4k-4x32", "scaling", {"nbdvvol": 50_000, "nbdvvol-2-reactors": 80_000})
    return result([core, disk, scaling], COUNTS)


class TestFiles:
    def test_a_result_survives_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        path.write_text(results.dump(small()))
        assert results.load(path) == small()

    def test_figures_have_five_digits_and_samples_a_line_each(self) -> None:
        text = results.dump(result([point([sample("nbdvvol", 0, 123456.789, 1 / 3)])]))
        (line,) = [line for line in text.splitlines() if '"peer":"nbdvvol"' in line]
        assert '"iops":123460' in line and '"server_cpu_us":0.33333' in line and "null" not in line

    def test_a_file_that_is_no_result_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text('{"format": 99}')
        with pytest.raises(results.ResultError, match="not a result file of format 2"):
            results.load(path)
        with pytest.raises(results.ResultError, match="No such file"):
            results.load(tmp_path / "y.json")


class TestReport:
    def test_it_says_what_was_measured_and_what_was_missed(self) -> None:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown(small()).splitlines()]
        found = {(row[0], row[1]): row[2:] for row in rows if len(row) > 2}
        ceiling, io_uring = "IOPS / socket ceiling", "read, depth 32: IOPS / fio io_uring"
        assert found["4 KiB random read, depth 32", ceiling] == ["≥ 0.85", "0.80 (0.80–0.80)", "**missed**"]
        assert found["O_DIRECT on the real disk", io_uring] == ["≥ 0.95", "1.00 (1.00–1.00)", "reached"]
        assert found["", "resident KiB per connection"] == ["≤ 64", "97.7", "**missed**"]
        assert found["", "randwrite-4k-qd32: IOPS per CPU-second / best peer"] == ["≥ 1", "", "not measured"]
        assert found["nbdvvol", "80,000"][:2] == ["0%", ""] and found["nbdvvol", "read-4k-qd32"][0] == "312.5"

    def test_a_run_that_means_little_says_so(self) -> None:
        assert "nothing about speed" in report.markdown(small().model_copy(update={"quick": True}))
        assert "load 2.0" in report.markdown(small().model_copy(update={"load_before": 2.0}))
        assert "gave up to 10% of the processors" in report.markdown(small().model_copy(update={"stolen": 0.1}))
        assert report.warnings(small()) == []

    def test_charts_are_small_pictures(self, tmp_path: Path) -> None:
        source = tmp_path / "r.json"
        qd1 = steady("randread-4k-qd1", "core", {"nbdvvol": 30_000, "ceiling": 50_000})
        run = small().model_copy(update={"points": (*small().points, qd1)})
        written = report.write(run, source)
        charts = {path.name for path in written if path.suffix == ".png"}
        assert charts == {"core.png", "disk.png", "scaling.png", "core-latency.png"}
        for name in charts:
            path = tmp_path / "r" / name
            assert path.stat().st_size < 40_000
            with Image.open(path) as picture:
                assert picture.width > 500 and len(picture.getcolors() or []) > 2


class TestReadme:
    def test_the_block_shows_ratios_and_is_honest_about_losses(self) -> None:
        block = readme.front_page(small(), "perf/results/x.json", "")
        assert "| randread-4k-qd32 | 80,000 | 12.5 | 80% | **0.80** |" in block
        missed = (
            "- 4 KiB random read, depth 32: IOPS / socket ceiling 0.80 (0.80–0.80), asked ≥ 0.85; IOPS / nbdkit file"
        )
        assert missed in block
        assert "2 × one (kvm), 1 GiB, Linux 6" in block

    def test_it_goes_before_its_heading_once_and_is_replaced_afterwards(self) -> None:
        page = Page(Path("docs/x.md"), "## The suite\n", readme.bar_page)
        text = "# Title\n\nWords.\n\n## The suite\n\nMore.\n"
        once = readme.render(page, text, small(), "perf/results/x.json")
        assert once.startswith("# Title\n\nWords.\n\n<!-- measured: perf/results/x.json;")
        assert once.endswith("<!-- measured: end -->\n\n## The suite\n\nMore.\n")
        assert "](../perf/results/x.json)" in once and readme.named(once) == "perf/results/x.json"
        assert readme.render(page, once, small(), "perf/results/x.json") == once
        later = readme.render(page, once, small(), "perf/results/y.json")
        assert readme.named(later) == "perf/results/y.json" and later.count("<!-- measured: end -->") == 1
        assert "x.json" not in later

    def test_a_page_without_a_place_is_refused(self) -> None:
        with pytest.raises(ReadmeError, match="no single '## The suite'"):
            readme.render(Page(Path("x.md"), "## The suite\n", readme.bar_page), "# Title\n", small(), "x.json")

    def test_what_may_not_be_shown_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "r.json"
        file.write_text(results.dump(small().model_copy(update={"complete": False})))
        with pytest.raises(ReadmeError, match="no complete run"):
            readme.write(file, tmp_path)
        with pytest.raises(ReadmeError, match="is not below"):
            readme.write(file, ROOT)

    def test_a_complete_run_is_written_into_copies_of_our_pages(self, tmp_path: Path) -> None:
        for page in PAGES:
            (tmp_path / page.path).parent.mkdir(exist_ok=True)
            (tmp_path / page.path).write_text((ROOT / page.path).read_text())
        file = tmp_path / "perf" / "results" / "r.json"
        file.parent.mkdir(parents=True)
        file.write_text(results.dump(small()))
        for path in readme.write(file, tmp_path):
            assert readme.named(path.read_text()) == "perf/results/r.json"

    def test_our_pages_show_the_newest_committed_run_and_nobody_edited_it(self) -> None:
        """Until there is a complete run, neither page has a block; from then on both are what it generates."""
        listed = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "perf/results/*.json"], capture_output=True, text=True, check=False
        ).stdout.split()
        complete = [name for name in listed if results.load(ROOT / name).complete]
        for page in PAGES:
            text = (ROOT / page.path).read_text()
            shown = readme.named(text)
            if complete:
                assert shown == complete[-1], f"{page.path}: run `python -m perf readme {complete[-1]}`"
            if shown is None:
                assert "<!-- measured" not in text, f"{page.path} has a broken mark"
            else:
                assert readme.render(page, text, results.load(ROOT / shown), shown) == text, f"{page.path} was edited"
