"""Print what a development environment installs from PyPI, a line each: pyproject.toml says it once.

The argument is the extra: dev, with what the package itself needs, or engines, without.
"""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
[extra] = sys.argv[1:]
print(*(project["dependencies"] if extra == "dev" else ()), *project["optional-dependencies"][extra], sep="\n")
