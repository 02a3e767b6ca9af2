"""The layers of a TensorRT engine, read from the forms of TensorRT 8 to 11 and from a builder's log."""

from __future__ import annotations

from typing import Any

import pytest

from edgevit.engine_layers import EngineLayer, read_layer, read_lines, type_of

FP16, FP32, INT8 = "Row major linear FP16 format", "Row major linear FP32", "Thirty-two wide ... row major Int8 format"


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        (FP32, "fp32"), (FP16, "fp16"), (INT8, "int8"), ("Float", "fp32"), ("Half", "fp16"), ("BFloat16", "bf16"),
        ("BF16", "bf16"), ("Row major linear BF16 format", "bf16"), ("Int8", "int8"), ("FP8", "fp8"), ("INT4", "int4"),
        ("FP4", "fp4"), ("FP4E2M1", "fp4"), ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Int32", None), ("Row major INT64 format", None), ("UInt8", None), ("Bool", None),
        ("N/A due to dynamic shapes", None), ("", None), (None, None), (7, None), ({"a": 1}, None),
    ],
)  # fmt: skip
def test_a_type_is_read_from_every_spelling(text: Any, precision: str | None) -> None:
    assert type_of({"format/datatype": text}) == precision
    assert type_of({"Datatype": text, "Format": "Row major linear"}) == precision
    assert type_of({"DATA TYPE": text}) == precision


def row(name: str, kind: str, *inputs: str, **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": [{"Format/Datatype": text} for text in inputs], **more}


@pytest.mark.parametrize(
    ("given", "precision", "product", "attention"),
    [
        (row("conv", "CaskConvolution", FP32, FP16), "fp16", True, False),  # the sum it is added to is wider
        (row("conv", "CaskConvolution", INT8, FP16), "int8", True, False),
        (row("a", "CaskGemmConvolution", FP32, TacticName="sm80_xmma_tf32f32"), "tf32", True, False),
        (row("c", "CaskCorrelation", "Half"), "fp16", True, False),
        (row("node_conv_myl0_1", "correlation", "Half"), "fp16", True, False),
        (row("head", "Fc", "Half"), "fp16", True, False),
        (row("head", "FullyConnected", "FP8"), "fp8", True, False),
        (row("q", "gemm", "FP4E2M1"), "fp4", True, False),
        (row("a", "Other", "Half", ParameterType="Convolution"), "fp16", True, False),
        (row("__myl_FcAdd_myl0_9", "runtime_fusion", "BFloat16"), "bf16", True, False),
        (row("__myl_CastFc_myl0_9", "kgen", "Half"), "fp16", True, False),
        (row("_gemm_mha_v2_myl0_8", "kgen", "Float", "Half"), "fp16", True, True),
        (row("attn", "PluginV2", "Half", TacticName="fmha_v2_flash"), "fp16", True, True),
        (row("/Fc/Add", "kgen", "Float"), "fp32", False, False),
        (row("__myl_Face_myl0_1", "kgen", "Float"), "fp32", False, False),
        (row("/conv/Add_to_norm", "kgen", "Float"), "fp32", False, False),
        (row("to conv", "Reformat", "Float"), "fp32", False, False),
        (row("mha", "NoOp", "Float"), "fp32", False, False),
        (row("x", "Convert", "Float"), "fp32", False, False),
        (row("{ForeignNode[a...b]}", "Myelin", "Float"), None, True, False),
        (row("ids", "Gather", "Int32"), None, False, False),
    ],
)
def test_a_layer_is_told_from_its_kind_name_and_types(
    given: dict[str, Any], precision: str | None, product: bool, attention: bool
) -> None:
    upper = {key.upper(): value for key, value in given.items()}
    for found in (read_layer(given), read_layer(upper)):
        assert (found.precision, found.product, found.attention) == (precision, product, attention)


@pytest.mark.parametrize("wrong", [None, 3, "x", [], [3, None, "a"], {"a": 1}, [[{"Datatype": "Half"}]]])
def test_what_is_of_another_type_counts_as_absent(wrong: Any) -> None:
    assert read_layer({"Name": "a", "LayerType": "gemm", "Inputs": wrong}).precision is None
    assert read_layer({"Inputs": wrong, "Outputs": [{"Datatype": "Half"}]}).precision == "fp16"
    if not isinstance(wrong, str):
        assert read_layer(dict.fromkeys(("Name", "LayerType", "TacticName", "Metadata"), wrong)) == EngineLayer("")


def test_each_node_of_a_layer_is_named_once() -> None:
    metadata = "[ONNX Layer: a][ONNX Layer: b]\x1f[ONNX Layer: a] [Other: c]"
    assert read_layer({"Metadata": metadata}).origins == ("a", "b")


# What TensorRT for RTX 1.7 logs, shortened; 10 writes `Format/Datatype` and other fields between.
LOG = """Layers:
Name: c_myl0_1, LayerType: correlation, Inputs: [ { Name: r.1, Dimensions: [1,8,16,16], Datatype: Half, Format: (NHWC) \
Channel major format }], Constants: [ { Name: k, Dimensions: [1], Datatype: Float, Format: (Linear) Row major }], \
Outputs: [ { Name: o, Dimensions: [1], Datatype: Half }], TacticName: __myelin_CASK_STUB, StreamId: 0, \
Metadata: [ONNX Layer: node_c]\x1e[ONNX Layer: node_r]
Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: i, Location: Device, \
Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: o, Format/Datatype: Half }], \
ParameterType: Convolution, Kernel: [3,3], TacticName: xmma_tf32, Metadata:
Name: none, LayerType: kgen
Name:\x20

I/O Tensors:
 Name: image, IOMode: Input, DataType: Half"""


def test_a_builders_log_is_read_like_the_json() -> None:
    first, second, third, last = read_lines(LOG)
    assert first == EngineLayer("c_myl0_1", "correlation", "fp16", True, False, ("node_c", "node_r"))
    assert second == EngineLayer("conv", "CaskConvolution", "tf32", True)
    assert (third, last) == (EngineLayer("none", "kgen"), EngineLayer(""))
    assert read_lines("") == read_lines("Layers:\n") == ()


def test_a_hostile_log_is_read_in_linear_time() -> None:
    line = "Name: " + ", Inputs: " * 20_000 + "Datatype: " * 20_000
    assert read_lines(line) == (EngineLayer(""),)
