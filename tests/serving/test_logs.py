import json
import logging

from serving.logs import JsonFormatter, event


def lines(log, record):
    """What `record(logger)` writes, one object a line."""
    written = []
    handler = logging.Handler()
    handler.setFormatter(JsonFormatter())
    handler.emit = lambda one: written.append(handler.format(one))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        record(log)
    finally:
        log.removeHandler(handler)
    return [json.loads(line) for line in written]


def test_a_line_is_one_object_with_its_fields():
    log = logging.getLogger("tests.logs")
    [line] = lines(
        log, lambda log: event(log, logging.INFO, "a\nb é", request_id="r1", model="", seconds=0.5)
    )
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "tests.logs",
        "message": "a\nb é",
        "request_id": "r1",
        "seconds": 0.5,
    }


def test_lines_of_others_and_stack_traces_fit_in():
    def fail(log):
        log.warning("plain %s", "text")
        try:
            raise KeyError("missing")
        except KeyError:
            log.exception("failed")

    plain, failed = lines(logging.getLogger("tests.logs"), fail)
    assert plain["message"] == "plain text"
    assert "KeyError: 'missing'" in failed["exception"]


def test_what_is_below_the_level_is_not_written():
    assert not lines(
        logging.getLogger("tests.logs"), lambda log: event(log, logging.DEBUG, "quiet", model="m")
    )
