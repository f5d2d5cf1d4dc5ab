import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax.ops import power_of_two, two_powers_of_two


def create(**kinds):
    return sav.create_model("pvt_v2_nano", num_classes=10, **kinds)


def flat(variables):
    return flatten_dict(variables["params"], sep="/")


@pytest.fixture(scope="module")
def dense():
    model = create(attention="msa")
    variables = sav.init_variables(model, jax.random.key(0))
    # Biases start at zero; tensors that differ everywhere show what is inherited.
    keys = iter(jax.random.split(jax.random.key(1), 200))
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), variables)
    return model, variables


@pytest.fixture(scope="module")
def hamming(dense):
    return sav.reparameterize(*dense, attention="hamming_linear")


def test_stage_1_inherits_every_tensor_bit_for_bit(dense, hamming):
    old, new = flat(dense[1]), flat(hamming[1])
    made = {name for name in new if name.endswith("/dconv")}
    assert new.keys() - old.keys() == made
    assert len(made) == 3
    for name, leaf in old.items():
        assert jnp.array_equal(new[name], leaf), name


def test_binary_softmax_inherits_every_tensor_and_its_biases_are_zeros(dense):
    _, variables = sav.reparameterize(*dense, attention="binary_softmax")
    old, new = flat(dense[1]), flat(variables)
    made = [f"stage{stage}/block1/attn/position_bias" for stage in (1, 2, 3)]
    assert sorted(new.keys() - old.keys()) == made
    # Grids of 8, 4 and 2 tokens a side.
    assert [new[name].shape for name in made] == [(15**2 + 3, 1), (7**2 + 3, 2), (3**2 + 3, 4)]
    assert not any(new[name].any() for name in made)
    assert all(jnp.array_equal(new[name], leaf) for name, leaf in old.items())


def test_the_input_is_not_touched(dense):
    before = jax.tree.map(np.array, dense[1])
    sav.reparameterize(*dense, attention="ecoformer", mlp="moe")
    assert dense[0].attention == ("msa",) * 4
    jax.tree.map(np.testing.assert_array_equal, before, dense[1])


def test_shift_kernels_are_the_old_kernels_rounded_and_biases_the_old_ones(hamming):
    student, variables = sav.reparameterize(*hamming, mlp="shift", projections="shift")
    old, new = flat(hamming[1]), flat(variables)
    assert student.mlp == ("shift",) * 4
    layers = [name.rpartition("/")[0] for name in new if "/mlp/fc" in name or "/attn/proj" in name]
    assert len(layers) == 2 * 3 * 4
    for layer in layers:
        assert jnp.array_equal(new[f"{layer}/kernel"], power_of_two(old[f"{layer}/kernel"]))
        assert jnp.array_equal(new[f"{layer}/bias"], old[f"{layer}/bias"])


def test_a_mixture_has_the_old_layer_as_its_dense_expert_and_the_rounded_one_as_its_shift_expert(hamming):
    _, variables = sav.reparameterize(*hamming, mlp="moe")
    old, new = flat(hamming[1]), flat(variables)
    layer = "stage2/block1/mlp/fc1"
    assert jnp.array_equal(new[f"{layer}/dense/kernel"], old[f"{layer}/kernel"])
    assert jnp.array_equal(new[f"{layer}/shift/kernel"], power_of_two(old[f"{layer}/kernel"]))
    assert jnp.array_equal(new[f"{layer}/dense/bias"], old[f"{layer}/bias"])
    assert jnp.array_equal(new[f"{layer}/shift/bias"], old[f"{layer}/bias"])


def test_a_shift_model_computes_what_its_rounded_dense_model_computes(hamming):
    student, variables = sav.reparameterize(*hamming, mlp="shift")
    images = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    shifted = jax.jit(student.apply)(variables, images)
    rounded = jax.jit(hamming[0].apply)(variables, images)
    np.testing.assert_allclose(shifted, rounded, atol=1e-5)


def test_msa_becomes_sra_by_splitting_its_linear_layer(dense):
    _, variables = sav.reparameterize(*dense, attention="sra")
    old, new = flat(dense[1]), flat(variables)
    layer = "stage3/block1/attn"
    joined = jnp.concatenate([new[f"{layer}/q/kernel"], new[f"{layer}/kv/kernel"]], axis=1)
    assert jnp.array_equal(joined, old[f"{layer}/qkv/kernel"])


