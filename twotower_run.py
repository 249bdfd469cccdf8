"""The commands that go through several rooms: `twotower run`, `export` and `recommend`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.contract import schema, stores
from pipeline.contract.files import checksum, is_remote, stamp_of, write_atomically
from pipeline.contract.flags import Command, as_flags, on_this_machine, parse, resolve

COMMANDS = {
    "run": Command(
        "twotower_run:RunConfig",
        "twotower_run:run",
        "prepare, train, evaluate and export in a row, as the sections of --config FILE say",
    ),
    "export": Command(
        "serving.publish.settings:ExportConfig",
        "twotower_run:export",
        "publish a trained model as a version with exact and ScaNN top-k",
        flags="data run models name k filter_columns title_column",
        stores="models",
        reads="data bundle",
        changes="run",
    ),
    "recommend": Command(
        "towers.output.settings:RecommendConfig",
        "twotower_run:recommend",
        "write the top-k of all users, or of queries from a file, to Parquet files",
        flags="data run output k queries where index models",
        stores="output models",
        reads="data run",
    ),
}
STAGES = {  # in their order → what shows in the working directory that one has ended
    "prepare": "prepared/manifest.json",
    "train": "run/training.json",
    "evaluate": "run/metrics.json",
    "export": "models/*/*/manifest.json",
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of a whole run; those of its stages are sections of the --config file."""

    workdir: str = ""  # directory for everything; a relative output of a stage lies in it

    def __post_init__(self) -> None:
        if not self.workdir:
            raise ValueError("workdir must be given; add it to the file or as --workdir DIR.")


def export(config: Any) -> None:
    """A trained run → bundle → version; a bundle that is there becomes one as it is."""
    from serving.publish.publish import publish

    bundle = config.bundle
    if not bundle:
        from towers.output.bundle import export_bundle

        columns = [name for names in config.filter_columns for name in names.split(",") if name]
        title = [config.title_column] if config.title_column else []
        target = str(Path(config.run) / "bundle")
        bundle = export_bundle(config.data, config.run, target, columns, title)
    options = dataclasses.asdict(config.version_options())
    version = publish(bundle, config.models, **options)
    print(f"bundle: {bundle}\nversion: {version}")
    if config.run and (Path(config.run) / "metrics.json").is_file():
        from towers.report.pages import write_report
        from towers.training.run_directory import read_run

        if read_run(config.run)[1] != schema.read_manifest(config.data, "prepared").fingerprint:
            return  # the report is of the data that the run was trained on
        print(f"report: {write_report(config.run, config.data, stores.local_copy(version))}")


def export_model(
    model: Any, models: str | Path, *, name: str = "twotower", k: int = 100, **options: Any
) -> Path | str:
    """Publishes a model as a version that `twotower serve` and TensorFlow Serving load.

    Titles are stored where the items' table has a column of that name; docs/python.md has an
    example.

    Args:
      model: a trained `towers.TwoTower`.
      models: directory of all models, or its place in a store.
      name: of the model, a directory there; a version gets the next free number.
      k: results of a request to TensorFlow Serving; of a smaller corpus, all.
      **options: filter_columns, attributes of items that requests may filter by, and those of
        `serving.publish.settings.VersionOptions`.

    Returns:
      The directory of the version, or its place in a store.

    Raises:
      ValueError: an option is not valid, the model has diverged, or the store fails.
    """
    from serving.publish.publish import publish
    from towers.model.top_k import TITLE, all_ids
    from towers.output.bundle import write_model

    columns = [spec.name for spec in model.data.features("candidate").specs]
    title = options.setdefault("title_column", TITLE if TITLE in columns else "")
    filters = options.pop("filter_columns", ())
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_model(
            *(model.data, model, Path(scratch) / "bundle", filters, [title] if title else []),
            configuration=json.loads(model.settings),
        )
        k = min(k, len(all_ids(model.data, model, "candidate")))
        return publish(bundle, models, name=name, k=k, **options)


def recommend(config: Any) -> None:
    """The top-k of all users, or of queries from a file: by the trained run, or by a version."""
    from towers.output.recommend import Ranker, recommend

    if not config.asks_version:
        recommend(config)
        return
    import numpy
    import pyarrow.parquet as pq

    from pipeline.contract.bundle import read_raw_ids
    from serving.retrieval.attributes import as_where
    from serving.retrieval.retriever import Retriever
    from serving.version.versions import RETRIEVAL

    retriever = Retriever.load(config.models, config.name)
    version = retriever.version.path
    if config.index == "scann" and config.k > retriever.k:
        raise ValueError(
            f"k must be at most {retriever.k}, the k of {version}, got {config.k}: export with a "
            "larger --k, or use --index exact."
        )
    choice: dict[str, Any] = {"index": config.index, "exclude_seen": not config.keep_seen}
    if config.where:
        choice["where"] = as_where(config.where, retriever.corpus.attributes.kinds())
    queries, argument = None, "query_ids"
    if config.queries:
        read_raw_ids(Path(config.queries), schema.QUERY_ID)  # raises where one is missing or twice
        queries, argument = retriever.query_inputs.rows(pq.read_table(config.queries)), "queries"

    def top_k(block: Any) -> list[tuple[list[str], list[float]]]:
        results = retriever.top_k(k=config.k, **{argument: block}, **choice)
        return [(result.candidate_ids, result.scores) for result in results]

    ids = read_raw_ids(version / RETRIEVAL / schema.BUNDLE_CANDIDATE_IDS)
    vectors = numpy.load(version / RETRIEVAL / schema.BUNDLE_VECTORS, mmap_mode="r")
    recommend(config, Ranker(str(version), ids, vectors, top_k, queries))


