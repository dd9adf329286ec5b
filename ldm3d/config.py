"""Settings: frozen dataclasses <-> JSON <-> command line.

A configuration is a frozen dataclass of scalars, tuples, Literals, ``X | None`` and other configurations,
defined right above the class that it configures. The command line is made from the dataclass: each field is
an option, and the comment at the end of the field's line is the option's help. A script names the settings
that people change: ``--help`` shows these, and ``--help all`` shows every setting. For example

    @dataclass(frozen=True)
    class Config:
        steps: int = 1000  # optimizer steps
        optim: OptimConfig = field(default_factory=OptimConfig)

is read from ``--steps 500 --optim.lr 1e-3``. Each source overrides the one before: defaults, then a preset or
JSON file, then the options of the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

C = TypeVar("C")


LARGEST = 3e38  # what float32, in which everything is computed, can hold


class InputError(ValueError):
    """A mistake of the user: one line that names the file or key. Scripts print the line and exit with 2."""


# --- dataclass <-> plain values -----------------------------------------------------------------------------


def at_least(config: Any, low: float, *names: str) -> None:
    """InputError for the first of these fields that is set and below `low`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise InputError(f"{name}: expected at least {low}, got {value}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of every field of a configuration class, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf, nested configurations opened."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
    """The inverse of `to_dict`. Missing keys take their defaults; unknown keys and wrong types raise
    InputError.

    A class may have a static method `upgrade(values) -> values`, which turns the keys that an older version
    stored into today's.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where or cls.__name__}: expected an object of keys, got {values!r}")
    if hasattr(cls, "upgrade"):
        values = cls.upgrade(dict(values))
    types_of = field_types(cls)
    kwargs = {}
    for name, value in values.items():
        key = f"{where}.{name}" if where else name
        if name not in types_of:
            raise InputError(unknown_key(key, [f"{where}.{k}" if where else k for k in types_of]))
        kwargs[name] = convert(value, types_of[name], key)
    try:
        return cls(**kwargs)
    except InputError as e:  # raised by __post_init__ with the bare field name
        raise InputError(f"{where}.{e}" if where and not str(e).startswith(where) else str(e)) from None


def upgraded(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Nested values of a file with the keys of today, by the `upgrade` of every class that has one."""
    if hasattr(cls, "upgrade"):
        values = cls.upgrade(dict(values))
    kinds = {name: kind for name, kind in field_types(cls).items() if dataclasses.is_dataclass(kind)}
    inside = {k: v for k, v in values.items() if k in kinds and isinstance(v, dict)}
    return values | {name: upgraded(kinds[name], value) for name, value in inside.items()}


def replace(config: C, changes: dict[str, Any]) -> C:
    """A copy with ``{"dotted.key": value}`` applied; values are checked against the types of the fields."""
    nested = to_dict(config)
    keys = flatten(config).keys()
    for key, value in changes.items():
        if key not in keys:
            raise InputError(unknown_key(key, list(keys)))
        node = nested
        *path, last = key.split(".")
        for part in path:
            node = node[part]
        node[last] = value
    return from_dict(type(config), nested)


def unknown_key(key: str, existing: list[str]) -> str:
    """One line that names the key and the nearest existing one: run.steps for steps, and for run.stepz."""
    word, names = key.lstrip("-"), {k.lstrip("-"): k for k in existing}  # dashes would make all words alike
    near = [k for k in names if k.endswith(f".{word}")]
    near = near or difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return f"{key}: no such setting" + (f"; did you mean {names[near[0]]}?" if near else "")


def convert(value: Any, kind: Any, key: str) -> Any:
    """`value` (from JSON, Python or the text of an option) as type `kind`. An impossible value
    raises an InputError that names `key`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, key)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
            raise wrong(value, kind, key)
        for option in (a for a in args if a is not type(None)):
            try:
                return convert(value, option, key)
            except InputError:
                continue
        raise wrong(value, kind, key)
    if origin is Literal:
        for option in args:
            if str(value) == str(option):
                return option
        raise wrong(value, kind, key)
    if origin is tuple:
        return convert_tuple(value, args, kind, key)
    return convert_scalar(value, kind, key)


def convert_tuple(source: Any, args: tuple, kind: Any, key: str) -> tuple:
    """Text is JSON ("[[1,2,2],[2,2,2]]", '["words, with commas"]') or a list with commas, spaces or x
    ("48,64,48", "48x64x48"); "none" and an empty word are the empty tuple. Commas alone separate words, which
    may be paths and names with spaces."""
    value = source
    if isinstance(source, str):
        text = source.strip()
        if text.lower() in ("", "none", "null"):
            value = []
        elif text[:1] in "[(":
            try:
                value = json.loads(text if '"' in text else text.replace("(", "[").replace(")", "]"))
            except (json.JSONDecodeError, RecursionError):
                raise wrong(source, kind, key) from None
            if too_deep(value):
                raise wrong(source, kind, key)
        else:
            between = r"\s*,\s*" if args[0] is str else r"(?<=\d)x(?=\d)|[,\s]+"
            value = [v for v in re.split(between, text) if v]
    if not isinstance(value, (list, tuple)):
        value = [value]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(v, args[0], key) for v in value)
    if len(value) != len(args):
        raise wrong(source, kind, key)
    return tuple(convert(v, a, key) for v, a in zip(value, args, strict=True))


def convert_scalar(value: Any, kind: Any, key: str) -> Any:
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
    elif kind is str:
        if isinstance(value, str):
            return value
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong(value, kind, key) from None
        finite = abs(number) < LARGEST if kind is float else True
        if finite and (isinstance(value, str) or number == value):
            return number
    raise wrong(value, kind, key)


def wrong(value: Any, kind: Any, key: str) -> InputError:
    return InputError(f"{key.rstrip('_')}: expected {type_name(kind)}, got {value!r}")


def type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        return f"({', '.join('...' if a is Ellipsis else type_name(a) for a in args)})"
    return "none" if kind is type(None) else kind.__name__


# --- the command line ---------------------------------------------------------------------------------------


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """Field name -> the comment at the end of the field's line, for the fields of a class and of its bases. A
    value that is wrapped in parentheses over several lines is understood too."""
    field = r"^    (\w+)\s*:[^#\n]*(?:\(\n[^#\n]*)?#\s*(.+)$"
    sources = [inspect.getsource(base) for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return dict(found for source in sources for found in re.findall(field, source, re.MULTILINE))


def add_options(group_parent: argparse.ArgumentParser, cls: type, default: Any, prefix: str = "") -> None:
    """Add one option for every leaf of `cls`, and one help group for every nested configuration."""
    group = group_parent.add_argument_group(prefix.rstrip(".") or "settings")
    comments = field_comments(cls)
    for name, kind in field_types(cls).items():
        key, value = prefix + name, getattr(default, name)
        if dataclasses.is_dataclass(kind):
            add_options(group_parent, kind, value, key + ".")
            continue
        if key == "preset":  # the first word of a command, see `parse`
            continue
        empty = "; none = empty" if typing.get_origin(kind) is tuple and ... in typing.get_args(kind) else ""
        shown = "none" if value == () else show(value)
        text = f"{comments.get(name, '')} ({type_name(kind)}{empty}; default {shown})".strip()
        text = text.replace("%", "%%")
        flag = {"nargs": "?", "const": "true"} if kind is bool else {}
        if cls.__dataclass_fields__[name].metadata.get("repeat"):  # --key A --key B gives (A, B), unsplit
            flag = {"action": "append"}
        option = key.rstrip("_")  # the field as_ is --as, since `as` is a word of Python
        group.add_argument(f"--{option}", dest=key, default=argparse.SUPPRESS, metavar="V", help=text, **flag)


def show(value: Any) -> str:
    """A value as it can be typed on the command line."""
    if isinstance(value, tuple):
        nested = any(isinstance(v, tuple) for v in value)
        return json.dumps(value).replace(" ", "") if nested else ",".join(map(show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


class Help(argparse.Action):
    """``--help`` prints the settings that people change, ``--help all`` every setting. Both exit with 0."""

    def __call__(self, parser: Any, namespace: Any, value: str | None, flag: str | None = None) -> None:
        if value not in (None, "all"):
            raise InputError(f"{flag}: expected nothing after it, or the word all, got {value!r}")
        print(parser.help_page(everything=value == "all" or not parser.common), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse, but mistakes are InputErrors that name the nearest flag, and abbreviations are refused.

    A flag may be written with dashes: --color-by is --color_by. common: title -> the keys in one group of the
    short help, as "run.steps batch_size"; None: there is one help only, of every setting.
    """

    def __init__(self, common: dict[str, str] | None = None, **kwargs: Any):
        kwargs |= {"allow_abbrev": False, "add_help": False, "formatter_class": argparse.HelpFormatter}
        super().__init__(**kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1000,400 is a value too, not a flag
        self.common = common
        about = "the settings that people change; with the word all: every setting" if common else "this page"
        how = {"nargs": "?", "metavar": "all", "default": argparse.SUPPRESS, "help": about}
        self.add_argument("-h", "--help", action=Help, **how)

    def help_page(self, everything: bool) -> str:
        """The description, then the settings in groups: all of them, or those of `common`."""
        words, rest, *groups = self._action_groups
        sections = [("", words._group_actions + rest._group_actions)]
        if everything:
            sections += [(group.title, group._group_actions) for group in groups]
        else:
            option = {action.dest: action for action in self._actions}
            sections += [
                (title, [option[key] for key in keys.split()]) for title, keys in self.common.items()
            ]
        width = min(110, shutil.get_terminal_size((110, 24)).columns)
        page = argparse.RawDescriptionHelpFormatter(self.prog, max_help_position=30, width=width)
        named = [action.metavar or action.dest for action in words._group_actions]
        page.add_usage(" ".join(["%(prog)s", *named, "[--key value ...]"]), [], [])
        page.add_text(self.description)
        for title, actions in sections:
            page.start_section(title or None)
            page.add_arguments(actions)
            page.end_section()
        return page.format_help()

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        words = sys.argv[1:] if argv is None else argv
        words = [re.sub(r"^--[^=]+", lambda flag: f"--{flag[0][2:].replace('-', '_')}", w) for w in words]
        args, rest = self.parse_known_args(words)
        for word in rest:
            if word.startswith("-"):
                flags = [option for action in self._actions for option in action.option_strings]
                raise InputError(unknown_key(word.split("=")[0], flags))
            raise InputError(f"{word}: not expected here")
        return args


def read_command(
    cls: type[C], positional: dict[str, str], argv: list[str] | None, prog: str | None, doc: str | None
) -> tuple[C, list[str]]:
    """Read ``WORD ... --key value ...`` of a tool: (settings, the words). positional: the name of each word,
    and what the word is; all are required.

    A class may have a static method `defaults(flags) -> settings`, for defaults that follow from flags.
    """
    parser = Parser(prog=prog, description=doc)
    for name, text in positional.items():
        parser.add_argument(name, nargs="?", help=text)
    add_options(parser, cls, cls())
    args = vars(parser.parse(argv))
    words = [args.pop(name) for name in positional]
    for (name, text), word in zip(positional.items(), words, strict=True):
        if word is None:
            raise InputError(f"which {name}? give the {text}")
    defaults = cls.defaults(args) if hasattr(cls, "defaults") else cls()
    return replace(defaults, args), words


Task = tuple[type, dict[str, str], Callable[..., Any]]  # settings, positional words, the function called


def run_task(tasks: dict[str, Task], argv: list[str] | None, prog: str, doc: str) -> None:
    """Read ``TASK WORD ... --key value ...`` and call the function of that task with (settings, *words)."""
    words = sys.argv[1:] if argv is None else argv
    task = words[0] if words else None
    if task in ("-h", "--help"):
        return print(doc, f"tasks: {', '.join(tasks)}; TASK --help lists every setting", sep="\n")
    if task not in tasks:
        got = f", got {task}" if task else ""
        raise InputError(f"which task? expected {' or '.join(tasks)}{got}")
    cls, positional, do = tasks[task]
    doc = sys.modules[cls.__module__].__doc__
    config, arguments = read_command(cls, positional, words[1:], f"{prog} {task}", doc)
    do(config, *arguments)


def parse(
    cls: type[C],
    argv: list[str] | None,
    presets: dict[str, dict[str, Any]],
    doc: str | None = None,
    base: Callable[[C], C] | None = None,
    common: dict[str, str] | None = None,
    planner: Callable[[Path, dict[str, Any], Callable[[dict[str, Any]], C]], dict[str, Any]] | None = None,
) -> tuple[C, dict[str, Any]]:
    """Read ``[preset | file.json | FOLDER] --dotted.key value ...``: (config, the flags by dotted key).

    A preset is ``{"dotted.key": value}``. The field `preset` of `cls` records the name of the preset, or of
    the file if the file has no such key. The file may be a run's config.json or a part of one.

    `base` makes defaults that depend on the settings: stage two takes its data settings from the autoencoder.
    `base` gets the merged configuration; preset, file and flags are then merged once more over its result.
    `common` is the short help, see `Parser`.

    `planner` takes the place of a preset where the first word is a folder: `planner(folder, flags, merge)`
    gives the settings by dotted key. It may add to the flags, and `merge(settings)` is the configuration.
    """
    parser = Parser(common, description=doc)
    choices = f"one of: {', '.join(presets)}; or a JSON file"
    choices += "; or a folder, for which settings are planned" if planner else ""
    parser.add_argument("first", metavar="preset|FOLDER" if planner else "preset", nargs="?", help=choices)
    parser.add_argument("--preset", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_options(parser, cls, cls())
    args = vars(parser.parse(argv))
    name = args.pop("first")
    if "preset" in args:
        raise InputError(f"--preset: no such setting; the preset is the first word: {args['preset']} ...")
    if not name:
        raise InputError(f"which preset? {choices} (--help explains the settings)")
    types_of = leaf_types(cls)
    flags = {key: convert(value, types_of[key], key) for key, value in args.items()}

    def merge(chosen: dict[str, Any]) -> C:
        config = replace(cls(), chosen | flags)
        return config if base is None else replace(base(config), chosen | flags)

    if name in presets:
        chosen = {**presets[name], "preset": name}
    elif name.endswith(".json"):
        chosen = stored_settings(cls, name)
    elif Path(name).is_dir() and planner:
        chosen = planner(Path(name), flags, merge)
    else:
        near = difflib.get_close_matches(name, presets, n=1)
        if planner and Path(name).is_file():
            raise InputError(f"{name}: is a file; give its folder, {Path(name).parent}")
        expects_run = "vae" in types_of and flags.get("vae") is None
        if expects_run and not Path(name).exists() and len(Path(name).parts) > 1:
            raise InputError(f"{name}: no such run; train it first: python train_vae.py ...")
        if planner and "data.root" in flags and not Path(name).exists() and len(Path(name).parts) > 1:
            moved = f"where the data have moved, their folder is the first word: {flags['data.root']}"
            raise InputError(f"{name}: no such folder; {moved}")
        if Path(name).is_dir():
            raise InputError(f"{name}: a folder; a preset comes first, data are named by --data.root {name}")
        raise InputError(
            f"{name}: no such preset; did you mean {near[0]}?"
            if near
            else f"{name}: no such preset{' or folder' if planner else ''}; {choices}"
        )
    return merge(chosen), flags


def stored_settings(cls: type, path: str | Path) -> dict[str, Any]:
    """{"dotted.key": value} of a JSON file, with the keys of today. `preset` is the name of the file if the
    file does not say it."""
    chosen = {"preset": Path(path).stem} | leaves(upgraded(cls, read_json(path)))
    chosen.pop("kind", None)  # a run's config.json holds the kind of the run too
    return chosen


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"dotted.key": value}."""
    flat = {}
    for name, value in values.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every leaf."""
    flat = {}
    for name, kind in field_types(cls).items():
        nested = dataclasses.is_dataclass(kind)
        flat |= leaf_types(kind, f"{prefix}{name}.") if nested else {prefix + name: kind}
    return flat


def too_deep(content: Any, limit: int = 50) -> bool:
    """Are lists and dicts nested deeper than any settings are? Going through them could fail."""
    level = [content]
    for _ in range(limit):
        inside = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [value for values in inside for value in values]
    return bool(level)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; if there is none, an InputError that names the file."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    if too_deep(content):
        raise InputError(f"{path}: nested too deeply")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object of keys, got {type(content).__name__}")
    return content
