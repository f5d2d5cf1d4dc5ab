"""Begins a workdir with what is there already: the records in docs/, and seed 0's models of the package."""

from pathlib import Path

from shiftaddvit_jax.checkpoints import describe_source, open_source, save_model
from shiftaddvit_jax.files import read_object, write_json
from shiftaddvit_jax.pack import unpack
from studies.fashion_mnist.report import RESULTS
from studies.fashion_mnist.rows import BY_NAME, HELD_OUT
from studies.fashion_mnist.run import record_file
from studies.fashion_mnist.ship import MODELS


def begin(workdir: Path, docs: Path) -> None:
    """Write records and models where none are, so that `run_rows` goes on with what begins with them.

    The dense and the additive model are what their training left, bit for bit; of the mixture's shifts, the
    package has the powers of two, not the numbers that were rounded to them.
    """
    for name, (row, _) in MODELS.items():
        folder = BY_NAME[row].folder(workdir, 0) / "model"
        if not folder.exists():
            source = open_source(name)
            variables = unpack(source.model, source.variables)
            folder.parent.mkdir(parents=True, exist_ok=True)
            save_model(folder, source.model, variables, describe_source(source))
    results = read_object(docs / RESULTS)
    for folder, records in ((workdir, results["records"]), (workdir / HELD_OUT, results["held_out"])):
        for record in records:
            file = record_file(folder, BY_NAME[record["row"]], record["seed"])
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, record)
