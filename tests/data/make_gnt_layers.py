"""How gnt_layers.npz was made: numbers of GNT's own code, with weights that are drawn by their names.

python tests/data/make_gnt_layers.py CLONE tests/data/gnt_layers.npz
CLONE is https://github.com/VITA-Group/GNT at 53e0fc3; torch is all that the modules need.
"""

import sys
import zlib

import numpy as np

VIEWS, HEIGHT, WIDTH, POINTS = 3, 36, 52, 5
PIXELS = np.array([[3, 5], [20, 11], [40, 30], [51, 0]], np.float32)
NEAR, FAR = 1.0, 9.0
DEPTH = 2


def draw(name, shape):
    """A tensor of a module, by its name."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.1 * values if name.endswith("weight") else 0.1 * values).astype(np.float32)


def _pose(place, yaw, pitch):
    cosine, sine = np.cos([yaw, pitch]), np.sin([yaw, pitch])
    around_y = np.array([[cosine[0], 0, sine[0]], [0, 1, 0], [-sine[0], 0, cosine[0]]])
    around_x = np.array([[1, 0, 0], [0, cosine[1], -sine[1]], [0, sine[1], cosine[1]]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = around_y @ around_x, place
    return pose.astype(np.float32)


def main(clone, file):
    sys.path.insert(0, clone)
    import torch
    from gnt.feature_network import ResUNet
    from gnt.projection import Projector
    from gnt.render_ray import sample_along_camera_ray
    from gnt.transformer_network import GNT

    def filled(module):
        state = module.state_dict()
        module.load_state_dict(
            {name: torch.tensor(draw(name, tuple(it.shape))) for name, it in state.items()}
        )
        return module.eval()

    class Settings:
        netwidth, trans_depth = 64, DEPTH

    images = np.random.default_rng(0).uniform(size=(VIEWS, HEIGHT, WIDTH, 3)).astype(np.float32)
    intrinsics = np.eye(4, dtype=np.float32)
    intrinsics[[0, 1], [0, 1]] = 40
    intrinsics[:2, 2] = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
    places = ((-0.6, 0.1, -3), (0.5, -0.2, -3.2), (0.1, 0.4, -2.8))
    angles = ((0.2, 0.05), (-0.15, -0.05), (0.02, 0.1))
    poses = np.stack([_pose(place, *each) for place, each in zip(places, angles, strict=True)])
    query = _pose((0.2, 0.1, -3.1), -0.05, 0.02)
    pixels = np.concatenate([PIXELS, np.ones((len(PIXELS), 1), np.float32)], axis=1)
    directions = (query[:3, :3] @ np.linalg.inv(intrinsics[:3, :3]) @ pixels.T).T.astype(np.float32)
    size = np.array([HEIGHT, WIDTH], np.float32)
    sources = np.stack([np.concatenate([size, intrinsics.ravel(), pose.ravel()]) for pose in poses])
    camera = np.concatenate([size, intrinsics.ravel(), query.ravel()])
    with torch.no_grad():
        origins = torch.tensor(np.tile(query[:3, 3], (len(PIXELS), 1)))
        bounds = torch.tensor([[NEAR, FAR]])
        ray = torch.tensor(directions)
        points, depths = sample_along_camera_ray(origins, ray, bounds, POINTS, inv_uniform=True, det=True)
        features, _ = filled(ResUNet(coarse_out_ch=32, fine_out_ch=32, single_net=True))(
            torch.tensor(images).permute(0, 3, 1, 2)
        )
        tokens, differences, mask = Projector("cpu").compute(
            points,
            torch.tensor(camera)[None],
            torch.tensor(images)[None],
            torch.tensor(sources)[None],
            featmaps=features,
        )
        model = filled(GNT(Settings, in_feat_ch=32, posenc_dim=63, viewenc_dim=63, ret_alpha=True))
        output = model(tokens, differences, mask, points, ray).numpy()
    np.savez_compressed(
        file,
        images=images,
        intrinsics=np.tile(intrinsics[:3, :3], (VIEWS, 1, 1)),
        poses=poses,
        query=query,
        directions=directions,
        depths=depths.numpy(),
        features=features.permute(0, 2, 3, 1).numpy(),
        tokens=tokens.numpy(),
        differences=differences.numpy(),
        visible=mask[..., 0].numpy() > 0,
        colours=output[:, :3],
        weights=output[:, 3:],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
