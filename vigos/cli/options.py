"""Options of the command line, from the dataclasses that declare them.

Help and a wrong option must not wait for torch and transformers, which take ten seconds to import. So names, kinds,
defaults and help texts are read from the source of the dataclasses; the classes themselves are filled afterwards.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import math
import re
import textwrap
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

RUN_SECTIONS = {"vigos", "transformers", "run"}  # of the config.yaml that a run leaves


class UsageError(ValueError):
    """A command line or configuration that cannot be run."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a dataclass, as its source declares it.

    Attributes:
        kind: annotation, as source text.
        default: source text of the default.
        group: heading in the source (`# --- … ---`) above the field.
        choices: values of a `Literal` annotation; empty for other kinds.
    """

    name: str
    kind: str
    default: str
    help: str
    group: str
    choices: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return "--" + self.name.replace("_", "-")

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value from a flag (text) or a YAML file (anything), or None."""
        if isinstance(value, list | dict):
            wanted = "list" if isinstance(value, list) else "dict"
            flat = "list[dict" not in self.kind
            if wanted not in self.kind or (wanted == "list" and flat and not all(isinstance(v, str) for v in value)):
                return f"must be {'texts' if 'list' in self.kind else 'one value'}, got a {wanted}"
            return None
        text = str(value).strip()
        if text in map(str, self.choices):
            return None
        if value is None or text.lower() in ("none", "null"):
            return None if "None" in self.kind else f"must be given a value, got {text!r}"
        if self.choices:
            shown = ", ".join(map(str, self.choices))
            near = difflib.get_close_matches(text, map(str, self.choices), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"must be one of {shown}, got {text!r}{hint}"
        words = set(re.findall(r"\w+", self.kind)) - {"None", "Optional", "Union"}
        if words == {"bool"}:
            known = ("true", "false", "yes", "no", "1", "0", "t", "f", "y", "n", "on", "off")
            return None if text.lower() in known else f"must be true or false, got {text!r}"
        if words in ({"int"}, {"float"}):
            try:
                wrong = math.isnan(int(text) if words == {"int"} else float(text))
            except (ValueError, OverflowError):
                wrong = True
            if wrong:
                return f"must be {'a whole number' if words == {'int'} else 'a number'}, got {text[:40]!r}"
        if words == {"str"} and not isinstance(value, str):
            return f"must be text, got {text[:40]}: quote it"
        return None


@cache
def declared(module: str, name: str) -> tuple[Option, ...]:
    """Return the fields of the dataclass `name` in `module`, which is read and not imported; bases come first."""
    path = _source_of(module)
    text = path.read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    lines = text.split("\n")
    found: dict[str, Option] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= {o.name: o for o in declared(module, base.id)}
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in _text(node):
            found[node.target.id] = _option(node, lines)
    return tuple(found.values())


def _source_of(module: str) -> Path:
    top, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top)  # of a package alone: that imports nothing
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    return Path(spec.origin).parent / (rest.replace(".", "/") + ".py")


def _text(node: ast.AnnAssign) -> str:
    return ast.unparse(node.annotation)


def _option(node: ast.AnnAssign, lines: Sequence[str]) -> Option:
    default, words = node.value, ""
    if isinstance(default, ast.Call):
        given = {k.arg: k.value for k in default.keywords}
        texts = [n for n in [*default.args[1:], given.get("help"), given.get("metadata")] if n is not None]
        for text in texts:
            pairs = zip(text.keys, text.values, strict=True) if isinstance(text, ast.Dict) else [(None, text)]
            for key, value in pairs:
                if isinstance(value, ast.Constant) and (key is None or getattr(key, "value", None) == "help"):
                    words = words or str(value.value)
        factory = given.get("default_factory")
        body = factory.body if isinstance(factory, ast.Lambda) else factory
        default = default.args[0] if default.args else given.get("default", body)
    headings = (re.fullmatch(r"    # --- (.+?) -*", line) for line in reversed(lines[: node.lineno - 1]))
    literals = (n for n in ast.walk(node.annotation) if isinstance(n, ast.Subscript))
    choices = [ast.literal_eval(n.slice) for n in literals if isinstance(n.value, ast.Name) and n.value.id == "Literal"]
    flat = [c for choice in choices for c in (choice if isinstance(choice, tuple) else (choice,))]
    return Option(
        name=node.target.id,  # type: ignore[union-attr]
        kind=_text(node),
        default="" if default is None else ast.unparse(default),
        help=" ".join(words.split()),
        group=next((m[1] for m in headings if m), ""),
        choices=tuple(flat),
    )


