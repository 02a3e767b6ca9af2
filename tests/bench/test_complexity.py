"""Counts of hand-built graphs against numbers worked out by hand, and of Mobile-Former against its published tables."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgevit.bench.complexity import Moved, NodeCost, costs_by_node, count_module, count_onnx, macs_by_node
from edgevit.errors import ArtifactError, ExportError
from edgevit.models.mobile_former import CONFIGS, MobileFormer
from edgevit.specs import ModuleCount

Shape = tuple[int | str, ...]


def graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, Shape], output: Shape | None, **stored: np.ndarray
) -> onnx.ModelProto:
    """A float32 model with the output "y"; `stored` become initializers."""
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    return helper.make_model(made, opset_imports=opsets)


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("image", "weight", "attributes", "output", "macs"),
    [
        ((1, 3, 8, 8), (16, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}, (1, 16, 4, 4), 16 * 16 * 27),
        ((2, 8, 5, 5), (8, 1, 3, 3), {"group": 8}, (2, 8, 3, 3), 2 * 8 * 9 * 9),  # depthwise
        ((1, 8, 4, 4), (6, 4, 1, 1), {"group": 2}, (1, 6, 4, 4), 6 * 16 * 4),
        ((1, 4, 10), (2, 4, 3), {"dilations": [2]}, (1, 2, 6), 2 * 6 * 12),
        ((1, 1, 4, 4, 4), (1, 1, 2, 2, 2), {}, (1, 1, 3, 3, 3), 27 * 8),
    ],
)
def test_a_convolution_of_any_rank_and_group(
    image: Shape, weight: tuple[int, ...], attributes: dict[str, Any], output: Shape, macs: int
) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    count = count_onnx(graph([node], {"x": image}, output, w=zeros(*weight)))

    assert (count.macs, count.flops, count.macs_by_op) == (macs, 2 * macs, {"Conv": macs})
    assert count.unknown == {} and count.not_counted == {} and count.notes == ()


@pytest.mark.parametrize(
    ("transposed", "a", "b"),
    [((0, 0), (2, 3), (3, 5)), ((1, 0), (3, 2), (3, 5)), ((0, 1), (2, 3), (5, 3)), ((1, 1), (3, 2), (5, 3))],
)
def test_a_gemm_with_either_side_transposed(
    transposed: tuple[int, int], a: tuple[int, int], b: tuple[int, int]
) -> None:
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], transA=transposed[0], transB=transposed[1])

    assert count_onnx(graph([node], {"x": a}, (2, 5), w=zeros(*b), c=zeros(5))).macs_by_op == {"Gemm": 2 * 5 * 3}


@pytest.mark.parametrize(
    ("a", "b", "output", "macs"),
    [
        ((2, 3), (3, 5), (2, 5), 30),
        ((4, 2, 3), (4, 3, 5), (4, 2, 5), 120),
        ((4, 1, 2, 3), (7, 3, 5), (4, 7, 2, 5), 28 * 30),  # broadcast on both sides
        ((3,), (3, 5), (5,), 15),
        ((3,), (3,), (), 3),
    ],
)
def test_a_matmul_batched_broadcast_or_of_vectors(a: Shape, b: Shape, output: Shape, macs: int) -> None:
    node = helper.make_node("MatMul", ["x", "z"], ["y"])

    assert count_onnx(graph([node], {"x": a, "z": b}, output)).macs_by_op == {"MatMul": macs}


def small_net(batch: int | str) -> onnx.ModelProto:
    """Conv, Relu, a reshape computed from the shape, and a MatMul whose weight serves twice."""
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["a"]),  # (n, 4, 6, 6)
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Shape", ["b"], ["s"]),  # (4,) int64
        helper.make_node("Gather", ["s", "zero"], ["n"]),  # (1,) int64
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),  # (3,) int64
        helper.make_node("Reshape", ["b", "target"], ["c"]),  # (n, 24, 6)
        helper.make_node("MatMul", ["c", "square"], ["d"]),
        helper.make_node("MatMul", ["d", "square"], ["e"]),
        helper.make_node("Softmax", ["e"], ["y"]),
    ]
    stored = {"kernel": zeros(4, 3, 3, 3), "square": zeros(6, 6)}
    index = {"zero": np.array([0]), "rest": np.array([24, 6])}
    return graph(nodes, {"image": (batch, 3, 8, 8)}, (batch, 24, 6), **stored, **index)


def test_every_figure_of_a_small_net() -> None:
    count = count_onnx(small_net(1))

    assert count.macs_by_op == {"Conv": 144 * 27, "MatMul": 2 * 144 * 6}
    assert (count.macs, count.flops) == (5616, 11232)
    assert count.parameters == 108 + 36  # the weight that serves twice is stored once
    assert count.weight_bytes == 4 * 144 + 8 * 3
    assert count.activation_bytes == 6 * 144 * 4 + 8 * (4 + 1 + 3)
    assert count.not_counted == {"Concat": 3, "Gather": 1, "Relu": 144, "Reshape": 144, "Shape": 4, "Softmax": 144}
    assert (count.unknown, count.notes) == ({}, ())


def test_a_dynamic_batch_counts_as_one_and_is_told() -> None:
    model = small_net("N")
    before = model.SerializeToString()
    count = count_onnx(model)

    assert count.notes == ("dynamic batch 'N' of input 'image' counted as 1",)
    assert (count.macs, count.activation_bytes) == (5616, 6 * 144 * 4 + 8 * 8)
    assert model.SerializeToString() == before


def test_shapes_that_an_exporter_wrote_for_a_dynamic_batch_are_inferred_anew() -> None:
    model = onnx.shape_inference.infer_shapes(small_net("N"))

    assert count_onnx(model).macs == 5616


def test_op_kinds_that_may_hide_a_product_are_listed_as_unknown() -> None:
    nodes = [
        helper.make_node("Einsum", ["x", "x"], ["a"], equation="ij,ij->ij"),
        helper.make_node("ConvTranspose", ["image", "w"], ["b"]),
        helper.make_node("Conv", ["a"], ["c"], domain="com.example"),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    count = count_onnx(graph(nodes, {"x": (2, 2), "image": (1, 1, 2, 2)}, (2, 2), w=zeros(1, 1, 2, 2)))

    assert count.unknown == {"ConvTranspose": 1, "Einsum": 1, "com.example.Conv": 1}
    assert (count.macs, count.not_counted) == (0, {"Relu": 4})
    assert count.notes == ("1 tensors of unknown size are in neither activation_bytes nor not_counted",)


def test_a_product_of_unknown_shape_names_its_node() -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], domain="com.example"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="proj"),
    ]
    with pytest.raises(ExportError) as caught:
        count_onnx(graph(nodes, {"x": (2, 3)}, (2, 5), w=zeros(3, 5)))
    assert str(caught.value) == (
        "MatMul node 'proj': the shape of 'a' is unknown, expected fixed numbers; export with a fixed image size to "
        "have its operations counted"
    )


def test_a_dynamic_picture_size_is_refused_with_the_shape_that_is_known() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    with pytest.raises(ExportError) as caught:
        count_onnx(graph([node], {"x": (1, 3, "h", "w")}, (1, 4, "oh", "ow"), w=zeros(4, 3, 3, 3)))
    assert str(caught.value) == (
        "Conv node 'y': the shape of 'y' is (1, 4, oh, ow), expected fixed numbers; export with a fixed image size to "
        "have its operations counted"
    )


def test_shapes_that_contradict_each_other_are_refused() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(ExportError, match=r"^graph 'net': shape inference failed: "):
        count_onnx(graph([node], {"x": (2, 4)}, (2, 5), w=zeros(3, 5)))


def test_what_depends_on_stored_tensors_alone_is_no_work_and_int8_weights_are_parameters() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "scale"], ["w"]),
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["x", "wt"], ["a"]),
        helper.make_node("Constant", [], ["bias"], value=numpy_helper.from_array(zeros(5))),
        helper.make_node("Add", ["a", "bias"], ["y"]),
    ]
    stored = {"w8": zeros(5, 3, dtype=np.int8), "scale": np.array(0.1, np.float32)}
    count = count_onnx(graph(nodes, {"x": (2, 3)}, (2, 5), **stored))

    assert count.not_counted == {"Add": 10}
    assert count.activation_bytes == 2 * 10 * 4
    assert count.parameters == 15 + 5  # not the scale
    assert count.weight_bytes == 15 + 4 + 5 * 4


def test_half_precision_and_four_bit_tensors_count_their_packed_bytes() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": (1,)}, (1,), half=zeros(4, dtype=np.float16))
    model.graph.initializer.append(helper.make_tensor("nibbles", TensorProto.INT4, (5,), [1, 2, 3, 4, 5]))

    assert (count_onnx(model).weight_bytes, count_onnx(model).parameters) == (8 + 3, 4)


def test_functions_that_a_model_brings_along_are_looked_into() -> None:
    body = [helper.make_node("MatMul", ["p", "q"], ["r"])]
    opsets = [helper.make_opsetid("", 20)]
    model = graph(
        [helper.make_node("Linear", ["x", "w"], ["y"], domain="com.example")], {"x": (2, 3)}, (2, 5), w=zeros(3, 5)
    )
    model.functions.append(helper.make_function("com.example", "Linear", ["p", "q"], ["r"], body, opsets))

    assert (count_onnx(model).macs, count_onnx(model).unknown) == (30, {})


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(small_net(1), path)

    assert count_onnx(path) == count_onnx(str(path)) == count_onnx(small_net(1))


@pytest.mark.parametrize("content", [None, b"", b"this is not a graph"])
def test_a_file_that_is_missing_or_not_onnx_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        count_onnx(path)
    assert str(caught.value).startswith(f"{path}: expected a readable ONNX file (")


def test_a_file_whose_weights_file_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(small_net(1), path, save_as_external_data=True, location="net.weights", size_threshold=100)
    assert count_onnx(path).parameters == 144
    (tmp_path / "net.weights").unlink()
    with pytest.raises(ArtifactError, match=r"net\.onnx: expected a readable ONNX file \("):
        count_onnx(path)


@pytest.mark.parametrize(
    ("name", "parameters", "macs_in_millions"),
    [
        ("mobileformer_26m", 3_232_788, 23.55),
        ("mobileformer_52m", 3_469_092, 49.29),
        ("mobileformer_96m", 4_585_252, 92.02),
        ("mobileformer_151m", 7_595_828, 146.25),
        ("mobileformer_214m", 9_425_920, 208.37),
        ("mobileformer_294m", 11_422_648, 286.73),
        ("mobileformer_508m", 13_976_976, 498.47),
    ],
)
def test_mobile_former_has_its_published_size(name: str, parameters: int, macs_in_millions: float) -> None:
    with torch.device("meta"):
        model = MobileFormer(CONFIGS[name])
    count = count_module(model, (224, 224))

    assert count.parameters == parameters
    assert round(count.macs / 1e6, 2) == macs_in_millions
    assert count.flops == 2 * count.macs


def test_a_real_run_counts_what_one_on_the_meta_device_counts() -> None:
    model = MobileFormer(CONFIGS["mobileformer_26m"])

    assert count_module(model, (64, 96)) == count_module(copy.deepcopy(model).to("meta"), (64, 96))


class Attention(nn.Module):
    """3 -> 8 channels by a 1x1 convolution, then attention over the positions; fused, or PyTorch's own layer."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.layer = None if fused else nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)  # n 3 h w -> n hw 8
        result: Tensor = nn.functional.scaled_dot_product_attention(x, x, x) if self.layer is None else self.layer(x)
        return result


