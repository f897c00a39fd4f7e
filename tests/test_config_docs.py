"""The table of keys is the one source: defaults, schema, docs and the shipped file agree with it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli

from tests.fake.flags import known
from vllmd.config.engine import OWNED_FLAGS, flag_name
from vllmd.config.kinds import Bad, Place
from vllmd.config.load import load
from vllmd.config.manual import page
from vllmd.config.options import OPTIONS, SECTIONS, Option, Section, default_of
from vllmd.config.paths import complete
from vllmd.config.schema import schema
from vllmd.spec import DaemonSpec, DeviceRule, HttpSpec, ModelSpec, RestartRule
from vllmd.units import MIB

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "etc/vllmd.toml"
SPECS: dict[Section, type] = {
    Section.DAEMON: DaemonSpec,
    Section.HTTP: HttpSpec,
    Section.DEVICES: DeviceRule,
    Section.MODELS: ModelSpec,
    Section.RESTART: RestartRule,
}


def validate(document: Any) -> None:
    jsonschema.Draft202012Validator(schema()).validate(document)


def examples() -> list[str]:
    """Every TOML block of the docs."""
    files = sorted(ROOT.glob("docs/*.md"))
    return [block for file in files for block in re.findall(r"^```toml\n(.*?)^```", file.read_text(), re.S | re.M)]


def test_the_table_has_the_fields_of_the_specs_with_their_defaults() -> None:
    """Each key is a field and each field a key; what the file may leave out is what the value has by itself."""
    for section, spec in SPECS.items():
        fields = {field.name: field for field in dataclasses.fields(spec) if field.name != "name"}
        assert set(fields) == set(SECTIONS[section])
        for key, option in SECTIONS[section].items():
            field = fields[key]
            if option.default is not None and field.default is not dataclasses.MISSING and key != "restart":
                assert (key, field.default) == (key, default_of(option))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.section}.{option.key}")
def test_every_key_is_documented_and_its_default_fits_its_schema(option: Option) -> None:
    """A sentence, a default or what holds without one, and a schema that takes the default."""
    assert option.doc.endswith((".", "?"))
    assert (option.default is None) == bool(option.absent)
    if option.default is not None:
        jsonschema.Draft202012Validator(option.kind.schema).validate(option.default)


def test_the_shipped_file_loads_without_problems_or_warnings() -> None:
    """As root and as anybody."""
    for root in (True, False):
        settings = load(EXAMPLE, root=root, env={"HOME": "/home/ada"})
        assert settings.warnings == ()
        assert {"dots-ocr", "qwen3-vl-2b", "qwen3-8b"} <= set(settings.models)


#: A key or a header that is commented out; prose is none, and a line of it begins with more than one space or a word.
COMMENTED = re.compile(r"^# (\w+ = .+|\[[^]]+\])$", re.M)


def head() -> str:
    """The shipped file down to its models."""
    return EXAMPLE.read_text().partition("# ------")[0]


def test_the_shipped_file_names_every_key() -> None:
    """Set, or commented out with its default, or with an example that says so."""
    text = EXAMPLE.read_text()
    for option in OPTIONS:
        if option.section is not Section.RESTART:
            assert re.search(rf"^(# )?{option.key} = ", text, re.M), option.key
    commented = re.findall(r"^# (\w+) = (.+?)(?:\s+# (.*))?$", head(), re.M)
    assert len(commented) > 30
    for key, value, note in commented:
        option = next(o for o in OPTIONS if o.key == key)
        written = tomli.loads(f"x = {value}")["x"]
        place = Place(ROOT, ROOT)
        if key in ("socket", "state_dir", "runtime_dir", "log_dir", "cache_dir"):
            assert (key, str(complete({}, {}, True)[key])) == (key, written)
        elif key == "restart":
            assert written == {each.key: each.default for each in SECTIONS[Section.RESTART].values()}
        elif note.startswith("example: "):
            assert option.default is None and option.kind.read(written, place) is not None, key
        else:
            assert (key, written) == (key, option.default)


def test_the_shipped_file_is_valid_with_everything_uncommented() -> None:
    """Every key at once, and the models that are commented out: no problem, and no warning but that of no effect."""
    text, count = COMMENTED.subn(r"\1", EXAMPLE.read_text())
    assert count > 40
    settings = load(EXAMPLE, root=True, env={"CREDENTIALS_DIRECTORY": "/none"}, content=text.encode())
    assert [warning for warning in settings.warnings if "no effect in this version" not in warning] == []
    assert {"got-ocr", "qwen25-vl-7b-bf16", "qwen3-8b-bf16"} <= set(settings.models)
    assert sum(model.autostart for model in settings.models.values()) == 2


def test_nothing_of_the_shipped_file_starts_by_itself() -> None:
    """A fresh install on a machine without models or vLLM shows no failures."""
    assert not any(model.autostart for model in load(EXAMPLE, root=True, env={}).models.values())


def test_the_models_of_the_shipped_file_fit_a_card_of_12_gb() -> None:
    """12,227 MiB less the reserve of 512: each alone, and those two together that can be started with vllmd."""
    models = load(EXAMPLE, root=True, env={}).models.values()
    budget = (12_227 - 512) * MIB
    assert all(isinstance(model.vram, int) and model.vram <= budget for model in models)
    uncommented = COMMENTED.sub(r"\1", EXAMPLE.read_text())
    started = [m for m in load(EXAMPLE, content=uncommented.encode(), env={}).models.values() if m.autostart]
    assert len(started) == 2 and sum(m.vram for m in started if isinstance(m.vram, int)) <= budget


def test_the_sums_in_the_shipped_file_add_up() -> None:
    """Parts to vram, models to the total, and that into the budget."""
    text = EXAMPLE.read_text()
    models = load(EXAMPLE, root=True, env={}).models
    rows = re.findall(r"^#     (\S+) +(.+?) += +(\d+) MiB", text, re.M)
    assert len(rows) == 2
    for name, parts, total in rows:
        assert sum(map(int, re.findall(r"\d+", parts))) == int(total)
        assert models[name].vram == int(total) * MIB
    together, budget = (
        int(each.replace(",", "")) for each in re.findall(r"together ([\d,]+) of ([\d,]+) MiB", text)[0]
    )
    assert together == sum(int(total) for _, _, total in rows) <= budget == 12_227 - 512


def test_the_schema_is_valid_and_takes_the_shipped_file() -> None:
    """Draft 2020-12."""
    jsonschema.Draft202012Validator.check_schema(schema())
    validate(tomli.loads(EXAMPLE.read_text()))


@pytest.mark.parametrize("text", examples())
def test_every_example_in_the_docs_is_valid(text: str, tmp_path: Path) -> None:
    """By the schema, and by loading it."""
    validate(tomli.loads(text))
    (tmp_path / "hf").write_text("token")
    settings = load(tmp_path / "x.toml", content=text.encode(), env={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert settings.warnings == ()


@pytest.mark.parametrize(
    "text",
    [
        "[models.a]\n",
        "[models.A]\nmodel = 'a/b'",
        "[models.a]\nmodel = 'a/b'\nvram = '9 Gb'",
        "[models.a]\nmodel = 'a/b'\nvrma = '9GiB'",
        "[models.a]\nmodel = 'a/b'\nport = 80",
        "[models.a]\nmodel = 'a/b'\nargs = { gpu_memory_utilization = 0.9 }",
        "[models.a]\nmodel = 'a/b'\nenv = { VLLMD_X = '1' }",
        "[modles.a]\nmodel = 'a/b'",
        "[devices.gpu0]\n",
        "[daemon]\nlog_level = 'loud'",
    ],
)
def test_the_schema_refuses_what_load_refuses(text: str) -> None:
    """Names, types, ranges, unknown keys, owned flags and variables."""
    with pytest.raises(jsonschema.ValidationError):
        validate(tomli.loads(text))


def test_docs_are_printed_from_the_table() -> None:
    """docs/config.md = `python -m vllmd.config.options`."""
    assert (ROOT / "docs/config.md").read_text() == page()


def test_no_flag_of_vllm_is_refused_but_those_that_are_ours() -> None:
    """An owned flag's abbreviation is never another flag's full name; each owned flag is one that vLLM has."""
    flags = {flag.replace("_", "-") for flag in known()}
    refused = set()
    for flag in flags:
        try:
            flag_name(flag)
        except Bad:
            refused.add(flag)
    assert refused == flags & set(OWNED_FLAGS)
    # Two further spellings that vLLM takes for an owned flag.
    assert set(OWNED_FLAGS) - flags == {"device-memory-utilization", "kv-cache-memory"}
