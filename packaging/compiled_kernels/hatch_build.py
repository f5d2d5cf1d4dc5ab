"""What of the wheel's description depends on something else: the version it belongs to, its platform."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Kernels belong to the version whose text made them."""

    def update(self, metadata: dict) -> None:
        """Ask for that version, with what calls kernels."""
        metadata["dependencies"] = [f"shiftaddvit-jax[export]=={metadata['version']}"]


class Platform(BuildHookInterface):
    """Libraries in a wheel are for one platform."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Name the platform of TVM's own wheel, whose runtime library is among them."""
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-manylinux_2_28_x86_64"