@pytest.mark.parametrize(
    ("fused", "macs"),
    [
        (True, 16 * 24 + 2 * 16 * 16 * 8),
        (False, 16 * 24 + 16 * 8 * (24 + 8 + 16 + 16) + 2 * 16 * 16 * 8),  # q k v, projection, two of the MLP
    ],
)
def test_fused_attention_is_counted(fused: bool, macs: int) -> None:
    fast_path = torch.backends.mha.get_fastpath_enabled()

    assert count_module(Attention(fused=fused), (4, 4)).macs == macs
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_the_callers_module_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
    before = copy.deepcopy(model.state_dict())

    assert count_module(model, (5, 5)) == ModuleCount(parameters=120, macs=9 * 4 * 27, flops=2 * 9 * 4 * 27)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("query", "key", "value", "output", "macs"),
    [
        ((2, 5, 12), (2, 7, 12), (2, 7, 12), (2, 5, 12), 2 * 5 * 7 * 24),  # (b, n, heads * d), 3 heads of 4
        ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (2, 3, 5, 6), 2 * 3 * 5 * 7 * 10),  # v wider than q
    ],
)
def test_attention_counts_both_products(query: Shape, key: Shape, value: Shape, output: Shape, macs: int) -> None:
    heads = {"q_num_heads": 3, "kv_num_heads": 3} if len(query) == 3 else {}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **heads)
    model = graph([node], {"q": query, "k": key, "v": value}, output)
    model.opset_import[0].version = 23

    count = count_onnx(model)

    assert (count.macs, count.macs_by_op, count.unknown) == (macs, {"Attention": macs}, {})


