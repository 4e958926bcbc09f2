"""The filter's memory of failed syncs: written at once, kept until control lists it, damaged never mistaken."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdvvol.filter.syncfaults import FILE_NAME, FaultBook
from nbdvvol.model.errors import Code, NvError


def test_it_survives_the_process_until_control_lists_it(tmp_path: Path) -> None:
    book = FaultBook(tmp_path)
    book.enter("farm")
    assert not book.stands("local", "")
    fault = book.add("local", "", "errno 5")
    other = book.add("nas", "a.img", "errno 5")
    book.close()
    again = FaultBook(tmp_path)
    assert {one.id for one in again.unheard()} == {fault.id, other.id}
    again.enter("farm")
    assert again.stands("local", "") and again.stands("nas", "a.img") and not again.stands("nas", "b.img")
    again.take({"local": {fault.id: ""}})
    assert again.stands("local", "") and [one.id for one in again.unheard()] == [other.id]
    again.take({"nas": {other.id: "a.img"}})
    assert not again.stands("local", "") and again.stands("nas", "a.img") and not again.unheard()
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_what_control_has_not_heard_of_is_not_cleared_by_its_silence(tmp_path: Path) -> None:
    book = FaultBook(tmp_path)
    book.enter("farm")
    fault = book.add("local", "", "errno 5")
    book.take({"local": {"another host's or an older one": ""}})
    book.take({})
    assert book.stands("local", "") and book.unheard() == [fault]
    book.close()


def test_another_farm_has_other_bytes(tmp_path: Path) -> None:
    book = FaultBook(tmp_path)
    book.enter("farm")
    book.add("local", "", "errno 5")
    book.close()
    again = FaultBook(tmp_path)
    again.enter("another farm")
    assert not again.stands("local", "")
    again.close()
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"farm": "f", "faults": [{"id": 1}]}'])
def test_a_damaged_memory_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(NvError, match="cannot be read") as refused:
        FaultBook(tmp_path)
    assert refused.value.code is Code.INVALID and "move it away" in refused.value.hint
    assert (tmp_path / FILE_NAME).read_text() == text


def test_a_full_disk_loses_only_the_memory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    book = FaultBook(run)
    book.enter("farm")
    run.rmdir()
    book.add("local", "", "errno 5")
    book.close()
    assert book.stands("local", "")
