"""Core ML packages that are damaged or hostile: one line that names the file, and nothing read outside the package."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import mil_package
from edgevit.runtimes.mil_package import KINDS, Kind, Weights, read_package, unpacked
from edgevit.runtimes.mil_reference import MilReference

import coremltools as ct  # isort: skip  # after the interpreter, which silences what its import says
from coremltools.converters.mil import Builder as mb  # noqa: N813  # isort: skip  # the name in Apple's own examples
from coremltools.proto import Model_pb2  # isort: skip  # as above

PROGRAM, BLOB = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
FLOAT = KINDS[11]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a weight file: linear, relu."""
    path = tmp_path_factory.mktemp("whole") / "model.mlpackage"
    weight = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    program = mb.program(input_specs=[mb.TensorSpec(shape=(1, 64))], opset_version=ct.target.iOS17)(
        lambda x: mb.relu(x=mb.linear(x=x, weight=weight, name="product"), name="result")
    )
    model = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32, skip_model_load=True,
    )  # fmt: skip
    model.save(str(path))
    return path


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model.mlpackage"))


def loaded_and_run(runtime: MilReference) -> None:
    runtime.load()
    runtime.run({"x": np.ones((1, 64), np.float32)})


def failure(path: Path) -> str:
    """The one line that loading and running it ends with."""
    runtime = MilReference(path)
    with pytest.raises(RuntimeFailure) as caught:
        loaded_and_run(runtime)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_whole_package_runs(package: Path) -> None:
    runtime = MilReference(package)
    runtime.load()
    (result,) = runtime.run({"x": np.eye(64, dtype=np.float32)[:1]}).values()
    np.testing.assert_array_equal(result, np.arange(0, 64 * 64, 64, dtype=np.float32)[None])


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        file = package / "Manifest.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))

    return damage


def root_path(text: str) -> Callable[[Path], None]:
    return manifest(lambda m: m["itemInfoEntries"][m["rootModelIdentifier"]].update(path=text))


def text(content: str) -> Callable[[Path], None]:
    return lambda package: (package / "Manifest.json").write_text(content) and None


def linked(package: Path) -> None:
    """The program is a link to a file beside the package."""
    outside = package.parent / "outside.mlmodel"
    (package / PROGRAM).rename(outside)
    (package / PROGRAM).symlink_to(outside)


FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no package", shutil.rmtree, "no such package"),
    ("a file", lambda p: (shutil.rmtree(p), p.write_text("x")), "no such package"),
    ("no manifest", lambda p: (p / "Manifest.json").unlink(), "has no file 'Manifest.json'"),
    ("no JSON", text("{"), "not JSON"),
    ("deep JSON", text("[" * 100_000), "not JSON"),
    ("huge number", text('{"a": 1' + "0" * 10_000 + "}"), "not JSON"),
    ("no object", text("[1]"), "expected a JSON object"),
    ("no UTF-8", lambda p: (p / "Manifest.json").write_bytes(b'{"\xff": 1}'), "not JSON"),
    ("huge manifest", text(" " * ((1 << 20) + 1)), "more than 1 MB"),
    ("no root", manifest(lambda m: {"itemInfoEntries": m["itemInfoEntries"]}), "names no root model"),
    ("entries no object", manifest(lambda m: {**m, "itemInfoEntries": [1]}), "names no root model"),
    ("path no text", root_path(7), "names no root model"),  # type: ignore[arg-type]  # that is the damage
    ("empty path", root_path(""), "leads out of the package"),
    ("parent", root_path("../../../etc/passwd"), "leads out of the package"),
    ("inner parent", root_path("com.apple.CoreML/../../../x"), "leads out of the package"),
    ("absolute", root_path("/etc/passwd"), "leads out of the package"),
    ("null character", root_path("a\0b"), "embedded null"),
    ("long name", root_path("a" * 5000), "name too long"),
    ("folder", root_path("com.apple.CoreML"), "has no file"),
    ("link out", linked, "leads out of the package"),
    ("circle", lambda p: ((p / PROGRAM).unlink(), (p / PROGRAM).symlink_to(p / PROGRAM)), "model.mlmodel"),
    ("no program", lambda p: (p / PROGRAM).unlink(), "has no file"),
    ("garbage program", lambda p: (p / PROGRAM).write_bytes(b"\xff" * 1000), "not a Core ML model"),
    ("cut program", lambda p: (p / PROGRAM).write_bytes((p / PROGRAM).read_bytes()[:-100]), "not a Core ML model"),
    ("empty program", lambda p: (p / PROGRAM).write_bytes(b""), "holds nothing of version 0"),
    ("no weights", lambda p: (p / BLOB).unlink(), "has no file 'weights/weight.bin'"),
    ("empty weights", lambda p: (p / BLOB).write_bytes(b""), "no weight file"),
    ("cut weights", lambda p: (p / BLOB).write_bytes((p / BLOB).read_bytes()[:-64]), "cut short"),
    ("header alone", lambda p: (p / BLOB).write_bytes((p / BLOB).read_bytes()[:64]), "the file has 64 bytes"),
    ("another version", lambda p: patched(p / BLOB, 4, struct.pack("<I", 3)), "weight file of version 3"),
    ("another type", lambda p: patched(p / BLOB, 64 + 4, struct.pack("<I", 1)), "type code 1 and 16384 bytes"),
    ("no sentinel", lambda p: patched(p / BLOB, 64, b"\0\0\0\0"), "expected 4096 numbers of type fp32"),
    ("beyond", lambda p: patched(p / BLOB, 64 + 16, struct.pack("<Q", 1 << 60)), "cut short"),
    ("another size", lambda p: patched(p / BLOB, 64 + 8, struct.pack("<Q", 1 << 40)), "type code 2"),
]  # fmt: skip


