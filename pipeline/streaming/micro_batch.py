"""One bounded run of a stream: new files and the last snapshot → the next snapshot.

Three pipelines one after the other: the log is read and staged; where rows decide the step, they
are put in order; then every row gets its step, and each range of buckets is advanced from where the
last snapshot left it, all steps of a bucket in one place and in order.

Where event time decides the step, the stream is complete up to W = (latest event time seen) -
allowed lateness. The step that holds W and those before it are applied; later rows are pending:
they stay in the snapshot and a later run applies them. Rows of a step before the last applied one
are late: they are counted and dropped. Rows of the last applied step itself may come in any run,
because a bucket that has counted a step does not count it again. So files may be divided over runs
at will: as long as no row is late, the result has the bits of one run over all of them. No run
drains what is pending: without allowed lateness there is nothing, and with it the rows of the
next run belong in front of it.
"""

import logging
import time
from collections import Counter
from functools import partial

import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.beam.accounting import check_sum
from pipeline.beam.staging import Staging, load_array
from pipeline.contract import schema
from pipeline.counts.settings import FrequenciesConfig
from pipeline.read.consumed import check_unchanged
from pipeline.read.discover import Piece
from pipeline.read.log import DEAD_LETTERS, check_read, read_tally
from pipeline.streaming import snapshots, steps
from pipeline.streaming.estimator import FEW, Estimator, assemble, estimator_of
from pipeline.streaming.snapshots import Input, Position, Snapshot
from pipeline.streaming.steps import APPLIED, LATE, NEVER, PENDING, Periods

log = logging.getLogger(__name__)


