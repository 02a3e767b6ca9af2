"""Numbers that hold up: times raced fairly, intervals from rounds, the machine they were taken on, operations counted.

The public names live in their files: `timing`, `stats`, `cautions`, `machine`, `complexity`. None is imported here, so
that a race needs neither torch nor onnx.
"""

if __name__ != "edgevit.bench":
    raise ImportError("this folder is the package edgevit.bench: import that name")
