"""The keys of a config, with the values that train the demo's dense model on the digits."""

import ml_collections


def default_config() -> ml_collections.ConfigDict:
    """The whole config of one run, locked: an unknown key is an error.

    ``attention``, ``mlp`` and ``projections`` are as in `shiftaddvit_jax.create_model`: one kind, or one a
    stage, separated by commas. ``init_from`` is a checkpoint's folder; its model is reparameterized to the
    model described under ``model``.
    """
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "init_from": "",
            "model": {
                "name": "pvt_v2_nano",
                "attention": "msa",
                "mlp": "dense",
                "projections": "dense",
                "dropout": 0.0,
                "drop_path": 0.0,
                "weight_bits": 5,
                "activations": "float",
                "threshold": "sample",
            },
            "data": {
                "source": "digits",  # digits, folder or idx
                "path": "",
                "image_size": 32,
                "batch_size": 64,
                "augmentation": "affine",  # none, affine or crop_flip
            },
            "train": {
                "steps": 1000,
                "learning_rate": 2e-3,
                "warmup_steps": 100,
                "weight_decay": 0.05,
                "label_smoothing": 0.1,
                "clip_norm": 1.0,
                # The latency-aware load-balancing loss: its weight (the paper's), and the latencies of the
                # dense and the shift expert (the authors' 6:4; only their ratio counts). The name of a file
                # of `shiftaddvit measure-latency` gives each layer latencies of its own.
                "balance_weight": 0.01,
                "latencies": (6.0, 4.0),
                "log_every": 50,
                "evaluate_every": 250,
                "checkpoint_every": 250,
            },
        }
    )
    return config.lock()
