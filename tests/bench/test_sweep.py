"""A sweep's cells and their file: what is a cell, what is kept, what goes on, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevit.bench import sweep
from edgevit.bench.sweep import Cell, CellFile, grid, read, record
from edgevit.errors import InputError, OutputError, UsageError

REQUEST = {"items": [{"artifact": "a", "sha256": "00"}], "settings": {"duration_s": 5.0, "percentiles": (50, 90)}}


def measured(cell: Cell, **more: Any) -> dict[str, Any]:
    """What a race leaves of a cell, as far as a reader relies on it."""
    result = {
        "name": "a",
        "effective_precision": "fp32",
        "latency_text": {"p50": "1.23", "p99.9": "n/a (needs 6636)"},
        "samples_ms": [1.25, 1],
    }
    comparison = {"baseline": "a", "candidate": "b", "verdict": "1.10x faster [1.05, 1.15]"}
    body = {
        "results": [result],
        "comparisons": [comparison],
        "warnings": ["w"],
        "changes": [{"kind": "load", "text": "t"}],
    }
    return {"cell": record(cell, ["a"]), **body, "machine": {}, **more}


# ---- the grid


def test_every_combination_is_a_cell_and_the_last_axis_changes_fastest() -> None:
    cells = grid(Cell(), {"threads": (1, 2), "batch": (1, 8), "image_size": [[64, 96]]})
    assert [str(cell) for cell in cells] == [
        "threads=1 batch=1 image-size=64x96",
        "threads=1 batch=8 image-size=64x96",
        "threads=2 batch=1 image-size=64x96",
        "threads=2 batch=8 image-size=64x96",
    ]
    assert cells[0].image_size == (64, 96)


def test_without_axes_there_is_the_one_cell_that_was_asked_for() -> None:
    base = Cell(threads=3, image_size=(32, 64))
    assert grid(base, {}) == (base,)
    assert (str(base), str(Cell())) == ("threads=3 image-size=32x64", "")


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"cores": (1,)}, "sweep over 'cores': expected threads, batch, image-size, precision"),
        ({"threads": ()}, "sweep over threads: (), expected one value or more, e.g. threads=1,2"),
        ({"threads": 2}, "sweep over threads: 2, expected one value or more, e.g. threads=1,2"),
        ({"precision": "fp32"}, "sweep over precision: 'fp32', expected one value or more, e.g. precision=fp32,int8"),
        ({"threads": (1, 2, 1)}, "sweep over threads: a value is given twice; give each once"),
        ({"image_size": ((64, 64), [64, 64])}, "sweep over image-size: a value is given twice; give each once"),
        ({"threads": (0,)}, "sweep over threads: 0, expected whole numbers from 1 to 4096, e.g. threads=1,2"),
        ({"threads": (True,)}, "sweep over threads: True, expected whole numbers from 1 to 4096, e.g. threads=1,2"),
        ({"batch": (1025,)}, "sweep over batch: 1025, expected whole numbers from 1 to 1024, e.g. batch=1,8"),
        ({"batch": ("dynamic",)}, "sweep over batch: 'dynamic', expected whole numbers from 1 to 1024, e.g. batch=1,8"),
        ({"precision": (8,)}, "sweep over precision: 8, expected names such as fp32, e.g. precision=fp32,int8"),
        (
            {"threads": range(1, 102), "batch": range(1, 11)},
            "sweep: 1010 cells, at most 1000 are measured in one go; give fewer values",
        ),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        grid(Cell(), axes)
    assert str(caught.value) == text


def test_what_is_set_for_all_cells_is_no_axis() -> None:
    with pytest.raises(UsageError, match="sweep over threads: --threads is given too; leave one of them out"):
        grid(Cell(threads=2), {"threads": (1, 2)})


@pytest.mark.parametrize("size", [(64,), ("64", "64"), 64, (64.0, 64.0)])
def test_a_size_is_two_whole_numbers(size: Any) -> None:
    with pytest.raises(UsageError, match="image size"):
        grid(Cell(), {"image_size": (size,)})


# ---- the file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "sweep.json"


def test_each_cell_is_in_the_file_as_soon_as_it_ends(place: Path) -> None:
    first, second = grid(Cell(), {"threads": (1, 2)})
    kept = CellFile(place, REQUEST)
    assert not place.exists()
    kept.add(measured(first))
    assert [cell["cell"]["threads"] for cell in read(place)["cells"]] == [1]
    kept.add(measured(second))
    assert read(place) == kept.document()
    assert [path.name for path in place.parent.iterdir()] == ["sweep.json"]


def test_a_second_run_knows_what_the_first_has_measured(place: Path) -> None:
    first, second = grid(Cell(), {"image_size": ((64, 64), (96, 64))})
    CellFile(place, REQUEST).add(measured(first))
    again = CellFile(place, copy.deepcopy(REQUEST))
    assert again.get(record(first, ["a"])) == json.loads(json.dumps(measured(first)))
    assert again.get(record(second, ["a"])) is None
    assert again.get(record(first, ["b"])) is None


def test_a_sweep_can_be_widened(place: Path) -> None:
    (first,) = grid(Cell(), {"threads": (1,)})
    CellFile(place, {**REQUEST, "axes": {"threads": [1]}}).add(measured(first))
    again = CellFile(place, {**REQUEST, "axes": {"threads": [1, 2]}})
    again.add(measured(Cell(threads=2)))
    assert read(place)["request"]["axes"] == {"threads": [1, 2]}
    assert len(read(place)["cells"]) == 2


@pytest.mark.parametrize(
    ("now", "text"),
    [
        ({"settings": {"duration_s": 2.0, "percentiles": (50, 90)}}, "settings.duration_s 5.0 there, 2.0 now;"),
        ({"settings": {"duration_s": 5.0}}, "settings.percentiles [50, 90] there, null now;"),
        ({"vs": "naive"}, 'vs null there, "naive" now;'),
        ({"items": [], "seed": 1}, 'items [{"artifact": "a", "sha256": "00"}] there, [] now and 1 more;'),
    ],
)
def test_a_file_of_another_measurement_is_refused_with_what_differs(place: Path, now: Any, text: str) -> None:
    CellFile(place, REQUEST).add(measured(Cell()))
    before = place.read_bytes()
    with pytest.raises(UsageError) as caught:
        CellFile(place, {**REQUEST, **now})
    assert str(caught.value) == (
        f"--out {place}: it holds another measurement: {text} give another --out, or remove that file"
    )
    assert place.read_bytes() == before


def test_what_differs_is_told_in_one_short_line(place: Path) -> None:
    CellFile(place, {"items": ["x" * 500]}).add(measured(Cell()))
    with pytest.raises(UsageError) as caught:
        CellFile(place, {"items": ["y\n" * 500]})
    assert len(str(caught.value)) < 400 + len(str(place)) and "\n" not in str(caught.value)


def test_what_cannot_be_written_leaves_the_file_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CellFile(place, REQUEST)
    kept.add(measured(Cell()))
    before = place.read_bytes()
    monkeypatch.setattr(sweep, "MAX_FILE_BYTES", 500)
    with pytest.raises(OutputError, match=r"0 MiB with this cell, at most 0; its earlier cells are kept"):
        kept.add(measured(Cell(threads=2)))
    assert place.read_bytes() == before
    with pytest.raises(ValueError, match="JSON"):
        kept.add(measured(Cell(threads=3), extra=float("nan")))
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == ["sweep.json"]


def test_a_place_that_is_not_there_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is no directory; make it"):
        CellFile(tmp_path / "gone" / "sweep.json", REQUEST)
    with pytest.raises(InputError, match="not a file; expected one that `edgevit bench --out` wrote"):
        CellFile(tmp_path, REQUEST)


def test_without_a_file_the_cells_are_kept_in_memory() -> None:
    kept = CellFile(None, REQUEST)
    kept.add(measured(Cell()))
    assert kept.get(record(Cell(), ["a"])) is not None
    assert set(kept.document()) == {"schema_version", "kind", "request", "cells"}


# ---- anyone's file

Edit = Callable[[dict[str, Any]], object]
DAMAGE: dict[str, tuple[Edit, str]] = {
    "another kind": (lambda d: d.update(kind="gate"), "kind is not 'bench'"),
    "another version": (lambda d: d.update(schema_version=2), "schema_version is not 1"),
    "a version that is true": (lambda d: d.update(schema_version=True), "schema_version is not 1"),
    "no request": (lambda d: d.pop("request"), "request or cells is missing"),
    "cells by name": (lambda d: d.update(cells={}), "request or cells is missing"),
    "a cell that is none": (lambda d: d["cells"].append(3), "cell 2 of 2 lacks a field"),
    "a cell twice": (lambda d: d["cells"].append(d["cells"][0]), "a cell is there twice"),
    "no results": (lambda d: d["cells"][0].pop("results"), "cell 1 of 1 lacks a field"),
    "a result that is none": (lambda d: d["cells"][0]["results"].append(None), "cell 1 of 1"),
    "no name": (lambda d: d["cells"][0]["results"][0].pop("name"), "cell 1 of 1"),
    "a percentile of no number": (
        lambda d: d["cells"][0]["results"][0].update(latency_text={"px": "1"}),
        "cell 1 of 1",
    ),
    "a latency of no text": (lambda d: d["cells"][0]["results"][0].update(latency_text={"p50": 1}), "cell 1 of 1"),
    "times of no number": (lambda d: d["cells"][0]["results"][0].update(samples_ms=["1"]), "cell 1 of 1"),
    "a verdict of no text": (lambda d: d["cells"][0]["comparisons"][0].update(verdict=[]), "cell 1 of 1"),
    "warnings of no text": (lambda d: d["cells"][0].update(warnings=[{}]), "cell 1 of 1"),
    "changes of no text": (lambda d: d["cells"][0].update(changes=["load"]), "cell 1 of 1"),
    "an axis more": (lambda d: d["cells"][0]["cell"].update(streams=1), "cell 1 of 1"),
    "no axes": (lambda d: d["cells"][0].update(cell={}), "cell 1 of 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_document_of_another_form_is_refused_in_one_line(place: Path, damage: str) -> None:
    CellFile(place, REQUEST).add(measured(Cell()))
    document = json.loads(place.read_text())
    edit, text = DAMAGE[damage]
    edit(document)
    place.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read(place)
    assert str(caught.value).startswith(f"{place}: not what `edgevit bench --out` writes ({text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"schema_version": 1, "kind": "bench", "cells": [',
        b'{"schema_version": 1, "kind": "bench", "request": {"x": NaN}, "cells": []}',
        b'{"schema_version": 1, "kind": "bench", "request": {"x": -Infinity}, "cells": []}',
        b'{"schema_version": 1, "kind": "bench", "request": {"x": 1e999}, "cells": []}',
        b'{"schema_version": 1, "kind": "bench", "request": {"x": ' + b"9" * 5000 + b'}, "cells": []}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=["empty", "no text", "cut off", "nan", "infinity", "too large", "a huge integer", "deep lists", "deep objects"],
)
def test_what_is_no_json_is_refused_in_one_line(place: Path, data: bytes) -> None:
    place.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read(place)
    assert str(caught.value) == f"{place}: not JSON, or cut off; remove it, or give another file"


@pytest.mark.parametrize("data", [b"null", b"[]", b"3", b'"bench"', b"{}"])
def test_json_of_another_kind_is_refused(place: Path, data: bytes) -> None:
    place.write_bytes(data)
    with pytest.raises(InputError, match="kind is not 'bench'"):
        read(place)


def test_a_file_too_large_is_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CellFile(place, REQUEST).add(measured(Cell()))
    monkeypatch.setattr(sweep, "MAX_FILE_BYTES", 100)
    with pytest.raises(InputError, match="larger than 0 MiB"):
        read(place)


def test_a_huge_integer_among_the_times_is_no_traceback(place: Path) -> None:
    CellFile(place, REQUEST).add(measured(Cell()))
    place.write_text(place.read_text().replace("[1.25, 1]", "[" + "1" * 400 + "]"))
    assert len(str(read(place)["cells"][0]["results"][0]["samples_ms"][0])) == 400
