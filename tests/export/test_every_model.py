"""Every registered network by its name, from random weights to a graph that ONNX Runtime finds equal.

One network of each family that has no golden case runs always, the rest with `-m slow`: up to a minute and 4 GB each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from edgevit import api
from edgevit.registry import model_names

ALWAYS = {"crossformer_s", "vit_lsla"}  # about 10 s each; `test_to_onnx.py` exports the golden cases of all others
NODES = {"swin_t": 350, "crossformer_s": 350}  # operators at 224x224; plain export leaves 544 and 599


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in model_names()]
)
def test_export(name: str, tmp_path: Path) -> None:
    artifact = api.export_model(name, "onnx", out=tmp_path)
    parity = artifact.manifest["parity"]
    assert parity["passed"] and parity["top1_agreement"] == 1.0
    certificates = artifact.manifest["certificates"]
    assert certificates and all(c["max_rel"] < 1e-9 and c["input_independent"] for c in certificates)
    graph = onnx.load(artifact.model_file).graph
    assert len(graph.node) <= NODES.get(name, len(graph.node))
    api.verify(artifact.path)
    shutil.rmtree(artifact.path)  # up to 430 MB


def test_the_names_are_registered() -> None:
    assert set(model_names()) >= ALWAYS | set(NODES)
