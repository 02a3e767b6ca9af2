"""Every registered network by its name, from random weights to a graph that ONNX Runtime finds equal.

A network of the one family that has no golden case runs always, the rest with `-m slow`: up to a minute and 4 GB each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from edgevit import api
from edgevit.registry import family_of, model_names

SAME = {"vit_tiny", "vit_small", "vit_base"}  # as deit_tiny, deit_small and deit_base, with other weights
ALWAYS = {"vit_lsla_tiny"}  # `test_to_onnx.py` exports the golden cases of all others
NODES = {"swin_t": 350, "crossformer_s": 350}  # operators at 224x224; plain export leaves 544 and 599


@pytest.mark.parametrize(
    "name",
    [
        name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
        for name in model_names()
        if name not in SAME
    ],
)
def test_export(name: str, tmp_path: Path) -> None:
    artifact = api.export_model(name, "onnx", out=tmp_path)
    parity = artifact.manifest["parity"]
    assert parity["passed"] and parity["top1_agreement"] == 1.0
    certificates = artifact.manifest["certificates"]
    assert certificates and all(c["max_rel"] < 1e-9 and c["input_independent"] for c in certificates)
    changes = [c["macs_after"] - c["macs_before"] for c in certificates]
    assert artifact.manifest["complexity"]["macs"] == family_of(name)[1].CARDS[name].macs + sum(changes)
    graph = onnx.load(artifact.model_file).graph
    assert len(graph.node) <= NODES.get(name, len(graph.node))
    api.verify(artifact.path)
    shutil.rmtree(artifact.path)  # up to 430 MB


def test_the_names_are_registered() -> None:
    assert set(model_names()) >= ALWAYS | SAME | set(NODES)


def test_what_is_left_out_is_the_same_network() -> None:
    for name in SAME:
        ours, other = (family_of(each)[1].CARDS[each] for each in (name, name.replace("vit", "deit")))
        assert (ours.parameters, ours.macs, ours.image.size) == (other.parameters, other.macs, other.image.size)
