"""Whole views, chunk of rays by chunk."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shiftaddvit_jax.data.scenes import Scene
from shiftaddvit_jax.models.gnt import Samples
from shiftaddvit_jax.nn.moe import EXPERTS, routing_layers
from shiftaddvit_jax.ops.cameras import Views, rays_through
from shiftaddvit_jax.progress import progress_bar

CHUNK = 1024  # rays at a time
SAMPLED_VIEWS = 16  # whose rays a model is fitted to


class Rendered(NamedTuple):
    """A view.

    Attributes:
      colours: from 0 to 1.
      depth: the mean of a ray's depths, weighed as its first point attends to all in the last transformer.
      tokens: by MoE layer, how many tokens each expert computed; empty unless asked for.
      shift_share: the share of a ray's tokens on shift experts, its mean over MoE layers; None of a model
        without any, or unless asked for.
    """

    colours: Float[np.ndarray, "height width 3"]
    depth: Float[np.ndarray, "height width"]
    tokens: dict[str, np.ndarray]
    shift_share: Float[np.ndarray, "height width"] | None


def render_view(
    model: nn.Module,
    variables: PyTree,
    scene: Scene,
    pose: Float[np.ndarray, "4 4"],
    *,
    intrinsics: Float[np.ndarray, "3 3"] | None = None,
    size: tuple[int, int] | None = None,
    views: int | None = None,
    points: int | None = None,
    without: int | None = None,
    chunk: int = CHUNK,
    count_tokens: bool = False,
) -> Rendered:
    """What a camera at ``pose`` sees of ``scene``, from its nearest training views.

    Args:
      model: such as ``create_model("gnt")``.
      variables: its variables, packed or not.
      scene: the photographs.
      pose: from the camera's coordinates to the scene's.
      intrinsics: by default those of the scene's first view.
      size: height and width in pixels; by default the photographs'.
      views: photographs to render from; by default the model's own number, or all that there are.
      points: depths of a ray; by default the model's own number.
      without: a view that must not be used.
      chunk: rays at a time: memory and time depend on it, the view does not.
      count_tokens: whether to count each expert's tokens; then kernels of whole mixtures don't run.

    Raises:
      ValueError: fewer than one of anything.
    """
    for name, value in (("views", views), ("points", points), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    height, width = size or scene.images.shape[1:3]
    intrinsics = scene.intrinsics[0] if intrinsics is None else intrinsics
    sources = choose_sources(scene, pose, views or model.views, without)
    chosen = source_views(scene, sources)
    encoded = _encode(model, variables, chosen.images)
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    count = len(pixels)
    # The last chunk is filled up, so that one program serves all.
    chunk = min(chunk, count)
    padded = np.resize(pixels, (-(-count // chunk) * chunk, 2)).astype(np.float32)
    camera = (jnp.asarray(intrinsics, jnp.float32), jnp.asarray(pose, jnp.float32))
    bounds = (jnp.float32(scene.near), jnp.float32(scene.far))
    look = partial(
        _render_rays, model, points or model.points, count_tokens, variables, chosen, encoded, camera, bounds
    )
    parts = []
    with progress_bar() as bar:
        task = bar.add_task("rendering", total=count, note="")
        for start in range(0, len(padded), chunk):
            parts.append(jax.device_get(look(padded[start : start + chunk])))
            bar.advance(task, chunk)
    colours = np.concatenate([part[0] for part in parts])[:count]
    depth = np.concatenate([part[1] for part in parts])[:count]
    tokens: dict[str, np.ndarray] = {}
    for part in parts:
        for name, value in part[2].items():
            tokens[name] = tokens.get(name, 0) + np.asarray(value, np.float64)
    share = None
    if tokens:
        share = np.concatenate([part[3] for part in parts])[:count].reshape(height, width)
    colours = np.clip(colours, 0, 1).reshape(height, width, 3)
    return Rendered(colours, depth.reshape(height, width), tokens, share)


def render_held_out(
    model: nn.Module, variables: PyTree, scene: Scene, **settings: Any
) -> Iterator[tuple[int, Rendered]]:
    """Each held-out view of ``scene``: its index, and how the model renders it, see `render_view`."""
    for index in scene.held_out:
        camera, pose = scene.intrinsics[index], scene.poses[index]
        yield index, render_view(model, variables, scene, pose, intrinsics=camera, **settings)


def sample_rays(model: nn.Module, variables: PyTree, scene: Scene, count: int, seed: int = 0) -> Samples:
    """What ``count`` random rays of training views look like in the views nearest to them, for `calibrate`.

    Each view of up to `SAMPLED_VIEWS`, drawn at random, has as many rays as the others, one at least.

    Args:
      model: such as ``create_model("gnt")``.
      variables: its variables, which make the photographs' features.
      scene: the photographs.
      count: rays in all.
      seed: of what is drawn.

    Raises:
      ValueError: fewer than one ray, or a scene with fewer than two training views.
    """
    if count < 1:
        raise ValueError(f"the number of rays must be at least 1, got {count}")
    draw = np.random.default_rng(seed)
    targets = draw.permutation(scene.training)[: min(count, SAMPLED_VIEWS)]
    height, width = scene.images.shape[1:3]
    parts = []
    for index, target in enumerate(targets):
        own = (count + len(targets) - 1 - index) // len(targets)
        at = draw.integers(height * width, size=own)
        pixels = jnp.asarray(np.stack([at % width, at // width], axis=-1), jnp.float32)
        pose = jnp.asarray(scene.poses[target], jnp.float32)
        intrinsics = jnp.asarray(scene.intrinsics[target], jnp.float32)
        bounds = jnp.float32(scene.near), jnp.float32(scene.far)
        rays = rays_through(pixels, intrinsics, pose, bounds, model.points)
        chosen = source_views(scene, choose_sources(scene, scene.poses[target], model.views, int(target)))
        parts.append(jax.device_get(_look_up(model, variables, rays, chosen)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@partial(jax.jit, static_argnums=0)
def _look_up(model, variables, rays, views):
    return model.apply(variables, rays, views, method="look_up")


def choose_sources(
    scene: Scene, pose: Float[np.ndarray, "4 4"], count: int, without: int | None = None
) -> list[int]:
    """The nearest training views, ``count`` or as many as there are.

    Raises:
      ValueError: there is none.
    """
    found = scene.nearest(pose, count, without)
    if not found:
        raise ValueError("the scene has no training view left to render from")
    return found


def source_views(scene: Scene, sources: Sequence[int]) -> Views:
    """Views of a scene, as a model takes them."""
    chosen = list(sources)
    return Views(
        jnp.asarray(scene.images[chosen], jnp.float32) / 255,
        jnp.asarray(scene.intrinsics[chosen], jnp.float32),
        jnp.asarray(scene.poses[chosen], jnp.float32),
    )


@partial(jax.jit, static_argnums=0)
def _encode(model, variables, images):
    return model.apply(variables, images, method="encode")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _render_rays(model, points, count_tokens, variables, views, encoded, camera, bounds, pixels):
    intrinsics, pose = camera
    rays = rays_through(pixels, intrinsics, pose, bounds, points)
    seen, shares = [], []

    def note(call, arguments, keywords, context):
        result = call(*arguments, **keywords)
        name = context.module.path[-1:]
        if context.method_name == "__call__" and name in (("qkv",), ("qk",)):
            seen.append(result)
        if context.method_name == "__call__" and name == ("router",):
            shifted = jnp.argmax(result, axis=-1) == EXPERTS.index("shift")
            shares.append(jnp.mean(shifted.reshape(len(pixels), -1), axis=1))
        return result

    with nn.intercept_methods(note):
        mutable = ["routing"] if count_tokens else []
        colours, state = model.apply(variables, rays, views, encoded, mutable=mutable)
    depth = jnp.sum(first_attention(seen[-1], model.num_heads, model.channels) * rays.depths, axis=-1)
    layers = routing_layers(state.get("routing", {}))
    tokens = {name: layer["tokens"] for name, layer in layers.items()}
    return colours, depth, tokens, jnp.mean(jnp.stack(shares), axis=0) if layers else None


def first_attention(
    projected: Float[Array, "rays points projections"], num_heads: int, channels: int
) -> Float[Array, "rays points"]:
    """How a ray's first point attends to all: softmax attention's weights, their mean over the heads.

    GNT reads depths from them. Other kinds of attention have no weights, so that these are made of their
    queries and keys before binarization.
    """
    rays, points, _ = projected.shape
    parts = projected[..., : 2 * channels].astype(jnp.float32).reshape(rays, points, 2, num_heads, -1)
    scores = jnp.einsum("rhd,rphd->rhp", parts[:, 0, 0], parts[:, :, 1]) * (channels // num_heads) ** -0.5
    return jnp.mean(jax.nn.softmax(scores), axis=1)
