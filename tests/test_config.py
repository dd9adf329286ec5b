"""A configuration survives JSON and the command line; every mistake in one is a line that names the key."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.config import (
    InputError,
    convert,
    field_comments,
    field_types,
    flatten,
    from_dict,
    parse,
    read_json,
    replace,
    to_dict,
)
from ldm3d.evaluation.__main__ import main as evaluation_main
from ldm3d.evaluation.copies import CopiesConfig
from ldm3d.evaluation.pairs import PairsConfig
from ldm3d.evaluation.reconstruction import ReconstructionConfig
from ldm3d.evaluation.sets import SetsConfig
from ldm3d.reports.latent_map import LatentsConfig
from ldm3d.reports.register_analysis import RegisterReportConfig
from ldm3d.reports.run_report import RunReportConfig


# fmt: off
@dataclass(frozen=True)
class Wrapped:
    short: int = 1  # in the line
    long: tuple[tuple[int, ...], ...] | None = (
        None  # in the line after it
    )
    silent: int = 2
    last: float | None = None  # none: off (1: on)
# fmt: on


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5  # a rate (1/s)
    kind: Literal["one", "two"] = "one"  # a kind

    def __post_init__(self):
        if self.rate < 0:
            raise InputError(f"rate: expected >= 0, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    preset: str = ""  # which
    steps: int = 3  # 100 % of the steps
    flag: bool = False  # on or off
    name: str | None = None  # a name
    size: tuple[int, ...] | None = None  # voxels
    strides: tuple[tuple[int, ...], ...] = ()  # per level
    pair: tuple[float, float] = (0.0, 1.0)  # low, high
    inner: Inner = field(default_factory=Inner)


PRESETS = {"small": {"steps": 5, "inner.kind": "two"}}


def read(*argv):
    return parse(Outer, list(argv), PRESETS)


def test_a_config_survives_json():
    config = Outer(steps=7, size=(4, 5), strides=((1, 2), (2, 2)), inner=Inner(0.25, "two"))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_each_source_overrides_the_one_before(tmp_path):
    assert read("small")[0] == Outer(preset="small", steps=5, inner=Inner(kind="two"))
    config, flags = read("small", "--steps", "9", "--inner.rate=0.1")
    assert (config.steps, config.inner) == (9, Inner(0.1, "two"))
    assert flags == {"steps": 9, "inner.rate": 0.1}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"kind": "vae", **to_dict(config)}))
    assert read(str(path), "--steps", "1")[0] == replace(config, {"steps": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48,64,48", (48, 64, 48)),
        ("48x64x48", (48, 64, 48)),
        ("[48, 64]", (48, 64)),
        ("7", (7,)),
        ("none", None),
    ],
)
def test_tuples_are_typed_in_any_common_way(text, value):
    assert read("small", "--size", text)[0].size == value


def test_commas_alone_separate_words_which_may_be_paths_with_spaces():
    for text in ("my runs/a 2x2,b", "my runs/a 2x2 , b", '["my runs/a 2x2", "b"]'):
        assert convert(text, tuple[str, ...], "ensemble") == ("my runs/a 2x2", "b")


@pytest.mark.parametrize("word", ["none", "", "()", "[]", "None"])
def test_none_and_an_empty_word_empty_a_tuple_and_a_pair_stays_a_pair(word, tmp_path):
    presets = {"full": {"strides": ((1, 2),)}}
    assert parse(Outer, ["full", "--strides", word], presets)[0].strides == ()
    assert parse(Outer, ["full", f"--strides={word}"], presets)[0].strides == ()
    with pytest.raises(InputError, match=r"^pair: expected \(float, float\)"):
        read("small", "--pair", word)


def test_nested_tuples_and_flags_and_none_are_read():
    config = read("small", "--strides", "[[1,2],[2,2]]", "--flag", "--name", "none")[0]
    assert (config.strides, config.flag, config.name) == (((1, 2), (2, 2)), True, None)
    assert read("small", "--flag", "false")[0].flag is False


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["smal"], ["smal", "small"]),
        ([], ["small"]),
        (["small", "--step", "3"], ["--step", "--steps"]),
        (["small", "--inner.rat", "3"], ["--inner.rat", "--inner.rate"]),
        (["small", "--steps", "many"], ["steps", "int", "many"]),
        (["small", "--steps", "1.5"], ["steps", "int", "1.5"]),
        (["small", "--inner.kind", "three"], ["inner.kind", "one | two", "three"]),
        (["small", "--inner.rate", "-1"], ["inner.rate", "-1"]),
        (["small", "--pair", "1,2,3"], ["pair", "1,2,3"]),
        (["small", "extra"], ["extra"]),
        (["missing.json"], ["missing.json"]),
        (["small", "--preset", "big"], ["--preset: no such setting", "first word"]),
        (["small", "--strides", 60 * "[" + 60 * "]"], ["strides", "((int, ...), ...)"]),
        (["small", "--inner.rate", "inf"], ["inner.rate", "inf"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_was_expected(argv, words):
    with pytest.raises(InputError) as e:
        read(*argv)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


def test_an_unknown_key_in_a_file_names_the_nearest_one(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"inner": {"rte": 1}}')
    with pytest.raises(InputError, match=r"inner\.rte.*inner\.rate"):
        read(str(path))
    path.write_text("{")
    with pytest.raises(InputError, match=r"c\.json.*not JSON"):
        read(str(path))


def test_a_file_that_holds_no_object_or_no_finite_number_is_refused(tmp_path):
    path = tmp_path / "c.json"
    for text, word in (("[1]", "object"), ('{"steps": 1e999}', "steps"), ('{"steps": NaN}', "steps")):
        path.write_text(text)
        with pytest.raises(InputError, match=word):
            read(str(path))


def test_a_file_without_a_preset_is_named_after_itself(tmp_path):
    (tmp_path / "mine.json").write_text('{"steps": 4}')
    assert read(str(tmp_path / "mine.json"))[0] == Outer(preset="mine", steps=4)


def test_a_list_that_begins_with_a_minus_is_a_value_and_not_a_flag():
    assert read("small", "--pair", "-1000,400")[0].pair == (-1000, 400)
    assert read("small", "--pair", "-.5 -.25")[0].pair == (-0.5, -0.25)


def test_a_flag_may_be_written_with_dashes_and_values_keep_theirs():
    @dataclass(frozen=True)
    class Dashed:
        preset: str = ""  # which
        color_by: str = ""  # a column

    for flags in (["--color-by", "a-b"], ["--color-by=a-b"], ["--color_by", "a-b"]):
        assert parse(Dashed, ["small", *flags], {"small": {}})[0].color_by == "a-b"


@pytest.fixture
def help_of(capsys):
    """help_of(main, flags): what a program prints before it exits with 0."""

    def page(main, *flags: str) -> str:
        with pytest.raises(SystemExit) as e:
            main(list(flags))
        assert e.value.code in (0, None)
        return capsys.readouterr().out

    return page


def test_help_lists_every_field_with_type_default_and_comment(help_of):
    text = " ".join(help_of(lambda argv: read(*argv), "--help").split())
    assert all(f"--{key}" in text for key in flatten(Outer()) if key != "preset")  # the first word
    assert "100 % of the steps (int; default 3)" in text
    assert "a kind (one | two; default one)" in text
    assert "per level (((int, ...), ...); none = empty; default none)" in text


SCRIPTS = {"vae": train_vae, "ldm": train_ldm, "cdal": train_cdal}
OF_CHECKPOINTS = {  # switches for the weights of other libraries
    *("disc.scale_by", "disc.last_kernel"),
    *("vae.gn_eps", "vae.final_silu", "vae.attn_out_proj", "vae.down_pad", "vae.double_z"),
    *(
        "vae.extra_up_block",
        "vae.trunk",
        "vae.res_channels",
        "unet.gn_eps",
        "unet.time_embed_order",
        "unet.attn_out_proj",
    ),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_short_help_of_a_script_is_a_page_and_help_all_shows_every_setting(kind, help_of, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    script, every = SCRIPTS[kind], flatten(SCRIPTS[kind].Config()).keys() - {"preset"}
    short, whole = help_of(script.main, "--help"), help_of(script.main, "--help", "all")
    shown, listed = (set(re.findall(r"^  --([\w.]+)", page, re.MULTILINE)) for page in (short, whole))
    assert listed == every
    assert shown == set(" ".join(script.COMMON.values()).split())
    assert 25 <= len(shown) <= 36
    assert not shown & OF_CHECKPOINTS
    assert {"plan", "memory"} <= shown
    assert "preset|FOLDER" in short.splitlines()[0]
    assert kind == "cdal" or OF_CHECKPOINTS & every
    settings = short[short.index(f"\n{next(iter(script.COMMON))}:") :]
    assert settings.count("\n") <= 64
    assert max(map(len, short.splitlines())) <= 110
    assert all(f"\n{title}:\n" in short for title in script.COMMON)
    assert "samples per optimizer step, over all ranks (int; default" in short
    assert script.__doc__.splitlines()[0] in short
    assert help_of(script.main, "hippocampus", "-h") == short


def test_a_door_has_one_help_with_every_setting_of_its_task(help_of):
    for words in (["--help"], ["--help", "all"], ["GENERATED", "REAL", "-h"]):
        page = help_of(evaluation_main, "samples", *words)
        assert all(f"--{key}" in page for key in flatten(SetsConfig()))


def test_help_is_asked_for_with_the_word_all_or_none():
    with pytest.raises(InputError, match="--help: expected nothing after it, or the word all, got '3'"):
        read("--help=3")


SETTINGS = [script.Config for script in (train_vae, train_ldm, train_cdal)]
SETTINGS += [config for config, *_ in sample.PROGRAMS.values()]
SETTINGS += [CopiesConfig, PairsConfig, ReconstructionConfig, SetsConfig]
SETTINGS += [LatentsConfig, RegisterReportConfig, RunReportConfig]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_setting_of_a_program_is_explained(settings):
    def explained(cls):
        for name, kind in field_types(cls).items():
            if dataclasses.is_dataclass(kind):
                explained(kind)
            else:
                assert field_comments(cls).get(name), f"{cls.__name__}.{name}"

    explained(settings)


def test_the_help_of_a_field_is_found_where_the_formatter_wrapped_its_value():
    expected = {"short": "in the line", "long": "in the line after it", "last": "none: off (1: on)"}
    assert field_comments(Wrapped) == expected


def test_defaults_may_follow_from_other_settings_and_flags_still_win():
    def base(config):
        return Outer(name=f"steps {config.steps}", size=(1, 2))

    config, _ = parse(Outer, ["small", "--size", "3,4"], PRESETS, base=base)
    assert (config.name, config.size, config.steps) == ("steps 5", (3, 4), 5)


@pytest.mark.parametrize("depth", [60, 900, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path, depth, brackets):
    path = tmp_path / "deep.json"
    path.write_text('{"a":' + depth * brackets[:-1] + "1" + depth * brackets[-1] + "}")
    with pytest.raises(InputError, match=r"deep\.json: nested too deeply"):
        read_json(path)
