"""What goes wrong, as a user meets it: one message, the right exit code, nothing half written, never a traceback.

A message names the place, what came, what was expected and what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import inputs
from edgevit.artifact import load_artifact
from edgevit.manifest import MANIFEST
from edgevit.registry import FAMILIES, model_names

MODELS = ", ".join(sorted(model_names()))
MULTIPLES = "height and width must be multiples of 32 between 32 and 4096"
PIXELS = "expected HEIGHTxWIDTH in pixels, e.g. 224x224"
EXPORT = ("export", "mobileformer_26m", "--to", "onnx")
PHOTO = inputs.photographs()[0]
NAME = "tiny-onnx-fp32"


def failure(told: Any, code: int) -> str:
    """The message of a failed command: the last line of stderr, nothing on stdout, no traceback."""
    assert told.code == code, told.err
    assert told.out == ""
    assert "Traceback" not in told.err and "internal error" not in told.err
    assert told.message.startswith("edgevit: ")
    message: str = told.message.removeprefix("edgevit: ")
    return message


def one_line(told: Any, code: int) -> str:
    """The message of a command that failed before it began: the one line on stderr."""
    message = failure(told, code)
    assert told.err.count("\n") == 1
    return message


def empty(folder: Path) -> bool:
    """Nothing in it, hidden entries included; it may not be there at all."""
    return not folder.exists() or os.listdir(folder) == []


# ---- the request


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("export", "mobileformer_294", "--to", "onnx"),
            f"unknown model 'mobileformer_294'; did you mean 'mobileformer_294m'? Known: {MODELS}",
        ),
        ((*EXPORT[:-1], "onyx"), "unknown target 'onyx'; did you mean 'onnx'? Known: coreml, onnx, openvino, tensorrt"),
        (
            (*EXPORT, "--option", "spatial_relu=true"),
            "unknown option of mobileformer_26m 'spatial_relu'; did you mean 'spatial_dynamic_relu'? "
            "Known: spatial_dynamic_relu",
        ),
        (
            (*EXPORT, "--option", "spatial_dynamic_relu=5"),
            "option spatial_dynamic_relu=5: expected true or false",
        ),
        (
            (*EXPORT, "--option", "spatial_dynamic_relu"),
            "--option 'spatial_dynamic_relu': expected KEY=VALUE, e.g. spatial_dynamic_relu=true",
        ),
        *(
            ((*EXPORT, "--image-size", size), f"image size {size}: {MULTIPLES}; try {near}")
            for size, near in (("100x64", "96x64"), ("0x64", "32x64"), ("99999x64", "4096x64"))
        ),
        *(
            ((*EXPORT, f"--image-size={size}"), f"--image-size '{size}': {PIXELS}, or several: 224x224,256x320")
            for size in (
                *("224", "224x", "x", "-64x64", "6 4x64", "64x64x3", "64.0x64", "٣٢x32", "9" * 30 + "x64"),
                *("", ",", "64x64,", ",64x64", "64x64,,96x96", "64x64,dynamic", "dynamic", "64x64;96x96", "64x64,96"),
            )
        ),
        *(
            ((*verb, "--image-size", size), f"--image-size '{size}': {PIXELS}")
            for verb in (("info", "mobileformer_26m"), ("bench", "mobileformer_26m"), ("run", "somewhere", "photo.jpg"))
            for size in ("64", "64x64,96x96")
        ),
        (
            (*EXPORT, "--image-size", "64x64,96x96,64x64"),
            "image sizes 64x64,96x96,64x64: 64x64 is given twice; give each size once",
        ),
        ((*EXPORT, "--image-size", "64x64,96x100"), f"image size 96x100: {MULTIPLES}; try 96x96"),
        (
            (*EXPORT, "--image-size", ",".join(f"32x{32 * i}" for i in range(1, 18))),
            "image sizes: 17 of them, at most 16 share an artifact; export the rest alone",
        ),
        ((*EXPORT, "--batch", "0"), "batch 0: expected a whole number from 1 to 1024, or 'dynamic'"),
        ((*EXPORT, "--batch", "-1"), "batch -1: expected a whole number from 1 to 1024, or 'dynamic'"),
        ((*EXPORT, "--batch", "999999999"), "batch 999999999: expected a whole number from 1 to 1024, or 'dynamic'"),
        *(
            ((*EXPORT, f"--batch={batch}"), f"--batch '{batch}': expected a whole number of pictures, or 'dynamic'")
            for batch in ("two", "", "1.5", "--1", "-", "²", "1e3", "9" * 5000)
        ),
        ((*EXPORT, "--pointwise", "sparse"), "pointwise 'sparse': expected auto, dense or grouped"),
        (
            ("list", "--family", "mobileformer"),
            f"unknown family 'mobileformer'; did you mean 'mobile_former'? Known: {', '.join(sorted(FAMILIES))}",
        ),
        (("info", "mobileformer_26m", "--image-size", "33x32"), f"image size 33x32: {MULTIPLES}; try 32x32"),
        (
            ("bench", "mobileformer_294"),
            "unknown artifact directory or model 'mobileformer_294'; did you mean 'mobileformer_294m'? "
            f"Known: {MODELS}",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_exit_2(
    cli: Any, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = ("--out", str(tmp_path / "out")) if arguments[0] == "export" else ()
    told = cli(*arguments, *out)
    assert failure(told, 2) == message
    assert empty(tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "needles"),
    [
        (("--precision", "fp23"), ("precision", "'fp23'", "fp32")),
        (("--num-classes", "0"), ("number of classes 0", "expected 1 to 1000000")),
        (("--num-classes", "-3"), ("number of classes -3", "expected 1 to 1000000")),
        (("--seed", str(2**64)), ("seed", str(2**64))),
    ],
    ids=str,
)
def test_an_impossible_value_names_it_and_what_is_possible(
    cli: Any, tmp_path: Path, option: tuple[str, str], needles: tuple[str, ...]
) -> None:
    message = failure(cli(*EXPORT, *option, "--out", tmp_path / "out"), 2)
    assert [needle for needle in needles if needle not in message] == []
    assert empty(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (("exprt", "x"), ("No such command 'exprt'", "export")),
        (("list", "--famly", "x"), ("No such option: --famly", "--family")),
        (("export", "mobileformer_26m"), ("Missing option", "--to")),
        (("export", "--to", "onnx"), ("Missing argument", "model")),
        ((*EXPORT, "--num-classes", "ten"), ("--num-classes", "integer")),
        ((*EXPORT, "--seed", "-1"), ("--seed", "greater than or equal to 0")),
        (("run", "somewhere"), ("Missing argument", "IMAGE")),
        (("bench",), ("Missing argument", "ARTIFACT|MODEL")),
        (("bench", "x", "--loads", "0"), ("--loads", "greater than or equal to 1")),
        (("bench", "x", "--threads", "0"), ("--threads", "greater than or equal to 1")),
        (("verify",), ("Missing argument", "ARTIFACT")),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_command_line_that_cannot_be_read_says_where(
    cli: Any, arguments: tuple[str, ...], needles: tuple[str, ...]
) -> None:
    told = cli(*arguments)
    assert (told.code, told.out) == (2, "")
    assert "Traceback" not in told.err
    assert [needle for needle in needles if needle not in told.err] == []


@pytest.mark.parametrize("duration", ["0", "-1", "nan", "inf"])
def test_an_impossible_duration_is_refused(cli: Any, tiny: Any, duration: str) -> None:
    message = one_line(cli("bench", tiny.export().path, "--duration", duration), 2)
    assert "duration" in message and "above" in message


def test_an_unknown_rival_is_refused(cli: Any, tiny: Any) -> None:
    assert one_line(cli("bench", tiny.export().path, "--vs", "tensorrt"), 2) == (
        "--vs 'tensorrt': expected naive, an artifact's directory, or an .onnx file that exists"
    )


def test_one_artifact_cannot_race_itself(cli: Any, tiny: Any) -> None:
    path = tiny.export().path
    assert "equal name" in one_line(cli("bench", path, path), 2)


# ---- the place to write to


def test_an_artifact_that_exists_is_refused_and_replaced_with_force(cli: Any, tiny: Any) -> None:
    command = ("export", "tiny", "--to", "onnx", "--out", tiny.out)
    assert cli(*command, "--seed", "1").code == 0
    message = one_line(cli(*command, "--seed", "2"), 1)
    assert message == f"{tiny.out / NAME} exists already; give --force to replace it, or another --out"
    assert load_artifact(tiny.out / NAME).manifest["seed"] == 1
    assert cli(*command, "--seed", "2", "--force").code == 0
    assert load_artifact(tiny.out / NAME).manifest["seed"] == 2
    assert tiny.left() == [NAME]


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_force_never_deletes_what_is_no_artifact(cli: Any, tiny: Any, tmp_path: Path, kind: str) -> None:
    tiny.out.mkdir()
    mine = (tiny.out / NAME) if kind == "directory" else tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    if kind == "link":
        (mine / MANIFEST).write_text("{}")
        (tiny.out / NAME).symlink_to(mine, target_is_directory=True)
    message = one_line(cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--force"), 1)
    why = f"no {MANIFEST}" if kind == "directory" else "link"
    assert message.startswith(f"{tiny.out / NAME} exists and is ") and why in message
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert tiny.left() == [NAME]


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_way_is_named(cli: Any, tmp_path: Path, below: bool) -> None:
    (tmp_path / "out").write_text("mine")
    out = tmp_path / "out" / "below" if below else tmp_path / "out"
    message = one_line(cli(*EXPORT, "--out", out), 1)
    assert message.startswith(f"output directory {out}: ")
    assert message.endswith("; choose another with --out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_that_cannot_be_written_is_said(cli: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)  # root may write anywhere
    message = one_line(cli("export", "tiny", "--to", "onnx", "--out", tiny.out), 1)
    assert message == f"output directory {tiny.out}: Permission denied; choose another with --out"
    assert tiny.left() == []


def test_a_full_disk_is_said_and_leaves_nothing(cli: Any, tiny: Any) -> None:
    def fill(directory: Path) -> None:
        (directory / "model.onnx").write_bytes(b"half")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"0")

    tiny.exporter.before = fill
    message = failure(cli("export", "tiny", "--to", "onnx", "--out", tiny.out), 1)
    assert (
        message == f"output directory {tiny.out}: no space left on the device; free space or choose another with --out"
    )
    assert tiny.left() == []


# ---- the weights


def broken_weights(kind: str, path: Path, tiny: Any) -> Path:
    """A file that is no checkpoint of `tiny`."""
    if kind in ("missing", "a folder"):
        path.mkdir() if kind == "a folder" else None
    elif kind == "malicious":
        shutil.copy(malicious(path.with_name("ran")), path)
    elif kind == "cut short":
        path.write_bytes(tiny.checkpoint(path).read_bytes()[:700])
    else:
        path.write_bytes({"empty": b"", "garbage": os.urandom(500), "text": b"not a checkpoint\n"}[kind])
    return path


def malicious(proof: Path) -> Path:
    """A checkpoint that makes `proof` if its pickle is executed."""
    import torch

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(proof),)

    path = proof.with_name("trap.pth")
    torch.save({"state_dict": Trap()}, path)
    return path


@pytest.mark.parametrize("kind", ["missing", "a folder", "empty", "garbage", "text", "cut short", "malicious"])
def test_a_file_that_is_no_checkpoint_is_one_sentence(cli: Any, tiny: Any, tmp_path: Path, kind: str) -> None:
    path = broken_weights(kind, tmp_path / "weights.pth", tiny)
    message = failure(cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--weights", path), 1)
    assert message.startswith(f"{path}: ")
    assert "expected" in message and ";" in message
    assert not (tmp_path / "ran").exists()
    assert tiny.left() == []


def test_a_checkpoint_that_does_not_fit_lists_what_is_missing(cli: Any, tiny: Any, tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {"stem.weight": torch.zeros(4, 3, 1, 1)}}, tmp_path / "w.pth")
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--weights", tmp_path / "w.pth")
    assert failure(told, 1) == (
        f"{tmp_path / 'w.pth'}: 3 of the names or shapes do not fit the network: 'stem.bias' is missing; 'head.weight' "
        "is missing; 'head.bias' is missing; use the weights of this very model, with the same options and number of "
        "classes"
    )
    assert tiny.left() == []


# ---- the artifact


def changed_byte(path: Path) -> None:
    content = bytearray((path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.onnx").write_bytes(content)


def truncated(path: Path) -> None:
    os.truncate(path / "model.onnx", 100)


def without_model(path: Path) -> None:
    (path / "model.onnx").unlink()


def without_sample(path: Path) -> None:
    (path / "sample" / "output.npy").unlink()


def without_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def no_json(path: Path) -> None:
    (path / MANIFEST).write_text("not JSON")


def a_list(path: Path) -> None:
    (path / MANIFEST).write_text("[1, 2]")


def edited(**entries: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        document = json.loads((path / MANIFEST).read_text())
        document.update(entries)
        (path / MANIFEST).write_text(json.dumps(document))

    return edit


def file_named(name: str) -> Callable[[Path], None]:
    return edited(files=[{"name": name, "bytes": 0, "sha256": "0" * 64}], model_file=name, checked_file=name)


def linked(path: Path) -> None:
    (path / "model.onnx").rename(path.parent / "elsewhere.onnx")
    (path / "model.onnx").symlink_to(path.parent / "elsewhere.onnx")


def gone(path: Path) -> None:
    shutil.rmtree(path)


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {  # what is done, what is said, what to do
    "changed byte": (changed_byte, "model.onnx: changed since it was exported (sha256", "export the model again"),
    "truncated": (
        truncated,
        "model.onnx: changed since it was exported (100 bytes, expected",
        "export the model again",
    ),
    "missing model": (without_model, "model.onnx: missing, the manifest lists it", "export the model again"),
    "missing sample": (without_sample, "output.npy: missing, the manifest lists it", "export the model again"),
    "missing manifest": (
        without_manifest,
        f"it has no {MANIFEST}",
        "expected the directory that `edgevit export` wrote",
    ),
    "no JSON": (no_json, f"{MANIFEST}: not JSON", "export the model again"),
    "a list": (a_list, f"{MANIFEST}: a JSON object was expected", "export the model again"),
    "newer": (edited(schema_version=99), f"{MANIFEST}: schema_version 99, this edgevit reads", "update edgevit"),
    "parent": (file_named("../secret"), "file name '../secret' leaves the directory", "do not trust this artifact"),
    "absolute": (
        file_named("/etc/passwd"),
        "file name '/etc/passwd' leaves the directory",
        "do not trust this artifact",
    ),
    "link": (linked, "file name 'model.onnx' leaves the directory", "do not trust this artifact"),
    "gone": (gone, "no such directory", "expected the directory that `edgevit export` wrote"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verb", ["verify", "run", "bench"])
def test_a_damaged_artifact_is_refused_by_every_verb(cli: Any, tiny: Any, verb: str, damage: str) -> None:
    path = tiny.export().path
    harm, said, to_do = DAMAGES[damage]
    harm(path)
    told = cli(verb, path, *([PHOTO] if verb == "run" else []))
    if (verb, damage) == ("bench", "gone"):  # it might have been a model's name
        assert "unknown artifact directory or model" in one_line(told, 2)
        return
    message = one_line(told, 1)
    assert str(path) in message and said in message
    assert message.endswith(to_do)


def test_a_changed_byte_of_a_real_artifact_is_found(cli: Any, exported: Any, copied: Callable[..., Path]) -> None:
    path = copied(exported.path)
    changed_byte(path)
    assert f"{path / 'model.onnx'}: changed since it was exported" in one_line(cli("verify", path), 1)


def test_an_artifact_for_a_target_unknown_here_is_refused(cli: Any, tiny: Any) -> None:
    path = tiny.export().path
    edited(target="tflite")(path)
    told = cli("verify", path)
    assert "unknown target 'tflite'" in failure(told, told.code)
    assert told.code in (1, 2)


# ---- pictures and labels


@pytest.mark.parametrize("kind", ["missing", "a folder", "empty", "text", "cut short"])
def test_a_picture_that_is_none_is_named(cli: Any, tiny: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        content = {"empty": b"", "text": b"not a picture", "cut short": PHOTO.read_bytes()[:2000]}[kind]
        path.write_bytes(content)
    message = one_line(cli("run", tiny.export().path, PHOTO, path), 1)
    assert message.startswith(f"{path}: ")
    assert "expected a JPEG, PNG, WebP" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [("cat\ndog\n", "2 names, expected 10 class names"), ("", "an empty file"), ('["cat"', "expected 10 class names")],
    ids=["too few", "empty", "broken JSON"],
)
def test_labels_of_another_length_are_refused(cli: Any, tiny: Any, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "labels.txt").write_text(content)
    message = one_line(cli("run", tiny.export().path, PHOTO, "--labels", tmp_path / "labels.txt"), 1)
    assert message.startswith(f"{tmp_path / 'labels.txt'}: ")
    assert said in message


def test_features_cannot_be_run(cli: Any, tiny: Any) -> None:
    path = tiny.export(features_only=True).path
    assert one_line(cli("run", path, PHOTO), 2) == (
        f"{path}: has no logits (outputs feature0, feature1); run needs a classifier"
    )


# ---- not equal to the reference


def spoiled(value: float) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        from onnx import numpy_helper

        bias = next(t for t in model.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(value), "head.bias"))

    return spoil


@pytest.mark.parametrize("value", [0.01, float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf is NaN, on purpose
def test_a_wrong_model_exits_3_and_leaves_nothing(cli: Any, tiny: Any, value: float) -> None:
    tiny.exporter.change = spoiled(value)
    message = failure(cli("export", "tiny", "--to", "onnx", "--out", tiny.out), 3)
    assert message.startswith("tiny at 64x64 on ort: not equal to the reference: max abs ")
    assert "nothing was written" in message
    assert tiny.left() == []


def test_a_wrong_model_does_not_replace_a_right_one(cli: Any, tiny: Any) -> None:
    before = tiny.export(seed=1).manifest
    tiny.exporter.change = spoiled(0.01)
    failure(cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--force"), 3)
    assert load_artifact(tiny.out / NAME).manifest == before
    assert tiny.left() == [NAME]


def test_verify_exits_3_where_the_weights_are_others(cli: Any, tiny: Any, tmp_path: Path) -> None:
    path = tiny.export(weights=tiny.checkpoint(tmp_path / "w.pth")).path
    other = tiny.checkpoint(tmp_path / "other.pth", seed=6)
    message = one_line(cli("verify", path, "--weights", other), 3)
    assert message.startswith(f"{path}: not equal to its reference: max abs ")


@pytest.mark.parametrize("verb", ["verify", "bench"])
def test_a_precision_that_is_not_what_runs_is_an_error(cli: Any, tiny: Any, verb: str) -> None:
    path = tiny.export().path
    edited(precision="fp16")(path)
    assert "runs in fp32, expected fp16; its numbers would be another model's" in failure(cli(verb, path), 1)


# ---- packages that are missing


def test_a_missing_runtime_says_what_to_type(cli: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.export().path
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "edgevit.runtimes.ort", raising=False)
    message = one_line(cli("run", path, PHOTO), 1)
    assert message == "runtime ort needs onnxruntime, which is not installed: pip install edgevit"


# ---- Ctrl-C


def interrupting(number: signal.Signals) -> Callable[[Path], None]:
    def interrupt(directory: Path) -> None:
        (directory / "model.onnx").write_bytes(b"half")
        os.kill(os.getpid(), number)

    return interrupt


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_an_interrupt_leaves_what_was_there(
    cli: Any, tiny: Any, number: signal.Signals, code: int, force: bool
) -> None:
    before = tiny.export(seed=1).manifest if force else None
    tiny.exporter.before = interrupting(number)
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out, *(["--force"] if force else []))
    assert failure(told, code) == "interrupted; nothing half written was left behind"
    assert tiny.left() == ([NAME] if force else [])
    if before is not None:
        assert load_artifact(tiny.out / NAME).manifest == before


def test_a_second_ctrl_c_while_it_tidies_up_still_leaves_nothing(
    cli: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def impatient(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", impatient)
    tiny.exporter.before = interrupting(signal.SIGINT)
    assert cli("export", "tiny", "--to", "onnx", "--out", tiny.out).code == 130
    assert tiny.left() == []


def test_an_interrupted_bench_is_one_line(cli: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.runtimes.ort import OrtRuntime

    def interrupted(self: Any) -> None:  # noqa: ARG001  # the signature of load
        os.kill(os.getpid(), signal.SIGINT)

    path = tiny.export().path
    monkeypatch.setattr(OrtRuntime, "load", interrupted)
    told = cli("bench", path)
    assert failure(told, 130).startswith("interrupted")


SLOW = """
import sys, time
from edgevit import registry
from edgevit.specs import NoOptions

