"""The command line as a user meets it: one JSON document or plain lines on stdout, progress on stderr, exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevit
from edgevit import api, inputs
from edgevit.artifact import load_artifact, sha256_of
from edgevit.registry import model_names

VERBS = ("list", "info", "doctor", "export", "verify", "run", "bench")
CHELSEA = next(path for path in inputs.photographs() if path.stem == "chelsea")
NAME = "mobileformer_26m-onnx-fp32-64x64"
QUICK = ("--duration", "0.05", "--loads", "1", "--threads", "1")


def table(text: str) -> list[list[str]]:
    """The cells of a printed table, row by row."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


# ---- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_of_the_verb(cli: Any, verb: str) -> None:
    told = cli(verb, "--help")
    assert told.code == 0
    assert f"Example: edgevit {verb}" in told.out
    assert "--json" in told.out
    assert told.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_an_example_exist(cli: Any, verb: str) -> None:
    told = " ".join(cli(verb, "--help").out.split())
    described, _, example = told.rpartition("Example: edgevit ")
    assert [word for word in example.split() if word.startswith("--") and word not in described] == []


def test_help_lists_every_verb(cli: Any) -> None:
    told = cli("--help")
    assert told.code == 0
    assert [verb for verb in VERBS if f"\n  {verb} " not in told.out] == []


def test_no_argument_at_all_is_help_and_a_usage_error(cli: Any) -> None:
    told = cli()
    assert told.code == 2
    assert "Usage:" in told.out + told.err


# ---- list, info, doctor


def test_list_gives_a_name_a_line_or_one_document(cli: Any) -> None:
    assert cli("list").out.splitlines() == model_names()
    assert cli("list", "--json").document == {"models": model_names()}
    assert cli("list", "--family", "mobile_former", "--json").document == {"models": model_names("mobileformer*")}
    assert cli("list", "--family", "crossformer").out.splitlines() == model_names("crossformer*")
    assert cli("list", "*_?6m").out.splitlines() == ["mobileformer_26m", "mobileformer_96m"]


def test_a_pattern_that_nothing_matches_lists_nothing(cli: Any) -> None:
    told = cli("list", "resnet*")
    assert (told.code, told.out.strip(), told.err) == (0, "", "")
    assert cli("list", "resnet*", "--json").document == {"models": []}


def test_info_gives_parameters_macs_flops_and_the_paper(cli: Any) -> None:
    told = cli("info", "mobileformer_26m", "--json")
    document = told.document
    assert (told.code, told.err) == (0, "")
    assert document["model"] == "mobileformer_26m"
    assert document["parameters"] == 3_232_788
    assert document["macs"] == 23_550_208
    assert document["flops"] == 2 * document["macs"]
    assert document["paper"] == {"flops": "26M", "imagenet_top1_percent": 64.0}
    assert document["gaps"] == {"parameters": None, "macs": pytest.approx((23_550_208 - 26e6) / 26e6 * 100)}
    assert document["image_size"] == [224, 224]
    assert document["options"] == {"spatial_dynamic_relu": False}


def test_info_counts_at_the_size_and_options_asked_for(cli: Any) -> None:
    asked = ("info", "mobileformer_26m", "--image-size", "64x96", "--json")
    shared, spatial = (cli(*asked, *option).document for option in ((), ("--option", "spatial_dynamic_relu=true")))
    for document in (shared, spatial):
        assert document["image_size"] == [64, 96]
        assert document["parameters"] == 3_232_788
        assert document["flops"] == 2 * document["macs"]
    assert (shared["options"], spatial["options"]) == ({"spatial_dynamic_relu": False}, {"spatial_dynamic_relu": True})
    assert shared["macs"] < spatial["macs"] < 23_550_208 / 2  # an eighth of the pixels; the tokens' share stays


def test_info_prints_counts_beside_the_paper_s_figures(cli: Any) -> None:
    rows = table(cli("info", "swin_t").out)
    assert ["counted", "paper", "gap"] in rows
    assert ["parameters", "28,288,354", "28M", "+1.0 %"] in rows
    assert ["MACs", "4,490.57 M at 224x224", "4.5G multiply-adds", "-0.2 %"] in rows
    assert ["FLOPs", "8,981.13 M (2 x MACs)"] in rows
    assert ["paper", "imagenet_top1_percent 81.2"] in rows
    assert ["options", "window_size=7"] in rows
    assert any(row[0] == "note" for row in rows)


