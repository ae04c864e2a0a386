"""Soak runs take long: what has passed on a commit is not run again on it, and bench/RESULTS.md gets
the counts, a line for each file of tests.

`make soak` goes on where it was stopped; `pytest --cache-clear` forgets what passed.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import results  # noqa: E402

SECTION = "soak"
FILES = ["operator/cptjob_operator", "trainer/cptjob_trainer", "client/cptjob"]
HEAD = ["tests", "commit", "passed", "failed", "minutes"]
_ROW = re.compile(r"^\| `([^`]+)` \|.*\|$", re.MULTILINE)


def pytest_configure(config: pytest.Config) -> None:
    asked = str(config.option.markexpr)
    if "soak" in asked and "not soak" not in asked and not config.option.collectonly:
        config.pluginmanager.register(Ledger(config), "soak-ledger")


class Ledger:
    """Outcomes and seconds of this commit's tests, by their ids."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._commit = config, results.commit()
        self._key = f"cptjob/soak/{self._commit}"
        # With changes that are in no commit, nothing says what was tested.
        known = config.cache.get(self._key, {}) if self._is_whole and config.cache else {}
        self._known: dict[str, list[object]] = dict(known)
        self._ran: set[str] = set()
        self._done = 0

    @property
    def _is_whole(self) -> bool:
        return "," not in self._commit

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        done = [each for each in items if self._known.get(each.nodeid, [""])[0] == "passed"]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [each for each in items if each not in set(done)]
            self._done = len(done)
            print(f"\n{len(done)} have passed on commit {self._commit} before")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report = yield
        before, seconds = self._known.get(item.nodeid, ["passed", 0.0])
        if item.nodeid not in self._ran:
            before, seconds = "passed", 0.0
        outcome = "failed" if "failed" in (before, report.outcome) else "passed"
        self._known[item.nodeid] = [outcome, seconds + call.duration]
        self._ran.add(item.nodeid)
        return report

    def pytest_runtest_logfinish(self) -> None:
        if self._config.cache and self._is_whole:
            self._config.cache.set(self._key, self._known)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._ran:
            if self._done and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
                session.exitstatus = pytest.ExitCode.OK
            return
        files = {each.partition("::")[0] for each in self._ran}
        rows = {name: row for name, row in _rows() if name not in files}
        for file in files:
            mine = [each for name, each in self._known.items() if name.startswith(f"{file}::")]
            count = Counter(outcome for outcome, _ in mine)
            minutes = sum(float(str(seconds)) for _, seconds in mine) / 60
            figures = [f"{count['passed']}", f"{count['failed']}", f"{minutes:.1f}"]
            rows[file] = "| " + " | ".join([f"`{file}`", f"commit {self._commit}", *figures]) + " |"
        table = results.table(HEAD, []) + "\n" + "\n".join(rows[name] for name in sorted(rows))
        command = " ".join(["pytest", *map(str, self._config.invocation_params.args)])
        results.write(SECTION, table, FILES, command=command)


def _rows() -> Iterator[tuple[str, str]]:
    """The lines of earlier runs, by their files."""
    text = results.FILE.read_text("utf-8") if results.FILE.exists() else ""
    section = results.sections(text).get(SECTION, "")
    for found in _ROW.finditer(section):
        yield found[1], found[0]