# ---- what each node computes and moves


def test_a_node_reads_its_weights_and_what_was_computed_and_writes_what_it_makes() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("Add", ["a", "b"], ["y"]),  # without a name
    ]
    made = graph(nodes, {"x": ("batch", 3)}, ("batch", 5), w=zeros(3, 5), b=zeros(5))
    for batch in (1, 4):
        assert costs_by_node(made, batch) == {
            "product": NodeCost(
                15 * batch,
                (Moved("x", 3 * batch, 32, stored=False), Moved("w", 15, 32, stored=True)),
                (Moved("a", 5 * batch, 32, stored=False),),
            ),
            "y": NodeCost(
                0,
                (Moved("a", 5 * batch, 32, stored=False), Moved("b", 5, 32, stored=True)),
                (Moved("y", 5 * batch, 32, stored=False),),
            ),
        }
    assert macs_by_node(made) == {"product": 15}


def test_what_is_seen_otherwise_is_not_moved_and_keeps_its_name() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "relu"),
        helper.make_node("Flatten", ["a"], ["b"], "flat"),
        helper.make_node("Identity", ["b"], ["c"], "same"),
        helper.make_node("MatMul", ["c", "w"], ["y"], "product"),
    ]
    costs = costs_by_node(graph(nodes, {"x": (1, 2, 3)}, (1, 5), w=zeros(6, 5)))
    assert costs["flat"] == costs["same"] == NodeCost(0, (), ())
    assert costs["product"].reads[0] == Moved("a", 6, 32, stored=False)


