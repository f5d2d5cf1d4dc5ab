"""Scenes as other programs write them, made of a scene in closed form; and what is broken in them."""

import json
import re
import struct

import numpy as np
import pytest
from PIL import Image

from shiftaddvit_jax.data.scenes import analytic_scene, load_scene

SIDE, VIEWS = 20, 10
FLIP = np.diag([1.0, -1, -1, 1])  # from OpenCV's axes to OpenGL's, and back


@pytest.fixture(scope="module")
def scene():
    return analytic_scene(views=VIEWS, side=SIDE)


def _write_images(folder, scene, suffix=".png"):
    folder.mkdir(parents=True)
    for index, image in enumerate(scene.images):
        Image.fromarray(image).save(folder / f"view_{index:02d}{suffix}")


def _llff(folder, scene):
    _write_images(folder / "images", scene)
    rows = []
    for pose, intrinsics in zip(scene.poses, scene.intrinsics, strict=True):
        right, down, forward, place = pose[:3].T
        matrix = np.stack([down, right, -forward, place, [SIDE, SIDE, intrinsics[0, 0]]], axis=1)
        rows.append([*matrix.ravel(), scene.near, scene.far])
    np.save(folder / "poses_bounds.npy", np.array(rows))


def _transforms(folder, scene, **changes):
    _write_images(folder / "images", scene)
    focal = scene.intrinsics[0, 0, 0]
    frames = [
        {"file_path": f"images/view_{index:02d}.png", "transform_matrix": (pose @ FLIP).tolist()}
        for index, pose in enumerate(scene.poses)
    ]
    content = {"fl_x": focal, "fl_y": focal, "w": SIDE, "h": SIDE, "frames": frames, **changes}
    (folder / "transforms.json").write_text(json.dumps(content))


def _blender(folder, scene):
    _write_images(folder / "train", scene)
    angle = 2 * np.arctan(SIDE / 2 / scene.intrinsics[0, 0, 0])
    for part, chosen in (("train", range(8)), ("test", range(8, VIEWS))):
        frames = [
            {"file_path": f"./train/view_{at:02d}", "transform_matrix": (scene.poses[at] @ FLIP).tolist()}
            for at in chosen
        ]
        content = {"camera_angle_x": angle, "frames": frames}
        (folder / f"transforms_{part}.json").write_text(json.dumps(content))


def _quaternion(rotation):
    w = np.sqrt(max(0.0, 1 + np.trace(rotation))) / 2
    x, y, z = (rotation[[2, 0, 1], [1, 2, 0]] - rotation[[1, 2, 0], [2, 0, 1]]) / (4 * w)
    return w, x, y, z


def _points(scene):
    """A hundred points that view 0 sees, near to far."""
    rows = np.linspace(0, SIDE - 1, 10).astype(int)
    y, x = (it.ravel() for it in np.meshgrid(rows, rows, indexing="ij"))
    directions = np.stack([x, y, np.ones_like(x)], 1) @ np.linalg.inv(scene.intrinsics[0]).T
    directions = directions @ scene.poses[0, :3, :3].T
    return scene.poses[0, :3, 3] + scene.depths[0][y, x][:, None] * directions


def _colmap(folder, scene, binary, model=1, distortion=()):
    _write_images(folder / "images", scene)
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    focal, centre = scene.intrinsics[0, 0, 0], SIDE / 2
    parameters = (focal, focal, centre, centre, *distortion)
    points = _points(scene)
    images = []
    for index, pose in enumerate(scene.poses):
        rotation = pose[:3, :3].T
        images.append((index + 1, _quaternion(rotation), -rotation @ pose[:3, 3], f"view_{index:02d}.png"))
    if binary:
        data = struct.pack("<Q", 1) + struct.pack("<iiQQ", 7, model, SIDE, SIDE)
        (sparse / "cameras.bin").write_bytes(data + struct.pack(f"<{len(parameters)}d", *parameters))
        data = struct.pack("<Q", len(images))
        for number, quaternion, translation, name in images:
            data += struct.pack("<i7di", number, *quaternion, *translation, 7) + name.encode() + b"\0"
            data += struct.pack("<Q", len(points))
            for point in range(len(points)):
                data += struct.pack("<ddq", 1.0, 2.0, point)
        (sparse / "images.bin").write_bytes(data)
        data = struct.pack("<Q", len(points))
        for number, point in enumerate(points):
            data += struct.pack("<Q3d3BdQ2i", number, *point, 1, 2, 3, 0.5, 1, 1, 1)
        (sparse / "points3D.bin").write_bytes(data)
        return
    name = {1: "PINHOLE", 4: "OPENCV"}[model]
    shown = " ".join(map(str, parameters))
    (sparse / "cameras.txt").write_text(f"# cameras\n7 {name} {SIDE} {SIDE} {shown}\n")
    lines = ["# images"]
    for number, quaternion, translation, name in images:
        lines += [" ".join(map(str, (number, *quaternion, *translation, 7, name)))]
        lines += [" ".join(f"1 2 {point}" for point in range(len(points)))]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{number} {' '.join(map(str, point))} 1 2 3 0.5 1 1" for number, point in enumerate(points)]
    (sparse / "points3D.txt").write_text("\n".join(lines) + "\n")