def test_sra_becomes_msa_by_joining_its_linear_layers_and_drops_the_reduction(dense):
    sra = create(attention="sra")
    variables = sav.init_variables(sra, jax.random.key(3))
    _, joined = sav.reparameterize(sra, variables, attention="msa")
    report = sav.reparameterization_report(sra, variables, attention="msa")
    old, new = flat(variables), flat(joined)
    layer = "stage1/block1/attn"
    parts = [old[f"{layer}/{name}/kernel"] for name in ("q", "kv")]
    assert jnp.array_equal(new[f"{layer}/qkv/kernel"], jnp.concatenate(parts, axis=1))
    assert report.made == ()
    assert f"params/{layer}/sr/kernel" in report.dropped
    assert all("/attn/sr/" in name or "/attn/norm/" in name for name in report.dropped)


def test_shared_queries_and_keys_come_from_the_queries(dense):
    _, variables = sav.reparameterize(*dense, attention="hamming_ksh")
    old, new = flat(dense[1]), flat(variables)
    layer = "stage1/block1/attn"
    q, _, v = jnp.split(old[f"{layer}/qkv/kernel"], 3, axis=1)
    assert jnp.array_equal(new[f"{layer}/qk/kernel"], q)
    assert jnp.array_equal(new[f"{layer}/v/kernel"], v)
    assert set(variables["hash"]) == {"stage1", "stage2", "stage3"}


def test_the_report_names_what_is_made_and_dropped(hamming):
    report = sav.reparameterization_report(*hamming, mlp="moe")
    layers = [f"stage{stage}/block1/mlp/fc{number}" for stage in range(1, 5) for number in (1, 2)]
    assert sorted(report.made) == [
        f"params/{layer}/router/{leaf}" for layer in layers for leaf in ("bias", "kernel")
    ]
    assert report.dropped == ()
    name = "params/stage1/block1/mlp/fc1"
    assert report.inherited[f"{name}/shift/kernel"] == f"power_of_two({name}/kernel)"
    assert report.inherited["params/head/bias"] == "params/head/bias"


def test_what_is_made_depends_on_the_key_alone(dense):
    def made(seed):
        return sav.reparameterize(*dense, mlp="moe", key=jax.random.key(seed))[1]

    router = "stage1/block1/mlp/fc1/router/kernel"
    assert jnp.array_equal(flat(made(0))[router], flat(made(0))[router])
    assert not jnp.array_equal(flat(made(0))[router], flat(made(1))[router])


def test_mixtures_keep_their_routers_when_attention_changes_later(dense):
    model, variables = sav.reparameterize(*dense, mlp="moe", projections="moe")
    _, changed = sav.reparameterize(model, variables, attention="hamming_linear")
    old, new = flat(variables), flat(changed)
    assert all(jnp.array_equal(new[name], leaf) for name, leaf in old.items())


def test_variables_of_another_model_are_refused_by_name(dense):
    variables = {"params": {**dense[1]["params"]}}
    del variables["params"]["head"]
    with pytest.raises(ValueError, match=r"2 parameters differ.*params/head/bias is missing"):
        sav.reparameterize(dense[0], variables, attention="linear")


def test_packed_variables_are_refused(dense):
    with pytest.raises(ValueError, match="the variables are packed; expected a model's as they were trained"):
        sav.reparameterize(dense[0], sav.pack(*dense), mlp="shift")


def test_an_unknown_kind_is_refused(dense):
    with pytest.raises(ValueError, match="did you mean 'hamming_linear'"):
        sav.reparameterize(*dense, attention="haming_linear")


def test_learned_hashes_depend_on_the_images_and_leave_the_rest_alone(dense):
    model, variables = sav.reparameterize(*dense, attention="ecoformer")
    images = jax.random.normal(jax.random.key(4), (4, 32, 32, 3))
    learned = sav.learn_hashes(model, variables, images, jax.random.key(5))
    assert all(
        jnp.array_equal(new, old)
        for new, old in zip(*map(jax.tree.leaves, (learned["params"], variables["params"])), strict=True)
    )
    changed = [
        not jnp.array_equal(new, old)
        for new, old in zip(jax.tree.leaves(learned["hash"]), jax.tree.leaves(variables["hash"]), strict=True)
    ]
    assert all(changed)
    assert np.isfinite(jax.jit(model.apply)(learned, images)).all()


