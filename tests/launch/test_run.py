"""Which of several failed processes is shown."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treering.launch.run import _first_failure


def failed(exitcode: int, timestamp: int, said: Any = None) -> SimpleNamespace:
    name = {-9: "SIGKILL", -15: "SIGTERM"}.get(exitcode, "")
    data = {"message": said} if said else {}
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file_data=data, signal_name=lambda: name)


SAID = {"message": "shard 7 is cut short", "code": 2, "time": 100.7}


@pytest.mark.parametrize(
    ("failures", "words", "code"),
    [
        # The agent's seconds are whole: the process it ended seems to have failed before the one that spoke.
        ({0: failed(-15, 100), 1: failed(2, 100, SAID)}, "shard 7 is cut short", 2),
        ({0: failed(-15, 99), 1: failed(-9, 100)}, "process 1 was killed by SIGKILL", 1),
        ({0: failed(-15, 100)}, "process 0 was killed by SIGTERM", 1),
        ({0: failed(2, 100, SAID), 1: failed(2, 100, SAID | {"message": "earlier", "time": 100.2})}, "earlier", 2),
        ({0: failed(75, 100)}, "process 0 waited without progress: nothing from rank 3; stacks in", 1),
    ],
)
def test_the_failure_that_came_first_is_shown(failures: dict[int, Any], words: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "hangs.jsonl").write_text('{"message": "nothing from rank 3"}\n')
    error = _first_failure(SimpleNamespace(failures=failures), tmp_path)
    assert words in str(error)
    assert error.code == code
