import grimp


def test_no_module_imports_a_package_that_it_is_in():
    """pyproject.toml's contract of acyclic siblings looks past this; both together leave no circles."""
    graph = grimp.build_graph("shiftaddvit_jax", "kernels_tvm", cache_dir=None)
    upwards = {
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if module.startswith(f"{imported}.") and not module.endswith(".__main__")
    }
    # The command line prints the version, and nothing that the package imports imports the command line.
    assert upwards <= {("shiftaddvit_jax.cli", "shiftaddvit_jax")}