# --- The command line -------------------------------------------------------------------------------------------------


def read_flags(flags: Sequence[str], options: Sequence[Option]) -> dict[str, Any]:
    """Return the values that flags give to options, as text, and refuse unknown flags and values of a wrong kind.

    Raises:
        UsageError: naming the flag, and the nearest known one.
    """
    known = {o.name: o for o in options}
    given: dict[str, list[str]] = {}
    name = None
    for word in flags:
        if word.startswith("--"):
            head, equals, value = word.removeprefix("--").partition("=")
            name = head.replace("-", "_")
            if name.removeprefix("no_") in known and name not in known:  # --no-lora
                name, equals, value = name.removeprefix("no_"), "=", "false"
            if name not in known:
                raise unknown(head, known, "command line")
            given[name] = [value] if equals else []
        elif name is None or (given[name] and "list" not in known[name].kind):
            raise UsageError(f"command line: unexpected argument {word!r}")
        else:
            given[name].append(word)
    values: dict[str, Any] = {}
    for name, words in given.items():
        option = known[name]
        if not words and "bool" not in option.kind:
            raise UsageError(f"{option.flag} must be followed by a value")
        values[name] = words if "list" in option.kind else (words[0] if words else "true")
        if "list" not in option.kind:
            check_value(option, values[name], option.flag)
    return values


def check_value(option: Option, value: Any, where: str) -> None:
    """Raise UsageError if the option cannot have the value."""
    if wrong := option.problem(value):
        raise UsageError(f"{where} {wrong}")


def unknown(key: str, known: Mapping[str, Option], where: str) -> UsageError:
    """Return an error that names the nearest known option."""
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    hint = f"; did you mean {known[near[0]].flag if where == 'command line' else near[0]!r}?" if near else ""
    return UsageError(f"{where}: unknown option {key!r}{hint}")


def read_file(path: Path, options: Sequence[Option]) -> dict[str, Any]:
    """Return the options in a YAML file: a flat mapping, or the config.yaml of a run.

    Raises:
        UsageError: naming the file and the line: no such file, not YAML, a tag, an alias, a key twice, an unknown
            option, or a value of a wrong kind.
    """
    from vigos.system.yaml_file import read_marked

    if not path.is_file():
        raise UsageError(f"--config: no such file: {path}")
    try:
        loaded, lines = read_marked(path)
    except ValueError as error:
        raise UsageError(f"--config: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config: {path} must hold a mapping of options, got {type(loaded).__name__}")
    known = {o.name: o for o in options}
    if loaded and set(loaded) <= RUN_SECTIONS and all(isinstance(part, dict) for part in loaded.values()):
        loaded = _options_of_run(loaded, known)
    for key, value in loaded.items():
        if key not in known:
            raise unknown(str(key), known, f"{path}, line {lines[key]}")
        check_value(known[key], value, f"{path}, line {lines[key]}: {key}")
    # Text is converted as a flag's is; transformers takes other values as they are, 1 for true among them.
    truths = {name for name, option in known.items() if option.kind in ("bool", "bool | None")}
    words = {"on": "true", "off": "false"}
    return {
        name: words.get(str(v).lower(), str(v)) if name in truths and v is not None else v for name, v in loaded.items()
    }


