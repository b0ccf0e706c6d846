from __future__ import annotations

import threading

import pytest

from surgery import progress


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def started(self, task: progress.Task) -> None:
        self.events.append(("started", task.title, task.done))

    def advanced(self, task: progress.Task) -> None:
        self.events.append(("advanced", task.title, task.done))

    def finished(self, task: progress.Task) -> None:
        self.events.append(("finished", task.title, task.done))


def test_a_task_is_reported_from_start_to_end():
    recorder = Recorder()
    with progress.listen(recorder), progress.task("write", total=5, unit="bytes") as task:
        task.advance(2)
        task.advance(3)
    assert (task.total, task.unit) == (5, "bytes")
    assert recorder.events == [
        ("started", "write", 0),
        ("advanced", "write", 2),
        ("advanced", "write", 5),
        ("finished", "write", 5),
    ]


def test_a_failed_task_is_finished_too():
    recorder = Recorder()
    with progress.listen(recorder), pytest.raises(KeyError), progress.task("write"):
        raise KeyError
    assert [event for event, _, _ in recorder.events] == ["started", "finished"]


def test_nobody_listens_outside_the_context():
    recorder = Recorder()
    with progress.listen(recorder):
        pass
    with progress.task("write") as task:
        task.advance()
    assert task.done == 1
    assert recorder.events == []


def test_track_counts_an_item_when_its_body_is_done():
    recorder = Recorder()
    with progress.listen(recorder):
        done_in_body = [len(recorder.events) for _ in progress.track(["a", "b"], "count")]
    assert done_in_body == [1, 2]
    assert recorder.events[-1] == ("finished", "count", 2)


def test_a_worker_thread_reports_to_the_listener_of_its_task():
    recorder = Recorder()
    with progress.listen(recorder), progress.task("write") as task:
        thread = threading.Thread(target=task.advance)
        thread.start()
        thread.join()
    assert ("advanced", "write", 1) in recorder.events
