"""Counters and histograms, and the text in which Prometheus reads them."""

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "shiftaddvit_"
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What a server counts; threads may share it.

    Attributes:
      counters: what each counter counts, by its name.
      histograms: what each histogram measures, and its buckets' upper bounds, by its name.
    """

    def __init__(
        self, counters: Mapping[str, str], histograms: Mapping[str, tuple[str, Sequence[float]]]
    ) -> None:
        self.counters, self.histograms = counters, histograms
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = {name: {} for name in counters}
        self._observed: dict[str, dict[Labels, list[float]]] = {name: {} for name in histograms}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = tuple(labels.items())
        with self._lock:
            self._counts[name][key] = self._counts[name].get(key, 0) + amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        key, bounds = tuple(labels.items()), self.histograms[name][1]
        with self._lock:
            # How many values fell into each bucket, the one above all bounds too; then the values' sum.
            cells = self._observed[name].setdefault(key, [0.0] * (len(bounds) + 2))
            cells[bisect_left(bounds, value)] += 1
            cells[-1] += value

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Prometheus's text format: counters, histograms, and ``gauges``, each with what it measures."""
        lines = []
        with self._lock:
            for name, about in self.counters.items():
                lines += _head(name, about, "counter")
                lines += [_line(name, labels, value) for labels, value in self._counts[name].items()]
            for name, (about, bounds) in self.histograms.items():
                lines += _head(name, about, "histogram")
                for labels, (*cells, total) in self._observed[name].items():
                    rows = 0.0
                    for bound, cell in zip([*(f"{bound:g}" for bound in bounds), "+Inf"], cells, strict=True):
                        rows += cell
                        lines.append(_line(f"{name}_bucket", (*labels, ("le", bound)), rows))
                    lines += [_line(f"{name}_sum", labels, total), _line(f"{name}_count", labels, rows)]
        for name, (about, value) in gauges.items():
            lines += [*_head(name, about, "gauge"), _line(name, (), value)]
        return "\n".join(lines) + "\n"


def _head(name, about, kind):
    return [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]


def _line(name, labels, value):
    inside = ",".join(f'{label}="{_escape(text)}"' for label, text in labels)
    return f"{PREFIX}{name}{{{inside}}} {value:.17g}" if inside else f"{PREFIX}{name} {value:.17g}"


def _escape(text):
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