WRITERS = {
    "llff": _llff,
    "nerfstudio": _transforms,
    "blender": _blender,
    "colmap_binary": lambda folder, scene: _colmap(folder, scene, binary=True),
    "colmap_text": lambda folder, scene: _colmap(folder, scene, binary=False),
}


@pytest.fixture(scope="module", params=WRITERS)
def read(request, scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder, scene)
    bounds = {"near": scene.near, "far": scene.far} if request.param == "nerfstudio" else {}
    return request.param, load_scene(folder, **bounds)


def test_photographs_come_back(read, scene):
    np.testing.assert_array_equal(read[1].images, scene.images)


def test_intrinsics_come_back(read, scene):
    np.testing.assert_allclose(read[1].intrinsics, scene.intrinsics, atol=1e-4)


def test_poses_come_back_but_for_one_motion_and_scale(read, scene):
    """From one camera to another, each rotation is the same, and each shift too but for one factor."""
    _, found = read
    ours, theirs = (np.linalg.inv(poses[:1]) @ poses for poses in (found.poses, scene.poses))
    np.testing.assert_allclose(ours[:, :3, :3], theirs[:, :3, :3], atol=1e-6)
    factor = np.linalg.norm(ours[1, :3, 3]) / np.linalg.norm(theirs[1, :3, 3])
    np.testing.assert_allclose(ours[:, :3, 3], factor * theirs[:, :3, 3], atol=1e-6)


def test_depths_are_those_of_the_files(read, scene):
    name, found = read
    if name == "blender":
        assert (found.near, found.far) == (2.0, 6.0)
    else:
        # In the normalized scene, the nearest bound is at 4/3.
        assert found.near == pytest.approx(4 / 3)
    if name in ("llff", "nerfstudio"):
        assert found.far / found.near == pytest.approx(scene.far / scene.near)
    if name.startswith("colmap"):
        points = _points(scene)
        depths = np.stack([(points - pose[:3, 3]) @ pose[:3, 2] for pose in scene.poses])
        low, high = np.percentile(depths, [0.1, 99.9], axis=1)
        assert found.far / found.near == pytest.approx(high.max() / low.min(), rel=1e-5)


def test_views_are_held_out(read):
    name, found = read
    assert found.held_out == ((8, 9) if name == "blender" else (0, 8))
    assert set(found.training) == set(range(VIEWS)) - set(found.held_out)


def test_the_nearest_views_are_by_distance_and_never_held_out(scene):
    order = scene.nearest(scene.poses[0], 4, without=0)
    distances = np.linalg.norm(scene.poses[:, :3, 3] - scene.poses[0, :3, 3], axis=1)
    expected = [at for at in np.argsort(distances) if at in scene.training and at != 0]
    assert order == expected[:4]