class Slow:
    name, runtime, checker, precisions, OPTIONS = "onnx", "ort", "ort", ("fp32",), NoOptions

    def export(self, model, card, spec, directory, calibration):
        (directory / "model.onnx").write_bytes(b"half")
        print("half written", file=sys.stderr, flush=True)
        time.sleep(60)

registry.TARGETS["onnx"] = registry.Row("__main__", "Slow")
from edgevit.cli import main
main()
"""


def test_ctrl_c_ends_a_program_with_130_and_one_line(started: Any, tmp_path: Path) -> None:
    process = started("-c", SLOW, *EXPORT, "--out", tmp_path / "out")
    said: list[str] = []
    while said[-1:] != ["half written\n"]:
        said.append(process.stderr.readline())
        assert said[-1] != "", said  # it ended before it was interrupted
    assert len(os.listdir(tmp_path / "out")) == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "edgevit: interrupted; nothing half written was left behind\n")
    assert not (tmp_path / "out").exists()


def test_a_failing_program_has_its_exit_code_and_no_traceback(started: Any, tmp_path: Path) -> None:
    process = started("-m", "edgevit", "verify", tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err == (
        f"edgevit: artifact {tmp_path}: it has no {MANIFEST}; expected the directory that `edgevit export` wrote\n"
    )
