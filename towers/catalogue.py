"""`twotower methods` and `twotower towers`: what there is to choose from, with its options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from typing import Any

from pipeline.contract.flags import comment_of, terminal_width, value_text
from pipeline.contract.settings import did_you_mean
from towers.encoders.tower_config import TOWERS, TowerConfig, reads

# What a training step costs, divided by one of stock TFRS: Gowalla, B = 2048, d = 32, two cores;
# benchmarks/results/train_step.json. bmns: with K = 128.
STEP_COSTS = {
    **{"ssl": 0.65, "ssl_pop": 0.67, "correct_sfx": 0.78, "mns": 1.32, "bir": 0.78, "xir": 1.84},
    **{"bmns": 0.8, "positive_mixing": 0.76, "sl_at_k": 0.38, "full_softmax": 9.51, "bpr": 0.19},
    **{"pns": 0.2, "dns": 0.25, "dns_mn": 0.48, "soft_bpr": 0.31, "softmax_v": 1.43},
    **{"pris_u": 0.38, "pris_p": 0.46, "adasir_u": 0.42, "adasir_p": 0.44, "adasir_w": 1.03},
    **{"warp": 0.24, "aobpr": 0.25, "kernel": 1.77, "cbns": 1.87},
}
_TOWERS = {  # name → what an embedding is, the paper, what it costs
    "id": ("a row of a table for each id", "", "the cheapest step"),
    "gmf": ("as id, the query's row times one weight a number", "He et al., WWW 2017", "as id"),
    "features": (
        "the row of the id, the pooled history, and a network over attributes",
        "DropoutNet, NIPS 2017, for id_dropout",
        "grows with columns, history and hidden",
    ),
    "fism": (
        "a query is the sum of what it chose",
        "Kabbur et al., KDD 2013",
        "grows with history",
    ),
    "svdpp": ("as fism, and a row of the query", "Koren, KDD 2008", "grows with history"),
    "light_gcn": (
        "the mean over layers of neighbours' sums in the graph of the train split",
        "He et al., SIGIR 2020",
        "each step passes over all train rows, 4 · num_layers times",
    ),
    "ngcf": (
        "layers of messages with weights, scaled, side by side: (num_layers + 1) · dim numbers",
        "Wang et al., SIGIR 2019",
        "as light_gcn, and products of matrices",
    ),
}


@dataclasses.dataclass(frozen=True)
class CatalogueConfig:
    """Settings of `twotower methods` and `twotower towers`."""

    name: str = ""  # show the options of this one; none: list all


def show_methods(config: CatalogueConfig) -> None:
    """Prints all methods with paper and cost, or one with its formula; a ValueError for others."""
    from samplers.methods.by_name import METHODS, option_types

    if not config.name:
        print(f"{'method':16}{'cost':>6}  what it compares a positive with; paper")
        for name, method in METHODS.items():
            first, paper = _told(method)
            _print_wrapped(f"{name:16}{STEP_COSTS[name]:>6}  {first} {paper}", indent=24)
        print("cost: of a training step, divided by one of stock TFRS, on two cores")
        print("twotower methods NAME shows the options of one; docs/methods.md, which to take")
        return
    _check(config.name, METHODS, "method")
    method = METHODS[config.name]
    print(f"{config.name}: {inspect.getdoc(method)}\n")
    print(f"cost of a training step: {STEP_COSTS[config.name]} of stock TFRS on two cores")
    _print_options(
        method, option_types(config.name), f"--method {config.name} --options NAME=VALUE"
    )


def show_towers(config: CatalogueConfig) -> None:
    """Prints all towers with paper and cost, or one with its flags; a ValueError for others."""
    if not config.name:
        print(f"{'tower':11}an embedding is; paper; cost of a step")
        for name in TOWERS:
            _print_wrapped(f"{name:11}{'; '.join(filter(None, _TOWERS[name]))}", indent=11)
        print("twotower towers NAME shows the flags of one; docs/towers.md, which to take")
        return
    _check(config.name, TOWERS, "tower")
    what, paper, cost = _TOWERS[config.name]
    print(f"{config.name}: {what}\n" + (f"paper: {paper}\n" if paper else "") + f"cost: {cost}")
    fields = [field.name for field in dataclasses.fields(TowerConfig)]
    flags = [name for name in fields if name != "tower" and reads(config.name, name)]
    _print_options(TowerConfig, flags, f"--tower {config.name} --FLAG VALUE")


def _told(method: type[Any]) -> tuple[str, str]:
    """The first line of the docstring of a method, and the paper, which comes next in it."""
    first, _, rest = (inspect.getdoc(method) or "").partition("\n\n")
    paper = re.match(r'[A-Z][^:]*?(?:(?:19|20)\d\d|(?=, "))', rest)
    return first, paper[0].replace("\n", " ") if paper else ""


def _print_wrapped(text: str, indent: int) -> None:
    print(textwrap.fill(text.rstrip(), terminal_width(), subsequent_indent=" " * indent))


def _check(name: str, known: Any, what: str) -> None:
    if name not in known:
        hint = did_you_mean(name, known, f"twotower {what}s lists them.")
        raise ValueError(f"there is no {what} {name!r}; {hint}")


def _print_options(owner: type[Any], names: Any, usage: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(owner)}
    print(f"\noptions, {usage}:" if names else "\nit has no options")
    for name in names:
        text = f"  {name} ({value_text(defaults[name])})  {comment_of(owner, name)}"
        _print_wrapped(text, indent=4)
