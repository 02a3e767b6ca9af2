"""Nodes named after the modules they came from, so that profiles, recipes and sensitivities speak of the network."""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter notes the modules that a node came from


def name_by_module(graph: ir.Model) -> None:
    """Name each node after the module it came from: `blocks.0.attn.q/linear_3` in place of `node_linear_3`.

    The names live on in the IR, so that a profile says which part of the network takes the time.
    """
    for node in graph.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        module = scopes[-2] if len(scopes) > 1 else ""
        if node.name is not None and module:
            node.name = f"{module}/{node.name.removeprefix('node_')}"
