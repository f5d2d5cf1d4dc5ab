"""The tables of measured figures in `docs/benchmarks.md` and the README, from the JSON in `docs/benchmarks/`.

`python docs/benchmark_tables.py` writes them anew; the pages say beside each what wrote its JSON.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import rivals

from studies.pages import fill_tables, markdown

DOCS = Path(__file__).parent
PAGES = DOCS / "benchmarks.md", DOCS.parent / "README.md"
RUNTIMES = {
    "JAX": "JAX {}",
    "ONNX Runtime": "ONNX Runtime {}",
    "OpenVINO": "OpenVINO {}, float32",
    "OpenVINO, bfloat16": "OpenVINO {}, default",
}
DENSE = {"sra": "dense, spatial reduction (`sra`)", "msa": "dense, ordinary attention (`msa`)"}
STAGES = {
    "dense": "dense (`msa`)",
    "add_attention": "+ additive attention (`hamming_linear`)",
    "shift": "+ shift layers",
    "moe": "+ mixtures of experts",
}


def measured(name: str) -> dict:
    """What a command wrote to ``docs/benchmarks/``."""
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


def percent(share: float, digits: int = 0) -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f} %"


def ratios(report: dict) -> dict[str, float]:
    """How many times as long as the first row each other one took, by name."""
    return {row["name"]: row["ratio"] for row in report["rows"] if "ratio" in row}


def milliseconds(name: str) -> str:
    """The median of the first row, which is ours."""
    return f"{measured(name)['rows'][0]['median_ms']:.1f} ms"


def runtimes(name: str) -> list[list[str]]:
    """By kind of attention, how many times as long other runtimes took with PVTv2-B0; and XLA with ours."""
    found = ratios(measured(name))
    rows = [
        [label, *(f"{found[runtime.format(kind)]:.1f}" for runtime in RUNTIMES.values())]
        for kind, label in DENSE.items()
    ]
    return [*rows, ["the same ShiftAddViT, XLA", f"{found['ShiftAddViT xla']:.1f}", "-", "-", "-"]]


def beside_runtimes() -> str:
    """PVTv2-B0 with mixtures, beside other runtimes."""
    name = "pvt_v2_b0_moe_amx"
    return markdown([f"times {milliseconds(name)}", *RUNTIMES], runtimes(name))


def beside_runtimes_twice() -> str:
    """The same, with shifts alone, too."""
    rows = []
    for label, name in (("mixtures", "pvt_v2_b0_moe_amx"), ("shifts", "pvt_v2_b0_shift_amx")):
        rows += [[f"{label}, {milliseconds(name)}", *row] for row in runtimes(name)]
    return markdown(["ShiftAddViT", "beside it", *RUNTIMES], rows)


def demo() -> str:
    """What the demo's stages came to."""
    head = ["model", "top-1", "parameters", "packed", "tokens on shift", "multiplications an image"]
    rows = [
        [
            STAGES[stage["name"]],
            percent(stage["top1"], 2),
            f"{stage['parameters']:,}",
            f"{stage['packed_bytes'] / 1e3:,.0f} kB",
            "-" if stage["shift_share"] is None else percent(stage["shift_share"], 1),
            f"{stage['macs'] / 1e6:.2f} M",
        ]
        for stage in measured("demo_seed0")["stages"]
    ]
    return markdown(head, rows)


def int8_avx2() -> str:
    """Two models beside runtimes in float32 and int8, on a CPU with AVX2."""
    columns = {
        "pvt_v2_b0, `msa`": ("pvt_v2_b0_avx2", "msa"),
        "pvt_v2_b0, `sra`": ("pvt_v2_b0_avx2", "sra"),
        "deit_tiny": ("deit_tiny_avx2", "msa"),
        "deit_tiny, dense experts in int8": ("deit_tiny_int8_avx2", "msa"),
        "deit_small, the same": ("deit_small_int8_avx2", "msa"),
    }
    others = {
        "JAX": "JAX {}",
        "ONNX Runtime, float32": "ONNX Runtime {}",
        "ONNX Runtime, int8, dynamic": "ONNX Runtime {}, int8 dynamic",
        "ONNX Runtime, int8, static": "ONNX Runtime {}, int8 static",
        "OpenVINO, float32": "OpenVINO {}, float32",
        "OpenVINO, int8 (NNCF)": "OpenVINO {}, int8",
    }
    rows = [["ShiftAddViT", *(milliseconds(name) for name, _ in columns.values())]]
    for label, row in others.items():
        found = [ratios(measured(name)).get(row.format(kind)) for name, kind in columns.values()]
        rows.append([label, *("-" if ratio is None else f"{ratio:.2f}" for ratio in found)])
    return markdown(["", *columns], rows)


