"""What the runtimes make of attention, read off the graphs that they execute, not off the file that they were given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import openvino as ov
import pytest

from edgevit import api

BLOCKS = {"swin_tiny": 5, "crossformer_tiny": 5, "vit_lsla_tiny": 5, "vit_reference_tiny": 4}
PUBLISHED = {"swin_t": 12, "crossformer_t": 16}  # at a small size; the others have more of the small ones' blocks


@pytest.fixture(scope="module", params=[*BLOCKS, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A network's name and its ONNX file."""
    size = (64, 64) if request.param in PUBLISHED else (224, 224)
    artifact = api.export_model(request.param, "onnx", image_size=size, out=tmp_path_factory.mktemp("fusion"))
    return request.param, artifact.model_file


def executed_by_onnxruntime(path: Path, folder: Path) -> Counter[str]:
    """Operators of the graph after all of ONNX Runtime's optimisations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns that such a graph is for this machine only, which is what is asked for
    options.optimized_model_filepath = str(folder / "executed.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(node.op_type for node in graph.node)


def executed_by_openvino(path: Path) -> Counter[str]:
    """Kinds of the nodes that OpenVINO's CPU plugin executes."""
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds: list[Any] = [node.get_rt_info()["layerType"] for node in compiled.get_runtime_model().get_ordered_ops()]
    return Counter(kind if isinstance(kind, str) else kind.astype(str) for kind in kinds)


def test_onnxruntime_runs_each_attention_as_one_kernel(exported: tuple[str, Path], tmp_path: Path) -> None:
    name, path = exported
    blocks = (BLOCKS | PUBLISHED)[name]
    executed = executed_by_onnxruntime(path, tmp_path)
    if not name.startswith("vit_lsla"):
        assert executed["Attention"] == blocks
        assert executed["Softmax"] == executed["MatMul"] == executed["FusedMatMul"] == 0
    else:  # its scale and outer bias are in no attention operator: two products, a pass each for scale and both biases
        assert executed["Attention"] == 0
        assert executed["Softmax"] == executed["Mul"] == blocks
        assert executed["MatMul"] + executed["FusedMatMul"] == 2 * blocks


def test_openvino_runs_each_attention_as_one_subgraph(exported: tuple[str, Path]) -> None:
    """Its plugin compiles product, bias, softmax and product into one kernel; LSLA's scale and outer bias as well."""
    name, path = exported
    executed = executed_by_openvino(path)
    assert executed["Softmax"] == executed["MatMul"] == 0
    assert executed["Subgraph"] + executed["ScaledDotProductAttention"] >= (BLOCKS | PUBLISHED)[name]
