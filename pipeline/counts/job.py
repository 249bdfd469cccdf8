"""`twotower frequencies`: exact counts of the items of a log, and `log_q` from them."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from pipeline.beam.accounting import AccountingError, check_sum
from pipeline.beam.options import beam_options
from pipeline.beam.staging import Staging, add_up, read_all
from pipeline.contract import schema
from pipeline.contract.files import checksum, describe_files
from pipeline.counts.merge import NUM_MOST_FREQUENT, merge_log, write_shards
from pipeline.counts.settings import FrequenciesConfig
from pipeline.quality.histogram import as_text, describe, from_lists, merge
from pipeline.read.consumed import (
    check_not_repeated,
    check_unchanged,
    input_files,
    staged_inputs,
    stamps_of,
    with_partitions,
)
from pipeline.read.discover import find_pieces, with_demo_columns
from pipeline.read.formats import files_in
from pipeline.read.log import DEAD_LETTERS, check_read

log = logging.getLogger(__name__)
# What decides which rows are positives of which item: counts of one chain agree in it.
_MEANING = ("user_column", "item_column", "rating_column", "rating_threshold")
_RECORDED = (
    *_MEANING,
    *("timestamp_column", "timestamp_format", "weight_column", "delimiter", "max_bad_share"),
    *("decay", "head_share"),
)


def count(config: FrequenciesConfig, beam_arguments: list[str] | None = None) -> schema.Manifest:
    """Counts the items of a log, on top of an earlier run where there is one.

    The count of an item is decay · (its earlier count) + (its good rows in this log, duplicates
    included); its `log_q` is log(count / sum of all counts). An item that is absent today stays.
    `beam_arguments` are flags of Beam and its runner, such as `--direct_num_workers=2`.

    Raises:
      ValueError: what `find_pieces` and `check_read` raise; the earlier run is damaged or counted
        other rows; a file was counted before; no good row is left.
    """
    options = beam_options(beam_arguments or [], vars(config))
    config = with_demo_columns(config)
    pieces = find_pieces(config)
    previous = _read_previous(config)
    files = input_files(config)
    stamps = stamps_of(files)
    config = with_partitions(config, stamps)
    with Staging(config.output, config.overwrite, options) as staging:
        log.info("frequencies: reading %d piece(s) of %s", len(pieces), config.source)
        merge_log(pieces, files, previous, config, staging)
        read = check_read(config, staging)
        counts = _check_merged(read, previous, config, staging)
        check_unchanged(stamps)
        inputs = staged_inputs({"source": files}, staging)["source"]
        if not config.source.startswith("tfds:"):  # files without rows may repeat
            rows = read["files"]
            inputs = {path: inputs[path] for path in files if any(map(rows.get, files_in(path)))}
        earlier = previous.details["inputs"] if previous else []
        if not config.allow_repeated_files:
            check_not_repeated(inputs, earlier)
        total = config.decay * (previous.details["total"] if previous else 0.0) + counts["rows"]
        write_shards(counts["items"], total, staging)
        inputs_so_far = [*earlier, *inputs.values()]
        manifest = _manifest(config, counts, total, inputs_so_far, previous, staging)
        manifest.write(staging.out)
        staging.commit()
    for line in _summary_lines(manifest):
        log.info("frequencies: %s", line)
    log.info("frequencies: %s is complete", config.output)
    return manifest


def _read_previous(config: FrequenciesConfig) -> schema.Manifest | None:
    """The manifest of the earlier run, after a look at its files and at what it counted."""
    if not config.previous:
        return None
    previous = schema.read_manifest(config.previous, "frequencies")
    for name in previous.files_of(schema.FREQUENCIES):
        path = Path(config.previous) / name
        if not path.is_file() or checksum(path) != previous.files[name]["checksum"]:
            raise ValueError(
                f"{path} is missing or not what its manifest says; make {config.previous} again."
            )
    now = _recorded(config)
    for name in _MEANING:
        before = previous.configuration[name]
        if now[name] != before:
            raise ValueError(
                f"{config.previous} was counted with {name} {before!r}, this run has "
                f"{now[name]!r}: the sum would mix two meanings; change --{name}, or count all "
                "logs anew without --previous."
            )
    return previous


def _recorded(config: FrequenciesConfig) -> dict[str, Any]:
    """What the manifest records: all that decides the content but the earlier run."""
    rated = config.rating_threshold is not None
    fields = {name: getattr(config, name) for name in _RECORDED}
    return fields | {"rating_column": config.rating_column if rated else ""}


def _check_merged(
    read: dict[str, Any],
    previous: schema.Manifest | None,
    config: FrequenciesConfig,
    staging: Staging,
) -> dict[str, int]:
    """All counts of rows and items; what went in came out."""
    merged = add_up(staging.stage("merged"))
    sent = read["ids"].get("candidate", 0)
    check_sum("reading the log", sent, merged, ["candidate"], "candidate ids")
    names = ("rows", "previous_items", "new_items", "forgotten_items", "items")
    counts = read["counts"] | {name: merged.get(name, 0) for name in names}
    check_sum("counting the rows", counts["read"], counts, ("bad", "below_threshold", "rows"))
    if counts["rows"] == 0:
        raise ValueError(f"no row of {config.source} is left: {counts}; check --rating_threshold.")
    before = previous.counts if previous else {"items": 0, "rows": 0, "previous_rows": 0}
    counts["previous_rows"] = before["rows"] + before["previous_rows"]
    known = counts["items"] + counts["forgotten_items"] - counts["new_items"]
    if not before["items"] == counts["previous_items"] == known:
        raise AccountingError(
            f"adding earlier counts: the earlier run has {before['items']} items, "
            f"{counts['previous_items']} were read and {known} came out"
        )
    return counts


def _manifest(
    config: FrequenciesConfig,
    counts: dict[str, int],
    total: float,
    inputs: list[dict[str, Any]],
    previous: schema.Manifest | None,
    staging: Staging,
) -> schema.Manifest:
    shards = read_all(staging.stage("shards"))
    histograms = [from_lists(one["histogram"]) for one in shards.values()]
    merged = merge(histograms)
    # Sums of decayed counts round; a row too few or too many is larger than that.
    if merged.size != counts["items"] or not math.isclose(merged.total, total, rel_tol=1e-12):
        raise AccountingError(
            f"writing the shards: {counts['items']} items with a total of {total} were counted, "
            f"{merged.size} with {merged.total} written"
        )
    most = [one for shard in shards.values() for one in shard["most_frequent"]]
    most.sort(key=lambda one: (-one[schema.COUNT], one[schema.RAW_ID].encode()))
    summary = describe(merged, config.head_share) | {"most_frequent": most[:NUM_MOST_FREQUENT]}
    staging.sweep()
    os.rename(staging.out / DEAD_LETTERS, staging.out / f"_{DEAD_LETTERS}")
    rows = {name: int(one.numbers.sum()) for name, one in zip(shards, histograms, strict=True)}
    return schema.Manifest(
        kind="frequencies",
        source=config.source,
        configuration=_recorded(config) | {"format_version": schema.FORMAT_VERSION},
        counts=counts,
        files=describe_files(staging.out, rows),
        details={
            "total": total,
            "inputs": inputs,
            "previous": previous.fingerprint if previous else None,
            "summary": summary,
        },
    )


def _summary_lines(manifest: schema.Manifest) -> list[str]:
    """The manifest as a few lines of text."""
    counts, summary = manifest.counts, manifest.details["summary"]
    most = ", ".join(f"{one['raw_id']} ({one['count']:,.6g})" for one in summary["most_frequent"])
    return [
        f"{counts['read']:,} rows read: {counts['rows']:,} counted, {counts['bad']:,} bad, "
        f"{counts['below_threshold']:,} below the threshold; {counts['previous_rows']:,} before",
        f"{counts['items']:,} items, {counts['new_items']:,} of them new",
        *as_text(summary, "items"),
        f"most frequent: {most}",
    ]