def test_info_prints_no_gap_where_there_is_nothing_to_compare(cli: Any) -> None:
    rows = {row[0]: row for row in table(cli("info", "swin_t", "--image-size", "64x64").out)}
    assert rows["parameters"][-1] == "+1.0 %"
    assert rows["MACs"][1:] == ["425.31 M at 64x64", "4.5G multiply-adds", "n/a (of another size or options)"]
    rows = {row[0]: row for row in table(cli("info", "mobileformer_26m").out)}
    assert rows["parameters"] == ["parameters", "3,232,788"]  # the paper prints none


def test_doctor_is_well_here(cli: Any) -> None:
    told = cli("doctor", "--json")
    assert told.code == 0
    assert told.document["ok"] is True
    assert told.document["machine"]["logical_cores"] >= 1
    assert cli("doctor").out.startswith(f"edgevit {edgevit.__version__}, Python ")


def test_doctor_exits_1_where_something_is_missing(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "edgevit.runtimes.ort", raising=False)
    told = cli("doctor", "--json")
    assert told.code == 1
    assert told.document["ok"] is False
    assert "not available: runtime ort needs onnxruntime, which is not installed: pip install" in cli("doctor").out


# ---- export


def test_export_says_on_stdout_one_document_and_on_stderr_how_far_it_is(exported: Any) -> None:
    document = exported.outcome.document
    assert Path(document["artifact"]).name == NAME
    assert document["parity"]["passed"] is True
    assert document["parity"]["inputs"] == len(inputs.photographs())
    assert [c["rewrite"] for c in document["certificates"]]
    assert all(c["max_rel"] < 1e-9 and c["input_independent"] for c in document["certificates"])
    steps = ["loading weights", "exporting", "comparing with the reference on photographs", "done"]
    assert exported.outcome.err.splitlines() == steps


def test_export_lists_the_files_it_wrote(exported: Any) -> None:
    files = {entry["name"]: entry for entry in exported.outcome.document["files"]}
    on_disk = {p.relative_to(exported.path).as_posix() for p in exported.path.rglob("*") if p.is_file()}
    assert on_disk == {"manifest.json", *files}
    assert set(files) == {"model.onnx", "sample/input.npy", "sample/output.npy"}
    for name, entry in files.items():
        assert (entry["bytes"], entry["sha256"]) == (
            (exported.path / name).stat().st_size,
            sha256_of(exported.path / name),
        )


def test_export_records_its_command_and_leaves_nothing_beside(exported: Any) -> None:
    command = load_artifact(exported.path).manifest["command"]
    assert command == "edgevit export mobileformer_26m --to onnx --image-size 64x64 --out dist --json"
    assert [path.name for path in exported.path.parent.iterdir()] == [NAME]


def test_export_for_a_person_names_the_place_the_weights_and_the_parity(cli: Any, tiny: Any) -> None:
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out)
    lines = told.out.splitlines()
    assert told.code == 0
    assert lines[0] == str(tiny.out / "tiny-onnx-fp32")
    assert "rewrite     nothing: 1 places, operations 4 -> 4, difference 0e+00 (float64)" in lines
    assert "weights     random (seed 0): timings hold, predictions mean nothing" in lines
    (parity,) = (line for line in lines if line.startswith("parity"))
    assert parity.startswith("parity      equal to the reference on 4 picture(s): max abs ")
    assert parity.endswith("top-1 agreement 100%")


def test_export_takes_weights_and_says_which(cli: Any, tiny: Any, tmp_path: Path) -> None:
    weights = tiny.checkpoint(tmp_path / "official [1].pth")
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--weights", weights, "--num-classes", "3")
    assert told.code == 0
    assert f"weights     official [1].pth (state_dict, sha256 {sha256_of(weights)[:12]}...)" in told.out
    assert "note        head: 10 classes in the checkpoint, 3 asked for: the layer is new" in told.out
    assert "random (seed" not in told.out


@pytest.mark.parametrize("batch", ["3", "dynamic"])
def test_export_options_reach_the_artifact(cli: Any, tiny: Any, batch: str) -> None:
    asked = (
        "--batch",
        batch,
        "--image-size",
        "32x96",
        "--option",
        "double=true",
        "--pointwise",
        "dense",
        "--seed",
        "4",
    )
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out, *asked, "--num-classes", "7", "--json")
    manifest = load_artifact(told.document["artifact"]).manifest
    assert Path(told.document["artifact"]).name == "tiny-onnx-fp32-32x96"
    assert str(manifest["batch"]) == batch
    assert (manifest["image"]["size"], manifest["seed"], manifest["num_classes"]) == ([32, 96], 4, 7)
    assert manifest["options"] == {"double": "true"}
    assert told.document["choices"] == {"pointwise": "dense"}


