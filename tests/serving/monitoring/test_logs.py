import io
import json
import logging
import threading

from serving.monitoring import logs
from serving.monitoring.logs import JsonFormatter, event


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


def test_who_logs_does_not_wait_for_who_reads(monkeypatch):
    gate, written = threading.Event(), io.StringIO()

    class Slow(io.StringIO):
        def write(self, text):
            assert gate.wait(60)
            return written.write(text)

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logs, "_MOST_WAITING", 5)
    monkeypatch.setattr("sys.stdout", Slow())
    with logs.installed():
        for number in range(100):
            logging.getLogger("tests.logs").warning("line %d", number)
        gate.set()
    assert not root.handlers  # as before
    messages = [json.loads(line)["message"] for line in written.getvalue().splitlines()]
    assert messages[:5] == [f"line {number}" for number in range(5)]
    assert len(messages) < 10  # what did not fit is lost


def test_of_many_lines_a_second_some_are_written():
    log = logging.getLogger("tests.sampled")
    sampled = logs.Sampled(2)
    log.addFilter(sampled)

    def record(log):
        for second in (7, 7, 7, 7, 8, 9):
            one = log.makeRecord(log.name, logging.INFO, "", 0, "refused", (), None)
            one.created = second
            log.handle(one)

    written = lines(log, record)
    assert [line.get("left_out") for line in written] == [None, None, 2, None]
