"""Build hook: compiles the kernels into the wheel if there is a compiler; without one smidgen runs in plain PyTorch."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        specification = importlib.util.spec_from_file_location("build_kernels", Path(self.root) / "csrc" / "build.py")
        assert specification and specification.loader
        kernels = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(kernels)
        compiler = kernels.find_compiler()
        if compiler is None:
            self.app.display_warning("no C++ compiler: installing without native kernels, which is slower")
            return
        try:
            kernels.build(kernels.LIBRARY, compiler)
        except (OSError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", "") or str(error)
            self.app.display_warning(f"the native kernels do not compile here; installing without them:\n{words}")
            return
        # The library has no Python in it: one wheel for every Python of this platform.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append("src/smidgen/kernels/lib/libsmidgen.so")
