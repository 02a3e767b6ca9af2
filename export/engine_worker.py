"""The process that NVIDIA's parser and builder run in: they are native code, and what they read may be a stranger's.

Started by `engine.py`: one JSON request on stdin, one JSON answer on stdout. What the libraries print goes to stderr.
It imports no torch and nothing of edgevit.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FIRST_STRONGLY_TYPED = 10  # major version of TensorRT; RTX counts its own from 1 and knows nothing else
MESSAGE_BYTES = 2000  # of one message; a builder's may hold a whole graph


def open_library(name: str) -> tuple[Any, Any]:
    """A TensorRT module and a logger that prints nothing: `errors` as text, `layers` as the builder lists them."""
    trt = importlib.import_module(name)

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]  # the class is known only when the library is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split())[:MESSAGE_BYTES])
            elif message.startswith("Layers:"):
                self.layers.append(message)

    return trt, Listener()


def parse(trt: Any, listener: Any, model: Path, *, alone: bool) -> tuple[Any, Any, list[dict[str, str]]]:
    """Builder, network, and what the parser refused; `alone` reads no file beside the model's."""
    builder = trt.Builder(listener)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, listener)
    good = parser.parse(model.read_bytes()) if alone else parser.parse_from_file(str(model))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [
        # The description alone may be the word "false"; the code says what kind of refusal it is.
        {
            "node": error.node_name(),
            "operator": error.node_operator(),
            "text": f"{error.code().name.lower().replace('_', ' ')}: {error.desc()}"[:MESSAGE_BYTES],
        }
        for error in errors
    ]
    if not good and not found:
        found = refusal((listener.errors or ["no reason given"])[0])
    if not found and network.num_outputs == 0:
        found = refusal("the file holds no graph with outputs")  # as a file of zeros does, which parses
    return builder, network, found


def build(trt: Any, listener: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Parse, build and write the engine; the answer has `errors` or what was built."""
    started = time.perf_counter()
    builder, network, errors = parse(trt, listener, Path(request["model"]), alone=False)
    if errors:
        return {"errors": errors}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that a runtime can tell each layer's precision
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and it drops 13 bits of every float32 product
    if request["gpus"]:
        config.num_compute_capabilities = len(request["gpus"])
        for index, gpu in enumerate(request["gpus"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index)
    if request["max_batch"]:
        add_profile(builder, network, config, request["max_batch"])
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"errors": refusal((listener.errors or ["the builder gave no reason"])[0])}
    target = Path(request["engine"])
    partial = target.with_name(f"{target.name}.part")
    try:
        partial.write_bytes(memoryview(engine))
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        return {"errors": refusal(f"{target} cannot be written: {error.strerror}")}
    return {
        "errors": [],
        "version": trt.__version__,
        "size_bytes": target.stat().st_size,
        "seconds": time.perf_counter() - started,
        "layers": listener.layers[0] if listener.layers else None,
    }


def add_profile(builder: Any, network: Any, config: Any, largest: int) -> None:
    """One optimisation profile: a batch from 1 to `largest`, tuned for 1, as a device that waits for a picture has."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *rest), (1, *rest), (largest, *rest))
    config.add_optimization_profile(profile)


def refusal(text: str) -> list[dict[str, str]]:
    """One reason that belongs to no node."""
    return [{"node": "", "operator": "", "text": text}]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `engine.py` asked: "parse" or "build"."""
    trt, listener = open_library(request["library"])
    major = int(trt.__version__.split(".")[0])
    if request["library"] == "tensorrt" and major < FIRST_STRONGLY_TYPED:
        return {
            "errors": refusal(f"version {trt.__version__} has no strongly typed networks, expected 10; use build.sh")
        }
    try:
        if request["task"] == "parse":
            return {"errors": parse(trt, listener, Path(request["model"]), alone=True)[2], "version": trt.__version__}
        return build(trt, listener, request)
    except Exception as error:  # pybind reports a failed constructor as a TypeError; the log has the reason
        return {"errors": refusal((listener.errors or [f"{type(error).__name__}: {error}"])[0])}


def main() -> None:
    """Answer one request."""
    stdout = os.dup(1)
    os.dup2(2, 1)  # what a native library prints must not end up in the answer
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash on a stranger's file leaves no dump
    reply = json.dumps(answer(json.loads(sys.stdin.read())))
    with os.fdopen(stdout, "w", encoding="utf-8") as stream:
        stream.write(reply)


if __name__ == "__main__":
    main()