def _options_of_run(sections: Mapping[str, Mapping[str, Any]], known: Mapping[str, Option]) -> dict[str, Any]:
    """Return the options in a run's config.yaml that repeat it: those that differ from their defaults.

    The output folder is left out, masked secrets are, and what transformers derives from other options.
    """
    found = {}
    for name, value in ((n, v) for part in sections.values() for n, v in part.items()):
        masked = isinstance(value, str) and re.fullmatch(r"<[A-Z_]+>", value)
        if name not in known or name.startswith("_") or name == "output_dir" or value is None or masked:
            continue
        try:
            is_default = ast.literal_eval(known[name].default) == value
        except (ValueError, SyntaxError):  # an expression
            is_default = False
        if not is_default and (not isinstance(value, dict) or name in ("images_columns", "student_view")):
            found[name] = value
    return found


def fill(
    kinds: Sequence[type], loaded: Mapping[str, Any], flags: Sequence[str], unset: Set[str] = frozenset()
) -> list[Any]:
    """Fill dataclasses from their defaults, then `loaded`, then flags.

    Args:
        unset: options for which `None` and `null` in a flag stand for no value.

    Raises:
        UsageError: a value that a field cannot have.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:  # argparse would print every option first
            raise UsageError(message.removeprefix("argument "))

        def _get_value(self, action: Any, text: str) -> Any:
            none = action.dest in unset and text.lower() in ("none", "null")
            return None if none else super()._get_value(action, text)  # type: ignore[misc]

        def _check_value(self, action: Any, value: Any) -> None:
            if value is not None:
                super()._check_value(action, value)

    parser = Parser(kinds, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**loaded)
    try:
        return list(parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False))
    except TypeError as error:  # a list where one value belongs
        raise UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Command:
    """A command whose options are the fields of dataclasses.

    Attributes:
        kinds: (module, class) of each dataclass; the last may be transformers' own, whose fields the one before has.
        needed: options without a usable default.
        shown: options that `--help` lists; `--list-options` lists all.
        helps: texts in place of those that transformers has for its options.
    """

    name: str
    text: str
    kinds: tuple[tuple[str, str], ...]
    needed: tuple[str, ...]
    shown: tuple[str, ...]
    example: str
    helps: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def options(self) -> dict[str, Option]:
        """Return every option by name; a class overrides the fields of transformers'."""
        found = {o.name: o for kind in reversed(self.kinds) for o in declared(*kind)}
        return found | {name: dataclasses.replace(found[name], help=text) for name, text in self.helps.items()}

    def parse(self, config: Path | None, flags: Sequence[str]) -> list[Any]:
        """Fill the command's dataclasses from defaults, then the YAML file, then flags.

        Raises:
            UsageError: an option that is unknown, missing, or of a wrong kind, before anything heavy is imported.
        """
        return self.read(config, flags).fill()

    def read(self, config: Path | None, flags: Sequence[str], recipe: Path | None = None) -> Reading:
        """Read the YAML files and the flags, and check what can be checked without an import.

        Args:
            recipe: a file whose options those of `config` and the flags replace.

        Raises:
            UsageError: an option that is unknown, missing, or of a wrong kind.
        """
        options = self.options()
        loaded: dict[str, Any] = {}
        for path in (recipe, config):
            loaded |= {} if path is None else read_file(path, list(options.values()))
        given = {**loaded, **read_flags(flags, list(options.values()))}
        for name in self.needed:
            if not given.get(name):
                raise UsageError(f"{options[name].flag} is needed: a flag, or a line `{name}: …` in the --config file")
        data = str(given.get("data", ""))
        if Path(data).suffix in (".jsonl", ".json", ".parquet") and not Path(data).expanduser().exists():
            raise UsageError(f"--data: no such file: {data}")
        model = str(given.get("model", ""))
        if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().exists():
            raise UsageError(f"--model: no such folder: {model}")
        return Reading(self, given, loaded, tuple(flags))

    def help(self, width: int) -> str:
        """Return the text of `--help`: what the command does, the options that most people need, an example."""
        options = self.options()
        needed = " ".join(f"{options[name].flag} {_holder(options[name])}" for name in self.needed)
        usage = textwrap.wrap(f"Usage: vigos {self.name} {needed} [OPTIONS]", width, subsequent_indent="  ")
        lines = [*usage, "", *textwrap.wrap(self.text, width), "", "Options:"]
        rows = [
            (f"{options[n].flag} {_holder(options[n])}", _described(options[n], n in self.needed)) for n in self.shown
        ]
        rows += [
            *([("--recipe NAME", "A published method; `vigos recipes` lists them.")] if self.name == "train" else []),
            ("--config FILE", "YAML file with any of the options; flags win."),
            ("--list-options", "Print every option and stop."),
            ("--help", "Print this and stop."),
        ]
        left = min(max(len(flag) for flag, _ in rows) + 4, max(24, width // 2 - 4))
        for flag, text in rows:
            body = textwrap.wrap(text, width - left) or [""]
            if len(flag) > left - 4:  # by itself, with its text below
                lines.append(f"  {flag}")
            else:
                lines.append(f"  {flag:<{left - 2}}{body.pop(0)}")
            lines += [" " * left + part for part in body]
        example = textwrap.wrap(self.example, width - 4, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join([*lines, "", "Example:", "  " + " \\\n  ".join(example), ""])

    def listing(self) -> str:
        """Return every option of ours with default and help by group, then the names of transformers' options."""
        declared_here = {
            o.name for module, name in self.kinds if module.startswith("vigos.") for o in declared(module, name)
        }
        lines = []
        for module, name in self.kinds:
            if not module.startswith("vigos."):
                names = " ".join(o.flag for o in declared(module, name) if o.name not in declared_here)
                title = f"And of {module.partition('.')[0]}.{name}:"
                lines += ["", title, *textwrap.wrap(names, 100, break_on_hyphens=False)]
                continue
            group = None
            for option in declared(module, name):
                if option.group != group:
                    group = option.group
                    lines += ["", f"{group or 'Model and data'}:"]
                lines.append(f"  {option.flag} {_holder(option)}  {_described(option, option.name in self.needed)}")
        return "\n".join(lines).strip()


@dataclasses.dataclass(frozen=True)
class Reading:
    """A command line that was read and checked, before the classes it fills are imported.

    Attributes:
        values: options that were given, those of flags as text.
    """

    command: Command
    values: Mapping[str, Any]
    loaded: Mapping[str, Any]
    flags: tuple[str, ...]

    def is_set(self, name: str) -> bool:
        """Tell whether an option was given that is not false."""
        return str(self.values.get(name, "false")).lower() not in ("false", "none", "0", "no", "")

    def fill(self) -> list[Any]:
        """Return the command's dataclasses, filled; those of transformers itself are left out."""
        kinds = [(m, name) for m, name in self.command.kinds if m.startswith("vigos.")]
        unset = {o.name for kind in kinds for o in declared(*kind) if "None" in o.kind}
        return fill([getattr(importlib.import_module(m), name) for m, name in kinds], self.loaded, self.flags, unset)


def _holder(option: Option) -> str:
    """Return the placeholder of an option's value."""
    if option.choices:
        return "|".join(map(str, option.choices))
    for kind, word in (("bool", "true|false"), ("int", "N"), ("float", "X"), ("list", "NAME …")):
        if re.search(rf"\b{kind}\b", option.kind):
            return word
    return "TEXT"


def _described(option: Option, needed: bool) -> str:
    default = "" if needed or option.default in ("", "''", "None") else f" [{option.default.strip(chr(39))}]"
    return f"{option.help}{' (needed)' if needed else default}"