def run(config: RunConfig, sections: dict[str, Any], commands: dict[str, Command]) -> None:
    """Runs the stages in a row; one whose inputs and settings have not changed is skipped."""
    for name in sections:
        if name not in STAGES:
            raise ValueError(f"unknown section {name!r}; a run has {', '.join(STAGES)}.")
    work = Path(config.workdir)
    work.mkdir(parents=True, exist_ok=True)
    data, trained, models = (str(work / name) for name in ("prepared", "run", "models"))
    trained_on, parsed = {"data": data, "run": trained}, {}
    places = {"prepare": {"output": data}, "train": trained_on, "evaluate": trained_on}
    places["export"] = trained_on | {"models": models}
    for stage in STAGES:  # all settings are checked before the first stage starts
        flags = as_flags((sections.get(stage) or {}) | places[stage])
        parsed[stage] = parse(stage, commands[stage], flags)
    for stage, (settings, beam_arguments) in parsed.items():
        is_new = _run_stage(stage, settings, commands[stage], beam_arguments, work)
    if not is_new:  # an export writes the report itself
        from towers.report.pages import write_report

        version = _version_of(work / "run" / "bundle", Path(models) / settings.name)
        write_report(trained, data, version)
    metrics = json.loads((work / "run" / "metrics.json").read_text())
    split = metrics["split"]
    names = [name for name in metrics[split] if name.split("@")[0] in ("recall", "ndcg")]
    print("\n" + f"{f'{split} split':14}" + "".join(f"{name:>11}" for name in names))
    for row, key in ((metrics["method"], split), ("popularity", "popularity")):
        print(f"{row:14}" + "".join(f"{metrics[key][name]:>11.4f}" for name in names))
    print(f"\nprepared data   {data}")
    print(f"run directory   {trained}")
    print(f"results         {work / 'run' / 'metrics.json'}")
    print(f"report          {work / 'run' / 'report.html'}")
    print(f"model versions  {models}")


def _version_of(bundle: Path, models: Path) -> Path | None:
    """The newest version that was made of a bundle, if there is one."""
    from serving.version.versions import numbered_directories

    made_of = schema.read_manifest(bundle, "bundle").fingerprint
    for _, path in sorted(numbered_directories(models).items(), reverse=True):
        if (path / schema.MANIFEST).is_file():
            manifest = schema.read_manifest(path, "version")
            if manifest.details["bundle_fingerprint"] == made_of:
                return path
    return None


def _run_stage(
    stage: str, settings: Any, command: Command, beam_arguments: list[str], work: Path
) -> bool:
    """Runs a stage, if it must be; whether it did."""
    record_path = work / "stages.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}
    before = {"key": "", "done": True, "starts_with": ["", ""]} | record.get(stage, {})
    now = before | {"key": _stage_key(stage, settings, work)}
    if stage == "train" and (before["done"] or now["key"] != before["key"]):
        now["starts_with"] = _starts_with(settings)  # else it goes on
    if before["done"] and now == before and any(work.glob(STAGES[stage])):
        print(f"[{stage}] skipped: its inputs and settings are those of the last run.")
        return False
    print(f"[{stage}] starts.")
    if stage == "prepare" or (stage == "train" and now != before):
        settings = dataclasses.replace(settings, overwrite=True)
    write_atomically(record_path, json.dumps(record | {stage: now | {"done": False}}))
    call = resolve(command.call)
    with on_this_machine(command, settings) as local:
        call(local, beam_arguments) if command.on_beam else call(local)
    record[stage] = now | {"done": True}
    write_atomically(record_path, json.dumps(record, indent=2))
    return True


def _starts_with(settings: Any) -> list[Any]:
    """What changes with the run and the frequencies that a training takes at its first step."""
    if path := settings.frequency.partition(":")[2]:
        from towers.training.frequency import newest_snapshot  # takes seconds to import

        path = newest_snapshot(path)
    return [_content_of(settings.init_from), _content_of(path)]


def _content_of(place: str) -> Any:
    """What changes with a finished run, a snapshot or the counts of a log; "" for none."""
    if is_remote(place):
        return stores.finished_below(place)
    ended = [Path(place, name) for name in ("training.json", schema.MANIFEST)] if place else []
    return "".join(checksum(path) for path in ended if path.is_file())


def _stage_key(stage: str, settings: Any, work: Path) -> str:
    """A checksum of a stage's settings and of the content that it reads."""
    from pipeline.features.tables import feature_files
    from pipeline.read.discover import source_files

    parts: list[Any] = [dataclasses.asdict(settings)]
    if stage == "prepare":
        files = [*source_files(settings), *feature_files(settings)]
        parts += [(p, *stamp_of(p)[:2]) for p in files]
    else:
        parts.append(schema.read_manifest(work / "prepared", "prepared").fingerprint)
    if stage == "train":
        parts += [_content_of(run) for run in (settings.teacher, settings.refit) if run]
    if stage in ("evaluate", "export"):
        parts.append(checksum(work / "run" / "training.json"))
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
