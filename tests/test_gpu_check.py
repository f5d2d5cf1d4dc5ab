import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import jax
import pytest

PRINT = [sys.executable, "-c", "print('3 failed, 41 passed, 2 skipped in 7.1s')"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(tmp_path):
    script = Path(gpu_check.__file__)
    found = subprocess.run([sys.executable, script, "--output", tmp_path], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == (
        "gpu-check: error: JAX finds no NVIDIA GPU here; run this on a machine that has one\n"
    )


def test_packages_that_are_missing_are_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "NEEDED", {"json": "json", "no_such_module.part": "none==1"})
    assert gpu_check.missing() == ["none==1"]
    with pytest.raises(SystemExit, match="missing here: none==1; put their wheels into a folder"):
        gpu_check.install(["none==1"], None, tmp_path)


def test_wheels_that_a_folder_lacks_are_named(tmp_path):
    with pytest.raises(SystemExit, match="lacks a wheel for this Python of: none==1"):
        gpu_check.install(["none==1"], tmp_path, tmp_path / "site")


def test_the_commands_are_those_that_there_are(tmp_path):
    from shiftaddvit_jax.cli import build_parser

    commands = [command for command, _ in gpu_check.steps(tmp_path).values()]
    benches = [command[3:] for command in commands if "shiftaddvit_jax" in command]
    assert len(benches) == len(commands) - 1 == 5
    for command in benches:
        build_parser().parse_args(command)


def test_a_step_is_logged_with_its_report(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", f"print('seen'); open({str(report)!r}, 'w').write('[1]')"]
    with (tmp_path / "log").open("w") as log:
        step = gpu_check.run("name", command, report, 60, None, log)
    assert (step["exit_code"], step["report"]) == (0, [1])
    assert "seen" in (tmp_path / "log").read_text()


def test_a_step_whose_time_is_over_is_stopped_and_said(tmp_path):
    with (tmp_path / "log").open("w") as log:
        step = gpu_check.run(
            "name", [sys.executable, "-c", "import time; time.sleep(60)"], None, 0, None, log
        )
    assert step["exit_code"] is None
    assert "its time was over" in (tmp_path / "log").read_text()


def test_one_file_has_all_that_was_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--output", str(tmp_path)])
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu": "a stand-in"})
    monkeypatch.setattr(gpu_check, "steps", lambda output: {"tests": (PRINT, None)})
    monkeypatch.setattr(gpu_check, "missing", list)
    assert gpu_check.main() == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["machine"] == {"gpu": "a stand-in"}
    assert found["tests"] == {"failed": 3, "passed": 41, "skipped": 2}
    assert [step["name"] for step in found["steps"]] == ["tests"]
