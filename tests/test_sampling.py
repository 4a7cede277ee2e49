"""The share of the large tables that a run draws: 18 consecutive shares hold every case, and none is empty."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"


class Item(SimpleNamespace):
    """The attributes of a collected test that the sampling uses."""

    __hash__ = object.__hash__

    def get_closest_marker(self, name):
        return name if name in self.markers else None


def collected():
    for table, cases in (("test_contract.py", 13), ("test_schedules.py", 2), ("test_losses.py", 40)):
        for case in range(cases):
            yield Item(path=Path(table), originalname="test_x", callspec=case, markers=())
    yield from (Item(path=Path("test_contract.py"), originalname="test_y", callspec=0, markers=("always",)),)
    yield from (Item(path=Path("test_slow.py"), markers=("slow",)) for _ in range(8))
    yield from (Item(path=Path("test_small.py"), callspec=case, originalname="test_z", markers=()) for case in range(3))


@pytest.fixture
def draw(monkeypatch):
    spec = importlib.util.spec_from_file_location("sampling", CONFTEST)
    sampling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampling)

    def draw(items, value, whole=False, args=("tests",)):
        monkeypatch.setenv("NNLEARN_SAMPLE", str(value))
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        config = SimpleNamespace(getoption=lambda name: whole, args=args, hook=hook)
        drawn = list(items)
        sampling.pytest_collection_modifyitems(config, drawn)
        return set(drawn)

    return draw


def test_18_consecutive_shares_hold_every_case(draw):
    items = list(collected())
    for first in (0, 5, 2**32 - 3):
        shares = [draw(items, first + value) for value in range(18)]
        assert set().union(*shares) == set(items)
        assert all(len(share) < len(items) for share in shares) and shares[0] != shares[1]


def test_some_tests_are_never_left_out(draw):
    items = list(collected())
    always = {item for item in items if "always" in item.markers or item.path.name == "test_small.py"}
    for value in range(12):
        share = draw(items, value)
        assert share >= always
        tables = {item.path.name for item in share}
        assert tables == {item.path.name for item in items}  # at least one case of each table
    assert draw(items, 0, whole=True) == draw(items, 0, args=["tests/test_x.py::test_y"]) == set(items)
