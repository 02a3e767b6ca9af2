"""Several callers of one loaded model at the same time, and loading that does nothing but load."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session
from edgevit.runtimes.fake import FakeRuntime
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.ov import OvOptions, OvRuntime

CALLERS, TURNS = 4, 20


def ort(path: Path) -> OrtRuntime:
    return OrtRuntime(path, 1)


def ov(path: Path) -> OvRuntime:
    return OvRuntime(path, 2, options=OvOptions(streams=2))


@pytest.fixture
def path(tiny: Any) -> Path:
    """The ONNX file of the tiny network, batch 1."""
    return Path(tiny.export().model_file)


def pictures(session: Session, seed: int) -> dict[str, NDArray[np.float32]]:
    shape = [int(side) for side in session.runtime.inputs[0].shape]
    return {"image": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("make", [ort, ov])
def test_callers_at_the_same_time_get_each_their_own_outputs(make: Callable[[Path], Any], path: Path) -> None:
    with Session(make(path)) as session:
        feeds = [pictures(session, seed) for seed in range(CALLERS)]
        expected = [session.run(feed)["logits"].copy() for feed in feeds]
        gate, wrong = threading.Barrier(CALLERS), list[str]()

        def work(index: int) -> None:
            lane = session.runtime.lane()  # type: ignore[attr-defined]  # not every runtime has lanes
            gate.wait(60)
            found = [lane(feeds[index])["logits"] for _ in range(TURNS)]
            if not all(np.array_equal(each, expected[index]) for each in found):
                wrong.append(f"caller {index}")

        threads = [threading.Thread(target=work, args=(index,)) for index in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("make", [ort, ov])
def test_what_a_lane_returns_is_the_callers_to_keep(make: Callable[[Path], Any], path: Path) -> None:
    with Session(make(path)) as session:
        lane = session.runtime.lane()  # type: ignore[attr-defined]  # not every runtime has lanes
        first, second = pictures(session, 1), pictures(session, 2)
        kept = lane(first)["logits"]
        before, fed = kept.copy(), first["image"].copy()
        lane(second)
        np.testing.assert_array_equal(kept, before)
        np.testing.assert_array_equal(first["image"], fed)


@pytest.mark.parametrize("make", [ort, ov])
def test_a_lane_needs_a_loaded_model(make: Callable[[Path], Any], path: Path) -> None:
    runtime = make(path)
    with pytest.raises(RuntimeFailure, match="is not loaded"):
        runtime.lane()
    with Session(runtime) as session:
        feed, lane = pictures(session, 0), runtime.lane()
    with pytest.raises(RuntimeFailure, match="is not loaded"):
        lane(feed)


@pytest.mark.parametrize("make", [ort, ov])
def test_a_lane_that_is_fed_nonsense_says_so_in_one_line(make: Callable[[Path], Any], path: Path) -> None:
    with Session(make(path)) as session:
        lane = session.runtime.lane()  # type: ignore[attr-defined]  # not every runtime has lanes
        with pytest.raises(RuntimeFailure) as caught:
            lane({"image": np.zeros((1, 3, 5, 7), np.float32)})
        assert "\n" not in str(caught.value)
        assert np.isfinite(lane(pictures(session, 0))["logits"]).all()  # and it goes on


def test_the_fake_runtime_is_called_by_its_script() -> None:
    runtime = FakeRuntime(lambda inputs: {"logits": inputs["image"] + 1})
    assert runtime.lane()({"image": np.zeros(2)})["logits"].tolist() == [1, 1]
    assert runtime.calls == ["lane", "run"]


RUNS = """
import sys
from pathlib import Path
import numpy as np
from edgevit import registry
from edgevit.runtimes import Session

path, name = sys.argv[1:]
with Session(registry.runtime_class(name)(Path(path), 1)) as session:
    shape = [int(side) for side in session.runtime.inputs[0].shape]
    session.run({"image": np.zeros(shape, np.float32)})
    print("onnx" in sys.modules, "torch" in sys.modules)
    print(session.runtime.effective_precision)
"""


@pytest.mark.parametrize("name", ["ort", "ov"])
def test_a_process_that_only_runs_a_model_loads_no_more_than_its_runtime(
    name: str, path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """Start-up and memory are then the runtime's own; the precision is still told where it is asked for."""
    out, err = started("-c", RUNS, path, name).communicate(timeout=120)
    assert out.split() == ["False", "False", "fp32"], err


def test_the_precision_is_looked_up_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.runtimes import ort_graph

    asked = []
    true = ort_graph.weights_precision
    monkeypatch.setattr(ort_graph, "weights_precision", lambda file: asked.append(file) or true(file))  # type: ignore[func-returns-value]  # append returns None
    with Session(ort(path)) as session:
        assert asked == []
        assert [session.runtime.effective_precision for _ in range(3)] == ["fp32"] * 3
    assert asked == [path]


def test_the_precision_of_a_model_that_is_not_loaded_is_unknown(path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="is not loaded"):
        assert ort(path).effective_precision


def test_a_file_that_vanished_or_was_damaged_after_loading_is_told_in_one_line(path: Path) -> None:
    with Session(ort(path)) as session:
        path.write_bytes(b"no model")
        with pytest.raises(RuntimeFailure, match="not a readable ONNX model") as caught:
            assert session.runtime.effective_precision
    assert "\n" not in str(caught.value)
