from hf_mmclf.hub.card_tables import average_rows, escape, markdown_table


def test_markdown_table():
    rows = [{"name": "a", "n": 1234, "x": 0.12345}, {"name": escape("b|c"), "n": None, "x": 1.0}]
    assert markdown_table(rows) == (
        "| name | n | x |\n| --- | ---: | ---: |\n| a | 1,234 | 0.123 |\n| b\\|c | – | 1.000 |"
    )
    assert markdown_table([]) == ""


def test_averages_have_intervals_where_they_were_recorded():
    figures = {"at_0.5": {"f1": 0.5, "map": 0.6}, "fitted": {"f1": 0.75, "map": 0.6}}
    reports = {"validation": figures, "test": {**figures, "intervals": {"f1": [0.7, 0.8125]}}}
    micro, mean_precision = average_rows(reports)
    assert list(micro.values()) == ["F1, micro", 0.5, 0.75, 0.5, "0.750 (0.700–0.812)"]
    assert list(mean_precision.values()) == ["mean average precision", 0.6, 0.6, 0.6, 0.6]
