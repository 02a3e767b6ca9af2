"""OpenVINO: the precision that runs, the runtime contract's corners, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.ov import OvRuntime


def test_equals_onnx_runtime_in_float32(tiny: Any) -> None:
    path: Path = tiny.export(batch="dynamic").model_file
    with Session(OvRuntime(path, 1)) as ours, Session(OrtRuntime(path, 1)) as theirs:
        assert ours.runtime.effective_precision == "fp32"  # on processors with bfloat16 OpenVINO would take that
        assert [spec.name for spec in ours.runtime.inputs] == [spec.name for spec in theirs.runtime.inputs]
        assert ours.runtime.inputs[0].shape[1:] == theirs.runtime.inputs[0].shape[1:]
        for batch in (1, 3):
            _, *size = theirs.runtime.inputs[0].shape
            image = np.random.default_rng(batch).standard_normal((batch, *map(int, size))).astype(np.float32)
            feed = {"image": image}
            np.testing.assert_allclose(ours.run(feed)["logits"], theirs.run(feed)["logits"], rtol=0, atol=1e-4)
        assert ours.runtime.describe()["threads"] == 1


def test_outputs_are_the_callers_to_keep(tiny: Any) -> None:
    with Session(OvRuntime(tiny.export().model_file, 1)) as session:
        shape = [int(d) for d in session.runtime.inputs[0].shape]
        first = session.run({"image": np.zeros(shape, np.float32)})["logits"]
        kept = first.copy()
        session.run({"image": np.ones(shape, np.float32)})
        assert np.array_equal(first, kept)


def test_what_is_no_model_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(b"junk")
    with pytest.raises(RuntimeFailure, match=r"junk\.onnx: OpenVINO cannot load it"), Session(OvRuntime(path)):
        pass


def test_a_runtime_that_is_not_loaded_says_so(tmp_path: Path) -> None:
    runtime = OvRuntime(tmp_path / "model.onnx")
    runtime.close()  # closing what was never loaded is no failure
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime.describe()
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime.run({})
