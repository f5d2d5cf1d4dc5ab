from shiftaddvit_jax.files import write_json
def write_summary(workdir, summary): write_json(workdir / "summary.json", summary)