def test_export_of_features(cli: Any, tiny: Any) -> None:
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--features-only")
    assert told.code == 0
    assert "top-1" not in told.out


def test_export_of_several_sizes_tells_of_each(cli: Any, tiny: Any) -> None:
    asked = ("export", "tiny", "--to", "onnx", "--out", tiny.out, "--image-size", "64x64, 32x96")
    document = cli(*asked, "--json").document
    assert Path(document["artifact"]).name == "tiny-onnx-fp32-64x64+32x96"
    assert [entry["image_size"] for entry in document["resolutions"]] == [[64, 64], [32, 96]]
    assert document["parity"] == document["resolutions"][0]["parity"]
    lines = cli(*asked, "--force").out.splitlines()
    assert [line for line in lines if line.startswith("image size")] == [
        "image size  64x64: model-64x64.onnx",
        "image size  32x96: model-32x96.onnx",
    ]
    for start, times in (("rewrite ", 2), ("deployed ", 2), ("parity ", 2), ("weights ", 1)):
        assert sum(line.startswith(start) for line in lines) == times


def test_export_warns_of_a_size_that_pads(cli: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.api import exporting

    monkeypatch.setattr(exporting, "size_notes", lambda card, sizes, cost: [f"{card.name} pads [there] at {sizes[0]}"])
    told = cli("export", "tiny", "--to", "onnx", "--out", tiny.out, "--image-size", "32x96")
    assert "note        tiny pads [there] at (32, 96)" in told.out.splitlines()
    assert load_artifact(tiny.out / "tiny-onnx-fp32-32x96").manifest["notes"] == ["tiny pads [there] at (32, 96)"]


# ---- verify


def test_verify_rebuilds_random_weights_and_compares_on_photographs(cli: Any, exported: Any) -> None:
    told = cli("verify", exported.path, "--json")
    document = told.document
    assert told.code == 0
    assert document["against"] == "reference"
    assert document["parity"]["inputs"] == 4
    assert document["parity"]["max_abs"] < 1e-4  # the limit for the reference form; 1e-3 is the exporter's
    assert Path(document["artifact"]) == exported.path


def test_verify_prints_one_parity_line(cli: Any, tiny: Any, tmp_path: Path) -> None:
    weights = tiny.checkpoint(tmp_path / "w.pth")
    path = tiny.export(weights=weights).path
    told = cli("verify", path)
    assert (told.code, len(told.out.splitlines())) == (0, 1)
    assert told.out.startswith("parity      equal to the sample on 1 picture(s): max abs ")
    assert cli("verify", path, "--weights", weights).out.startswith(
        "parity      equal to the reference on 4 picture(s)"
    )


def test_verify_prints_a_line_for_each_size(cli: Any, tiny: Any) -> None:
    path = tiny.export(image_size=((64, 64), (32, 96))).path
    first, second = cli("verify", path).out.splitlines()
    assert first.startswith("parity      equal to the reference at 64x64 on 4 picture(s): max abs ")
    assert second.startswith("parity      equal to the reference at 32x96 on 4 picture(s): max abs ")
    assert len(cli("verify", path, "--json").document["resolutions"]) == 2


# ---- run


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("".join(f"class number {i}\n" for i in range(1000)))
    return path


def test_run_gives_the_top_5_with_names_and_a_softmax_in_float64(cli: Any, exported: Any, labels: Path) -> None:
    told = cli("run", exported.path, CHELSEA, "--labels", labels, "--json")
    (prediction,) = told.document["predictions"]
    assert (told.code, told.err) == (0, "")
    assert told.document["random_weights"] is True
    assert prediction["image"] == str(CHELSEA)

    artifact = load_artifact(exported.path)
    with edgevit.load(exported.path) as runtime:
        logits = runtime.run({"image": inputs.load_images([CHELSEA], artifact.image_spec)})["logits"][0]
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)[:5]
    assert [row["class"] for row in prediction["top"]] == best.tolist()
    assert [row["label"] for row in prediction["top"]] == [f"class number {c}" for c in best]
    given = [row["probability"] for row in prediction["top"]]
    assert given == pytest.approx(shares[best].tolist(), rel=1e-12)  # float32 would be at 1e-7
    assert 0 < sum(given) <= 1


