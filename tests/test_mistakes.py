"""The mistakes of a beginner: exit status 2 and one line that says what, where and the remedy."""

import logging
import shlex

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import twotower
from pipeline.contract.bundle import write_bundle
from pipeline.job import prepare
from pipeline.prepare.settings import PrepareConfig
from serving.publish.publish import publish

LOG = "prepare --source log.csv --output out --user_column user --item_column product"
TIMED = f"{LOG} --timestamp_column when"
TRAIN = "train --data prepared --run run"
# The command, and what its one line holds: what is wrong, where, and the remedy.
MISTAKES = [
    ("prepar", "no command 'prepar'; did you mean prepare?"),
    ("prepare", "source must be given; change source"),
    ("prepare --source none.csv --output out", "none.csv does not exist; check --source"),
    ("prepare --source log.xlsx --output out", "log.xlsx; no known format; .parquet, .csv"),
    (
        "prepare --source log.csv --output out",
        "no column 'user_id'; 'user', 'product'; --user_column",
    ),
    (LOG.replace("product", "prodct"), "log.csv; no column 'prodct'; 'product'; --item_column"),
    (f"{LOG} --delimiter ;", "no column 'user'; 'user,product,when'; --user_column"),
    (TIMED, "when is not a number; --timestamp_format s; such as %Y-%m-%d"),
    (
        f"{TIMED} --timestamp_format %d.%m.%Y",
        "not a time; is --timestamp_format %d.%m.%Y that of 'when'",
    ),
    (f"{LOG} --timestamp_format Y-m-d", "timestamp_format; pattern such as %Y-%m-%d; got 'Y-m-d'"),
    (f"{LOG} --split time", "no column 'timestamp'; --timestamp_column"),
    (f"{LOG} --split by_time", "split must be one of; global_time; got 'by_time'"),
    (f"{LOG} --split global_time", "split global_time and test_from need each other"),
    (
        f"{LOG} --split global_time --test_from 1.2.2024",
        "test_from must be a date such as 2026-01-01; '1.2.2024'",
    ),
    (f"{LOG} --train_ratio 80", "train_ratio must be in (0, 1], got 80.0; change train_ratio"),
    (f"{LOG} --rating_threshold 4", "no column 'rating'; --rating_column"),
    (f"{LOG} --item_features none.csv", "none.csv does not exist; check --item_features"),
    (
        f"{LOG} --item_features items.csv --item_feature_kinds titel=text",
        "no column 'titel'; 'title'; --item_feature_kinds",
    ),
    (
        f"{LOG} --item_features items.csv --item_feature_kinds title=words",
        "COLUMN=KIND; 'title=words'",
    ),
    (f"{LOG} --item_features_id sku", "item_features_id needs item_features"),
    (f"{LOG} --duplicates sum", "duplicates combines weights; it needs weight_column"),
    (f"{LOG} --split global_time --test_from 2024-02-30", "must be a date such as; '2024-02-30'"),
    (f"{LOG} --validation_ratio 1", "validation_ratio must be in [0, 1), got 1.0"),
    (f"{LOG} --max_bad_share 2", "max_bad_share must be in [0, 1], got 2.0"),
    (f"{LOG} --feature_separator ''", "feature_separator must be given"),
    (
        f"{LOG} --min_user_interactions 99",
        "k-core of log.csv is empty; lower --min_user_interactions",
    ),
    (LOG.replace("--output out", "--output prepared"), "prepared already exists; --overwrite"),
    ("train", "data must be given; change data"),
    ("train --data prepared", "run must be given; change run"),
    ("train --data none --run run", "none holds no finished prepared data; `twotower prepare`"),
    ("train --data . --run run", "no manifest.json in it; Did you mean prepared?"),
    ("train --data prepared/manifest.json --run run", "Did you mean prepared?"),
    (f"{TRAIN} --method bmsn", "method must be one of; ssl_pop; got 'bmsn'; Did you mean 'bmns'?"),
    (f"{TRAIN} --tower feature", "tower must be one of; 'features'; got 'feature'; change tower"),
    (f"{TRAIN} --dim many", "--dim: invalid int value: 'many'; twotower train --help"),
    (f"{TRAIN} --dim 0", "dim must be at least 1, got 0; change dim"),
    (f"{TRAIN} --epoch 3", "unknown argument --epoch; did you mean --epochs?"),
    (f"{TRAIN} --options num_mixed=3", "option of ssl_pop must be one of; got 'num_mixed'"),
    (f"{TRAIN} --options num_mixed", "options must be name=value; got 'num_mixed'"),
    (f"{TRAIN} --batch_size 1", "batch_size must be at least 2, got 1; change batch_size"),
    (f"{TRAIN} --temperature 0", "temperature must be above 0"),
    (f"{TRAIN} --epochs 0", "epochs must be at least 1, got 0"),
    (f"{TRAIN} --epochs 1.5", "--epochs: invalid int value: '1.5'"),
    (f"{TRAIN} --optimizer sgd", "optimizer must be one of; lazy_adam; got 'sgd'"),
    (f"{TRAIN} --popularity_power 0.1", "popularity_power must be 0 without normalize, got 0.1"),
    (f"{TRAIN} --precision float16", "precision must be one of; tf32; got 'float16'"),
    (f"{TRAIN} --learning_rate -1", "learning_rate must be above 0, got -1.0"),
    (f"{TRAIN} --hidden 32", "hidden is for tower features; leave out hidden"),
    (
        f"{TRAIN} --patience 2",
        "without a validation part; --validation_ratio; leave out --patience",
    ),
    (f"{TRAIN} --validation_metric recall50", "as in recall@50; got 'recall50'"),
    (f"{TRAIN} --init_from none", "none holds no trained run; change --init_from"),
    (f"{TRAIN} extra", "unexpected argument 'extra'; twotower train --help"),
    ("evaluate --data prepared --run none", "none holds no trained run; `twotower train`"),
    (
        "evaluate --data prepared --run trained/checkpoints",
        "no training.json in it; Did you mean trained?",
    ),
    (
        "evaluate --data prepared --run trained --ks 5 99",
        "ks must be at most 4, the number of candidates, got 99; change ks",
    ),
    ("compare trained", "two or more directories; change runs"),
    ("audit --data prepared --run trained --methods nope", "method must be one of; got 'nope'"),
    ("evaluate --data prepared --run trained --ks 0", "ks must be"),
    ("evaluate --data prepared --run trained --history fresh", "history must be; got 'fresh'"),
    ("recommend --data prepared --run none --output recs", "none holds no trained run"),
    ("export --bundle bundle --models models --target_recall 95", "above 0 and at most 1, got 95"),
    ("export --bundle bundle --models models --name a/b", "name must be letters, digits; 'a/b'"),
    ("methods bmsn", "no method 'bmsn'; did you mean bmns?"),
    ("towers featurs", "no tower 'featurs'; did you mean features?"),
    ("export --data prepared --run none --models models", "none holds no trained run"),
    (
        "export --bundle bundle --models models --k 99",
        "k must be at most 30, the number of candidates, got 99; change k",
    ),
    (
        "export --bundle bundle --models models --title_column name",
        "'name'; it has colour; change title_column",
    ),
    ("query", "arguments are required: --models; twotower query --help"),
    ("query --models models", "query must be raw ids, first of all or after --query; change query"),
    ("query --models models ann", "raw ids, first of all or after --query"),
    ("query ann --models none", "none/shop holds no model version; `twotower export --models none"),
    (
        "query ann --models models/shop",
        "models/shop is a model, not the directory of all models; --models models; shop",
    ),
    ("query ann --models models/shop/1", "models/shop/1 is a version; --models models; shop"),
    (
        "query ann --models models --name films",
        "models/films holds no model version; it has shop; --name",
    ),
    (
        "query ann --models models --version 7",
        "version 7 of models/shop does not exist; there are: 1",
    ),
    (
        "query ann --models models --k 99",
        "k must be at most 30, the number of candidates, got 99; change k",
    ),
    ("query ann --models models --where colour", "where must be NAME=VALUE; got 'colour'"),
    ("query ann --models models --k 0", "k must be at least 1, got 0"),
    (
        "query ann --models models --index scan",
        "index must be one of default, exact, scann, got 'scan'",
    ),
    (
        "items --models models --name films --add new.parquet",
        "models/films holds no model version; it has shop",
    ),
    (
        "items --models models --name shop --add none.parquet",
        "none.parquet is missing; 'candidate_id'",
    ),
    ("serve --models none", "models must be a directory, got 'none'; `twotower export`"),
    (
        "serve --models models/shop",
        "models/shop is a model, not the directory of all models; --models models",
    ),
    ("serve --models models --rest_port 99999", "rest_port must be at most 65535"),
    ("run", "workdir must be given; --workdir DIR"),
    ("run --config none.yaml", "--config none.yaml cannot be read"),
    ("frequencies --source log.csv --output out", "no column 'item_id'; --item_column"),
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A log, prepared data and a published model; `trained` has what a run is known by."""
    root = tmp_path_factory.mktemp("shop")
    log = pd.DataFrame({"user": list("aabbcc"), "product": list("wxxyyz"), "when": "2024-01-05"})
    log.to_csv(root / "log.csv", index=False)
    (root / "log.xlsx").write_bytes(b"PK")
    pd.DataFrame({"product": list("wxyz"), "title": list("WXYZ")}).to_csv(root / "items.csv")
    columns = {"user_column": "user", "item_column": "product", "timestamp_column": ""}
    columns |= {"train_ratio": 0.5, "partitions": 1}
    prepare(PrepareConfig(source=str(root / "log.csv"), output=str(root / "prepared"), **columns))
    (root / "trained" / "checkpoints").mkdir(parents=True)
    (root / "trained" / "training.json").write_text("{}")
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    colours = pd.DataFrame({"colour": ["red"] * 30})
    bundle = write_bundle(
        root / "bundle",
        vectors,
        [f"item {row}" for row in range(30)],
        attributes=pa.Table.from_pandas(colours),
    )
    publish(bundle, root / "models", name="shop", k=10, scann=False)
    return root


@pytest.fixture
def at_home(shop, monkeypatch):
    """In the shop; and `serve` sets up logs for its process, which is this one."""
    monkeypatch.chdir(shop)
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


@pytest.mark.parametrize(("command", "expected"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_line_with_its_remedy(shop, at_home, capsys, command, expected):
    before = sorted(shop.glob("*"))
    words = shlex.split(command)
    if words[0] == "query" and "--name" not in words and "/" not in command:
        words += ["--name", "shop"]
    assert twotower.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"twotower {words[0]}: ")
    assert error.count("\n") == 1
    for part in expected.split("; "):
        assert part in error
    left = {path.name for path in set(shop.glob("*")) - set(before)}
    assert left <= {"out.dead_letters.jsonl"}