def patched(file: Path, offset: int, content: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_damaged_file_is_refused_in_one_line(package: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(package)
    assert message in failure(package)


# ---- a program that is wrong in itself


def block(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def step(model: Any, kind: str) -> Any:
    return next(operation for operation in block(model).operations if operation.type == kind)


def constant(model: Any) -> Any:
    """The weight of the product."""
    consts = (o for o in block(model).operations if o.type == "const")
    return next(o for o in consts if o.attributes["val"].WhichOneof("value") == "blobFileValue")


def renamed(model: Any) -> None:
    constant(model).attributes["val"].blobFileValue.fileName = "@model_path/../../../../etc/passwd"


def enormous(model: Any) -> None:
    dimension = constant(model).attributes["val"].type.tensorType.dimensions[0]
    dimension.constant.size = 1 << 62


def short(model: Any) -> None:
    value = constant(model).attributes["val"]
    value.immediateValue.tensor.floats.values.extend([1.0, 2.0])  # takes the place of the file


def unknown_length(model: Any) -> None:
    constant(model).attributes["val"].type.tensorType.dimensions[0].unknown.variadic = False


PROGRAMS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("not a program", lambda m: m.neuralNetwork.SetInParent(), "holds neuralNetwork of version 8"),
    ("version", lambda m: setattr(m, "specificationVersion", 99), "holds mlProgram of version 99"),
    ("no function", lambda m: m.mlProgram.functions.clear(), "has no function main"),
    ("no opset", lambda m: setattr(m.mlProgram.functions["main"], "opset", "other"), "has no function main"),
    ("unknown operator", lambda m: setattr(step(m, "relu"), "type", "exec"), "operator exec ('result') is not known"),
    ("owner's private", lambda m: setattr(step(m, "relu"), "type", "while_loop"), "while_loop"),
    ("reads nothing", lambda m: setattr(step(m, "relu").inputs["x"].arguments[0], "name", "ghost"), "reads 'ghost'"),
    ("made twice", lambda m: setattr(step(m, "relu").outputs[0], "name", "x"), "its name 'x' is empty, taken or not"),
    ("no name", lambda m: setattr(step(m, "relu").outputs[0], "name", ""), "its name '' is empty"),
    ("two lines", lambda m: setattr(step(m, "relu").outputs[0], "name", "a\nb"), "or not printable"),
    ("type of two lines", lambda m: setattr(step(m, "relu"), "type", "re\nlu"), "has no proper type"),
    ("makes nothing", lambda m: step(m, "relu").ClearField("outputs"), "makes nothing"),
    ("no outputs", lambda m: block(m).ClearField("outputs"), "made by nothing"),
    ("ghost output", lambda m: block(m).outputs.append("ghost"), "output ghost is made by nothing"),
    ("operand lost", lambda m: step(m, "linear").inputs.pop("weight"), "operator linear 'product' failed: KeyError"),
    ("odd shape", lambda m: setattr(step(m, "relu").outputs[0].type.tensorType.dimensions[1].constant, "size", 63),
     "makes shape (1, 64), the program says (1, 63)"),
    ("odd type", lambda m: setattr(constant(m).attributes["val"].type.tensorType, "dataType", 12), "type code 2"),
    ("no such type", lambda m: setattr(constant(m).attributes["val"].type.tensorType, "dataType", 44), "type 44"),
    ("file outside", renamed, "leads out of the package"),
    ("other file", lambda m: setattr(constant(m).attributes["val"].blobFileValue, "fileName", "/etc/passwd"),
     "weight file '/etc/passwd', expected @model_path/"),
    ("offset", lambda m: setattr(constant(m).attributes["val"].blobFileValue, "offset", 1 << 63), "the file has"),
    ("enormous", enormous, "expected a known and sane one"),
    ("unknown length", unknown_length, "expected a known and sane one"),
    ("too few", short, "a constant of 2 numbers, its shape is (64, 64)"),
    ("grey", lambda m: m.description.input[0].type.imageType.SetInParent(), "a picture in grey"),
    ("no input type", lambda m: m.description.input[0].type.stringType.SetInParent(), "neither a picture nor an array"),
    ("another input", lambda m: setattr(m.description.input[0], "name", "y"), "is not one of the program"),
    ("input not told", lambda m: m.description.ClearField("input"), "which its description does not name"),
]  # fmt: skip


def texts(model: Any) -> None:
    """Texts where numbers should be."""
    value = constant(model).attributes["val"]
    value.immediateValue.tensor.strings.values.append("seven")
    value.type.tensorType.dimensions[0].constant.size = value.type.tensorType.dimensions[1].constant.size = 1


def no_text(model: Any) -> None:
    """A text without one."""
    value = constant(model).attributes["val"]
    value.type.tensorType.dataType = 2
    value.immediateValue.tensor.strings.SetInParent()


def huge_output(model: Any) -> None:
    step(model, "relu").outputs[0].type.tensorType.dimensions[1].constant.size = 1 << 40


def long_output(model: Any) -> None:
    block(model).outputs.append("\x1b[31m" + "x" * 5000)


PROGRAMS += [
    ("huge output", huge_output, "operator 'relu': makes 1099511627776 numbers"),
    ("long name", long_output, r"output \x1b[31m" + "x" * 69 + "... is made by nothing"),
]
PROGRAMS += [("texts", texts, "a constant that cannot be read"), ("no text", no_text, "operand weight is no tensor")]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in PROGRAMS], ids=[case[0] for case in PROGRAMS])
def test_a_wrong_program_is_refused_in_one_line(package: Path, damage: Callable[[Any], Any], message: str) -> None:
    model = Model_pb2.Model()
    model.ParseFromString((package / PROGRAM).read_bytes())
    damage(model)
    (package / PROGRAM).write_bytes(model.SerializeToString())
    assert message in failure(package)


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_byte_is_refused_or_harmless(package: Path, seed: int) -> None:
    """Whatever a damaged file makes of the program, no other exception comes out of it."""
    draw = np.random.default_rng(seed)
    data = bytearray((package / PROGRAM).read_bytes())
    for place in draw.integers(0, len(data), 3):
        data[place] = draw.integers(0, 256)
    (package / PROGRAM).write_bytes(data)
    runtime = MilReference(package)
    try:
        runtime.load()
        feed = {spec.name: np.ones((1, 64), np.dtype(spec.dtype)) for spec in runtime.inputs}
        runtime.run(feed)
    except RuntimeFailure as error:
        assert str(package) in str(error)


