"""Print the oldest versions that pyproject.toml supports, as constraints for pip (`make test-oldest`)."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
extras = ("train", "demo", "report", "trl")  # what runs; tools may be new
wanted = [*project["dependencies"], *(r for name in extras for r in project["optional-dependencies"][name])]
oldest = {m[1]: m[2] for r in wanted if (m := re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", r))}
print("\n".join(f"{name}=={version}" for name, version in sorted(oldest.items())))
