"""What the figures of an audit say for the K that its reader cares about, in words."""

from __future__ import annotations

import math
from typing import Any

from towers.audit.subjects import BASELINE, Target

_AFFORDABLE = 1.5  # times a step of the baseline


def advise(target: Target, methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A small fixed rule over the measures of the methods, see `towers.audit.job`.

    Returns:
      {"closest": label, "closest_affordable": label, "focus": label, "text": sentences}; a label
      is None where no method has the figure. Without "full_softmax" among the methods they are
      chosen in the same way.
    """
    sampled = {label: one for label, one in methods.items() if one["method"] != "full_softmax"}
    closest = _closest(sampled)
    cheap = {label: one for label, one in sampled.items() if _ratio(one) <= _AFFORDABLE}
    affordable = _closest(cheap)
    focus = _focus(target, sampled)
    text = [_on_target(target)]
    text += [_on_knobs(target, methods)]
    if focus is not None:
        text.append(_on_focus(target, focus, sampled[focus]))
    if closest is not None:
        text.append(f"Closest to the full softmax in direction: {_figures(closest, sampled)}.")
    if affordable is not None and affordable != closest:
        text.append(
            f"Closest at {_AFFORDABLE:g} times a step of {BASELINE} or less: "
            f"{_figures(affordable, sampled)}."
        )
    text.append(_on_limits())
    return {
        "closest": closest,
        "closest_affordable": affordable,
        "focus": focus,
        "text": text,
    }


def _closest(methods: dict[str, dict[str, Any]]) -> str | None:
    """The cheapest of those whose bias is, within two standard errors, the smallest.

    Costs are rounded, because they are measured: the bias decides between near ones.
    """
    known = {label: one for label, one in methods.items() if one["bias"]["value"] is not None}
    if not known:
        return None
    best = min(known.values(), key=lambda one: one["bias"]["value"])["bias"]
    within = best["value"] + 2 * (best["error"] or 0.0)
    tied = [label for label, one in known.items() if one["bias"]["value"] <= within]
    return min(tied, key=lambda label: (_ratio(known[label]), known[label]["bias"]["value"]))


def _focus(target: Target, methods: dict[str, dict[str, Any]]) -> str | None:
    """The method that looks as deep as one that puts the same mass on each of the top K."""
    known = {
        label: abs(math.log(one["half_mass_rank"]["value"] / (target.k / 2)))
        for label, one in methods.items()
        if one["half_mass_rank"]["value"] is not None
    }
    return min(known, key=lambda label: (known[label], label)) if known else None


def _ratio(one: dict[str, Any]) -> float:
    return round(one["cost_ratio"], 1)


def _on_target(target: Target) -> str:
    return (
        f"K = {target.k} of {target.num_negatives:,.0f} negatives a query is β = K / n₋ = "
        f"{target.beta:.3g}, ρ = -log β = {-math.log(target.beta):.1f}: OPAUC(β) bounds recall and "
        "precision at K (Shi et al., WWW 2023, Theorem 3). The smaller K, the smaller β, the "
        "harder the negatives."
    )


def _on_knobs(target: Target, methods: dict[str, dict[str, Any]]) -> str:
    first, second = target.specs
    text = f"Knobs for it: {first} (M / N = {target.num_kept / target.num_drawn:.3g}) or {second}"
    measured = [
        f"{label.partition(':')[0]} puts {_percent(methods[label]['top_share'])} of its negative "
        f"mass on the top {target.k}"
        for label in target.specs
        if label in methods
    ]
    text += f"; measured here: {', '.join(measured)}." if measured else "."
    if target.num_kept / target.num_drawn > 1.5 * target.beta:
        text += f" A β of {target.beta:.3g} itself would take {1 / target.beta:,.0f} draws a pair."
    return text


def _on_focus(target: Target, label: str, one: dict[str, Any]) -> str:
    return (
        f"Of what was audited, {label} comes nearest to even weight on the top {target.k}: half of "
        f"its negative mass is on the top {one['half_mass_rank']['value']:,.0f}, "
        f"{_percent(one['top_share'])} on the top {target.k}, and {_percent(one['seen_share'])} on "
        "what the query has chosen itself."
    )


def _figures(label: str, methods: dict[str, dict[str, Any]]) -> str:
    one = methods[label]
    error = one["bias"]["error"]
    return (
        f"{label}, bias {one['bias']['value']:.3f}"
        + ("" if error is None else f" ± {error:.3f}")
        + f", KL {_number(one['kl'])}, {_ratio(one):.1f} times a step of {BASELINE}"
    )


def _on_limits() -> str:
    return (
        "Measured are bias, noise, shares and cost, on the model as it is. That a smaller bias or "
        "a depth near K trains a better model is a rule of thumb: the bounds hold for the ranking, "
        "and published settings are often softer than β = K / n₋. Compare two or three by "
        "validation metrics (`twotower tune`)."
    )


def _percent(measure: dict[str, float | None]) -> str:
    return "an unknown share" if measure["value"] is None else f"{100 * measure['value']:.2g} %"


def _number(measure: dict[str, float | None]) -> str:
    return "not known" if measure["value"] is None else f"{measure['value']:.3f}"
