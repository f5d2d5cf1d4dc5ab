"""The names that a person chooses among: below every floor, and importing nothing, so that help is quick.

What is behind a name is on the floor that knows it; `tests/test_names.py` holds its tables to these.
"""

# Of layers.
ATTENTION_KINDS = (
    "msa",
    "sra",
    "linear_sra",
    "linear",
    "performer",
    "ecoformer",
    "hamming_linear",
    "hamming_ksh",
    "hamming_quadratic",
    "binary_softmax",
)
LINEAR_KINDS = ("dense", "shift", "moe")
PAPER_LATENCIES = (6.0, 4.0)  # of a mixture's dense and shift expert: the authors' ratio
LAYER_CHOICES = ("dense", "dense_int8", "shift", "shift_two_terms", "moe")  # of one linear layer

# Of what a conversion without training may cost.
PROXIES = ("agreement", "error")

# Of a search over layers' choices: layers that become the same together, and what is measured.
GROUPS = ("layer", "branch", "block", "stage")
LOSSES = ("error", "cross_entropy")

# Of how they are computed.
IMPLEMENTATIONS = ("xla", "tvm", "tvm_shift")
PRECISIONS = ("float32", "bfloat16", "int8")
ATTENTION_PRECISIONS = ("float32", "int8", "clipped_int8")
ROTATIONS = ("none", "hadamard", "hadamard_2x", "hadamard_4x")
PERFORMER_FEATURES = ("gaussian", "hadamard")
TRAINING_DTYPES = ("float32", "bfloat16")

# Of images, and of pictures.
SOURCES = ("digits", "folder", "idx", "tar", "array_record", "huggingface")
SCENE = "scene"  # the source of a training run's data that is photographs of one scene
PICTURES = ("energy", "latency", "pareto", "routing", "attention", "weights", "training", "shares")

# Of how images are perturbed: what the number means, and a distribution of it.
PERTURBATIONS = {
    "rotation": ("degrees, counter-clockwise", "uniform:-20:20"),
    "scale": ("a factor of lengths; 2 shows everything twice as large", "lognormal:0:0.1"),
    "shift": ("shares of the side, right and down, each drawn by itself", "uniform:-0.1:0.1"),
    "blur": ("a Gaussian's standard deviation in pixels", "uniform:0:1"),
    "brightness": ("a factor of pixels", "uniform:0.7:1.3"),
    "contrast": ("a factor of the distance from the image's mean", "uniform:0.7:1.3"),
    "hue": ("degrees that colors turn about gray", "uniform:-180:180"),
    "noise": ("its standard deviation, of pixels in [0, 1]", "uniform:0:0.1"),
}
POINTS = ("digital_net", "lattice", "halton", "iid")
STOPPING_RULES = ("cone", "student", "clt")
RANDOMIZATIONS = ("lms_shift", "shift", "nested", "lms_permutation", "permutation")

# Of where a run's figures go.
WRITERS = ("jsonl", "tensorboard", "wandb", "trackio")

# Of what completes commands.
SHELLS = ("bash", "zsh", "fish")

# Of what computes for many images.
ENGINES = ("local", "ray")

# Of what is compared, and how.
PEERS = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "torch")
NUMBER_FORMATS = ("float32", "float16", "int32", "int8")
PAPER_MODELS = ("pvt_tiny", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "deit_tiny")

# The balancing loss's aim with the authors' latencies, 6 : 4: both experts take the same time.
SHIFT_SHARE = 0.6
