"""A bound on what a set of tests may cost (``make test-fast``): CPU seconds, which a busy machine changes little.

    python -m pytest -p tests.budget --cpu-budget 80 FILE...

Above it the tests fail, and the files that cost most are named: one of them has grown too slow for the set.
"""

import collections
import resource

FILES: collections.Counter[str] = collections.Counter()
STARTED = collections.deque([0.0], maxlen=1)  # CPU seconds of this process when the test began


def pytest_addoption(parser):
    parser.addoption("--cpu-budget", type=float, help="CPU seconds that all tests together may take")


def pytest_runtest_protocol(item):
    STARTED.append(cpu_seconds(resource.RUSAGE_SELF))


def pytest_runtest_teardown(item):
    item.user_properties.append(("cpu_s", cpu_seconds(resource.RUSAGE_SELF) - STARTED[0]))


def pytest_runtest_logreport(report):
    """In the process that reports, whichever process ran the test."""
    if report.when == "teardown":
        FILES[report.nodeid.partition("::")[0]] += dict(report.user_properties).get("cpu_s", 0.0)


def pytest_sessionfinish(session):
    budget = session.config.getoption("cpu_budget")
    if budget and spent() > budget and not hasattr(session.config, "workerinput"):
        session.exitstatus = session.exitstatus or 1


def pytest_terminal_summary(terminalreporter, config):
    budget = config.getoption("cpu_budget")
    if not budget:
        return
    terminalreporter.write_line(f"{spent():.0f} of {budget:.0f} CPU seconds", yellow=spent() > budget)
    if spent() > budget:
        costly = ", ".join(f"{file} {seconds:.1f}" for file, seconds in FILES.most_common(5))
        terminalreporter.write_line(
            f"Over the budget: take from FAST in the Makefile what has grown ({costly})", red=True
        )


def spent() -> float:
    """By all tests, their start-up and that of their workers."""
    return cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN)


def cpu_seconds(of: int) -> float:
    usage = resource.getrusage(of)
    return usage.ru_utime + usage.ru_stime
