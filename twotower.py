"""The front door: `twotower COMMAND [flags]`.

It parses, imports the one room that the command needs, and calls. Exit status 0: done; 2: a
mistake of the user, told in one line; 1: a failure of ours, with its stack trace, or, where a Beam
runner lost rows, one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command: its settings and what it calls, both as module:name, and a line of help."""

    config: str
    call: str
    help: str


COMMANDS = {
    "prepare": Command(
        "pipeline.prepare.settings:PrepareConfig",
        "twotower:_prepare",
        "read raw interactions and write examples, vocabularies and counts (Beam)",
    ),
    "frequencies": Command(
        "pipeline.counts.settings:FrequenciesConfig",
        "twotower:_frequencies",
        "count items, or estimate their frequency from a stream, for log_q alone (Beam)",
    ),
    "train": Command(
        "towers.training.settings:TrainConfig",
        "towers.training.train:train",
        "train a two-tower model on them",
    ),
    "tune": Command(
        "towers.tune.settings:TuneConfig",
        "towers.tune.study:tune",
        "search good settings of training on the validation split",
    ),
    "evaluate": Command(
        "towers.training.settings:EvaluateConfig",
        "towers.evaluation.evaluate:evaluate",
        "rank the whole corpus for every test user, and write a report",
    ),
    "compare": Command(
        "towers.training.settings:CompareConfig",
        "towers.evaluation.compare:compare",
        "set evaluated runs side by side, with tests over the users",
    ),
    "audit": Command(
        "towers.training.settings:AuditConfig",
        "towers.audit.job:audit",
        "measure how far each sampler is from the full softmax on a trained run",
    ),
    "export": Command(
        "serving.publish.settings:ExportConfig",
        "twotower:_export",
        "publish a trained model as a version with exact and ScaNN top-k",
    ),
    "recommend": Command(
        "towers.training.settings:RecommendConfig",
        "twotower:_recommend",
        "write the top-k of all users to Parquet files",
    ),
    "serve": Command(
        "serving.settings:ServeConfig",
        "serving.server:serve",
        "serve the newest model versions over REST and gRPC",
    ),
    "query": Command(
        "serving.retrieval.settings:QueryConfig",
        "serving.retrieval.query:answer",
        "ask a published version for a top-k",
    ),
    "run": Command(
        "twotower:RunConfig", "twotower:_run", "prepare, train, evaluate and export in a row"
    ),
    "doctor": Command(
        "towers.doctor:DoctorConfig", "towers.doctor:report", "look at this machine's set-up"
    ),
}
STAGES = ("prepare", "train", "evaluate", "export")
ON_BEAM = ("prepare", "frequencies")  # what their flags leave over goes to Beam


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of a whole run; those of its stages are sections of the --config file."""

    workdir: str = ""  # directory for everything; a relative output of a stage lies in it

    def __post_init__(self) -> None:
        if not self.workdir:
            raise ValueError("workdir must be given; add it to the file or as --workdir DIR.")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    # Beam warns of clients for a cloud that nobody asked for whenever it is imported.
    logging.getLogger().addFilter(lambda record: "apitools" not in record.getMessage())
    for room in ("pipeline", "towers", "serving", "twotower"):
        logging.getLogger(room).setLevel(logging.INFO)
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
            raise ValueError(f"there is no command {name!r}; {hint}")
        return _dispatch(name, rest)
    except (ValueError, LookupError) as error:
        if os.environ.get("TWOTOWER_DEBUG"):
            raise
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        print(f"twotower {name}: {text}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from pipeline.beam.accounting import AccountingError

        if not isinstance(error, AccountingError) or os.environ.get("TWOTOWER_DEBUG"):
            raise
        print(f"twotower {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"twotower {name}: interrupted.", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: twotower COMMAND [flags]; twotower COMMAND --help lists the flags", ""]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _dispatch(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    config_class = _resolve(command.config)
    sections: dict[str, Any] = {}
    if name == "compare" and arguments and not arguments[0].startswith("-"):
        arguments = ["--runs", *arguments]
    if "--config" in arguments:
        arguments, sections = _take_config_file(arguments)
        own = sections.get(name, sections)
        if name == "run":  # what is no section of a stage is a flag of the run
            own = {key: value for key, value in sections.items() if not isinstance(value, dict)}
            sections = _without(sections, *own)
        arguments = _as_flags(own or {}) + arguments
    config, rest = parse(name, config_class, arguments)
    call = _resolve(command.call)
    if name in ON_BEAM:
        result = call(config, rest)
    elif name == "run":
        result = call(config, sections)
    else:
        result = call(config)
    return result if isinstance(result, int) else 0


def parse(name: str, config_class: type, arguments: list[str]) -> tuple[Any, list[str]]:
    """Flags → settings; only a command on Beam leaves some over.

    Raises:
      ValueError: a flag is unknown or a value breaks a rule.
    """
    from simple_parsing import ArgumentParser
    from simple_parsing.wrappers.field_wrapper import DashVariant

    class Parser(ArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(f"{message}; see twotower {name} --help.")

    beam_only = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(
        prog=f"twotower {name}",
        description=COMMANDS[name].help,
        allow_abbrev=False,
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
    )
    parser.add_arguments(config_class, dest="config")
    fields = [f"--{field.name}" for field in dataclasses.fields(config_class)]
    try:
        parsed, rest = parser.parse_known_args(arguments[:beam_only])
    except ValueError:
        _check_flags(name, arguments[:beam_only], fields)  # a misspelt flag is the better reason
        raise
    if name not in ON_BEAM:
        _check_flags(name, rest, fields)
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; see twotower {name} --help.")
    return parsed.config, rest + arguments[beam_only:]


def _check_flags(name: str, arguments: list[str], fields: list[str]) -> None:
    """Raises ValueError for a flag that is none of the fields; Beam may know others."""
    for argument in arguments:
        flag = argument.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if not argument.startswith("--") or flag in fields or f"--{flag[4:]}" in fields:
            continue
        near = difflib.get_close_matches(flag, fields, 1)
        if near or name not in ON_BEAM:
            hint = f"did you mean {near[0]}?" if near else f"see twotower {name} --help."
            raise ValueError(f"unknown argument {argument.split('=')[0]}; {hint}")


def _take_config_file(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    import yaml

    place = arguments.index("--config")
    if place + 1 == len(arguments):
        raise ValueError("--config needs the path of a YAML file.")
    path = arguments[place + 1]
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold name: value pairs.")
    return arguments[:place] + arguments[place + 2 :], content


def _as_flags(settings: dict[str, Any]) -> list[str]:
    """A section of a file as flags, so that one parser checks both (YAML reads 1e-5 as text)."""
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _prepare(config: Any, beam_arguments: list[str]) -> None:
    from pipeline.job import prepare

    manifest = prepare(config, beam_arguments)
    print(_table(list(manifest.counts.items())))
    if not config.dry_run:
        print(f"prepared data: {config.output}")


def _frequencies(config: Any, beam_arguments: list[str]) -> None:
    from pipeline.frequencies import frequencies

    frequencies(config, beam_arguments)


def _export(config: Any) -> None:
    """A trained run → bundle → version; a bundle that is there becomes one as it is."""
    from serving.publish.publish import publish

    bundle = config.bundle
    if not bundle:
        from towers.export.bundle import export_bundle

        bundle = export_bundle(config.data, config.run, str(Path(config.run) / "bundle"))
    options = dataclasses.asdict(config.version_options())
    version = publish(bundle, config.models, **options)
    print(f"bundle: {bundle}\nversion: {version}")
    if config.run and (Path(config.run) / "metrics.json").is_file():
        from towers.report.run_page import write_report

        print(f"report: {write_report(config.run, config.data, version)}")


def _recommend(config: Any) -> None:
    """The top-k of all users: by the trained run alone, or by the index of its version."""
    from towers.export.recommend import Ranker, recommend

    if config.index == "exact":
        recommend(config)
        return
    import numpy

    from pipeline.contract import schema
    from serving.retrieval.retriever import Retriever
    from serving.version.bundle import read_raw_ids
    from serving.version.versions import RETRIEVAL

    retriever = Retriever.load(config.models, config.name)
    version = retriever.version.path
    if config.k > retriever.k:
        raise ValueError(
            f"k must be at most {retriever.k}, the k of {version}, got {config.k}: export with a "
            "larger --k, or use --index exact."
        )

    def top_k(users: list[str]) -> list[tuple[list[str], list[float]]]:
        seen_out = not config.keep_seen
        found = retriever.top_k(users, config.k, index=config.index, exclude_seen=seen_out)
        return [(one.candidate_ids, one.scores) for one in found]

    ids = read_raw_ids(version / RETRIEVAL / schema.BUNDLE_CANDIDATE_IDS)
    vectors = numpy.load(version / RETRIEVAL / schema.BUNDLE_VECTORS, mmap_mode="r")
    recommend(config, Ranker(str(version), ids, vectors, top_k))


def _table(rows: list[tuple[Any, Any]]) -> str:
    width = max(len(str(name)) for name, _ in rows)
    return "\n".join(f"{name!s:{width}}  {value}" for name, value in rows)


# --- run ------------------------------------------------------------------------------------


def _run(config: RunConfig, sections: dict[str, Any]) -> None:
    """Runs the stages in a row; one whose inputs and settings have not changed is skipped."""
    unknown = [name for name in sections if name not in STAGES]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; a run has {', '.join(STAGES)}.")
    work = Path(config.workdir)
    work.mkdir(parents=True, exist_ok=True)
    places = {
        "prepare": {"output": str(work / "prepared")},
        "train": {"data": str(work / "prepared"), "run": str(work / "run")},
        "evaluate": {"data": str(work / "prepared"), "run": str(work / "run")},
        "export": {
            key: str(work / path)
            for key, path in (("data", "prepared"), ("run", "run"), ("models", "models"))
        },
    }
    parsed = {}
    for stage in STAGES:  # all settings are checked before the first stage starts
        flags = _as_flags((sections.get(stage) or {}) | places[stage])
        parsed[stage], beam_arguments = parse(stage, _resolve(COMMANDS[stage].config), flags)
        if stage == "prepare":
            left = beam_arguments
    runners: dict[str, Callable[[Any], Any]] = {
        stage: _resolve(COMMANDS[stage].call) for stage in STAGES if stage != "prepare"
    }
    runners["prepare"] = lambda settings: _prepare(settings, left)
    started = [stage for stage in STAGES if _run_stage(stage, parsed[stage], runners[stage], work)]
    if "export" not in started:
        from towers.report.run_page import write_report

        export = parsed["export"]
        version = _version_of(work / "run" / "bundle", Path(export.models) / export.name)
        write_report(export.run, export.data, version)
    print("\n" + _results(json.loads((work / "run" / "metrics.json").read_text())) + "\n")
    print(
        _table(
            [
                ("prepared data", work / "prepared"),
                ("run directory", work / "run"),
                ("results", work / "run" / "metrics.json"),
                ("report", work / "run" / "report.html"),
                ("model versions", work / "models"),
            ]
        )
    )


def _results(metrics: dict[str, Any]) -> str:
    """Recall and NDCG of the model, and of popularity, at every cut-off that was measured."""
    split = metrics["split"]
    names = [name for name in metrics[split] if name.split("@")[0] in ("recall", "ndcg")]
    lines = [f"{f'{split} split':14}" + "".join(f"{name:>11}" for name in names)]
    for row, key in ((metrics["method"], split), ("popularity", "popularity")):
        lines.append(f"{row:14}" + "".join(f"{metrics[key][name]:>11.4f}" for name in names))
    return "\n".join(lines)


def _version_of(bundle: Path, models: Path) -> Path | None:
    """The newest version that was made of a bundle, if there is one."""
    from pipeline.contract import schema
    from serving.version.versions import numbered_directories

    made_of = schema.read_manifest(bundle, "bundle").fingerprint
    for _, path in sorted(numbered_directories(models).items(), reverse=True):
        if (path / schema.MANIFEST).is_file():
            details = schema.read_manifest(path, "version").details
            if details["bundle_fingerprint"] == made_of:
                return path
    return None


def _run_stage(stage: str, settings: Any, call: Callable[[Any], Any], work: Path) -> bool:
    """Runs a stage, if it must be; whether it did."""
    from pipeline.contract.files import write_atomically

    record_path = work / "stages.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    key = _stage_key(stage, settings, work)
    before = record.get(stage, {})
    if before == {"key": key, "done": True} and _has_output(stage, work):
        print(f"[{stage}] skipped: its inputs and settings are those of the last run.")
        return False
    print(f"[{stage}] starts.")
    if stage == "prepare" or (stage == "train" and before.get("key") != key):
        settings = dataclasses.replace(settings, overwrite=True)
    write_atomically(record_path, json.dumps(record | {stage: {"key": key, "done": False}}))
    call(settings)
    record[stage] = {"key": key, "done": True}
    write_atomically(record_path, json.dumps(record, indent=2))
    return True


def _stage_key(stage: str, settings: Any, work: Path) -> str:
    """A checksum of a stage's settings and of the content that it reads."""
    from pipeline.contract import schema
    from pipeline.contract.files import checksum
    from pipeline.features.tables import feature_files
    from pipeline.read import discover as sources

    parts: list[Any] = [dataclasses.asdict(settings)]
    if stage == "prepare":
        files = [*sources.source_files(settings), *feature_files(settings)]
        parts += [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in files]
    else:
        parts.append(schema.read_manifest(work / "prepared", "prepared").fingerprint)
    if stage in ("evaluate", "export"):
        parts.append(checksum(work / "run" / "training.json"))
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _has_output(stage: str, work: Path) -> bool:
    pattern = {
        "prepare": "prepared/manifest.json",
        "train": "run/training.json",
        "evaluate": "run/metrics.json",
        "export": "models/*/*/manifest.json",
    }[stage]
    return any(work.glob(pattern))


if __name__ == "__main__":
    sys.exit(main())
