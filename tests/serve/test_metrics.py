"""Prometheus's text format, against its own reader where that is installed."""

import pytest

from shiftaddvit_jax.serve.metrics import Metrics

METRICS = {"seen_total": "Things seen."}, {"seconds": ("How long.", (0.1, 1))}


@pytest.fixture
def text():
    metrics = Metrics(*METRICS)
    metrics.count("seen_total", path='a"b\\c\nd')
    metrics.count("seen_total", 2, path='a"b\\c\nd')
    for value in (0.05, 0.1, 0.5, 7):
        metrics.observe("seconds", value)
    return metrics.render({"waiting": ("Things that wait.", 3)})


def test_counters_escape_their_labels(text):
    assert r'shiftaddvit_seen_total{path="a\"b\\c\nd"} 3' in text.splitlines()


def test_buckets_count_all_values_up_to_their_bounds(text):
    lines = [line for line in text.splitlines() if line.startswith("shiftaddvit_seconds")]
    assert lines == [
        'shiftaddvit_seconds_bucket{le="0.1"} 2',
        'shiftaddvit_seconds_bucket{le="1"} 3',
        'shiftaddvit_seconds_bucket{le="+Inf"} 4',
        "shiftaddvit_seconds_sum 7.6500000000000004",
        "shiftaddvit_seconds_count 4",
    ]


def test_prometheus_reads_it(text):
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "shiftaddvit_seen": "counter",
        "shiftaddvit_seconds": "histogram",
        "shiftaddvit_waiting": "gauge",
    }
