"""`ingest` from end to end: an artifact, its build.sh on a stand-in for a device, and the results read back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevit.api.ingesting import ingest
from edgevit.errors import ArtifactError, InputError, RuntimeFailure, UsageError
from edgevit.export.build_script import write_build_script

STANDIN = Path(__file__).resolve().parent / "standins" / "trtexec"
Device = Callable[..., Path]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """Build and time an artifact: `device(artifact, "10.3.0")` is the folder that build.sh leaves."""
    trtexec = tmp_path / "bin" / "trtexec"
    trtexec.parent.mkdir()
    trtexec.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{STANDIN}" "$@"\n')
    trtexec.chmod(0o755)

    def run(artifact: Path, version: str, graph: str = "fp32", batch: int | str = 1, *arguments: str) -> Path:
        name = write_build_script(
            artifact, onnx_file="model.onnx", precision="fp32", input_name="image", input_shape=(batch, 3, 64, 64),
            oldest="8.5",
        )  # fmt: skip
        environment = {
            "PATH": "/usr/bin:/bin", "TRTEXEC": str(trtexec), "EDGEVIT_ROOT": str(tmp_path), "STANDIN_ONNX": graph,
            "STANDIN_VERSION": version,
        }  # fmt: skip
        done = subprocess.run(["sh", artifact / name, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return artifact / "built"

    return run


def rewrite(artifact: Path, **fields: Any) -> None:
    """Change what the manifest says; the manifest itself has no hash."""
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("version", ["8.5.2", "8.6.1", "10.3.0", "10.13.3", "11.1.0"])
def test_a_device_comes_back_as_a_result_of_its_artifact(tiny: Any, device: Device, version: str) -> None:
    artifact = tiny.export().path
    built = device(artifact, version)

    document = ingest([built], artifact=artifact)

    (result,) = document["results"]
    assert (result["name"], result["artifact"]) == (artifact.name, artifact.name)
    assert (result["model"], result["target"], result["precision"]) == ("tiny", "onnx", "fp32")
    assert (result["effective_precision"], result["version"], result["runtime"]) == ("fp32", version, "trtexec")
    assert set(result["conditions"].values()) == {True}
    assert document["warnings"] == []
    assert [operator["name"] for operator in result["operators"]][1] == "/conv/Conv"
    json.dumps(document, allow_nan=False)


def test_every_version_gives_the_same_record_but_for_version_and_flags(tiny: Any, device: Device) -> None:
    artifact = tiny.export().path
    records = []
    for version in ("8.6.1", "10.3.0", "11.1.0"):
        (record,) = ingest([device(artifact, version)], artifact=artifact)["results"]
        assert record.pop("version") == version and record.pop("flags")
        record["device"].pop("time_utc")
        records.append(record)

    assert records[0] == records[1] == records[2]


def test_the_document_has_the_fields_of_a_benchmark(tiny: Any, device: Device) -> None:
    from edgevit.api import benchmark

    artifact = tiny.export().path
    ours = benchmark([artifact], duration_s=0.05, loads=1, threads=1)

    theirs = ingest([device(artifact, "10.3.0")])

    assert set(theirs) >= {"results", "comparison", "comparisons", "warnings", "settings", "machine"}
    fields = {"name", "samples_ms", "rounds", "latency_ms", "latency_text", "effective_precision", "warmup_runs"}
    assert fields <= set(ours["results"][0]) and fields <= set(theirs["results"][0])
    assert set(theirs["results"][0]["latency_ms"]) == set(ours["results"][0]["latency_ms"])


def test_an_engine_of_another_precision_is_refused(tiny: Any, device: Device) -> None:
    artifact = tiny.export().path
    built = device(artifact, "10.3.0", "fp16")

    with pytest.raises(RuntimeFailure) as caught:
        ingest([built], artifact=artifact)
    assert str(caught.value).startswith(
        f"{built}: its products ran in fp16 (fp16 100%), {artifact.name} asks for fp32; "
    )
    assert ingest([built])["results"][0]["effective_precision"] == "fp16"


def test_what_an_export_kept_in_float32_is_no_other_precision(tiny: Any, device: Device) -> None:
    artifact = tiny.export().path
    built = device(artifact, "11.1.0", "fp16")
    layers = json.loads((built / "layers.json").read_text())
    layers["Layers"][3]["Inputs"][0]["DataType"] = "Float"  # a Gemm that the graph has in float32
    (built / "layers.json").write_text(json.dumps(layers))

    rewrite(artifact, precision="fp16")
    with pytest.raises(RuntimeFailure, match=r"ran in fp16\+fp32 \(fp16 67%, fp32 33%\)"):
        ingest([built], artifact=artifact)
    for kept in (["/layer3"], [{"node": "/layer3", "why": "range"}]):
        rewrite(artifact, choices={"kept_fp32": kept})
        assert ingest([built], artifact=artifact)["results"][0]["effective_precision"] == "fp16"
    for kept in ("/layer3", [{"node": 3}], [None], {"node": "/layer3"}, [["/layer3"]]):
        rewrite(artifact, choices={"kept_fp32": kept})
        with pytest.raises(RuntimeFailure):
            ingest([built], artifact=artifact)


def test_an_engine_built_from_another_graph_is_refused(tiny: Any, device: Device, tmp_path: Path) -> None:
    one, other = (tiny.export(out=tmp_path / str(seed), seed=seed).path for seed in (1, 2))

    with pytest.raises(InputError, match="was built from another model"):
        ingest([device(one, "10.3.0")], artifact=other)


def test_without_layers_the_precision_is_unknown_and_told(tiny: Any, device: Device) -> None:
    artifact = tiny.export().path
    built = device(artifact, "10.3.0")
    files = [built / "times.json", built / "time.log"]

    document = ingest(files, artifact=artifact, name="orin")

    assert (document["results"][0]["effective_precision"], document["results"][0]["name"]) == (None, "orin")
    assert [w for w in document["warnings"] if "the precision that really ran is unknown" in w]


def test_single_files_do_as_well_as_the_folder(tiny: Any, device: Device) -> None:
    artifact = tiny.export().path
    built = device(artifact, "10.3.0")
    files = [path for path in sorted(built.iterdir()) if path.suffix in (".json", ".log")]

    assert ingest(files, artifact=artifact) == ingest([built], artifact=artifact)
    with pytest.raises(InputError, match=r"model\.engine: not a file of trtexec's"):
        ingest([*files, built / "model.engine"])


def test_a_batch_is_what_the_device_ran(tiny: Any, device: Device) -> None:
    artifact = tiny.export(batch="dynamic").path
    built = device(artifact, "10.3.0", "fp32", "n", "--batch", "4")

    (result,) = ingest([built], artifact=artifact)["results"]
    throughput = result["throughput"]

    assert (result["batch"], throughput["pictures_per_s"]) == (4, 4 * throughput["queries_per_s"])
    assert ingest([built], batch=4)["results"][0]["batch"] == 4
    with pytest.raises(UsageError, match="batch 2, but its queries have 4 pictures each"):
        ingest([built], batch=2)
    assert ingest([built / "times.json"], batch=2)["results"][0]["batch"] == 2
    assert ingest([built / "times.json"])["results"][0]["batch"] == 1


def test_several_folders_are_several_results(tiny: Any, device: Device, tmp_path: Path) -> None:
    paths = [tiny.export(out=tmp_path / str(seed), seed=seed).path for seed in (1, 2)]
    renamed = paths[1].rename(tmp_path / "second")
    folders = [device(path, "10.3.0") for path in (paths[0], renamed)]

    document = ingest(folders)

    assert [result["name"] for result in document["results"]] == [paths[0].name, "second"]
    with pytest.raises(UsageError, match="2 runs and one name 'both'"):
        ingest(folders, name="both")


def test_an_artifact_is_read_by_the_folders_that_build_sh_left_in_it(tiny: Any, device: Device) -> None:
    artifact = tiny.export().path
    built = device(artifact, "10.3.0")

    assert ingest([artifact]) == ingest([built])
    built.rename(artifact / "built-64x64")
    shutil.copytree(artifact / "built-64x64", artifact / "built-64x96")
    names = [result["name"] for result in ingest([artifact], artifact=artifact)["results"]]
    assert names == [f"{artifact.name} at 64x64", f"{artifact.name} at 64x96"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"files": []}, UsageError, "nothing to read"),
        ({"files": ["x"], "batch": 0}, UsageError, "batch 0: expected a number of pictures"),
        ({"files": ["x"], "batch": 10**9}, UsageError, "expected a number of pictures"),
        ({"files": ["absent.json"]}, InputError, "absent.json: no such file"),
        ({"files": ["absent.json"], "artifact": "absent"}, ArtifactError, "absent: no such directory"),
        ({"files": ["."]}, InputError, "no times; expected a log with a performance summary"),
    ],
)
def test_a_wrong_request_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(error) as caught:
        ingest(**arguments)

    assert message in str(caught.value) and "\n" not in str(caught.value)
