"""The table of positions: bounded, shared by processes, and no row depends on it."""

import numpy as np
import pytest

from data import positions
from data.packing import Packing
from data.positions import Position, Positions
from sharding.errors import UserError

LENGTHS = np.random.default_rng(0).integers(5, 60, 200)
SIZES = np.column_stack([LENGTHS, *np.zeros((2, 200), int)])


class Counting(Packing):
    """Counts the windows that it packs."""

    packed = 0

    def _pack(self, state: Position):
        self.packed += 1
        return super()._pack(state)


def packing(known: Positions) -> Counting:
    return Counting({"a": SIZES}, lambda row: (1.0,), (64, 0, 0), 8, 0, known=known)


@pytest.fixture
def small(monkeypatch) -> None:
    for name, value in (("MOST", 16), ("RECENT", 4), ("SAVE_EVERY", 8)):
        monkeypatch.setattr(positions, name, value)
    monkeypatch.setattr("data.packing.RECENT", 4)


@pytest.fixture(scope="module")
def rows() -> list:
    undisturbed = packing(Positions(1))
    return [undisturbed.row(n) for n in range(6000)]


def test_a_second_jump_costs_little_in_any_process(small, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "SAVE_EVERY", 10**6)  # written at the end of the jump all the same
    file = tmp_path / "positions.npy"
    first = packing(Positions(1, file))
    assert first.row(5900) == rows[5900]
    windows = first.packed
    again = packing(Positions(1, file))
    assert again.row(5900) == rows[5900]
    assert windows > 100 and again.packed < windows / 8
    assert [again.row(n) for n in (0, 5999, 17, 3000, 4100, 1)] == [rows[n] for n in (0, 5999, 17, 3000, 4100, 1)]
    assert again.packed < windows


def test_however_far_it_goes_no_more_than_so_many_are_kept_and_the_next_row_is_near(small, rows):
    known = Positions(1)
    walking = packing(known)
    for n, row in enumerate(rows):
        assert walking.row(n) == row
        assert len(known) <= 16 and len(known._recent) <= 4
    assert len(known) >= 8
    windows = walking.packed
    walking.row(len(rows))
    assert walking.packed <= windows + 1


def test_processes_add_to_what_others_have_written(small, tmp_path):
    file = tmp_path / "positions.npy"
    early, late = Positions(1, file), Positions(1, file)
    for n in range(1, 9):
        early.add(Position(n, (n,), (0.0,)))
    for n in range(101, 109):
        late.add(Position(n, (n,), (0.0,)))
    found = Positions(1, file)
    assert len(found) <= 16
    assert (found.before(8).row, found.before(108).row) > (0, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["positions.npy"]


def test_a_position_of_a_checkpoint_is_used_and_not_passed_on(small, rows, tmp_path):
    file = tmp_path / "positions.npy"
    going_on = packing(Positions(1, file, given=packing(Positions(1)).position(3000)))
    assert going_on.row(3400) == rows[3400]
    assert going_on.row(100) == rows[100]
    assert not file.exists()


def test_a_damaged_table_is_named_and_a_folder_that_cannot_be_written_is_no_hindrance(small, rows, tmp_path):
    file = tmp_path / "positions.npy"
    file.write_bytes(b"no array")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*positions\.npy cannot be read .* Delete it"):
        Positions(1, file)
    assert packing(Positions(1, tmp_path / "missing" / "positions.npy")).row(600) == rows[600]
    file.unlink()
    known = Positions(1, file)
    file.write_bytes(b"no array")  # meanwhile, or it cannot be read just then
    known.add(Position(1, (1,), (0.0,)))
    known.save()
    assert known.before(5).row == 1 and file.read_bytes() == b"no array"