def write_snapshot(
    pieces: list[Piece],
    inputs: list[Input],
    previous: Snapshot | None,
    config: FrequenciesConfig,
    options: PipelineOptions,
) -> Snapshot:
    """Reads the pieces of new files, writes the snapshot after `previous`, and removes old ones.

    Raises:
      ValueError: what `check_read` raises, no good row has come so far, or a file changed while
        it was read; there is no new snapshot then.
    """
    directory = snapshots.next_directory(config.output)
    before = previous.position if previous else Position()
    with Staging(str(directory), False, options) as staging:
        # by the clock of this machine, so that one wrong time does not make all after it late
        latest = int(time.time()) + config.max_ahead_seconds if config.step_seconds else None
        events = steps.stage_events(pieces, config, staging, latest)
        counts = _check_read(inputs, config, staging)
        if config.step_seconds:
            after, periods = _times(before, previous, config, staging)
            rows = steps.chunks([*events, *([previous.pending] if previous else [])])
            split = partial(steps.split_by_time, periods=periods)
        else:
            rows = steps.chunks(steps.order_events(events, config.partitions, staging))
            total = before.rows + sum(chunk.stop - chunk.start for chunk in rows)
            after = before._replace(step=-(-total // config.batch_size))
            split = partial(steps.split_by_rows, rows_before=before.rows, size=config.batch_size)
        estimator = estimator_of(config, str(previous.path) if previous else "")
        steps.advance_rows(rows, split, estimator, staging)
        counts |= _write_state(estimator, config, staging)
        _check_counts(counts, previous, config)
        after = after._replace(rows=before.rows + counts[APPLIED])
        if not counts["bad"]:
            (staging.out / DEAD_LETTERS).unlink(missing_ok=True)
        manifest = _manifest(counts, after, pieces, inputs, previous, config, staging)
        manifest.write(staging.out)
        staging.commit()
    snapshot = Snapshot(directory.resolve(), manifest)
    begun = previous is None or previous.path.parent != snapshot.path.parent
    snapshots.keep_newest(config.output, 1 if begun and config.overwrite else config.keep_snapshots)
    _tell(snapshot, len(inputs))
    return snapshot


def _tell(snapshot: Snapshot, num_files: int) -> None:
    counts = dict(snapshot.manifest.counts)
    log.info(
        "frequencies: %d file(s), %s rows: %s; step %d, snapshot %s",
        num_files,
        f"{counts.pop('read'):,}",
        ", ".join(f"{rows:,} {name}" for name, rows in counts.items()),
        snapshot.position.step,
        snapshot.path,
    )
    few, touched = (snapshot.manifest.details["buckets"][name] for name in ("few", "touched"))
    log.log(
        logging.WARNING if 2 * few > touched else logging.INFO,
        "frequencies: %s of %s buckets were touched less than %d times: what they estimate may be "
        "off by a third or more",
        f"{few:,}",
        f"{touched:,}",
        FEW,
    )


def _times(
    before: Position, previous: Snapshot | None, config: FrequenciesConfig, staging: Staging
) -> tuple[Position, Periods]:
    """How far the stream comes with the staged rows, and what becomes of rows by their time."""
    seconds, times = config.step_seconds, steps.event_times(staging)
    newest = max([*times, *([] if before.newest is None else [before.newest])], default=None)
    if newest is None:  # the stream has no row yet
        return before, Periods(seconds, 0, NEVER, NEVER, config.partitions)
    after = before._replace(newest=newest)
    last = (newest - config.allowed_lateness_seconds) // seconds
    if before.origin is None:
        periods = [time // seconds for time in times]
        if previous and previous.manifest.counts[PENDING]:
            periods.append(int(load_array(previous.pending, mmap_mode="r")[:, 1].min()))
        origin, oldest = min(periods), NEVER
    else:
        origin, oldest = before.origin, before.origin + before.step - 1
        last = max(last, oldest)
    if last >= origin:
        after = after._replace(step=last - origin + 1, origin=origin)
    return after, Periods(seconds, origin, oldest, last, config.partitions)


def _write_state(
    estimator: Estimator, config: FrequenciesConfig, staging: Staging
) -> dict[str, int]:
    """Writes the arrays and pending rows of the snapshot; what became of the good rows."""
    state, rows = assemble(estimator, steps.staged_buckets(staging))
    snapshots.write_arrays(staging.out, state)
    pending = 0
    if config.step_seconds:
        blocks = sorted(staging.stage(PENDING).glob("*.npy"))  # in the order of their rows
        pending = snapshots.write_pending(staging.out / schema.STREAMING_PENDING, blocks)
    return {APPLIED: int(rows[0]), LATE: sum(steps.staged_late(staging).values()), PENDING: pending}


def _check_read(inputs: list[Input], config: FrequenciesConfig, staging: Staging) -> dict[str, int]:
    """The counts of `check_read`; empty is a file of this run, not any of the source."""
    check_unchanged({file.path: file.stamp for file in inputs})
    # a quiet hour may write a file without rows
    if config.allow_empty_files and not read_tally(staging)["counts"]["read"]:
        return dict.fromkeys(("read", "bad", "below_threshold"), 0)
    files = None if config.source.startswith("tfds:") else [file.path for file in inputs]
    return check_read(config, staging, files)["counts"]


def _check_counts(
    counts: dict[str, int], previous: Snapshot | None, config: FrequenciesConfig
) -> None:
    """Rows read, and those that were pending, are applied, pending, late or never were good."""
    rows_in = counts["read"] + (previous.manifest.counts[PENDING] if previous else 0)
    names = ("bad", "below_threshold", APPLIED, LATE, PENDING)
    check_sum("advancing the stream", rows_in, counts, names)
    if previous is None and not counts[APPLIED] + counts[PENDING] and counts["read"]:
        raise ValueError(f"no row of {config.source} is left: {counts}; check --rating_threshold.")
    if previous and counts[LATE] > config.max_late_share * counts["read"]:
        newest = np.datetime64(previous.position.newest, "s")
        # a watch reads --previous only where its own --output is empty
        elsewhere = " and another --output" if config.watch else ""
        raise ValueError(
            f"{counts[LATE]} of {counts['read']} rows are late, more than --max_late_share "
            f"{config.max_late_share:g}: the stream has seen a row of {newest}; if that time is "
            f"wrong, go on from an earlier snapshot with --previous{elsewhere}, else raise the "
            "share."
        )


def _manifest(
    counts: dict[str, int],
    after: Position,
    pieces: list[Piece],
    inputs: list[Input],
    previous: Snapshot | None,
    config: FrequenciesConfig,
    staging: Staging,
) -> schema.Manifest:
    late: Counter[str] = Counter()
    for piece, rows in steps.staged_late(staging).items():
        late[pieces[piece].path] += rows
    weight = load_array(staging.out / schema.STREAMING_WEIGHT, mmap_mode="r")
    staging.sweep()
    return snapshots.describe_snapshot(
        staging.out,
        config,
        counts,
        after,
        weight,
        previous=previous.manifest.fingerprint if previous else None,
        late=dict(sorted(late.items())),
        consumed=(previous.consumed if previous else []) + [file.recorded() for file in inputs],
    )
