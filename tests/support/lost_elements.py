"""A fault in a Beam graph: one element behind one step is lost, or comes twice.

The steps are found in the graph itself while it is built, so that a new one is covered without a
word here. Only for the runner in this process: elements are counted in a variable of this module.
"""

import contextlib
from collections import Counter
from typing import NamedTuple

import apache_beam as beam
from apache_beam.transforms.ptransform import _NamedPTransform


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


class Watch(beam.DoFn):
    """Counts elements and passes them on, but the one of the fault."""

    def __init__(self, step, fault):
        self._step, self._fault = step, fault

    def process(self, element):
        _seen[self._step] += 1
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
    beam.Pipeline.apply = apply
    try:
        yield steps
    finally:
        beam.Pipeline.apply = original
        steps.elements = Counter(_seen)
    if fault:
        assert _seen[fault.step] > fault.place, f"nothing happened at {fault}"
