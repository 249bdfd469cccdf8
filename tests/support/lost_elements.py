"""A fault in a Beam graph: one element behind one step is lost, or comes twice; and how many rows
an element holds.

The steps are found in the graph itself while it is built, so that a new one is covered without a
word here. Only for the runner in this process: elements are counted in a variable of this module.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.transforms.ptransform import _NamedPTransform

from pipeline.beam.blocks import ROW


class Step(NamedTuple):
    """A labelled step of the n-th pipeline of a job."""

    pipeline: int
    label: str


class Fault(NamedTuple):
    """What happens to the element that a step gives at a place, from 0."""

    step: Step
    place: int
    copies: int  # 0: it is lost, 2: it comes twice


_seen: Counter[Step] = Counter()  # elements that came from each step that is watched
_rows: Counter[Step] = Counter()  # the most rows that one of them holds


def _rows_in(element):
    if isinstance(element, np.ndarray):
        return len(element) if element.dtype == ROW else 0
    if isinstance(element, dict):
        return _rows_in(element.values())
    nested = isinstance(element, Iterable) and not isinstance(element, str | bytes | pa.Table)
    return sum(map(_rows_in, element)) if nested else 0


class Watch(beam.DoFn):
    """Counts elements and passes them on, but the one of the fault."""

    def __init__(self, step, fault):
        self._step, self._fault = step, fault

    def process(self, element):
        _seen[self._step] += 1
        _rows[self._step] = max(_rows[self._step], _rows_in(element))
        here = self._fault and self._fault.place == _seen[self._step] - 1
        for _ in range(self._fault.copies if here else 1):
            yield element


class Steps:
    """The steps of the pipelines that were built, and who reads what they give."""

    def __init__(self, fault):
        self._fault = fault
        self._readers = {}  # Step → labels
        self._pipelines, self._made_by = [], {}  # collection → its step
        self._inside = False
        self.elements = {}  # Step → elements that it gave
        self.rows = {}  # Step → the most rows in one of them

    def deciding(self):
        """Steps whose elements go into the result; others say that something is written."""
        steps = [step for step, readers in self._readers.items() if readers - {"Join"}]
        return [step for step in steps if self.elements[step] and step.label != "Join"]

    def apply(self, pipeline, transform, inputs, apply):
        """Adds a transform of ours, and behind it what watches it."""
        if self._inside or type(transform).__module__.startswith("pipeline."):
            return apply()
        if pipeline not in self._pipelines:
            self._pipelines.append(pipeline)
        parent = pipeline._current_transform().full_label
        label = "/".join(filter(None, [parent, transform.label]))
        step = Step(self._pipelines.index(pipeline), label)
        _, sources = transform._extract_input_pvalues(inputs)
        for source in sources.values() if isinstance(sources, dict) else sources:
            if source in self._made_by:
                self._readers[self._made_by[source]].add(label)
        self._readers[step] = set()
        self._inside = True
        result = apply()
        if self._fault is None or step == self._fault.step:
            watch = beam.ParDo(Watch(step, self._fault)).with_output_types(result.element_type)
            result = result | f"Watch{transform.label}" >> watch
        self._inside = False
        self._made_by[result] = step
        return result


@contextlib.contextmanager
def watched(fault=None):
    """The steps of the pipelines that run in this context; one of them may have a fault."""
    steps, original = Steps(fault), beam.Pipeline.apply

    def apply(pipeline, transform, inputs=None, label=None):
        def unchanged():
            return original(pipeline, transform, inputs, label)

        named = label or isinstance(transform, _NamedPTransform)  # comes again with its label
        return unchanged() if named else steps.apply(pipeline, transform, inputs, unchanged)

    _seen.clear()
    _rows.clear()
    beam.Pipeline.apply = apply
    try:
        yield steps
    finally:
        beam.Pipeline.apply = original
        steps.elements, steps.rows = Counter(_seen), Counter(_rows)
    if fault:
        assert _seen[fault.step] > fault.place, f"nothing happened at {fault}"
