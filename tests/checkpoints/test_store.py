import json

import jax
import jax.numpy as jnp
import pytest

import shiftaddvit_jax as sav


@pytest.fixture(scope="module")
def model_and_variables():
    model = sav.create_model("pvt_v2_nano", num_classes=4, attention="ecoformer", mlp="moe")
    return model, sav.init_variables(model, jax.random.key(0))


def test_a_saved_model_comes_back_whole(model_and_variables, tmp_path):
    model, variables = model_and_variables
    sav.save_model(tmp_path / "model", model, variables, {"class_names": ["a", "b", "c", "d"]})
    loaded, restored, description = sav.load_model(tmp_path / "model")
    assert loaded == model
    assert description["class_names"] == ["a", "b", "c", "d"]
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    assert all(map(jnp.array_equal, jax.tree.leaves(restored), jax.tree.leaves(variables)))


def test_saving_again_replaces_and_leaves_nothing_else(model_and_variables, tmp_path):
    model, variables = model_and_variables
    sav.save_model(tmp_path / "model", model, variables)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    sav.save_model(tmp_path / "model", model, doubled)
    _, restored, _ = sav.load_model(tmp_path / "model")
    assert all(map(jnp.array_equal, jax.tree.leaves(restored), jax.tree.leaves(doubled)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_half_written(model_and_variables, tmp_path):
    model, variables = model_and_variables
    sav.save_model(tmp_path / "model", model, variables)
    with pytest.raises(TypeError):
        sav.save_model(tmp_path / "model", model, variables, {"about": object()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    sav.load_model(tmp_path / "model")


def test_a_folder_that_is_no_checkpoint_is_never_replaced(model_and_variables, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not a checkpoint"):
        sav.save_model(tmp_path, *model_and_variables)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_missing_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nothing"):
        sav.load_model(tmp_path / "nothing")


def test_a_broken_description_is_a_clear_error(tmp_path):
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json does not describe a model"):
        sav.load_model(tmp_path)


def test_variables_that_are_missing_are_a_clear_error(model_and_variables, tmp_path):
    model, variables = model_and_variables
    sav.save_model(tmp_path / "model", model, variables)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    description["model"]["mlp"] = ["dense"] * 4
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"does not hold what model\.json describes"):
        sav.load_model(tmp_path / "model")


def test_a_checkpoint_of_another_architecture_says_which_parameters_differ(model_and_variables, tmp_path):
    sav.save_model(tmp_path / "model", *model_and_variables)
    other = sav.create_model("pvt_v2_nano", num_classes=5, attention="ecoformer", mlp="moe")
    with pytest.raises(ValueError, match=r"params/head/bias has shape \(4,\) instead of \(5,\)"):
        sav.load_model(tmp_path / "model", other)
