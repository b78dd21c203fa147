"""Values of any type come back from JSON as they were, or as their text."""

import datetime
import decimal
import json
import uuid

import numpy as np
import pandas as pd
import pytest
import torch

from memcircuits.base.json_values import json_value, python_value, readable_value

BERLIN = datetime.timezone(datetime.timedelta(hours=1))
EQUAL_AFTERWARDS = [
    None, True, 7, -2**70, 0.1, float("inf"), "text", "\ud800", [1, [2]], {"a": {"b": None}},
    {1: "int key"}, {(1, 2): "tuple key"}, {"__type__": "mine", "value": 3}, {None: 1, "a": 2},
    datetime.datetime(2019, 4, 25, 12, 57, 54, 123456), datetime.datetime(1, 1, 1, tzinfo=BERLIN),
    datetime.date(2020, 2, 29), datetime.time(23, 59), datetime.timedelta(-1, 3, 5),
    decimal.Decimal("1.10"), b"\xff\x00", uuid.UUID(int=5), 1 + 2j, {1, 2}, {(1, 2)},
    pd.Timestamp("2020-01-01 00:00:00.123456789"), pd.Timedelta(1, "ns"),
    pd.Timestamp("2020-01-01", tz="UTC"),
]  # fmt: skip


def round_trip(value):
    return json.loads(json.dumps(json_value(value), sort_keys=True), object_hook=python_value)


@pytest.mark.parametrize("value", EQUAL_AFTERWARDS, ids=repr)
def test_values_come_back(value):
    restored = round_trip({"column": [value]})["column"][0]
    assert restored == value
    assert type(restored) is type(value)


def test_scalars_and_missing_values_become_those_of_python():
    assert round_trip([np.int64(3), np.float32(0.5), np.bool_(True), np.str_("x")]) == [
        3, 0.5, True, "x",
    ]  # fmt: skip
    assert round_trip([pd.NA, (1, 2), frozenset([1])]) == [None, [1, 2], {1}]
    assert round_trip(np.datetime64("2020-01-01T00:00:00.5")) == pd.Timestamp(
        "2020-01-01 00:00:00.5"
    )
    assert round_trip(pd.NaT) is pd.NaT
    assert np.isnan(round_trip(float("nan")))
    assert round_trip(range(3)) == "range(0, 3)"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool, torch.float64])
def test_tensors_and_arrays_come_back(dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    restored = round_trip(tensor)
    assert restored.dtype is dtype
    assert torch.equal(restored, tensor)
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert round_trip(array).dtype == np.uint16
    np.testing.assert_array_equal(round_trip(array), array)


@pytest.mark.parametrize(
    "entry",
    [
        {"__type__": "no such type", "value": 1}, {"__type__": "decimal", "value": "x"},
        {"__type__": "date"}, {"__type__": "tensor", "value": ["device", [1]]},
        {"__type__": [], "value": 1}, {"__type__": "object", "value": [[{}, 1]]},
        {"__type__": "timestamp", "value": "x"}, {"__type__": "bytes", "value": "a"},
    ],
)  # fmt: skip
def test_damaged_values_are_a_value_error(entry):
    with pytest.raises(ValueError, match="a damaged value"):
        python_value(entry)


def test_readable_values_are_plain_json():
    values = [*EQUAL_AFTERWARDS[:5], *EQUAL_AFTERWARDS[6:], np.arange(2), torch.ones(1), pd.NaT]
    json.dumps([readable_value(value) for value in values])
    assert readable_value(datetime.date(2020, 2, 29)) == "2020-02-29"
    assert readable_value({1: torch.tensor([2])}) == {"1": [2]}
