"""Makes the table of products of `make demo`: for each its class and a price, as a title.

Ta-Feng has no names of products; a class and a price let a person judge a recommendation.
"""

import sys
from pathlib import Path

import pandas as pd

from pipeline.contract.files import written_aside
from pipeline.read.discover import demo_file

COLUMNS = {"PRODUCT_ID": str, "PRODUCT_SUBCLASS": str, "AMOUNT": float, "SALES_PRICE": float}


def main(path: Path) -> None:
    """Writes the table."""
    log = pd.read_csv(demo_file(), usecols=list(COLUMNS), dtype=COLUMNS)
    log["price"] = log["SALES_PRICE"] / log["AMOUNT"].clip(lower=1)
    products = log.groupby("PRODUCT_ID").agg(
        kind=("PRODUCT_SUBCLASS", lambda values: values.mode()[0]), price=("price", "median")
    )
    prices = products["price"].round().astype(int).astype(str)
    products["title"] = "class " + products["kind"] + ", " + prices + " NT$"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        products.drop(columns="price").to_csv(aside)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