# ---- numbers below a byte


@pytest.mark.parametrize(("code", "values"), [
    (37, [1, 0, 1, 1, 0, 0, 1, 0, 1]), (36, [3, 0, 1, 2, 3]), (39, [7, 0, 5, 2, 1, 6]), (35, [15, 0, 9]),
    (38, [63, 0, 33, 17, 5]), (25, [-8, 7, -1, 0, 3]),
])  # fmt: skip
def test_numbers_below_a_byte_follow_each_other_from_the_lowest_bit(code: int, values: list[int]) -> None:
    kind = KINDS[code]
    whole = sum((value % (1 << kind.bits)) << (i * kind.bits) for i, value in enumerate(values))
    content = whole.to_bytes((len(values) * kind.bits + 7) // 8, "little")
    assert unpacked(content, kind, len(values)).tolist() == values


def test_a_weight_file_is_read_where_the_program_says(package: Path) -> None:
    message, folder = read_package(package)
    value = constant(message).attributes["val"].blobFileValue
    weights = Weights(package, folder)
    assert weights.data(value.fileName, value.offset, FLOAT, 4096).tolist() == list(range(4096))
    with pytest.raises(RuntimeFailure, match="expected 4095 numbers"):
        weights.data(value.fileName, value.offset, FLOAT, 4095)
    with pytest.raises(RuntimeFailure, match="expected 4096 numbers of type fp64"):
        weights.data(value.fileName, value.offset, Kind("fp64", FLOAT.held, "<f8", 64), 4096)


def test_a_program_beyond_the_limit_is_not_parsed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil_package, "MAX_PROGRAM_BYTES", 100)
    assert "which no such file needs" in failure(package)


def test_all_constants_together_have_a_limit(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil_package, "MAX_CONSTANT_BYTES", 64 * 64 * 4)  # the weight alone, without the bias
    assert "constants of more than 0 MB" in failure(package)


def test_a_weight_file_of_holes_is_refused_before_it_is_read(package: Path) -> None:
    """4 KB on disk that say to be 2^28 numbers."""
    model = Model_pb2.Model()
    model.ParseFromString((package / PROGRAM).read_bytes())
    dimensions = constant(model).attributes["val"].type.tensorType.dimensions
    dimensions[0].constant.size = dimensions[1].constant.size = 1 << 14
    (package / PROGRAM).write_bytes(model.SerializeToString())
    patched(package / BLOB, 64 + 8, struct.pack("<Q", 1 << 30))
    with (package / BLOB).open("r+b") as stream:
        stream.truncate((1 << 30) + 4096)
    begin = time.perf_counter()
    message = failure(package)
    assert "are on disk" in message
    assert time.perf_counter() - begin < 2  # seconds; reading 1 GB of zeros and copying it takes longer


def test_numbers_below_a_byte_are_unpacked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    content, kind = np.random.default_rng(0).integers(0, 256, 300, np.uint8).tobytes(), KINDS[38]
    whole = unpacked(content, kind, 399)
    monkeypatch.setattr(mil_package, "CHUNK", 16)
    np.testing.assert_array_equal(unpacked(content, kind, 399), whole)


def test_texts_of_a_package_are_short_and_printable() -> None:
    assert mil_package.shown("logits") == "logits"
    assert mil_package.shown("a\x1b[2J\nb\u202e") == r"a\x1b[2J\nb\u202e"
    assert len(mil_package.shown("\0" * 5000)) == len(mil_package.shown("x" * 5000)) == 80
