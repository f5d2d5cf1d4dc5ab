"""The script of ``shiftaddvit --print-completion`` completes commands in a shell."""

import shutil
import subprocess

import pytest
import shtab

from shiftaddvit_jax.cli import main
from shiftaddvit_jax.names import SHELLS


def printed(capsys, shell):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash completes here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pred"], "predict"),
        (["nvs", "rend"], "render"),
        (["predict", "--top"], "--top-k"),
        (["export", "--precision", "bf"], "bfloat16"),
        (["report", "pvt_v2_b2_"], "pvt_v2_b2_li"),
        (["convert", "--attention", "hamming_k"], "hamming_ksh"),
        (["info", "wei"], "weights.pth"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bash_completes(words, expected, tmp_path, capsys):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "script").write_text(printed(capsys, "bash"))
    lines = [
        "source ./script",
        f"COMP_WORDS=(shiftaddvit {' '.join(words)})",
        f"COMP_CWORD={len(words)}",
        "_shtab_shiftaddvit",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    run = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == [expected]


def test_there_is_a_script_for_every_shell_that_help_names(capsys):
    assert set(SHELLS) <= set(shtab.SUPPORTED_SHELLS)
    for shell in SHELLS:
        assert "measure-latency" in printed(capsys, shell)
