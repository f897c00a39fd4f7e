"""What is checked away from vllmd: what only its environment knows is a warning there; vllmd itself refuses."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from vllmd.config import check as program
from vllmd.config.load import ConfigError, check, load

NONE: Mapping[str, str] = {}
TEXT = """
[models.a]
model = "${env:ROOT}/m"
vram = "${env:SIZE}"
env = { HF_TOKEN = "${credential:hf}", B = "${env:B}" }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vllmd.toml"
    path.write_text(TEXT)
    return path


def test_what_is_not_known_here_is_a_warning_with_its_source(file: Path) -> None:
    """And no mistake is made up from the values that are missing."""
    found = check(file, env=NONE)
    assert found.problems == () and found.models == ("a",)
    assert [str(warning).removeprefix(f"{file}:") for warning in found.warnings] == [
        '3: models.a.model: "${env:ROOT}": not known here: vllmd gets it from its environment',
        '4: models.a.vram: "${env:SIZE}": not known here: vllmd gets it from its environment',
        '5: models.a.env.B: "${env:B}": not known here: vllmd gets it from its environment',
        '5: models.a.env.HF_TOKEN: "${credential:hf}": not known here: vllmd gets it from systemd '
        "(a file hf in /etc/vllmd/credentials, or LoadCredential=hf:/path in vllmd.service)",
    ]


def test_vllmd_itself_refuses_what_is_missing(file: Path) -> None:
    """Each of them."""
    with pytest.raises(ConfigError) as caught:
        load(file, env=NONE)
    assert [problem.key for problem in caught.value.problems] == [
        "models.a.model", "models.a.vram", "models.a.env.B", "models.a.env.HF_TOKEN"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('category = "${credential:hf}"', "would be seen by others"),
        ('args = { revision = "${env:NONE}" }', "would show in the process list"),
        ('env = { A = "${credential:../x}" }', "not the name of a credential"),
        ('env = { A = "${HOME}" }', "is not a substitution"),
        ('vram = "9 Gb"', "is not a size"),
    ],
)
def test_what_is_wrong_anywhere_stays_a_problem(file: Path, line: str, said: str) -> None:
    """Being away from vllmd excuses only what it alone knows."""
    file.write_text(f'[models.a]\nmodel = "o/m"\n{line}\n')
    (problem,) = check(file, env=NONE).problems
    assert said in str(problem)


@pytest.mark.parametrize(("name", "text"), [("hf", "plain"), ("vllmd_hf", "of a directory")])
def test_a_credential_is_found_under_both_names(file: Path, tmp_path: Path, name: str, text: str) -> None:
    """LoadCredential=hf:/path, and LoadCredential=vllmd:/directory, whose files become vllmd_NAME; the plain one first."""
    (tmp_path / "vllmd_hf").write_text("of a directory\n")
    (tmp_path / name).write_text(text)
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path), "ROOT": "/m", "SIZE": "1GiB", "B": "b"}
    assert load(file, env=env).models["a"].env["HF_TOKEN"] == text


def test_the_program_prints_warnings_counts_and_code(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0 with warnings, 78 with problems; one model is not "1 models"."""
    for name in ("ROOT", "SIZE", "B", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    assert program.main([str(file)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{file}: good, 1 model\n" and said.err.count("warning: ") == 4
    file.write_text(TEXT + "port = 80\nvrma = 1\n")
    assert program.main([str(file)]) == 78
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith(f"cannot use {file}: 2 problems\n")
    assert program.main([str(file), "--json"]) == 78
    value = json.loads(capsys.readouterr().out)
    assert (value["ok"], value["models"], len(value["problems"]), len(value["warnings"])) == (False, ["a"], 2, 4)
