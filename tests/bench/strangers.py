"""A pytest plugin: puts into the suite who must not get a time.

One whose gradient is 6 % off, one who is not installed, and one who is off by 6 % in our name.
"""

from bench import providers
from bench.provider import Provider

NAMES = ("wrong", "absent", "bidistill, wrong")
_suite = providers.suite


def _wrong(case):
    (own,) = [p for p in _suite(case, "cpu") if p.name == "bidistill, torch"]

    def build(problem):
        step = own.build(problem)

        def changed():
            loss, (dx, *others) = step()
            return loss, [dx * 1.06, *others]

        return changed

    return build


def _absent(problem):
    import not_a_package  # noqa: F401  # pyright: ignore


def with_strangers(case, device):
    builds = _wrong(case), _absent, _wrong(case)
    strangers = [Provider(n, case.loss, b) for n, b in zip(NAMES, builds, strict=True)]
    return [*_suite(case, device), *strangers]


def pytest_configure():
    # before the benchmarks are imported, and with them the suite's function
    providers.suite = with_strangers