def test_run_prints_a_table_for_each_picture_and_says_the_weights_are_random(
    cli: Any, exported: Any, labels: Path
) -> None:
    astronaut = CHELSEA.with_name("astronaut.jpg")
    told = cli("run", exported.path, CHELSEA, astronaut, "--labels", labels, "--top", "3")
    rows = table(told.out)
    assert told.code == 0
    assert rows[0] == [str(CHELSEA)] and rows[5] == [str(astronaut)]
    assert rows[1] == ["class", "label", "probability"]
    assert all(len(row) == 3 and row[2].endswith("%") for row in rows[2:5])
    assert told.out.splitlines()[-1] == "the weights are random: these predictions mean nothing"


def test_run_without_labels_gives_indices(cli: Any, tiny: Any) -> None:
    (prediction,) = cli("run", tiny.export().path, CHELSEA, "--json").document["predictions"]
    assert all(row["label"] == str(row["class"]) for row in prediction["top"])


def test_run_with_a_checkpoint_s_weights_warns_of_nothing(cli: Any, tiny: Any, tmp_path: Path) -> None:
    told = cli("run", tiny.export(weights=tiny.checkpoint(tmp_path / "w.pth")).path, CHELSEA)
    assert told.code == 0
    assert "random" not in told.out + told.err


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("[bold]x.jpg", "utf-8"),
        ("a b.jpg", "ascii"),
        ("日本.jpg", "utf-8"),
        ("日本.jpg", "ascii"),
        ("caf\udce9.jpg", "utf-8"),
    ],
    ids=["markup", "space", "unicode", "unicode on an ascii terminal", "no utf-8"],
)
def test_a_picture_may_have_any_name(
    cli: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes(CHELSEA.read_bytes())
    path = tiny.export().path
    assert cli("run", path, tmp_path / name, "--json").document["predictions"][0]["image"] == str(tmp_path / name)
    with open(1, "w", encoding=encoding, errors="strict", closefd=False) as stdout:  # as on a user's terminal
        monkeypatch.setattr(sys, "stdout", stdout)
        told = cli("run", path, tmp_path / name)
    assert told.code == 0, told.err
    assert name in told.out or encoding == "ascii" or not name.isprintable()


def test_a_label_cannot_write_on_the_terminal(cli: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"\x1b[31m[red]{i}\n" for i in range(10)))
    told = cli("run", tiny.export().path, CHELSEA, "--labels", tmp_path / "labels.txt")
    assert told.code == 0
    assert "\x1b" not in told.out
    assert "[red]" in told.out


def test_run_and_bench_take_the_size_asked_for(cli: Any, tiny: Any) -> None:
    path = tiny.export(image_size=((64, 64), (32, 96))).path
    asked = [cli("run", path, CHELSEA, *size, "--json").document for size in ((), ("--image-size", "32x96"))]
    assert asked[0]["predictions"] != asked[1]["predictions"]
    alone = tiny.export(image_size=(32, 96)).path
    assert cli("run", alone, CHELSEA, "--json").document["predictions"] == asked[1]["predictions"]
    for size, name in (((), "64x64"), (("--image-size", "32x96"), "32x96")):
        (result,) = cli("bench", path, *size, *QUICK, "--json").document["results"]
        assert result["name"] == f"tiny-onnx-fp32-64x64+32x96 at {name}"
    refused = cli("run", path, CHELSEA, "--image-size", "96x96")
    assert refused.code == 2
    assert "image size 96x96, expected one of 64x64,32x96; export" in refused.message


# ---- bench


def test_two_artifacts_race(cli: Any, exported: Any, copied: Callable[..., Path]) -> None:
    other = copied(exported.path, "other")
    told = cli("bench", exported.path, other, *QUICK, "--json")
    document = told.document
    assert told.code == 0
    assert [result["name"] for result in document["results"]] == [NAME, "other"]
    for result in document["results"]:
        assert set(result["latency_ms"]) == {"p50", "p90", "p99"}
        assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p90"]
        assert result["effective_precision"] == "fp32"
        assert len(result["samples_ms"]) >= 64  # what p90 needs
        assert result["latency_ms"]["p50"] == pytest.approx(float(np.median(result["samples_ms"])))
    comparison = document["comparison"]
    assert comparison["low"] <= comparison["ratio"] <= comparison["high"]
    assert 0.3 < comparison["ratio"] < 3  # the same file twice, on a machine that may be busy
    assert document["settings"]["threads"] == 1


