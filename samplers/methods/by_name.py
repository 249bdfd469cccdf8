"""The look-up of methods by name, and the reading of their options."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from typing import Any

import numpy as np

from samplers.methods.adaptive import AdaSirP, AdaSirU, AdaSirW, AoBpr, Kernel
from samplers.methods.full_softmax import DistilledSoftmax, FullSoftmax, SoftTargets
from samplers.methods.hard_negative import Dns, DnsMn, SoftBpr, Warp
from samplers.methods.in_batch import Cbns, CorrectSfx, Mns, Ssl, SslPop
from samplers.methods.method import Method
from samplers.methods.mixing import Bmns, PositiveMixing
from samplers.methods.per_query import Bpr, Pns, PrisP, PrisU, SoftmaxV
from samplers.methods.resampling import Bir, Xir
from samplers.methods.sl_at_k import SlAtK
from samplers.selection.seen import Seen

METHODS: dict[str, type[Method]] = {
    "full_softmax": FullSoftmax,
    "ssl": Ssl,
    "ssl_pop": SslPop,
    "correct_sfx": CorrectSfx,
    "cbns": Cbns,
    "mns": Mns,
    "bir": Bir,
    "xir": Xir,
    "bmns": Bmns,
    "positive_mixing": PositiveMixing,
    "sl_at_k": SlAtK,
    "bpr": Bpr,
    "pns": Pns,
    "dns": Dns,
    "dns_mn": DnsMn,
    "soft_bpr": SoftBpr,
    "softmax_v": SoftmaxV,
    "pris_u": PrisU,
    "pris_p": PrisP,
    "adasir_u": AdaSirU,
    "adasir_p": AdaSirP,
    "adasir_w": AdaSirW,
    "warp": Warp,
    "aobpr": AoBpr,
    "kernel": Kernel,
}


def build(
    name: str,
    *,
    frequency: np.ndarray | None = None,
    num_candidates: int | None = None,
    num_queries: int | None = None,
    fingerprints: np.ndarray | None = None,
    targets: SoftTargets | None = None,
    seen: Seen | None = None,
    **options: Any,
) -> Method:
    """Makes a method, a `tf.Module` whose state checkpoints.

        method = samplers.build("dns_mn", num_candidates=41_000, num_kept=4)
        losses = method(encoders, batch, seed=tf.constant([10, step], tf.int64))  # [B]

    Args:
      name: a key of `METHODS`; its `needs` says which of the next three it cannot do without.
      frequency: [N], train rows of each candidate.
      num_candidates: N.
      num_queries: the number of dense query ids.
      fingerprints: int64 [N], hashes of the raw ids of the candidates; correct_sfx uses them.
      targets: what a teacher ranks highest; full_softmax alone learns from one.
      seen: the train positives of every query, where they are to be left out of its negatives.
      **options: fields of that method's dataclass, also as text such as "0.5" or "true".

    Raises:
      ValueError: the name or an option is unknown, or an option has a wrong value.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(_unknown("method", name, sorted(METHODS)))
    known = option_types(name)
    for option in options:
        if option not in known:
            raise ValueError(_unknown(f"option of {name}", option, sorted(known)))
    given = {key: parse_option(key, value, known[key]) for key, value in options.items()}
    given |= {"frequency": frequency, "num_candidates": num_candidates, "seen": seen}
    given |= {"num_queries": num_queries, "fingerprints": fingerprints}
    if targets is None:
        return METHODS[name](**given)
    if METHODS[name] is not FullSoftmax:
        raise ValueError(f"targets go with the method full_softmax alone, got {name}.")
    return DistilledSoftmax(targets=targets, **given)


def option_types(name: str) -> dict[str, str]:
    """The options of a method: name → type, such as "bool" or "float | None"."""
    shared = {field.name for field in dataclasses.fields(Method)}
    fields = dataclasses.fields(METHODS[name])
    return {field.name: str(field.type) for field in fields if field.name not in shared}


def _unknown(what: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{what} must be one of {', '.join(known)}, got {name!r}.{hint}"


def parse_option(option: str, value: Any, kind: str) -> Any:
    """The value of an option in its declared type, such as "int | None"; text is converted.

        parse_option("num_kept", "4", "int | None")  # 4

    Raises:
      ValueError: it is of another type.
    """
    kinds = kind.split(" | ")
    text = value.strip().lower() if isinstance(value, str) else None
    if text is None:
        if _fits(value, kinds):
            return value
    elif "None" in kinds and text == "none":
        return None
    elif "bool" in kinds and text in ("true", "false", "1", "0", "yes", "no"):
        return text in ("true", "1", "yes")
    elif "str" in kinds:
        return value
    else:
        for name, convert in (("int", int), ("float", float)):
            if name in kinds:
                with contextlib.suppress(ValueError):
                    return convert(value)
    raise ValueError(f"{option} must be {kind}, got {value!r}.")


def _fits(value: Any, kinds: list[str]) -> bool:
    """Whether a value, not a text, is of one of the types; whole numbers are floats too."""
    if isinstance(value, (bool, np.bool_)):
        return "bool" in kinds
    whole = isinstance(value, (int, np.integer))
    number = whole or isinstance(value, (float, np.floating))
    fits = {"None": value is None, "int": whole, "float": number}
    return any(fits.get(kind, False) for kind in kinds)