def test_reduced_photographs_have_reduced_intrinsics(scene, tmp_path):
    _llff(tmp_path, scene)
    found = load_scene(tmp_path, longest_side=SIDE // 2)
    assert found.images.shape == (VIEWS, SIDE // 2, SIDE // 2, 3)
    expected = scene.images[0].reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(found.images[0], expected, atol=1)
    # The middle of the image stays its middle.
    np.testing.assert_allclose(found.intrinsics[0, 0], [SIDE / 2, 0, (SIDE / 2 - 1) / 2])


def test_test_filenames_hold_out_views(scene, tmp_path):
    _transforms(tmp_path, scene, test_filenames=["images/view_03.png"])
    assert load_scene(tmp_path, near=1.0, far=9.0).held_out == (3,)


def test_gloss_moves_with_the_camera():
    dull, glossy = (load_scene(f"analytic:{gloss}", longest_side=SIDE) for gloss in (0, 0.8))
    changed = np.abs(glossy.images.astype(int) - dull.images).max(axis=(1, 2, 3))
    assert (changed > 20).all()


def _break(folder, name):
    if name == "missing image":
        (folder / "images" / "view_04.png").unlink()
    elif name == "count":
        table = np.load(folder / "poses_bounds.npy")
        np.save(folder / "poses_bounds.npy", table[:-1])
    elif name == "nan":
        table = np.load(folder / "poses_bounds.npy")
        table[3, 3] = np.nan
        np.save(folder / "poses_bounds.npy", table)
    elif name == "no rotation":
        table = np.load(folder / "poses_bounds.npy")
        table[3, 0] *= 2
        np.save(folder / "poses_bounds.npy", table)
    elif name == "exif":
        with Image.open(folder / "images" / "view_02.png") as image:
            exif = image.getexif()
            exif[274] = 6
            image.save(folder / "images" / "view_02.png", exif=exif)
    elif name == "size":
        Image.new("RGB", (SIDE, SIDE + 1)).save(folder / "images" / "view_02.png")
    elif name == "cut":
        data = (folder / "poses_bounds.npy").read_bytes()
        (folder / "poses_bounds.npy").write_bytes(data[:50])
    elif name == "depths":
        table = np.load(folder / "poses_bounds.npy")
        table[:, 15] = -1
        np.save(folder / "poses_bounds.npy", table)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing image", r"10 poses, and .*images 9 photographs"),
        ("count", r"9 poses, and .*images 10 photographs"),
        ("nan", r"the pose of view_03\.png is not finite"),
        ("no rotation", r"the pose of view_03\.png is no rotation"),
        ("exif", r"view_02\.png is turned by EXIF \(orientation 6\)"),
        ("size", r"view_02\.png has 20 x 21 pixels, and .*view_00\.png 20 x 20"),
        ("cut", r"poses_bounds\.npy is no whole NumPy file"),
        ("depths", r"expected 0 < near < far"),
    ],
)
def test_a_broken_llff_folder_is_told_in_one_line(scene, tmp_path, name, says):
    _llff(tmp_path, scene)
    _break(tmp_path, name)
    with pytest.raises(ValueError, match=says) as caught:
        load_scene(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_photograph_of_colmap_is_named(scene, tmp_path):
    _colmap(tmp_path, scene, binary=True)
    (tmp_path / "images" / "view_04.png").unlink()
    with pytest.raises(ValueError, match=r"no image file at .*view_04\.png"):
        load_scene(tmp_path)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_cut_off_file_of_colmap_is_named(scene, tmp_path, name):
    _colmap(tmp_path, scene, binary=True)
    file = tmp_path / "sparse" / "0" / f"{name}.bin"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name}\.bin is damaged or no COLMAP file"):
        load_scene(tmp_path)


def test_a_claim_of_too_many_entries_is_refused(scene, tmp_path):
    _colmap(tmp_path, scene, binary=True)
    (tmp_path / "sparse" / "0" / "points3D.bin").write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(ValueError, match="claims"):
        load_scene(tmp_path)


def test_distortion_is_refused(scene, tmp_path):
    _colmap(tmp_path, scene, binary=False, model=4, distortion=(0.1, 0, 0, 0))
    with pytest.raises(ValueError, match=r"distortion 0\.1, 0, 0, 0; undistort"):
        load_scene(tmp_path)


def test_distortion_of_nothing_is_a_pinhole(scene, tmp_path):
    _colmap(tmp_path, scene, binary=False, model=4, distortion=(0, 0, 0, 0))
    np.testing.assert_allclose(load_scene(tmp_path).intrinsics, scene.intrinsics, atol=1e-6)


def test_distortion_of_nerfstudio_is_refused(scene, tmp_path):
    _transforms(tmp_path, scene, k1=0.02)
    with pytest.raises(ValueError, match=r"distortion \(k1 0\.02\)"):
        load_scene(tmp_path, near=1, far=2)


def test_nerfstudio_needs_depths(scene, tmp_path):
    _transforms(tmp_path, scene)
    with pytest.raises(ValueError, match="give near and far"):
        load_scene(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not a whole JSON file"), ('{"frames": [{}]}', "lacks or misspells 'file_path'")],
)
def test_a_broken_transforms_file_is_named(tmp_path, content, says):
    (tmp_path / "transforms.json").write_text(content)
    with pytest.raises(ValueError, match=rf"transforms\.json .*{says}|{says}"):
        load_scene(tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [("nowhere", "no folder nowhere"), ("analytic:shiny", "analytic:0.5"), ("analytic:3", "0 to 1")],
)
def test_a_source_of_no_known_form_is_told(source, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        load_scene(source)


def test_a_folder_without_cameras_is_told(tmp_path):
    with pytest.raises(ValueError, match="needs the cameras"):
        load_scene(tmp_path)


def test_depths_of_the_analytic_scene_are_its_own():
    with pytest.raises(ValueError, match="knows its depths"):
        load_scene("analytic", near=1.0, far=2.0)


def test_half_of_the_depths_is_told(tmp_path):
    with pytest.raises(ValueError, match="both near and far"):
        load_scene(tmp_path, near=1.0)