def bounds(*models: str) -> str:
    """The kernels of models, their shares of the time, and what they reach of their bounds."""
    head = ["model", "kernel", "calls", "ms", "share of the time", "reached of its bound", "which is"]
    rows = []
    for name in models:
        report = measured(name)
        kernels = report["kernels"]
        total = sum(kernel["median_ms"] * kernel["calls"] for kernel in kernels)
        for kernel in kernels:
            _, kind, size = kernel["name"].split(" ")
            share = kernel["median_ms"] * kernel["calls"] / total
            rows.append(
                [
                    report["model"]["name"],
                    f"`{kind}` {size.replace('x', ' x ')}",
                    str(kernel["calls"]),
                    f"{kernel['median_ms']:.3f}",
                    percent(share, 1),
                    percent(kernel["of_bound"]),
                    "memory's rate" if kernel["bound_by"] == "memory" else f"{kernel['bound_by']} products",
                ]
            )
    return markdown(head, rows)


def xla_avx2() -> str:
    """Mixtures on XLA alone, and training steps, beside dense models."""
    steps = {(row["model"], row["name"]): row["ratio"] for row in measured("training_steps")["rows"]}
    rows = []
    for model in ("deit_tiny", "pvt_v2_b0", "pvt_v2_b2"):
        report = measured(f"{model}_xla_avx2")
        found = ratios(report)
        over = [f"{1 / found[name]:.2f}" if name in found else "-" for name in ("JAX msa", "JAX sra")]
        step = [
            f"{steps[model, kind]:.2f}" if (model, kind) in steps else "-" for kind in ("shift", "mixture")
        ]
        rows.append([model, f"{report['rows'][0]['median_ms']:.0f} ms", *over, *step])
    head = ["", "mixture on XLA, one image", "over dense `msa`", "over dense `sra`"]
    return markdown([*head, "training step, shifts", "training step, mixture"], rows)


def matshift() -> str:
    """How many times as fast as XLA's dense float32 product MatShift is, as on two kinds of CPU."""
    found = {cpu: ratios(measured(f"kernels_{cpu}")) for cpu in ("amx", "avx512_vnni")}
    kernels = {"int8": "tvm int8", "float32": "tvm", "int8, by shifts": "tvm_shift int8"}
    shapes = [name.removesuffix(" xla") for name in found["amx"] if re.fullmatch(r"matshift .* xla", name)]
    rows = [
        [
            shape.removeprefix("matshift "),
            *(
                f"{1 / times[f'{shape} {kernel}']:.1f}"
                for kernel in kernels.values()
                for times in found.values()
            ),
        ]
        for shape in shapes
    ]
    heads = [f"{numbers}, {cpu}" for numbers in kernels for cpu in ("AMX", "AVX-512 VNNI")]
    return markdown(["tokens x inputs x outputs", *heads], rows)


def scaling() -> str:
    """How many times as long several images, and larger ones, take as one, by model."""
    rows = [
        [*row["name"].split(", "), f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}"]
        for row in measured("scaling_amx")["rows"]
    ]
    return markdown(["model", "", "ms", "times one image's"], rows)


def starting() -> str:
    """Seconds until a model's kernels are there, for the first time and again."""
    first, again = measured("compile_pvt_v2_b0_amx"), measured("load_pvt_v2_b0_amx")
    rows = [
        [f"all {len(first['kernels'])} kernels compiled", f"{first['seconds']:.1f} s"],
        ["found in the cache", f"{again['seconds']:.1f} s"],
        ["before either, the model traced to find them", f"{again['tracing_seconds']:.1f} s"],
    ]
    return markdown(["what", "figure"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "runtimes": beside_runtimes,
    "runtimes twice": beside_runtimes_twice,
    "demo": demo,
    "rivals amx": lambda: rivals.table(measured("rivals_amx")["runs"]),
    "rivals avx512_vnni": lambda: rivals.table(measured("rivals_avx512_vnni")["runs"]),
    "rivals avx2": lambda: rivals.table(measured("rivals_avx2")["runs"]),
    "bounds amx": lambda: bounds("deit_small_kernels_amx", "pvt_tiny_kernels_amx"),
    "int8 avx2": int8_avx2,
    "bounds avx2": lambda: bounds("deit_tiny_kernels_avx2", "pvt_v2_b0_kernels_avx2"),
    "xla avx2": xla_avx2,
    "matshift": matshift,
    "scaling": scaling,
    "starting": starting,
}


def with_tables(page: str) -> str:
    """``page`` with its tables, which stand between marks, written anew."""
    return fill_tables(page, {name: table() for name, table in TABLES.items()})


def main():
    """Write the pages' tables anew."""
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
