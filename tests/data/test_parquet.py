"""Columns as arrays: shapes, what stays in memory, and which row groups are touched."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acrlpd.data.formats.parquet import DataError, ParquetReader


@pytest.fixture
def path(tmp_path):
    columns = {
        "fixed": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2)),
        "lists": pa.array([[[1, 2], [3, 4]]] * 3, pa.list_(pa.list_(pa.int64()))),
        "plain": pa.array([1.5, 2.5, 3.5], pa.float64()),
        "flag": pa.array([True, False, True]),
        "text": pa.array(["a", "b", "c"]),
        "ragged": pa.array([[1], [1, 2], []], pa.list_(pa.int64())),
        "holes": pa.array([1, None, 3]),
        "struct": pa.array([{"bytes": b"x", "path": "p"}] * 3),
    }
    path = tmp_path / "chunk-000" / "table.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table(columns), path, row_group_size=1)
    return path


def test_columns(path):
    read = ParquetReader().columns(path, ("fixed", "lists", "plain", "flag", "text"))
    np.testing.assert_array_equal(read["fixed"], np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    assert read["fixed"].dtype == np.float32
    np.testing.assert_array_equal(read["lists"], np.array([[[1, 2], [3, 4]]] * 3))
    assert read["plain"].tolist() == [1.5, 2.5, 3.5]
    assert read["flag"].tolist() == [True, False, True]
    assert read["text"].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("rows_in_group", [1, 2, 3])
def test_one_cell(tmp_path, rows_in_group):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "number": [1, 2, 3]}), path, row_group_size=rows_in_group)
    assert [ParquetReader().cell(path, "text", row) for row in range(3)] == ["a", "b", "c"]
    with pytest.raises(DataError, match="column 'x' is missing"):
        ParquetReader().cell(path, "x", 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ragged", "same shape in every row, found lists of 0 to 2"),
        ("holes", "1 values are missing"),
        ("struct", "expected numbers or text"),
        ("none", "column 'none' is missing; the file has fixed"),
    ],
)
def test_columns_that_are_no_arrays(path, name, message):
    with pytest.raises(DataError, match=message):
        ParquetReader().columns(path, (name,))


def test_cells_of_few_row_groups(path, monkeypatch):
    groups = []
    read = pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        groups.append(group)
        return read(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    reader = ParquetReader()
    assert reader.cells(path, "plain", 1, 2) == [2.5]
    assert groups == [1]
    assert reader.cells(path, "plain", 1, 3) == [2.5, 3.5]
    assert groups == [1, 2]  # the first of the two was kept
    assert reader.cells(path, "plain", 1, 1) == []


def test_cells_within_a_row_group(tmp_path):
    path = tmp_path / "one.parquet"
    pq.write_table(pa.table({"x": list(range(10))}), path)
    assert ParquetReader().cells(path, "x", 3, 6) == [3, 4, 5]


def test_memory_limit(tmp_path):
    paths = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path in paths:
        pq.write_table(pa.table({"x": np.zeros(1000)}), path)
    reader = ParquetReader(max_bytes=20_000)  # two columns of 8000 bytes and what is known of their files
    kept = reader.columns(paths[0], ("x",))
    assert reader.columns(paths[0], ("x",)) is kept
    for path in paths[1:]:
        reader.columns(path, ("x",))
    assert reader._kept._nbytes <= 20_000
    assert reader.columns(paths[0], ("x",)) is not kept


def test_a_column_that_occurs_twice_is_named(tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table([[1], [2], [3]], names=["x", "x", "y"]), path)
    assert ParquetReader().columns(path, ("y",))["y"].tolist() == [3]
    for read in (ParquetReader().columns, lambda path, names: ParquetReader().cells(path, names[0], 0, 1)):
        with pytest.raises(DataError, match="column 'x' occurs more than once"):
            read(path, ("x",))


def test_damaged_files(path, tmp_path):
    with pytest.raises(DataError, match="no such parquet file"):
        ParquetReader().columns(tmp_path / "none.parquet", ("x",))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="without a footer"):
        ParquetReader().columns(path, ("plain",))


@pytest.mark.timeout(60)
def test_more_rows_than_a_file_can_hold_are_refused(tmp_path):
    """A column of one value takes next to nothing, whatever its length."""
    path = tmp_path / "bomb.parquet"
    rows = 30_000_000
    pq.write_table(pa.table({"index": np.zeros(rows, np.int8)}), path, compression="zstd", row_group_size=rows)
    with pytest.raises(DataError, match="expected fewer rows in a file of this size, found 30000000"):
        ParquetReader().columns(path, ["index"])
