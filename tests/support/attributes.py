"""A log with a table of item attributes, and its features by plain Python, row by row."""

from collections import Counter

import numpy as np
import pyarrow as pa

KINDS = {  # in the order of the table; `notes` is skipped
    "price": "numeric",
    "brand": "categorical",
    "sub": "categorical",
    "new": "categorical",
    "tags": "multi",
    "title": "text",
}
FLAGS = ("title=text", "notes=skip")
ITEMS = [f"ü{n}" if n % 7 == 0 else f"i{n}" for n in range(60)]
TRAIN, TEST_ONLY, COLD = ITEMS[:40], ITEMS[40:50], ITEMS[50:]
BRANDS = ["äpfel", "Birne", "Zwetschge", "Birne", "", None]


def make_items(seed=5):
    """Attributes of all items but the first five; `new…` values only of those without train."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, item in enumerate(ITEMS[5:], 5):
        unseen = ["new tag"] if number >= 40 else []
        tags = [f"t{tag}" for tag in rng.integers(0, 6, rng.integers(0, 5))]  # with duplicates
        rows.append(
            {
                "item_id": item,
                "price": None if number % 9 == 0 else float(rng.lognormal(3, 2)),
                "brand": "new brand" if number % 5 == 0 and unseen else BRANDS[rng.integers(6)],
                "sub": None if number % 11 == 0 else int(rng.integers(4)),
                "new": bool(number % 3),
                "tags": None if number % 10 == 0 else tags + unseen,
                "title": None if number % 13 == 0 else f"Größe {number} 漢字",
                "notes": "x",
            }
        )
    return rows


def as_table(rows):
    types = {"price": pa.float64(), "sub": pa.int32(), "tags": pa.list_(pa.string())}
    return pa.table({n: pa.array([row[n] for row in rows], types.get(n)) for n in rows[0]})


def write_log(directory):
    """Train and test files: 40 items have train rows, ten more have test rows alone."""
    rng = np.random.default_rng(3)
    directory.mkdir()
    for name, items in (("train", TRAIN), ("test", ITEMS[30:50])):
        pairs = [(f"u{rng.integers(9)}", item) for item in items for _ in range(1 + len(item))]
        pairs += [("only test", TEST_ONLY[0])] if name == "test" else []
        lines = ["user_id,item_id", *(",".join(pair) for pair in pairs)]
        (directory / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return str(directory)


def cells(row, name):
    """What is known of a column: numbers, or texts, each once."""
    value = row.get(name)
    found = [v for v in (value if isinstance(value, list) else [value]) if v not in (None, "")]
    if KINDS[name] == "numeric":
        return found
    return list(dict.fromkeys(str(v).lower() if isinstance(v, bool) else str(v) for v in found))


def expected_features(rows, ids, min_count=1):
    """The features of each id, and for each column its ranked values or mean and deviation."""
    by_id = {row["item_id"]: row for row in rows}
    features, learned = [{} for _ in ids], {}
    for name, kind in KINDS.items():
        seen = [value for item in TRAIN for value in cells(by_id.get(item, {}), name)]
        counts = Counter(seen)
        often = [value for value in counts if counts[value] >= min_count]
        learned[name] = ranked = sorted(often, key=lambda value: (-counts[value], value))
        if kind == "numeric":
            learned[name] = np.mean(seen), np.std(seen)
        for item, row in zip(ids, features, strict=True):
            known = cells(by_id.get(item, {}), name)
            codes = [1 + ranked.index(value) for value in known if value in ranked]
            if kind == "numeric":
                mean, std = learned[name]
                row[name] = (known[0] - mean) / std if known else 0.0
                row[f"{name}:present"] = bool(known)
            elif kind == "text":
                row[name] = known[0] if known else ""
            else:
                row[name] = codes if kind == "multi" else (codes or [0])[0]
    return features, learned