def test_int8_operands_are_as_large_as_they_are_stored() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "relu"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"], "weight"),
        helper.make_node("Transpose", ["v"], ["t"], "turned"),
        helper.make_node("MatMul", ["d", "t"], ["y"], "product"),
    ]
    stored = {"s": np.float32(1), "z": np.uint8(0), "w": zeros(5, 3, dtype=np.int8)}
    costs = costs_by_node(graph(nodes, {"x": (2, 3)}, (2, 5), **{k: np.asarray(v) for k, v in stored.items()}))
    assert set(costs) == {"relu", "quantize", "dequantize", "product"}  # what is stored is made once
    assert costs["product"].reads == (Moved("d", 6, 8, stored=False), Moved("t", 15, 8, stored=True))
    assert costs["relu"].writes == (Moved("a", 6, 8, stored=False),)  # no other reads it wide
    assert [tensor.size_bytes(32) for tensor in costs["product"].reads] == [6, 15]


def test_what_is_read_wide_as_well_is_written_wide() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "relu"),
        helper.make_node("QuantizeLinear", ["a", "s"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], "dequantize"),
        helper.make_node("Add", ["d", "a"], ["y"], "add"),
    ]
    costs = costs_by_node(graph(nodes, {"x": (2, 3)}, (2, 3), s=np.asarray(np.float32(1))))
    assert costs["relu"].writes == (Moved("a", 6, 32, stored=False),)


def test_of_a_table_only_the_rows_that_are_taken_are_read() -> None:
    node = helper.make_node("Gather", ["w", "i"], ["g"], "take")
    made = graph(
        [node, helper.make_node("Add", ["g", "x"], ["y"], "add"), helper.make_node("Cast", ["x"], ["i2"], to=7)],
        {"x": (2, 4)}, (2, 4), w=zeros(1000, 4), i=np.array([1, 2]),
    )  # fmt: skip
    assert "take" not in costs_by_node(made)  # table and rows are stored: taken once
    del made.graph.initializer[1]
    made.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, [2]))
    assert costs_by_node(made)["take"].reads[0] == Moved("w", 8, 32, stored=True)


def test_nodes_of_one_name_count_together_and_unknown_sizes_are_left_out() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "twice"),
        helper.make_node("MatMul", ["a", "w"], ["b"], "twice"),
        helper.make_node("Odd", ["b"], ["c"], "odd", domain="com.example"),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    costs = costs_by_node(graph(nodes, {"x": (2, 3)}, None, w=zeros(3, 3)))
    assert costs["twice"].macs == 36 and len(costs["twice"].reads) == 4
    assert costs["odd"].writes == () == costs["relu"].reads


def test_moved_bytes_are_halved_by_a_narrow_run_and_never_widened() -> None:
    assert Moved("x", 10, 32, stored=False).size_bytes(16) == 20
    assert Moved("x", 10, 8, stored=False).size_bytes(16) == 10
    assert Moved("x", 3, 4, stored=True).size_bytes(32) == 1.5
