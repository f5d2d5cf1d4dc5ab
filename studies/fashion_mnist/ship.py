"""Writes the study's models that come with the package: bundles of seed 0, each with a model card."""

import json
from pathlib import Path

from shiftaddvit_jax.checkpoints import export_bundle, load_model
from shiftaddvit_jax.checkpoints.published import SHIPPED
from shiftaddvit_jax.data import load_dataset
from studies.fashion_mnist.report import RESULTS, summarize
from studies.fashion_mnist.rows import BY_NAME

# By the name of the model, the row that it is of, and what the card says it is.
MODELS = {
    "fashion_mnist_nano_dense": ("dense", "the dense model, with softmax attention"),
    "fashion_mnist_nano_additive": ("hamming_linear", "its attention is additive (`hamming_linear`)"),
    "fashion_mnist_nano_moe": ("moe", "its attention is additive (`hamming_linear`), its MLPs are mixtures"),
}
CARD = """# {name}

PVTv2-nano for photographs of clothes, 28 x 28 pixels in grey:
{what}.

- **Data**: Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017; MIT licence): 60,000 training images; 10,000 test
  images, seen once, at the end.
- **Recipe**: `{command}`; the whole way is in `docs/results.md`.
- **Accuracy**: {top1:.2f} % top-1 of these weights (seed 0) on the test images{others}.
- **Size**: {kilobytes:.0f} kB of weights, packed.
- **Use**: `shiftaddvit predict {name} PICTURE`, or
  `shiftaddvit_jax.from_pretrained("{name}")`. A picture should show one piece of clothing, light on a dark
  ground, as in the data; of anything else the answer means nothing.
- **Licence**: Apache-2.0, as the package.
"""
OTHERS = "; {mean:.2f} ± {deviation:.2f} % over {seeds} seeds (mean and standard deviation)"


def ship(workdir: Path, data: Path, docs: Path) -> None:
    """Write the bundles into the package, and what is known of each beside its weights."""
    names = load_dataset("idx", str(data)).class_names
    found = json.loads((docs / RESULTS).read_text())
    rows = summarize(found)
    first = {record["row"]: record for record in found["records"] if record["seed"] == 0}
    for name, (row, what) in MODELS.items():
        model, variables, about = load_model(BY_NAME[row].folder(workdir, 0) / "model")
        described = {
            "class_names": names,
            "preprocessing": about["preprocessing"],
            "top1": first[row]["top1"],
        }
        export_bundle(SHIPPED / name, model, variables, described)
        mean, deviation = rows[row]["top1"]
        card = CARD.format(
            name=name,
            what=what,
            command=first[row]["command"],
            top1=100 * first[row]["top1"],
            others="" if deviation is None else OTHERS.format(mean=mean, deviation=deviation, **rows[row]),
            kilobytes=first[row]["packed_bytes"] / 1e3,
        )
        (SHIPPED / name / "README.md").write_text(card)
