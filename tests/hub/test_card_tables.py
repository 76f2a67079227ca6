from hf_mmclf.hub.card_tables import average_rows, escape


def test_escape():
    assert escape(" b|c\n*d* ") == r"b\|c \*d\*"


def test_averages_have_intervals_where_they_were_recorded():
    figures = {"at_0.5": {"f1": 0.5, "map": 0.6}, "fitted": {"f1": 0.75, "map": 0.6}}
    reports = {"validation": figures, "test": {**figures, "intervals": {"f1": [0.7, 0.8125]}}}
    micro, mean_precision = average_rows(reports)
    assert list(micro.values()) == ["F1, micro", 0.5, 0.75, 0.5, "0.750 (0.700–0.812)"]
    assert list(mean_precision.values()) == ["mean average precision", 0.6, 0.6, 0.6, 0.6]
