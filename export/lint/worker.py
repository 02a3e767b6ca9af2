"""Shape inference in a process of its own: `python -m edgevit.export.lint.worker`, a model in and a model out."""

from __future__ import annotations

import sys

import onnx

from .reading import infer

if __name__ == "__main__":
    model = onnx.ModelProto()
    model.ParseFromString(sys.stdin.buffer.read())
    sys.stdout.buffer.write(infer(model).SerializeToString())