def test_models_without_hashes_have_none_to_learn(dense):
    assert sav.learn_hashes(*dense, jnp.zeros((1, 32, 32, 3)), jax.random.key(0)) is dense[1]


def test_two_terms_round_the_old_kernels_to_two_powers(dense):
    _, variables = sav.reparameterize(*dense, mlp="shift", weight_terms=2)
    name = "stage1/block1/mlp/fc1/kernel"
    np.testing.assert_array_equal(flat(variables)[name], two_powers_of_two(flat(dense[1])[name]))
    report = sav.reparameterization_report(*dense, mlp="shift", weight_terms=2)
    assert report.inherited[f"params/{name}"] == f"two_powers_of_two(params/{name})"


def test_single_layers_change_alone(dense):
    layers = {"stage1/block1/mlp/fc1": "shift", "stage2/block1/mlp/fc2": "moe"}
    model, variables = sav.reparameterize(*dense, layers=layers)
    old, new = flat(dense[1]), flat(variables)
    assert model.primitives.layers == tuple(layers.items())
    rounded = "stage1/block1/mlp/fc1/kernel"
    np.testing.assert_array_equal(new[rounded], power_of_two(old[rounded]))
    moe = "stage2/block1/mlp/fc2"
    np.testing.assert_array_equal(new[f"{moe}/dense/kernel"], old[f"{moe}/kernel"])
    others = {name for name in old if not name.startswith((rounded, moe))}
    assert all(jnp.array_equal(new[name], old[name]) for name in others)


@pytest.fixture(scope="module")
def rotated(dense):
    return sav.reparameterize(*dense, attention="hamming_quadratic", rotation="hadamard")


def signs(variables):
    return flatten_dict(variables["rotation"], sep="/")


def test_a_rotation_leaves_parameters_alone_and_draws_its_signs_from_the_key(dense, rotated):
    old, (_, variables) = flat(dense[1]), rotated
    jax.tree.map(np.testing.assert_array_equal, flat(variables), old)
    assert set(signs(variables)) == {f"stage{stage}/block1/attn/signs" for stage in (1, 2, 3)}
    kinds = {"attention": "hamming_quadratic", "rotation": "hadamard"}
    again, other = (sav.reparameterize(*dense, **kinds, key=jax.random.key(seed))[1] for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, signs(again), signs(variables))
    assert all(np.any(signs(other)[name] != leaf) for name, leaf in signs(variables).items())


def test_a_rotation_is_kept_until_another_is_asked_for(rotated):
    _, shifted = sav.reparameterize(*rotated, projections="shift")
    jax.tree.map(np.testing.assert_array_equal, signs(shifted), signs(rotated[1]))
    _, stacked = sav.reparameterize(*rotated, rotation="hadamard_4x")
    assert {leaf.shape[0] for leaf in signs(stacked).values()} == {4}
    assert "rotation" not in sav.reparameterize(*rotated, rotation="none")[1]


def test_an_unknown_rotation_names_the_nearest(dense):
    with pytest.raises(ValueError, match="unknown rotation 'hadamard_3x'; did you mean 'hadamard_4x'"):
        sav.reparameterize(*dense, rotation="hadamard_3x")


def test_features_of_another_kind_are_drawn_anew(dense):
    gaussian = sav.reparameterize(*dense, attention="performer")
    same = sav.reparameterization_report(*gaussian, performer_features="gaussian")
    other = sav.reparameterization_report(*gaussian, performer_features="hadamard")
    assert same.made == ()
    assert set(other.made) == {f"features/stage{stage}/block1/attn/projection" for stage in (1, 2, 3)}


def test_a_rotated_model_comes_back_from_disk_and_packs_without_loss(rotated, tmp_path):
    student, variables = sav.reparameterize(*rotated, mlp="shift", projections="shift")
    sav.save_model(tmp_path / "packed", student, sav.pack(student, variables))
    model, packed, _ = sav.load_model(tmp_path / "packed")
    assert model.primitives.rotation == "hadamard"
    jax.tree.map(np.testing.assert_array_equal, signs(packed), signs(variables))
    images = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    expected, found = (jax.jit(student.apply)(each, images) for each in (variables, packed))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