def test_against_the_naive_export(cli: Any, exported: Any) -> None:
    told = cli("bench", exported.path, "--vs", "naive", *QUICK, "--json")
    naive, deployed = told.document["results"]
    assert told.code == 0
    assert (naive["name"], deployed["name"]) == (f"{NAME} (naive)", NAME)
    assert naive["effective_precision"] == deployed["effective_precision"] == "fp32"
    assert told.document["comparison"]["baseline"] == f"{NAME} (naive)"
    assert told.document["comparison"]["ratio"] > 0


def test_a_race_for_a_person_is_a_table_and_a_sentence(cli: Any, tiny: Any, copied: Callable[..., Path]) -> None:
    path = tiny.export().path
    told = cli("bench", path, copied(path, "[other]"), *QUICK)
    rows = table(told.out)
    assert told.code == 0
    assert rows[0] == ["name", "precision", "p50 ms", "p90 ms", "p99 ms", "runs", "of limit"]
    assert rows[1][:2] == ["tiny-onnx-fp32", "fp32"] and rows[2][0] == "[other]"
    assert re.fullmatch(r"\d+%", rows[1][6])
    verdict = told.out.splitlines()[-1]
    assert verdict.startswith("[other] against tiny-onnx-fp32: ")
    assert re.search(r"(faster|slower|no difference shown) \[\d", verdict)
    assert "warming up tiny-onnx-fp32" in told.err


def test_a_percentile_without_enough_samples_says_what_it_needs(cli: Any, tiny: Any) -> None:
    told = cli("bench", tiny.export().path, "--duration", "1e-6", "--loads", "1")
    assert table(told.out)[1][4] == "n/a (needs 662)"


def test_progress_in_a_pipe_is_a_plain_line_for_each_step(cli: Any, tiny: Any) -> None:
    told = cli("bench", tiny.export().path, "--duration", "0.3", "--loads", "1", "--no-roofline", "--json")
    lines = [line for line in told.err.splitlines() if not line.startswith(("warning", "the machine changed"))]
    steps = [re.sub(r"\d+", "", line) for line in lines]
    assert steps[0] == "warming up tiny-onnx-fp"
    assert len(steps) == len(set(steps)) <= 4
    assert "\r" not in told.err and "\x1b" not in told.err


# ---- failures in general


def test_a_failure_with_json_is_a_document_too(cli: Any, tmp_path: Path) -> None:
    told = cli("verify", tmp_path, "--json")
    assert told.code == 1
    assert told.document["error"]["exit_code"] == 1
    assert told.err == f"edgevit: {told.document['error']['message']}\n"


def test_a_usage_error_with_json_is_a_document_too(cli: Any) -> None:
    told = cli("export", "mobileformer_26m", "--json")  # --to is missing
    assert told.code == 2
    assert told.document["error"]["exit_code"] == 2
    assert "--to" in told.document["error"]["message"]


def test_a_bug_is_one_line_that_says_how_to_see_more(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(api, "info", bug)
    told = cli("info", "mobileformer_26m")
    assert told.code == 1
    assert told.out == ""
    assert told.err == (
        "edgevit: internal error: ZeroDivisionError: division by zero; "
        "run again with --debug and report what it prints\n"
    )
    with pytest.raises(ZeroDivisionError):
        cli("info", "mobileformer_26m", "--debug")


def test_debug_shows_where_a_failure_comes_from(cli: Any) -> None:
    from edgevit.errors import UnknownNameError

    with pytest.raises(UnknownNameError):
        cli("info", "nothing", "--debug")


def test_a_reader_that_goes_away_gets_no_traceback(started: Any) -> None:
    process = started("-m", "edgevit", "list")
    process.stdout.close()  # as `| head -0` does, long before Python has started
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 1


def test_every_document_is_strict_json(cli: Any, tiny: Any) -> None:
    path = tiny.export().path

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    for command in (("list",), ("info", "tiny"), ("doctor",), ("verify", path), ("bench", path, *QUICK)):
        json.loads(cli(*command, "--json").out, parse_constant=refuse)
